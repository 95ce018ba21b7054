"""What a step costs where every rank holds every branch, and where the branches are split between the ranks.

    torchrun --nproc-per-node 2 benchmarks/placement.py STORE [--tasks 16] [--local-batch 4 32] [--pairs 8]
             [--seconds 120]

The paper's model (EGNN of 4 x 866, heads of 3 x 889) with as many branches as there are tasks, all of them on
structures of one store, so that nothing but the placement differs. The two placements take the same structures in turn,
step by step in one run; with fewer structures than tasks the tasks take turns too. Printed are medians over the pairs
(fewer than asked for where the seconds of a batch are over):

    step        seconds of a step of the slowest rank: forward, backward, reductions, clipping, AdamW, average
    blocking    seconds of the same reductions, one after another, when nothing else runs
    waiting     seconds at the end of the backward pass in which the rank that came last still waits for them
    slower      seconds by which the step is longer than one whose gradients are not reduced at all
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from multifid.config import Config, parse_config
from multifid.feed.loader import Source, TaskConfig, collate, edge_costs, open_sources
from multifid.graphs.batch import Batch
from multifid.parallel.groups import World, world
from multifid.parallel.layout import place
from multifid.parallel.shares import shares
from multifid.training.build import build
from multifid.training.step import Totals, Trainer

PLACEMENTS = ("replicated", "split")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a prepared store with one task")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--local-batch", type=int, nargs="+", default=[4, 32], help="structures per rank and step")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no pair of a batch begins later")
    parser.add_argument("--hidden", type=int, default=866)
    parser.add_argument("--head", type=int, default=889)
    args = parser.parse_args()

    torch.set_num_threads(1)
    with world("cpu") as here:
        names = [f"task{i:02}" for i in range(args.tasks)]
        sources = {name: one_task(args.store, name) for name in names}
        config = paper_model(names, args)
        placements = {kind: place(names, kind, here.size) for kind in PLACEMENTS}
        trainers = {kind: build(config, list(sources.values()), placements[kind], 1, here) for kind in PLACEMENTS}
        if here.first:
            count = {kind: sum(p.numel() for p in t.potential.parameters()) for kind, t in trainers.items()}
            print(f"{args.tasks} tasks, {here.size} ranks, EGNN 4 x {args.hidden}, heads 3 x {args.head}")
            print("parameters of the first rank: " + ", ".join(f"{k} {n / 1e6:.1f} M" for k, n in count.items()))
            print(f"{'batch':>6} {'placement':<11}{'step':>8}{'blocking':>10}{'waiting':>9}{'slower':>8}   seconds")
        for local in args.local_batch:
            steps = draw(sources[names[0]], local * here.size, args.pairs + 1, config)
            report(here, local, measure(here, trainers, placements, sources, steps, config, args.seconds))


def one_task(store: str, name: str) -> Source:
    """A store's one label set under the name of a task."""
    (source,) = open_sources({name: TaskConfig(store=store)})
    return source


def paper_model(names: list[str], args: argparse.Namespace) -> Config:
    return parse_config(
        {
            "run": "unused",
            "tasks": {name: {"store": args.store} for name in names},
            "model": {
                "encoder": {"name": "egnn", "layers": 4, "hidden": args.hidden},
                "branch": {"hidden": [args.head] * 3, "forces": "direct"},
            },
            "train": {"warmup": 0, "schedule": "constant", "lr": 1e-5, "batch": 1},
        },
        "benchmark",
    )


def draw(source: Source, structures: int, steps: int, config: Config) -> Iterator[dict[str, np.ndarray]]:
    """The structures of every step by task, the tasks in turn: the same on every rank."""
    index, turn = np.asarray(source.store.index("train")).astype(np.int64), 0
    random = np.random.default_rng(config.seed)
    names = list(config.tasks)
    for _ in range(steps):
        drawn: dict[str, list[int]] = {name: [] for name in names}
        for structure in random.choice(index, structures):
            drawn[names[turn % len(names)]].append(int(structure))
            turn += 1
        yield {name: np.array(chosen, np.int64) for name, chosen in drawn.items()}


Seconds = dict[str, list[float]]


