"""Whether a fine-tuned potential broke outside its new data, before and after: dimers at short distances, other files.

Two atoms that approach each other must repel: from the sum of their covalent radii down to half of it the energy must
rise at every step. Where it falls, a trajectory that comes near collapses. Other files are labelled structures unlike
the new data, as of a higher temperature (`--check`). Old tasks are measured on their own (`old_tasks.json`).
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from rich.console import Console

from multifid.config import Config
from multifid.evaluation.data import Data
from multifid.evaluation.evaluate import evaluate_model
from multifid.evaluation.fitted import FittedTable
from multifid.evaluation.metrics import Row
from multifid.evaluation.nearest import agreement
from multifid.evaluation.rows import ROBUSTNESS
from multifid.evaluation.table import quantities, rich_table
from multifid.model.predictor import Predictor, load
from multifid.store.store import Store
from multifid.structures.elements import SYMBOLS
from multifid.workflows.finetune.asked import Target

PARTS = np.linspace(1.0, 0.5, 26)  # of the sum of covalent radii, from far to near
NOISE = 1e-6  # eV: less is rounding
COMMONEST = 20  # elements of the new data whose pairs are scanned
SHOWN = 20  # pairs in the table


@dataclass(frozen=True)
class Dimer:
    """What a branch says of two atoms that approach each other."""

    pair: str  # as "C-O"
    falls_below: float | None  # angstrom: the largest distance below which the energy falls; None: it rises throughout
    depth: float  # eV: how far it falls below the highest value passed on the way

    @property
    def text(self) -> str:
        return "rises" if self.falls_below is None else f"falls below {self.falls_below:.2f} A, by {self.depth:.2g} eV"

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Dimer":
        """Of RUN/robustness.json, where a depth without bound is null."""
        depth = values["depth"]
        return cls(values["pair"], values["falls_below"], float("inf") if depth is None else depth)


def dimers(model: Predictor, task: str, elements: Sequence[int]) -> list[Dimer]:
    """Every pair of the elements that a task knows, in vacuum, scanned over `PARTS`."""
    known = {int(z) for z in model.description["tasks"][task]["references"]}
    pairs = list(combinations_with_replacement(sorted(set(elements) & known), 2))
    lengths = np.array([covalent_radii[a] + covalent_radii[b] for a, b in pairs])
    structures = [
        Atoms([a, b], [[0.0, 0.0, 0.0], [part * length, 0.0, 0.0]])
        for (a, b), length in zip(pairs, lengths, strict=True)
        for part in PARTS
    ]
    if not structures:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compositions and branches: differences of energy at one composition count
        energy = np.asarray(model.predict(structures, task, stress=False).energy)
    return [
        of_scan(f"{SYMBOLS[a]}-{SYMBOLS[b]}", PARTS * length, scan)
        for (a, b), length, scan in zip(pairs, lengths, energy.reshape(len(pairs), -1), strict=True)
    ]


def of_scan(pair: str, distances: np.ndarray, energies: np.ndarray) -> Dimer:
    """distances (n,) angstrom, falling; energies (n,) eV. A value that is not finite counts as a fall without bound."""
    if not np.isfinite(energies).all():
        return Dimer(pair, float(distances[np.argmin(np.isfinite(energies))]), float("inf"))
    falls = np.flatnonzero(np.diff(energies) < -NOISE)
    depth = float((np.maximum.accumulate(energies) - energies).max())
    return Dimer(pair, float(distances[falls[0]]), depth) if len(falls) else Dimer(pair, None, 0.0)


def checked(run: Path, start: Path, config: Config, checks: Sequence[Target], console: Console) -> None:
    """Print what became of dimers and of other files, before and after, and keep it in RUN/robustness.json."""
    assert config.finetune is not None
    before: Predictor = load(start, precision="fp64")
    after: Predictor = load(run, precision="fp64")
    # Files are evaluated in the precision of `multifid evaluate`.
    models: tuple[Predictor, Predictor] = (load(start), load(run))
    scans: dict[str, dict[str, list[Dimer] | None]] = {}
    rows: list[Row] = []
    for task, branch in config.finetune.branches.items():
        if task not in config.tasks or "property" in after.description["tasks"][task]:
            continue
        atoms = Store(config.tasks[task].store).elements
        elements = sorted(atoms, key=lambda z: -atoms[z])[:COMMONEST]
        old = next((t for t, about in before.description["tasks"].items() if about["branch"] == branch), None)
        scans[task] = {
            "before": None if old is None else dimers(before, old, elements),
            "after": dimers(after, task, elements),
        }
        console.print(table(task, scans[task]["before"], scans[task]["after"] or []))
        for check in checks:
            data = Data(f"{check.name} (check)", check.store, check.label_set)
            if old is not None:
                rows.append(_refitted(models[0], "before", data, old))
            rows.append(_refitted(models[1], "after" if len(scans) == 1 else f"after, {task}", data, task))
    for quantity in quantities(rows):
        console.print(rich_table(rows, quantity))
    said = {
        task: {when: None if found is None else [_plain(d) for d in found] for when, found in both.items()}
        for task, both in scans.items()
    }
    part = run / f".{ROBUSTNESS}.part"
    part.write_text(json.dumps({"dimers": said, "checks": rows}, indent=1, default=str), encoding="utf-8")
    os.replace(part, run / ROBUSTNESS)


def _refitted(model: Predictor, name: str, data: Data, task: str) -> Row:
    """The errors of a task on all structures, those of energies with reference energies fitted anew to their labels.

    Where a structure has an element that the task does not know, energies are compared as `evaluate` does.
    """
    [row] = evaluate_model(model, name, [data], "all", task)
    if set(data.store.elements) <= {int(z) for z in model.description["tasks"][task]["references"]}:
        found = agreement(model, task, data.store, data.label_set, "all")
        row |= {"energy_mae": found.energy_mae, "energy_rmse": found.energy_rmse, "references": "fitted to these data"}
    return row


def table(task: str, before: list[Dimer] | None, after: list[Dimer]) -> FittedTable:
    """Pairs whose energy falls, before or after; the title says of how many."""
    title, rows = falling(task, before, after)
    return FittedTable(title, ("pair",), ("before", "after"), rows or [("all", "", "rises")])


def falling(task: str, before: list[Dimer] | None, after: list[Dimer]) -> tuple[str, list[tuple[str, str, str]]]:
    """A sentence of how many pairs fall, and (pair, before, after) of at most `SHOWN` of them."""
    held = {d.pair: d for d in before or []}
    shown = [d for d in after if d.falls_below is not None or (d.pair in held and held[d.pair].falls_below is not None)]
    bad = sum(d.falls_below is not None for d in after)
    was = "" if before is None else f" (before: {sum(d.falls_below is not None for d in before)})"
    title = f"{task}: the energy of {bad} of {len(after)} pairs of atoms falls as they approach{was}"
    return title, [(d.pair, held[d.pair].text if d.pair in held else "", d.text) for d in shown[:SHOWN]]


def scans_of(run: Path) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """What `falling` says of each new task in RUN/robustness.json; nothing without one. ValueError if damaged."""
    try:
        held = json.loads((run / ROBUSTNESS).read_text(encoding="utf-8"))["dimers"]
        both = {t: {w: d and [Dimer.read(x) for x in d] for w, d in found.items()} for t, found in held.items()}
        return [falling(task, found["before"], found["after"]) for task, found in both.items()]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run / ROBUSTNESS} is damaged ({error}): move it away, and fine-tune again") from None


def checks_of(run: Path) -> list[Row]:
    """Rows of RUN/robustness.json on other files, "before" and "after"; none without one."""
    try:
        return list(json.loads((run / ROBUSTNESS).read_text(encoding="utf-8"))["checks"])
    except FileNotFoundError:
        return []


def _plain(dimer: Dimer) -> dict[str, object]:
    values = asdict(dimer)
    return values | {"depth": None if not np.isfinite(dimer.depth) else dimer.depth}
