"""What EGNN computes on edges on a GPU: products by the vendor's library, all between them by kernels of Triton.

    first -> product -> middle, with the sums to receivers -> product -> last        and the same backwards

Two derivatives. Forces that are minus the gradient of the energy are, while training, differentiated once more: for a
backward pass B(x, G), with inputs x and a gradient G of the outputs, the derivative along V of its results is wanted.
Seen as numbers with tangents, x + t V and G + t g:

    gradient for G      the tangent of the forward pass, with the seed V                           `_tangents`
    gradient for x      the tangent of the backward pass, with the seeds V and g                   `_dual_backward`

where g is the gradient that reaches the outputs themselves. One dual backward pass takes both: V waits (`_Waiting`)
until g is complete. So a conservative training step has twelve products of two square matrices, as autograd has,
and not sixteen.

Of an edge y, z2 and z3 are kept (the names are those of `egnn_kernels.py`), and between the two derivatives also the
gradients of m and y. Sums have one order, so that results have the same bits each time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multifid.model.kernels.egnn import EdgeWeights, matmul_type
from multifid.model.kernels.gpu import egnn_kernels as kernels
from multifid.model.kernels.gpu.segments import Segments, power_of_two, programs, rows_of_tile, segments

FIRST_WEIGHT = 6  # tensors before the weights


def messages(
    pieces: list[slice],
    i: Tensor,
    j: Tensor,
    receivers: Sequence[Tensor],
    senders: Sequence[Tensor],
    edges: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Sums of messages per atom, (N, K), and the unscaled weights phi_x of edge vectors, (E, C), in u's type.

    Differentiable twice, but for second derivatives that go through gradients of weights. Edges are taken in one piece.
    """
    (a,), (c,), (u, f) = receivers, senders, edges
    x = [y.contiguous() for y in (a, c, u, f)]
    sums, phi, _ = _Messages.apply(matmul_type(u), i, j, *x, *(w.contiguous() for w in weights))
    return sums, phi


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

    def wide(self, *kinds: torch.dtype | None) -> list[Tensor]:
        """Tensors (E, K) without values, by default in the type of products."""
        return [self.u.new_empty((len(self.u), self.a.shape[1]), dtype=kind or self.kind) for kind in kinds]

    def launch(self, kernel: Any, *arguments: Tensor, **constants: Any) -> None:
        """A kernel over all atoms."""
        atoms, width = self.a.shape
        block = power_of_two(width)
        if atoms:
            kernel[(programs(atoms),)](
                *arguments, atoms, width, KB=block, ROWS=rows_of_tile(block, kernel.__name__), **constants, num_warps=4
            )

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


class _Kept(NamedTuple):
    """Of every edge and hidden unit, from the forward pass to the backward one."""

    y: Tensor
    z2: Tensor
    z3: Tensor


class _Tangents(NamedTuple):
    """Of inputs and of what is kept, along V."""

    a: Tensor
    c: Tensor
    u: Tensor
    f: Tensor
    y: Tensor
    z2: Tensor
    z3: Tensor


class _Gradients(NamedTuple):
    """Of the inputs; of weights where they are wanted."""

    a: Tensor
    c: Tensor
    u: Tensor
    f: Tensor
    w: EdgeWeights | None


class _Waiting(NamedTuple):
    """A backward pass whose results were differentiated, until the forward pass is."""

    g_sums: Tensor
    g_phi: Tensor
    g_m: Tensor  # the part from z3
    g_y: Tensor
    tangents: _Tangents


def _forward(x: _Inputs) -> tuple[Tensor, Tensor, _Kept]:
    """Sums, phi, and what is kept."""
    w, first = x.w, x.segments.first
    y, m = x.wide(None, None)
    sums, phi = torch.zeros_like(x.a), x.u.new_empty((len(x.u), len(w.weight_bias)))
    x.launch(kernels.first, x.a, x.c, x.f, x.pair_rows, x.a, x.c, x.f, x.j, first, y, P=x.f.shape[1], DUAL=False)
    z2 = x.times(y, w.message, w.message_bias)
    x.launch(kernels.middle, z2, x.u, w.gate, w.gate_bias, z2, x.u, first, m, sums, DUAL=False)
    z3 = x.times(m, w.move, w.move_bias)
    x.launch(kernels.last, z3, w.weight, w.weight_bias, z3, first, phi, C=phi.shape[1], DUAL=False)
    return sums, phi, _Kept(y, z2, z3)


def _tangents(x: _Inputs, kept: _Kept, a: Tensor, c: Tensor, u: Tensor, f: Tensor) -> tuple[Tensor, Tensor, _Tangents]:
    """The derivatives of sums and phi along (a, c, u, f), and those of what is kept."""
    w, first = x.w, x.segments.first
    y, m = x.wide(None, None)
    sums, phi = torch.zeros_like(x.a), x.u.new_empty((len(x.u), len(w.weight_bias)))
    x.launch(kernels.first, x.a, x.c, x.f, x.pair_rows, a, c, f, x.j, first, y, P=f.shape[1], DUAL=True)
    z2 = x.times(y, w.message)
    x.launch(kernels.middle, kept.z2, x.u, w.gate, w.gate_bias, z2, u, first, m, sums, DUAL=True)
    z3 = x.times(m, w.move)
    x.launch(kernels.last, kept.z3, w.weight, w.weight_bias, z3, first, phi, C=phi.shape[1], DUAL=True)
    return sums, phi, _Tangents(a, c, u, f, y, z2, z3)


