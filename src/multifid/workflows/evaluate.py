"""`multifid evaluate RUN... --data ...`: trained models on stores and files, on all ranks of a launch.

Every rank evaluates its part of every dataset; the first one writes and prints.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multifid.evaluation.evaluate import Data, Share, evaluate_run, size_of
from multifid.evaluation.matrix import Row, quantities
from multifid.evaluation.table import rich_table
from multifid.parallel import groups
from multifid.parallel.groups import World
from multifid.parallel.launch import cache_directory
from multifid.workflows.asked import open_data

SPLITS = ("test", "validation", "train", "all")


def evaluate(
    runs: Sequence[Path],
    data: Sequence[str],
    split: str = "test",
    branch: str | None = None,
    *,
    unseen: bool = False,
    device: str | None = None,
    max_edges: int | None = None,
    workers: int = 1,
    options: dict[str, str] | None = None,
    trust_units: bool = False,
    cache: Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Rows of every run on every dataset, added to RUN/evaluation.json and printed as tables by rank 0.

    data: `[TASK=]STORE`, or `[TASK=][FORMAT:]FILE`, all of whose structures are test.  unseen: structures with elements
    that a model has not seen enter its means.  device: as in `train.device`.  options, trust_units: how files are read,
    as in `prepare`.  cache: where files become stores.  The same on every rank of a launch by torchrun or srun.
    """
    if not runs:
        raise ValueError("evaluate needs a trained run: multifid evaluate RUN... --data PATH...")
    if split not in SPLITS:
        raise ValueError(f"--split {split!r} must be {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    console = console or Console()
    with groups.world(device) as world:
        asked = open_data(data, options or {}, trust_units, cache or cache_directory(), world, Console(stderr=True))
        with world.together():
            _refuse_empty(asked, split)
        rows = []
        for run in runs:
            structures = sum(size_of(d, split) for d in asked)
            with progress(world, run.name, structures) as advance:
                share = Share(world.device, world.rank, world.size, world.group.sum_, workers, max_edges, advance)
                rows += evaluate_run(run, asked, split, branch, unseen=unseen, share=share)
        if world.first:
            for quantity in quantities(rows):
                console.print(rich_table(rows, quantity))
            for note in notes(rows, asked):
                console.print(note, highlight=False, markup=False)
    return rows


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
def progress(world: World, name: str, structures: int) -> Iterator[Callable[[int], None]]:
    """A bar over the structures of all datasets, on rank 0 and on a terminal: call it with how many more are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (world.first and console.is_terminal)) as bar:
        shown, done = bar.add_task(name, total=structures), 0

        def advance(more: int) -> None:
            nonlocal done
            done = min(done + more, structures)  # each rank counts its own for all
            bar.update(shown, completed=done)

        yield advance
        bar.update(shown, completed=structures)
