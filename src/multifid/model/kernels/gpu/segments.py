"""Which edges belong to each atom, so that sums to atoms need no atomic addition and have one order.

    receivers  | 0 0 0 | 1 1 | 2 2 2 2 |      ascending: the edges of an atom lie side by side
    senders      1 2 3   0 2   ...            in any order: a permutation puts them side by side

One program of a kernel takes all edges of an atom, in this order, whatever the device does first.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

PROGRAMS = 1024  # at most: each takes every 1024th atom, and leaves one row of sums over edges
TILE = 2048  # values of a tile: 16 for each thread of four warps
# Kernels that hold so many values of an edge at once that only a part of a tile fits into registers.
PARTS = {"middle_back_dual": 2, "forward": 4, "backward": 4, "backward_dual": 8}


class Segments(NamedTuple):
    """Edges by receiver and by sender."""

    first: Tensor  # (N + 1,) int64: where the edges of each receiver begin
    order: Tensor  # (E,) int64: the edges by sender
    first_sent: Tensor  # (N + 1,) int64: where those of each sender begin in `order`


_LAST: list[tuple[weakref.ref, weakref.ref, tuple[int, ...], Segments]] = []  # of the newest graph


def segments(i: Tensor, j: Tensor, atoms: int) -> Segments:
    """Of receivers i, ascending, and senders j (E,). All layers of a pass share what the first one finds.

    The host waits for nothing. In a CUDA graph it is part of what is recorded, since edges may be others when it is
    replayed. Receivers that do not ascend are an error, on a GPU of the device: sums would be wrong.
    """
    recorded = _is_recorded(i.device)
    version = (atoms, *(0 if x.is_inference() else x._version for x in (i, j)), recorded)
    if _LAST:
        old_i, old_j, old_version, found = _LAST[0]
        if old_i() is i and old_j() is j and old_version == version:
            return found
    torch._assert_async((i[1:] >= i[:-1]).all(), "the receivers of edges must ascend")
    bounds = torch.arange(atoms + 1, device=i.device)
    order = j.argsort(stable=True)
    found = Segments(
        torch.searchsorted(i.contiguous(), bounds), order, torch.searchsorted(j.index_select(0, order), bounds)
    )
    _LAST[:] = [(weakref.ref(i), weakref.ref(j), version, found)]
    return found


def _is_recorded(device: torch.device) -> bool:
    """Whether what is computed now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def programs(atoms: int) -> int:
    """Of a launch over all atoms."""
    return max(1, min(atoms, PROGRAMS))


def power_of_two(n: int) -> int:
    """At least n, and at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def rows_of_tile(columns: int, kernel: str) -> int:
    """Edges that a program of a kernel takes at once."""
    return max(1, min(16, TILE // PARTS.get(kernel, 1) // columns))


def warps_of(columns: int, kernel: str) -> int:
    """Of a program of a kernel: more where one edge alone is too much for four."""
    return 4 if TILE // PARTS.get(kernel, 1) >= columns // 2 else 8
