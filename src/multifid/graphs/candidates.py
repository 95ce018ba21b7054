"""Pairs that may be neighbours, found by the kernels of nvalchemi-toolkit-ops (optional: the `gpu` extra).

Warp compiles one source of these kernels for a GPU or for the CPU. Of each kind the toolkit's plainest kernel is taken,
which both have (`scalar`, `atom_centric`): its tiled ones exist for a GPU only, where nothing here has been run.

    molecules     all pairs of each
    crystals      all pairs of each, image after image
    large ones    lists of cells, from `ALL_PAIRS_UP_TO` pairs of an atom and an image

Version 0.3 of the toolkit folded atoms back in directions without periodicity and missed pairs of slabs (its issue
104), and 0.1 found pairs twice (its issue 3): older ones than were tested are not used.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.images import Systems, check, complete, refuse_crowded

PACKAGE, OLDEST = "nvalchemi-toolkit-ops", (0, 5)
MARGIN = 1e-6  # angstrom beyond the cutoff: rounding in a kernel must not lose a pair
DENSITY = 0.2  # atoms per cubic angstrom that rows of neighbours have room for at first; where one has more, again
ALL_PAIRS_UP_TO = 1 << 25  # pairs of an atom and an image: molecules of 5,800 atoms, cubic crystals of 1,500
LAUNCH = 1 << 30  # threads of a kernel, most of which have nothing to do where structures are unlike
ATOMS_AT_ONCE = 1 << 16  # so that rows of neighbours take some 200 MB at most


@dataclass(slots=True)
class Candidates:
    """Directed pairs in no order, with some that are a little farther apart than the cutoff."""

    receivers: Tensor  # (E,) int64
    senders: Tensor  # (E,) int64
    shifts: Tensor  # (E, 3) int64: cell vectors that bring the sender to where it is seen


@dataclass(slots=True)
class Portion:
    """Some structures with the arguments of the kernels, on the host."""

    systems: Systems  # cells complete: three independent vectors
    ranges: np.ndarray  # (structures, 3) int64: images to look at in each direction
    images: np.ndarray  # (structures,) int64: half of them, and the structure itself


@cache
def toolkit() -> ModuleType:
    """The toolkit's functions for torch; takes some seconds."""
    import warp

    warp.config.quiet = True  # type: ignore[attr-defined]
    from nvalchemiops.torch import neighbors

    return neighbors


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run there; None: they can."""
    if device.type != "cpu" and (device.type != "cuda" or torch.version.cuda is None):
        return f"the kernels of {PACKAGE} run on NVIDIA GPUs and on the CPU, not on {device}"
    try:
        there = version(PACKAGE)
    except PackageNotFoundError:
        return f"{PACKAGE} is not installed: pip install 'multifid[gpu]'"
    if tuple(int(part) for part in there.split(".")[:2]) < OLDEST:
        return f"{PACKAGE} {there} is too old: pip install 'multifid[gpu]'"
    return None


def candidates(systems: Systems, by_images: np.ndarray, cutoff: float, device: torch.device) -> Iterator[Candidates]:
    """All pairs closer than the cutoff, and few that are not; indices count the atoms of `systems`.

    by_images: (structures,) bool, those that must have what `neighbor_list` asks of periodic and of large structures.
    """
    cell = complete(systems)
    check(
        replace(systems, positions=np.where(np.repeat(by_images, systems.natoms)[:, None], systems.positions, 0)), cell
    )
    refuse_crowded(systems, cell, cutoff)
    cutoff += MARGIN
    reach = cutoff * np.linalg.norm(np.linalg.inv(cell), axis=1)
    ranges = np.where(systems.pbc, np.ceil(reach), 0).astype(np.int64)
    images = ((2 * ranges + 1).prod(axis=1) + 1) // 2
    large = systems.natoms**2 * images > ALL_PAIRS_UP_TO
    periodic = systems.pbc.any(axis=1)
    whole = replace(systems, cell=cell)
    for chosen, search in ((~periodic & ~large, _free), (periodic & ~large, _among_images), (large, _by_cells)):
        which = np.flatnonzero(chosen)
        for portion in _portions(systems.natoms[which], images[which]):
            picked, atoms = _picked(whole, which[portion])
            found = search(Portion(picked, ranges[which[portion]], images[which[portion]]), cutoff, device)
            number = torch.from_numpy(atoms).to(device)
            yield Candidates(number[found.receivers], number[found.senders], found.shifts)


def _portions(natoms: np.ndarray, images: np.ndarray) -> list[slice]:
    """Consecutive structures for one launch: few enough atoms and threads, or single ones."""
    starts, atoms, most, largest = [0], 0, 0, 0
    for s, (n, k) in enumerate(zip(natoms.tolist(), images.tolist(), strict=True)):
        atoms, most, largest = atoms + n, max(most, k), max(largest, n)
        if s > starts[-1] and (atoms > ATOMS_AT_ONCE or (s - starts[-1] + 1) * most * largest > LAUNCH):
            starts.append(s)
            atoms, most, largest = n, k, n
    stops = [*starts[1:], len(natoms)]
    return [slice(a, b) for a, b in zip(starts, stops, strict=True) if b > a]


def _picked(systems: Systems, which: np.ndarray) -> tuple[Systems, np.ndarray]:
    """Some of the structures, and the numbers of their atoms among all (atoms,)."""
    chosen = np.zeros(len(systems.natoms), bool)
    chosen[which] = True
    atoms = np.flatnonzero(np.repeat(chosen, systems.natoms))
    return Systems(systems.positions[atoms], systems.natoms[which], systems.cell[which], systems.pbc[which]), atoms


def _free(part: Portion, cutoff: float, device: torch.device) -> Candidates:
    """Pairs of molecules."""
    positions, structure, first = _atoms(part.systems, device)

    def search(width: int) -> tuple[Tensor, ...]:
        return toolkit().batch_naive_neighbor_list(
            positions, cutoff, batch_idx=structure, batch_ptr=first, max_neighbors=width, strategy="scalar"
        )

    return _all_of(search, _width(part, cutoff))


def _among_images(part: Portion, cutoff: float, device: torch.device) -> Candidates:
    """Pairs of crystals and slabs."""
    positions, structure, first = _atoms(part.systems, device)
    cell, pbc = (torch.from_numpy(x).to(device) for x in (part.systems.cell, part.systems.pbc))
    ranges, images = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (part.ranges, part.images))

    def search(width: int) -> tuple[Tensor, ...]:
        return toolkit().batch_naive_neighbor_list(
            positions,
            cutoff,
            batch_idx=structure,
            batch_ptr=first,
            cell=cell,
            pbc=pbc,
            shift_range_per_dimension=ranges,
            num_shifts_per_system=images,
            max_shifts_per_system=int(part.images.max()),
            max_atoms_per_system=int(part.systems.natoms.max()),
            max_neighbors=width,
            strategy="scalar",
        )

    return _all_of(search, _width(part, cutoff))


def _by_cells(part: Portion, cutoff: float, device: torch.device) -> Candidates:
    """Pairs of large structures, by lists of cells in a box around the atoms where it is not periodic."""
    boxed = _boxed(part.systems)
    positions, structure, first = _atoms(boxed, device)
    cell, pbc = (torch.from_numpy(x).to(device) for x in (boxed.cell, boxed.pbc))

    def search(width: int) -> tuple[Tensor, ...]:
        return toolkit().batch_cell_list(
            positions,
            cutoff,
            cell,
            pbc,
            structure,
            batch_ptr=first,
            max_neighbors=width,
            strategy="atom_centric",
            atom_centric_path="direct",
        )

    return _all_of(search, _width(part, cutoff))


def _boxed(systems: Systems) -> Systems:
    """The structures in cells as long as they are in directions without periodicity, in which atoms begin at zero."""
    positions, cell, at = systems.positions.copy(), systems.cell.copy(), systems.first
    for s, d in np.argwhere(~systems.pbc).tolist():
        atoms = positions[at[s] : at[s + 1]]
        along = atoms @ cell[s, d]
        atoms -= along.min() * cell[s, d]
        cell[s, d] *= np.ptp(along) + 1.0
    return replace(systems, positions=positions, cell=cell)


def _atoms(systems: Systems, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (atoms, 3) float64, structure of each atom (atoms,) int32, first atoms (structures + 1,) int32."""
    number = np.repeat(np.arange(len(systems.natoms), dtype=np.int32), systems.natoms)
    arrays = (systems.positions, number, systems.first.astype(np.int32))
    positions, structure, first = (torch.from_numpy(x).to(device) for x in arrays)
    return positions, structure, first


def _width(part: Portion, cutoff: float) -> int:
    """Neighbours of an atom that there is room for at first."""
    most = int((part.systems.natoms * (2 * part.images - 1)).max())  # all atoms with all their images
    return min(math.ceil(4 / 3 * math.pi * cutoff**3 * DENSITY), most)


def _all_of(search: Callable[[int], tuple[Tensor, ...]], width: int) -> Candidates:
    """The pairs in rows of a matrix, one row for each atom; searched again where a row was too short for all of them.

    search: width -> senders (atoms, width) int32, how many of them (atoms,), and shifts (atoms, width, 3) if any.
    """
    while True:
        matrix, counts, *shifts = search(width)
        most, total = torch.stack([counts.max().long(), counts.sum()]).tolist()  # the host waits for the device here
        if most <= width:
            break
        width = most
    rows = torch.arange(len(counts), device=counts.device)
    i = rows.repeat_interleave(counts.long(), output_size=total)
    place = torch.arange(total, device=counts.device) - (counts.cumsum(0) - counts)[i]
    j = matrix[i, place].long()
    return Candidates(i, j, shifts[0][i, place].long() if shifts else j.new_zeros(total, 3))
