"""What a run says of itself at a log step or a validation: rows, one for each task, and who writes them down.

Everything that is shown of a run's progress, wherever it is shown, is in these rows: metrics.jsonl, train.log and the
console, TensorBoard and Weights & Biases are `Recorder`s that get the same list.
"""

import math
import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from multifid.training.step import Task, Totals

Row = dict[str, Any]
OF_TASK = ("loss", "energy_mae", "forces_mae", "stress_mae", "property_mae")
OF_RUN = ("lr", "grad_norm", "skipped", "structures_per_second", "memory", "device_memory", "seconds_left")


class Recorder(Protocol):
    """Writes down what a run says. Lives on rank 0."""

    def write(self, rows: list[Row]) -> None:
        """Take the rows of one log step or of one validation: at least one, all of the same step and split."""

    def close(self) -> None:
        """Everything taken is where it belongs; nothing more will come."""


@dataclass(frozen=True)
class Moment:
    """What is said of a run as a whole at a step; the same in the rows of all tasks."""

    lr: float  # of the last update
    grad_norm: float | None  # mean over the updates since the last rows of training, before clipping
    skipped: int  # updates left out since then, because the gradient was not finite
    best: float | None  # lowest validation value so far
    structures_per_second: float | None  # of all ranks, since then, without validation
    seconds_left: float | None  # until the end of the run
    memory: int  # bytes: the most that this process ever held
    device_memory: int | None  # the same of the accelerator; None: there is none


def rows(
    totals: Totals, tasks: list[Task], step: int, epoch: float, split: str, seconds: float, moment: Moment
) -> list[Row]:
    """The rows of all tasks. Errors in eV/atom, eV/angstrom and eV/angstrom^3; None without a label.

    `loss` is the task's part of the objective before its weight, `objective` the weighted sum over tasks.
    """
    losses, found = totals.objectives(), totals.errors()
    whole = sum(task.weight * losses[task.name] for task in tasks)
    out = []
    for task in tasks:
        errors = found[task.name]
        out.append(
            {
                "step": step,
                "epoch": epoch,
                "split": split,
                "task": task.name,
                "loss": losses[task.name],
                "energy_mae": errors["energy_mae"],
                "forces_mae": errors["forces_mae"],
                "structures": errors["structures"],
                "seconds": round(seconds, 3),
                "stress_mae": errors["stress_mae"],
                **({"property_mae": errors["property_mae"]} if "property_mae" in errors else {}),
                "objective": whole,
                **asdict(moment),
            }
        )
    return out


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: None (null) in their place."""
    return value if math.isfinite(value) else None


def scalars(rows: list[Row]) -> dict[str, float]:
    """The numbers of rows under the names that TensorBoard and Weights & Biases show them by.

    `energy_mae/train/ani1x` of a task, `objective/validation` of a split, `run/lr` of the run.
    """
    split = rows[0]["split"]
    named = {f"{key}/{split}/{row['task']}": row.get(key) for row in rows for key in OF_TASK}
    named[f"objective/{split}"] = rows[0]["objective"]
    if split == "train":
        named |= {f"run/{key}": rows[0][key] for key in OF_RUN}
    return {name: value for name, value in named.items() if value is not None and math.isfinite(value)}


def peak_memory() -> int:
    """Bytes: the most that this process has held in memory."""
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def peak_device_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors took on an accelerator; None where `device` is the CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
