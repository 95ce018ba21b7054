"""What a structure must be before a store takes it. A structure that is not becomes a skip with a short reason.

Two steps: `malformed` looks at the shapes of one structure, so that it can be laid into columns; `screen` looks at the
values of many at once.
"""

from typing import Any

import numpy as np

from multifid.graphs.images import LARGEST_EXTENT
from multifid.quality.coincident import COINCIDENT, coincident
from multifid.store.block import NO_CHARGE, NO_SPIN, Block, label_columns
from multifid.store.fields import LABELS, MAX_ATOMS, PROPERTIES, TASK_NAME, field
from multifid.structures.cells import spans_volume
from multifid.structures.elements import MAX_Z, no_element
from multifid.structures.structure import SPLITS, Structure

FLAT = 1e-4  # the smallest singular value of unit vectors along the cell vectors must be larger, as for neighbours
DENSEST = 10.0  # atoms per cubic angstrom (square, if flat); matter has below 1, and edges grow with it without bound
FLOAT32_MAX = float(np.finfo(np.float32).max)
DENSE = f"more than {DENSEST:g} atoms per cubic angstrom"
NO_VOLUME = "stress of a structure whose cell has no volume (a vector is missing, or lies in the plane of the others)"
NAMED = 20  # atomic numbers that are no elements and are named one by one
NUMBERS = f"atomic numbers are not integers from 1 to {MAX_Z}"


def malformed(structure: Structure) -> str | None:
    """Why this structure cannot be laid into columns, in a short constant phrase; None if it can."""
    numbers = np.asarray(structure.numbers)
    n = len(numbers) if numbers.ndim == 1 else -1
    if n == 0:
        return "no atoms"
    if n > MAX_ATOMS:
        return f"more than {MAX_ATOMS} atoms"
    if numbers.dtype.kind not in "iu" or n < 0:
        return NUMBERS
    if _shape(structure.positions) != (n, 3):
        return "positions of another length than the atoms"
    if structure.split is not None and structure.split not in SPLITS:
        return "the published split is none of ours"
    if structure.cell is None:
        if structure.pbc is not None and any(structure.pbc):
            return "periodic without a cell"
    elif _shape(structure.cell) != (3, 3) or (structure.pbc is not None and _shape(structure.pbc) != (3,)):
        return "cell is not (3, 3) or pbc not three flags"
    for task, labels in structure.labels.items():
        assert TASK_NAME.fullmatch(task), f"a reader named a label set {task!r}"
        if type(labels.energy) is not float and np.shape(labels.energy) != ():
            return "energy has a wrong shape"
        if labels.forces is not None and _shape(labels.forces) != (n, 3):
            return "forces of another length than the atoms"
        if labels.stress is not None and _shape(labels.stress) != (3, 3):
            return "stress has a wrong shape"
    return None


def _shape(values: Any) -> tuple[int, ...]:
    return values.shape if isinstance(values, np.ndarray) else np.shape(values)


