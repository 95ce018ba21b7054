"""How a training run ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from multifid.training.journal import read_journal
from multifid.training.record import Row

if TYPE_CHECKING:
    from multifid.model.predictor import Predictor


@dataclass(frozen=True)
class Result:
    """How a run ended, and where it is. The same on all ranks."""

    run: Path  # its directory
    steps: int  # updates since its very beginning, earlier starts included
    best: float | None  # lowest validation value: the objective over the whole validation splits; None: none yet
    best_step: int | None  # whose weights model.safetensors are
    complete: bool  # False: it was stopped before its end, and training the same config goes on from there
    reason: str  # "complete", "stopped early: ...", "stopped by a signal", "stopped by a callback (...)"

    @property
    def rows(self) -> list[Row]:
        """All rows of RUN/metrics.jsonl, from the very beginning: one for each task at each log step and validation.

        Keys: step, epoch, split, task, loss, objective, energy_mae (eV/atom), forces_mae (eV/angstrom), stress_mae
        (eV/angstrom^3), structures, seconds, lr, grad_norm, best, ... (None where there is no value).
        """
        return read_journal(self.run)

    def model(self, device: str | None = None, precision: str = "fp32") -> "Predictor":
        """The best model, as `multifid.load` gives it. ValueError where no validation has made one yet."""
        from multifid.model.predictor import load

        return load(self.run, device, precision)
