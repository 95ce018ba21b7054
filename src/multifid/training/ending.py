"""How a training run ended."""

from dataclasses import dataclass
from pathlib import Path

from multifid.training.journal import read_journal
from multifid.training.record import Row


@dataclass(frozen=True)
class Ending:
    """How a run ended, and where it is. The same on all ranks."""

    run: Path  # its directory
    steps: int  # of the run, those of earlier starts included
    best: float | None  # lowest validation value: the objective over the whole validation splits; None: none yet
    best_step: int | None  # whose weights model.safetensors are
    complete: bool  # False: it was stopped before its end, and training the same config goes on from there
    reason: str  # "complete", "stopped early: ...", "stopped by a signal", "stopped by a callback (...)"

    @property
    def rows(self) -> list[Row]:
        """All rows of RUN/metrics.jsonl, from the very beginning: one for each task at each log step and validation.

        Keys: step, epoch, split ("train" or "validation"), task, loss and objective (of the scaled residuals),
        energy_mae (eV/atom), forces_mae (eV/angstrom), stress_mae (eV/angstrom^3), structures, seconds, lr, grad_norm,
        skipped, best, structures_per_second, seconds_left, memory and device_memory (bytes). None: there is no value.
        """
        return read_journal(self.run)