def measure(
    here: World,
    trainers: dict[str, Trainer],
    placements: dict[str, dict[str, list[int]]],
    sources: dict[str, Source],
    steps: Iterator[dict[str, np.ndarray]],
    config: Config,
    seconds_in_all: float,
) -> dict[str, Seconds]:
    """Seconds of every pair of steps; the first one warms up."""
    names = ("step", "blocking", "waiting", "unreduced")
    found: dict[str, Seconds] = {kind: {name: [] for name in names} for kind in trainers}
    begun = time.perf_counter()
    for k, drawn in enumerate(steps):
        if k > 1 and here.share(time.perf_counter() - begun > seconds_in_all):
            break
        for kind in PLACEMENTS if k % 2 else PLACEMENTS[::-1]:
            batch = mine(here, sources, drawn, placements[kind], config)
            seconds = one_step(here, trainers[kind], batch)
            if k >= 1:
                for name, value in seconds.items():
                    found[kind][name].append(value)
    return found


def mine(
    here: World, sources: dict[str, Source], drawn: dict[str, np.ndarray], where: dict[str, list[int]], config: Config
) -> list[Batch]:
    """This rank's part of a step."""
    costs = {t: edge_costs(sources[t], chosen, config.model.cutoff) for t, chosen in drawn.items() if len(chosen)}
    owner = shares(costs, {t: where[t] for t in costs})
    parts = [(sources[t], drawn[t][owner[t] == here.rank]) for t in costs]
    parts = [(source, chosen) for source, chosen in parts if len(chosen)]
    return [collate(parts, config.model.cutoff)] if parts else []


def one_step(here: World, trainer: Trainer, batch: list[Batch]) -> dict[str, float]:
    """The seconds of one step with reductions, of one without, and of the reductions alone; the slowest rank's."""
    gradients, totals = trainer.gradients, Totals([t.name for t in trainer.tasks], trainer.device)
    waited, finish = [0.0], gradients.finish

    def timed_finish() -> None:
        waited[0] = seconds_of(finish)

    gradients.finish = timed_finish  # type: ignore[method-assign]
    step = slowest(here, seconds_of(lambda: trainer.step(batch, totals), here))
    waiting = -slowest(here, -waited[0])  # of the rank that came last: the others wait for it, not for the network
    gradients.finish = finish  # type: ignore[method-assign]

    def reduce_all() -> None:
        for bucket in gradients.buckets:
            bucket.group.sum_(bucket.flat)

    blocking = slowest(here, seconds_of(reduce_all, here))
    groups = [bucket.group for bucket in gradients.buckets]
    for bucket in gradients.buckets:
        bucket.group = type(bucket.group)((here.rank,), here.rank)
    unreduced = slowest(here, seconds_of(lambda: trainer.step(batch, totals), here))
    for bucket, group in zip(gradients.buckets, groups, strict=True):
        bucket.group = group
    return {"step": step, "blocking": blocking, "waiting": waiting, "unreduced": unreduced}


def seconds_of(what: Callable[[], object], together: World | None = None) -> float:
    if together is not None:
        together.group.sum_(torch.zeros(1))  # begin at the same moment
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def slowest(here: World, seconds: float) -> float:
    """The largest value of any rank."""
    places = torch.zeros(here.size, dtype=torch.float64)
    places[here.rank] = seconds
    return float(here.group.sum_(places).max())


def report(here: World, local: int, found: dict[str, Seconds]) -> None:
    if not here.first:
        return
    for kind, seconds in found.items():
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        slower = statistics.median(np.subtract(seconds["step"], seconds["unreduced"]))
        columns = f"{middle['step']:8.3f}{middle['blocking']:10.3f}{middle['waiting']:9.3f}{slower:8.3f}"
        exposed = statistics.median(np.divide(seconds["waiting"], seconds["blocking"]))
        print(f"{local:>6} {kind:<11}{columns}   waiting / blocking {exposed:.2f}")
    ratios = np.divide(found["split"]["step"], found["replicated"]["step"])
    span = f"from {min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{local:>6} split / replicated: {statistics.median(ratios):.2f} ({span})")


if __name__ == "__main__":
    main()
