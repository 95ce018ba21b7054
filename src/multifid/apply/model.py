"""What `multifid.load` gives: a predictor, and what else a trained model is used for.

model = multifid.load("runs/demo")
atoms.calc = model.calculator(task="ani1x")
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from multifid.graphs.skin import SKIN
from multifid.model import predictor
from multifid.model.predictor import Predictor

if TYPE_CHECKING:
    from multifid.apply.calculator import Calculator


@dataclass
class Model(Predictor):
    """A trained model. Made by `multifid.load`."""

    chosen: str | None = None  # the task that answers where none is named

    def task(self, name: str | None = None) -> str:
        """The task of this name, the one that was switched to, or the only one. ValueError lists the tasks."""
        return super().task(self.chosen if name is None else name)

    def switch(self, task: str) -> Self:
        """This model with a task that answers where none is named. It shares all weights; this one stays as it is."""
        return replace(self, chosen=self.task(task))

    def calculator(self, task: str | None = None, *, dtype: str | None = None, skin: float = SKIN) -> "Calculator":
        """An ASE calculator for one task; `task` may be left out where there is only one.

        dtype: float32 or float64; that of the model where nothing is said. skin: of its neighbour list, angstrom.
        """
        from multifid.apply.calculator import Calculator

        return Calculator(self, task, dtype=dtype, skin=skin)


def load(path: Path | str, device: str | torch.device | None = None, precision: str = "fp32") -> Model:
    """A trained model: a run's directory or a model file. device: the CPU where nothing is said; precision: fp32 or
    fp64.

    ValueError names what is missing or damaged. Nothing global is changed: no default type, no threads, no seed.
    """
    return predictor.load(path, device, precision, Model)


Models = Predictor | Path | str | Sequence[Predictor | Path | str]


def opened(models: Models) -> list[Predictor]:
    """One or several models, those that are paths loaded."""
    several = [models] if isinstance(models, Predictor | Path | str) else list(models)
    return [load(model) if isinstance(model, Path | str) else model for model in several]
