"""Structures as batches of bounded size, asked of one task; atoms that lie on each other are refused."""

from collections.abc import Iterator

import numpy as np
import torch

from multifid.graphs.batch import Batch, edge_vectors
from multifid.graphs.neighbors import neighbor_list
from multifid.graphs.origin import near_origin
from multifid.structures.structure import Packed

EDGES = 50_000  # of a batch, unless the caller says otherwise
NEAREST = 1e-3  # angstrom: atoms that are closer lie on each other


def batch_of(packed: Packed, cutoff: float, task: str) -> Batch:
    """Packed structures with their edges as one batch, all of them asked of one task; float64, on the host."""
    home = near_origin(packed)
    return batch_with(home, *neighbor_list(home, cutoff), task)


def batch_with(packed: Packed, edges: np.ndarray, shifts: np.ndarray, task: str) -> Batch:
    """The same for edges (2, E) and shifts (E, 3) that are at hand."""
    place = (slice(0, len(packed.natoms)), slice(0, len(packed.numbers)))
    return Batch.from_packed(
        packed, torch.from_numpy(edges.astype(np.int64)), torch.from_numpy(shifts.astype(np.float64)), {task: place}
    )


def refuse_coincident(batch: Batch, first: int) -> None:
    """ValueError where two atoms, or an atom and its own image, lie on each other; `first`: number of the first one."""
    lengths = torch.linalg.vector_norm(_vectors(batch), dim=1)
    if not len(lengths) or float(lengths.min()) >= NEAREST:
        return
    edge = int(lengths.argmin())
    i, j = batch.edges[:, edge].tolist()
    structure = int(batch.structure[i])
    start = int(batch.natoms[:structure].sum())
    raise ValueError(
        f"structure {first + structure}: atoms {i - start} and {j - start} are {lengths[edge]:.2g} angstrom apart"
    )


def _vectors(batch: Batch) -> torch.Tensor:
    """(E, 3) angstrom, to rounding; of one structure, which has one cell, in a fraction of the time."""
    if batch.structures != 1:
        return edge_vectors(batch)
    i, j = batch.edges
    return batch.positions.index_select(0, j) - batch.positions.index_select(0, i) + batch.shifts @ batch.cell[0]


def between(packed: Packed, first: int, last: int) -> Packed:
    """Consecutive structures."""
    structures, atoms = slice(first, last), slice(int(packed.offsets[first]), int(packed.offsets[last]))
    return Packed(
        packed.numbers[atoms],
        packed.positions[atoms],
        packed.natoms[structures],
        packed.cell[structures],
        packed.pbc[structures],
        packed.charge[structures],
        packed.spin[structures],
    )


def cut_structures(packed: Packed, cutoff: float, max_edges: int) -> Iterator[tuple[int, int]]:
    """Consecutive structures, in pieces of about at most so many edges, estimated from densities."""
    volume = np.abs(np.linalg.det(packed.cell))
    periodic = packed.pbc.any(axis=1) & (volume > 0)
    density = np.where(periodic, packed.natoms / np.where(periodic, volume, 1.0), 0.1)
    each = np.maximum(packed.natoms * density * 4 / 3 * np.pi * cutoff**3, 1.0)
    each = np.where(periodic, each, np.minimum(each, packed.natoms * np.maximum(packed.natoms - 1, 1)))
    first, total = 0, 0.0
    for k, cost in enumerate(each.tolist()):
        if k > first and total + cost > max_edges:
            yield first, k
            first, total = k, 0.0
        total += cost
    if first < len(each):
        yield first, len(each)
