"""`multifid train`, and training from Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.apply.model import Model
from multifid.config import Config, as_config
from multifid.model import predictor
from multifid.parallel import groups
from multifid.training.callbacks import Callback
from multifid.training.ending import Ending
from multifid.training.run import train as train_run
from multifid.workflows.file_tasks import has_files, with_stores


@dataclass(frozen=True)
class Result(Ending):
    """How a run ended, and its model. The same on all ranks.

    Attributes:
        run: its directory.
        steps: of the run, those of earlier starts included.
        best: lowest validation value, the objective over the whole validation splits; None where there is none yet.
        best_step: whose weights are the model.
        complete: False where it was stopped before its end; training the same config goes on from there.
        reason: "complete", "stopped early: ...", "stopped by a signal", "stopped by a callback (...)".
        rows: all rows of RUN/metrics.jsonl, from the very beginning; one dict for each task at each log step and
            validation: step, epoch, split ("train" or "validation"), task, loss and objective (of scaled residuals),
            energy_mae (eV/atom), forces_mae (eV/angstrom), stress_mae (eV/angstrom^3), structures, seconds, lr,
            grad_norm, best, ... None where there is no value.
    """

    def model(self, device: str | None = None, precision: str = "fp32") -> Model:
        """The model of the best validation value, as `multifid.load` gives it. ValueError where there is none yet."""
        return predictor.load(self.run, device, precision, Model)


def train(
    config: Config | Path | str | Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    *,
    quiet: bool = False,
    signals: bool = False,
) -> Result:
    """Train a model, or go on with a run that was stopped.

    In a launch of several ranks (torchrun, srun) every rank makes the same call; callbacks are called on rank 0 alone,
    and their decision is that of all ranks.

    Args:
        config: a `Config`; the path of a YAML file, or of a run's directory; or a dict as YAML would give it, in which
            paths may be `Path` objects.
        callbacks: functions of one argument, called at every log step (`train.log_every`) and validation with its rows
            (see `Result.rows`). One that returns True, or a text that says why, stops the run after the next step, with
            everything saved; whatever else is returned means nothing. An error that it raises ends the run and is the
            caller's.
        quiet: print nothing; what a run says is in RUN/train.log in any case.
        signals: let SIGTERM and Ctrl-C stop the run like a callback, as `multifid train` does (main thread only).
            Without, Ctrl-C is KeyboardInterrupt, and the same call goes on from the newest checkpoint.

    Returns:
        How the run ended, and its model.

    Raises:
        ValueError: the config or the data cannot be trained on; with the message that the command prints. (OSError
            where files cannot be read or written.)
        FloatingPointError: loss or gradient was not finite too often, or no validation value was.
        RuntimeError: this rank leaves because another one failed, which says why. In the midst of a step, where it may
            wait for the other one for ever, its process is ended (exit code 75).
    """
    console, asked = Console(stderr=True, quiet=quiet), as_config(config)
    if asked.finetune is None and not has_files(asked):
        return Result(**vars(train_run(asked, console, callbacks=callbacks, signals=signals)))
    from multifid.workflows.finetune.refit import refit_at_the_end  # which needs this module

    with groups.world(asked.train.device, asked.parallel.silence) as world:
        asked = with_stores(asked, world, console)
        ending = train_run(asked, console, joined=world, callbacks=callbacks, signals=signals)
        with world.together():
            if world.first and ending.complete and asked.finetune is not None:
                new = [task for task in asked.tasks if task in asked.finetune.branches]
                refit_at_the_end(Path(asked.run), asked, new, console)
    return Result(**vars(ending))
