"""One update: count, predict, back-propagate, sum, clip, move. And the same without the moving, for validation.

Each rank does this with its structures of the step. The counts of labels of the whole step are known to all before it
begins, or were sent while the step before was made (see `counts.py`). Summed over ranks are gradients during the
backward pass (see `parallel/gradients.py`), and a report after it: loss sums, the squared norm, and whether anybody was
told to stop. All ranks decide the same from the same bits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from multifid.evaluation.matrix import Row
from multifid.evaluation.metrics import SIZE, counts_and_means, error_sums
from multifid.feed.loader import collate
from multifid.graphs.batch import Batch, BatchLabels, laid_out
from multifid.graphs.graph import completed
from multifid.graphs.padding import pad
from multifid.model.potential import Potential
from multifid.parallel.gradients import Gradients
from multifid.parallel.groups import Group
from multifid.parallel.reduce import sum_together
from multifid.training.counts import Counts, Known
from multifid.training.finetune import Pull
from multifid.training.loss import (
    COLUMNS,
    ObjectiveConfig,
    TaskTerms,
    in_rows,
    label_counts,
    loss_sums,
    task_objectives,
)
from multifid.training.optimizer import MovingAverage, Named, Schedule, update
from multifid.training.outcome import Outcome
from multifid.training.recorded import Recordings

if TYPE_CHECKING:
    from multifid.training.balance import Balance

ENCODER = "encoder"
WIDE = len(COLUMNS)
EMPTY_BATCH = laid_out(collate([], cutoff=1.0), {})  # a batch without structures


def part_of_branch(branch: str) -> str:
    """The name of a branch as a part of the model, in checkpoints and in the order of reductions."""
    return f"branch-{branch}"


@dataclass(frozen=True)
class Task:
    """What the objective knows of a task."""

    name: str
    weight: float
    scale: float  # eV/angstrom, divides every residual
    unit: float  # eV/angstrom, of what its branch predicts
    loss: str | None = None  # None: that of the objective


class Totals:
    """Sums over steps, or over a validation split, for each task: what the journal reports."""

    def __init__(self, tasks: list[str], device: torch.device) -> None:
        self.tasks = tasks
        # Of each task: sums of the loss by column (4), what they are divided by (4), errors (as in `Errors`).
        self.sums = torch.zeros(len(tasks), 2 * WIDE + SIZE, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, counts: Tensor, errors: Tensor) -> None:
        """Add a batch: (tasks, 4), (tasks, 4) and (tasks, 15)."""
        self.sums += torch.cat([loss.detach(), counts, errors], dim=1)

    def objectives(self) -> dict[str, float]:
        """Each task's part of the objective over everything added, before its weight. Waits for the device, once."""
        return dict(
            zip(self.tasks, task_objectives(self.sums[:, :WIDE], self.sums[:, WIDE : 2 * WIDE]).tolist(), strict=True)
        )

    def labels(self, objective: ObjectiveConfig) -> float:
        """How many labels were added, of the kinds that have weight. Waits for the device."""
        counted = [self.sums[:, WIDE + k].sum() for k, name in enumerate(COLUMNS) if getattr(objective, name) > 0]
        return float(sum(counted))

    def errors(self) -> dict[str, Row]:
        """Counts and errors of each task over everything added. Waits for the device, once."""
        return {
            task: counts_and_means(sums)
            for task, sums in zip(self.tasks, self.sums[:, 2 * WIDE :].tolist(), strict=True)
        }

    def as_tensor(self) -> Tensor:
        """All sums in one tensor (tasks, 23), a copy, to be added over ranks or kept in a checkpoint."""
        return self.sums.clone()

    def add_tensor(self, sums: Tensor) -> None:
        """Add what `as_tensor` gave, of other steps or summed over ranks."""
        self.sums += sums.to(self.sums.device)


def pinned(x: Tensor) -> Tensor:
    """The same numbers where an accelerator can fetch them by itself; what it holds already stays there."""
    return x.pin_memory() if x.device.type == "cpu" else x


