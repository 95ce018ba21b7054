"""Neighbours among periodic images: crystals, slabs, and molecules too large for the list of all their pairs.

The images that a structure's atoms might see fill a box in fractional coordinates; one ragged numpy operation lists
them for many structures. Then each structure gets all its squared distances as one product of matrices in float64,

    |g - x|^2 = [-2 x, |x|^2, 1] . [g, 1, |g|^2]        x: its atoms, g: their images, both from the middle of its atoms

which is exact to 1e-15 of its squared extent. Structures with more than `ALL_IMAGES_UP_TO` pairs of an atom and an
image are rare and go through vesin's lists of cells one by one.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from multifid.structures.cells import completed

COINCIDENT = 1e-6  # angstrom: closer than this, two atoms are one atom entered twice
SUSPICIOUS = 1e-3  # angstrom: so close that the product of matrices cannot say whether they coincide
AT_THE_CUTOFF = 1e-9  # square angstrom: rounding must not let an atom see another that does not see it
LARGEST_EXTENT = 1e4  # angstrom: vesin's lists of cells overflow near 1e5 and take the process down with them
MOST_NEIGHBOURS = 1e5  # of an atom, about: a list of more takes all memory, and no matter is as dense
ALL_IMAGES_UP_TO = 1 << 22  # pairs of an atom and an image
IMAGES_AT_ONCE = 1 << 16  # listed together; a structure that has more of them stands alone
PAIRS_AT_ONCE = 1 << 15  # distances held at once: they fit into the processor's cache, and no BLAS starts threads


@dataclass(slots=True)
class Pairs:
    """Directed pairs, structure after structure, within each sorted by receiver."""

    receivers: np.ndarray  # (E,) int64
    senders: np.ndarray  # (E,) int64
    shifts: np.ndarray | None  # (E, 3) float32 cell vectors that bring the sender to where it is seen; None: all zero


@dataclass(slots=True)
class Systems:
    """Structures laid end to end, as their images see them."""

    positions: np.ndarray  # (atoms, 3) float64 angstrom
    natoms: np.ndarray  # (structures,) int64
    cell: np.ndarray  # (structures, 3, 3) float64 angstrom; rows of directions without periodicity mean nothing
    pbc: np.ndarray  # (structures, 3) bool
    number: int = 0  # of the first one, as errors call it

    @property
    def first(self) -> np.ndarray:
        """(structures + 1,) first atom of each."""
        return np.concatenate([[0], np.cumsum(self.natoms, dtype=np.int64)])

    def part(self, start: int, stop: int) -> "Systems":
        at = self.first
        atoms, which = slice(at[start], at[stop]), slice(start, stop)
        return Systems(
            self.positions[atoms], self.natoms[which], self.cell[which], self.pbc[which], self.number + start
        )


def pairs_among_images(systems: Systems, cutoff: float) -> Pairs:
    """All pairs closer than the cutoff; indices count the atoms of `systems`.

    ValueError for coincident atoms, cells without volume in periodic directions or with next to none, numbers that are
    not finite, and extents above LARGEST_EXTENT.
    """
    cell = complete(systems)
    check(systems, cell)
    refuse_crowded(systems, cell, cutoff)
    at = systems.first
    fractional, reach = _fractional(systems, cell, cutoff)
    wraps = np.floor(fractional) * np.repeat(systems.pbc, systems.natoms, axis=0)
    lowest, count = _ranges(systems, fractional - wraps, reach)
    images = np.add.reduceat(count.prod(axis=1), at[:-1])
    large = images * systems.natoms > ALL_IMAGES_UP_TO
    parts = []
    for a, b in _portions(np.where(large, np.inf, images)):
        atoms, part = slice(at[a], at[b]), systems.part(a, b)
        if large[a]:
            pairs = _by_cells(part, cutoff)
        else:
            pairs = _by_images(part, wraps[atoms], lowest[atoms], count[atoms].astype(np.int64), cutoff)
        pairs.receivers += at[a]
        pairs.senders += at[a]
        parts.append(pairs)
    if len(parts) == 1:
        return parts[0]
    return Pairs(*(np.concatenate([getattr(p, name) for p in parts]) for name in Pairs.__slots__))


def complete(systems: Systems) -> np.ndarray:
    """Cells (structures, 3, 3) with unit vectors at right angles to the rest in directions without periodicity."""
    return completed(systems.cell, systems.pbc)


def check(systems: Systems, cell: np.ndarray) -> None:
    """Refuse what has no list of neighbours: ValueError names the structure. cell: as `complete` gives it."""
    start = systems.first[:-1]
    finite = np.isfinite(cell).all(axis=(1, 2))
    finite &= np.logical_and.reduceat(np.isfinite(systems.positions).all(axis=1), start)
    if not finite.all():
        raise ValueError(f"structure {systems.number + finite.argmin()}: positions and cell must be finite numbers")
    lengths = np.linalg.norm(cell, axis=2)
    unit = cell / np.maximum(lengths, COINCIDENT)[:, :, None]
    # The smallest singular value of the unit vectors is 0 if one lies in the span of the others.
    flat = (lengths.min(axis=1) < COINCIDENT) | (np.linalg.svd(unit, compute_uv=False)[:, -1] < 1e-4)
    if flat.any():
        s = int(flat.argmax())
        raise ValueError(
            f"structure {systems.number + s}: a periodic structure needs linearly independent cell vectors in its "
            f"periodic directions, got pbc {systems.pbc[s].tolist()} and cell {systems.cell[s].tolist()} angstrom"
        )
    extent = np.maximum.reduceat(systems.positions, start) - np.minimum.reduceat(systems.positions, start)
    extent = np.maximum(extent, lengths).max(axis=1)
    if extent.max() > LARGEST_EXTENT:
        raise ValueError(
            f"structure {systems.number + extent.argmax()}: atoms and cell vectors must extend less than "
            f"{LARGEST_EXTENT:g} angstrom, got {extent.max():g}"
        )


def refuse_crowded(systems: Systems, cell: np.ndarray, cutoff: float) -> None:
    """Refuse a cell so small that the images of its atoms would fill the memory: ValueError names the structure."""
    spanned = np.abs(np.linalg.det(cell))  # of periodic directions alone: the others are unit vectors
    seen = systems.natoms * (2 * cutoff) ** systems.pbc.sum(axis=1) / spanned
    crowded = systems.pbc.any(axis=1) & (seen > MOST_NEIGHBOURS)
    if crowded.any():
        s = int(crowded.argmax())
        raise ValueError(
            f"structure {systems.number + s}: the cell {systems.cell[s].tolist()} is too small for its "
            f"{systems.natoms[s]} atoms: each would see about {seen[s]:.1g} others within {cutoff:g} angstrom; "
            "are its lengths in angstrom?"
        )


def _fractional(systems: Systems, cell: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Fractional coordinates (atoms, 3), and the cutoff in units of the heights of each cell (structures, 3)."""
    inverse = np.linalg.inv(cell)
    at, fractional = systems.first.tolist(), np.empty_like(systems.positions)
    for s, (a, b) in enumerate(pairwise(at)):
        np.matmul(systems.positions[a:b], inverse[s], out=fractional[a:b])
    return fractional, cutoff * np.linalg.norm(inverse, axis=1)


