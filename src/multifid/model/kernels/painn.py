"""What PaiNN computes on edges with its first derivative written out: the faster form of `painn.edge_message`.

Nearly all of PaiNN's time goes into reading and writing numbers of edges: six for each hidden unit, for few
multiplications. Nothing of an edge is kept between forward and backward: filters are a product with a few radial
functions, cheaper to take again than to read from memory. Vectors lie as (3, H), so that neighbouring numbers are
neighbouring channels.

`tests/test_plain_form.py` holds it against autograd of the published form. Second derivatives (conservative forces,
while training) are left to autograd, over the plain function.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def messages(
    pieces: list[slice],
    i: Tensor,
    j: Tensor,
    receivers: Sequence[Tensor],
    senders: Sequence[Tensor],
    edges: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor]:
    """Sums over the neighbours: the scalar message and the three components of the vector one, (N, 4, H)."""
    (phi, v), (u, direction, basis), (weight, bias) = senders, edges, weights
    return (_PaiNNMessages.apply(pieces, phi, v, direction, basis, u, i, j, weight, bias),)


def filters(basis: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W(|r|), (T, 3, H)."""
    return torch.addmm(bias, basis, weight.t()).mul(u).view(u.shape[0], 3, bias.shape[0] // 3)


class _PaiNNMessages(torch.autograd.Function):
    """`messages` with its first derivative with respect to phi, v and the filter."""

    @staticmethod
    def forward(ctx, pieces, phi, v, direction, basis, u, i, j, weight, bias):  # type: ignore[no-untyped-def]
        sums = v.new_zeros(v.shape[0], 4, v.shape[2])
        for t in pieces:
            message = v.new_empty(t.stop - t.start, 4, v.shape[2])
            a, b, c = filters(basis[t], u[t], weight, bias).mul_(phi.index_select(0, j[t])).unbind(1)
            message[:, 0] = a
            torch.mul(c[:, None], direction[t][:, :, None], out=message[:, 1:])
            message[:, 1:].addcmul_(v.index_select(0, j[t]), b[:, None])
            sums.index_add_(0, i[t], message)
        ctx.pieces = pieces
        ctx.save_for_backward(phi, v, direction, basis, u, i, j, weight, bias)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_sums):  # type: ignore[no-untyped-def]
        phi, v, direction, basis, u, i, j, weight, bias = ctx.saved_tensors
        g_phi, g_v, g_weight, g_bias = (torch.zeros_like(x) for x in (phi, v, weight, bias))
        for t in ctx.pieces:
            w, phi_j = filters(basis[t], u[t], weight, bias), phi.index_select(0, j[t])
            g = g_sums.index_select(0, i[t])
            g_moved = g[:, 1:]
            g_v.index_add_(0, j[t], g_moved * (w[:, 1] * phi_j[:, 1])[:, None])
            g_message = torch.stack(
                [
                    g[:, 0],
                    (g_moved * v.index_select(0, j[t])).sum(dim=1),
                    (g_moved * direction[t][:, :, None]).sum(dim=1),
                ],
                dim=1,
            )
            g_phi.index_add_(0, j[t], w.mul_(g_message))
            g_filter = g_message.mul_(phi_j).flatten(1).mul_(u[t])
            g_weight.addmm_(g_filter.t(), basis[t])
            g_bias.add_(g_filter.sum(dim=0))
        return None, g_phi, g_v, None, None, None, None, None, g_weight, g_bias
