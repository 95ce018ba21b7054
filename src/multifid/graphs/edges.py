"""Functions of edges over a graph: in tiles that stay in a processor's cache, or whole on an accelerator.

    edges      |  tile 0  |  tile 1  |  tile 2  |        each tile: gather, compute, sum to the receivers

What an encoder computes on an edge (numbers of both atoms, of the edge, and weights) is one function; `over_edges` runs
it over all edges. On a CPU the values of a tile are in the cache when they are read again, and none are kept for the
backward pass: it computes them again, tile by tile, which is cheaper than reading them from memory. Where edges depend
on positions that are differentiated (forces as minus the gradient of the energy) second derivatives follow, and
autograd keeps the values: computing them again would cost a pass and save nothing. On accelerators, or where a compiler
decides (`in_tiles`), the function runs once over all edges.

A function may have faster forms whose derivatives are written out (`faster_form_of`), for every kind of device or for
some, differentiable once or twice; each is used where it suffices, and a test holds it to the function.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_EDGES = 1024  # at least so many edges in a tile: enough rows for a matrix product ...
TILE_VALUES = 3 << 16  # ... and about so many values for each thread: 0.75 MiB in float32
# Whether edges are taken in tiles; None: where the device has a cache to stay in, which is a processor.
IN_TILES: ContextVar[bool | None] = ContextVar("IN_TILES", default=None)

# Asked for the pieces of so many edges with such a width, in place of `tiles`, by who counts what a tile needs.
CUT: ContextVar[Callable[[int, int], list[slice]] | None] = ContextVar("CUT", default=None)

EdgeFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Form:
    """A faster form of `over_edges(function, ...)`."""

    run: Callable[..., tuple[Tensor, ...]]
    twice: bool  # whether it is differentiable twice
    devices: frozenset[str] | None  # the kinds that it is for; None: all
    usable: Callable[[Tensor], bool]  # asked with the envelope


FASTER: dict[EdgeFunction, list[Form]] = {}


def faster_form_of(
    function: EdgeFunction,
    *,
    twice: bool = False,
    devices: frozenset[str] | None = None,
    usable: Callable[[Tensor], bool] = lambda envelope: True,
) -> Callable[[Callable], Callable]:
    """Registers a form of `over_edges(function, ...)`, which is tried before those that were registered earlier.

    It is called with the tiles, receivers i, senders j, and the tensors of receivers, senders, edges (the envelope
    first), and weights.
    """

    def register(run: Callable) -> Callable:
        FASTER.setdefault(function, []).insert(0, Form(run, twice, devices, usable))
        return run

    return register


def faster_form(function: EdgeFunction, envelope: Tensor, twice: bool) -> Form | None:
    """The one to use, if there is one; twice: derivatives of derivatives may be wanted."""
    for form in FASTER.get(function, ()):
        fits = form.devices is None or envelope.device.type in form.devices
        if fits and form.twice >= twice and form.usable(envelope):
            return form
    return None


@contextmanager
def in_tiles(wanted: bool) -> Iterator[None]:
    """Inside, in this thread, edges are taken as on a processor, on every kind of device; or in one piece.

    In one piece for a compiler, which decides itself what stays in the cache, and takes long over many tiles.
    """
    token = IN_TILES.set(wanted)
    try:
        yield
    finally:
        IN_TILES.reset(token)


def has_cache(device: torch.device) -> bool:
    """Whether what an edge needs is computed again rather than read again."""
    return device.type == "cpu" or IN_TILES.get() is True


def tiles(edges: int, width: int, device: torch.device) -> list[slice]:
    """The edges in pieces of nearly equal size; in one piece where there is no cache to stay in, and at least one."""
    cut = CUT.get()
    if cut is not None:
        return cut(edges, width)
    most = edges_of_tile(width) if has_cache(device) and IN_TILES.get() is not False else edges
    return in_pieces(edges, max(1, -(-edges // max(most, 1))))


def in_pieces(edges: int, pieces: int) -> list[slice]:
    """So many of nearly equal size."""
    return [slice(k * edges // pieces, (k + 1) * edges // pieces) for k in range(pieces)]


def edges_of_tile(width: int) -> int:
    """At most, for functions whose widest values have so many numbers."""
    return max(TILE_EDGES, TILE_VALUES * torch.get_num_threads() // max(width, 1))


def over_edges(
    function: EdgeFunction,
    i: Tensor,
    j: Tensor,
    atoms: int,
    envelope: Tensor,
    *,
    width: int,
    receivers: Sequence[Tensor] = (),
    senders: Sequence[Tensor] = (),
    edges: Sequence[Tensor] = (),
    weights: Sequence[Tensor] = (),
    summed: Sequence[bool] = (True,),
) -> tuple[Tensor, ...]:
    """What a function of edges gives, summed to the receivers or edge by edge.

    function: (values of receivers, of senders, envelope, values of edges, weights) -> a tensor (T, ...) for each entry
    of `summed`, row by row. i, j: (E,) receivers, ascending, and senders. envelope: (E, 1), a function of the distance
    alone. width: numbers of the widest value of an edge. receivers, senders: tensors (N, ...) of which each edge gets
    the row of its atom; edges: (E, ...); weights: whole. summed: which outputs are summed over the edges of each
    receiver, (N, ...), never in half precision, and which are given back for every edge, (E, ...).

    Differentiable with respect to all tensors, twice where the envelope is differentiable.
    """
    tensors = [*receivers, *senders, envelope, *edges, *weights]
    parts = _Parts(function, len(receivers), len(senders), 1 + len(edges), tuple(summed))
    pieces = tiles(i.shape[0], width, i.device)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # It depends on positions: derivatives of derivatives may be wanted, and for these autograd keeps the values.
    twice = differentiable and envelope.requires_grad
    form = faster_form(function, envelope, twice)
    if form is not None:
        return form.run(pieces, i, j, receivers, senders, (envelope, *edges), weights)
    if differentiable and not twice and has_cache(i.device):
        return _OverEdges.apply(parts, pieces, i, j, atoms, *tensors)
    return parts.total((parts.values(t, i, j, tensors) for t in pieces), pieces, i, atoms, in_place=not differentiable)


def largest_over_edges(
    function: EdgeFunction,
    i: Tensor,
    j: Tensor,
    at_least: Tensor,
    *,
    width: int,
    receivers: Sequence[Tensor] = (),
    senders: Sequence[Tensor] = (),
    edges: Sequence[Tensor] = (),
    weights: Sequence[Tensor] = (),
) -> Tensor:
    """The largest value that a function of edges has at each receiver, or `at_least` (N, ...) where none is larger.

    Without a derivative: for what a result does not depend on, such as the number that exponents are taken from. The
    function gives one tensor (T, ...); everything else is as for `over_edges`, without the envelope.
    """
    with torch.no_grad():
        parts = _Parts(function, len(receivers), len(senders), len(edges), (False,))
        largest = at_least.clone()
        for t in tiles(i.shape[0], width, i.device):
            (x,) = parts.values(t, i, j, [*receivers, *senders, *edges, *weights])
            of_values = i[t].view(-1, *[1] * (x.dim() - 1)).expand(x.shape)
            largest = largest.scatter_reduce(0, of_values, x.to(largest.dtype), "amax")
        return largest


class _Parts:
    """Which of a list of tensors are of receivers, senders, edges, and weights; and what becomes of the outputs."""

    def __init__(self, function: EdgeFunction, receivers: int, senders: int, edges: int, summed: tuple[bool, ...]):
        self.function, self.summed = function, summed
        self.bounds = (receivers, receivers + senders, receivers + senders + edges)

    def gathered(self, t: slice, i: Tensor, j: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The rows of a tile's edges, and the weights."""
        a, b, c = self.bounds
        return [
            *(x.index_select(0, i[t]) for x in tensors[:a]),
            *(x.index_select(0, j[t]) for x in tensors[a:b]),
            *(x[t] for x in tensors[b:c]),
            *tensors[c:],
        ]

    def add(self, total: Tensor, k: int, t: slice, i: Tensor, j: Tensor, x: Tensor) -> None:
        """Add to the gradient of the k-th tensor that of what a tile gathered of it."""
        a, b, c = self.bounds
        if k < b:
            total.index_add_(0, (i if k < a else j)[t], x)
        elif k < c:
            total[t] = x
        else:
            total += x

    def values(self, t: slice, i: Tensor, j: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        out = self.function(*self.gathered(t, i, j, tensors))
        assert len(out) == len(self.summed), f"{len(out)} outputs for {len(self.summed)} entries of `summed`"
        return out

    def total(
        self, values: Iterable[tuple[Tensor, ...]], pieces: list[slice], i: Tensor, atoms: int, in_place: bool
    ) -> tuple[Tensor, ...]:
        """The values of all tiles, summed to the receivers or laid end to end. in_place: no derivative is wanted."""
        sums: list[Tensor | None] = [None] * len(self.summed)
        rows: list[list[Tensor]] = [[] for _ in self.summed]
        for t, of_tile in zip(pieces, values, strict=True):
            for number, (x, is_summed) in enumerate(zip(of_tile, self.summed, strict=True)):
                if not is_summed:
                    rows[number].append(x)
                    continue
                total = sums[number]
                if total is None:
                    total = x.new_zeros((atoms, *x.shape[1:]), dtype=wide(x.dtype))
                add = total.index_add_ if in_place else total.index_add
                sums[number] = add(0, i[t], x.to(total.dtype))
        return tuple(torch.cat(rows[n]) if x is None else x for n, x in enumerate(sums))


class _OverEdges(torch.autograd.Function):
    """`over_edges` in tiles: keeps its inputs only, and computes every tile again for its derivative."""

    @staticmethod
    def forward(
        ctx: Any, parts: _Parts, pieces: list[slice], i: Tensor, j: Tensor, atoms: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.parts, ctx.pieces, ctx.autocast = parts, pieces, _autocast(i.device.type)
        ctx.save_for_backward(i, j, *tensors)
        return parts.total((parts.values(t, i, j, tensors) for t in pieces), pieces, i, atoms, in_place=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        i, j, *tensors = ctx.saved_tensors
        parts = ctx.parts
        wanted = [k for k in range(len(tensors)) if ctx.needs_input_grad[5 + k]]
        sums: dict[int, Tensor] = {k: torch.zeros_like(tensors[k], dtype=wide(tensors[k].dtype)) for k in wanted}
        for t in ctx.pieces:
            inputs = [x.detach().requires_grad_(k in sums) for k, x in enumerate(parts.gathered(t, i, j, tensors))]
            with torch.enable_grad(), _again(ctx.autocast):
                outputs = parts.function(*inputs)
            g = [g.index_select(0, i[t]) if s else g[t] for g, s in zip(gradients, parts.summed, strict=True)]
            reached = [(x, y.to(x.dtype)) for x, y in zip(outputs, g, strict=True) if x.requires_grad]
            found = torch.autograd.grad(
                [x for x, _ in reached],
                [inputs[k] for k in wanted],
                [y for _, y in reached],
                allow_unused=True,
                materialize_grads=True,
            )
            for k, x in zip(wanted, found, strict=True):
                parts.add(sums[k], k, t, i, j, x.to(sums[k].dtype))
        return (*[None] * 5, *(sums[k].to(x.dtype) if k in sums else None for k, x in enumerate(tensors)))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that values of a type are summed in: never half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _autocast(kind: str) -> tuple[str, torch.dtype] | None:
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return kind, torch.get_autocast_dtype(kind)


def _again(autocast: tuple[str, torch.dtype] | None) -> Any:
    """The precision of the forward pass, in the backward pass."""
    return nullcontext() if autocast is None else torch.autocast(autocast[0], autocast[1])
