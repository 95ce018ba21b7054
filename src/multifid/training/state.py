"""How far a run has come, and what a checkpoint holds of it by name: the way out and the way back.

Nothing depends on the layout: any number of ranks, with any placement, goes on from the same files. Tasks may have
joined or left in between: a branch without a file starts fresh, a file without a branch is not read.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from multifid.feed.order import Draw
from multifid.training.checkpoint import Tensors, rng_state, set_rng_state
from multifid.training.identity import Kept, in_kept_order
from multifid.training.optimizer import moments, set_moments, updates_of
from multifid.training.record import finite
from multifid.training.step import ENCODER, Norms, Totals, Trainer, part_of_branch


@dataclass
class Position:
    """How far a run has come."""

    totals: Totals = field(repr=False)  # since the last training rows of the journal, over all ranks
    step: int = 0
    seen: str = ""  # running hash of the identities of all structures seen
    seconds: float = 0.0  # of training, over all starts
    best: float = math.inf  # validation value of model.safetensors
    best_step: int = 0
    epochs_without_better: int = 0
    ended: bool = False  # by early stopping
    trouble: str = ""  # what began it where the last validation value is not finite
    paused: float = 0.0  # of `seconds`, in validations of this start
    pause: float | None = None  # seconds of the last validation

    @property
    def working(self) -> float:
        """Seconds of training, validations left out."""
        return self.seconds - self.paused


def part_of(parameter: str) -> str:
    """The part of the model, and file of a checkpoint, that a parameter belongs to: `encoder`, or `branch-<name>`."""
    room, name, *_ = parameter.split(".")
    return ENCODER if room == ENCODER else part_of_branch(name)


def tensors_of(trainer: Trainer) -> dict[str, Tensors]:
    """What this rank writes, weights, averages and moments: file -> `<part>/<parameter>` -> copy in host memory.

    Every file is written by the first rank of its group; to that of the encoder the others send their pieces, if it is
    sharded. Called on all ranks.
    """
    trainer.settle()
    writes = {part.name for part in trainer.gradients.parts if part.group.first}
    shards = trainer.gradients.shards
    files: dict[str, Tensors] = {}
    for name, parameter in trainer.parameters.items():
        sharded = shards if shards is not None and name in shards.pieces else None
        if part_of(name) not in writes and sharded is None:
            continue
        held = {f"weight/{name}": parameter.detach()}
        if parameter.requires_grad:
            held |= {f"{kind}/{name}": kept for kind, kept in moments(trainer.optimizer, parameter).items()}
        if trainer.pull is not None and name in trainer.pull.start:
            held[f"start/{name}"] = trainer.pull.start[name]
        if trainer.average is not None:
            held[f"ema/{name}"] = trainer.average.average[name]
        copied = {
            key: _copied(tensor) if sharded is None else sharded.whole(name, tensor) for key, tensor in held.items()
        }
        if part_of(name) in writes:
            file = files.setdefault(part_of(name), {})
            file |= {key: tensor for key, tensor in copied.items() if tensor is not None}
            file[f"updates/{name}"] = torch.tensor(updates_of(trainer.optimizer, parameter))
    return files


def _copied(tensor: Tensor) -> Tensor:
    """To host memory, also where it lies there already: training goes on with the original."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def state_of(trainer: Trainer, position: Position, draws: list[Draw]) -> dict[str, Any]:
    """What is not a tensor; the same on every rank. A copy: training goes on while it is written."""
    trainer.settle()
    names = position.totals.tasks
    state = {
        "updates": trainer.updates,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "schedule": trainer.schedule.state,
        "norms": trainer.norms.state,
        "balance": None if trainer.balance is None else trainer.balance.state(),
        "rng": rng_state(),
        "position": {
            "seen": position.seen,
            "seconds": position.seconds,
            "best": finite(position.best),
            "best_step": position.best_step,
            "epochs_without_better": position.epochs_without_better,
            "ended": position.ended,
            "trouble": position.trouble,
            "totals": dict(zip(names, position.totals.as_tensor().tolist(), strict=True)),
        },
        "places": {task: draw.places(position.step)[0] for draw in draws for task in draw.tasks},
        "draws": {task: [str(draw.rate), draw.base, draw.since] for draw in draws for task in draw.tasks},
    }
    return copy.deepcopy(state)


@torch.no_grad()
def restore(trainer: Trainer, state: dict[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> Position:
    """Put a checkpoint back into a trainer that was built from the run's config, on any layout."""
    trainer.updates, trainer.skipped_in_a_row = state["updates"], state["skipped_in_a_row"]
    trainer.schedule.state = dict(state["schedule"])
    trainer.norms = Norms(*state.get("norms", ()))
    if trainer.balance is not None:
        trainer.balance.restore(state["balance"])
    set_rng_state(state["rng"])
    shards = trainer.gradients.shards
    for name, parameter in trainer.parameters.items():
        file = files.get(part_of(name))
        updates = 0 if file is None else int(file[f"updates/{name}"])
        if trainer.average is not None:
            trainer.average.begun[name] = trainer.updates - updates
        if file is None:
            continue  # its task joins the run here
        kept = list(moments(trainer.optimizer, parameter)) if parameter.requires_grad else []
        start = ["start"] if trainer.pull is not None and name in trainer.pull.start else []
        kinds = ("weight", *kept, *start, *(["ema"] if trainer.average is not None else []))
        held = {kind: file[f"{kind}/{name}"] for kind in kinds}
        if shards is not None and name in shards.pieces:
            held = {kind: shards.cut(whole) for kind, whole in held.items()}
        parameter.copy_(held["weight"])
        if trainer.pull is not None and name in trainer.pull.start:
            trainer.pull.start[name].copy_(held["start"])
        set_moments(trainer.optimizer, parameter, {kind: held[kind] for kind in kept}, updates)
        if trainer.average is not None:
            trainer.average.average[name].copy_(held["ema"])
    p = dict(state["position"])
    held, names = p.pop("totals"), [t.name for t in trainer.tasks]
    totals = Totals(names, trainer.device)
    zero = totals.as_tensor()
    rows = [totals_of(held[t]) if t in held else zero[0].cpu() for t in names]
    totals.add_tensor(torch.stack(rows))
    p["best"] = math.inf if p["best"] is None else p["best"]
    if set(held) != set(names):  # another objective: what was best, and whether it got better, means nothing now
        p |= {"best": math.inf, "epochs_without_better": 0, "ended": False, "trouble": ""}
    return Position(totals, step=state["step"], **p)


def totals_of(held: list[float]) -> Tensor:
    """A row of `Totals` from a checkpoint; those of versions without properties had three columns and quantities."""
    if len(held) == 18:
        held = [*held[:3], 0.0, *held[3:6], 0.0, *held[6:], 0.0, 0.0, 0.0]
    return torch.tensor(held, dtype=torch.float64)


def go_on(draws: list[Draw], state: dict[str, Any], kept: Kept) -> list[Draw]:
    """The draws at a checkpoint: as they were, or, where the tasks or their rates are others now, begun there.

    Either way every task goes on at its next place, in the order that it began with.
    """
    draws, held = in_kept_order(draws, kept), state["draws"]
    now = {task: str(draw.rate) for draw in draws for task in draw.tasks}
    if now == {task: rate for task, (rate, _, _) in held.items()}:
        return [replace(d, base=held[d.tasks[0]][1], since=held[d.tasks[0]][2]) for d in draws]
    places, step = state["places"], state["step"]
    return [replace(d, base=max(places.get(task, 0) for task in d.tasks), since=step) for d in draws]
