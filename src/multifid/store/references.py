"""Reference energies: what each element contributes to a total energy, fitted per task on the train split.

Min-norm least squares of energy per atom on composition: rows x_s = n_s / N_s (fractions), targets y_s = E_s / N_s,

    minimise  sum_s (y_s - x_s . e)^2,   e in the row space of X.

Totals reach 1e6 eV where 1e-9 eV matter, so neither normal equations nor a single pass will do. A first fit is rounded
to multiples of 2^-10 eV; with it the products n_sZ e_Z and their sums are exact in float64, so the residual energies of
the second fit are exact and small, and what it adds is exact to rounding of the sum. Both passes stream: structures of
one composition become one row with their mean, and rows are folded into one triangular factor (QR), whose size is the
number of elements. Factors of several runs fold into one likewise, so that several processes can share a pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from multifid.structures.elements import MAX_Z

COARSE = 2.0**10  # first fit: multiples of 1 / COARSE eV
FINE = 2.0**32  # reference energy of a structure: multiples of 1 / FINE = 2.3e-10 eV, see `align`
RANK_TOLERANCE = 1e-10  # singular values below this part of the largest one are zero
SHARE = 1e-9  # an element with a smaller part in the null space is determined

MOST_ROWS = 1 << 13  # compositions that are kept before they are folded into the factor
KEYS = np.random.default_rng(0).integers(-(2**62), 2**62, MAX_Z + 1)

Chunks = Iterable[tuple[np.ndarray, np.ndarray]]  # (counts (S, elements), total energies (S,) eV), iterated repeatedly


@dataclass(frozen=True)
class References:
    """Reference energies of one task.

    energies: Z -> eV. undetermined: groups of elements whose energies the data do not determine separately (only
    combinations of them). rank: number of determined directions. residual: RMS of the fit, meV/atom.
    null_space: orthonormal directions, Z -> coefficient, along which the energies could be moved without a change of
    the fit: the energy of a composition is determined where it is at right angles to all of them. None: not known,
    in manifests of earlier versions.
    """

    energies: dict[int, float]
    undetermined: list[list[int]]
    rank: int
    residual: float
    null_space: list[dict[int, float]] | None = None

    @cached_property
    def table(self) -> np.ndarray:
        """(119,) float64 eV by atomic number; NaN where an element has no reference energy."""
        table = np.full(MAX_Z + 1, np.nan)
        table[list(self.energies)] = list(self.energies.values())
        return table

    def total(self, numbers: np.ndarray, natoms: np.ndarray) -> np.ndarray:
        """(structures,) float64 eV: the reference energy of each structure.

        numbers (atoms,) of all structures laid end to end, natoms (structures,). It depends on the composition alone,
        to the last bit: not on the order of atoms nor on the other structures. NaN where an element has no reference.
        """
        counts = count_elements(numbers, natoms, np.arange(MAX_Z + 1))
        missing = np.isnan(self.table)
        # Not a matrix product: that may sum in another order in another batch.
        totals = (counts * np.where(missing, 0.0, self.table)).sum(axis=1)
        totals[counts[:, missing].any(axis=1)] = np.nan
        return np.round(totals * FINE) / FINE

    def align(self, energy: np.ndarray, numbers: np.ndarray, natoms: np.ndarray) -> np.ndarray:
        """Total energies minus reference energies, (structures,) eV; NaN where an element has no reference energy.

        `restore(align(e)) == e` bit for bit wherever |e - reference| <= |e| < 2^21 eV: the reference is a multiple of
        2^-32 eV, so the difference is exact. Where the aligned energy is larger than the total, the round trip is
        good to half a unit in the last place of the aligned energy.
        """
        return np.asarray(energy, np.float64) - self.total(numbers, natoms)

    def restore(self, aligned: np.ndarray, numbers: np.ndarray, natoms: np.ndarray) -> np.ndarray:
        """Total energies from aligned ones, (structures,) eV."""
        return np.asarray(aligned, np.float64) + self.total(numbers, natoms)

    def to_manifest(self) -> dict[str, Any]:
        """The keys references, undetermined, null_space, rank and residual of a task in the manifest."""
        null_space = [{str(z): c for z, c in direction.items()} for direction in self.null_space or []]
        return {
            "references": {str(z): e for z, e in sorted(self.energies.items())},
            "undetermined": self.undetermined,
            **({} if self.null_space is None else {"null_space": null_space}),
            "rank": self.rank,
            "residual": self.residual,
        }

    @classmethod
    def from_manifest(cls, task: dict[str, Any]) -> "References":
        """The inverse of `to_manifest`; other keys of the task are ignored."""
        energies = {int(z): float(e) for z, e in task["references"].items()}
        null_space = task.get("null_space")
        if null_space is not None:
            null_space = [{int(z): float(c) for z, c in direction.items()} for direction in null_space]
        undetermined = [list(group) for group in task["undetermined"]]
        return cls(energies, undetermined, task["rank"], task["residual"], null_space)


def count_elements(numbers: np.ndarray, natoms: np.ndarray, elements: Sequence[int] | np.ndarray) -> np.ndarray:
    """(structures, elements) float64: how many atoms of each of `elements` a structure has. Others are not counted."""
    column = np.full(MAX_Z + 1, -1)
    column[np.asarray(elements, int)] = np.arange(len(elements))
    places = column[numbers]
    known = places >= 0
    places += np.repeat(np.arange(len(natoms)) * len(elements), natoms)
    flat = np.bincount(places if known.all() else places[known], minlength=len(natoms) * len(elements))
    return flat.reshape(len(natoms), len(elements)).astype(np.float64)


class Folded(NamedTuple):
    """Rows [x | y] folded into a triangular factor (None without rows), how many, and which elements occur in them."""

    factor: np.ndarray | None
    rows: int
    seen: np.ndarray  # (elements,) bool


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the data: what is subtracted, `coarse` exactly and then `rest` (elements,) eV, and what is free."""

    coarse: np.ndarray
    rest: np.ndarray
    free: np.ndarray  # (elements,) bool

    def fold(self, chunks: Chunks) -> Folded:
        """The rows of some chunks."""
        factor, rows, seen = None, 0, np.zeros(len(self.free), bool)
        kept = Compositions(np.zeros((0, len(self.free))), np.zeros(0), np.zeros(0), 0.0)
        for counts, energies in chunks:
            if len(energies) == 0:
                continue
            rows += len(energies)
            seen |= counts.any(axis=0)
            left = (energies - counts @ self.coarse) - counts @ self.rest  # the first difference is exact
            kept = merged(kept.joined(Compositions(counts, left / counts.sum(axis=1), np.ones(len(left)), 0.0)))
            if len(kept.mean) > MOST_ROWS:
                factor, kept = self._with(factor, kept), kept.emptied()
        return Folded(factor if rows == 0 else self._with(factor, kept), rows, seen)

    def _with(self, factor: np.ndarray | None, rows: "Compositions") -> np.ndarray:
        """The factor with more rows folded into it."""
        fractions = rows.counts[:, self.free] / rows.counts.sum(axis=1)[:, None]
        block = np.column_stack([fractions, rows.mean]) * np.sqrt(rows.weight)[:, None]
        apart = np.zeros((1, block.shape[1]))
        apart[0, -1] = np.sqrt(rows.apart)
        return _triangle([block, apart] if factor is None else [factor, block, apart])


