"""EGNN with several vector channels (Satorras, Hoogeboom, Welling 2021, arXiv 2102.09844).

Each atom carries C points x_i + v_i^c that start at the atom itself and move with the layers. One layer, with r_ij the
vector from i to j, u the cutoff envelope of the original distance |r_ij| and b its radial basis:

    x_ij^c = r_ij + v_j^c - v_i^c
    m_ij   = e(n) n,   n = phi_e(h_i, h_j, |x_ij^c|^2 / cutoff^2, b(|r_ij|))           paper eq. 3; gate e: eq. 8
    v_i^c += 1/sqrt(M) sum_j u_ij phi_x(m_ij)_c x_ij^c / sqrt(|x_ij^c|^2 + 1)          paper eq. 4
    m_i    = 1/M sum_j u_ij m_ij                                                       paper eq. 5
    h_i   += phi_h(h_i, m_i, log(1 + |v_i^c|^2))                                       paper eq. 6

M is a constant, never the number of neighbours: dividing by that would jump when an atom crosses the cutoff. No bare
length is taken of v, whose gradient would be undefined at zero, where v starts; the logarithm keeps the rare far-moved
point from throwing a training step off.

With `tensors`, which the paper has not, a layer also sums T tensors for every atom (`tensors.py`), and edges and atoms
see more. With y_ij the quadratic harmonics of r_ij / sqrt(|r_ij|^2 + 1):

    phi_e      also of  v_i^c . r_ij, v_j^c . r_ij                                  from the second layer on
    T_i^c      = 1/sqrt(M) sum_j u_ij phi_t(m_ij)_c y_ij                           phi_t: more outputs of phi_x
    phi_h      also of  the inner products of vectors and of tensors, and v T v
"""

import torch
from torch import Tensor, nn

from multifid.model.encoders.edge_messages import EdgeWeights, aligned, messages, pad_columns, padded
from multifid.model.encoders.tensors import Invariants, along, bounded, harmonics
from multifid.model.layers import (
    MLP,
    SILU_GAIN,
    LayerNorm,
    Linear,
    NodeEmbedding,
    NodeFeatures,
    RadialBasis,
    call,
    envelope,
    sum_over,
)
from multifid.structures.batch import Batch, edge_vectors

TYPICAL_NEIGHBORS = 16.0  # M


class EGNN(nn.Module):
    """Scalars of width `hidden` and `vectors` vector channels per atom (8 if not given) after `layers` layers."""

    recompute = False  # keep nothing between the layers' ends for the backward pass

    def __init__(self, layers: int, hidden: int, vectors: int | None, radial: int, cutoff: float, tensors: int = 0):
        super().__init__()
        self.hidden = hidden
        self.vectors = 8 if vectors is None else vectors
        self.tensors = tensors
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden)
        self.radial = RadialBasis(radial, cutoff)
        self.layers = nn.ModuleList(
            EGNNLayer(hidden, self.vectors, tensors, radial, cutoff, first=k == 0) for k in range(layers)
        )
        self.norm = LayerNorm(hidden)

    def forward(self, batch: Batch) -> NodeFeatures:
        h = self.embedding(batch.numbers, batch.charge, batch.spin, batch.structure)
        v = batch.positions.new_zeros((len(h), self.vectors, 3))
        i, j = batch.edges
        r = edge_vectors(batch)
        d = torch.linalg.vector_norm(r, dim=1)
        b, u = self.radial(d), envelope(d, self.cutoff)
        y = [harmonics(bounded(r))] if self.tensors else []
        for layer in self.layers:
            h, v = call(layer, self.recompute, h, v, i, j, r, b, u, *y)
        return NodeFeatures(self.norm(h), v)


class EGNNLayer(nn.Module):
    """One layer; the equations stand at the head of this file. The `first` sees vectors that are zero."""

    def __init__(self, hidden: int, vectors: int, tensors: int, radial: int, cutoff: float, first: bool):
        super().__init__()
        self.per_area = 1.0 / cutoff**2
        self.norm = LayerNorm(hidden)
        # The first map of phi_e is linear in (h_i, h_j, ...): its parts for h_i and h_j are taken once per atom.
        self.receiver = Linear(hidden, hidden, gain=SILU_GAIN)
        self.sender = Linear(hidden, hidden, bias=False, gain=SILU_GAIN)
        self.pair = Linear(vectors + radial, hidden, bias=False, gain=SILU_GAIN)
        self.angle = Linear(2 * vectors, hidden, bias=False) if tensors and not first else None
        self.message = Linear(hidden, hidden, gain=SILU_GAIN)
        self.gate = Linear(hidden, 1)
        self.move = MLP([hidden, hidden, vectors + tensors])
        self.invariants = Invariants(vectors, tensors) if tensors else None
        more = 0 if self.invariants is None else self.invariants.size
        self.node = MLP([2 * hidden + vectors + more, hidden, hidden])

    def forward(
        self, h: Tensor, v: Tensor, i: Tensor, j: Tensor, r: Tensor, b: Tensor, u: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """h (N, H), v (N, C, 3), receivers i and senders j (E,), r (E, 3), basis b (E, R), envelope u (E, 1).

        With tensors also the harmonics y (E, 5).
        """
        n, atoms, vectors = self.norm(h), len(h), v.shape[1]
        v_j, v_i = v.index_select(0, j), v.index_select(0, i)
        x = r[:, None, :] + v_j - v_i  # (E, C, 3)
        x2 = x.square().sum(dim=2)  # (E, C)
        width = aligned(h.shape[1])
        of_receiver, of_sender = (pad_columns(x.to(u.dtype), width) for x in (self.receiver(n), self.sender(n)))
        angles = [] if self.angle is None else [along(v_i, r * self.per_area), along(v_j, r * self.per_area)]
        pair = torch.cat([x2 * self.per_area, b, *angles], dim=1)
        m_sum, phi = messages(of_receiver, of_sender, pair, u, i, j, self.edge_weights(width))

        weight = u * phi[:, :vectors] * torch.rsqrt(x2 + 1.0)  # (E, C)
        v = v + sum_over(weight[:, :, None] * x, i, atoms) / TYPICAL_NEIGHBORS**0.5
        m_sum = m_sum[:, : h.shape[1]] / TYPICAL_NEIGHBORS
        known = [n, m_sum, torch.log1p(v.square().sum(dim=2))]
        if self.invariants is not None and y is not None:
            weight = u * phi[:, vectors:]  # (E, T)
            t = sum_over(weight[:, :, None] * y[:, None, :], i, atoms) / TYPICAL_NEIGHBORS**0.5
            known.append(self.invariants(v, t))
        return h + self.node(torch.cat(known, dim=1)), v

    def edge_weights(self, width: int) -> EdgeWeights:
        """The maps that act on edges, padded to `width` hidden units."""
        first, last = self.move.linears()
        pair = self.pair.weight if self.angle is None else torch.cat([self.pair.weight, self.angle.weight], dim=1)
        return EdgeWeights(
            pair=padded(pair, width, pair.shape[1]),
            message=padded(self.message.weight, width, width),
            message_bias=padded(self.message.bias, width),
            gate=padded(self.gate.weight, 1, width),
            gate_bias=self.gate.bias,
            move=padded(first.weight, width, width),
            move_bias=padded(first.bias, width),
            weight=padded(last.weight, last.out_features, width),
            weight_bias=last.bias,
        )
