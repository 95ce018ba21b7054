"""What EGNN computes on edges on a GPU: products by the vendor's library, all between them by kernels of Triton.

    first -> product -> middle, with the sums to receivers -> product -> last        and the same backwards

Of an edge y, z2 and z3 are kept (the names are those of `egnn_kernels.py`), and between the two derivatives
(`twice.py`) also the gradients of m and y. Sums have one order, so that results have the same bits each time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multifid.model.kernels.egnn import EdgeWeights, matmul_type
from multifid.model.kernels.gpu import egnn_kernels as kernels
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
    """Sums of messages per atom, (N, K), and the unscaled weights phi_x of edge vectors, (E, C), in u's type.

    Edges are taken in one piece.
    """
    (a,), (c,), (u, f) = receivers, senders, edges
    return run(RULES, matmul_type(u), i, j, [a, c, u, f, *weights])


class _Inputs(NamedTuple):
    """What a pass is of: types, edges, values, weights."""

    kind: torch.dtype  # of products
    i: Tensor
    j: Tensor
    a: Tensor  # (N, K)
    c: Tensor  # (N, K)
    u: Tensor  # (E, 1)
    f: Tensor  # (E, P)
    w: EdgeWeights

    @property
    def segments(self) -> Segments:
        return segments(self.i, self.j, self.a.shape[0])

    def wide(self, count: int) -> list[Tensor]:
        """Tensors (E, K) without values in the type of products."""
        return [self.u.new_empty((len(self.u), self.a.shape[1]), dtype=self.kind) for _ in range(count)]

    def launch(self, kernel: Any, *arguments: Tensor, **constants: Any) -> None:
        """A kernel over all atoms."""
        atoms, width = self.a.shape
        block = power_of_two(width)
        rows, warps = rows_of_tile(block, kernel.__name__), warps_of(block, kernel.__name__)
        if atoms:
            kernel[(programs(atoms),)](*arguments, atoms, width, KB=block, ROWS=rows, **constants, num_warps=warps)

    def rows(self, columns: int) -> Tensor:
        """A row for each program of a launch, to be summed."""
        return self.u.new_zeros((programs(self.a.shape[0]), columns))

    def times(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x weight^T in the type of products."""
        w = weight.to(self.kind).t()
        return torch.mm(x, w) if bias is None else torch.addmm(bias.to(self.kind), x, w)

    def of_weight(self, g: Tensor, x: Tensor) -> Tensor:
        """The gradient g^T x of a weight, products in their type, summed and given back in the weight's."""
        if g.dtype == self.u.dtype:
            return torch.mm(g.t(), x)
        if g.is_cuda:
            return torch.mm(g.t(), x, out_dtype=self.u.dtype)
        return torch.mm(g.t().to(self.u.dtype), x.to(self.u.dtype))

    @property
    def pair_rows(self) -> Tensor:
        """(P, K)."""
        return self.w.pair.t().contiguous()


def _inputs(of: Pass) -> _Inputs:
    a, c, u, f, *weights = of.tensors
    return _Inputs(of.kind, of.i, of.j, a, c, u, f, EdgeWeights(*weights))


def _forward(of: Pass) -> tuple[Tensors, Tensors]:
    """Sums and phi; y, z2, z3."""
    x = _inputs(of)
    w, first = x.w, x.segments.first
    y, m = x.wide(2)
    sums, phi = torch.zeros_like(x.a), x.u.new_empty((len(x.u), len(w.weight_bias)))
    x.launch(kernels.first, x.a, x.c, x.f, x.pair_rows, x.a, x.c, x.f, x.j, first, y, P=x.f.shape[1], DUAL=False)
    z2 = x.times(y, w.message, w.message_bias)
    x.launch(kernels.middle, z2, x.u, w.gate, w.gate_bias, z2, x.u, first, m, sums, DUAL=False)
    z3 = x.times(m, w.move, w.move_bias)
    x.launch(kernels.last, z3, w.weight, w.weight_bias, z3, first, phi, C=phi.shape[1], DUAL=False)
    return (sums, phi), (y, z2, z3)


def _tangents(of: Pass, kept: Tensors, along: Tensors) -> tuple[Tensors, Tensors]:
    """Those of sums and phi; of y, z2, z3."""
    x, (_, z2_kept, z3_kept), (a, c, u, f) = _inputs(of), kept, along
    w, first = x.w, x.segments.first
    y, m = x.wide(2)
    sums, phi = torch.zeros_like(x.a), x.u.new_empty((len(x.u), len(w.weight_bias)))
    x.launch(kernels.first, x.a, x.c, x.f, x.pair_rows, a, c, f, x.j, first, y, P=f.shape[1], DUAL=True)
    z2 = x.times(y, w.message)
    x.launch(kernels.middle, z2_kept, x.u, w.gate, w.gate_bias, z2, u, first, m, sums, DUAL=True)
    z3 = x.times(m, w.move)
    x.launch(kernels.last, z3_kept, w.weight, w.weight_bias, z3, first, phi, C=phi.shape[1], DUAL=True)
    return (sums, phi), (y, z2, z3)


