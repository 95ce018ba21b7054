"""MACE, messages of many bodies from products of sums over neighbours (Batatia et al. 2022, arXiv 2206.07697).

Atoms carry C channels of components of degree l = 0 to L, h_i^l. With Y_l the harmonics of the direction from i to j up
to degree l_max, R a network of the radial basis, u the cutoff envelope and G the coupling of `coupling.py`:

    phi_ij  = u_ij R_p(|r_ij|) G_p (Y_l1(r_ij), W h_j^l2)     for every path p = (l1, l2 -> l3)           paper eq. 8
    A_i^l3  = W [1/M sum_j phi_ij of the paths that end in l3]                                            eq. 9
    B_i^l   = sum_nu sum_k w_{z_i, nu, k} P_{nu, k}^l (A_i),     nu = 1 to `correlation`                  eq. 10
    h_i^l  += W B_i^l,      h_i^0 += W log(1 + |h_i^l|^2)                                                 eq. 11

P are all independent products of nu factors that are of degree l, their weights w those of the element z_i and of each
channel. So one layer sees nu + 1 bodies, for work that is done once per atom: few layers are needed.

Instead of Clebsch-Gordan coefficients of e3nn there are Gaunt coefficients, the same up to signs, since all components
are of natural parity; products are taken as monomials of A times one matrix. What differs from the paper: the skip
connection has no weights by element, the first layer is like the others, lengths enter the scalars (so that nothing of
the last layer is without use), and R has biases, which u brings to zero at the cutoff.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from multifid.graphs.edges import over_edges
from multifid.graphs.graph import Graph
from multifid.model.contract import Encoder, EncoderConfig, Features
from multifid.model.encoders.coupling import couple, gaunt, products, span
from multifid.model.encoders.tensors import by_degree, harmonics_to
from multifid.model.layers import (
    MLP,
    TYPICAL_NEIGHBORS,
    Constant,
    Embedding,
    LayerNorm,
    Linear,
    NodeEmbedding,
    RadialBasis,
    call,
    envelope,
    product,
)
from multifid.structures.elements import MAX_Z


class MACE(Encoder):
    """Scalars of width `hidden`, and as many tensors of each degree up to `degrees`, after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["mace"] = "mace"
        layers: int = Field(default=2, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Channels: width of the scalars, and tensors of each degree.")
        degrees: int = Field(default=1, ge=1, le=2, description="Highest degree of what atoms tell their neighbours.")
        harmonics: int = Field(default=2, ge=1, le=3, description="Highest degree of the harmonics of edges.")
        correlation: int = Field(
            default=3, ge=1, le=3, description="Neighbours that a message depends on at once: its bodies less one."
        )
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")
        filter: int = Field(default=32, ge=1, description="Width of the network of the radial basis.")

    def __init__(self, config: Config, cutoff: float):
        super().__init__()
        hidden, self.harmonics = config.hidden, config.harmonics
        self.components = (config.degrees + 1) ** 2
        self.degrees = dict.fromkeys(range(config.degrees + 1), hidden)
        self.readouts = config.layers - 1
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden)
        self.radial = RadialBasis(config.radial, cutoff)
        self.layers = nn.ModuleList(MACELayer(config, first=k == 0) for k in range(config.layers))
        self.norm = LayerNorm(hidden)

    def forward(self, graph: Graph) -> Features:
        h = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        i, j, d = graph.receivers, graph.senders, graph.distances
        b, u = self.radial(d), envelope(d, self.cutoff)
        unit = harmonics_to(self.harmonics, graph.vectors / d[:, None])
        scaled = [(2 * degree + 1) ** 0.5 * y for degree, y in enumerate(by_degree(unit, 1), 1)]
        y = torch.cat([torch.ones_like(unit[:, :1]), *scaled], dim=1)
        x = h.new_zeros((h.shape[0], self.components - 1, h.shape[1]))
        of_layers = []
        for number, layer in enumerate(self.layers):
            if number:
                h, x = graph.exchanged(h, x)
            h, x = call(layer, self.recompute, h, x, graph.numbers, i, j, y, b, u)
            of_layers.append(h)
        vectors, *higher = (part.transpose(1, 2).contiguous() for part in by_degree(x, 1))
        return Features(self.norm(h), vectors, dict(enumerate(higher, 2)), layers=tuple(of_layers[:-1]))


