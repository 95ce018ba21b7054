"""A branch: what belongs to one task, an energy head and a force head, on top of the shared encoder.

It works in the task's own scaled units: energies are (E - references) / scale, forces F / scale.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from multifid.model.layers import MLP, NodeFeatures, sum_over

FIRST_GUESS = 0.1  # size of the untrained predictions: small, so that training starts near the reference energies


class BranchConfig(BaseModel):
    """What every branch is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: list[PositiveInt] = Field(
        default=[889, 889, 889], description="Widths of the fully connected layers of each head."
    )
    forces: Literal["direct", "conservative"] = Field(
        default="direct",
        description="Forces from a head of their own, or minus the gradient of the energy (then also stress).",
    )


class Branch(nn.Module):
    """Energy head, and with direct forces a force head, over `hidden` scalars and `vectors` vectors per atom."""

    def __init__(self, hidden: int, vectors: int, config: BranchConfig):
        super().__init__()
        self.energy = MLP([hidden, *config.hidden, 1], last_gain=FIRST_GUESS)
        self.forces = (
            MLP([hidden, *config.hidden, vectors], last_gain=FIRST_GUESS) if config.forces == "direct" else None
        )

    def forward(self, features: NodeFeatures, structure: Tensor, structures: int) -> tuple[Tensor, Tensor | None]:
        """Energies (S,), summed over the atoms of each structure, and direct forces (N, 3) or None.

        `structure` (N,) is the structure of each atom, counted from the first one of this branch.
        """
        energy = sum_over(self._energy_of_atoms(features.scalars), structure, structures)
        if self.forces is None:
            return energy, None
        weights = self.forces(features.scalars)  # (N, C): scalars times vectors turn with the structure
        return energy, (weights[:, :, None] * features.vectors).sum(dim=1)

    def _energy_of_atoms(self, scalars: Tensor) -> Tensor:
        """(N, H) -> (N,). The last map is no product of matrices, which autocast would round to bfloat16."""
        last = self.energy.linears()[-1]
        return (self.energy.before_last(scalars) * last.weight[0]).sum(dim=1) + last.bias
