"""What each task really costs on the ranks at hand: a few trial steps before a run, for `parallel.costs: measured`.

One branch stands for all, so that a rank holds no more than it will hold in the run. All ranks step together, on
different structures of the same task, through the lines that the run will go through: slow kernels for its sizes of
structures, sums over the network and ranks that share a memory bus are in the seconds. Weights, places and random
numbers of the run know nothing of it.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from multifid.config import Config
from multifid.feed.loader import Source, collate, edge_costs, pieces
from multifid.feed.order import Draw
from multifid.graphs.batch import Batch
from multifid.parallel.groups import World
from multifid.parallel.layout import Load
from multifid.training.build import build
from multifid.training.costs import loads, mean_edges
from multifid.training.step import EMPTY_BATCH, Totals, Trainer

TURNS = 3  # steps of every kind, of which the shortest counts; one before them is not looked at
LEAST = 1e-3  # a task costs at least this part of the dearest one: a difference of two times may be nothing


def measured(config: Config, sources: list[Source], draws: list[Draw], world: World) -> dict[str, Load]:
    """The load of every task in a mean step, in seconds; bytes are counted. Called on all ranks, the same on all.

    The cost of a task is what a rank's even share of a step takes longer than a step without structures, from the
    estimated edges of that share carried over to a mean step. Holding a branch costs its part of a step without
    structures: sums, clipping, AdamW, average.
    """
    plain = config.train.model_copy(update={"balance": "none"})
    one_branch = config.model_copy(update={"branches": "shared", "init": None, "train": plain})
    everywhere = {task: list(range(world.size)) for source in sources for task in source.tasks}
    trainer = build(one_branch, sources, everywhere, 1, world)
    empty = _seconds(trainer, [EMPTY_BATCH], world)
    branch = sum(p.numel() for _, p in trainer.potential.branch_parameters("shared"))
    held = sum(p.numel() for p in trainer.parameters.values())
    cost = {}
    for source, draw in zip(sources, draws, strict=True):
        chosen = trial(source, max(1, round(float(draw.rate) / world.size)), world.rank)
        batches = [
            collate(piece, config.model.cutoff)
            for piece in pieces([(source, chosen)], config.model.cutoff, config.train.max_edges)
        ]
        seconds = _seconds(trainer, batches, world) - empty
        edges = world.group.sum_(torch.tensor(edge_costs(source, chosen, config.model.cutoff).sum())) / world.size
        times = float(draw.rate) * mean_edges(source, config.model.cutoff) / max(float(edges), 1.0)
        cost[draw.name] = max(seconds, 0.0) * times
    least = max(LEAST * max(cost.values()), 1e-9)
    estimated = loads(config, sources, draws)
    return {
        task: Load(
            cost=max(cost[draw.name], least) / len(draw.tasks),
            holding=0.0 if config.branches == "shared" else empty * branch / held,
            bytes=estimated[task].bytes,
            spread=estimated[task].spread,
        )
        for draw in draws
        for task in draw.tasks
    }


def trial(source: Source, structures: int, rank: int) -> np.ndarray:
    """Some of a train split (structures,), others on every rank: spread over the split, repeated if need be."""
    size = source.store.size("train")
    return source.store.pick("train", (np.arange(structures) * size // structures + rank) % size)


def _seconds(trainer: Trainer, batches: list[Batch], world: World) -> float:
    """The shortest of a few steps, in the mean over ranks: the same number on all."""
    totals = Totals([task.name for task in trainer.tasks], trainer.device)
    batches = [trainer.ready(batch) for batch in batches]  # as in the run: prepared and counted before the step begins
    counts = trainer.counts(batches)
    counts.wait()
    times = [_timed(lambda: trainer.step(batches, totals, counts), trainer.device, world) for _ in range(1 + TURNS)][1:]
    return float(world.group.sum_(torch.tensor(min(times), dtype=torch.float64))) / world.size


def _timed(step: Callable[[], object], device: torch.device, world: World) -> float:
    """Seconds of a step that all ranks begin at the same moment."""
    world.group.sum_(torch.zeros(1))
    begun = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begun
