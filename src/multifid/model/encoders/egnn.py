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

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import silu

from multifid.graphs.edges import faster_form_of, over_edges
from multifid.graphs.graph import Graph
from multifid.model.contract import Encoder, EncoderConfig, Features
from multifid.model.encoders.tensors import Invariants, along, bounded, harmonics
from multifid.model.kernels import egnn as kernels
from multifid.model.kernels import egnn_native as native
from multifid.model.kernels.egnn import EdgeWeights, aligned, matmul_type, pad_columns, padded
from multifid.model.kernels.embedded import egnn as operations
from multifid.model.kernels.embedded import wanted
from multifid.model.kernels.gpu.chosen import on_gpu
from multifid.model.kernels.native.build import usable
from multifid.model.layers import (
    ELEMENTS,
    MLP,
    SILU_GAIN,
    SIZED,
    TYPICAL_NEIGHBORS,
    Elements,
    LayerNorm,
    Linear,
    NodeEmbedding,
    PairBasis,
    bent_maps,
    call,
    pairs,
    sum_over,
)


class EGNN(Encoder):
    """Scalars of width `hidden` and `vectors` vector channels per atom after `layers` layers."""

    edges_in_library = True

    class Config(EncoderConfig):
        name: Literal["egnn"] = "egnn"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features and of the hidden layers.")
        vectors: int = Field(default=8, ge=1, description="Vector channels per atom.")
        tensors: int = Field(
            default=0,
            ge=0,
            description="Channels of symmetric tensors per atom: with some, atoms and edges see the angles between "
            "neighbours; 8 take about twice as long for a step, and learn more from few structures.",
        )
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")
        sized: int = SIZED
        elements: Elements = ELEMENTS

        @field_validator("vectors", mode="before")
        @classmethod
        def _default(cls, value: Any) -> Any:
            """Runs of the first release wrote down `null` for the default."""
            return 8 if value is None else value

    def __init__(self, config: Config, cutoff: float):
        super().__init__()
        hidden, vectors, tensors = config.hidden, config.vectors, config.tensors
        self.degrees = {0: hidden, 1: vectors}
        self.readouts = config.layers - 1
        self.tensors = tensors
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden, config.elements)
        self.basis = PairBasis(config.radial, config.sized, cutoff)
        self.layers = nn.ModuleList(
            EGNNLayer(hidden, vectors, tensors, self.basis.size, cutoff, first=k == 0) for k in range(config.layers)
        )
        self.norm = LayerNorm(hidden)

    def forward(self, graph: Graph) -> Features:
        numbers, structure = graph.of_own(graph.numbers), graph.of_own(graph.structure)
        h = self.embedding(numbers, graph.charge, graph.spin, structure)
        v = graph.vectors.new_zeros((numbers.shape[0], self.degrees[1], 3))
        r = graph.vectors
        b, u = pairs(graph, self.basis, self.cutoff)
        y = [harmonics(bounded(r))] if self.tensors else []
        of_layers = []
        for number, layer in enumerate(self.layers):
            if number and graph.own is None:
                h, v = graph.exchanged(h, v)
            of_domain = layer if graph.own is None else partial(layer, fetch=graph.exchanged)
            h, v = call(of_domain, self.recompute, h, v, graph.receivers, graph.senders, r, b, u, *y)
            of_layers.append(h)
        return Features(self.norm(h), v, layers=tuple(of_layers[:-1]))


