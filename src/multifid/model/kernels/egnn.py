"""What EGNN computes on edges with its first derivative written out: the faster form of `egnn.edge_message`.

Almost all arithmetic of the encoder is here. Matrix products have the row counts and widths that they run best at, and
between forward and backward only three values per edge and hidden unit are kept (the inputs of the three SiLU; autograd
would keep nine). `tests/test_plain_form.py` holds it against autograd of the published form.

Second derivatives (forces that are minus the gradient of the energy, while training) are left to autograd, over the
plain function: it merges the gradients of energy and forces before every matrix product.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from multifid.graphs.edges import wide

ALIGNMENT = 16  # widths are padded with zeros to a multiple: 866 runs at two thirds of the speed of 880


class EdgeWeights(NamedTuple):
    """The maps of one layer, padded to the aligned width K."""

    pair: Tensor  # (K, P): from squared distances and radial basis
    message: Tensor  # (K, K)
    message_bias: Tensor
    gate: Tensor  # (1, K)
    gate_bias: Tensor
    move: Tensor  # (K, K)
    move_bias: Tensor
    weight: Tensor  # (C, K)
    weight_bias: Tensor

    def to(self, kind: torch.dtype) -> "EdgeWeights":
        """The same maps in another type."""
        return EdgeWeights(*(x.to(kind) for x in self))


def aligned(width: int, kind: torch.dtype = torch.float32) -> int:
    """The width that products of a type are made with."""
    multiple = 2 * ALIGNMENT if kind == torch.bfloat16 else ALIGNMENT
    return -(-width // multiple) * multiple


def padded(x: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """A vector or matrix with zeros behind its entries. SiLU keeps zeros, so padded units never matter."""
    missing = [0, rows - x.shape[0]] if columns is None else [0, columns - x.shape[1], 0, rows - x.shape[0]]
    return pad(x, missing) if any(missing) else x


def pad_columns(x: Tensor, width: int) -> Tensor:
    """(N, H) -> (N, width)."""
    return padded(x, x.shape[0], width)


def matmul_type(x: Tensor) -> torch.dtype:
    """The type of matrix products: that of autocast, where it is on."""
    kind = x.device.type
    if kind == "meta":  # tensors without memory, which are only counted
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def messages(
    pieces: list[slice],
    i: Tensor,
    j: Tensor,
    receivers: Sequence[Tensor],
    senders: Sequence[Tensor],
    edges: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Sums of messages per atom, (N, K) in u's type, and the unscaled weights phi_x of edge vectors, (E, C)."""
    (a,), (c,), (u, f) = receivers, senders, edges
    kind = matmul_type(u)
    return _EGNNMessages.apply(pieces, a.to(kind), c.to(kind), f.to(kind), u, i, j, *EdgeWeights(*weights).to(kind))


def tile_forward(
    a: Tensor, c: Tensor, f: Tensor, i: Tensor, j: Tensor, w: EdgeWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same numbers; and first and second input of SiLU (T, K), gates (T, 1), third input (T, K)."""
    first = a.index_select(0, i).addmm_(f, w.pair.t()).add_(c.index_select(0, j))
    second = torch.addmm(w.message_bias, silu(first), w.message.t())
    n = silu(second)
    gate = torch.sigmoid(torch.addmm(w.gate_bias, n, w.gate.t()))
    m = n.mul_(gate)
    third = torch.addmm(w.move_bias, m, w.move.t())
    return m, torch.addmm(w.weight_bias, silu(third), w.weight.t()), first, second, gate, third


class _EGNNMessages(torch.autograd.Function):
    """`messages` with its first derivative with respect to everything but u, i and j."""

    @staticmethod
    def forward(ctx, pieces, a, c, f, u, i, j, *weights):  # type: ignore[no-untyped-def]
        w = EdgeWeights(*weights)
        sums, move = u.new_zeros(a.shape), a.new_empty(i.shape[0], w.weight_bias.shape[0])
        kept = []
        for t in pieces:
            m, move[t], *of_tile = tile_forward(a, c, f[t], i[t], j[t], w)
            sums.index_add_(0, i[t], u[t] * m)
            kept += of_tile if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(f, u, i, j, *weights, *kept)
        ctx.pieces, ctx.atoms = pieces, a.shape[0]
        return sums, move

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_sums, g_move):  # type: ignore[no-untyped-def]
        f, u, i, j, *rest = ctx.saved_tensors
        w, kept = EdgeWeights(*rest[: len(EdgeWeights._fields)]), rest[len(EdgeWeights._fields) :]
        total = wide(w.pair.dtype)
        g_a, g_c = (torch.zeros(ctx.atoms, w.pair.shape[0], dtype=total, device=u.device) for _ in range(2))
        g_f = torch.empty_like(f)
        g_w = EdgeWeights(*(torch.zeros_like(x, dtype=total) for x in w))
        for k, t in enumerate(ctx.pieces):
            g = tile_backward(g_sums, g_move[t], f[t], u[t], i[t], w, g_w, *kept[4 * k : 4 * k + 4])
            torch.mm(g, w.pair, out=g_f[t])
            g = g.to(total)
            g_a.index_add_(0, i[t], g)
            g_c.index_add_(0, j[t], g)
        return (
            None, g_a.to(w.pair.dtype), g_c.to(w.pair.dtype), g_f, None, None, None,
            *(g.to(x.dtype) for g, x in zip(g_w, w, strict=True)),
        )  # fmt: skip


def tile_backward(
    g_sums: Tensor,
    g_move: Tensor,
    f: Tensor,
    u: Tensor,
    i: Tensor,
    w: EdgeWeights,
    g_w: EdgeWeights,
    first: Tensor,
    second: Tensor,
    gate: Tensor,
    third: Tensor,
) -> Tensor:
    """The gradient of the first input of SiLU (T, K); those of the weights are added to `g_w`.

    Reads `tile_forward` from its last line to its first; n is the message before its gate.
    """
    y, slope = _silu_and_slope(third)
    _add(g_w.weight, g_w.weight_bias, g_move, y)
    g = torch.mm(g_move, w.weight).mul_(slope)
    n, slope = _silu_and_slope(second)
    _add(g_w.move, g_w.move_bias, g, gate * n)
    of_sums = g_sums.index_select(0, i).mul_(u)
    g = of_sums.to(g.dtype).addmm_(g, w.move)
    g_gate = (g * n).sum(dim=1, keepdim=True) * gate * (1 - gate)
    _add(g_w.gate, g_w.gate_bias, g_gate, n)
    g = g.mul_(gate).addmm_(g_gate, w.gate).mul_(slope)
    y, slope = _silu_and_slope(first)
    _add(g_w.message, g_w.message_bias, g, y)
    g = torch.mm(g, w.message).mul_(slope)
    _add(g_w.pair, None, g, f)
    return g


def _silu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """y = x s and its derivative s + y (1 - s), s the sigmoid of x: one exponential for both."""
    s = torch.sigmoid(x)
    y = x * s
    return y, torch.lerp(y, y.new_ones(()), s)


def _add(g_weight: Tensor, g_bias: Tensor | None, g: Tensor, x: Tensor) -> None:
    """Add the gradients of a linear map of x, given that of its output; sums over tiles are never in half precision."""
    if g_weight.dtype == g.dtype:
        g_weight.addmm_(g.t(), x)
    else:
        g_weight.add_(torch.mm(g.t(), x))
    if g_bias is not None:
        g_bias.add_(g.sum(dim=0, dtype=g_bias.dtype))