def _backward(
    x: _Inputs, kept: _Kept, g_sums: Tensor, g_phi: Tensor, weights: bool
) -> tuple[_Gradients, Tensor, Tensor]:
    """Gradients, those of weights where they are wanted, and the part of m's that comes from z3, and that of y."""
    w, (first, order, sent), width = x.w, x.segments, x.a.shape[1]
    g_z3, y3, g_z2, m, g_z1 = x.wide(None, None, None, None, None)
    b3, b2, gate = x.rows(width), x.rows(width), x.rows(width + 1)
    g_u, g_f, g_a, g_c = torch.empty_like(x.u), torch.empty_like(x.f), torch.zeros_like(x.a), torch.zeros_like(x.c)
    x.launch(
        kernels.last_back, kept.z3, w.weight, g_phi, kept.z3, g_phi, first, g_z3, y3, g_z3, y3, b3,
        C=g_phi.shape[1], DUAL=False,
    )  # fmt: skip
    g_m = x.times(g_z3, w.move.t())
    x.launch(
        kernels.middle_back, kept.z2, x.u, w.gate, w.gate_bias, g_m, g_sums, first, g_z2, m, g_u, b2, gate
    )  # fmt: skip
    g_y = x.times(g_z2, w.message.t())
    x.launch(
        kernels.first_back, x.a, x.c, x.f, x.pair_rows, g_y, x.a, x.c, x.f, g_y, x.j, first, g_z1, g_z1, g_a, g_f,
        P=x.f.shape[1], DUAL=False,
    )  # fmt: skip
    x.launch(kernels.by_sender, g_z1, order, sent, g_c)
    found = None
    if weights:
        gates = gate.sum(dim=0)
        found = EdgeWeights(
            pair=x.of_weight(g_z1, x.f.to(x.kind)),
            message=x.of_weight(g_z2, kept.y),
            message_bias=b2.sum(dim=0),
            gate=gates[None, :-1],
            gate_bias=gates[-1:],
            move=x.of_weight(g_z3, m),
            move_bias=b3.sum(dim=0),
            weight=x.of_weight(g_phi.to(x.kind), y3),
            weight_bias=g_phi.sum(dim=0),
        )
    return _Gradients(g_a, g_c, g_u, g_f, found), g_m, g_y


def _dual_backward(x: _Inputs, kept: _Kept, of: _Waiting, s_sums: Tensor, s_phi: Tensor) -> _Gradients:
    """The tangents of `_backward`, with the seeds s for the gradients of sums and phi."""
    w, (first, order, sent), width, t = x.w, x.segments, x.a.shape[1], of.tangents
    g_z3, y3, g_z3_t, y3_t, g_z2, g_z2_t, m, m_t, g_z1, g_z1_t = x.wide(*[None] * 10)
    b3, b2, gate = x.rows(width), x.rows(width), x.rows(width + 1)
    g_u, g_f, g_a, g_c = torch.empty_like(x.u), torch.empty_like(x.f), torch.zeros_like(x.a), torch.zeros_like(x.c)
    x.launch(
        kernels.last_back, kept.z3, w.weight, of.g_phi, t.z3, s_phi, first, g_z3, y3, g_z3_t, y3_t, b3,
        C=s_phi.shape[1], DUAL=True,
    )  # fmt: skip
    g_m_t = x.times(g_z3_t, w.move.t())
    x.launch(
        kernels.middle_back_dual, kept.z2, x.u, w.gate, w.gate_bias, of.g_m, of.g_sums, t.z2, t.u, g_m_t, s_sums,
        first, g_z2, g_z2_t, m, m_t, g_u, b2, gate,
    )  # fmt: skip
    g_y_t = x.times(g_z2_t, w.message.t())
    x.launch(
        kernels.first_back, x.a, x.c, x.f, x.pair_rows, of.g_y, t.a, t.c, t.f, g_y_t, x.j, first, g_z1, g_z1_t, g_a,
        g_f, P=x.f.shape[1], DUAL=True,
    )  # fmt: skip
    x.launch(kernels.by_sender, g_z1_t, order, sent, g_c)
    gates = gate.sum(dim=0)
    found = EdgeWeights(
        pair=x.of_weight(g_z1_t, x.f.to(x.kind)).add_(x.of_weight(g_z1, t.f.to(x.kind))),
        message=x.of_weight(g_z2_t, kept.y).add_(x.of_weight(g_z2, t.y)),
        message_bias=b2.sum(dim=0),
        gate=gates[None, :-1],
        gate_bias=gates[-1:],
        move=x.of_weight(g_z3_t, m).add_(x.of_weight(g_z3, m_t)),
        move_bias=b3.sum(dim=0),
        weight=x.of_weight(s_phi.to(x.kind), y3).add_(x.of_weight(of.g_phi.to(x.kind), y3_t)),
        weight_bias=s_phi.sum(dim=0),
    )
    return _Gradients(g_a, g_c, g_u, g_f, found)


