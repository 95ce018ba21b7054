"""One update: count, predict, back-propagate, sum, clip, move. And the same without the moving, for validation.

Each rank does this with its structures of the step. Three things are summed over ranks: the counts of labels before the
backward pass, gradients during it (see `parallel/gradients.py`), and a report after it: loss sums, the squared norm,
whether anybody was told to stop. All ranks decide the same from the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, repeat

import torch
from torch import Tensor

from multifid.data.loader import collate
from multifid.evaluate.metrics import Errors
from multifid.model.potential import Potential, Prediction
from multifid.parallel.gradients import Gradients
from multifid.parallel.groups import Group
from multifid.parallel.reduce import sum_together
from multifid.structures.batch import Batch
from multifid.train.loss import ObjectiveConfig, label_counts, loss_sums, objective
from multifid.train.optimizer import MovingAverage, Named, Schedule

ENCODER = "encoder"
NOTHING = collate([], cutoff=1.0)  # a batch without structures


def part_of_branch(branch: str) -> str:
    """The name of a branch as a part of the model, in checkpoints and in the order of reductions."""
    return f"branch-{branch}"


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

    def add_tensor(self, sums: Tensor) -> None:
        """Add what `as_tensor` gave, of other steps or summed over ranks."""
        for task, row in zip(self.tasks, sums.to(self.device), strict=True):
            self.loss[task] += row[:3]
            self.counts[task] += row[3:6]
            self.errors[task] += Errors.from_tensor(row[6:].clone())


@dataclass(frozen=True)
class Outcome:
    """What became of a step, on all ranks alike."""

    updated: bool  # False: the gradient was not finite, and nothing was changed
    norm: float  # of the gradient over encoder and all branches, before clipping
    stop: bool  # some rank was told to stop


def unwatched(phase: str) -> None:
    """Nobody wants to know which part of a step begins."""


@dataclass
class Trainer:
    """A potential with all that one update needs. Encoder and branches of this rank; all tasks of the run."""

    potential: Potential
    parameters: Named  # those that live here
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    average: MovingAverage | None
    objective: ObjectiveConfig
    tasks: list[Task]  # of the whole run, in one order on all ranks
    world: Group
    device: torch.device
    precision: str
    clip: float | None
    lr: float
    updates: int = 0  # updates made; steps that were skipped do not count
    skipped_in_a_row: int = 0
    begins: Callable[[str], None] = unwatched  # is told which part of a step begins: forward, backward, ...

    def step(self, micro_batches: list[Batch], totals: Totals, stop: bool = False) -> Outcome:
        """One update from this rank's structures of one step; `totals` receives the sums of all ranks.

        An update whose gradient is not finite is skipped: weights, moments, averages and schedule stay as they were,
        and the position in the data advances.
        """
        self.begins("bookkeeping")
        counts, rounds = self._counts(micro_batches)
        here = Totals([t.name for t in self.tasks], self.device)
        self.gradients.zero()
        for k in range(rounds):
            batch = micro_batches[k] if k < len(micro_batches) else NOTHING  # others have more of them
            if batch.structures or self.gradients.shards is not None:  # whose collectives need all ranks
                self._backward(batch, counts, here, last=k == rounds - 1)
            elif k == rounds - 1:
                self.gradients.start(None)
        self.begins("communication")
        self.gradients.finish()
        self.begins("bookkeeping")
        squares, told = self.gradients.squared_norm(), torch.tensor(float(stop), device=self.device)
        parts = {"squares": squares, "stop": told, "totals": here.as_tensor()}
        self.begins("communication")
        report = sum_together(self.world, parts)
        self.begins("bookkeeping")
        totals.add_tensor(report["totals"])
        norm = float(report["squares"].sqrt())
        updated = norm < float("inf")  # not NaN either: what is not finite on one rank is not finite in the sum
        self.begins("optimizer")
        if updated:
            self._update(norm)
        else:
            self.skipped_in_a_row += 1
        return Outcome(updated, norm, bool(report["stop"] > 0))

    def _counts(self, micro_batches: list[Batch]) -> tuple[dict[str, Tensor], int]:
        """(S_t, A_t, V_t) of the whole step, over micro-batches and ranks, and the most micro-batches of a rank."""
        table = torch.zeros(len(self.tasks), 3, dtype=torch.float64)
        for batch in micro_batches:
            for row, task in zip(table, self.tasks, strict=True):
                if task.name in batch.targets:
                    row += label_counts(batch.targets[task.name])
        rounds = torch.zeros(self.world.size)  # a place for each rank: the largest of a sum
        rounds[self.world.ranks.index(self.world.rank)] = len(micro_batches)
        self.begins("communication")
        summed = sum_together(self.world, {"counts": table, "rounds": rounds})
        self.begins("bookkeeping")
        table = summed["counts"].to(self.device)
        return {task.name: row for task, row in zip(self.tasks, table, strict=True)}, int(summed["rounds"].max())

    def _sums(self, batch: Batch, totals: Totals) -> dict[str, Tensor]:
        """Loss sums (3,) of every task in a batch; they and the errors are added to the totals."""
        batch = batch.to(self.device, self._dtype)
        with self._autocast():
            predictions = self.potential(batch, stress=self.objective.stress > 0)
        sums = {}
        for task in self.tasks:
            if task.name not in predictions:
                continue
            predicted = predictions[task.name]
            sums[task.name] = loss_sums(self.objective, batch, task.name, predicted, task.scale)
            totals.add(task.name, sums[task.name], label_counts(batch.targets[task.name]).to(self.device))
            self._add_errors(totals, task, batch, predicted)
        return sums

    def _backward(self, batch: Batch, counts: dict[str, Tensor], totals: Totals, last: bool) -> None:
        """Back-propagate this batch's share of the objective: its sums over the counts of the whole step."""
        self.begins("forward")
        sums = self._sums(batch, totals)
        shares = [objective(sums[t.name], counts[t.name], t.weight) for t in self.tasks if t.name in sums]
        if self.gradients.shards is not None:
            shares.append(self.gradients.shards.touch())
        share = torch.stack(shares).sum() if shares else None
        self.begins("backward")
        if last:
            self.gradients.start(share)
        if share is not None and share.requires_grad:  # not where no structure here has a label that counts
            share.backward()

    def _update(self, norm: float) -> None:
        if self.clip is not None and norm > self.clip:
            self.gradients.scale(self.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(self.updates)
        self.optimizer.step()
        self.updates += 1
        self.skipped_in_a_row = 0
        if self.average is not None:
            self.average.update(self.updates)

    def validate(self, batches: Iterable[Batch]) -> Totals:
        """Sums over whole validation splits, with the averaged weights where there are some.

        batches: this rank's part; how many there are may differ between ranks. The sums are those of all ranks.
        """
        here = Totals([t.name for t in self.tasks], self.device)
        if self.average is not None:
            self.average.swap()
        self.potential.eval()
        try:
            with torch.no_grad():
                for batch in batches if self.gradients.shards is None else self._in_rounds(batches):
                    self._sums(batch, here)
        finally:
            self.potential.train()
            if self.gradients.shards is not None:
                self.gradients.shards.scatter()
            if self.average is not None:
                self.average.swap()
        totals = Totals(here.tasks, self.device)
        totals.add_tensor(self.world.sum_(here.as_tensor()))
        return totals

    def _in_rounds(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, and then nothing until no rank has any left: all ranks make the same number of passes."""
        for batch in chain(batches, repeat(None)):
            if not self.world.sum_(torch.tensor(float(batch is not None))):
                return
            yield NOTHING if batch is None else batch

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
