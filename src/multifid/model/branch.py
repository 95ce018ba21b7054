"""A branch: what belongs to one task, an energy head and a force head, on top of the shared encoder.

It works in the task's own scaled units: energies are (E - references) / scale, forces F / scale. Every encoder gives
scalars, which suffice for energies and for forces that are their gradient. Direct forces are a weighted sum of the
encoder's vectors; where it has none, of the unit vectors along the edges of each atom.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import silu

from multifid.graphs.edges import EdgeFunction, over_edges
from multifid.graphs.graph import Graph
from multifid.model.contract import Encoder, Features
from multifid.model.layers import MLP, SILU_GAIN, TYPICAL_NEIGHBORS, Linear, RadialBasis, envelope
from multifid.model.pairs import PairEnergies

FIRST_GUESS = 0.1  # size of the untrained predictions: small, so that training starts near the reference energies
RADIAL = 8  # radial basis functions of a force head over edges


class BranchConfig(BaseModel):
    """What every branch is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    hidden: list[PositiveInt] = Field(
        default=[64, 64, 64], description="Widths of the fully connected layers of each head."
    )
    forces: Literal["direct", "conservative"] = Field(
        default="direct",
        description="Forces from a head of their own, or minus the gradient of the energy (then also stress).",
    )
    readout: Literal["last", "layers"] = Field(
        default="last",
        description="Energies from the features after the last layer, or also, by a linear map each, from those after "
        "every layer before it.",
    )
    pairs: int = Field(
        default=0,
        ge=0,
        description="Radial functions of a pair potential that is added to energies, with coefficients from the "
        "periodic table, fitted before the first step: for few data of many elements, and direct forces. 0: none.",
    )

    @model_validator(mode="after")
    def _pairs_have_no_forces(self) -> "BranchConfig":
        if self.pairs and self.forces == "conservative":
            raise ValueError(
                f"pairs: {self.pairs} is fitted to energies alone, and its gradient spoils conservative forces: set "
                "it to 0, or forces to direct"
            )
        return self


class Branch(nn.Module):
    """Energy head and, with direct forces, force head, for the features of one encoder.

    Raises ValueError where the encoder does not give what the heads read.
    """

    def __init__(self, encoder: Encoder, config: BranchConfig, cutoff: float):
        super().__init__()
        hidden, vectors = encoder.degrees[0], encoder.degrees.get(1)
        if config.readout == "layers" and not encoder.readouts:
            raise ValueError(
                "model.branch.readout: layers reads the features after every layer; "
                f"{type(encoder).__name__} gives those after the last one only, so it must be last"
            )
        self.energy = MLP([hidden, *config.hidden, 1], last_gain=FIRST_GUESS)
        self.readouts = nn.ModuleList(
            Linear(hidden, 1, gain=FIRST_GUESS) for _ in range(encoder.readouts if config.readout == "layers" else 0)
        )
        self.pairs = PairEnergies(config.pairs, cutoff) if config.pairs else None
        self.forces: nn.Module | None = None
        if config.forces == "direct" and vectors is not None:
            self.forces = MLP([hidden, *config.hidden, vectors], last_gain=FIRST_GUESS)
        elif config.forces == "direct":
            self.forces = EdgeForces(hidden, config.hidden, cutoff)

    @property
    def reads_edges(self) -> bool:
        """Whether a pass needs the graph."""
        return self.pairs is not None or isinstance(self.forces, EdgeForces)

    def forward(self, features: Features, graph: Graph | None = None) -> tuple[Tensor, Tensor | None]:
        """What each atom adds to the energy, (N,), and direct forces (N, 3) or None.

        graph: of the same atoms, for heads that read edges.
        """
        energy = self._energy_of_atoms(features)
        if self.pairs is not None:
            assert graph is not None
            energy = energy + self.pairs(graph)[: energy.shape[0]]  # a domain's ghosts lie behind its own atoms
        if self.forces is None:
            return energy, None
        if isinstance(self.forces, EdgeForces):
            assert graph is not None
            return energy, self.forces(*graph.exchanged(features.scalars), graph)
        assert features.vectors is not None
        weights = self.forces(features.scalars)  # (N, C): scalars times vectors turn with the structure
        return energy, (weights[:, :, None] * features.vectors).sum(dim=1)

    @torch.no_grad()
    def rescale(self, ratio: float) -> None:
        """Multiply all that the branch predicts by a number: the same predictions in another scale."""
        last = [p for linear in (self.energy.linears()[-1], *self.readouts) for p in linear.parameters()]
        for parameter in (*last, *self.last_of_forces()):
            parameter.mul_(ratio)
        if self.pairs is not None:
            self.pairs.multiply(ratio)

    def last_of_forces(self) -> list[nn.Parameter]:
        """The parameters that direct forces are linear in; none of conservative ones."""
        if not isinstance(self.forces, MLP | EdgeForces):
            return []
        head = self.forces if isinstance(self.forces, MLP) else self.forces.rest
        return list(head.linears()[-1].parameters())

    def last_features(self, features: Features) -> Tensor:
        """(N, D): what the energies of atoms are linear in, the constant one of their biases in the last column."""
        read = features.layers if len(self.readouts) else ()
        last = self.energy.before_last(features.scalars)
        return torch.cat([last, *read, torch.ones_like(last[:, :1])], dim=1)

    def last_weights(self) -> Tensor:
        """(D,): the energies of atoms are `last_features` times these."""
        maps = [self.energy.linears()[-1], *self.readouts]
        return torch.cat([*(m.weight[0] for m in maps), sum(m.bias for m in maps)])  # type: ignore[arg-type, misc]

    def force_factors(self, features: Features, graph: Graph | None = None) -> tuple[Tensor, Tensor]:
        """psi and v of direct forces F_ix = sum_ch W_ch psi_ih v_icx, the last maps W of the head.

        (N, D) with a column of ones, and (N, C, 3); of a head over edges there is no such product: psi is one, and v
        (N, D, 3) holds the sums over edges that the forces are linear in.
        """
        assert self.forces is not None, "the forces of this branch are the gradient of its energy"
        if isinstance(self.forces, EdgeForces):
            assert graph is not None
            (scalars,) = graph.exchanged(features.scalars)
            v = self.forces.last_features(scalars, graph)
            return torch.ones_like(features.scalars[:, :1]), v
        assert features.vectors is not None
        psi = self.forces.before_last(features.scalars)  # type: ignore[operator]
        return torch.cat([psi, torch.ones_like(psi[:, :1])], dim=1), features.vectors

    def _energy_of_atoms(self, features: Features) -> Tensor:
        """(N,). The last maps are no products of matrices, which autocast would round to bfloat16."""
        last = self.energy.linears()[-1]
        energy = (self.energy.before_last(features.scalars) * last.weight[0]).sum(dim=1) + last.bias
        for readout, scalars in zip(self.readouts, features.layers if len(self.readouts) else (), strict=True):
            assert isinstance(readout, Linear)
            energy = energy + (scalars * readout.weight[0]).sum(dim=1) + readout.bias
        return energy


