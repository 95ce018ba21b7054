"""What a rank holds at every moment of a run, as the kernel counts it: the peak of resident memory, phase by phase."""

import ctypes
import functools
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from rich.console import Console

import multifid.training.build
import multifid.training.run
from multifid.config import parse_config
from multifid.training.run import save, train
from multifid.training.step import Trainer

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
PHASES = [  # (where it is looked up, its name there), from the beginning to the end
    (multifid.training.run, "load_checkpoint"),
    (multifid.training.build, "Potential"),
    (multifid.training.build, "start_from"),
    (multifid.training.build, "Gradients"),
    (multifid.training.build, "MovingAverage"),
    (multifid.training.run, "restore"),
    (Trainer, "step"),
    (Trainer, "validate"),
    (multifid.training.run, "save"),
    (multifid.training.run, "finish"),
]
M_MMAP_THRESHOLD = -3  # of mallopt


def can_measure() -> bool:
    """Whether the kernel forgets its peak when it is told to."""
    try:
        return resident_and_peak()[1] > 0 and CLEAR_REFS.write_text("5") > 0
    except OSError:
        return False


def resident_and_peak() -> tuple[int, int]:
    """Bytes of this process in memory, now and at most since the peak was last forgotten; mapped files included."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


@dataclass
class Marks:
    """The peaks between each two marks. There is no moment that lies in none of them."""

    base: int = 0  # bytes before anything was built
    peaks: list[tuple[str, int]] = field(default_factory=list)  # what was done, the peak meanwhile, without the base

    def mark(self, done: str) -> None:
        now, peak = resident_and_peak()
        if not self.base:
            self.base = now
        self.peaks.append((done, peak - self.base))
        CLEAR_REFS.write_text("5")

    def around(self, name: str, f):
        @functools.wraps(f)
        def marked(*arguments, **options):
            self.mark(f"before {name}")
            try:
                return f(*arguments, **options)
            finally:
                self.mark(name)

        return marked


def measured_run(values: dict) -> dict:
    """A run by the front door: what its parameters weigh on this rank, and all peaks."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the kernel at once
    marks, runs = Marks(), []

    def save_and_wait(run, better):
        runs[:] = [run]
        save(run, better)
        run.saver.wait()  # so that the copy in host memory, and its end, belong to the phase

    with ExitStack() as stack:
        stack.enter_context(patch.object(multifid.training.run, "keep_freed_memory"))  # or nothing would be given back
        optimizers = multifid.training.build.OPTIMIZERS
        stack.enter_context(patch.dict(optimizers, adamw=marks.around("adamw", optimizers["adamw"])))
        for room, name in PHASES:
            original = save_and_wait if name == "save" else getattr(room, name)
            stack.enter_context(patch.object(room, name, marks.around(name, original)))
        train(parse_config(values, "test"), Console(quiet=True))
    trainer = runs[0].trainer
    return {
        "parameters": sum(p.nbytes for p in trainer.parameters.values()),
        "writes": sum(p.nbytes for part in trainer.gradients.parts if part.group.first for p in part.parameters),
        "own": len(trainer.potential.branches),
        "peaks": marks.peaks[1:],
    }
