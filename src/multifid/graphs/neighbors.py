"""Which atoms see which: every pair within the cutoff, periodic images included, for many structures laid end to end.

Small molecules go through one numpy operation for many of them: all pairs of each, distances from explicit differences
(a matrix-product distance loses 4e-3 angstrom in float32). All others go through `images`.
"""

import numpy as np

from multifid.graphs.images import COINCIDENT, Pairs, Systems, coincident, pairs_among_images
from multifid.structures.structure import Packed

ALL_PAIRS_UP_TO = 128  # atoms of a molecule
PAIRS_AT_ONCE = 1 << 15  # held in memory at once; what fits into the processor's cache is also fastest
PADDED = 4  # times the pairs that there are, at most: neighbours in a batch are padded to one size
FAR_AWAY = 1e9  # angstrom: there, and at its multiples, are the atoms that only fill up


def neighbor_list(packed: Packed, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """All directed pairs closer than the cutoff: edges (2, E) int64 and shifts (E, 3) float32.

    `edges[0]` is the receiver i, `edges[1]` the sender j, as indices into the packed atoms, sorted by receiver; the
    vector from i to j is `positions[j] - positions[i] + shifts @ cell`. Nothing is truncated: an atom sees all its
    neighbours, its own periodic images included. Raises ValueError for coincident atoms and for a periodic direction
    without a cell vector.
    """
    cutoff = float(cutoff)
    if not cutoff > 0:
        raise ValueError(f"the cutoff must be a positive number of angstrom, got {cutoff}")
    periodic = np.asarray(packed.pbc, bool).any(axis=1) & (packed.natoms > 0)
    by_images = periodic | (packed.natoms > ALL_PAIRS_UP_TO)
    parts: list[Pairs] = []
    at = packed.offsets
    for start, stop in _runs(by_images):
        if by_images[start]:
            parts.append(_pairs_among_images(packed, at, start, stop, cutoff))
        else:
            portions = _portions(packed.natoms[start:stop].tolist(), start)
            parts += [_pairs_of_molecules(packed, at, a, b, cutoff) for a, b in portions]
    edges = np.empty((2, sum(len(p.receivers) for p in parts)), np.int64)
    shifts = np.zeros((edges.shape[1], 3), np.float32)
    stop = 0
    for pairs in parts:
        start, stop = stop, stop + len(pairs.receivers)
        edges[0, start:stop], edges[1, start:stop] = pairs.receivers, pairs.senders
        if pairs.shifts is not None:
            shifts[start:stop] = pairs.shifts
    return edges, shifts


def edges_per_atom(packed: Packed, cutoff: float) -> float:
    """The mean number of neighbours of an atom, over all atoms of all structures; 0 without atoms."""
    edges, _ = neighbor_list(packed, cutoff)
    return edges.shape[1] / max(len(packed.numbers), 1)


def _runs(kind: np.ndarray) -> list[tuple[int, int]]:
    """Where consecutive structures are of one kind: [start, stop) of each run."""
    if not len(kind):
        return []
    borders = (np.flatnonzero(kind[1:] != kind[:-1]) + 1).tolist()
    return list(zip([0, *borders], [*borders, len(kind)], strict=True))


def _portions(natoms: list[int], start: int) -> list[tuple[int, int]]:
    """Consecutive structures from `start` whose pairs, padded to the largest of them, are few enough."""
    starts, largest, pairs = [0], 0, 0
    for k, n in enumerate(natoms):
        padded = (k - starts[-1] + 1) * max(largest, n) ** 2
        if k > starts[-1] and padded > min(PAIRS_AT_ONCE, PADDED * (pairs + n * n)):
            starts.append(k)
            largest = pairs = 0
        largest, pairs = max(largest, n), pairs + n * n
    return [(start + a, start + b) for a, b in zip(starts, [*starts[1:], len(natoms)], strict=True)]


def _pairs_of_molecules(packed: Packed, at: np.ndarray, start: int, stop: int, cutoff: float) -> Pairs:
    """Pairs of non-periodic structures, from all pairs of each."""
    natoms, first = packed.natoms[start:stop], at[start:stop]
    largest = int(natoms.max())
    if not largest:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), None)
    number = np.arange(largest)
    there = number < natoms[:, None]
    atoms = first[:, None] + np.where(there, number, 0)  # (structures, largest)
    squared = np.zeros((*atoms.shape, largest), packed.positions.dtype)
    difference = np.empty_like(squared)
    for k in range(3):
        x = packed.positions[:, k].take(atoms)
        if k == 0:
            np.copyto(x, FAR_AWAY * (number + 1), where=~there, casting="unsafe")
        np.subtract(x[:, None, :], x[:, :, None], out=difference)
        np.multiply(difference, difference, out=difference)
        squared += difference
    squared.reshape(len(first), -1)[:, :: largest + 1] = np.inf  # an atom and itself
    if squared.min() < COINCIDENT**2:
        s, i, j = np.unravel_index(squared.argmin(), squared.shape)
        raise coincident(start + int(s), int(i), int(j))
    pairs = np.flatnonzero(squared < cutoff * cutoff)
    rows = pairs // largest
    pairs += (first[:, None] - np.arange(atoms.size).reshape(atoms.shape) * largest).take(rows)
    return Pairs(atoms.take(rows), pairs, None)


def _pairs_among_images(packed: Packed, at: np.ndarray, start: int, stop: int, cutoff: float) -> Pairs:
    """Pairs of periodic structures and of large molecules."""
    pbc = np.asarray(packed.pbc[start:stop], bool)
    positions = packed.positions[at[start] : at[stop]].astype(np.float64)
    cell = packed.cell[start:stop].astype(np.float64)
    systems = Systems(positions, packed.natoms[start:stop].astype(np.int64), cell, pbc, start)
    pairs = pairs_among_images(systems, cutoff)
    pairs.receivers += at[start]
    pairs.senders += at[start]
    return pairs
