"""The potential: one shared encoder, one branch per dataset; batch in, predictions of every task in it out.

batch -> encoder (once, over all structures) -> node features -> branch of each task, on that task's slice
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from multifid.model.branch import Branch, BranchConfig
from multifid.model.encoder import EncoderConfig, build_encoder
from multifid.model.layers import NodeFeatures, draw_weights
from multifid.structures.batch import Batch, rows_times_matrices
from multifid.structures.cells import FLAT


class ModelConfig(BaseModel):
    """The shape of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cutoff: float = Field(default=5.0, gt=0, description="Atoms closer than this exchange messages, angstrom.")
    encoder: EncoderConfig = Field(default_factory=EncoderConfig, description="The shared encoder.")
    branch: BranchConfig = Field(default_factory=BranchConfig, description="The branches, all of one shape.")


@dataclass(slots=True)
class Prediction:
    """What the model says of one task's structures, in the task's scaled units (all divided by its scale)."""

    energy: Tensor  # (S_t,) energy minus reference energies
    forces: Tensor  # (N_t, 3) per angstrom
    stress: Tensor | None  # (S_t, 3, 3) per angstrom^3, tension-positive; NaN where the cell has no volume


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
        self.encoder = build_encoder(config.encoder, config.cutoff)
        width, vectors = self.encoder.hidden, self.encoder.vectors
        self.branches = nn.ModuleDict({name: Branch(width, vectors, config.branch) for name in branches})
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
        """The predictions of every task in `batch.slices`; with `stress` also stresses, if forces are conservative."""
        if self.config.branch.forces == "direct":
            features = self.encoder(batch)
            # A backward pass begins with what was computed last: gradients arrive in the order of the tasks.
            heads = {task: self._branch(task, features, batch) for task in reversed(batch.slices)}
            return {task: Prediction(*heads[task], None) for task in batch.slices}
        return self._conservative(batch, stress)

    def _branch(self, task: str, features: NodeFeatures, batch: Batch) -> tuple[Tensor, Tensor]:
        structures, atoms = batch.slices[task]
        mine = NodeFeatures(features.scalars[atoms], features.vectors[atoms])
        first, last = structures.start, structures.stop
        return self.branches[self.branch_of[task]](mine, batch.structure[atoms] - first, last - first)

    def _conservative(self, batch: Batch, stress: bool) -> dict[str, Prediction]:
        """Forces -dE/dx and stress dE/dstrain / volume, differentiable again while training."""
        training = self.training and torch.is_grad_enabled()
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_()
            strain = torch.zeros_like(batch.cell).requires_grad_(stress)
            strained = (
                _strained(replace(batch, positions=positions), strain)
                if stress
                else replace(batch, positions=positions)
            )
            features = self.encoder(strained)
            energies = {task: self._branch(task, features, strained)[0] for task in batch.slices}
            wanted = [positions, strain] if stress else [positions]
            predictions = {}
            rounds = _without_overlap(batch.slices)
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
                    sigma = _stress(slopes[1][structures], batch.cell[structures]) if stress else None
                    predictions[task] = Prediction(energy, -slopes[0][atoms], sigma)
        return {task: predictions[task] for task in batch.slices}


def generator_for(seed: int, part: str) -> torch.Generator:
    """A generator on the CPU whose state depends on the seed and the name of the part alone."""
    digest = hashlib.blake2b(f"{seed} {part}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _strained(batch: Batch, strain: Tensor) -> Batch:
    """Positions and cells under a symmetric strain of each structure: x -> x + x strain."""
    symmetric = (strain + strain.transpose(1, 2)) / 2
    of_atoms = symmetric.index_select(0, batch.structure)
    positions = batch.positions + rows_times_matrices(batch.positions, of_atoms)
    of_vectors = symmetric.repeat_interleave(3, dim=0)  # of each cell vector
    cell = batch.cell + rows_times_matrices(batch.cell.flatten(0, 1), of_vectors).view_as(batch.cell)
    return replace(batch, positions=positions, cell=cell)


def _stress(slope: Tensor, cell: Tensor) -> Tensor:
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
