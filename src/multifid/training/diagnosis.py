"""What every k-th step is asked besides: how the tasks pull at the encoder. The rows are in RUN/diagnosis.jsonl.

    norm      |g_t|, the norm of the gradient of w_t L_t on the encoder
    cosines   g_t . g_u / |g_t| |g_u|: below zero, a step along one task's gradient harms the other
    share     g_t . g / |g|^2 with g = sum_t g_t, under the coefficients of a balance if there is one: the part that a
              task has in the encoder's gradient; they add up to 1

The structures of the step are read once more, each store apart, and go forward and back once more, so a measured step
costs 1.2 to 1.5 steps more, whatever the number of tasks. The update is that of any step, bit for bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multifid.config import Config
from multifid.training.counts import Counts
from multifid.training.feed import Feed
from multifid.training.journal import Journal
from multifid.training.step import Trainer
from multifid.training.task_gradients import TaskGradients, tasks_of_ranks

NAME = "diagnosis.jsonl"
EVERY = 300  # steps: less than half a per cent of the time


@dataclass
class Diagnosis:
    """Measures every `every`-th step of a run. On all ranks; the journal is on rank 0."""

    trainer: Trainer
    feed: Feed
    gradients: TaskGradients
    every: int
    journal: Journal | None

    def step(self, step: int, counts: Counts) -> None:
        """Before a step (counted from 0) is made: measure it, if it is one of those. Called on all ranks."""
        if (step + 1) % self.every:
            return
        pieces = [[part] for piece in self.feed.pieces_of_step(step) for part in piece]
        batches = [self.trainer.ready(self.feed.batch(piece)) for piece in pieces]
        products = self.gradients.products(batches, counts.wait()[0])
        if self.journal is not None:
            names = [task.name for task in self.trainer.tasks]
            about = {"step": step + 1, "epoch": (step + 1) / self.feed.epoch_steps, "split": "train"}
            balance, weights = self.trainer.balance, self.trainer.weights.tolist()
            found = [1.0] * len(names) if balance is None else balance.coefficients()
            rows = rows_of(names, products, weights, found)
            self.journal.write([about | row for row in rows])

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()


def open_diagnosis(config: Config, trainer: Trainer, feed: Feed, step: int, first: bool) -> Diagnosis | None:
    """What measures a run that goes on at a step; None where nothing is to be measured. The same on all ranks."""
    asked = config.train.diagnose_every
    if asked is None or (asked == "auto" and not can_measure(config)):
        return None
    of_ranks = tasks_of_ranks([task.name for task in trainer.tasks], feed.placement, trainer.world.size)
    gradients = TaskGradients(trainer, of_ranks)
    if not gradients.chunks:  # the encoder does not move
        return None
    every = EVERY * len(gradients.chunks) if asked == "auto" else asked
    return Diagnosis(trainer, feed, gradients, every, Journal(Path(config.run), step, NAME) if first else None)


def can_measure(config: Config) -> bool:
    """Whether gradients of single tasks can be had, and would say anything."""
    return len(config.tasks) > 1 and not (config.parallel.shard_encoder or config.train.compile or config.train.capture)


def rows_of(
    tasks: Sequence[str], products: Tensor, weights: Sequence[float], coefficients: Sequence[float]
) -> list[dict[str, Any]]:
    """The row of each task, from the inner products of gradients (tasks, tasks). None where a gradient is zero.

    weights: w_t, with what a balance makes of them; coefficients: of the gradients on the encoder, in the step before.
    """
    table = products.cpu()
    norms = table.diagonal().clamp(min=0.0).sqrt()
    c = torch.tensor(coefficients, dtype=torch.float64)
    combined = c[:, None] * table * c
    whole = float(combined.sum())
    out = []
    for k, task in enumerate(tasks):
        cosines = table[k] / (norms[k] * norms)
        share = float(combined[k].sum()) / whole if whole > 0 else math.nan
        out.append(
            {
                "task": task,
                "norm": float(norms[k]),
                "share": share if math.isfinite(share) else None,
                "weight": weights[k],
                "coefficient": coefficients[k],
                "cosines": {
                    other: float(x) if math.isfinite(x) else None
                    for other, x in zip(tasks, torch.clamp(cosines, -1.0, 1.0).tolist(), strict=True)
                    if other != task
                },
            }
        )
    return out
