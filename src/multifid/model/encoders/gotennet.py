"""GotenNet, attention over edges with tensors of several degrees and no tensor products (Aykent, Xia, ICLR 2025).

Scalars h_i (H) and tensors X_i^l (H, 2 l + 1) on atoms, l = 1 to L, scalars t_ij (C) on edges, which begin as
(W h_i + W h_j) * W b(|r_ij|). With y_ij^l the harmonics of the unit vector from i to j, u the cutoff envelope, b the
radial basis, M a constant and phi SiLU, one layer is:

    t_ij  += phi(W t_ij) * W [<Q_i^l, K_j^l>, <Q_i^l, y_ij^l>, <K_j^l, y_ij^l>]     refinement, sec. 3.4
    a_ij   = q_i . (k_j * phi(W t_ij)) / sqrt(H / heads) per head, kept within -5 and 5
    alpha  = u_ij exp(a_ij) / (1 + sum_k u_ik exp(a_ik))                            geometry-aware attention, sec. 3.3
    [o^s, o^d, o^t]_ij = gamma(h_j) * (alpha_ij + u_ij W t_ij / sqrt(M))            o^d, o^t for every degree
    h_i   += sum_j o^s_ij,     X_i^l += sum_j (o^d_ij y_ij^l + o^t_ij X_j^l)
    [a, b, c] = MLP(h_i, log(1 + |V X_i^l|^2))                                      equivariant feed-forward, sec. 3.5
    h_i   += a + b * sum_l <U X_i^l, V X_i^l> / sqrt(1 + |V X_i|^2),     X_i^l += c^l * U X_i^l

Edges see the angles to all neighbours of both atoms without triplets, from sums that are taken once per atom.

What differs from the paper: its softmax jumps when a neighbour crosses the cutoff, here every term carries the envelope
and the atom itself takes part with weight one, so nothing is divided by zero; a_ij is bounded, so that no largest term
needs to be found; the values gamma(h_j) serve attention and filter alike; edges may be narrower than atoms; inner
products with the edge's own harmonics (the paper's rejections) and of U X and V X (PaiNN's) are added; Q and K are
divided by sqrt(1 + |Q|^2), and X_j, U X, V X by the root of 1 + the mean square of the channels, so that tensors do not
grow from layer to layer. Edges are refined at the beginning of every layer but the first.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from multifid.graphs.edges import over_edges
from multifid.graphs.graph import Graph
from multifid.model.contract import Encoder, EncoderConfig, Features
from multifid.model.encoders.tensors import by_degree, harmonics_to
from multifid.model.layers import (
    MLP,
    SILU_GAIN,
    TYPICAL_NEIGHBORS,
    LayerNorm,
    Linear,
    NodeEmbedding,
    RadialBasis,
    call,
    envelope,
)

ROOT = TYPICAL_NEIGHBORS**0.5
BOUND = 5.0  # of exponents in the attention


class GotenNet(Encoder):
    """Scalars of width `hidden` and as many tensors of each degree up to `degrees` after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["gotennet"] = "gotennet"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalars, and tensors of each degree per atom.")
        edges: int = Field(default=32, ge=1, description="Width of the features of edges.")
        degrees: int = Field(default=2, ge=1, le=3, description="Highest degree of the tensors.")
        heads: int = Field(default=4, ge=1, description="Heads of the attention; must divide `hidden`.")
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")

        @model_validator(mode="after")
        def _divides(self) -> "GotenNet.Config":
            if self.hidden % self.heads:
                raise ValueError(f"heads must divide hidden, got {self.heads} heads and a width of {self.hidden}")
            return self

    def __init__(self, config: Config, cutoff: float):
        super().__init__()
        hidden, self.highest = config.hidden, config.degrees
        self.degrees = dict.fromkeys(range(self.highest + 1), hidden)
        self.readouts = config.layers - 1
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden)
        self.radial = RadialBasis(config.radial, cutoff)
        self.receiver = Linear(hidden, config.edges)
        self.sender = Linear(hidden, config.edges, bias=False)
        self.filter = Linear(config.radial, config.edges, gain=0.3)  # the basis has values near 3 at bond lengths
        self.layers = nn.ModuleList(GotenLayer(config, first=k == 0) for k in range(config.layers))
        self.norm = LayerNorm(hidden)

    def forward(self, graph: Graph) -> Features:
        h = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        i, j, d = graph.receivers, graph.senders, graph.distances
        u = envelope(d, self.cutoff)
        y = harmonics_to(self.highest, graph.vectors / d[:, None])
        (t,) = over_edges(
            first_features,
            i,
            j,
            h.shape[0],
            u,
            width=h.shape[1],
            receivers=[self.receiver(h).to(u.dtype)],
            senders=[self.sender(h).to(u.dtype)],
            edges=[self.radial(d)],
            weights=[self.filter.weight, self.filter.bias],
            summed=(False,),
        )
        x = h.new_zeros((h.shape[0], y.shape[1], h.shape[1]))
        of_layers = []
        for number, layer in enumerate(self.layers):
            if number:
                h, x = graph.exchanged(h, x)
            h, x, t = call(layer, self.recompute, h, x, t, i, j, y, u)  # type: ignore[misc]
            of_layers.append(h)
        vectors, *higher = (part.transpose(1, 2).contiguous() for part in by_degree(x, 1))
        return Features(self.norm(h), vectors, dict(enumerate(higher, 2)), layers=tuple(of_layers[:-1]))


