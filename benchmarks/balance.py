"""How even the ranks' work is: costs are estimated from the stores, and the true edges are counted afterwards.

    python benchmarks/balance.py STORE... [--batch 128] [--ranks 5 8] [--cutoff 5] [--steps 20]

No ranks are started: what each would process is computed, as every rank does, and its edges are counted here. Printed
is the load of the most loaded rank by the mean load, in the mean over the steps and in the worst of them:

    auto           where the branches live follows the estimated costs, and `shares` cuts every step
    replicated     every branch on every rank, `shares` cuts every step
    split          a sub-group for each task, sized without looking at costs, `shares` cuts within them
    equal counts   every branch on every rank, every rank the same number of structures of each task
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from multifid.feed.loader import Source, TaskConfig, edge_costs, open_sources
from multifid.feed.order import Order
from multifid.graphs.neighbors import neighbor_list
from multifid.parallel.layout import Load, place
from multifid.parallel.shares import shares

Cut = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", help="prepared stores, a task each, named by their directories")
    parser.add_argument("--batch", type=int, default=128, help="structures of a task in a step")
    parser.add_argument("--ranks", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--cutoff", type=float, default=5.0, help="angstrom")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    sources = {next(iter(s.tasks)): s for s in open_sources({Path(p).name: TaskConfig(store=p) for p in args.stores})}
    loads = {task: Load(cost=mean_cost(source, args.cutoff) * args.batch) for task, source in sources.items()}
    steps = [
        (
            {task: edge_costs(sources[task], index, args.cutoff) for task, index in drawn.items()},
            {task: true_edges(sources[task], index, args.cutoff) for task, index in drawn.items()},
        )
        for drawn in draw(sources, args.batch, args.steps)
    ]
    print(
        f"{len(sources)} tasks, batch {args.batch}, cutoff {args.cutoff:g} A, {args.steps} steps: longest / mean edges"
    )
    print(f"{'ranks':>5}  {'':14}{'mean':>7}{'worst':>7}")
    for ranks in args.ranks:
        for name, cut in cuts(list(sources), loads, ranks).items():
            ratios = [imbalance(true, cut(estimated), ranks) for estimated, true in steps]
            print(f"{ranks:5}  {name:14}{np.mean(ratios):7.3f}{max(ratios):7.3f}")


def cuts(tasks: list[str], loads: dict[str, Load], ranks: int) -> dict[str, Cut]:
    """The ways of dividing a step that are compared: estimated costs to the rank of every structure."""

    def by_shares(placement: dict[str, list[int]]) -> Cut:
        return lambda costs: shares(costs, placement)

    def by_counts(costs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {task: np.arange(len(c)) * ranks // len(c) for task, c in costs.items()}

    return {
        "auto": by_shares(place(tasks, "auto", ranks, loads=loads)),
        "replicated": by_shares(place(tasks, "replicated", ranks)),
        "split": by_shares(place(tasks, "split", ranks)),
        "equal counts": by_counts,
    }


def draw(sources: dict[str, Source], batch: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """The structures of every step, by task, in the order in which a run takes them."""
    index = {task: source.store.index("train") for task, source in sources.items()}
    orders = {task: Order(0, source.store.checksum, task, len(index[task])) for task, source in sources.items()}
    for step in range(steps):
        yield {task: index[task][orders[task](step * batch, batch)].astype(np.int64) for task in sources}


def mean_cost(source: Source, cutoff: float) -> float:
    return float(edge_costs(source, source.store.index("train").astype(np.int64), cutoff).mean())


def true_edges(source: Source, index: np.ndarray, cutoff: float) -> np.ndarray:
    """Edges of each structure, counted: (n,) int64."""
    packed = source.store.read(index, [])
    edges, _ = neighbor_list(packed, cutoff)
    return np.bincount(np.repeat(np.arange(len(index)), packed.natoms)[edges[0]], minlength=len(index))


def imbalance(true: dict[str, np.ndarray], owners: dict[str, np.ndarray], ranks: int) -> float:
    """The load of the most loaded rank by the mean load."""
    load = sum(np.bincount(owners[task], weights=true[task], minlength=ranks) for task in true)
    return float(np.max(load) / np.mean(load))


if __name__ == "__main__":
    main()
