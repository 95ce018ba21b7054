"""One update: count, predict, back-propagate, sum, clip, move. And the same without the moving, for validation."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multifid.evaluate.metrics import Errors
from multifid.model.potential import Potential, Prediction
from multifid.parallel.groups import Group, sum_
from multifid.structures.batch import Batch, Targets
from multifid.train.loss import ObjectiveConfig, label_counts, loss_sums, objective
from multifid.train.optimizer import MovingAverage, Named, Schedule, gradients, squared_norm


@dataclass(frozen=True)
class Task:
    """What the objective knows of a task."""

    name: str
    weight: float
    scale: float  # eV/angstrom, divides every residual


@dataclass
class Totals:
    """Sums over steps, or over a validation split, for each task: what the journal reports."""

    tasks: list[str]
    device: torch.device
    loss: dict[str, Tensor] = field(init=False)  # (3,): sums of the loss by kind
    counts: dict[str, Tensor] = field(init=False)  # (3,): what they are divided by
    errors: dict[str, Errors] = field(init=False)

    def __post_init__(self) -> None:
        self.loss = {t: torch.zeros(3, dtype=torch.float64, device=self.device) for t in self.tasks}
        self.counts = {t: torch.zeros(3, dtype=torch.float64, device=self.device) for t in self.tasks}
        self.errors = {t: Errors(self.device) for t in self.tasks}

    def add(self, task: str, loss: Tensor, counts: Tensor) -> None:
        self.loss[task] += loss.detach().double()
        self.counts[task] += counts

    def objective(self, task: Task) -> float:
        """The task's part of the objective over everything added, before its weight."""
        return float(objective(self.loss[task.name], self.counts[task.name], 1.0))

    def as_tensor(self) -> Tensor:
        """All sums in one tensor (tasks, 18), to be added over ranks or kept in a checkpoint."""
        rows = [torch.cat([self.loss[t], self.counts[t], self.errors[t].as_tensor()]) for t in self.tasks]
        return torch.stack(rows)

    def put(self, sums: Tensor) -> None:
        """The inverse of `as_tensor`."""
        for task, row in zip(self.tasks, sums.to(self.device), strict=True):
            self.loss[task], self.counts[task] = row[:3].clone(), row[3:6].clone()
            self.errors[task] = Errors.from_tensor(row[6:].clone())


@dataclass
class Trainer:
    """A potential with all that one update needs."""

    potential: Potential
    parameters: Named  # those that live here
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    average: MovingAverage | None
    objective: ObjectiveConfig
    tasks: list[Task]
    world: Group
    device: torch.device
    precision: str
    clip: float | None
    lr: float
    updates: int = 0  # updates made; steps that were skipped do not count
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        for parameter in self.parameters.values():  # zero, not None: every placement decays and moves alike
            parameter.grad = torch.zeros_like(parameter)

    def step(self, micro_batches: list[Batch], totals: Totals) -> bool:
        """One update from the structures of one step. False if the gradient was not finite and the update skipped.

        A skipped update leaves weights, moments, averages and schedule alone; the position in the data advances.
        """
        counts = self._counts(micro_batches)
        torch._foreach_zero_(gradients(self.parameters.values()))
        for batch in micro_batches:
            batch = batch.to(self.device, self._dtype)
            part = self._backward(batch, counts, totals)
            if part.requires_grad:
                part.backward()
        squares = squared_norm(self.parameters.values())
        norm = float(squares.sqrt())
        if not norm < float("inf"):  # NaN too
            self.skipped_in_a_row += 1
            return False
        self._update(norm)
        return True

    def _counts(self, micro_batches: list[Batch]) -> dict[str, Tensor]:
        """(S_t, A_t, V_t) of the whole step, over micro-batches and ranks."""
        table = torch.zeros(len(self.tasks), 3, dtype=torch.float64)
        for batch in micro_batches:
            for row, task in zip(table, self.tasks, strict=True):
                if task.name in batch.targets:
                    row += label_counts(batch.targets[task.name])
        table = sum_(table, self.world).to(self.device)
        return {task.name: row for task, row in zip(self.tasks, table, strict=True)}

    def _backward(self, batch: Batch, counts: dict[str, Tensor], totals: Totals) -> Tensor:
        """This part's share of the objective, and its errors added to the totals."""
        with self._autocast():
            predictions = self.potential(batch, stress=self.objective.stress > 0)
        parts = [torch.zeros((), device=self.device)]
        for task in self.tasks:
            if task.name not in predictions:
                continue
            sums = loss_sums(self.objective, batch, task.name, predictions[task.name], task.scale)
            parts.append(objective(sums, counts[task.name], task.weight))
            totals.add(task.name, sums, sum_counts(batch, task.name, self.device))
            self._add_errors(totals, task, batch, predictions[task.name])
        return torch.stack([p.to(parts[-1].dtype) for p in parts]).sum()

    def _update(self, norm: float) -> None:
        if self.clip is not None and norm > self.clip:
            torch._foreach_mul_(gradients(self.parameters.values()), self.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(self.updates)
        self.optimizer.step()
        self.updates += 1
        self.skipped_in_a_row = 0
        if self.average is not None:
            self.average.update(self.updates)

    def validate(self, batches: Iterable[Batch]) -> Totals:
        """Sums over whole validation splits, with the averaged weights where there are some."""
        totals = Totals([t.name for t in self.tasks], self.device)
        if self.average is not None:
            self.average.swap()
        self.potential.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    self._backward(batch.to(self.device, self._dtype), self._counts([batch]), totals)
        finally:
            self.potential.train()
            if self.average is not None:
                self.average.swap()
        return totals

    def _add_errors(self, totals: Totals, task: Task, batch: Batch, predicted: Prediction) -> None:
        """Errors in physical units."""
        natoms = batch.natoms[batch.slices[task.name][0]]
        stress = None if predicted.stress is None else predicted.stress * task.scale
        totals.errors[task.name].add(
            predicted.energy * task.scale, predicted.forces * task.scale, stress, batch.targets[task.name], natoms
        )

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def sum_counts(batch: Batch, task: str, device: torch.device) -> Tensor:
    """(S, A, V) of one task in one batch."""
    targets: Targets = batch.targets[task]
    return label_counts(targets).to(device)
