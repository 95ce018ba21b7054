"""Cells as a source gives them: which of their vectors are kept, and which cells span a volume.

A cell is kept whole, whatever is periodic: slabs (`pbc T T F`), wires and molecules in a box have three vectors in most
files, and stress is an energy per volume of that whole cell. Neighbours go by `pbc` alone and never look at the vectors
of directions that are not periodic. A vector that a source does not give is zero, and a cell with such a vector has no
volume, hence no stress: in a layer without a third vector it would be a force per length.
"""

import numpy as np

from multifid.structures.reproducible import determinant

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
