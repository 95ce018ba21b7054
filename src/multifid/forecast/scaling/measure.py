"""Steps of real training, timed part by part, on the ranks of one launch.

A rank's clock is told by the trainer which part of a step begins. What a rank waits for the others inside a reduction
is told apart from the reduction itself by the times that all ranks spent computing.

Machines that are shared change their pace within a minute. So the epochs of all points are measured in turns, and what
`multifid scaling` compares has seen the same hours.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from multifid.config import Config
from multifid.feed.loader import Source, ahead, open_sources
from multifid.parallel.devices import use
from multifid.parallel.groups import World
from multifid.training.build import build
from multifid.training.counts import announced
from multifid.training.feed import Feed, Step, lists_of, make_draws
from multifid.training.resolve import placement_of
from multifid.training.step import Totals, Trainer

PHASES = ("data", "forward", "backward", "communication", "waiting", "optimizer", "bookkeeping")
PLACEMENTS = ("replicated", "split")
WARM = 3  # steps before an epoch that is measured
Mode = Literal["weak", "strong"]


@dataclass(frozen=True)
class ScalingPoint:
    """One combination that is measured, or forecast."""

    mode: Mode
    placement: str
    ranks: int
    batch: float  # structures of a step, over all tasks and ranks


@dataclass(frozen=True)
class MeasuredPoint:
    """Seconds of a step at a point, in the mean over epochs and ranks."""

    point: ScalingPoint
    step: float
    phases: dict[str, float]  # sum: step
    epochs: list[float]  # seconds of each epoch
    spread: float  # standard deviation of the ranks' computing times in a step, as a part of their mean
    edge: float  # seconds to prepare a batch, for each of its edges
    edges: float  # of a step, all ranks together, in the mean

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def and_(self, other: "MeasuredPoint") -> "MeasuredPoint":
        """The same point with the epochs of both."""
        assert self.point == other.point, f"{self.point} and {other.point} cannot be averaged"
        epochs = [*self.epochs, *other.epochs]
        part = len(other.epochs) / len(epochs)

        def mean(a: float, b: float) -> float:
            return a + part * (b - a)

        return MeasuredPoint(
            point=self.point,
            step=mean(self.step, other.step),
            phases={phase: mean(seconds, other.phases[phase]) for phase, seconds in self.phases.items()},
            epochs=epochs,
            spread=mean(self.spread, other.spread),
            edge=mean(self.edge, other.edge),
            edges=mean(self.edges, other.edges),
        )

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "MeasuredPoint":
        return MeasuredPoint(**(values | {"point": ScalingPoint(**values["point"])}))


@dataclass
class Clock:
    """Seconds by the part of a step that they were spent in."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    phase: str | None = None
    since: float = 0.0

    def begins(self, phase: str | None) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        if self.phase is not None:
            self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def take(self) -> list[float]:
        """What has been counted, and begin anew."""
        out = [self.seconds[phase] for phase in PHASES]
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return out


def points(ranks: int, tasks: int, local_batch: float, global_batch: float) -> list[ScalingPoint]:
    """What is measured on one number of ranks; one rank knows one placement only."""
    names = PLACEMENTS if ranks > 1 else PLACEMENTS[:1]
    batches: list[tuple[Mode, float]] = [("weak", local_batch * ranks), ("strong", global_batch)]
    for mode, batch in batches:
        if batch < tasks:
            raise ValueError(
                f"{mode} scaling, ranks: {ranks}: {batch:g} structures a step are fewer than {tasks} tasks"
            )
    return [ScalingPoint(mode, name, ranks, batch) for mode, batch in batches for name in names]


def measure(
    config: Config, wanted: Sequence[ScalingPoint], world: World, epochs: Iterable[int], epoch_steps: int
) -> list[MeasuredPoint]:
    """Train at every point, some epochs each, in turns; nothing is written.

    epochs: their numbers; all points see the same structures in an epoch, and others in the next.
    """
    sources = open_sources(config.tasks, config.train.verify)
    for point in wanted:  # what a process does for the first time is nobody's epoch
        _measure(config, sources, point, world, 0, WARM)
    found: dict[ScalingPoint, MeasuredPoint] = {}
    for epoch in epochs:
        for point in wanted:
            one = _measure(config, sources, point, world, epoch, epoch_steps)
            found[point] = found[point].and_(one) if point in found else one
    return [found[point] for point in wanted]


