"""DimeNet++, directional message passing (Gasteiger, Groß, Günnemann 2020, arXiv 2003.03123; ++: arXiv 2011.14115).

Messages x_e (H) live on edges e = (j -> i) and see those f = (k -> j) that end where they begin, with the angle of the
two. With b(d) the Bessel basis times the cutoff envelope u(d), a the spherical basis (`spherical.py`), phi SiLU:

    x_e   = phi(W [h_i, h_j, phi(W b(d_e))])                           embedding block
    p_f   = phi(W_down (phi(W_kj x_f) * W_2 W_1 b(d_f)))               interaction block, ++ fig. 1
    t_e   = 1/sqrt(M) sum_f p_f * W_4 W_3 a(d_f, angle_fe)             ++ eq. 2: a product in place of a bilinear map
    x_e  <- residual layers(x_e, phi(W_ji x_e) + phi(W_up t_e))
    h_i  += W phi(...phi(W_up 1/sqrt(M) sum_e (W b(d_e)) * x_e))       output block, one after every block

The published network sums over neighbours without dividing; here a constant divides, which W_4 and W_up can undo. As
published, atoms are their output blocks alone; here these are added to the embedding of the element, so that an atom
without neighbours is one of its kind.

Continuous as it stands: a vanishes with u(d_f), b with u(d_e). What the usual implementations get wrong: the angle is
from atan2, whose derivative is undefined for atoms in a line (Legendre polynomials of the cosine have one everywhere);
spherical Bessel functions are from closed forms, which lose all digits at short distances; triplets go by numbers of
atoms, so that a neighbour seen through two images of the cell loses angles. Triplets here are pairs of edges.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from multifid.graphs.edges import over_edges
from multifid.graphs.graph import Graph, GraphNeeds
from multifid.model.contract import Encoder, EncoderConfig, Features
from multifid.model.encoders.spherical import SphericalBasis, legendre
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


class DimeNet(Encoder):
    """Scalars of width `hidden` after `layers` interaction blocks. No vectors."""

    needs = GraphNeeds(triplets=True)
    slopes_need_float32 = True  # steep in the angles: of a crystal, bf16 rounds forces by 12 % and TF32 stress by 5 %

    class Config(EncoderConfig):
        name: Literal["dimenet"] = "dimenet"
        layers: int = Field(default=4, ge=1, description="Interaction blocks.")
        hidden: int = Field(default=64, ge=1, description="Width of the messages on edges and of the scalar features.")
        angular: int = Field(default=32, ge=1, description="Width of what edges that meet tell each other.")
        basis: int = Field(default=8, ge=1, description="Width between the two maps of each basis.")
        output: int = Field(default=128, ge=1, description="Width of the output blocks.")
        radial: int = Field(default=6, ge=1, description="Radial basis functions of the distance.")
        spherical: int = Field(default=7, ge=1, le=12, description="Degrees of the spherical basis, from 0 on.")

    def __init__(self, config: Config, cutoff: float):
        super().__init__()
        hidden, radial = config.hidden, config.radial
        self.degrees = {0: hidden}
        self.readouts = config.layers - 1
        self.cutoff, self.spherical = cutoff, config.spherical
        self.embedding = NodeEmbedding(hidden)
        self.radial = RadialBasis(radial, cutoff)
        self.of_triplets = SphericalBasis(config.spherical, radial, cutoff)
        self.receiver = Linear(hidden, hidden, gain=0.6 * SILU_GAIN)
        self.sender = Linear(hidden, hidden, bias=False, gain=0.6 * SILU_GAIN)
        self.of_distance = Linear(radial, hidden, gain=0.3)
        self.pair = Linear(hidden, hidden, bias=False, gain=0.6 * SILU_GAIN)
        self.first = OutputBlock(config)
        self.layers = nn.ModuleList(InteractionBlock(config) for _ in range(config.layers))
        self.norm = LayerNorm(hidden)

    def forward(self, graph: Graph) -> Features:
        assert graph.triplets is not None
        h = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        i, j, d = graph.receivers, graph.senders, graph.distances
        f, e = graph.triplets
        u = envelope(d, self.cutoff)
        b = self.radial(d) * u
        a = self.of_triplets(d) * u[:, :, None]
        unit = graph.vectors / d[:, None]
        p = legendre((unit.index_select(0, f) * unit.index_select(0, e)).sum(dim=1), self.spherical)  # (T, L)
        x, atoms = over_edges(
            first_message,
            i,
            j,
            h.shape[0],
            u,
            width=h.shape[1],
            receivers=[self.receiver(h).to(u.dtype)],
            senders=[self.sender(h).to(u.dtype)],
            edges=[b],
            weights=[self.of_distance.weight, self.of_distance.bias, self.pair.weight, self.first.filter.weight],
            summed=(False, True),
        )
        h = h + self.first(atoms)
        of_layers = []
        for number, layer in enumerate(self.layers):
            if number:
                (h,) = graph.exchanged(h)
            h, x = call(layer, self.recompute, h, x, i, j, f, e, u, b, a, p)
            of_layers.append(h)
        return Features(self.norm(h), layers=tuple(of_layers[:-1]))


def first_message(
    of_receiver: Tensor, of_sender: Tensor, u: Tensor, b: Tensor, distance: Tensor, bias: Tensor, *maps: Tensor
) -> tuple[Tensor, Tensor]:
    """The message of each edge and what it adds to its receiver, (T, H) each; maps: of the distance, and the filter."""
    pair, filter_ = maps
    x = silu(of_receiver + of_sender + linear(silu(linear(b, distance, bias)), pair)).to(u.dtype)
    return x, linear(b, filter_) * x


def lowered(u: Tensor, x: Tensor, b: Tensor, kj: Tensor, bias: Tensor, filter_: Tensor, down: Tensor) -> tuple[Tensor]:
    """p_f, what an edge tells those that begin where it ends: (T, K) from x (T, H) and b (T, R)."""
    return (silu(linear(silu(linear(x, kj, bias)) * linear(b, filter_), down)).to(u.dtype),)


def by_angle(p: Tensor, a: Tensor, u: Tensor, angle: Tensor, up: Tensor) -> tuple[Tensor]:
    """What edge f adds to edge e; p (T, K) and a (T, B, L) of f, the Legendre polynomials (T, L) of both."""
    return (p * linear((a * angle[:, None, :]).sum(dim=2), up),)


def raised(
    u: Tensor, x: Tensor, t: Tensor, b: Tensor, ji: Tensor, bias: Tensor, up: Tensor, filter_: Tensor, *maps: Tensor
) -> tuple[Tensor, Tensor]:
    """The next message of each edge and what it adds to its receiver; maps: weight and bias of 7 linear maps."""
    before, skip, after = maps[:4], maps[4:6], maps[6:]
    y = residual(silu(linear(x, ji, bias)) + silu(linear(t, up)), *before)
    y = silu(linear(y, *skip)) + x
    y = residual(residual(y, *after[:4]), *after[4:]).to(u.dtype)
    return y, linear(b, filter_) * y


def residual(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """x + phi(W phi(W x))."""
    return x + silu(linear(silu(linear(x, w1, b1)), w2, b2))


class OutputBlock(nn.Module):
    """From sums over the edges of each atom to what they add to its features."""

    def __init__(self, config: DimeNet.Config):
        super().__init__()
        self.filter = Linear(config.radial, config.hidden, bias=False, gain=0.3)
        self.up = Linear(config.hidden, config.output, bias=False)
        self.maps = MLP([config.output] * 4 + [config.hidden])

    def forward(self, atoms: Tensor) -> Tensor:
        """(N, H) -> (N, H)."""
        return self.maps(self.up(atoms / TYPICAL_NEIGHBORS**0.5))


class InteractionBlock(nn.Module):
    """One interaction block with its output block; the equations stand at the head of this file."""

    def __init__(self, config: DimeNet.Config):
        super().__init__()
        hidden, angular, basis = config.hidden, config.angular, config.basis
        self.kj, self.ji = (Linear(hidden, hidden) for _ in range(2))
        self.of_distance = Linear(config.radial, basis, bias=False, gain=0.3)
        self.filter = Linear(basis, hidden, bias=False)
        self.down = Linear(hidden, angular, bias=False, gain=SILU_GAIN)
        self.of_basis = Linear(config.spherical * config.radial, basis, bias=False, gain=0.3)
        self.of_angle = Linear(basis, angular, bias=False)
        self.up = Linear(angular, hidden, bias=False)
        self.maps = MLP([hidden] * 8)  # those of the residual layers, which are not called in a row
        self.output = OutputBlock(config)

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        i: Tensor,
        j: Tensor,
        f: Tensor,
        e: Tensor,
        u: Tensor,
        b: Tensor,
        a: Tensor,
        p: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """h (N, H), messages x (E, H), triplets f -> e (T,), envelope u (E, 1), b (E, R), a (E, L, R), p (T, L)."""
        edges, width = x.shape
        filter_ = self.filter.weight @ self.of_distance.weight  # two maps in a row, as published, are one
        (told,) = over_edges(
            lowered,
            i,
            j,
            h.shape[0],
            u,
            width=width,
            edges=[x, b],
            weights=[self.kj.weight, self.kj.bias, filter_, self.down.weight],
            summed=(False,),
        )
        # The map of the spherical basis is linear in its radial part, which is of edge f alone.
        maps = self.of_basis.weight.view(1, -1, *a.shape[1:])  # (1, B, L, R)
        (t,) = over_edges(
            by_angle,
            e,
            f,
            edges,
            u.index_select(0, f),
            width=max(told.shape[1], maps.shape[1] * a.shape[1]),
            senders=[told, (a[:, None] * maps).sum(dim=3)],
            edges=[p],
            weights=[self.of_angle.weight],
        )
        x, atoms = over_edges(
            raised,
            i,
            j,
            h.shape[0],
            u,
            width=width,
            edges=[x, t / TYPICAL_NEIGHBORS**0.5, b],
            weights=[
                self.ji.weight,
                self.ji.bias,
                self.up.weight,
                self.output.filter.weight,
                *(w for m in self.maps.linears() for w in (m.weight, m.bias)),
            ],
            summed=(False, True),
        )
        return h + self.output(atoms), x
