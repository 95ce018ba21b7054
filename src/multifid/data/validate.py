"""What a structure must be before a store takes it. A structure that is not becomes a skip with a short reason."""

import numpy as np
from scipy.spatial import cKDTree

from multifid.data.fields import LABELS, MAX_ATOMS, TASK_NAME
from multifid.structures.elements import MAX_Z
from multifid.structures.structure import SPLITS, Structure

COINCIDENT = 1e-3  # angstrom
FLAT = 1e-6  # the volume spanned by unit vectors along the periodic cell vectors must be larger
FLOAT32_MAX = float(np.finfo(np.float32).max)


def invalid(structure: Structure) -> str | None:
    """Why a store must not take this structure, in a short constant phrase; None if it may."""
    numbers, positions = np.asarray(structure.numbers), np.asarray(structure.positions)
    n = len(numbers) if numbers.ndim == 1 else -1
    if n == 0:
        return "no atoms"
    if n > MAX_ATOMS:
        return f"more than {MAX_ATOMS} atoms"
    if numbers.dtype.kind not in "iu" or n < 0 or numbers.min() < 1 or numbers.max() > MAX_Z:
        return f"atomic numbers are not integers from 1 to {MAX_Z}"
    if positions.shape != (n, 3):
        return "positions of another length than the atoms"
    if not np.abs(positions).max() <= FLOAT32_MAX:  # False for NaN too
        return "positions are not finite"
    if not -128 <= structure.charge <= 127:
        return "charge is not within -128..127"
    if not 1 <= structure.spin <= 255:
        return "spin multiplicity is not within 1..255"
    if structure.split is not None and structure.split not in SPLITS:
        return "the published split is none of ours"
    return _invalid_cell(structure) or _invalid_labels(structure, n) or _coincident(structure)


def drop_infinite(structure: Structure) -> list[str]:
    """Infinite labels (also those beyond float32, forces) become missing labels, in place; what was dropped.

    Forces are kept or dropped by atom: an atom with one component that is no number has no force label.
    """
    dropped = []
    for labels in structure.labels.values():
        if np.isinf(labels.energy):
            labels.energy = float("nan")
            dropped.append("energy is infinite")
        if labels.forces is not None and not np.abs(labels.forces).max(initial=0.0) <= FLOAT32_MAX:  # or NaN
            forces = np.array(labels.forces, np.float64)
            with np.errstate(invalid="ignore"):
                infinite = np.abs(forces) > FLOAT32_MAX
            forces[(infinite | np.isnan(forces)).any(axis=1)] = np.nan
            labels.forces = forces
            if infinite.any():
                dropped.append("forces are infinite")
        if labels.stress is not None and not np.isfinite(labels.stress).all():
            if np.isinf(labels.stress).any():
                dropped.append("stress is infinite")
            labels.stress = None
    return dropped


def _invalid_labels(structure: Structure, n: int) -> str | None:
    labelled = False
    for task, labels in structure.labels.items():
        assert TASK_NAME.fullmatch(task), f"a reader named a label set {task!r}"
        shapes = {"energy": (), "forces": (n, 3), "stress": (3, 3)}
        for kind in LABELS:
            value = getattr(labels, kind)
            if value is None:
                continue
            if np.shape(value) != shapes[kind]:
                return "forces of another length than the atoms" if kind == "forces" else f"{kind} has a wrong shape"
            labelled = labelled or bool(np.isfinite(value).any())
    return None if labelled else "no label"


def _invalid_cell(structure: Structure) -> str | None:
    if structure.pbc is None or not np.any(structure.pbc):
        return None
    if np.shape(structure.pbc) != (3,):
        return "pbc is not three flags"
    if structure.cell is None or np.shape(structure.cell) != (3, 3):
        return "periodic without a cell"
    vectors = np.asarray(structure.cell, np.float64)[np.asarray(structure.pbc, bool)]
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.isfinite(lengths).all() and lengths.min() > COINCIDENT):
        return "a periodic cell vector is zero or not finite"
    unit = vectors / lengths[:, None]
    if np.sqrt(max(np.linalg.det(unit @ unit.T), 0.0)) < FLAT:
        return "the cell has no volume"
    return None


def _coincident(structure: Structure) -> str | None:
    """Two atoms at one place, periodic images included: no model can tell them apart, and forces would be undefined."""
    positions = np.asarray(structure.positions, np.float64)
    if len(positions) == 1:
        return None
    reason = f"two atoms closer than {COINCIDENT} angstrom"
    if structure.pbc is None or not np.any(structure.pbc):
        if len(positions) > 64:
            return reason if cKDTree(positions).query_pairs(COINCIDENT) else None
        apart = positions[:, None] - positions  # for small molecules cheaper than a tree
        close = np.einsum("ijk,ijk->ij", apart, apart) < COINCIDENT**2
        return reason if np.count_nonzero(close) > len(positions) else None
    pbc = np.asarray(structure.pbc, bool)
    vectors = np.asarray(structure.cell, np.float64)[pbc]
    # Rows of the cell that are not periodic are replaced by unit vectors at right angles to those that are.
    cell = np.zeros((3, 3))
    cell[pbc] = vectors
    cell[~pbc] = np.linalg.svd(vectors)[2][pbc.sum() :]
    inverse = np.linalg.inv(cell)
    fractional = positions @ inverse
    fractional[:, pbc] %= 1.0
    fractional[fractional == 1.0] -= np.where(pbc, 1.0, 0.0)[np.nonzero(fractional == 1.0)[1]]
    fractional[:, ~pbc] -= fractional[:, ~pbc].min(axis=0) if (~pbc).any() else 0.0
    tree = cKDTree(fractional, boxsize=np.where(pbc, 1.0, 0.0))
    pairs = tree.query_pairs(min(COINCIDENT * np.linalg.norm(inverse, 2), 0.5), output_type="ndarray")
    if len(pairs) == 0:
        return None
    apart = fractional[pairs[:, 0]] - fractional[pairs[:, 1]]
    apart[:, pbc] -= np.round(apart[:, pbc])
    return reason if (np.linalg.norm(apart @ cell, axis=1) < COINCIDENT).any() else None