def at_point(config: Config, point: ScalingPoint) -> Config:
    """The config with the batch and the placement of a point."""
    train = config.train.model_copy(update={"batch": point.batch / len(config.tasks), "local_batch": None})
    parallel = config.parallel.model_copy(update={"placement": point.placement, "ranks": None})
    return config.model_copy(update={"train": train, "parallel": parallel})


def _measure(
    config: Config, sources: list[Source], point: ScalingPoint, world: World, epoch: int, epoch_steps: int
) -> MeasuredPoint:
    config = at_point(config, point)
    draws = make_draws(config, sources)
    placement = world.share(placement_of(config, sources, draws, world.size))
    feed = Feed(config, sources, draws, placement, world.rank, lists_of(config.train.neighbors, world.device))
    trainer = build(config, sources, placement, epoch_steps, world)
    clock = Clock(world.device)
    trainer.begins = clock.begins
    edge = _preparing(feed)
    steps = range(epoch * epoch_steps, (epoch + 1) * epoch_steps + WARM)
    rows = np.array(_steps(trainer, feed, clock, steps, config.train.workers))[WARM:]
    table = _of_all_ranks(rows, world)
    return _summary(point, table[:, :, :-1], edge, float(table[:, :, -1].sum(axis=0).mean()))


def _steps(trainer: Trainer, feed: Feed, clock: Clock, steps: range, workers: int) -> list[list[float]]:
    """Seconds of every part of every step on this rank, and its edges: (steps, parts + 1)."""
    rows = []

    def prepared(step: int) -> Step:
        made = feed.step(step)
        return made._replace(batches=[trainer.ready(batch) for batch in made.batches])

    made = ahead(prepared, steps.start, steps.stop, workers, begin=partial(use, trainer.device))
    counted = announced(made, lambda step: trainer.counts(step.batches, step.known))
    for _ in steps:
        clock.begins("data")
        (micro, *_), counts = next(counted)
        trainer.step(micro, Totals([t.name for t in trainer.tasks], trainer.device), counts)
        clock.begins(None)
        rows.append([*clock.take(), float(sum(batch.edges.shape[1] for batch in micro))])
    return rows


def _preparing(feed: Feed) -> float:
    """Seconds to prepare a batch, for each of its edges."""
    feed.step(0)  # touches the files
    started = time.perf_counter()
    micro = feed.step(1).batches
    return (time.perf_counter() - started) / max(sum(batch.edges.shape[1] for batch in micro), 1)


def _of_all_ranks(rows: np.ndarray, world: World) -> np.ndarray:
    """(ranks, steps, parts + 1), on every rank."""
    table = torch.zeros(world.size, *rows.shape, dtype=torch.float64)
    table[world.rank] = torch.from_numpy(rows)
    return world.group.sum_(table).numpy()


def _summary(point: ScalingPoint, table: np.ndarray, edge: float, edges: float) -> MeasuredPoint:
    """Of one epoch."""
    part = {phase: table[:, :, k] for k, phase in enumerate(PHASES)}
    computing = part["data"] + part["forward"] + part["backward"]  # (ranks, steps)
    waiting = float((computing.max(axis=0) - computing.mean(axis=0)).mean())
    phases = {phase: float(seconds.mean()) for phase, seconds in part.items()}
    phases["waiting"] = min(waiting, phases["communication"])
    phases["communication"] -= phases["waiting"]
    steps = table.sum(axis=2).mean(axis=0)
    passes = part["forward"] + part["backward"]
    spread = float((passes.std(axis=0) / passes.mean(axis=0)).mean())
    return MeasuredPoint(point, float(steps.mean()), phases, [float(steps.sum())], spread, edge, edges)
