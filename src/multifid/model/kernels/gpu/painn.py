"""What PaiNN computes on edges on a GPU: one kernel of Triton forwards and one backwards, in the type of the geometry.

Nothing of an edge is kept: filters are cheaper to take again than to read. Backwards the gradient of the filters'
linear map, three values of an edge and hidden unit, is written for two products: those of its weights and of the
radial basis. Two derivatives, as in `twice.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from multifid.model.kernels.gpu import painn_kernels as kernels
from multifid.model.kernels.gpu.segments import Segments, power_of_two, programs, rows_of_tile, segments, warps_of
from multifid.model.kernels.gpu.twice import Found, Pass, Rules, Tensors, Waiting, run


def messages(
    pieces: list[slice],
    i: Tensor,
    j: Tensor,
    receivers: Sequence[Tensor],
    senders: Sequence[Tensor],
    edges: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Sums over the neighbours: the scalar message and the three components of the vector one, (N, 4, H).

    Edges are taken in one piece.
    """
    return run(RULES, edges[0].dtype, i, j, [*senders, *edges, *weights])


class _Inputs(NamedTuple):
    """Values and weights, in the order of kernels."""

    phi: Tensor  # (N, 3, H)
    v: Tensor  # (N, 3, H)
    u: Tensor  # (E, 1)
    direction: Tensor  # (E, 3)
    basis: Tensor  # (E, R)
    weight: Tensor  # (R, 3 H)
    bias: Tensor  # (3 H,)


def _inputs(of: Pass) -> _Inputs:
    phi, v, u, direction, basis, weight, bias = of.tensors
    return _Inputs(phi, v, u, direction, basis, weight.t().contiguous(), bias)


def _launch(kernel: Any, x: _Inputs, *arguments: Tensor, **constants: Any) -> None:
    """A kernel over all atoms."""
    atoms, _, hidden = x.v.shape
    block = power_of_two(hidden)
    if atoms:
        rows, warps = rows_of_tile(block, kernel.__name__), warps_of(block, kernel.__name__)
        kernel[(programs(atoms),)](
            *x, *arguments, atoms, hidden, R=x.basis.shape[1], HB=block, ROWS=rows, **constants, num_warps=warps
        )


def _segments(of: Pass) -> Segments:
    return segments(of.i, of.j, of.tensors[0].shape[0])


def _forward(of: Pass) -> tuple[Tensors, Tensors]:
    x = _inputs(of)
    sums = x.v.new_zeros((x.v.shape[0], 4, x.v.shape[2]))
    _launch(kernels.forward, x, *x[:5], of.j, _segments(of).first, sums, DUAL=False)
    return (sums,), ()


def _tangents(of: Pass, kept: Tensors, along: Tensors) -> tuple[Tensors, Tensors]:
    x = _inputs(of)
    sums = x.v.new_zeros((x.v.shape[0], 4, x.v.shape[2]))
    _launch(kernels.forward, x, *along, of.j, _segments(of).first, sums, DUAL=True)
    return (sums,), ()


def _empty(x: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the gradients of phi, v, u and direction."""
    return (
        x.phi.new_zeros(x.phi.shape),
        x.v.new_zeros(x.v.shape),
        x.u.new_empty(x.u.shape),
        x.u.new_empty((len(x.u), 3)),
    )


def _backward(of: Pass, kept: Tensors, slopes: Tensors, weights: bool) -> tuple[Found, Tensors]:
    x, (_, order, sent) = _inputs(of), _segments(of)
    found, g_l = _empty(x), x.u.new_empty((len(x.u), len(x.bias)))
    _launch(kernels.backward, x, *slopes, of.i, order, sent, *found, g_l)
    of_weights = (g_l.t() @ x.basis, g_l.sum(dim=0)) if weights else (None, None)
    return (*found, g_l @ x.weight.t(), *of_weights), ()


def _dual(of: Pass, kept: Tensors, waiting: Waiting, seeds: Tensors) -> Found:
    x, (_, order, sent) = _inputs(of), _segments(of)
    found = _empty(x)
    g_l, g_l_t = (x.u.new_empty((len(x.u), len(x.bias))) for _ in range(2))
    _launch(kernels.backward_dual, x, *waiting.slopes, *waiting.along, *seeds, of.i, order, sent, *found, g_l, g_l_t)
    of_weight = (g_l_t.t() @ x.basis).addmm_(g_l.t(), waiting.along[4])
    return *found, g_l_t @ x.weight.t(), of_weight, g_l_t.sum(dim=0)


RULES = Rules("PaiNN", 5, _forward, _backward, _tangents, _dual)
