"""`multifid evaluate MODEL... --data ...`: trained models on stores and files, on all ranks of a launch.

Every rank evaluates its part of every dataset; the first one writes and prints.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multifid.environment import cache_directory
from multifid.evaluation.baselines import no_better, with_references
from multifid.evaluation.data import Data, Share, size_of
from multifid.evaluation.evaluate import evaluate_model, evaluate_run
from multifid.evaluation.matrix import Row, quantities
from multifid.evaluation.properties import no_better_than_known, property_rows, property_table
from multifid.evaluation.rows import write_rows
from multifid.evaluation.table import rich_table
from multifid.model.predictor import Predictor
from multifid.model.saved import load_description
from multifid.parallel import groups
from multifid.parallel.groups import World
from multifid.store.store import Store
from multifid.structures.properties import Property
from multifid.workflows.asked import open_data

SPLITS = ("test", "validation", "train", "all")
AnyModel = Predictor | Path | str
AnyData = Store | Path | str


def evaluate(
    models: AnyModel | Sequence[AnyModel] | Mapping[str, AnyModel],
    data: AnyData | Sequence[AnyData] | Mapping[str, AnyData],
    split: str = "test",
    branch: str | None = None,
    *,
    unseen: bool = False,
    device: str | None = None,
    max_edges: int | None = None,
    workers: int = 1,
    options: dict[str, Any] | None = None,
    trust_units: bool = False,
    cache: Path | str | None = None,
    out: Path | str | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Errors of every model on every dataset, as rows and, printed, as tables.

    The same on every rank of a launch by torchrun or srun.

    Args:
        models: what `multifid.load` gave, a run's directory, a model file, or several; a dict names them in rows and
            tables.
        data: a `Store`, a path, or several. A path may be written `[TASK=]STORE`, or `[TASK=][FORMAT:]FILE`, all of
            whose structures are test; a dict has the tasks as keys. A model that was trained on TASK answers with that
            branch, and total energies are compared. For other data its only branch answers, or the one that `branch`
            names, and energies are compared with reference energies subtracted.
        split: test, validation, train, or all.
        branch: the branch that answers.
        unseen: let structures with elements that a model has not seen into its means.
        device: cpu, cuda, ... for models that are paths; default: an accelerator if there is one. A loaded model stays
            where it is.
        max_edges: of a batch; default: what the memory allows.
        workers: threads that prepare batches ahead, on each rank.
        options: how files are read, as in `prepare`.
        trust_units: of files, as in `prepare`.
        cache: where files become stores; default: ~/.cache/multifid.
        out: a JSON file for all rows. Those of a run are added to RUN/evaluation.json in any case.
        quiet: print nothing.

    Returns:
        A dict for each model and dataset: model, data, split, structures, counted_structures, unseen_structures,
            nonfinite_structures, atoms, energy_mae and energy_rmse (eV/atom), forces_mae and forces_rmse (eV/angstrom,
            by component), stress_mae and stress_rmse (eV/angstrom^3), zero_energy_mae and so on (those of reference
            energies and zero forces on the same labels), branch, references, ... None without a label. Of a property
            also property (its kind), property_mae, property_rmse, r2, zero_property_mae (of what is known of each
            composition), or accuracy, roc_auc, log_loss, zero_accuracy of classes.

    Raises:
        ValueError: for what cannot be evaluated, with the reason. (OSError where files cannot be read or written.)
    """
    named = _named(models)
    if not named:
        raise ValueError("evaluate needs a trained model: multifid evaluate RUN... --data PATH...")
    if split not in SPLITS:
        raise ValueError(f"--split {split!r} must be {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    if device is not None and any(isinstance(model, Predictor) for _, model in named):
        raise ValueError(f"device {device!r} is for paths: a loaded model is evaluated on the device that it is on")
    console, aside = Console(quiet=quiet), Console(stderr=True, quiet=quiet)
    with groups.world(device) as world:
        where = Path(cache) if cache is not None else cache_directory()
        with world.together():
            predicted = _predicted([model for _, model in named])
        asked = open_data(_texts(data), options or {}, trust_units, where, world, aside, predicted)
        with world.together():
            _refuse_empty(asked, split)
        rows = []
        for name, model in named:
            structures = sum(size_of(d, split) for d in asked)
            with progress(world, name, structures, aside) as advance:
                share = Share(world.rank, world.size, world.group.sum_, workers, max_edges, advance)
                if isinstance(model, Predictor):
                    rows += evaluate_model(model, name, asked, split, branch, unseen=unseen, share=share)
                else:
                    path, place = Path(model), world.device
                    rows += evaluate_run(
                        path, asked, split, branch, unseen=unseen, share=share, device=place, name=name
                    )
        if world.first:
            if out is not None:
                write_rows(Path(out), rows)
            shown = with_references([row for row in rows if not row.get("property")])
            of_energies = [row for row in shown if not row.get("property")]
            for quantity in quantities(of_energies) if of_energies else ():
                console.print(rich_table(of_energies, quantity))
            if of_properties := property_rows(rows):
                console.print(property_table(of_properties))
            for note in [*no_better(rows), *no_better_than_known(rows), *notes(rows, asked)]:
                console.print(note, highlight=False, markup=False)
    return rows


def _named(models: AnyModel | Sequence[AnyModel] | Mapping[str, AnyModel]) -> list[tuple[str, AnyModel]]:
    """Every model with the name that its rows have: that of its directory or file, all of the path where names meet."""
    if isinstance(models, Mapping):
        return list(models.items())
    several = [models] if isinstance(models, Predictor | Path | str) else list(models)
    names = [f"model {k + 1}" if isinstance(m, Predictor) else Path(m).resolve().name for k, m in enumerate(several)]
    twice = {name for name, number in Counter(names).items() if number > 1}
    return [
        (str(model) if name in twice and not isinstance(model, Predictor) else name, model)
        for name, model in zip(names, several, strict=True)
    ]


def _predicted(models: Sequence[AnyModel]) -> dict[str, Property]:
    """task -> the property that one of the models predicts; with the empty name where they predict nothing else."""
    found: dict[str, Property] = {}
    others = False
    for model in models:
        description = model.description if isinstance(model, Predictor) else load_description(Path(model))
        for task, about in description["tasks"].items():
            if "property" in about:
                found.setdefault(task, Property.from_manifest(task, about["property"]))
            others = others or ("property" not in about and "kept_from" not in about)
    if found and not others:
        found[""] = next(iter(found.values()))
    return found


def _texts(data: AnyData | Sequence[AnyData] | Mapping[str, AnyData]) -> list[str]:
    """Datasets as the command takes them."""
    if isinstance(data, Mapping):
        return [f"{task}={_texts(one)[0]}" for task, one in data.items()]
    several = [data] if isinstance(data, Store | Path | str) else list(data)
    return [str(one.path if isinstance(one, Store) else one) for one in several]


def _refuse_empty(data: Sequence[Data], split: str) -> None:
    for d in data:
        if not size_of(d, split):
            sizes = ", ".join(f"{name} {d.store.size(name)}" for name in SPLITS[:-1])
            raise ValueError(f"--split {split}: {d.path} has no {split} structure ({sizes})")


def notes(rows: Sequence[Row], data: Sequence[Data]) -> list[str]:
    """What a user must know of energies that were aligned by the very structures that they are compared on."""
    lines = []
    for d in data:
        models = [r["model"] for r in rows if r["data"] == d.name and r["references"] not in ("model", "data")]
        if models:
            lines.append(
                f"{d.path}: energies of {', '.join(models)} are compared after a fit of reference energies to these "
                f"structures, since {d.name!r} is none of its tasks; TASK={d.path} compares total energies of a task"
            )
    return lines


@contextmanager
def progress(world: World, name: str, structures: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar over the structures of all datasets, on rank 0 and on a terminal: call it with how many more are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown_here = world.first and console.is_terminal and not console.quiet
    with Progress(*columns, console=console, disable=not shown_here) as bar:
        shown, done = bar.add_task(name, total=structures), 0

        def advance(more: int) -> None:
            nonlocal done
            done = min(done + more, structures)  # each rank counts its own for all
            bar.update(shown, completed=done)

        yield advance
        bar.update(shown, completed=structures)
