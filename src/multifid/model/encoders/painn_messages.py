"""What PaiNN computes on edges, tile by tile, with its derivative.

Nearly all of PaiNN's time goes into reading and writing numbers of edges: six for each hidden unit, for few
multiplications. Tiles stay in the processor's cache, and nothing of an edge is kept between forward and backward:
filters are a product with a few radial functions, cheaper to take again than to read from memory. Vectors lie as
(3, H), so that neighbouring numbers are neighbouring channels.

The derivative is written out once; `tests/test_plain_form.py` holds it against autograd of the published form. Second
derivatives (conservative forces, while training) are left to autograd, over the same expression.
"""

import torch
from torch import Tensor

from multifid.model.encoders.edge_messages import tiles


def messages(
    phi: Tensor,
    v: Tensor,
    direction: Tensor,
    basis: Tensor,
    u: Tensor,
    i: Tensor,
    j: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Sums over the neighbours of each atom: the scalar message and the three components of the vector one, (N, 4, H).

    phi (N, 3, H): of the senders; v (N, 3, H); direction (E, 3); basis (E, R); envelope u (E, 1); receivers i and
    senders j (E,); weight (3 H, R) and bias (3 H,) of the filter.
    """
    if torch.is_grad_enabled() and u.requires_grad:  # depends on positions: derivatives of derivatives may be wanted
        sums = v.new_zeros(len(v), 4, v.shape[2])
        for t in tiles(len(i), phi.flatten(1)):
            a, b, c = (phi.index_select(0, j[t]) * filters(basis[t], u[t], weight, bias)).unbind(1)
            moved = b[:, None] * v.index_select(0, j[t]) + c[:, None] * direction[t][:, :, None]
            sums.index_add_(0, i[t], torch.cat([a[:, None], moved], dim=1).to(sums.dtype))
        return sums
    return _Messages.apply(phi, v, direction, basis, u, i, j, weight, bias)


def filters(basis: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W(|r|), (T, 3, H)."""
    return torch.addmm(bias, basis, weight.t()).mul(u).view(len(u), 3, len(bias) // 3)


class _Messages(torch.autograd.Function):
    """`messages` with its first derivative with respect to phi, v and the filter."""

    @staticmethod
    def forward(ctx, phi, v, direction, basis, u, i, j, weight, bias):  # type: ignore[no-untyped-def]
        sums = v.new_zeros(len(v), 4, v.shape[2])
        for t in tiles(len(i), phi.flatten(1)):
            message = v.new_empty(t.stop - t.start, 4, v.shape[2])
            a, b, c = filters(basis[t], u[t], weight, bias).mul_(phi.index_select(0, j[t])).unbind(1)
            message[:, 0] = a
            torch.mul(c[:, None], direction[t][:, :, None], out=message[:, 1:])
            message[:, 1:].addcmul_(v.index_select(0, j[t]), b[:, None])
            sums.index_add_(0, i[t], message)
        ctx.save_for_backward(phi, v, direction, basis, u, i, j, weight, bias)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_sums):  # type: ignore[no-untyped-def]
        phi, v, direction, basis, u, i, j, weight, bias = ctx.saved_tensors
        g_phi, g_v, g_weight, g_bias = (torch.zeros_like(x) for x in (phi, v, weight, bias))
        for t in tiles(len(i), phi.flatten(1)):
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
        return g_phi, g_v, None, None, None, None, None, g_weight, g_bias