def unwatched(phase: str) -> None:
    """The no-op callback for the phases of a step."""


@dataclass
class Norms:
    """Norms of the gradient, before clipping, over some updates, and how many updates were skipped among them."""

    total: float = 0.0
    updates: int = 0
    skipped: int = 0

    def add(self, outcome: Outcome) -> None:
        if outcome.updated:
            self.total += outcome.norm
            self.updates += 1
        else:
            self.skipped += 1

    @property
    def mean(self) -> float | None:
        return self.total / self.updates if self.updates else None

    @property
    def state(self) -> list[float]:
        """For a checkpoint; `Norms(*state)` gives it back."""
        return [self.total, self.updates, self.skipped]


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
    pull: Pull | None = None  # towards the weights that a fine-tuned model began with
    padded: bool = False  # batches have few sizes, for a potential that is compiled, or passes that are recorded
    recordings: Recordings | None = None  # of forward and backward passes
    balance: "Balance | None" = None  # of tasks: sets `weights` for each step
    updates: int = 0  # updates made; steps that were skipped do not count
    skipped_in_a_row: int = 0
    stopped: bool = False  # some rank was told to stop, as far as all ranks know
    begins: Callable[[str], None] = unwatched  # is told which part of a step begins: forward, backward, ...
    pending: Outcome | None = None  # of the last step, where the host does not yet know of it
    norms: Norms = field(default_factory=Norms)  # of the steps since somebody last began them anew

    def __post_init__(self) -> None:
        self.number = {task.name: k for k, task in enumerate(self.tasks)}
        tasks = self.tasks
        losses = [t.loss or self.objective.loss for t in tasks]
        self.terms = TaskTerms.of([t.scale for t in tasks], [t.unit for t in tasks], losses, self.device)
        self.weights = torch.tensor([t.weight for t in tasks], dtype=torch.float64).to(self.device)
        # Positions, whose gradient gave forces, are leaves too, but nobody asks for the gradient of the loss there. The
        # leaves of an encoder in pieces are FSDP's own.
        moving = [p for p in self.parameters.values() if p.requires_grad]
        self._reached = moving if self.gradients.shards is None else None
        # Where a step is over when the host has computed it, there is nothing to wait for.
        self.at_once = self.device.type == "cpu"

    def step(
        self, micro_batches: list[Batch], totals: Totals, counts: Counts | None = None, stop: bool = False
    ) -> Outcome:
        """One update from this rank's structures of one step; `totals` receives the sums of all ranks.

        counts: of this step, as by `counts`; None: all ranks are asked now. stop: this rank was told to; when all know
        of it, which on an accelerator is one step later, `stopped` is set on all of them.

        An update whose gradient or loss is not finite is skipped: weights, moments, averages and schedule stay as they
        were, and the position in the data advances. An accelerator decides that by itself; the host reads it at the
        next step, or from `settle`, and never waits for a step that it has just begun.
        """
        self.begins("bookkeeping")
        micro_batches = [self.ready(batch) for batch in micro_batches]
        counts = self.counts(micro_batches) if counts is None else counts
        self.begins("communication")
        whole, rounds = counts.wait()
        self.begins("bookkeeping")
        if self.balance is not None:
            self.balance.begin(micro_batches, whole)
            rounds = max(1, len(micro_batches)) if self.balance.turns else rounds
        here = Totals([t.name for t in self.tasks], self.device)
        self.gradients.zero()
        for k in range(rounds):
            batch = micro_batches[k] if k < len(micro_batches) else EMPTY_BATCH  # others have more of them
            if batch.structures or self.gradients.shards is not None:  # whose collectives need all ranks
                self._backward(batch, whole, here, last=k == rounds - 1)
            elif k == rounds - 1:
                self.gradients.start(None)
        self.begins("communication")
        self.gradients.finish()
        self.begins("bookkeeping")
        squares = self.gradients.squared_norm()
        parts = {"squares": squares, "totals": here.as_tensor(), "stop": squares.new_full((), float(stop))}
        self.begins("communication")
        report = sum_together(self.world, parts)
        self.begins("bookkeeping")
        totals.add_tensor(report["totals"])
        self.begins("optimizer")
        self.settle()
        losses, counted = report["totals"][:, :WIDE], report["totals"][:, WIDE : 2 * WIDE]
        # The slope of |x| is 0 at NaN, so that a loss may be NaN and its gradient finite.
        squares = report["squares"] + 0.0 * losses.sum()
        self._update(squares)
        if self.balance is not None:
            self.balance.end(micro_batches, whole, task_objectives(losses, counted), torch.isfinite(squares))
        self.pending = Outcome(squares, report["stop"], (counted != whole).any())
        outcome = self.pending
        if self.at_once:
            self.settle()
        return outcome

    def ready(self, batch: Batch) -> Batch:
        """A batch as a step wants it; the threads that prepare batches do it ahead, and then it is done."""
        if batch.labels is not None:
            return batch
        batch = completed(batch, self.potential.encoder.needs)
        batch = pad(batch, self.potential.config.cutoff) if self.padded else batch
        batch = laid_out(batch, self.number).to(dtype=self._dtype)
        assert batch.labels is not None
        batch.labels.counts = label_counts(batch.labels, len(self.tasks))
        return batch if self.device.type == "cpu" else batch.moved(pinned)

    def settle(self) -> None:
        """Hear what became of the last step, if that is not yet known: count it, and average the weights it made.

        Called before anything looks at counts, averages or the schedule, and before the next update. RuntimeError, on
        all ranks alike, where they processed other labels than all of them were sure of.
        """
        if self.pending is None:
            return
        outcome, self.pending = self.pending, None
        if outcome.miscounted:
            raise RuntimeError(
                "the ranks processed other labels than the step holds: they do not see the same stores, or their "
                "processors estimate costs differently; nothing of this step is in a checkpoint"
            )
        self.norms.add(outcome)
        self.stopped = self.stopped or outcome.stop
        if not outcome.updated:
            self.skipped_in_a_row += 1
            return
        self.updates += 1
        self.skipped_in_a_row = 0
        if self.average is not None:
            self.average.update(self.updates)

    def counts(self, micro_batches: list[Batch], known: Known | None = None) -> Counts:
        """The counts of a step over all ranks, from its batches, which are ready; what is not known begins to travel.

        Called on all ranks, for step after step, with what all of them know (None: nothing).
        """
        tasks = len(self.tasks)

        def own() -> np.ndarray:
            counts = np.zeros((tasks, WIDE))
            for batch in micro_batches:
                assert batch.labels is not None, "only batches that are ready have their labels in rows"
                counts += self.labels_of(batch.labels).cpu().numpy()
            return counts

        return Counts(own, len(micro_batches), known or Known.nothing(tasks), self.world, self.device)

    def labels_of(self, labels: BatchLabels) -> Tensor:
        """How many labels each task has, (tasks, 4), counted when the batch was made ready; an empty one has none."""
        return label_counts(labels, len(self.tasks)) if labels.counts is None else labels.counts

    def _sums(self, batch: Batch, totals: Totals) -> Tensor:
        """Loss sums (tasks, 4) of a batch that is ready; they and the errors are added to the totals."""
        batch, predicted = self.predicted(batch)
        labels = batch.labels
        assert labels is not None
        sums = loss_sums(self.objective, predicted, labels, self.terms)
        errors = error_sums(self._physical(predicted, labels), labels, len(self.tasks))
        totals.add(sums, self.labels_of(labels), errors)
        return sums

    def losses(self, micro_batches: Sequence[Batch], counts: Tensor) -> Tensor:
        """Each task's part of the objective of a step, before its weight, over all ranks: (tasks,) float64."""
        here = Totals([t.name for t in self.tasks], self.device)
        with torch.no_grad():
            for batch in micro_batches:
                self._sums(batch, here)
        return task_objectives(self.world.sum_(here.as_tensor()[:, :WIDE].contiguous()), counts)

    def predicted(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        """A batch that is ready, on the device, and what the potential says of its rows of labels, in scaled units."""
        batch = batch.to(self.device, self._dtype)
        assert batch.labels is not None, "only batches that are ready have their labels in rows"
        with self._autocast():
            predictions = self.potential(batch, stress=self.objective.stress > 0)
        return batch, in_rows(predictions, batch.labels)

    def _backward(self, batch: Batch, counts: Tensor, totals: Totals, last: bool) -> None:
        """Back-propagate this batch's share of the objective: its sums over the counts of the whole step."""
        if self.recordings is None:
            self._passes(batch, counts, totals, last)
            return
        self.begins("forward")
        batch = batch.to(self.device, self._dtype)
        self.recordings.run(batch, counts, totals.sums, self._passes_for_sums)
        if last:
            self.gradients.start(None)

    def _passes_for_sums(self, batch: Batch, counts: Tensor, sums: Tensor) -> None:
        """What is recorded: nothing that the host has to do each time."""
        here = Totals([t.name for t in self.tasks], self.device)
        self._passes(batch, counts, here, last=False)
        sums += here.sums

    def _passes(self, batch: Batch, counts: Tensor, totals: Totals, last: bool) -> None:
        self.begins("forward")
        shares = self.weights * task_objectives(self._sums(batch, totals), counts)  # of the objective
        turned = self.balance is not None and self.balance.turns  # then the encoder hears of one task at a time
        parts = [(self.number[t], shares[self.number[t]]) for t in batch.slices] if turned else [(None, shares.sum())]
        for k, (task, share) in enumerate(parts, start=1):
            if self.gradients.shards is not None:
                share = share + self.gradients.shards.touch()
            self.begins("backward")
            if last and k == len(parts):
                self.gradients.start(share)
            if self.balance is not None:
                self.balance.passes(task)
            if share.requires_grad:  # not where no structure here has a label that counts
                share.backward(retain_graph=k < len(parts), inputs=self._reached)
        if self.balance is not None:
            self.balance.passes(None)

    def _update(self, squared_norm: Tensor) -> None:
        """Clip and move, unless the norm is not finite: decided where the gradients are."""
        lr, norm = self.lr * self.schedule(self.updates), squared_norm.sqrt()
        update(self.optimizer, lr, norm, self.clip)
        if self.pull is not None:
            self.pull(lr, norm)

    def validate(self, batches: Iterable[Batch]) -> Totals:
        """Sums over whole validation splits, with the averaged weights where there are some.

        batches: this rank's part; how many there are may differ between ranks. The sums are those of all ranks.
        """
        here = Totals([t.name for t in self.tasks], self.device)
        with self.looking(averaged=True):
            for batch in self.in_rounds(batches):
                self._sums(self.ready(batch), here)
        totals = Totals(here.tasks, self.device)
        totals.add_tensor(self.world.sum_(here.as_tensor()))
        return totals

    @contextmanager
    def looking(self, averaged: bool) -> Iterator[None]:
        """Nothing is trained inside; with `averaged` weights, where there are some. Called on all ranks."""
        self.settle()
        average = self.average if averaged else None
        if average is not None:
            average.swap()
        self.potential.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.potential.train()
            if self.gradients.shards is not None:
                self.gradients.shards.scatter()
            if average is not None:
                average.swap()

    def in_rounds(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; where all ranks must make the same number of passes, then nothing until no rank has any left."""
        if self.gradients.shards is None:
            yield from batches
            return
        for batch in chain(batches, repeat(None)):
            if not self.world.sum_(torch.tensor(float(batch is not None))):
                return
            yield EMPTY_BATCH if batch is None else batch

    def _physical(self, predicted: dict[str, Tensor], labels: BatchLabels) -> dict[str, Tensor]:
        """Predictions in physical units: times the unit of each row's branch."""
        out = {}
        for kind, values in predicted.items():
            rows = labels.rows(kind)
            assert rows is not None
            unit = self.terms.units.index_select(0, rows.owner)
            out[kind] = values.detach() * unit.reshape(-1, *[1] * (values.dim() - 1))
        return out

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()
