"""Cells as a source gives them: which of their vectors are kept, and which cells span a volume.

A cell is kept whole, whatever is periodic: slabs (`pbc T T F`), wires and molecules in a box have three vectors in most
files, and stress is an energy per volume of that whole cell. Neighbours go by `pbc` alone and never look at the vectors
of directions that are not periodic. A vector that a source does not give is zero, and a cell with such a vector has no
volume, hence no stress: in a layer without a third vector it would be a force per length.
"""

import numpy as np

from multifid.structures.reproducible import cross, determinant

SHORTEST = 1e-3  # angstrom
LONGEST = 1e6  # angstrom, of a vector that is not periodic: its products stay far within float32
FLAT = 1e-6  # of the product of the lengths: float32 tells less volume from none at all


def kept_vectors(cells: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """The cells (S, 3, 3); vectors that are not periodic, pbc (S, 3), and not finite or endless are made zero."""
    with np.errstate(invalid="ignore", over="ignore"):
        usable = np.sqrt((cells * cells).sum(axis=2)) <= LONGEST  # False for NaN too
    return cells if (usable | pbc).all() else np.where((usable | pbc)[:, :, None], cells, 0.0)


def spans_volume(cells: np.ndarray) -> np.ndarray:
    """Which cells (..., 3, 3) have three vectors in independent directions: (...) bool."""
    with np.errstate(invalid="ignore", over="ignore"):
        lengths = np.sqrt((cells * cells).sum(axis=-1))
        volume = np.abs(determinant(cells))
        return np.asarray((volume > FLAT * lengths.prod(axis=-1)) & (lengths.min(axis=-1) > SHORTEST))


def completed(cells: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Cells (S, 3, 3) with unit vectors at right angles to all others where pbc (S, 3) is false; with the same bits
    everywhere. Zero vectors where the periodic ones do not span what they should.
    """
    full = np.where(pbc[:, :, None], cells, 0.0)
    number = pbc.sum(axis=1)
    full[number == 0] = np.eye(3)
    one, two = np.flatnonzero(number == 1), np.flatnonzero(number == 2)
    with np.errstate(invalid="ignore", over="ignore"):
        along = pbc[one].argmax(axis=1)
        a = full[one, along]
        full[one, (along + 1) % 3] = b = _unit(cross(a, np.eye(3)[np.abs(a).argmin(axis=1)]))
        full[one, (along + 2) % 3] = _unit(cross(a, b))
        open_ = pbc[two].argmin(axis=1)
        full[two, open_] = _unit(cross(full[two, (open_ + 1) % 3], full[two, (open_ + 2) % 3]))
    return full


def _unit(vectors: np.ndarray) -> np.ndarray:
    x, y, z = vectors.T
    length = np.sqrt(x * x + y * y + z * z)[:, None]
    return np.where(length > 0, vectors / np.where(length > 0, length, 1.0), vectors)
