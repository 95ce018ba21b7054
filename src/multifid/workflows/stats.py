"""`multifid stats STORE... [--figure FILE.png]`: what stores hold, as tables and as a periodic table of frequencies."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from multifid.data.statistics import StoreStatistics, statistics, tables
from multifid.data.store import Store


def stats(stores: Sequence[Path], figure: Path | None = None, console: Console | None = None) -> list[StoreStatistics]:
    """Print the tables of all stores; with `figure`, draw the element frequencies over all and for each.

    Raises ValueError where a path is no store or a store is damaged, and where no store is given.
    """
    if not stores:
        raise ValueError("stats needs at least one store: multifid stats STORE...")
    console = console or Console()
    found = []
    for path in stores:
        with console.status(f"reading {path}"):
            found.append(statistics(Store(path)))
    for table in tables(found):
        console.print(table)
    if figure is not None:
        _draw(found, figure)
        console.print(f"element frequencies: {figure}")
    return found


def _draw(found: Sequence[StoreStatistics], figure: Path) -> None:
    """Imported here only: without a figure the command does not wait for matplotlib."""
    from multifid.evaluate.figures import save
    from multifid.evaluate.periodic_table import periodic_tables

    names = [s.name for s in found]
    counts = {s.name if names.count(s.name) == 1 else f"{s.name} ({k})": s.elements for k, s in enumerate(found, 1)}
    save(periodic_tables(counts), figure)
