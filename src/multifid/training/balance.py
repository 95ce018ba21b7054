"""How the tasks of a run are balanced, step by step: `train.balance`. Off unless it is asked for.

Methods that weigh losses multiply the weights w_t of the objective, for encoder and branches alike:

    uncertainty   1 / b_t of L_t / b_t + log b_t, with b_t learned (Kendall et al. 2018, arXiv 1705.07115)
    average       tasks whose loss fell less lately weigh more (dynamic average: Liu et al. 2019, arXiv 1803.10704)
    gradnorm      gradients on the encoder get sizes by how far each loss has come (Chen et al. 2018, arXiv 1711.02257)
    famo          the logarithms of all losses fall at one rate (Liu et al. 2023, arXiv 2306.03792)

Methods that turn the gradient (`directions.py`: pcgrad, cagrad, nash, aligned, config) multiply the gradients of tasks
on the encoder alone; branches keep theirs. The coefficients follow from inner products, which another pass measures
(`task_gradients.py`). Then the step is made, each store's structures apart: every gradient that reaches a parameter of
the encoder is multiplied by its task's coefficient there, and summed over micro-batches and ranks as ever. So a rank
never holds gradients of single tasks, and the sums are those of one process.

L_t is task t's part of the objective of the step, over all ranks, before its weight. What is learned moves only with
updates that are made, is the same on all ranks, and is in the checkpoint by the name of the task.
"""

from collections.abc import Sequence
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.batch import Batch
from multifid.training.directions import coefficients
from multifid.training.settings import MEASURING
from multifid.training.step import Trainer
from multifid.training.task_gradients import TaskGradients

WINDOW = 50  # steps whose mean losses `average` compares
TEMPERATURE = 2.0  # of `average`
RESTORING = 1.5  # alpha of `gradnorm`
LEAST = 0.01  # weight that `gradnorm` gives
DECAY = 1e-3  # gamma of `famo`
STEEPEST = 10.0  # slope of `uncertainty`, lest one step's loss puts a task to sleep


class Balance:
    """Weights of tasks beside those of the config. This one, and all that methods have in common: all 1."""

    turns = False  # the gradient on the encoder: needs each store's structures apart
    begin_with: dict[str, float] = {}  # noqa: RUF012  what is kept of each task, before the first step

    def __init__(self, trainer: Trainer, rate: float, every: int | None, gradients: TaskGradients | None) -> None:
        """rate: of learning.  every: steps between measurements; None: the method's own. gradients: what measures."""
        self.trainer, self.rate, self.every, self.gradients = trainer, rate, every, gradients
        self.base = trainer.weights.clone()
        self.steps = 0  # that were begun
        self.kept = {name: torch.full_like(self.base, value) for name, value in self.begin_with.items()}

    def begin(self, batches: Sequence[Batch], counts: Tensor) -> None:
        """Before a step: set the weights of its objective. counts (tasks, 4): labels of the whole step."""
        self.prepare(batches, counts)
        self.trainer.weights = self.base * self.weights()
        self.steps += 1

    def prepare(self, batches: Sequence[Batch], counts: Tensor) -> None:
        """Measure what weights depend on."""

    def weights(self) -> Tensor:
        """What multiplies the weights of the config in the step that begins: (tasks,)."""
        return torch.ones_like(self.base)

    def coefficients(self) -> list[float]:
        """What multiplies each task's gradient on the encoder besides."""
        return [1.0] * len(self.base)

    def passes(self, task: int | None) -> None:
        """A backward pass of one task begins; None: what comes now is left alone."""

    def end(self, batches: Sequence[Batch], counts: Tensor, losses: Tensor, moved: Tensor) -> None:
        """After a step: learn from its losses L_t (tasks,), if the update was made (`moved`, on the device)."""
        there = moved & (counts > 0).any(dim=1)
        for name, value in self.learned(batches, counts, losses, there).items():
            self.kept[name] = torch.where(moved, value, self.kept[name])

    def learned(self, batches: Sequence[Batch], counts: Tensor, losses: Tensor, there: Tensor) -> dict[str, Tensor]:
        """What is kept from now on, if the update was made. there: tasks with a label in the step."""
        return {}

    def due(self, every: int) -> bool:
        return self.steps % (self.every or every) == 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `restore` takes it back."""
        names = [task.name for task in self.trainer.tasks]
        of_task = zip(*(self.kept[name].tolist() for name in self.kept), strict=True)
        rows = [dict(zip(self.kept, row, strict=True)) for row in of_task] or [{} for _ in names]
        return {"steps": self.steps, "tasks": dict(zip(names, rows, strict=True))}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; tasks that join the run here begin anew."""
        self.steps = state["steps"]
        for k, task in enumerate(self.trainer.tasks):
            for name, value in state["tasks"].get(task.name, {}).items():
                self.kept[name][k] = value