def first_features(of_i: Tensor, of_j: Tensor, u: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """Those of edges, (T, C), before the first layer."""
    return (((of_i + of_j) * linear(b, weight, bias)).to(u.dtype),)


def attention(q: Tensor, k: Tensor, u: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """u exp(a), (T, heads), twice: for every edge, and to be summed. q, k (T, heads, H / heads), t (T, C)."""
    a = (q * k * silu(linear(t, weight, bias)).view_as(q)).sum(dim=2) / q.shape[2] ** 0.5
    w = u * (BOUND * torch.tanh(a.to(u.dtype) / BOUND)).exp()
    return w, w


def message(share: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor]:
    """What j tells i: scalars, and tensors of all degrees, (T, 1 + K, H).

    share (T, heads): 1 / the denominator at i; v (T, S, H): gamma(h_j), S = 1 + 2 L; then x (T, K, H) of j, except
    where it is zero (S = 1 + L); u (T, 1); of the edge w (T, heads), t (T, C), y (T, K); weight and bias of its filter.
    """
    *x, u, w, t, y, weight, bias = rest
    alpha = (w * share).repeat_interleave(v.shape[2] // w.shape[1], dim=1)  # (T, H)
    o = v * (alpha[:, None] + u[:, :, None] * linear(t, weight, bias).view_as(v) / ROOT)
    s, *weights = o.unbind(1)
    ys = by_degree(y, 1)
    told = [weight[:, None] * part[:, :, None] for weight, part in zip(weights, ys, strict=False)]
    if x:
        moved = zip(told, weights[len(ys) :], by_degree(x[0], 1), strict=True)
        told = [of_y + weight[:, None] * part for of_y, weight, part in moved]
    return (torch.cat([s[:, None], *told], dim=1).to(u.dtype),)


def refined(q: Tensor, k: Tensor, u: Tensor, t: Tensor, y: Tensor, *maps: Tensor) -> tuple[Tensor]:
    """The next features of edges, (T, C); q of i and k of j (T, K, C)."""
    gate, gate_bias, weight, bias = maps
    y = y[:, :, None]
    products = [part.sum(dim=1) for z in (q * k, q * y, k * y) for part in by_degree(z, 1)]  # (T, C) each
    return ((t + silu(linear(t, gate, gate_bias)) * linear(torch.cat(products, dim=1), weight, bias)).to(u.dtype),)


class GotenLayer(nn.Module):
    """One layer; the equations stand at the head of this file. The `first` one sees tensors that are zero."""

    def __init__(self, config: GotenNet.Config, first: bool):
        super().__init__()
        hidden, edges, degrees = config.hidden, config.edges, config.degrees
        self.heads, self.first = config.heads, first
        parts = 1 + (1 if first else 2) * degrees
        self.norm, self.node_norm = LayerNorm(hidden), LayerNorm(hidden)
        self.query, self.key = Linear(hidden, hidden), Linear(hidden, hidden)
        self.of_edge = Linear(edges, hidden)
        self.values = MLP([hidden, hidden, parts * hidden])
        self.filter = Linear(edges, parts * hidden, gain=0.5)
        self.mix = Linear(hidden, 2 * hidden, bias=False)  # U and V: over channels, so that tensors stay tensors
        self.update = MLP([(1 + degrees) * hidden, hidden, (2 + degrees) * hidden])
        if not first:
            self.pair = Linear(hidden, 2 * edges, bias=False)  # Q and K
            self.gate = Linear(edges, edges)
            self.refine = Linear(3 * degrees * edges, edges, gain=SILU_GAIN)

    def forward(
        self, h: Tensor, x: Tensor, t: Tensor, i: Tensor, j: Tensor, y: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h (N, H), x (N, K, H), t (E, C), receivers i and senders j (E,), harmonics y (E, K), envelope u (E, 1)."""
        n, (atoms, hidden) = self.norm(h), h.shape
        if not self.first:
            t = self.of_edges(x, t, i, j, y, u)
        w, total = over_edges(
            attention,
            i,
            j,
            atoms,
            u,
            width=hidden,
            receivers=[self.query(n).to(u.dtype).view(atoms, self.heads, hidden // self.heads)],
            senders=[self.key(n).to(u.dtype).view(atoms, self.heads, hidden // self.heads)],
            edges=[t],
            weights=[self.of_edge.weight, self.of_edge.bias],
            summed=(False, True),
        )
        values = self.values(n).to(u.dtype).view(atoms, self.filter.out_features // hidden, hidden)
        (told,) = over_edges(
            message,
            i,
            j,
            atoms,
            u,
            width=(1 + y.shape[1]) * hidden,
            receivers=[1.0 / (1.0 + total)],
            senders=[values] if self.first else [values, _normed(x)],
            edges=[w, t, y],
            weights=[self.filter.weight, self.filter.bias],
        )
        return *self.of_atoms(h + told[:, 0], x + told[:, 1:]), t

    def of_atoms(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The equivariant feed-forward: h (N, H), x (N, K, H)."""
        ux, vx = self.mix(_normed(x)).to(x.dtype).chunk(2, dim=2)
        squares = [part.square().sum(dim=1) for part in by_degree(vx, 1)]
        products = [part.sum(dim=1) for part in by_degree(ux * vx, 1)]
        known = torch.cat([self.node_norm(h), *(torch.log1p(s) for s in squares)], dim=1)
        a, b, *c = self.update(known).chunk(2 + len(squares), dim=1)
        h = h + a + b * sum(p * torch.rsqrt(s + 1.0) for p, s in zip(products, squares, strict=True))
        moved = [weight[:, None] * part for weight, part in zip(c, by_degree(ux, 1), strict=True)]
        return h, x + torch.cat(moved, dim=1)

    def of_edges(self, x: Tensor, t: Tensor, i: Tensor, j: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """The refinement of the features of edges: (E, C)."""
        q, k = (_bounded(z) for z in self.pair(x).to(x.dtype).chunk(2, dim=2))
        (t,) = over_edges(
            refined,
            i,
            j,
            x.shape[0],
            u,
            width=3 * y.shape[1] * t.shape[1],
            receivers=[q],
            senders=[k],
            edges=[t, y],
            weights=[self.gate.weight, self.gate.bias, self.refine.weight, self.refine.bias],
            summed=(False,),
        )
        return t


def _bounded(x: Tensor) -> Tensor:
    """x / sqrt(1 + |x|^2) for every channel and degree: (N, K, C)."""
    return torch.cat([p * torch.rsqrt(p.square().sum(dim=1, keepdim=True) + 1.0) for p in by_degree(x, 1)], dim=1)


def _normed(x: Tensor) -> Tensor:
    """x / sqrt(1 + the mean of |x|^2 over channels) for every degree: (N, K, H)."""
    squares = [p.square().sum(dim=1, keepdim=True).mean(dim=2, keepdim=True) for p in by_degree(x, 1)]
    return torch.cat([p * torch.rsqrt(s + 1.0) for p, s in zip(by_degree(x, 1), squares, strict=True)], dim=1)