def _ranges(systems: Systems, fractional: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images of each atom that an atom of its structure might see: lowest shift and number of shifts, (atoms, 3).

    Those whose fractional coordinates lie within the cutoff of the box that holds the structure's atoms.
    """
    start, natoms, periodic = systems.first[:-1], systems.natoms, np.repeat(systems.pbc, systems.natoms, axis=0)
    reach = reach + 1e-9  # for rounding
    low = np.repeat(np.minimum.reduceat(fractional, start) - reach, natoms, axis=0)
    high = np.repeat(np.maximum.reduceat(fractional, start) + reach, natoms, axis=0)
    lowest = np.ceil(low - fractional)
    count = np.floor(high - fractional) - lowest + 1
    return np.where(periodic, lowest, 0.0), np.where(periodic, count, 1.0)


def _portions(images: np.ndarray) -> list[tuple[int, int]]:
    """Consecutive structures with at most IMAGES_AT_ONCE images together, or single ones."""
    starts, total = [0], 0.0
    for s, n in enumerate(images.tolist()):
        if total + n > IMAGES_AT_ONCE and s > starts[-1]:
            starts.append(s)
            total = 0.0
        total += n
    return list(zip(starts, [*starts[1:], len(images)], strict=True))


def _by_images(systems: Systems, wraps: np.ndarray, lowest: np.ndarray, count: np.ndarray, cutoff: float) -> Pairs:
    """Pairs from all distances between the atoms of each structure and their images."""
    at = systems.first
    sender, shift, itself = _list_images(lowest, count)
    seen = np.concatenate([[0], np.cumsum(count.prod(axis=1))])[at]  # first image of each structure
    middle = np.add.reduceat(systems.positions, at[:-1]) / systems.natoms[:, None]
    atoms, images = _factors(systems, wraps, np.repeat(middle, systems.natoms, axis=0), sender, shift, seen)
    rows, found, distances = [], [], []
    limit = cutoff * cutoff - AT_THE_CUTOFF
    room = np.empty(max(PAIRS_AT_ONCE, int(np.diff(seen).max())))
    for a, b, g, h in zip(at[:-1].tolist(), at[1:].tolist(), seen[:-1].tolist(), seen[1:].tolist(), strict=True):
        size, image, step = h - g, images[g:h].T, max(1, PAIRS_AT_ONCE // (h - g))
        for first in range(a, b, step):
            last = min(first + step, b)
            squared = room[: (last - first) * size]
            np.matmul(atoms[first:last], image, out=squared.reshape(-1, size))
            squared[itself[first:last] + np.arange(-g, (last - first) * size - g, size)] = np.inf
            near = np.flatnonzero(squared < limit)
            row = near // size
            distances.append(squared.take(near))
            found.append(near - (row * size - g))
            rows.append(row + first)
    i, image = np.concatenate(rows), np.concatenate(found)
    j = sender.take(image)
    shift -= wraps.take(sender, axis=0)
    shifts = shift.astype(np.float32).take(image, axis=0)
    if wraps.any():
        shifts += wraps.astype(np.float32).take(i, axis=0)
    pairs = Pairs(i, j, shifts)
    _refuse_coincident(systems, pairs, np.concatenate(distances))
    return pairs


def _list_images(lowest: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The atom (images,) and the shift (images, 3) of each image, and where each atom itself is among them (atoms,)."""
    each = count.prod(axis=1)
    ends = np.cumsum(each)
    atom = np.repeat(np.arange(len(each)), each)
    number = np.arange(ends[-1]) - np.repeat(ends - each, each)  # of an image among those of its atom
    by_y, by_z = count[:, 1:].take(atom, axis=0).T
    rest, z = np.divmod(number, by_z)
    x, y = np.divmod(rest, by_y)
    shift = np.stack([x, y, z], axis=1) + lowest.take(atom, axis=0)
    home = -lowest.astype(np.int64)
    itself = (home[:, 0] * count[:, 1] + home[:, 1]) * count[:, 2] + home[:, 2] + ends - each
    return atom, shift, itself


def _factors(
    systems: Systems, wraps: np.ndarray, middle: np.ndarray, sender: np.ndarray, shift: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The two factors of all squared distances: (atoms, 5) and (images, 5)."""
    at, cells = systems.first.tolist(), systems.cell
    if not systems.pbc.all():
        cells = np.where(systems.pbc[:, :, None], cells, 0.0)
    wrapped, image = systems.positions - middle, np.empty((len(sender), 3))
    for s, (a, b, g, h) in enumerate(zip(at[:-1], at[1:], seen[:-1].tolist(), seen[1:].tolist(), strict=True)):
        wrapped[a:b] -= wraps[a:b] @ cells[s]
        np.matmul(shift[g:h], cells[s], out=image[g:h])
    image += wrapped.take(sender, axis=0)
    atoms, images = np.ones((len(wrapped), 5)), np.ones((len(image), 5))
    np.multiply(wrapped, -2.0, out=atoms[:, :3])
    np.einsum("nk,nk->n", wrapped, wrapped, out=atoms[:, 3])
    images[:, :3] = image
    np.einsum("nk,nk->n", image, image, out=images[:, 4])
    return atoms, images


def _by_cells(systems: Systems, cutoff: float) -> Pairs:
    """Pairs of one large structure by vesin."""
    from vesin import NeighborList  # here, because it imports torch, which preparing molecules can do without

    pbc = systems.pbc[0]
    cell = np.where(pbc[:, None], systems.cell[0], 0.0)
    search = NeighborList(cutoff=cutoff, full_list=True, sorted=True, n_threads=1)
    pairs, shifts, distances = search.compute(systems.positions, cell, pbc, "PSd")
    i, j = pairs.astype(np.int64).T
    found = Pairs(i.copy(), j.copy(), shifts.astype(np.float32))
    _refuse_coincident(systems, found, distances * distances)
    return found


def _refuse_coincident(systems: Systems, pairs: Pairs, squared: np.ndarray) -> None:
    """The product of matrices only says which pairs are suspicious; their differences decide."""
    assert pairs.shifts is not None
    for e in np.flatnonzero(squared < SUSPICIOUS**2).tolist():
        i, j = int(pairs.receivers[e]), int(pairs.senders[e])
        s = int(np.searchsorted(systems.first, i, side="right")) - 1
        cell = np.where(systems.pbc[s][:, None], systems.cell[s], 0.0)
        apart = systems.positions[j] - systems.positions[i] + pairs.shifts[e].astype(np.float64) @ cell
        if np.linalg.norm(apart) < COINCIDENT:
            first = int(systems.first[s])
            raise coincident(systems.number + s, i - first, j - first)


def coincident(structure: int, i: int, j: int) -> ValueError:
    """The error of two atoms at one place."""
    return ValueError(
        f"structure {structure}: atoms {i} and {j} coincide (closer than {COINCIDENT} angstrom, periodic "
        "images included); each atom must have a place of its own"
    )
