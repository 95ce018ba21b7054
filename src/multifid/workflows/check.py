"""`multifid check STORE...`: what is doubtful in the data: units, outliers, duplicates, leakage."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from multifid.evaluation.fitted import FittedTable
from multifid.preparation.summary import GPA, told
from multifid.quality.check import check_store
from multifid.quality.leakage import Leaks, leaks
from multifid.quality.outliers import Outliers, outliers
from multifid.store.store import Store

UNITS = {"energy": (1000.0, "meV/atom"), "forces": (1000.0, "meV/angstrom"), "stress": (GPA, "GPa")}


def check(paths: Sequence[Path], console: Console | None = None) -> bool:
    """Print what is found in each store and across them; whether all units are believed.

    ValueError where a path is no store or a store is damaged: everything is read, and verified.
    """
    if not paths:
        raise ValueError("check needs at least one store: multifid check STORE...")
    console = console or Console()
    stores = [Store(path) for path in paths]
    believed = True
    for store in stores:
        with console.status(f"reading {store.path}"):
            checked, far = check_store(store), outliers(store)
        found = checked.doubts
        believed = believed and not found
        console.print(f"[bold]{escape(str(store.path))}[/]: {store.structures:,} structures", highlight=False)
        for doubt in found:
            console.print(f"  [red]doubtful[/] {escape(str(doubt))}", highlight=False)
        if not found:
            console.print("  units: nothing speaks against them", highlight=False)
        for what, line in told(checked.to_manifest()).items():
            console.print(f"  measured, {escape(what)}: {escape(line)}", highlight=False)
        for one in far:
            console.print(_table(store, one))
        if not far:
            console.print("  outliers: none", highlight=False)
    with console.status("comparing structures"):
        _print_leaks(leaks(stores), stores, console)
    return believed


def _table(store: Store, found: Outliers) -> FittedTable:
    factor, unit = UNITS[found.kind]
    rows = []
    for one in sorted(found.worst, reverse=True):
        where = f"{store.source_file(one.structure)}: {store.source_id(one.structure)}"
        rows.append([f"{one.structure:,}", f"{factor * one.value:.0f}", f"{one.deviations:.0f}", escape(where)])
    title = (
        f"  outliers, {found.kind} of {found.task}: {found.count:,} structures far from the median of "
        f"{factor * found.median:.3g} {unit} (robust deviation {factor * found.deviation:.3g})"
    )
    return FittedTable(title, ["structure"], [unit, "deviations"], rows, "source")


def _print_leaks(found: Leaks, stores: Sequence[Store], console: Console) -> None:
    for store, count in zip(stores, found.repeats, strict=True):
        text = f"{count:,} structures repeat an earlier one" if count else "none"
        console.print(f"duplicates in {escape(str(store.path))}: {text}", highlight=False)
    for (a, b), count in found.leaks.items():
        there = "its own train split" if a == b else f"the train split of {stores[b].path}"
        message = f"{count:,} validation and test structures of {stores[a].path} are in {there}"
        console.print(f"[red]leakage[/] {escape(message)}", highlight=False)
    if not found.leaks:
        console.print("leakage from test to train: none", highlight=False)
    else:
        console.print("  (prepare --drop-duplicates, --drop-duplicates-of STORE set such structures aside)")
