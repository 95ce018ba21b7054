"""A branch that predicts a property in place of energy and forces, for the features of any encoder.

    extensive    sum over atoms of phi(s_i): two far copies have twice the value
    intensive    rho(p), p the mean of phi(s_i) over atoms with learned weights: two far copies have the same value
    class        the same, a number (logit) for each class
    atom         phi(s_i)
    atom_vector  what direct forces are: vectors of the encoder, weighted by scalars; they turn with the structure
    vector       the sum of these over atoms

It works in units of the property's scale, without what is subtracted of it (`structures.properties`).
"""

from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import silu

from multifid.graphs.graph import Graph
from multifid.model.branch import FIRST_GUESS, BranchConfig, EdgeForces
from multifid.model.contract import Encoder, Features
from multifid.model.layers import MLP, SILU_GAIN, Linear, sum_over
from multifid.structures.properties import KINDS, MOST_CLASSES, OF_ATOMS, VECTORS

Kind = Literal["intensive", "extensive", "class", "vector", "atom", "atom_vector"]
assert get_args(Kind) == KINDS
FAVOUR = 3.0  # weights of atoms in a mean are between exp(-3) and exp(3)


class PropertyConfig(BaseModel):
    """What a branch predicts in place of energies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = Field(description="intensive, extensive, class, vector, atom or atom_vector")
    classes: int = Field(0, ge=0, le=MOST_CLASSES, description="how many, of a class")

    @model_validator(mode="after")
    def _has_classes(self) -> "PropertyConfig":
        if (self.kind == "class") != (self.classes > 0):
            raise ValueError("a property has classes where its kind is class, and only there")
        return self


class PropertyBranch(nn.Module):
    """One property of one task."""

    def __init__(self, encoder: Encoder, asked: PropertyConfig, config: BranchConfig, cutoff: float):
        super().__init__()
        self.kind = asked.kind
        hidden, vectors = encoder.degrees[0], encoder.degrees.get(1)
        widths = list(config.hidden)
        self.value: nn.Module
        self.pooled: nn.Module | None = None
        if self.kind in VECTORS:
            self.value = (
                EdgeForces(hidden, widths, cutoff)
                if vectors is None
                else MLP([hidden, *widths, vectors], last_gain=FIRST_GUESS)
            )
        elif self.kind in ("intensive", "class"):
            self.pooled = Linear(hidden, widths[0], gain=SILU_GAIN)
            self.favour = Linear(hidden, 1, gain=FIRST_GUESS)
            self.value = MLP([*widths, max(asked.classes, 1)], last_gain=FIRST_GUESS)
        else:
            self.value = MLP([hidden, *widths, 1], last_gain=FIRST_GUESS)

    @property
    def reads_edges(self) -> bool:
        """Whether a pass needs the graph."""
        return isinstance(self.value, EdgeForces)

    def forward(self, features: Features, structure: Tensor, structures: int, graph: Graph | None = None) -> Tensor:
        """(S,), (S, classes) or (S, 3); of atoms (N,) or (N, 3). structure (N,): of each atom.

        graph: of the same atoms, for heads that read edges.
        """
        if self.kind in VECTORS:
            of_atoms = self._vectors(features, graph)
        elif self.pooled is not None:
            return self._of_mean(features.scalars, structure, structures)
        else:
            assert isinstance(self.value, MLP)
            of_atoms = _exact(self.value, features.scalars)[:, 0]
        return of_atoms if self.kind in OF_ATOMS else sum_over(of_atoms, structure, structures)

    def _vectors(self, features: Features, graph: Graph | None) -> Tensor:
        if self.reads_edges:
            assert graph is not None
            return self.value(*graph.exchanged(features.scalars), graph)
        assert features.vectors is not None
        return (self.value(features.scalars)[:, :, None] * features.vectors).sum(dim=1)

    def _of_mean(self, scalars: Tensor, structure: Tensor, structures: int) -> Tensor:
        assert self.pooled is not None and isinstance(self.value, MLP)
        weights = torch.exp(FAVOUR * torch.tanh(self.favour(scalars)))
        sums = sum_over(weights * silu(self.pooled(scalars)), structure, structures)
        mean = sums / sum_over(weights, structure, structures).clamp(min=torch.finfo(weights.dtype).tiny)
        found = _exact(self.value, mean)
        return found if self.kind == "class" else found[:, 0]

    @torch.no_grad()
    def rescale(self, ratio: float) -> None:
        """Multiply all that the branch predicts by a number: the same predictions in another scale."""
        last = (self.value.rest if isinstance(self.value, EdgeForces) else self.value).linears()[-1]  # type: ignore[operator, union-attr]
        for parameter in last.parameters():
            parameter.mul_(ratio)

    @torch.no_grad()
    def begin_at(self, frequencies: Tensor) -> None:
        """Let the first guess of a class be its frequency, (classes,) above zero."""
        assert self.kind == "class" and isinstance(self.value, MLP)
        self.value.linears()[-1].bias.copy_(torch.log(frequencies / frequencies.sum()))


def _exact(mlp: MLP, x: Tensor) -> Tensor:
    """An MLP whose last map is no product of matrices, which autocast would round to bfloat16: (n, outputs)."""
    last = mlp.linears()[-1]
    return (mlp.before_last(x)[:, None, :] * last.weight).sum(dim=2) + last.bias
