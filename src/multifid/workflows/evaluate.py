"""`multifid evaluate RUN... --data ...`: trained models on stores, on the ranks and accelerators of the launch.

Every rank evaluates its part of every dataset; the first one writes and prints.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multifid.evaluate.evaluate import Data, Share, data_of, evaluate_run, size_of
from multifid.evaluate.matrix import Row, quantities
from multifid.evaluate.table import rich_table
from multifid.parallel import groups
from multifid.parallel.groups import World

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
    console: Console | None = None,
) -> list[Row]:
    """Rows of every run on every dataset, added to RUN/evaluation.json and printed as tables by rank 0.

    data: `[TASK=]STORE`.  unseen: structures with elements that a model has not seen enter its means.  device: as in
    `train.device`.  The same on every rank of a launch by torchrun or srun.
    """
    if not runs:
        raise ValueError("evaluate needs a trained run: multifid evaluate RUN... --data STORE...")
    if split not in SPLITS:
        raise ValueError(f"--split {split!r} must be {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    console = console or Console()
    with groups.world(device) as world:
        with world.together():
            asked = distinct([d for text in data for d in data_of(text)])
        rows = []
        for run in runs:
            structures = sum(size_of(d, split) for d in asked)
            with progress(world, run.name, structures) as advance:
                share = Share(world.device, world.rank, world.size, world.group.sum_, workers, max_edges, advance)
                rows += evaluate_run(run, asked, split, branch, unseen=unseen, share=share)
        if world.first:
            for quantity in quantities(rows):
                console.print(rich_table(rows, quantity))
    return rows


def distinct(data: list[Data]) -> list[Data]:
    """The datasets, if each has a name of its own. ValueError for two of one name: they would have one row."""
    for k, one in enumerate(data):
        for other in data[:k]:
            if one.name == other.name:
                both = f"{other.store.path} and {one.store.path}"
                raise ValueError(
                    f"--data: {both} are both called {one.name!r}; call one otherwise: NAME={one.store.path}"
                )
    return data


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
