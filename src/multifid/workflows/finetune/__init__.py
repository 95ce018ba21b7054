"""`multifid finetune`, and fine-tuning from Python: a trained model adapted to new data in one run.

the data become stores -> every branch is compared with the new labels -> a config is written with everything that
was chosen -> an ordinary run of training -> the branches that were not trained are kept
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.config import Config, apply_override, load_config, parse_config
from multifid.environment import cache_directory
from multifid.evaluation.data import label_sets
from multifid.evaluation.evaluate import evaluate_model
from multifid.evaluation.properties import property_rows, property_table
from multifid.evaluation.rows import OLD_TASKS, write_rows
from multifid.evaluation.table import quantities, rich_table
from multifid.feed.loader import open_sources
from multifid.model.model_file import load_model
from multifid.model.predictor import Predictor
from multifid.model.saved import load_description
from multifid.parallel import groups
from multifid.preparation.cache import ONLY_TEST
from multifid.store.store import Store
from multifid.training.callbacks import Callback
from multifid.training.run import train as train_run
from multifid.workflows.finetune.asked import Fold, Fractions, targets
from multifid.workflows.finetune.begin import SCRATCH, begun
from multifid.workflows.finetune.refit import refit_at_the_end, refit_only
from multifid.workflows.finetune.robustness import checked
from multifid.workflows.train import Result

__all__ = ["SCRATCH", "finetune", "refit_references"]


def finetune(
    model: Path | str,
    data: Path | str | Sequence[Path | str],
    out: Path | str,
    overrides: Sequence[str] = (),
    *,
    start: str | None = None,
    replay: Sequence[str] = (),
    distil: str | Path | None = None,
    check: Sequence[Path | str] = (),
    new_elements: bool = True,
    fractions: Fractions = (0.8, 0.1, 0.1),
    fold: Fold | None = None,
    options: Mapping[str, Any] | None = None,
    trust_units: bool = False,
    cache: Path | str | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    signals: bool = False,
) -> Result:
    """Adapt a trained model to new data, or go on with such a run that was stopped.

    Every dataset becomes a task with a branch of its own. The branch begins with the weights of that one of the model
    whose predictions agree best with the new labels, and with reference energies that are fitted to what these
    predictions lack. What moves, and how fast, is chosen by the number of structures, and written to OUT/config.yaml.

    The same on every rank of a launch by torchrun or srun.

    Args:
        model: a run's directory, or a model file.
        data: `[TASK=]STORE` or `[TASK=][FORMAT:]FILE`, one or several; files are prepared first.
        out: directory of the new run.
        overrides: `key.key=value` for keys of the config, as "finetune.moves=lora".
        start: branch (or task) of the model that new branches begin with; "scratch": fresh weights and the reference
            energies of `prepare`; default: the nearest.
        replay: tasks of the model that are trained on beside the new ones, so that they are not forgotten:
            `TASK=STORE`; a directory of replay stores, which `multifid export --replay N` writes; "auto": those beside
            the model file, or the stores that the run was trained on.
        distil: keep the other old tasks by what the model predicts of structures: "new" (those of the new data), a
            store, or a file that ASE reads.
        check: labelled data unlike the new ones, as of a higher temperature; errors before and after are printed at the
            end, beside those of the scans of dimers, and kept in OUT/robustness.json.
        new_elements: accept elements that the model does not know; they begin as the mean of their chemical neighbours.
        fractions: of files, for train, validation and test, by relatives.
        fold: (k, n), from 0: divide all data, stores too, into n parts of equal size by relatives, of which the k-th is
            test; the rest is train and validation, as `fractions` says.
        options: of files, how they are read, as in `prepare`.
        trust_units: of files, as in `prepare`.
        cache: where files become stores; default: ~/.cache/multifid.
        callbacks: as in `train`.
        quiet: print nothing.
        signals: as in `train`.

    Returns:
        As `train`: how the run ended, and its model, which has the model's other branches too.

    Raises:
        ValueError: for what a user can mend. (OSError where files cannot be read or written.)
    """
    run, path = Path(out), Path(model)
    texts = [str(data)] if isinstance(data, Path | str) else [str(one) for one in data]
    console = Console(stderr=True, quiet=quiet)
    early: dict[str, Any] = {}
    for override in overrides:
        apply_override(early, override)
    train, parallel = early.get("train") or {}, early.get("parallel") or {}
    with groups.world(train.get("device"), parallel.get("silence", 600.0)) as world:
        values: dict[str, Any] = {}
        where = Path(cache) if cache is not None else cache_directory()
        with world.together():
            if world.first:  # before anything is trained
                others = targets([str(c) for c in check], ONLY_TEST, dict(options or {}), trust_units, where, console)
            if world.first and (run / "config.yaml").exists():
                values = _held(run, path, texts, list(overrides))
            elif world.first:
                asked = targets(texts, fractions, dict(options or {}), trust_units, where, console, fold)
                on = None if distil is None else str(distil)
                values = begun(path, asked, run, list(overrides), start, list(replay), new_elements, console, on, where)
        config = parse_config(world.share(values), str(run))
        ending = train_run(config, console, joined=world, callbacks=callbacks, signals=signals)
        with world.together():
            if world.first and ending.complete:
                refit_at_the_end(run, config, [t for t in config.tasks if t in _new(config)], console)
                _say_what_is_kept(run, path, console)
                _old_tasks(run, path, console)
                checked(run, path, config, others, console)
    return Result(**vars(ending))


def _held(run: Path, model: Path, texts: list[str], overrides: list[str]) -> dict[str, Any]:
    """The config of a run that goes on. ValueError where it was begun from another model."""
    config = load_config(run, overrides)
    if config.finetune is None or config.init is None or Path(config.init).resolve() != model.resolve():
        raise ValueError(f"{run} holds a run that was not fine-tuned from {model}: choose another directory, --out")
    own = set(config.finetune.branches)
    named = {text.partition("=")[0] for text in texts if "=" in text}
    if named - own:
        raise ValueError(f"{run} was fine-tuned to {', '.join(sorted(own))}, not to {', '.join(sorted(named - own))}")
    return config.model_dump(mode="json")


def _new(config: Config) -> Mapping[str, str | None]:
    """The tasks that the run was fine-tuned to, those of replay left out."""
    assert config.finetune is not None, "begun by `finetune`, or refused"
    return config.finetune.branches


def _say_what_is_kept(run: Path, model: Path, console: Console) -> None:
    """The branches of the start model that the run did not train, and whether they are stale."""
    kept = {t: about for t, about in load_description(run)["tasks"].items() if "kept_from" in about}
    for stale, state in ((True, "stale: the encoder has moved without their data"), (False, "as they were")):
        if names := [task for task, about in kept.items() if bool(about.get("stale")) == stale]:
            line = f"branches of {model} that are kept, {state}: {', '.join(names)}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _old_tasks(run: Path, model: Path, console: Console) -> None:
    """Errors on the test splits of replayed tasks, of the model and of the run: printed, and in RUN/old_tasks.json."""
    config = load_config(run)
    assert config.finetune is not None
    old = {task: about for task, about in config.tasks.items() if task not in config.finetune.branches}
    data = (
        [
            d
            for source in open_sources(old)
            for task, label_set in source.tasks.items()
            for d in label_sets(Store(source.store.path), task if label_set == task else None)
            if source.store.size("test")
        ]
        if old
        else []
    )
    if not data:
        return
    before, after = Predictor(*load_model(model)), Predictor(*load_model(run))
    rows = evaluate_model(before, "before", data) + evaluate_model(after, "after", data)
    write_rows(run / OLD_TASKS, rows)
    if of_energies := [row for row in rows if not row.get("property")]:
        for quantity in quantities(of_energies):
            console.print(rich_table(of_energies, quantity))
    if of_properties := property_rows(rows):
        console.print(property_table(of_properties))


def refit_references(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    start: str | None = None,
    options: Mapping[str, Any] | None = None,
    trust_units: bool = False,
    cache: Path | str | None = None,
    quiet: bool = False,
) -> Path:
    """Fit a model's reference energies to other labels, without any gradient: other software's zero, in seconds.

    OUT becomes the directory of a model with one more branch, a copy of the nearest one (or of `start`) with its own
    reference energies. All other arguments as for `finetune`; all structures of a file are fitted to. Returns OUT.
    """
    console = Console(stderr=True, quiet=quiet)
    where = Path(cache) if cache is not None else cache_directory()
    asked = targets([str(data)], (1.0, 0.0, 0.0), dict(options or {}), trust_units, where, console)
    return refit_only(Path(model), asked, Path(out), start, console)
