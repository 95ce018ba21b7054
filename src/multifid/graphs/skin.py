"""One structure that moves: its neighbour list is made with a skin and used again until an atom might have crossed it.

Every answer is that of a fresh list: pairs beyond the cutoff are dropped at every step, and the list is made again as
soon as a pair that it lacks could have come within the cutoff. With positions x, cell h and, when the list was made,
x0 and h0: what a homogeneous deformation F = h0^-1 h does not explain of the motion is u = x - x0 F, and a pair at r0
is now at

    |r0 F + u_j - u_i|  >=  smallest singular value of F * |r0|  -  (the two largest |u|)

so that a pair from beyond the list, |r0| >= cutoff + skin, stays beyond the cutoff while the right side does.
"""

import math
from dataclasses import replace

import numpy as np

from multifid.graphs.images import AT_THE_CUTOFF
from multifid.graphs.neighbors import neighbor_list
from multifid.graphs.origin import way_home
from multifid.structures.cells import completed
from multifid.structures.structure import Packed

SKIN = 0.5  # angstrom
ROUNDING = 1e-9  # angstrom


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one shape have the same numbers."""
    return bool((a == b).all())


class SkinList:
    """The neighbours of one structure, step after step; `made` counts the lists that were made from nothing."""

    def __init__(self, cutoff: float, skin: float = SKIN) -> None:
        if not (np.isfinite(skin) and skin >= 0):
            raise ValueError(f"skin {skin} must be a length of at least 0 angstrom")
        self.cutoff, self.skin, self.made = float(cutoff), float(skin), 0
        self._before: Packed | None = None  # as given, when the list was made

    def update(self, packed: Packed) -> Packed:
        """Take the next step of a structure, or another structure. Returns it near the origin (see `origin`).

        ValueError as `neighbor_list`: coincident atoms, cells without volume.
        """
        if not self._holds(packed):
            self._make(packed)
        assert self._before is not None
        cell = self._cell if _same(self._before.cell, packed.cell) else self._cell_of(packed)
        positions = packed.positions - self._away @ cell - self._middle
        i, j = self._candidates
        vectors = positions.take(j, axis=0) - positions.take(i, axis=0)
        if self._shifted:
            vectors += self._shifts @ packed.cell[0]
        self._squared = np.einsum("ek,ek->e", vectors, vectors)
        return replace(packed, positions=positions)

    def within(self, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
        """Edges (2, E) int64 and shifts (E, 3) float64 of the last step, for a cutoff of at most that of the list."""
        near = np.flatnonzero(self._squared < cutoff * cutoff - AT_THE_CUTOFF)
        return self._candidates.take(near, axis=1), self._shifts.take(near, axis=0)

    def nearest(self) -> tuple[float, int, int]:
        """The shortest distance of the last step (angstrom; infinite without pairs) and its two atoms."""
        if not len(self._squared):
            return np.inf, 0, 0
        pair = int(self._squared.argmin())
        return float(np.sqrt(self._squared[pair])), *map(int, self._candidates[:, pair])  # type: ignore[return-value]

    def _make(self, packed: Packed) -> None:
        self._before = None  # if what follows raises, there is no list
        self._cell = cell = self._cell_of(packed)
        positions = packed.positions
        away = way_home(packed, positions)
        # In whole cell vectors, which follow the cell, and one vector for all atoms.
        inside = away - away[:1] if len(away) else away
        self._away = np.round(inside @ np.linalg.inv(cell)) * packed.pbc
        self._middle = (away - self._away @ cell).mean(axis=0) if len(away) else np.zeros(3)
        home = replace(packed, positions=positions - self._away @ cell - self._middle)
        self._candidates, shifts = neighbor_list(home, self.cutoff + self.skin)
        self._shifts = shifts.astype(np.float64)
        self._shifted = bool(shifts.any())
        self._before, self.made = packed, self.made + 1

    def _holds(self, packed: Packed) -> bool:
        before = self._before
        if before is None or len(before.positions) != len(packed.positions):
            return False
        if not _same(before.pbc, packed.pbc) or not _same(before.numbers, packed.numbers):
            return False
        if not len(packed.positions):
            return True
        moved, least = packed.positions - before.positions, 1.0
        if not _same(before.cell, packed.cell):
            deformation = np.linalg.solve(self._cell_of(before), self._cell_of(packed))
            moved, least = packed.positions - before.positions @ deformation, self._least(deformation)
        moved = moved - moved.mean(axis=0)  # a structure that moves as a whole keeps its neighbours
        squares = np.sort(np.einsum("ik,ik->i", moved, moved))[-2:].tolist()
        longest = sum(map(math.sqrt, squares))
        # An atom and its own image differ by no u at all, two atoms by at most the two largest.
        return bool(least * (self.cutoff + self.skin) - longest > self.cutoff + ROUNDING)

    @staticmethod
    def _least(deformation: np.ndarray) -> float:
        return float(np.linalg.svd(deformation, compute_uv=False)[-1])

    @staticmethod
    def _cell_of(packed: Packed) -> np.ndarray:
        """(3, 3), with unit vectors where nothing is periodic."""
        return completed(packed.cell.astype(np.float64), np.asarray(packed.pbc, bool))[0]
