"""Positions near the origin, whatever the coordinates of a file: float32 tells 0.06 angstrom at 1e6 angstrom.

Atoms are moved by whole cell vectors into their cell, then the middle of each structure to the origin; in float64, so
that what a model does in float32 afterwards does not depend on where a structure lies or how far its atoms have moved
through a crystal. Nothing that a model may know of a structure changes.
"""

from dataclasses import replace

import numpy as np

from multifid.structures.cells import completed
from multifid.structures.structure import Packed


def near_origin(packed: Packed) -> Packed:
    """The same structures with positions in float64, in their cells and around the origin."""
    positions = packed.positions.astype(np.float64)
    return replace(packed, positions=positions - way_home(packed, positions))


def way_home(packed: Packed, positions: np.ndarray) -> np.ndarray:
    """What to subtract from positions (atoms, 3) for that: (atoms, 3) angstrom."""
    structure = np.repeat(np.arange(len(packed.natoms)), packed.natoms)
    away = np.zeros_like(positions)
    pbc = np.asarray(packed.pbc, bool)
    periodic = np.asarray(pbc.any(axis=1))
    if periodic.any():
        atoms, which = np.flatnonzero(periodic[structure]), np.cumsum(periodic) - 1
        cell = completed(packed.cell[periodic].astype(np.float64), pbc[periodic])
        of_atom = which[structure[atoms]]
        fractional = np.einsum("ni,nij->nj", positions[atoms], np.linalg.inv(cell)[of_atom])
        steps = np.floor(fractional) * pbc[periodic][of_atom]
        away[atoms] = np.einsum("ni,nij->nj", steps, cell[of_atom])
    inside = positions - away
    size = np.maximum(packed.natoms, 1)
    middle = np.stack([np.bincount(structure, inside[:, k], len(size)) / size for k in range(3)], axis=1)
    return away + middle[structure]