class Uncertainty(Balance):
    """Weights 1 / b_t, the inverse scales of Laplace's (for squares: twice the variance of Gauss's) distribution.

    With s_t = log b_t the objective is sum_t w_t (exp(-s_t) L_t + s_t), lowest at b_t = L_t.
    """

    begin_with = {"s": 0.0}  # noqa: RUF012

    def weights(self) -> Tensor:
        return torch.exp(-self.kept["s"])

    def learned(self, batches: Sequence[Batch], counts: Tensor, losses: Tensor, there: Tensor) -> dict[str, Tensor]:
        slope = 1.0 - torch.exp(-self.kept["s"]) * losses
        return {"s": self.kept["s"] - self.rate * torch.where(there, slope.clamp(min=-STEEPEST), 0.0)}


class Average(Balance):
    """T softmax(r / 2) with r_t = mean loss of the last window / of the one before it."""

    begin_with = {"weight": 1.0, "before": 0.0, "sum": 0.0, "seen": 0.0}  # noqa: RUF012

    def weights(self) -> Tensor:
        return self.kept["weight"]

    def learned(self, batches: Sequence[Batch], counts: Tensor, losses: Tensor, there: Tensor) -> dict[str, Tensor]:
        total = self.kept["sum"] + torch.where(there, losses, 0.0)
        seen = self.kept["seen"] + there
        if not self.due(WINDOW):
            return {"sum": total, "seen": seen}
        before, mean = self.kept["before"], total / seen.clamp(min=1.0)
        ratio = torch.where((before > 0) & (seen > 0), mean / before.clamp(min=1e-30), 1.0)
        weight = len(ratio) * torch.softmax(ratio / TEMPERATURE, dim=0)
        nothing = torch.zeros_like(total)
        return {"weight": weight, "before": torch.where(seen > 0, mean, before), "sum": nothing, "seen": nothing}


class GradNorm(Balance):
    """A step of gradient descent on sum_t | m_t n_t - N r_t^alpha | / N after each measurement, then sum m_t = T.

    n_t is the norm of task t's gradient on the encoder at m_t = 1, N the mean of m_t n_t, r_t = (L_t / L_t(0)) by its
    mean. Measured on the whole encoder; the paper takes its last layer.
    """

    begin_with = {"weight": 1.0, "first": 0.0}  # noqa: RUF012

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.norms: Tensor | None = None  # in the step that was begun, if they were measured

    def prepare(self, batches: Sequence[Batch], counts: Tensor) -> None:
        self.norms = None
        if self.due(1):
            assert self.gradients is not None
            self.trainer.weights = self.base
            self.norms = self.gradients.products(batches, counts).diagonal().clamp(min=0.0).sqrt()

    def weights(self) -> Tensor:
        return self.kept["weight"]

    def learned(self, batches: Sequence[Batch], counts: Tensor, losses: Tensor, there: Tensor) -> dict[str, Tensor]:
        weight, first = self.kept["weight"], self.kept["first"]
        first = torch.where((first > 0) | ~there, first, losses)
        if self.norms is None:
            return {"first": first}
        number = there.sum().clamp(min=1)
        sizes = torch.where(there, weight * self.norms, 0.0)
        mean = (sizes.sum() / number).clamp(min=1e-300)
        pace = torch.where(there, losses / first.clamp(min=1e-300), 0.0)
        target = mean * (pace * number / pace.sum().clamp(min=1e-300)) ** RESTORING
        slope = torch.where(there, self.norms / mean * torch.sign(sizes - target), 0.0)
        weight = (weight - self.rate * slope).clamp(min=LEAST)
        return {"first": first, "weight": weight * len(weight) / weight.sum()}


