"""`multifid stats STORE... [--figure FILE.png]`: what stores hold, as tables and as a periodic table of frequencies."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from multifid.evaluation.fitted import FittedTable
from multifid.store.statistics import Range, StoreStatistics, statistics
from multifid.store.store import Store
from multifid.structures.elements import SYMBOLS
from multifid.structures.structure import SPLITS

GPA = 160.21766208  # 1 eV/angstrom^3 in GPa


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


def tables(stores: Sequence[StoreStatistics]) -> list[FittedTable]:
    """Several narrow tables in place of one wide one."""
    tasks = [(s, name) for s in stores for name in s.tasks if s.tasks[name].property is None]
    properties = [(s, name) for s in stores for name in s.tasks if s.tasks[name].property is not None]
    of_energies = _of_energies(tasks) if tasks else []
    own = _table(
        "Properties, in the units of their data (scale: of what is learnt, in the train split)",
        ("store", "task", "kind"),
        ("labels", "minimum", "mean", "maximum", "scale"),
        (_property(*t) for t in properties),
    )
    return [
        _table("Stores", ("store",), ("structures", *SPLITS, "atoms"), map(_holdings, stores)),
        _table(
            "Geometry",
            ("store",),
            (
                "atoms per structure\nmin / median / max",
                "Å³ per atom\nmin / mean / max",
                "periodic",
                "charged",
                "spin\u00a0≠\u00a01",
            ),
            map(_geometry, stores),
        ),
        _table("Elements", ("store",), ("elements",), map(_elements, stores), last="which"),
        *of_energies,
        *([own] if properties else []),
    ]


def _of_energies(tasks: Sequence[tuple[StoreStatistics, str]]) -> list[FittedTable]:
    """Labels, ranges and references of label sets with energies, forces or stress."""
    return [
        _table("Labels", ("store", "task"), ("energy", "forces", "stress"), (_labels(*t) for t in tasks), "theory"),
        _table(
            "Ranges (energies without the reference energies)",
            ("store", "task"),
            ("energy, meV/atom\nmin / max / std", "forces, eV/Å\nRMS / longest", "stress, GPa\nRMS / largest"),
            (_ranges(*t) for t in tasks),
        ),
        _table(
            "Reference energies (fitted on the train split)",
            ("store", "task"),
            ("rank of\nelements", "residual\nmeV/atom", "structures\nwithout"),
            (_references(*t) for t in tasks),
            last="determined only together",
        ),
    ]


def _property(s: StoreStatistics, name: str) -> list[str]:
    task = s.tasks[name]
    v, kind = task.value, str(task.property)
    span = [f"{x:.5g}" for x in (v.minimum, v.mean, v.maximum)] if v.count else ["–"] * 3
    return [s.name, name, kind, _count(task.labels.get(kind, 0)), *span, f"{task.scale:.4g}"]


def _table(
    title: str, names: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]], last: str | None = None
) -> FittedTable:
    """Names, numbers, then one column of text. Where all tasks are named like their stores, they are named once."""
    cells = [[escape(cell) for cell in row] for row in rows]
    if len(names) == 2 and all(row[0] == row[1] for row in cells):
        names, cells = names[1:], [row[1:] for row in cells]
    return FittedTable(title, names, numbers, cells, last)


def _holdings(s: StoreStatistics) -> list[str]:
    return [s.name, *(f"{n:,}" for n in (s.structures, *(s.splits[split] for split in SPLITS), s.atoms))]


def _geometry(s: StoreStatistics) -> list[str]:
    low, median, high = s.natoms
    v = s.volume
    volume = f"{v.minimum:.1f} / {v.mean:.1f} / {v.maximum:.1f}" if v.count else "–"
    flags = [_count(n) for n in (s.periodic, s.charged, s.open_shell)]
    return [s.name, f"{low} / {median:g} / {high}", volume, *flags]


def _elements(s: StoreStatistics) -> list[str]:
    return [s.name, str(len(s.elements)), _symbols(s.elements)]


def _labels(s: StoreStatistics, name: str) -> list[str]:
    task = s.tasks[name]
    coverage = [f"{n:,} ({_percent(s.coverage(name, kind))})" if n else "–" for kind, n in task.labels.items()]
    return [s.name, name, *coverage, task.level_of_theory]


def _ranges(s: StoreStatistics, name: str) -> list[str]:
    e, forces, longest, v = (s.tasks[name].energy, s.tasks[name].forces, s.tasks[name].force, s.tasks[name].stress)
    energy = f"{1000 * e.minimum:.0f} / {1000 * e.maximum:.0f} / {1000 * e.deviation:.1f}" if e.count else "–"
    force = f"{forces.rms:.3g} / {longest.maximum:.3g}" if forces.count else "–"
    stress = f"{GPA * v.rms:.3g} / {GPA * _largest(v):.3g}" if v.count else "–"
    return [s.name, name, energy, force, stress]


def _references(s: StoreStatistics, name: str) -> list[str]:
    fit = s.tasks[name].references
    together = "; ".join(_symbols(group) for group in fit.undetermined) or "–"
    rank = f"{fit.rank} of {len(fit.energies)}"
    return [s.name, name, rank, f"{fit.residual:.1f}", _count(s.tasks[name].unreferenced), together]


def _largest(values: Range) -> float:
    return max(-values.minimum, values.maximum)


def _count(n: int) -> str:
    return f"{n:,}" if n else "–"


def _percent(fraction: float) -> str:
    """Never "100 %" where one is missing, nor "0 %" where there is one."""
    percent = 100.0 * fraction
    if percent in (0.0, 100.0):
        return f"{percent:.0f} %"
    return f"{min(max(percent, 0.1), 99.9):.1f} %"


def _symbols(numbers: Iterable[int]) -> str:
    return " ".join(SYMBOLS[z] for z in sorted(numbers))


def _draw(found: Sequence[StoreStatistics], figure: Path) -> None:
    """Imported here only: without a figure the command does not wait for matplotlib."""
    from multifid.evaluation.figures import save
    from multifid.evaluation.periodic_table import periodic_tables

    names = [s.name for s in found]
    counts = {s.name if names.count(s.name) == 1 else f"{s.name} ({k})": s.elements for k, s in enumerate(found, 1)}
    save(periodic_tables(counts), figure)