def screen(block: Block) -> tuple[list[str | None], dict[str, int]]:
    """Why a store must not take each structure (None: it may), and how many labels were dropped, by reason.

    Infinite labels (also those beyond float32, forces) become missing labels, in place, and so does the stress of a
    structure whose cell has no volume. Forces are kept or dropped by atom: an atom with one component that is no number
    has no force label.
    """
    reasons: list[str | None] = [None] * len(block)

    def refuse(bad: np.ndarray, reason: str) -> None:
        for s in np.flatnonzero(bad):
            reasons[s] = reasons[s] or reason

    columns, first = block.columns, block.first_atoms()
    numbers, positions = columns["numbers"], columns["positions"]
    if numbers.min() < 1 or numbers.max() > MAX_Z:
        strange = (numbers < 1) | (numbers > MAX_Z)
        for z in np.unique(numbers[strange])[:NAMED].tolist():
            refuse(np.logical_or.reduceat(numbers == z, first), no_element(z))
        refuse(np.logical_or.reduceat(strange, first), NUMBERS)
    refuse(block.natoms > MAX_ATOMS, f"more than {MAX_ATOMS} atoms")
    refuse(~_within(positions, first), "positions are not finite")
    for name, low, high, what in (("charge", -128, 127, "charge"), ("spin", 1, 255, "spin multiplicity")):
        if name in columns:
            refuse((columns[name] < low) | (columns[name] > high), f"{what} is not within {low}..{high}")
    refuse(*_impossible_spin(block))
    refuse(_too_far(positions, first), f"atoms or a cell vector reach further than {LARGEST_EXTENT:g} angstrom")
    refuse(_too_dense(positions, first, block.natoms), DENSE)
    if "pbc" in columns:
        for bad, reason in _bad_cells(columns["cell"], columns["pbc"], block.natoms):
            refuse(bad, reason)
    dropped, labelled = _labels(block, first)
    refuse(~labelled, "no label")
    sound = np.array([reason is None for reason in reasons])
    if sound.any():
        close = np.zeros(len(block), bool)
        close[sound] = coincident(block.take(sound))
        refuse(close, f"two atoms closer than {COINCIDENT} angstrom")
    taken = np.array([reason is None for reason in reasons])  # what a skipped structure loses is not counted
    return reasons, {what: n for what, lost in dropped.items() if (n := int((lost & taken).sum()))}


def _impossible_spin(block: Block) -> tuple[np.ndarray, str]:
    """Which molecules (structures,) state a multiplicity that no number of unpaired electrons gives, and that reason.

    n electrons have the parity of 2S, and are at least 2S. Cells of crystals are left alone: what is called their spin
    is a matter of convention. So are blocks that say nothing of spin (a reader of singlets).
    """
    reason = (
        "the multiplicity does not fit the number of electrons "
        "(--option spin_counts=unpaired, where it counts unpaired electrons)"
    )
    if "spin" not in block.columns or block.unstated is None:
        return np.zeros(len(block), bool), reason
    unpaired, electrons = block.columns["spin"].astype(np.int64) - 1, block.electrons()
    impossible = (unpaired > electrons) | ((electrons - unpaired) % 2 == 1)
    return impossible & block.molecules() & ((block.unstated & NO_SPIN) == 0), reason


def assumed(block: Block) -> dict[str, int]:
    """What is taken for granted of molecules whose source does not state charge or multiplicity: what -> how many."""
    if block.unstated is None or not block.unstated.any():
        return {}
    odd, molecules = block.electrons() % 2 == 1, block.molecules()
    neutral = molecules & ((block.unstated & NO_CHARGE) != 0)
    lowest = molecules & ~neutral & ((block.unstated & NO_SPIN) != 0)
    found = {
        "no charge stated: taken as neutral": neutral & ~odd,
        "no charge stated: taken as neutral, with an odd number of electrons (an ion, or a radical?)": neutral & odd,
        "no multiplicity stated: an odd number of electrons taken as a doublet": lowest & odd,
    }
    return {what: n for what, where in found.items() if (n := int(where.sum()))}