class Famo(Balance):
    """T c z_t / L_t with z = softmax(xi) and c = 1 / sum_t z_t / L_t; xi goes down the gains of log L_t, weighted by z.

    Losses are computed before the step and after it, on its structures: two forward passes more.
    """

    begin_with = {"xi": 0.0}  # noqa: RUF012

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.before = torch.ones_like(self.base)
        self.there = torch.ones_like(self.base, dtype=torch.bool)

    def prepare(self, batches: Sequence[Batch], counts: Tensor) -> None:
        self.there = (counts > 0).any(dim=1)
        self.before = self.trainer.losses(batches, counts)

    def weights(self) -> Tensor:
        z = self._softmax(self.there) / self.before.clamp(min=1e-8)
        return torch.where(self.there, len(z) * z / z.sum().clamp(min=1e-300), 1.0)

    def learned(self, batches: Sequence[Batch], counts: Tensor, losses: Tensor, there: Tensor) -> dict[str, Tensor]:
        after = self.trainer.losses(batches, counts)
        gain = torch.where(there, torch.log(self.before.clamp(min=1e-8)) - torch.log(after.clamp(min=1e-8)), 0.0)
        z = self._softmax(there)
        slope = z * (gain - (z * gain).sum())
        return {"xi": self.kept["xi"] - self.rate * (slope + DECAY * self.kept["xi"])}

    def _softmax(self, there: Tensor) -> Tensor:
        """Over the tasks that are in the step."""
        return torch.softmax(torch.where(there, self.kept["xi"], -torch.inf), dim=0).nan_to_num()


class Direction(Balance):
    """Coefficients of the gradients on the encoder, by a method of `directions.py`."""

    turns = True
    begin_with = {"coefficient": 1.0}  # noqa: RUF012

    def __init__(self, method: str, seed: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.method, self.seed = method, seed
        self.now: float | None = None  # of the task whose gradient is on its way; None: left alone
        me = ref(self)  # the garbage collector does not see what hooks of parameters hold

        def turned(slope: Tensor) -> Tensor | None:
            return None if (here := me()) is None or here.now is None else slope * here.now

        for parameter in self.trainer.potential.encoder.parameters():
            if parameter.requires_grad:
                parameter.register_hook(turned)

    def prepare(self, batches: Sequence[Batch], counts: Tensor) -> None:
        if not self.due(1):
            return
        assert self.gradients is not None
        products = self.gradients.products(batches, counts).cpu().numpy()
        found = coefficients(self.method, products, f"{self.seed} {self.steps}")
        first = self.trainer.world.first  # hosts may round otherwise: one rank decides
        mine = torch.from_numpy(found if first else np.zeros_like(found)).to(self.base.device)
        self.kept["coefficient"] = self.trainer.world.sum_(mine)

    def coefficients(self) -> list[float]:
        return self._of_tasks

    def weights(self) -> Tensor:
        self._of_tasks = self.kept["coefficient"].tolist()  # read once in a step
        return super().weights()

    def passes(self, task: int | None) -> None:
        self.now = None if task is None else self._of_tasks[task]


WEIGHTS = {"uncertainty": Uncertainty, "average": Average, "gradnorm": GradNorm, "famo": Famo}


def balance_of(
    method: str, trainer: Trainer, of_ranks: list[list[int]], rate: float, every: int | None, seed: int
) -> Balance | None:
    """What balances the tasks of a trainer; None: nothing.

    of_ranks: tasks of each rank, as by `tasks_of_ranks`. While it measures, a rank holds its tasks' gradients on a part
    of the encoder: as many bytes as one whole gradient of it, or as a bucket if that is more, however many the tasks;
    and once more as much from other ranks. ValueError where there is no gradient to measure.
    """
    if method == "none":
        return None
    gradients = None
    if method in MEASURING:
        gradients = TaskGradients(trainer, of_ranks)
        gradients = TaskGradients(trainer, of_ranks, max(gradients.held, gradients.whole))
        if not gradients.chunks:
            raise ValueError(f"train.balance: {method} is about the encoder's gradients, and the encoder does not move")
    if method in WEIGHTS:
        return WEIGHTS[method](trainer, rate, every, gradients)
    return Direction(method, seed, trainer, rate, every, gradients)