class Compositions(NamedTuple):
    """Structures by composition: how many atoms of each element, mean energy per atom, and how many structures.

    apart: what the squares of the deviations from these means sum to. For the fit that is as good as all of them.
    """

    counts: np.ndarray  # (compositions, elements)
    mean: np.ndarray  # (compositions,) eV
    weight: np.ndarray  # (compositions,)
    apart: float

    def joined(self, more: "Compositions") -> "Compositions":
        counts, mean, weight = (np.concatenate(pair) for pair in zip(self[:3], more[:3], strict=True))
        return Compositions(counts, mean, weight, self.apart + more.apart)

    def emptied(self) -> "Compositions":
        return Compositions(self.counts[:0], self.mean[:0], self.weight[:0], 0.0)


def merged(rows: Compositions) -> Compositions:
    """Every composition once. Frames of one material, and conformers, are many structures of few compositions."""
    keys = rows.counts.astype(np.int64) @ KEYS[: rows.counts.shape[1]]
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == len(keys) or not np.array_equal(rows.counts[first][group], rows.counts):
        return rows  # nothing to merge, or two compositions with one key
    weight = np.bincount(group, rows.weight)
    mean = np.bincount(group, rows.weight * rows.mean) / weight
    apart = float((rows.weight * np.square(rows.mean - mean[group])).sum())
    return Compositions(rows.counts[first], mean, weight, rows.apart + apart)