def _within(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(structures,) bool: whether all values of a structure's atoms are numbers that float32 can hold."""
    if np.abs(values).max() <= FLOAT32_MAX:  # False for NaN too
        return np.ones(len(first), bool)
    return np.logical_and.reduceat((np.abs(values) <= FLOAT32_MAX).all(axis=1), first)


def _too_far(positions: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(structures,) bool: whether the atoms of a structure extend further than neighbours are looked for."""
    if np.abs(positions).max() < LARGEST_EXTENT / 2:
        return np.zeros(len(first), bool)
    return _extents(positions, first).max(axis=1) > LARGEST_EXTENT


def _too_dense(positions: np.ndarray, first: np.ndarray, natoms: np.ndarray) -> np.ndarray:
    """(structures,) bool: whether so many atoms lie in the box around them, an angstrom wider on all sides."""
    if natoms.max() <= 8 * DENSEST:
        return np.zeros(len(first), bool)
    return natoms > DENSEST * np.prod(_extents(positions, first) + 2.0, axis=1)


def _extents(positions: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(structures, 3) angstrom; NaN where positions are no numbers."""
    with np.errstate(invalid="ignore", over="ignore"):
        places = positions.astype(np.float64)
        return np.maximum.reduceat(places, first) - np.minimum.reduceat(places, first)


def _bad_cells(cells: np.ndarray, pbc: np.ndarray, natoms: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """cells (S, 3, 3), pbc (S, 3): which (S,) have a periodic vector that is none, which span no volume, and so on."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        lengths = np.sqrt((cells * cells).sum(axis=2))
        sound = (np.isfinite(lengths) & (lengths > COINCIDENT)) | ~pbc
        unit = np.where(pbc[:, :, None], cells / lengths[:, :, None], 0.0)
    unit = np.where(sound[:, :, None], unit, 0.0)
    # With a one on the diagonal for each open direction the Gram matrix is that of the periodic ones alone.
    gram = unit @ unit.transpose(0, 2, 1) + np.eye(3) * ~pbc[:, :, None]
    flat = np.linalg.eigvalsh(gram)[:, 0] < FLAT**2
    bad = ~sound.all(axis=1)
    lengths = np.where(pbc & sound, lengths, 1.0)
    volume = np.sqrt(np.maximum(np.linalg.det(gram), 0.0)) * lengths.prod(axis=1)
    return [
        (bad, "a periodic cell vector is zero or not finite"),
        (~bad & flat, "the cell has no volume"),
        (
            lengths.max(axis=1) > LARGEST_EXTENT,
            f"atoms or a cell vector reach further than {LARGEST_EXTENT:g} angstrom",
        ),
        (pbc.any(axis=1) & (natoms > DENSEST * volume), DENSE),
    ]


def _labels(block: Block, first: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What was dropped (reason -> (structures,) int), and which structures have a label (structures,) bool.

    A column that is left without a label is removed.
    """
    dropped = _stress_without_volume(block)
    labelled = np.zeros(len(block), bool)
    for kind in (*LABELS, *PROPERTIES):
        for name in label_columns(block, kind):
            values = block.columns[name]
            per_atom = field(name).rows == "atoms"
            if per_atom and (np.abs(values).max() <= FLOAT32_MAX):
                labelled[:] = True
                continue
            flat = np.abs(values.reshape(len(values), -1))
            limit = FLOAT32_MAX if per_atom else np.finfo(np.float64).max
            infinite = (flat > limit).any(axis=1)
            lost = ~(flat <= limit).all(axis=1)
            if lost.any():
                block.columns[name] = values = np.array(values, np.float64)
                values[lost] = np.nan
            if infinite.any():
                verb = "are" if kind == "forces" else "is"
                in_structures = np.logical_or.reduceat(infinite, first) if per_atom else infinite
                reason = f"{kind} {verb} infinite"
                dropped[reason] = dropped.get(reason, 0) + in_structures.astype(np.int64)
            has = ~lost
            labelled |= np.logical_or.reduceat(has, first) if per_atom else has
            if lost.all():
                del block.columns[name]
    return dropped, labelled


def _stress_without_volume(block: Block) -> dict[str, np.ndarray]:
    """Stress labels that mean nothing become NaN, in place: reason -> (structures,) int. It is an energy per volume."""
    names = label_columns(block, "stress")
    if not names:
        return {}
    flat = ~spans_volume(block.columns["cell"]) if "cell" in block.columns else np.ones(len(block), bool)
    lost = np.zeros(len(block), np.int64)
    for name in names if flat.any() else ():
        stress = np.array(block.columns[name], np.float64)
        lost[flat] += ~np.isnan(stress[flat]).all(axis=(1, 2))
        stress[flat] = np.nan
        block.columns[name] = stress
    return {NO_VOLUME: lost}