class MACELayer(nn.Module):
    """One layer; the equations stand at the head of this file. The `first` one sees scalars only."""

    def __init__(self, config: MACE.Config, first: bool):
        super().__init__()
        hidden, of_edges = config.hidden, range(config.harmonics + 1)
        of_senders, of_atoms = range(1 if first else config.degrees + 1), range(config.degrees + 1)
        # Sorted by the degree in which they end, so that those of one degree stand side by side.
        self.paths = [(a, b, c) for c in of_edges for a in of_edges for b in of_senders if couple(a, b, c)]
        self.couplings = nn.ModuleList(Constant(gaunt(*path) * (2 * path[2] + 1) ** 0.5) for path in self.paths)
        self.norm = LayerNorm(hidden)
        self.up = nn.ModuleList(Linear(hidden, hidden, bias=False) for _ in of_senders)
        self.filter = MLP([config.radial, config.filter, config.filter, len(self.paths) * hidden])
        ends = [sum(c == degree for _, _, c in self.paths) for degree in of_edges]
        self.joined = nn.ModuleList(Linear(n * hidden, hidden, bias=False) for n in ends)
        self.product = Products(config)
        self.down = nn.ModuleList(Linear(hidden, hidden, bias=False) for _ in of_atoms)
        self.lengths = Linear(config.degrees * hidden, hidden)

    def forward(
        self, h: Tensor, x: Tensor, numbers: Tensor, i: Tensor, j: Tensor, y: Tensor, b: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h (N, C), x (N, K, C), numbers (N,), receivers i, senders j (E,), harmonics y (E, L), b (E, R), u (E, 1)."""
        atoms, hidden = h.shape
        told = [self.norm(h)[:, None], *_normed(x)][: len(self.up)]
        told = [up(part).to(u.dtype) for up, part in zip(self.up, told, strict=True)]
        width = sum(2 * c + 1 for _, _, c in self.paths) * hidden
        (a,) = over_edges(
            self.message,
            i,
            j,
            atoms,
            u,
            width=width,
            senders=[torch.cat(told, dim=1)],
            edges=[y, b],
            weights=[w for m in self.filter.linears() for w in (m.weight, m.bias)],
        )
        a = self.of_atoms(a / TYPICAL_NEIGHBORS)
        of_degree = [down(part).to(u.dtype) for down, part in zip(self.down, self.product(a, numbers), strict=True)]
        x = x + torch.cat(of_degree[1:], dim=1)
        lengths = [torch.log1p(part.square().sum(dim=1)) for part in by_degree(x, 1)]
        return h + of_degree[0].squeeze(1) + self.lengths(torch.cat(lengths, dim=1)), x

    def message(self, h: Tensor, u: Tensor, y: Tensor, b: Tensor, *maps: Tensor) -> tuple[Tensor]:
        """phi of all paths, (T, components of all paths, C); h (T, K, C) of j, y (T, L), b (T, R)."""
        r = linear(silu(linear(silu(linear(b, *maps[:2])), *maps[2:4])), *maps[4:])
        r = (u * r).to(u.dtype).view(b.shape[0], len(self.paths), h.shape[2])
        parts = []
        for number, ((of_edge, of_sender, _), coupling) in enumerate(zip(self.paths, self.couplings, strict=True)):
            assert isinstance(coupling, Constant)
            matrix = (y[:, span(of_edge), None, None] * coupling.value).sum(dim=1)  # (T, of j, of the result)
            sent = h[:, span(of_sender)]
            coupled = (matrix[:, :, :, None] * sent[:, :, None, :]).sum(dim=1)
            parts.append(coupled * r[:, number, None])
        return (torch.cat(parts, dim=1),)

    def of_atoms(self, a: Tensor) -> Tensor:
        """A: from sums over paths to one of every degree, (N, C, L)."""
        start, parts = 0, []
        for degree, joined in enumerate(self.joined):
            assert isinstance(joined, Linear)
            size, n = 2 * degree + 1, joined.in_features // a.shape[2]
            paths = a[:, start : start + n * size].view(a.shape[0], n, size, a.shape[2])
            parts.append(joined(paths.transpose(1, 2).flatten(2)).to(a.dtype))
            start += n * size
        return torch.cat(parts, dim=1).transpose(1, 2)


class Products(nn.Module):
    """B: products of up to `correlation` factors, weighted by element and channel."""

    def __init__(self, config: MACE.Config):
        super().__init__()
        self.highest, self.correlation = config.degrees, config.correlation
        self.monomials, self.matrices = nn.ModuleList(), nn.ModuleList()
        self.counts = []  # of products, by factors and degree of the result
        for factors in range(2, config.correlation + 1):
            found = [products(factors, config.harmonics, degree) for degree in range(config.degrees + 1)]
            self.monomials.append(Constant(found[0][0].T))
            matrix = np.concatenate([c.reshape(len(c), -1) for _, c in found], axis=1)
            self.matrices.append(Constant(matrix))
            self.counts.append([c.shape[1] for _, c in found])
        self.total = [1 + sum(counts[degree] for counts in self.counts) for degree in range(config.degrees + 1)]
        self.weights = nn.ModuleList(Embedding(MAX_Z + 1, n * config.hidden) for n in self.total)

    def forward(self, a: Tensor, numbers: Tensor) -> list[Tensor]:
        """a (N, C, L), numbers (N,) -> (N, 2 l + 1, C) for every degree l."""
        atoms, channels = a.shape[0], a.shape[1]
        of_degree = [[a[:, :, None, span(degree)]] for degree in range(self.highest + 1)]
        for monomials, matrix, counts in zip(self.monomials, self.matrices, self.counts, strict=True):
            assert isinstance(monomials, Constant) and isinstance(matrix, Constant)
            monomial = a
            for number, which in enumerate(monomials.value.unbind(0)):
                column = a.index_select(2, which)
                monomial = column if number == 0 else monomial * column
            values, start = product(monomial, matrix.value), 0
            for degree, n in enumerate(counts):
                size = n * (2 * degree + 1)
                of_degree[degree].append(values[:, :, start : start + size].unflatten(2, (n, 2 * degree + 1)))
                start += size
        found = []
        for parts, table, n in zip(of_degree, self.weights, self.total, strict=True):
            w = table(numbers).view(atoms, n, channels).transpose(1, 2) / n**0.5
            found.append((torch.cat(parts, dim=2) * w[:, :, :, None]).sum(dim=2).transpose(1, 2))
        return found


def _normed(x: Tensor) -> list[Tensor]:
    """x / sqrt(1 + the mean of |x|^2 over channels), for every degree."""
    parts = by_degree(x, 1)
    return [p * torch.rsqrt(1.0 + p.square().sum(dim=1, keepdim=True).mean(dim=2, keepdim=True)) for p in parts]
