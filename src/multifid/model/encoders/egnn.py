"""EGNN with several vector channels (Satorras, Hoogeboom, Welling 2021, arXiv 2102.09844).

Each atom carries C points x_i + v_i^c that start at the atom itself and move with the layers. One layer, with r_ij the
vector from i to j, u the cutoff envelope of the original distance |r_ij|, b its radial basis:

    x_ij^c = r_ij + v_j^c - v_i^c
    m_ij   = phi_e(h_i, h_j, |x_ij^c|^2 / c^2, b(|r_ij|))                      paper eq. 3
    v_i^c += 1/M sum_j u_ij phi_x(m_ij)_c x_ij^c / sqrt(|x_ij^c|^2 + 1)        paper eq. 4, length-normalised
    m_i    = 1/M sum_j u_ij m_ij                                               paper eq. 5
    h_i   += phi_h(h_i, m_i, |v_i^c|^2)                                        paper eq. 6

M is a constant, never the number of neighbours: dividing by that would jump when an atom crosses the cutoff.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from multifid.model.layers import (
    MLP,
    SILU_GAIN,
    LayerNorm,
    Linear,
    NodeEmbedding,
    NodeFeatures,
    RadialBasis,
    envelope,
    sum_over,
)
from multifid.structures.batch import Batch, edge_vectors

TYPICAL_NEIGHBORS = 16.0  # M; sums over neighbours are divided by it (scalars) or its square root (vectors)


class EGNN(nn.Module):
    """Scalars of width `hidden` and `vectors` vector channels per atom (8 if not given) after `layers` layers."""

    def __init__(self, layers: int, hidden: int, vectors: int | None, radial: int, cutoff: float):
        super().__init__()
        self.hidden = hidden
        self.vectors = 8 if vectors is None else vectors
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden)
        self.radial = RadialBasis(radial, cutoff)
        self.layers = nn.ModuleList(EGNNLayer(hidden, self.vectors, radial, cutoff) for _ in range(layers))

    def forward(self, batch: Batch) -> NodeFeatures:
        h = self.embedding(batch.numbers, batch.charge, batch.spin, batch.structure)
        v = batch.positions.new_zeros((len(h), self.vectors, 3))
        i, j = batch.edges
        r = edge_vectors(batch)
        d = torch.linalg.vector_norm(r, dim=1)
        b, u = self.radial(d), envelope(d, self.cutoff)
        for layer in self.layers:
            h, v = layer(h, v, i, j, r, b, u)
        return NodeFeatures(h, v)


class EGNNLayer(nn.Module):
    """One layer; the equations stand at the head of this file."""

    def __init__(self, hidden: int, vectors: int, radial: int, cutoff: float):
        super().__init__()
        self.per_area = 1.0 / cutoff**2
        self.norm = LayerNorm(hidden)
        self.edge_in = Linear(2 * hidden + vectors + radial, hidden, gain=SILU_GAIN)
        self.edge_out = Linear(hidden, hidden, gain=SILU_GAIN)
        self.move = MLP([hidden, hidden, vectors])
        self.node = MLP([2 * hidden + vectors, hidden, hidden])

    def forward(
        self, h: Tensor, v: Tensor, i: Tensor, j: Tensor, r: Tensor, b: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h (N, H), v (N, C, 3), receivers i and senders j (E,), r (E, 3), basis b (E, R), envelope u (E, 1)."""
        n = self.norm(h)
        x = r[:, None, :] + v.index_select(0, j) - v.index_select(0, i)  # (E, C, 3)
        x2 = x.square().sum(dim=2)  # (E, C)
        edge = torch.cat([n.index_select(0, i), n.index_select(0, j), x2 * self.per_area, b], dim=1)
        m = silu(self.edge_out(silu(self.edge_in(edge))))  # (E, H)

        weight = u * self.move(m) * torch.rsqrt(x2 + 1.0)  # (E, C)
        v = v + sum_over(weight[:, :, None] * x, i, len(h)) / TYPICAL_NEIGHBORS**0.5
        m_sum = sum_over(u * m, i, len(h)) / TYPICAL_NEIGHBORS**0.5
        h = h + self.node(torch.cat([n, m_sum, v.square().sum(dim=2)], dim=1))
        return h, v
