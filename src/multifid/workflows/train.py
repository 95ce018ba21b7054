"""`multifid train`, and training from Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.apply import model
from multifid.apply.model import Model
from multifid.config import Config, as_config
from multifid.training.callbacks import Callback
from multifid.training.ending import Ending
from multifid.training.run import train as train_run


@dataclass(frozen=True)
class Result(Ending):
    """How a run ended, and its model. The same on all ranks."""

    def model(self, device: str | None = None, precision: str = "fp32") -> Model:
        """The model of the best validation value, as `multifid.load` gives it. ValueError where there is none yet."""
        return model.load(self.run, device, precision)


def train(
    config: Config | Path | str | Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    *,
    quiet: bool = False,
    signals: bool = False,
) -> Result:
    """Train a model, or go on with a run that was stopped; returns how that ended.

    config: a `Config`; the path of a YAML file, or of a run's directory; or a dict as YAML would give it.
    callbacks: functions of one argument, called at every log step (`train.log_every`) and validation with its rows, a
        list of one dict for each task (see `Result.rows`; `split` is "train" or "validation", `objective` the value
        that is minimised). One that returns True, or a text that says why, stops the run after the next step, with
        everything saved. An error that it raises ends the run and is the caller's.
    quiet: print nothing; what a run says is in RUN/train.log in any case.
    signals: let SIGTERM and Ctrl-C stop the run like a callback, as `multifid train` does (main thread only). Without,
        Ctrl-C is KeyboardInterrupt, and the run goes on from its newest checkpoint when it is trained again.

    In a launch of several ranks (torchrun, srun) every rank calls it alike; callbacks are called on rank 0 alone, and
    their decision is that of all ranks.

    Raises ValueError or OSError, with the message that the command prints, for a config or data that cannot be trained
    on, FloatingPointError where loss or gradient was not finite too often, and on ranks that leave because another
    one failed RuntimeError.
    """
    console = Console(stderr=True, quiet=quiet)
    return Result(**vars(train_run(as_config(config), console, callbacks=callbacks, signals=signals)))
