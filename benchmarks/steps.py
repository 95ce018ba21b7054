"""How much the steps of a run differ, and what of their time a rank would wait for others and for data.

    python benchmarks/steps.py CONFIG [KEY=VALUE ...] [--ranks 1 2 4] [--steps 12] [--budgets 8000 4000]

No ranks are started: one process takes the place of each in turn, with the structures that it would process, and counts
processor time of its one thread, so that other work on the machine does not count. A rank waits in a step for as long
as the slowest one takes longer. Printed are

    edges        of each task in a step: mean, and standard deviation by the mean
    steps        the same of all edges of a step, and of the time that it takes on one rank
    waiting      part of the ranks' time, because others take longer, and what the edges alone say of it; time to
                 prepare the batches (draw, read, lists: threads ahead do it) by the time of the steps
    budgets      `train.max_edges`: micro-batches of a step on one rank, edges of the largest by the mean step's, time
                 of a step by that without a budget
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from multifid.config import Config, load_config
from multifid.feed.loader import Source, open_sources
from multifid.parallel.groups import world
from multifid.training.build import build
from multifid.training.feed import Feed, make_draws
from multifid.training.resolve import placement_of, resolve, with_properties
from multifid.training.step import Totals, Trainer


class Cost(NamedTuple):
    """Of one step on one rank."""

    edges: dict[str, int]  # by task
    largest: int  # edges of the largest micro-batch
    batches: int
    seconds: float
    preparing: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="of each step: the fastest counts")
    parser.add_argument("--budgets", type=int, nargs="*", default=[8000, 4000], help="edges of a micro-batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(args.config, args.overrides)
    with world("cpu") as alone:
        sources = open_sources(config.tasks)
        config = with_properties(resolve(config, 1), sources)
        draws = make_draws(config, sources)
        trainer = build(config, sources, placement_of(config, sources, draws, 1), 10, alone)
        feed = Feed(config, sources, draws, placement_of(config, sources, draws, 1))
        step_of(trainer, feed, 0)
        whole = [step_of(trainer, feed, k, args.repeats) for k in range(args.steps)]
        show_steps(whole)
        print(f"\n{'ranks':>5}  {'placement':12}{'waiting':>10}{'by edges':>10}{'preparing':>11}")
        for ranks in args.ranks:
            for placement in ("auto", "replicated") if ranks > 1 else ("auto",):
                show_ranks(ranks, placement, trainer, feed, sources, args)
        print(f"\n{'edges':>6}{'batches':>9}{'largest':>9}{'time':>7}")
        for budget in args.budgets:
            show_budget(budget, trainer, feed, args)


def step_of(trainer: Trainer, feed: Feed, step: int, repeats: int = 1) -> Cost:
    """Process what a rank has of a step, whoever it is; the fastest of some times."""
    preparing, seconds = [], []
    for _ in range(repeats):
        began = time.process_time()
        batches = [trainer.ready(batch) for batch in feed.step(step).batches]
        ready = time.process_time()
        trainer.step(batches, Totals([t.name for t in trainer.tasks], trainer.device))
        preparing, seconds = [*preparing, ready - began], [*seconds, time.process_time() - ready]
    edges = dict.fromkeys((t.name for t in trainer.tasks), 0)
    for batch in batches:
        for task, (_, atoms) in batch.slices.items():
            edges[task] += int(((batch.edges[0] >= atoms.start) & (batch.edges[0] < atoms.stop)).sum())
    largest = max((batch.edges.shape[1] for batch in batches), default=0)
    return Cost(edges, largest, len(batches), min(seconds), min(preparing))


def show_steps(whole: list[Cost]) -> None:
    def line(name: str, values: list[float], unit: str) -> None:
        print(f"{name:24}{np.mean(values):12,.4g} {unit:6}{np.std(values) / np.mean(values):8.3f}")

    print(f"{'in a step':24}{'mean':>12} {'':6}{'std/mean':>8}")
    for task in whole[0].edges:
        line(task, [cost.edges[task] for cost in whole], "edges")
    line("all tasks", [sum(cost.edges.values()) for cost in whole], "edges")
    line("all tasks", [cost.seconds for cost in whole], "s")
    line("all tasks, for an edge", [1e6 * cost.seconds / sum(cost.edges.values()) for cost in whole], "us")


def show_ranks(
    ranks: int,
    wanted: str,
    trainer: Trainer,
    feed: Feed,
    sources: list[Source],
    args: argparse.Namespace,
) -> None:
    parallel = feed.config.parallel.model_copy(update={"placement": wanted})
    placement = placement_of(feed.config.model_copy(update={"parallel": parallel}), sources, feed.draws, ranks)
    of_rank = [replace(feed, placement=placement, rank=rank) for rank in range(ranks)]
    each = [[step_of(trainer, f, k, args.repeats) for k in range(args.steps)] for f in of_rank]
    seconds, edges, preparing = (
        np.array([[number(cost) for cost in costs] for costs in each])
        for number in (lambda c: c.seconds, lambda c: sum(c.edges.values()), lambda c: c.preparing)
    )
    waiting, by_edges = (float(np.mean(1 - x.mean(axis=0) / x.max(axis=0))) for x in (seconds, edges))
    print(f"{ranks:5}  {wanted:12}{waiting:10.3f}{by_edges:10.3f}{preparing.sum() / seconds.sum():11.3f}")


def show_budget(budget: int, trainer: Trainer, feed: Feed, args: argparse.Namespace) -> None:
    config: Config = feed.config
    cut = config.model_copy(update={"train": config.train.model_copy(update={"max_edges": budget})})
    forms = (feed, replace(feed, config=cut))  # in turns: what else the machine does changes both
    whole, costs = zip(*[[step_of(trainer, f, k, args.repeats) for f in forms] for k in range(args.steps)], strict=True)
    batches, largest = np.mean([c.batches for c in costs]), max(c.largest for c in costs)
    mean = np.mean([sum(c.edges.values()) for c in whole])
    slower = np.median([a.seconds / b.seconds for a, b in zip(costs, whole, strict=True)])
    print(f"{budget:6}{batches:9.1f}{largest / mean:9.2f}{slower:7.2f}")


if __name__ == "__main__":
    main()
