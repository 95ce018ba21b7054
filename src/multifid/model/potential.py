"""The potential: one shared encoder, one branch per dataset; batch in, predictions of every task in it out.

batch -> encoder (once, over all structures) -> node features -> branch of each task, on that task's slice
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from multifid.graphs.batch import Batch, rows_times_matrices
from multifid.graphs.graph import Graph, completed, graph_of, only
from multifid.model.branch import Branch, BranchConfig
from multifid.model.contract import Encoder, Features
from multifid.model.encoders import DEFAULT, AnyEncoderConfig, all_encoders, build_encoder, why_unknown
from multifid.model.layers import draw_weights, sum_over
from multifid.model.property import PropertyBranch, PropertyConfig
from multifid.structures.cells import FLAT


class ModelConfig(BaseModel):
    """The shape of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    cutoff: float = Field(default=5.0, gt=0, description="Atoms closer than this exchange messages, angstrom.")
    encoder: AnyEncoderConfig = Field(
        default={"name": DEFAULT}, validate_default=True, description="The shared encoder."
    )
    branch: BranchConfig = Field(default_factory=BranchConfig, description="The shape of the branches.")
    branches: dict[str, BranchConfig] = Field(
        default_factory=dict,
        description="Branches of another shape, by name: `{mptrj: {forces: direct}}`. What is not said is as in "
        "`branch`. Conservative and direct forces may stand side by side.",
    )
    properties: dict[str, PropertyConfig] = Field(
        default_factory=dict,
        description="Branches that predict a property in place of energies; taken from the stores where left out.",
    )

    @field_validator("encoder", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {"name": DEFAULT} | value
        if value["name"] not in all_encoders():
            raise ValueError(why_unknown(value["name"]))
        return value

    @model_validator(mode="before")
    @classmethod
    def _as_in_branch(cls, values: Any) -> Any:
        """What `branches` leaves out, from `branch`."""
        if not isinstance(values, dict) or not isinstance(values.get("branches"), dict):
            return values
        common = values.get("branch", {})
        common = common.model_dump() if isinstance(common, BranchConfig) else common
        if not isinstance(common, dict):
            return values
        one_by_one = {
            name: common | asked if isinstance(asked, dict) else asked for name, asked in values["branches"].items()
        }
        return values | {"branches": one_by_one}

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        """Build both once without memory: what an encoder or a head refuses is refused when a config is read."""
        with torch.device("meta"):
            encoder = build_encoder(self.encoder, self.cutoff)
            for name in [None, *self.branches, *self.properties]:
                build_branch(encoder, self, name)
        return self

    def shape(self, branch: str | None) -> BranchConfig:
        """The shape of a branch; None: of those that have no shape of their own."""
        return self.branch if branch is None else self.branches.get(branch, self.branch)

    @property
    def shapes(self) -> list[BranchConfig]:
        """All shapes that a branch may have here."""
        return [self.branch, *self.branches.values()]

    @property
    def conservative(self) -> bool:
        """Whether any forces are gradients of an energy."""
        return any(shape.forces == "conservative" for shape in self.shapes)


def build_branch(encoder: Encoder, config: ModelConfig, name: str | None = None) -> Branch | PropertyBranch:
    """The branch of a name (None: of a task with energies like most), with weights that are not yet drawn."""
    if name is not None and (asked := config.properties.get(name)) is not None:
        return PropertyBranch(encoder, asked, config.shape(name), config.cutoff)
    return Branch(encoder, config.shape(name), config.cutoff)


@dataclass(slots=True)
class Prediction:
    """What the model says of one task's structures, in the task's scaled units (all divided by its scale)."""

    energy: Tensor  # (S_t,) energy minus reference energies
    forces: Tensor  # (N_t, 3) per angstrom
    stress: Tensor | None  # (S_t, 3, 3) per angstrom^3, tension-positive; NaN where the cell has no volume
    energies: Tensor | None = None  # (N_t,) what each atom adds; None from compiled passes
    value: Tensor | None = None  # of a task of a property: see `model/property.py`; energy and forces are zero then


class Potential(nn.Module):
    """Encoder and the branches that live here; parameters are named `encoder.*` and `branches.<branch>.*`.

    `branch_of` says which branch each task uses. Weights depend on `(seed, "encoder")` and `(seed, branch)` alone, not
    on what else is built or on the global random state. Raises ValueError for a task whose branch is not built.
    """

    def __init__(self, config: ModelConfig, branches: Sequence[str], branch_of: Mapping[str, str], seed: int):
        super().__init__()
        absent = sorted(set(branch_of.values()) - set(branches))
        if absent:
            raise ValueError(f"every task needs a branch that is built here; not among {list(branches)}: {absent}")
        taken = [name for name in branches if hasattr(nn.ModuleDict, name)]
        if taken:
            raise ValueError(f"a branch must not be called {taken[0]!r}: torch uses that name; choose another")
        self.config = config
        self.branch_of = dict(branch_of)
        # What surrounds the gradient that gives conservative forces, for those who hook into backward passes.
        self.inner_gradient: Callable[[], AbstractContextManager] = nullcontext
        # Whether conservative and other tasks go through the encoder in passes of their own. Not where passes are
        # collective: all ranks must make as many.
        self.apart = True
        self.encoder = build_encoder(config.encoder, config.cutoff)
        self.branches = nn.ModuleDict({n: build_branch(self.encoder, config, n) for n in branches})
        draw_weights(self.encoder, generator_for(seed, "encoder"))
        for name, branch in self.branches.items():
            draw_weights(branch, generator_for(seed, f"branch {name}"))

    def encoder_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, as in the whole model, and parameters of the encoder."""
        return self.encoder.named_parameters(prefix="encoder")

    def branch_parameters(self, branch: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, as in the whole model, and parameters of one branch."""
        return self.branches[branch].named_parameters(prefix=f"branches.{branch}")

    def forward(self, batch: Batch, stress: bool = False) -> dict[str, Prediction]:
        """The predictions of every task in `batch.slices`; with `stress` also stresses of conservative forces."""
        sloped = [task for task in batch.slices if self.is_conservative(task)]
        plain = [task for task in batch.slices if task not in sloped]
        if sloped and plain and self.apart:
            # Each structure pays for the derivatives that its own task needs.
            batch = completed(batch, self.encoder.needs)
            heads = self._conservative(only(batch, sloped), stress) | self._direct(only(batch, plain))
            return {task: heads[task] for task in batch.slices}
        return self._conservative(batch, stress) if sloped else self._direct(batch)

    def predicts_property(self, task: str) -> bool:
        """Whether a task has a property in place of energies."""
        return self.branch_of[task] in self.config.properties

    def is_conservative(self, task: str) -> bool:
        """Whether the forces of a task are minus the gradient of its energy; not of a property, which has none."""
        branch = self.branch_of[task]
        return branch not in self.config.properties and self.config.shape(branch).forces == "conservative"

    def _direct(self, batch: Batch) -> dict[str, Prediction]:
        """Of tasks without conservative forces."""
        batch = completed(batch, self.encoder.needs)
        graph = graph_of(batch)
        features = self.encoder(graph)
        # A backward pass begins with what was computed last: gradients arrive in the order of the tasks.
        heads = {task: self._head(task, features, batch, graph) for task in reversed(batch.slices)}
        return {task: heads[task] for task in batch.slices}

    def _head(self, task: str, features: Features, batch: Batch, graph: Graph) -> Prediction:
        """With direct forces, or of a property."""
        if self.predicts_property(task):
            return self._property(task, features, batch, graph)
        energy, forces, of_atoms = self._branch(task, features, batch, graph)
        return Prediction(energy, forces, None, of_atoms)

    def _property(self, task: str, features: Features, batch: Batch, graph: Graph) -> Prediction:
        structures, atoms = batch.slices[task]
        branch = self.branches[self.branch_of[task]]
        assert batch.edge_slices is not None
        part = graph.part(structures, atoms, batch.edge_slices[task]) if branch.reads_edges else None
        first, last = structures.start, structures.stop
        value = branch(features.part(atoms), batch.structure[atoms] - first, last - first, part)
        nothing = features.scalars.new_zeros((atoms.stop - atoms.start, 3))
        return Prediction(features.scalars.new_zeros(last - first), nothing, None, nothing[:, 0], value)

    def _branch(self, task: str, features: Features, batch: Batch, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        """Energies (S_t,), direct forces or None, and energies of atoms (N_t,)."""
        structures, atoms = batch.slices[task]
        branch = self.branches[self.branch_of[task]]
        assert batch.edge_slices is not None
        part = graph.part(structures, atoms, batch.edge_slices[task]) if branch.reads_edges else None
        of_atoms, forces = branch(features.part(atoms), part)
        first, last = structures.start, structures.stop
        return sum_over(of_atoms, batch.structure[atoms] - first, last - first), forces, of_atoms

    def _conservative(self, batch: Batch, stress: bool) -> dict[str, Prediction]:
        """Forces -dE/dx and stress dE/dstrain / volume, differentiable again while training."""
        training = self.training and torch.is_grad_enabled()
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_()
            strain = torch.zeros_like(batch.cell).requires_grad_(stress)
            strained = (
                under_strain(replace(batch, positions=positions), strain)
                if stress
                else replace(batch, positions=positions)
            )
            strained = completed(strained, self.encoder.needs)
            graph = graph_of(strained)
            features = self.encoder(graph)
            predictions = {
                task: self._head(task, features, strained, graph)
                for task in batch.slices
                if not self.is_conservative(task)
            }
            slices = {task: place for task, place in batch.slices.items() if task not in predictions}
            heads = {task: self._branch(task, features, strained, graph) for task in slices}
            energies = {task: energy for task, (energy, _, _) in heads.items()}
            wanted = [positions, strain] if stress else [positions]
            rounds = _without_overlap(slices)
            for k, tasks in enumerate(rounds):
                total = torch.stack([energies[task].sum() for task in tasks]).sum()
                keep = training or k + 1 < len(rounds)
                with self.inner_gradient():
                    slopes = torch.autograd.grad(
                        total,
                        wanted,
                        create_graph=training,
                        retain_graph=keep,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                for task in tasks:
                    structures, atoms = batch.slices[task]
                    energy = energies[task] if training else energies[task].detach()
                    sigma = stress_of(slopes[1][structures], batch.cell[structures]) if stress else None
                    predictions[task] = Prediction(energy, -slopes[0][atoms], sigma, heads[task][2].detach())
        return {task: self._kept(predictions[task], training) for task in batch.slices}

    @staticmethod
    def _kept(prediction: Prediction, training: bool) -> Prediction:
        """Without what a derivative would need, where there will be none."""
        if training:
            return prediction
        held = {f.name: getattr(prediction, f.name) for f in fields(prediction)}
        return replace(prediction, **{name: value.detach() for name, value in held.items() if value is not None})


def generator_for(seed: int, part: str) -> torch.Generator:
    """A generator on the CPU whose state depends on the seed and the name of the part alone."""
    digest = hashlib.blake2b(f"{seed} {part}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def under_strain(batch: Batch, strain: Tensor) -> Batch:
    """Positions and cells under a symmetric strain of each structure: x -> x + x strain."""
    symmetric = (strain + strain.transpose(1, 2)) / 2
    of_atoms = symmetric.index_select(0, batch.structure)
    positions = batch.positions + rows_times_matrices(batch.positions, of_atoms)
    of_vectors = symmetric.repeat_interleave(3, dim=0)  # of each cell vector
    cell = batch.cell + rows_times_matrices(batch.cell.flatten(0, 1), of_vectors).view_as(batch.cell)
    return replace(batch, positions=positions, cell=cell)


def stress_of(slope: Tensor, cell: Tensor) -> Tensor:
    """(S, 3, 3) from dE/dstrain, per volume of the whole cell, whatever is periodic (see `structures.cells`).

    NaN without a volume, and harmless to gradients there.
    """
    a, b, c = cell.double().unbind(dim=1)
    volume = (a * torch.linalg.cross(b, c)).sum(dim=1).abs()
    spans = (volume > FLAT * cell.double().square().sum(dim=2).sqrt().prod(dim=1))[:, None, None]
    volume = volume.to(slope.dtype)[:, None, None]
    return torch.where(spans, slope / torch.where(spans, volume, 1.0), torch.nan)


def _without_overlap(slices: dict[str, tuple[slice, slice]]) -> list[list[str]]:
    """The tasks in as few rounds as needed so that no two of a round share structures: one gradient serves a round."""
    rounds: list[list[str]] = []
    for task, (structures, _) in slices.items():
        for tasks in rounds:
            if all(structures.stop <= slices[t][0].start or slices[t][0].stop <= structures.start for t in tasks):
                tasks.append(task)
                break
        else:
            rounds.append([task])
    return rounds