class EdgeForces(nn.Module):
    """Direct forces without vectors: a sum over the edges of each atom of unit vectors times learned weights.

        F_i = 1/sqrt(M) sum_j u_ij phi(s_i, s_j, b(|r_ij|)) r_ij / |r_ij|

    u is the cutoff envelope, b the radial basis; phi has one hidden layer per width, the first of which is linear in
    the features of both atoms. The forces rotate with the structure; their sum need not vanish.
    """

    def __init__(self, width: int, hidden: list[int], cutoff: float):
        super().__init__()
        self.cutoff = cutoff
        self.radial = RadialBasis(RADIAL, cutoff)
        self.receiver = Linear(width, hidden[0], gain=SILU_GAIN)
        self.sender = Linear(width, hidden[0], bias=False, gain=SILU_GAIN)
        self.pair = Linear(RADIAL, hidden[0], bias=False, gain=SILU_GAIN)
        self.rest = MLP([*hidden, 1], last_gain=FIRST_GUESS)

    def forward(self, scalars: Tensor, graph: Graph) -> Tensor:
        """scalars (N, H) -> forces (N, 3)."""
        return self._over_edges(_edge_forces, scalars, graph)

    def last_features(self, scalars: Tensor, graph: Graph) -> Tensor:
        """(N, D, 3): the forces are linear in these, by the weights and the bias of the last map."""
        return self._over_edges(_edge_features, scalars, graph).view(scalars.shape[0], -1, 3)

    def _over_edges(self, function: EdgeFunction, scalars: Tensor, graph: Graph) -> Tensor:
        basis, u = self.radial(graph.distances), envelope(graph.distances, self.cutoff)
        sums = over_edges(
            function,
            graph.receivers,
            graph.senders,
            graph.atoms,
            u,
            width=self.receiver.out_features,
            receivers=[self.receiver(scalars).to(u.dtype)],
            senders=[self.sender(scalars).to(u.dtype)],
            edges=[basis, graph.vectors / graph.distances[:, None]],
            weights=[self.pair.weight, *(p for linear in self.rest.linears() for p in (linear.weight, linear.bias))],
        )[0]
        return sums / TYPICAL_NEIGHBORS**0.5


def _edge_forces(
    a: Tensor, c: Tensor, u: Tensor, basis: Tensor, direction: Tensor, pair: Tensor, *maps: Tensor
) -> tuple[Tensor]:
    """(T, 3); a, c (T, K): of receivers and senders; maps: weight and bias of each further linear map."""
    x = _edge_hidden(a, c, basis, pair, *maps[:-2])
    return ((u * nn.functional.linear(silu(x), maps[-2], maps[-1])) * direction,)


def _edge_features(
    a: Tensor, c: Tensor, u: Tensor, basis: Tensor, direction: Tensor, pair: Tensor, *maps: Tensor
) -> tuple[Tensor]:
    """(T, 3 (K + 1)): what the last map is applied to, and one for its bias, times envelope and direction."""
    x = silu(_edge_hidden(a, c, basis, pair, *maps[:-2]))
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) * u
    return ((x[:, :, None] * direction[:, None, :]).flatten(1),)


def _edge_hidden(a: Tensor, c: Tensor, basis: Tensor, pair: Tensor, *maps: Tensor) -> Tensor:
    """(T, K): the input of the last SiLU."""
    x = a + c + nn.functional.linear(basis, pair)
    for weight, bias in zip(maps[::2], maps[1::2], strict=True):
        x = nn.functional.linear(silu(x), weight, bias)
    return x