def fit(chunks: Chunks, elements: Sequence[int], isolated: dict[int, float] | None = None) -> References:
    """Fit reference energies; isolated-atom energies (Z -> eV) are taken as they are and the others fitted to the rest.

    chunks: counts of `elements` and finite total energies in eV, structure by structure; iterated twice. Elements that
    occur in no structure get no energy.
    """
    return fit_by(lambda once: [once.fold(chunks)], elements, isolated)


def fit_by(
    fold: Callable[[Pass], Iterable[Folded]], elements: Sequence[int], isolated: dict[int, float] | None = None
) -> References:
    """As `fit`; fold(pass) says what becomes of all chunks, run by run, in an order that must always be the same."""
    given = dict(isolated or {})
    fixed = np.array([z in given for z in elements], bool)
    known = np.array([given.get(z, 0.0) for z in elements], np.float64)
    coarse = np.round(known * COARSE) / COARSE
    first, _, _ = _together(fold(Pass(coarse, known - coarse, ~fixed)))
    coarse = np.where(fixed, coarse, 0.0)
    coarse[~fixed] = np.round(_solve(first)[0] * COARSE) / COARSE
    factor, rows, seen = _together(fold(Pass(coarse, np.where(fixed, known - coarse, 0.0), ~fixed)))
    solution, null = _solve(factor)
    residual = np.linalg.norm(factor[:, -1] - factor[:, :-1] @ solution) / np.sqrt(max(rows, 1))
    free = coarse[~fixed] + solution
    energies = known.copy()
    energies[~fixed] = free - null @ (null.T @ free)  # min-norm: rounding left a trace outside the row space
    names = np.asarray(elements, int)
    return References(
        energies={int(z): float(energies[k]) for k, z in enumerate(names) if seen[k]},
        undetermined=_groups(names[~fixed], null, seen[~fixed]),
        rank=int((seen & fixed).sum() + (~fixed).sum() - null.shape[1]),
        residual=float(1000 * residual),
        null_space=_directions(names[~fixed], null, seen[~fixed]),
    )


def _together(parts: Iterable[Folded]) -> tuple[np.ndarray, int, np.ndarray]:
    """Parts of one pass as one: the factor, how many rows, and which elements occur."""
    folded = list(parts)
    factors = [part.factor for part in folded if part.factor is not None]
    if not factors:
        raise ValueError("no structure of the train split has an energy: there is nothing to fit reference energies to")
    factor = factors[0] if len(factors) == 1 else _triangle(factors)
    return factor, sum(part.rows for part in folded), np.any([part.seen for part in folded], axis=0)


def _triangle(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The triangular factor of blocks of rows, one above the other."""
    return np.asarray(np.linalg.qr(np.concatenate(blocks), mode="r"))


def _solve(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Min-norm solution (K,) of the triangular system [R | q], and an orthonormal basis of its null space (K, k)."""
    matrix, right = factor[:, :-1], factor[:, -1]
    if matrix.shape[1] == 0:
        return np.zeros(0), np.zeros((0, 0))
    u, s, vh = np.linalg.svd(matrix, full_matrices=True)
    rank = int((s > RANK_TOLERANCE * s[0]).sum())
    solution = vh[:rank].T @ ((u[:, :rank].T @ right) / s[:rank])
    return solution, vh[rank:].T


def _directions(elements: np.ndarray, null: np.ndarray, seen: np.ndarray) -> list[dict[int, float]]:
    """The null space of the elements that occur, direction by direction; coefficients of rounding are left out."""
    basis, sizes, _ = np.linalg.svd(null[seen], full_matrices=False)  # an element that never occurs is one by itself
    inside = basis[:, : int((sizes > 0.5).sum())].T
    return [
        {int(z): float(c) for z, c in zip(elements[seen], direction, strict=True) if abs(c) > SHARE}
        for direction in inside
    ]


def _groups(elements: np.ndarray, null: np.ndarray, seen: np.ndarray) -> list[list[int]]:
    """Elements that the data do not determine separately: connected blocks of the projector onto the null space."""
    linked = np.abs(null @ null.T) > SHARE if null.shape[1] else np.zeros((len(elements),) * 2, bool)
    left = [k for k in range(len(elements)) if linked[k, k] and seen[k]]
    groups = []
    while left:
        group: set[int] = set()
        frontier = {left[0]}
        while frontier:
            group |= frontier
            frontier = {int(j) for k in frontier for j in np.flatnonzero(linked[k])} - group
        groups.append(sorted(int(elements[k]) for k in group))
        left = [k for k in left if k not in group]
    return sorted(groups)
