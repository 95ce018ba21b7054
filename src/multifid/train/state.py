"""What a checkpoint holds of a trainer, by parameter name: the way out and the way back."""

from typing import Any

import torch

from multifid.train.checkpoint import Tensors, rng_state, set_rng_state
from multifid.train.optimizer import moments, set_moments
from multifid.train.step import Trainer


def file_of(parameter: str) -> str:
    """The checkpoint file of a parameter: `encoder`, or `branch-<name>`."""
    room, name, *_ = parameter.split(".")
    return "encoder" if room == "encoder" else f"branch-{name}"


def tensors_of(trainer: Trainer) -> dict[str, Tensors]:
    """Weights, averages and moments: file -> `<part>/<parameter>` -> tensor."""
    files: dict[str, Tensors] = {}
    for name, parameter in trainer.parameters.items():
        file = files.setdefault(file_of(name), {})
        first, second = moments(trainer.optimizer, parameter)
        file |= {f"weight/{name}": parameter, f"exp_avg/{name}": first, f"exp_avg_sq/{name}": second}
        if trainer.average is not None:
            file[f"ema/{name}"] = trainer.average.average[name]
    return files


def state_of(trainer: Trainer) -> dict[str, Any]:
    """What is not a tensor."""
    return {
        "updates": trainer.updates,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "schedule": trainer.schedule.state,
        "rng": rng_state(),
    }


@torch.no_grad()
def restore(trainer: Trainer, state: dict[str, Any], files: dict[str, Tensors]) -> None:
    """Put a checkpoint back into a trainer that was built from the same config."""
    trainer.updates, trainer.skipped_in_a_row = state["updates"], state["skipped_in_a_row"]
    trainer.schedule.state = dict(state["schedule"])
    set_rng_state(state["rng"])
    for name, parameter in trainer.parameters.items():
        file = files[file_of(name)]
        parameter.copy_(file[f"weight/{name}"])
        set_moments(trainer.optimizer, parameter, file[f"exp_avg/{name}"], file[f"exp_avg_sq/{name}"], trainer.updates)
        if trainer.average is not None:
            trainer.average.average[name].copy_(file[f"ema/{name}"])