def edge_message(a: Tensor, c: Tensor, u: Tensor, f: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """Messages times the envelope, (T, K), and the unscaled weights phi_x of edge vectors, (T, C).

    a, c (T, K): the parts of the first map that depend on receiver and sender; u (T, 1): the envelope; f (T, P): the
    part that depends on the pair.
    """
    kind = matmul_type(u)
    w = EdgeWeights(*weights).to(kind)  # here, not before: gradients are added up over tiles in the weights' own type
    n = silu(torch.addmm(w.message_bias, silu(torch.addmm((a + c).to(kind), f.to(kind), w.pair.t())), w.message.t()))
    m = torch.sigmoid(torch.addmm(w.gate_bias, n, w.gate.t())) * n
    return u * m, torch.addmm(w.weight_bias, silu(torch.addmm(w.move_bias, m, w.move.t())), w.weight.t())


faster_form_of(edge_message)(kernels.messages)
on_gpu(edge_message, "egnn", summed=(True, False))


def edges_of_layer(
    i: Tensor,
    j: Tensor,
    per_area: float,
    angles: bool,
    a: Tensor,
    c: Tensor,
    v: Tensor,
    r: Tensor,
    b: Tensor,
    u: Tensor,
    *rest: Tensor,
) -> tuple[Tensor, ...]:
    """Sums over the neighbours of each atom: of messages (N, K), of moves (N, C, 3) and, with y, of tensors (N, T, 5).

    a, c (N, K): the parts of the first map that depend on receiver and sender; a may have fewer rows, as many as the
    sums have. rest: the harmonics y (E, 5), where there are tensors, and the weights.
    """
    weights = EdgeWeights(*rest[-len(EdgeWeights._fields) :])
    y = rest[0] if len(rest) > len(weights) else None
    atoms, vectors = a.shape[0], v.shape[1]
    v_j, v_i = v.index_select(0, j), v.index_select(0, i)
    x = r[:, None, :] + v_j - v_i  # (E, C, 3)
    x2 = x.square().sum(dim=2)  # (E, C)
    of_angles = [along(v_i, r * per_area), along(v_j, r * per_area)] if angles else []
    m_sum, phi = over_edges(
        edge_message,
        i,
        j,
        atoms,
        u,
        width=a.shape[1],
        receivers=[a],
        senders=[c],
        edges=[torch.cat([x2 * per_area, b, *of_angles], dim=1)],
        weights=weights,
        summed=(True, False),
    )
    weight = u * phi[:, :vectors] * torch.rsqrt(x2 + 1.0)  # (E, C)
    moves = sum_over(weight[:, :, None] * x, i, atoms)
    if y is None:
        return m_sum, moves
    weight = u * phi[:, vectors:]  # (E, T)
    return m_sum, moves, sum_over(weight[:, :, None] * y[:, None, :], i, atoms)


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
        self,
        h: Tensor,
        v: Tensor,
        i: Tensor,
        j: Tensor,
        r: Tensor,
        b: Tensor,
        u: Tensor,
        y: Tensor | None = None,
        fetch: Callable[..., tuple[Tensor, ...]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """h (N, H), v (N, C, 3), receivers i and senders j (E,), r (E, 3), basis b (E, R), envelope u (E, 1).

        With tensors also the harmonics y (E, 5). fetch: `Graph.exchanged` of a domain, whose own atoms h and v are of.
        """
        n, width = self.norm(h), aligned(h.shape[1], matmul_type(u))
        of_receiver, of_sender = (
            pad_columns(bent_maps(n, [linear], bent=False).to(u.dtype), width)
            for linear in (self.receiver, self.sender)
        )
        known = partial(edges_of_layer, i, j, self.per_area, self.angle is not None)
        of_sender, of_all = (of_sender, v) if fetch is None else fetch(of_sender, v)
        inputs = [of_receiver, of_sender, of_all, r, b, u, *([] if y is None else [y])]
        weights = self.edge_weights(width)
        if usable(u, width):
            m_sum, moves, *of_tensors = native.edges(
                known, i, j, self.per_area, self.angle is not None, inputs, weights
            )
        elif wanted(u, width):
            m_sum, moves, *of_tensors = operations.edges(i, j, self.per_area, self.angle is not None, inputs, weights)
        else:
            m_sum, moves, *of_tensors = known(*inputs, *weights)
        v = v + moves / TYPICAL_NEIGHBORS**0.5
        m_sum = m_sum[:, : h.shape[1]] / TYPICAL_NEIGHBORS
        parts = [n, m_sum, torch.log1p(v.square().sum(dim=2))]
        if self.invariants is not None:
            (t,) = of_tensors
            parts.append(self.invariants(v, t / TYPICAL_NEIGHBORS**0.5))
        return h + self.node(torch.cat(parts, dim=1)), v

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
