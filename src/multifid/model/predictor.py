"""A trained model as one thing that predicts: structures in, energies in eV, forces and stress out.

    model = multifid.load("runs/demo")
    out = model.predict(atoms, task="ani1x")       out.energy, out.forces, out.stress

It joins what a run keeps apart: the potential, which works in scaled units without references, and what each branch
knows of its task: reference energies, scale, elements (`task_model.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.batch import Batch
from multifid.graphs.graph import completed
from multifid.model.disagreement import Disagreement, disagreement
from multifid.model.electrons import batch_as_trained
from multifid.model.model_file import load_model
from multifid.model.output import Answer, Doubts, Output, each_of, sums_of
from multifid.model.pieces import EDGES, NEAREST, batch_of, batch_with, refuse_coincident
from multifid.model.potential import Potential, Prediction
from multifid.model.rigid import held
from multifid.model.rigidity import BranchRigidity, Rigidity, TaskConstants, deviation
from multifid.model.rigidity_file import fitting, load_rigidity
from multifid.model.saved import Description
from multifid.model.task_model import PRECISIONS, TaskModel
from multifid.structures.elements import MAX_Z
from multifid.structures.properties import subtracted
from multifid.structures.structure import Packed

__all__ = [
    "EDGES",
    "NEAREST",
    "PRECISIONS",
    "Output",
    "Predictor",
    "batch_of",
    "batch_with",
    "load",
    "refuse_coincident",
]


@dataclass
class Predictor(TaskModel):
    """A trained model on one device, in one precision. Made by `multifid.load`."""

    potential: Potential
    description: Description
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    rigidity: Rigidity | None = None  # what uncertainties are made of, where the run was calibrated

    def __post_init__(self) -> None:
        self.potential = self.potential.to(device=self.device, dtype=self.dtype).eval()
        self.potential.requires_grad_(False)

    def is_conservative(self, task: str) -> bool:
        """Whether a task's forces are minus the gradient of its energy; only then there is a stress."""
        return self.potential.is_conservative(task)

    def in_precision(self, precision: str | None) -> Self:
        """This model in another precision, a copy; itself where that is its own."""
        if precision is None or PRECISIONS.get(precision) == self.dtype:
            return self
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
        config, branch_of = self.potential.config, self.potential.branch_of
        copy = Potential(config, list(self.potential.branches), branch_of, seed=0)
        copy.load_state_dict(self.potential.state_dict())
        return replace(self, potential=copy, dtype=PRECISIONS[precision])

    def aligned(self, batch: Batch, task: str, *, stress: bool) -> Prediction:
        """What the branch of a task says of a batch, which is moved to the device and type of the model first.

        In eV and float64, reference energies still subtracted; on the device. stress: only of conservative forces.
        Charge and multiplicity are those that the task was trained with where there was only one.
        """
        batch = batch_as_trained(batch, self.description["tasks"][task])
        moved = completed(batch, self.potential.encoder.needs).to(self.device, self.dtype)
        with torch.no_grad():
            return self.physical(self.potential(moved, stress=stress)[task], task)

    def physical(self, prediction: Prediction, task: str) -> Prediction:
        """A prediction of the potential in eV, float64, reference energies still subtracted."""
        scale = self.description["tasks"][task]["scale"]
        stress = None if prediction.stress is None else prediction.stress.double() * scale
        return Prediction(
            prediction.energy.double() * scale,
            prediction.forces.double() * scale,
            stress,
            None if prediction.energies is None else prediction.energies.double() * scale,
            None if prediction.value is None else prediction.value.double() * scale,
        )

    def values(self, packed: Packed, batch: Batch, task: str) -> np.ndarray:
        value = self.aligned(batch, task, stress=False).value
        held = self.property_of(task)
        assert value is not None and held is not None
        if held.kind == "class":
            return torch.softmax(value, dim=1).cpu().numpy()
        table = np.full(MAX_Z + 1, np.nan)
        known = self._references(task)
        table[list(known)] = list(known.values())
        certain = subtracted(held.kind, table, packed.numbers, packed.natoms)
        found = value.cpu().numpy()
        return found + certain.reshape(-1, *[1] * (found.ndim - 1))

    def answer(
        self, packed: Packed, batch: Batch, task: str, *, stress: bool, features: bool = False
    ) -> Iterator[Answer]:
        """(energy, forces, stress, energies, features) of each structure of a batch; stress only where asked for."""
        seen: list[Tensor] = []
        hook = self.potential.encoder.register_forward_hook(lambda _, inputs, output: seen.append(output.scalars))
        try:
            found = self.aligned(batch, task, stress=stress)
        finally:
            hook.remove()
        references = self.references_of(packed, task)
        assert found.energies is not None
        yield from each_of(
            packed,
            found.energy.cpu().numpy() + sums_of(references, packed),
            found.forces.cpu().numpy(),
            None if found.stress is None else found.stress.cpu().numpy(),
            found.energies.cpu().numpy() + references,
            seen[0].detach().double().cpu().numpy() if features else None,
        )

    def refuse_uncalibrated(self, task: str) -> None:
        """ValueError, with what to do, where a task has no uncertainties."""
        self.calibrated(task)

    def calibrated(self, task: str) -> tuple[BranchRigidity, TaskConstants]:
        """What uncertainties of a task are made of. ValueError where there are none, or those of other weights."""
        if self.rigidity is None or task not in self.rigidity.tasks:
            raise ValueError(
                f"task {task!r} of this model has no uncertainties, or those of other weights: `multifid calibrate "
                "RUN` computes them from the run's data; a model file has them where it is exported afterwards"
            )
        return self.rigidity.branches[self.potential.branch_of[task]], self.rigidity.tasks[task]

    def disagreement(self, packed: Packed, *, stress: bool, max_edges: int = EDGES) -> Disagreement:
        return disagreement(self, packed, stress=stress, max_edges=max_edges)

    def answer_with_doubts(
        self, packed: Packed, batch: Batch, task: str, *, stress: bool, forces: bool
    ) -> Iterator[tuple[Answer, Doubts]]:
        """Like `answer`, with the standard deviations of each structure; forces: theirs too, which cost more."""
        rigidity, constants = self.calibrated(task)
        moved = completed(batch, self.potential.encoder.needs).to(self.device, self.dtype)
        found = held(self.potential, moved, task, rigidity, stress=stress, forces=forces)
        p, references = self.physical(found.prediction, task), self.references_of(packed, task)
        assert p.energies is not None
        answers = each_of(
            packed,
            p.energy.cpu().numpy() + sums_of(references, packed),
            p.forces.cpu().numpy(),
            None if p.stress is None else p.stress.cpu().numpy(),
            p.energies.cpu().numpy() + references,
            None,
        )
        energy = deviation(found.energy, constants.energy).cpu().numpy() * packed.natoms
        atoms = deviation(found.energies, constants.energy).cpu().numpy()
        of_forces = deviation(found.forces, constants.forces, constants.floor).cpu().numpy()
        of_stress = deviation(found.stress, constants.stress).cpu().numpy()
        for k, (a, answer) in enumerate(zip(packed.offsets[:-1], answers, strict=True)):
            b = a + packed.natoms[k]
            yield answer, (float(energy[k]), atoms[a:b], of_forces[a:b], float(of_stress[k]))


P = TypeVar("P", bound=Predictor)


def load(
    path: Path | str,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    kind: type[P] = Predictor,  # type: ignore[assignment]
) -> P:
    """A trained model: a run's directory or a model file. device: the CPU where nothing is said.

    ValueError names what is missing or damaged. Nothing global is changed: no default type, no threads, no seed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
    potential, description = load_model(Path(path))
    rigidity = fitting(load_rigidity(Path(path)), potential)
    return kind(potential, description, torch.device(device or "cpu"), PRECISIONS[precision], rigidity)
