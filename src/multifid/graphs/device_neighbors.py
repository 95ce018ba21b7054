"""Neighbour lists made where the batch is processed: on a GPU, or on the CPU by the same lines.

Kernels name candidates (`candidates.py`). What is an edge is decided here, from differences in float64, and edges come
in the order of `neighbor_list`: sorted by receiver, sender and shift. So no edge, and no place of one, depends on the
order in which threads of a kernel write.

Threads that prepare batches call this, ahead of the step. A list must know how many pairs there are, for which its
thread waits: on a stream of its own, so that neither waits for the step under way nor the step for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.candidates import Candidates, candidates, toolkit
from multifid.graphs.images import AT_THE_CUTOFF, COINCIDENT, Systems, coincident
from multifid.graphs.neighbors import ALL_PAIRS_UP_TO, neighbor_list
from multifid.structures.structure import Packed

SHIFTS = 1 << 20  # cells: no shift is as large, since extents are bounded
CLOSE_CALL = 1e-4  # angstrom from the cutoff: rounding may decide there, and every envelope is zero
ONE_AT_A_TIME = Lock()  # warp has one current stream for each device, not for each thread


def device_neighbor_list(packed: Packed, cutoff: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """All directed pairs closer than the cutoff: edges (2, E) int64 and shifts (E, 3) float64, both on the device.

    The edges of `neighbor_list` in its order, images of the atom itself included, with its errors. Two exceptions:
    pairs at the very cutoff, where rounding decides; and what is large enough for vesin, which has an order of its own.
    """
    cutoff = float(cutoff)
    if not cutoff > 0:
        raise ValueError(f"the cutoff must be a positive number of angstrom, got {cutoff}")
    if not len(packed.numbers):
        return torch.zeros((2, 0), dtype=torch.int64, device=device), torch.zeros(
            (0, 3), dtype=torch.float64, device=device
        )
    with ONE_AT_A_TIME, _aside(device):
        edges, shifts = _listed(packed, cutoff, device)
    if device.type != "cpu":  # they live in the memory of the stream aside, and are used on the one of the step
        for x in (edges, shifts):
            x.record_stream(torch.cuda.current_stream(device))
    return edges, shifts


@dataclass
class DeviceLists:
    """Lists of neighbours made on a device; the first one is compared with the host's."""

    device: torch.device
    checked: bool = False

    def __post_init__(self) -> None:
        toolkit()  # imported here, and not by several threads at once

    def __call__(self, packed: Packed, cutoff: float) -> tuple[Tensor, Tensor]:
        """As `device_neighbor_list`. RuntimeError where the kernels of this device are wrong."""
        edges, shifts = device_neighbor_list(packed, cutoff, self.device)
        if not self.checked and len(packed.numbers):
            self.checked = True
            compare(packed, cutoff, edges, shifts)
        return edges, shifts


def compare(packed: Packed, cutoff: float, edges: Tensor, shifts: Tensor) -> None:
    """RuntimeError where a list is not the host's, as a set, but for pairs that are CLOSE_CALL to the cutoff."""
    host_edges, host_shifts = neighbor_list(packed, cutoff)
    theirs = _clear(packed, cutoff, host_edges, host_shifts)
    ours = _clear(packed, cutoff, edges.cpu().numpy(), shifts.cpu().numpy())
    if not np.array_equal(ours, theirs):
        raise RuntimeError(
            f"neighbour lists made on {edges.device} are wrong: {len(ours)} pairs where the host finds {len(theirs)}; "
            "set train.neighbors to host, and tell the authors which GPU and which nvalchemi-toolkit-ops this was"
        )


def _clear(packed: Packed, cutoff: float, edges: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """(pairs, 5) receiver, sender and shift of all pairs that are clearly closer than the cutoff, sorted."""
    i, j = edges
    cell = np.where(packed.pbc[:, :, None], packed.cell, 0.0)[
        np.repeat(np.arange(len(packed.natoms)), packed.natoms)[i]
    ]
    positions = packed.positions.astype(np.float64)
    apart = positions[j] - positions[i] + np.einsum("ek,ekl->el", shifts, cell)
    clear = np.linalg.norm(apart, axis=1) < cutoff - CLOSE_CALL
    rows = np.column_stack([i, j, shifts.astype(np.int64)])[clear]
    return rows[np.lexsort(rows.T[::-1])]


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On a GPU: what is done inside has a stream of its own, and is done when it ends."""
    if device.type == "cpu":
        yield
        return
    stream = _stream(device)
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _listed(packed: Packed, cutoff: float, device: torch.device) -> tuple[Tensor, Tensor]:
    natoms, pbc = packed.natoms.astype(np.int64), np.asarray(packed.pbc, bool)
    systems = Systems(packed.positions.astype(np.float64), natoms, packed.cell.astype(np.float64), pbc)
    by_images = pbc.any(axis=1) | (natoms > ALL_PAIRS_UP_TO)
    parts = list(candidates(systems, by_images, cutoff, device))
    found = Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in Candidates.__slots__))
    found, squared = _within(found, systems, cutoff)
    order = _order(found, len(systems.positions))
    found = Candidates(found.receivers[order], found.senders[order], found.shifts[order])
    _refuse_coincident(found, squared[order], systems)
    return torch.stack([found.receivers, found.senders]), found.shifts.double()


def _within(found: Candidates, systems: Systems, cutoff: float) -> tuple[Candidates, Tensor]:
    """Those closer than the cutoff, and their squared distances (E,) float64; the host waits for the device."""
    device = found.receivers.device
    cell = np.where(systems.pbc[:, :, None], systems.cell, 0.0)
    structure = np.repeat(np.arange(len(systems.natoms)), systems.natoms)
    positions, cells, owner = (torch.from_numpy(x).to(device) for x in (systems.positions, cell, structure))
    i, j = found.receivers, found.senders
    apart = positions[j] - positions[i] + torch.einsum("ek,ekl->el", found.shifts.double(), cells[owner[i]])
    squared = apart.square().sum(dim=1)
    near = (squared < cutoff * cutoff - AT_THE_CUTOFF).nonzero().squeeze(1)
    return Candidates(i[near], j[near], found.shifts[near]), squared[near]


def _order(found: Candidates, atoms: int) -> Tensor:
    """(E,) places of the pairs, sorted by receiver, sender and shift."""
    x, y, z = found.shifts.unbind(dim=1)
    by_shift = ((x * SHIFTS + y) * SHIFTS + z).argsort(stable=True)
    pair = found.receivers * atoms + found.senders
    return by_shift[pair[by_shift].argsort(stable=True)]


def _refuse_coincident(found: Candidates, squared: Tensor, systems: Systems) -> None:
    places = (squared < COINCIDENT**2).nonzero()
    if not len(places):
        return
    i, j = (int(x[places[0, 0]]) for x in (found.receivers, found.senders))
    s = int(np.searchsorted(systems.first, i, side="right")) - 1
    first = int(systems.first[s])
    raise coincident(s, i - first, j - first)
