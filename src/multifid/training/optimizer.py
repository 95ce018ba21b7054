"""The optimizers, clipping, learning-rate schedules and the moving average of weights, over named parameters."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multifid.training.adamw import AdamW
from multifid.training.soap import SOAP

Named = dict[str, nn.Parameter]


def adamw(parameters: Named, lr: float, weight_decay: float) -> AdamW:
    """AdamW; biases, norms and other vectors are not decayed."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr)


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, lr: float, norm: Tensor, clip: float | None) -> None:
    """Clip and move, unless the norm of the gradient is not finite: then nothing changes, moments and counts included.

    The fused kernel divides gradients by one number and looks at another before it does anything, so that all of this
    is decided where the gradients are, and the host does not wait for the norm.
    """
    scale = torch.ones_like(norm) if clip is None else (norm / clip).clamp(min=1.0)
    vars(optimizer).update(grad_scale=scale.float(), found_inf=(~torch.isfinite(norm)).float())
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    optimizer.step()


def with_factors(optimizer: torch.optim.Optimizer, parameters: Named, factors: Mapping[str, float]) -> None:
    """Let parameters move at their own parts of the learning rate (1 where nothing is said)."""
    factor_of = {id(parameter): factors.get(name, 1.0) for name, parameter in parameters.items()}
    groups = []
    for group in optimizer.param_groups:
        for factor in sorted({factor_of[id(p)] for p in group["params"]}):
            members = [p for p in group["params"] if factor_of[id(p)] == factor]
            groups.append({**group, "params": members, "factor": factor})
    optimizer.param_groups[:] = groups
    if isinstance(optimizer, AdamW | SOAP):
        optimizer.forget()


OPTIMIZERS: dict[str, Callable[[Named, float, float], torch.optim.Optimizer]] = {"adamw": adamw, "soap": SOAP}


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter, by name, also before the first update."""
    held = optimizer.state[parameter]
    if not held and isinstance(optimizer, SOAP):
        held = optimizer.first_state(parameter)
    elif not held:
        held = {name: parameter.new_zeros(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
    return {name: tensor for name, tensor in held.items() if name != "step"}


def beside_moments(optimizer: str, parameters: Mapping[str, nn.Parameter]) -> int:
    """Numbers that the optimizer of this name keeps besides two for each of these parameters (may be on `meta`)."""
    made = OPTIMIZERS[optimizer](dict(parameters), 1.0, 0.0)
    kept = sum(x.numel() for p in parameters.values() for x in moments(made, p).values())
    return kept - 2 * sum(p.numel() for p in parameters.values())


def updates_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    """Updates that a parameter has seen; a branch that joined a run late has seen fewer."""
    state = optimizer.state[parameter]
    return int(state["step"]) if state else 0


def set_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, held: Mapping[str, Tensor], updates: int
) -> None:
    """Put back what `moments` gave, after `updates` updates."""
    if updates == 0:
        return
    # The fused AdamW counts on the device; SOAP reads the count in every update, and would wait for the device.
    if isinstance(optimizer, AdamW | SOAP):
        optimizer.forget()
    if isinstance(optimizer, AdamW):
        step = optimizer.count_of(updates, parameter.device)
    else:
        device = "cpu" if isinstance(optimizer, SOAP) else parameter.device
        step = torch.tensor(float(updates), dtype=torch.float32, device=device)
    optimizer.state[parameter] = {"step": step} | {name: x.to(parameter.device) for name, x in held.items()}


class MovingAverage:
    """Exponential moving average of the weights; in the first updates of a parameter the average is over fewer."""

    def __init__(self, parameters: Named, decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        self.begun = dict.fromkeys(parameters, 0)  # updates that the run had made when the parameter joined it

    @torch.no_grad()
    def update(self, updates: int) -> None:
        for begun in sorted(set(self.begun.values())):
            names = [name for name in self.average if self.begun[name] == begun]
            n = updates - begun
            decay = min(self.decay, (1 + n) / (10 + n))
            weights = [self.parameters[name].detach() for name in names]
            torch._foreach_lerp_([self.average[name] for name in names], weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages; the second call undoes the first."""
        for name, p in self.parameters.items():
            held = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(held)


@dataclass
class Schedule:
    """The factor on the learning rate after a number of updates.

    Linear warm-up, then: `cosine` to a hundredth of the rate at the last update; `constant`; `plateau`: times `factor`
    whenever the validation value has not improved for `patience` epochs.

    Where the clock ends the run, its number of updates is guessed, and guessed better (`bend`). The state then holds
    from which update on which part of the cosine is done, and by which update all of it; the warm-up is an upper bound,
    so that the rate comes down in the shortest run.
    """

    kind: str
    warmup: int
    updates: int  # of the whole run
    factor: float = 0.5
    patience: int = 5
    state: dict[str, Any] = field(default_factory=lambda: {"factor": 1.0, "best": math.inf, "bad_epochs": 0})

    def __call__(self, update: int) -> float:
        bent = "bent" in self.state
        warm = (update + 1) / self.warmup if update < self.warmup else 1.0
        if update < self.warmup and not bent:
            return warm
        if self.kind == "cosine":
            done = self.done(update + 1 if bent else update)
            return min(warm, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        return min(warm, self.state["factor"] if self.kind == "plateau" else 1.0)

    def done(self, update: int) -> float:
        """The part of the cosine that is done, 0 to 1."""
        begun, done, end = self.state.get("bent", (self.warmup, 0.0, self.updates))
        return min(1.0, done + (1.0 - done) * (update - begun) / max(1, end - begun))

    def bend(self, made: int, left: int) -> None:
        """Reach the end with the last of `left` updates from now on, when `made` are made; no jump here."""
        done = self.done(made) if "bent" in self.state else made / (made + left)
        self.state["bent"] = [made, done, made + left]

    def straighten(self) -> None:
        """The number of updates is known: forget guesses."""
        self.state.pop("bent", None)

    def validated(self, value: float) -> None:
        """Hear the validation value of an epoch (only `plateau` listens)."""
        if value < self.state["best"]:
            self.state.update(best=value, bad_epochs=0)
            return
        self.state["bad_epochs"] += 1
        if self.state["bad_epochs"] > self.patience:
            self.state.update(factor=self.state["factor"] * self.factor, bad_epochs=0)
