"""PaiNN, the polarizable atom interaction network (Schütt, Unke, Gastegger 2021, arXiv 2102.03150).

Scalars s_i (H) and H vectors v_i per atom. One layer is a message block and an update block, with r_ij the vector from
i to j, W(|r_ij|) a linear map of its radial basis times the cutoff envelope, and U, V linear maps over channels:

    [a, b, c]_ij = phi(s_j) * W(|r_ij|)                                        paper eq. 7 and 8
    s_i += 1/M sum_j a_ij,    v_i += 1/sqrt(M) sum_j (b_ij v_j + c_ij r_ij / |r_ij|)
    [a, b, c]_i  = a(s_i, log(1 + |V v_i|^2))                                  paper eq. 9 and 10
    s_i += a_i + b_i <U v_i, V v_i> / sqrt(1 + |V v_i|^2),    v_i += c_i U v_i

M is a constant, never the number of neighbours: dividing by that would jump when an atom crosses the cutoff. The paper
takes |V v_i| and the bare product: the gradient of the one is undefined at zero, where v starts, and the other grows
with the square of v, which made forces of 1e7 scales out of untrained weights.
"""

import torch
from torch import Tensor, nn

from multifid.model.encoders.painn_messages import messages
from multifid.model.layers import (
    MLP,
    LayerNorm,
    Linear,
    NodeEmbedding,
    NodeFeatures,
    RadialBasis,
    call,
    envelope,
)
from multifid.structures.batch import Batch, edge_vectors

TYPICAL_NEIGHBORS = 16.0  # M


class PaiNN(nn.Module):
    """Scalars of width `hidden` and as many vector channels per atom after `layers` layers."""

    recompute = False  # keep nothing between the layers' ends for the backward pass

    def __init__(self, layers: int, hidden: int, vectors: int | None, radial: int, cutoff: float, tensors: int = 0):
        super().__init__()
        if vectors not in (None, hidden):
            raise ValueError(
                f"painn has as many vector channels as hidden units ({hidden}), got vectors: {vectors}; leave it out"
            )
        if tensors:
            raise ValueError(f"painn has no tensors, got tensors: {tensors}; leave it out, or choose egnn")
        self.hidden = self.vectors = hidden
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden)
        self.radial = RadialBasis(radial, cutoff)
        self.layers = nn.ModuleList(PaiNNLayer(hidden, radial) for _ in range(layers))
        self.norm = LayerNorm(hidden)

    def forward(self, batch: Batch) -> NodeFeatures:
        s = self.embedding(batch.numbers, batch.charge, batch.spin, batch.structure)
        v = batch.positions.new_zeros((len(s), 3, self.vectors))
        i, j = batch.edges
        r = edge_vectors(batch)
        d = torch.linalg.vector_norm(r, dim=1)
        direction = r / d[:, None]
        basis, u = self.radial(d), envelope(d, self.cutoff)
        for layer in self.layers:
            s, v = call(layer, self.recompute, s, v, i, j, direction, basis, u)
        return NodeFeatures(self.norm(s), v.transpose(1, 2).contiguous())


class PaiNNLayer(nn.Module):
    """Message block and update block; the equations stand at the head of this file."""

    def __init__(self, hidden: int, radial: int):
        super().__init__()
        self.norm = LayerNorm(hidden)
        self.phi = MLP([hidden, hidden, 3 * hidden])
        self.filter = Linear(radial, 3 * hidden, gain=0.3)  # the basis has values near 3 at bond lengths
        self.mix = Linear(hidden, 2 * hidden, bias=False)  # U and V: over channels, so that vectors stay vectors
        self.update = MLP([2 * hidden, hidden, 3 * hidden])

    def forward(
        self, s: Tensor, v: Tensor, i: Tensor, j: Tensor, direction: Tensor, basis: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """s (N, H), v (N, 3, H), receivers i and senders j (E,), direction (E, 3), basis (E, R), envelope u (E, 1)."""
        phi = self.phi(self.norm(s)).view(len(s), 3, v.shape[2]).to(v.dtype)
        message = messages(phi, v, direction, basis, u, i, j, self.filter.weight, self.filter.bias)
        s = s + message[:, 0] / TYPICAL_NEIGHBORS
        v = v + message[:, 1:] / TYPICAL_NEIGHBORS**0.5

        uv, vv = self.mix(v).to(v.dtype).chunk(2, dim=2)  # (N, 3, H) each
        vv2 = vv.square().sum(dim=1)
        a, b, c = self.update(torch.cat([self.norm(s), torch.log1p(vv2)], dim=1)).chunk(3, dim=1)
        return s + a + b * (uv * vv).sum(dim=1) * torch.rsqrt(vv2 + 1.0), v + c[:, None] * uv