class _Messages(torch.autograd.Function):
    """Sums, phi and a number without meaning, through which a differentiated backward pass is heard of."""

    @staticmethod
    def forward(ctx, kind, i, j, *tensors):  # type: ignore[no-untyped-def]
        x = _inputs_of(kind, i, j, tensors)
        with torch.autocast(i.device.type, enabled=False):
            sums, phi, kept = _forward(x)
        token = torch.zeros(())
        ctx.save_for_backward(i, j, *tensors, *kept, token)
        ctx.kind, ctx.waiting = kind, []
        ctx.set_materialize_grads(False)
        return sums, phi, token

    @staticmethod
    def backward(ctx, g_sums, g_phi, heard):  # type: ignore[no-untyped-def]
        i, j, *tensors, y, z2, z3, token = ctx.saved_tensors
        x, kept = _inputs_of(ctx.kind, i, j, tensors), _Kept(y, z2, z3)
        g_sums = torch.zeros_like(x.a) if g_sums is None else g_sums.contiguous()
        g_phi = x.u.new_zeros((len(x.u), len(x.w.weight_bias))) if g_phi is None else g_phi.contiguous()
        if torch.is_grad_enabled():
            if heard is not None:
                raise RuntimeError("the fused edges of EGNN have no third derivative; set train.kernels: eager")
            saved = [y.detach() for y in (i, j, *tensors, *kept)]
            return None, None, None, *_Backward.apply(ctx.kind, ctx.waiting, _weights_wanted(ctx), token, g_sums,
                                                      g_phi, *saved)  # fmt: skip
        waiting, ctx.waiting[:] = list(ctx.waiting), []
        if len(waiting) != (0 if heard is None else int(heard)):
            raise RuntimeError(
                "a derivative of fused edges was left half done: was one of several gradients asked for?"
            )
        if not waiting:
            found, _, _ = _backward(x, kept, g_sums, g_phi, _weights_wanted(ctx))
            return None, None, None, *_flat(found)
        # The outputs' own gradients go with the first of several backward passes.
        nothing = torch.zeros_like(g_sums), torch.zeros_like(g_phi)
        each = [
            _flat(_dual_backward(x, kept, of, *((g_sums, g_phi) if k == 0 else nothing)))
            for k, of in enumerate(waiting)
        ]
        return None, None, None, *(torch.stack(parts).sum(dim=0) for parts in zip(*each, strict=True))


class _Backward(torch.autograd.Function):
    """The gradients that `_Messages` has, differentiable."""

    @staticmethod
    def forward(ctx, kind, waiting, weights, token, g_sums, g_phi, *saved):  # type: ignore[no-untyped-def]
        i, j, *tensors, y, z2, z3 = saved
        found, g_m, g_y = _backward(_inputs_of(kind, i, j, tensors), _Kept(y, z2, z3), g_sums, g_phi, weights)
        ctx.save_for_backward(*saved, g_sums, g_phi, g_m, g_y)
        ctx.kind, ctx.waiting = kind, waiting
        ctx.set_materialize_grads(False)
        return _flat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, a, c, u, f, *weights):  # type: ignore[no-untyped-def]
        if any(w is not None for w in weights):
            raise RuntimeError(
                "the fused edges of EGNN have no derivative of gradients of weights; set train.kernels: eager"
            )
        i, j, *tensors, y, z2, z3, g_sums, g_phi, g_m, g_y = ctx.saved_tensors
        x = _inputs_of(ctx.kind, i, j, tensors)
        along = [
            torch.zeros_like(of) if v is None else v.contiguous()
            for v, of in zip((a, c, u, f), (x.a, x.c, x.u, x.f), strict=True)
        ]
        sums, phi, tangents = _tangents(x, _Kept(y, z2, z3), *along)
        ctx.waiting.append(_Waiting(g_sums, g_phi, g_m, g_y, tangents))
        return None, None, None, torch.ones(()), sums, phi, *[None] * (len(ctx.saved_tensors) - 4)


def _inputs_of(kind: torch.dtype, i: Tensor, j: Tensor, tensors: Sequence[Tensor]) -> _Inputs:
    a, c, u, f, *weights = (x.detach() for x in tensors)
    return _Inputs(kind, i, j, a, c, u, f, EdgeWeights(*weights))


def _flat(found: _Gradients) -> tuple[Any, ...]:
    *values, weights = found
    return *values, *(weights or [None] * len(EdgeWeights._fields))


def _weights_wanted(ctx: Any) -> bool:
    """Whether this backward pass goes to weights: not where only forces are asked for."""
    for node, _ in ctx.next_functions[FIRST_WEIGHT:]:
        if node is None:
            continue
        try:
            if torch._C._will_engine_execute_node(node):  # type: ignore[attr-defined]
                return True
        except RuntimeError:  # a weight itself is what a gradient is asked for
            return True
    return False
