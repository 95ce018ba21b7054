"""What `multifid.load` gives: a predictor, and what else a trained model is used for.

model = multifid.load("runs/demo")
atoms.calc = model.calculator(task="ani1x")
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.batch import Batch
from multifid.graphs.skin import SKIN
from multifid.model import predictor
from multifid.model.fixed import tensors_of
from multifid.model.output import Answer, each_of, sums_of
from multifid.model.package import Package, is_package
from multifid.model.predictor import Predictor
from multifid.model.saved import Description
from multifid.model.task_model import PRECISIONS, TaskModel
from multifid.structures.cells import spans_volume
from multifid.structures.structure import Packed

if TYPE_CHECKING:
    from multifid.apply.calculator import Calculator


class Answers(TaskModel):
    """What every model is used for that `multifid.load` gives."""

    chosen: str | None  # the task that answers where none is named

    def task(self, name: str | None = None) -> str:
        """The task of this name, the one that was switched to, or the only one. ValueError lists the tasks."""
        return super().task(self.chosen if name is None else name)

    def switch(self, task: str) -> Self:
        """This model with a task that answers where none is named. It shares all weights; this one stays as it is."""
        switched = copy.copy(self)
        switched.chosen = self.task(task)
        return switched

    def calculator(
        self,
        task: str | None = None,
        *,
        dtype: str | None = None,
        skin: float = SKIN,
        compiled: bool | Path | str = False,
    ) -> "Calculator":
        """An ASE calculator for one task; `task` may be left out where there is only one.

        dtype: float32 or float64; that of the model where nothing is said. skin: of its neighbour list, angstrom.
        compiled: see `Calculator`.
        """
        from multifid.apply.calculator import Calculator

        return Calculator(self, task, dtype=dtype, skin=skin, compiled=compiled)


@dataclass
class Model(Answers, Predictor):
    """A trained model. Made by `multifid.load`."""

    chosen: str | None = None


class Exported(Answers):
    """A file that `multifid export --format pt2` made: one task, one precision, on the CPU. Made by `multifid.load`."""

    gives_features = False

    def __init__(self, package: Package, weights: Sequence[Tensor] = (), description: Description | None = None):
        self.package, self.weights, self.chosen = package, list(weights), None
        self.description = description or package.about["description"]
        self.device, self.dtype = torch.device("cpu"), getattr(torch, package.about["precision"])
        self._inputs = [x["name"] for x in package.about["inputs"][len(self.weights) :]]

    def is_conservative(self, task: str) -> bool:
        """As in the other forms; there is one task."""
        return self.package.about["forces"] == "conservative"

    def in_precision(self, precision: str | None) -> Self:
        """Itself. ValueError where that is not its precision, which was chosen when it was exported."""
        if precision is not None and PRECISIONS.get(precision) != self.dtype:
            raise ValueError(
                f"{self.package.path} computes in {self.package.about['precision']} only: export the run again with "
                f"--precision {precision}, or ask for {self.package.about['precision']}"
            )
        return self

    def answer(
        self, packed: Packed, batch: Batch, task: str, *, stress: bool, features: bool = False
    ) -> Iterator[Answer]:
        if features:
            raise ValueError(f"{self.package.path} gives no features of atoms: ask the run that it was exported from")
        found = self.package.run([*self.weights, *tensors_of(batch, self._inputs)])
        energies, forces, *virial = (x.numpy() for x in found)
        tensor = None
        if stress and virial:
            volume = np.abs(np.linalg.det(packed.cell.astype(np.float64)))
            with np.errstate(divide="ignore", invalid="ignore"):
                tensor = -virial[0] / np.where(spans_volume(packed.cell), volume, np.nan)[:, None, None]
        yield from each_of(packed, sums_of(energies, packed), forces, tensor, energies, None)


def load(path: Path | str, device: str | torch.device | None = None, precision: str | None = None) -> Model | Exported:
    """A trained model: a run's directory, a model file, or an exported file.

    device: the CPU where nothing is said. precision: fp32 or fp64; default: fp32, or that of an exported file.

    ValueError names what is missing or damaged. Nothing global is changed: no default type, no threads, no seed.
    """
    if not is_package(Path(path)):
        return predictor.load(path, device, precision or "fp32", Model)
    if torch.device(device or "cpu").type != "cpu":
        raise ValueError(
            f"{path}: an exported file computes on the CPU, not on {device}; load the run or its .mfid file"
        )
    return Exported(Package(path)).in_precision(precision)


Models = TaskModel | Path | str | Sequence[TaskModel | Path | str]


def opened(models: Models) -> list[TaskModel]:
    """One or several models, those that are paths loaded."""
    several = [models] if isinstance(models, TaskModel | Path | str) else list(models)
    return [load(model) if isinstance(model, Path | str) else model for model in several]
