"""Which atoms see which: every pair within the cutoff, periodic images included, for many structures laid end to end.

Small molecules go through one numpy operation for all of them: all pairs of each structure as one ragged list,
distances from explicit differences (a matrix-product distance loses 4e-3 angstrom in float32). Periodic structures, and
molecules so large that most of their pairs lie beyond the cutoff, go one by one through vesin's cell lists.
"""

import numpy as np

from multifid.structures.structure import Packed

COINCIDENT = 1e-6  # angstrom: closer than this, two atoms are one atom entered twice
ALL_PAIRS_UP_TO = 128  # atoms: above this a cell list is faster than all pairs
PAIRS_AT_ONCE = 1 << 19  # pairs held in memory at once; what fits into the processor's cache is also fastest
LARGEST_EXTENT = 1e4  # angstrom: vesin's cell lists overflow near 1e5 and take the process down with them


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
    periodic = np.asarray(packed.pbc, bool).any(axis=1)
    by_cell_list = periodic | (packed.natoms > ALL_PAIRS_UP_TO)
    parts = [_pairs_of_molecules(packed, chosen, cutoff) for chosen in _portions(packed.natoms, ~by_cell_list)]
    none = np.zeros(0, np.int64)
    receivers = [none, *(i for i, _ in parts)]
    senders = [none, *(j for _, j in parts)]
    shifts = [np.zeros((sum(len(i) for i in receivers), 3), np.float32)]
    for s in np.flatnonzero(by_cell_list):
        pairs, images = _pairs_by_cell_list(packed, int(s), cutoff)
        receivers.append(pairs[:, 0])
        senders.append(pairs[:, 1])
        shifts.append(images)
    edges = np.stack([np.concatenate(receivers), np.concatenate(senders)])
    shift = np.concatenate(shifts)
    if by_cell_list.any() and not by_cell_list.all():
        order = np.argsort(edges[0], kind="stable")
        edges, shift = edges[:, order], shift[order]
    return edges, shift


def edges_per_atom(packed: Packed, cutoff: float) -> float:
    """The mean number of neighbours of an atom, over all atoms of all structures; 0 without atoms."""
    edges, _ = neighbor_list(packed, cutoff)
    return edges.shape[1] / max(len(packed.numbers), 1)


def _portions(natoms: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """The wanted structures in order, in portions of about `PAIRS_AT_ONCE` pairs."""
    chosen = np.flatnonzero(wanted)
    portion = np.cumsum(natoms[chosen].astype(np.int64) ** 2) // PAIRS_AT_ONCE
    return [part for part in np.split(chosen, np.flatnonzero(np.diff(portion)) + 1) if len(part)]


def _pairs_of_molecules(packed: Packed, chosen: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Receivers and senders of non-periodic structures, from all pairs of each: one ragged operation."""
    natoms = packed.natoms[chosen]
    first = packed.offsets[chosen]
    atoms = _ragged(first, natoms)  # every atom of the chosen structures
    seen = np.repeat(natoms, natoms)  # as many pairs has each of them: with its structure's atoms, itself included
    i = np.repeat(atoms, seen)
    j = _ragged(np.repeat(first, natoms), seen)
    squared = np.zeros(len(i), packed.positions.dtype)
    for x in np.ascontiguousarray(packed.positions.T):
        difference = x[j] - x[i]
        squared += difference * difference
    near = (squared < cutoff * cutoff) & (i != j)
    i, j, squared = i[near], j[near], squared[near]
    if len(squared) and squared.min() < COINCIDENT**2:
        _refuse_coincident(packed, int(i[squared.argmin()]), int(j[squared.argmin()]))
    return i, j


def _ragged(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], first[1] + 1, ... and so on, in one array."""
    ends = np.cumsum(count)
    return np.arange(ends[-1]) + np.repeat(first - (ends - count), count)


def _pairs_by_cell_list(packed: Packed, s: int, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (E, 2) sorted by receiver and shifts (E, 3) of structure `s`."""
    from vesin import NeighborList  # here, because it imports torch, which preparing molecules can do without

    first, natoms = int(packed.offsets[s]), int(packed.natoms[s])
    positions = np.asarray(packed.positions[first : first + natoms], np.float64)
    pbc = np.asarray(packed.pbc[s], bool)
    cell = np.where(pbc[:, None], np.asarray(packed.cell[s], np.float64), 0.0)
    _check_cell(cell, pbc, positions, s)
    search = NeighborList(cutoff=cutoff, full_list=True, sorted=True, n_threads=1)
    pairs, shifts, distances = search.compute(positions, cell, pbc, "PSd")
    if len(distances) and distances.min() < COINCIDENT:
        i, j = pairs[distances.argmin()]
        _refuse_coincident(packed, first + int(i), first + int(j))
    return pairs.astype(np.int64) + first, shifts.astype(np.float32)


def _check_cell(cell: np.ndarray, pbc: np.ndarray, positions: np.ndarray, s: int) -> None:
    if not np.isfinite(cell).all() or not np.isfinite(positions).all():
        raise ValueError(f"structure {s}: positions and cell must be finite numbers")
    lengths = np.linalg.norm(cell[pbc], axis=1)
    # The singular values of the unit vectors along the periodic directions: 0 if one lies in the span of the others.
    if pbc.any() and (lengths.min() < COINCIDENT or np.linalg.svd(cell[pbc] / lengths[:, None])[1].min() < 1e-4):
        raise ValueError(
            f"structure {s}: a periodic structure needs linearly independent cell vectors in its periodic directions, "
            f"got pbc {pbc.tolist()} and cell {cell.tolist()} angstrom"
        )
    extent = max([*lengths, *np.ptp(positions, axis=0)])
    if extent > LARGEST_EXTENT:
        raise ValueError(
            f"structure {s}: atoms and cell vectors must extend less than {LARGEST_EXTENT:g} angstrom, got {extent:g}"
        )


def _refuse_coincident(packed: Packed, i: int, j: int) -> None:
    s = int(np.searchsorted(packed.offsets, i, side="right")) - 1
    first = int(packed.offsets[s])
    raise ValueError(
        f"structure {s}: atoms {i - first} and {j - first} coincide (closer than {COINCIDENT} angstrom, periodic "
        "images included); each atom must have a place of its own"
    )