def _backward(of: Pass, kept: Tensors, slopes: Tensors, weights: bool) -> tuple[Found, Tensors]:
    """Gradients; the part of m's that comes from z3, and that of y."""
    x, (y, z2, z3), (g_sums, g_phi) = _inputs(of), kept, slopes
    w, (first, order, sent), width = x.w, x.segments, x.a.shape[1]
    g_z3, y3, g_z2, m, g_z1 = x.wide(5)
    b3, b2, gate = x.rows(width), x.rows(width), x.rows(width + 1)
    g_u, g_f, g_a, g_c = torch.empty_like(x.u), torch.empty_like(x.f), torch.zeros_like(x.a), torch.zeros_like(x.c)
    x.launch(
        kernels.last_back, z3, w.weight, g_phi, z3, g_phi, first, g_z3, y3, g_z3, y3, b3,
        C=g_phi.shape[1], DUAL=False,
    )  # fmt: skip
    g_m = x.times(g_z3, w.move.t())
    x.launch(
        kernels.middle_back, z2, x.u, w.gate, w.gate_bias, g_m, g_sums, first, g_z2, m, g_u, b2, gate
    )  # fmt: skip
    g_y = x.times(g_z2, w.message.t())
    x.launch(
        kernels.first_back, x.a, x.c, x.f, x.pair_rows, g_y, x.a, x.c, x.f, g_y, x.j, first, g_z1, g_z1, g_a, g_f,
        P=x.f.shape[1], DUAL=False,
    )  # fmt: skip
    x.launch(kernels.by_sender, g_z1, order, sent, g_c)
    values = g_a, g_c, g_u, g_f
    if not weights:
        return (*values, *[None] * len(w)), (g_m, g_y)
    gates = gate.sum(dim=0)
    found = EdgeWeights(
        pair=x.of_weight(g_z1, x.f.to(x.kind)),
        message=x.of_weight(g_z2, y),
        message_bias=b2.sum(dim=0),
        gate=gates[None, :-1],
        gate_bias=gates[-1:],
        move=x.of_weight(g_z3, m),
        move_bias=b3.sum(dim=0),
        weight=x.of_weight(g_phi.to(x.kind), y3),
        weight_bias=g_phi.sum(dim=0),
    )
    return (*values, *found), (g_m, g_y)


def _dual(of: Pass, kept: Tensors, waiting: Waiting, seeds: Tensors) -> Found:
    x, (y, z2, z3), (g_sums, g_phi), (g_m, g_y) = _inputs(of), kept, waiting.slopes, waiting.between
    (a_t, c_t, u_t, f_t), (y_t, z2_t, z3_t), (s_sums, s_phi) = waiting.along, waiting.tangents, seeds
    w, (first, order, sent), width = x.w, x.segments, x.a.shape[1]
    g_z3, y3, g_z3_t, y3_t, g_z2, g_z2_t, m, m_t, g_z1, g_z1_t = x.wide(10)
    b3, b2, gate = x.rows(width), x.rows(width), x.rows(width + 1)
    g_u, g_f, g_a, g_c = torch.empty_like(x.u), torch.empty_like(x.f), torch.zeros_like(x.a), torch.zeros_like(x.c)
    x.launch(
        kernels.last_back, z3, w.weight, g_phi, z3_t, s_phi, first, g_z3, y3, g_z3_t, y3_t, b3,
        C=s_phi.shape[1], DUAL=True,
    )  # fmt: skip
    g_m_t = x.times(g_z3_t, w.move.t())
    x.launch(
        kernels.middle_back_dual, z2, x.u, w.gate, w.gate_bias, g_m, g_sums, z2_t, u_t, g_m_t, s_sums,
        first, g_z2, g_z2_t, m, m_t, g_u, b2, gate,
    )  # fmt: skip
    g_y_t = x.times(g_z2_t, w.message.t())
    x.launch(
        kernels.first_back, x.a, x.c, x.f, x.pair_rows, g_y, a_t, c_t, f_t, g_y_t, x.j, first, g_z1, g_z1_t, g_a,
        g_f, P=x.f.shape[1], DUAL=True,
    )  # fmt: skip
    x.launch(kernels.by_sender, g_z1_t, order, sent, g_c)
    gates = gate.sum(dim=0)
    found = EdgeWeights(
        pair=x.of_weight(g_z1_t, x.f.to(x.kind)).add_(x.of_weight(g_z1, f_t.to(x.kind))),
        message=x.of_weight(g_z2_t, y).add_(x.of_weight(g_z2, y_t)),
        message_bias=b2.sum(dim=0),
        gate=gates[None, :-1],
        gate_bias=gates[-1:],
        move=x.of_weight(g_z3_t, m).add_(x.of_weight(g_z3, m_t)),
        move_bias=b3.sum(dim=0),
        weight=x.of_weight(s_phi.to(x.kind), y3).add_(x.of_weight(g_phi.to(x.kind), y3_t)),
        weight_bias=s_phi.sum(dim=0),
    )
    return g_a, g_c, g_u, g_f, *found


RULES = Rules("EGNN", 4, _forward, _backward, _tangents, _dual)
