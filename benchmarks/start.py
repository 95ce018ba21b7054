"""What every rank computes when a run of the size of the largest published one begins: order, layout and shares.

    python benchmarks/start.py [--ranks 4096] [--local-batch 32] [--steps 3] [--machine frontier]

Arithmetic only: no rank is started, no store is opened, nothing travels. The sixteen datasets are those of arXiv
2604.15380 (544 million structures); numbers of structures are approximate (docs/scaling.md says which were looked up),
and Alexandria gets what is left of the total. Atoms and edges are assumed, from samples of the same kind of data
(docs/results.md) where there are any. Costs of structures are drawn from their place in the store, so that every rank
would have the same.

Prints seconds of each part, of one rank (each would do the same) and of what all ranks pick of it together; then what
`multifid plan` would say of the step and of the data of such stores.
"""

import argparse
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from placements import MODEL

from multifid.feed.order import Draw, Order, SamplingConfig, rates
from multifid.forecast.data import StoreSize, data_of
from multifid.forecast.estimate import forecast
from multifid.forecast.machines import MACHINES, Machine
from multifid.forecast.scaling.beyond import placed, scaled
from multifid.forecast.subject import CRYSTAL_ERROR, MOLECULE_ERROR, TaskLoad, make_subject
from multifid.parallel.layout import Load, place
from multifid.parallel.shares import shares


@dataclass(frozen=True)
class Dataset:
    """Structures, and what one of them is on average: atoms, edges within 5 angstrom, their spread; crystal or not."""

    structures: int
    atoms: float
    edges: float
    spread: float
    crystal: bool
    stress: bool = False


M = 1_000_000
# Structures: OC20 133.9 M (Chanussot et al. 2021), OC22 9.9 M (Tran et al. 2023), OC25 7.8 M, ODAC23 38 M (Sriram et
# al. 2024), OMat24 110 M, OMol25 83 M (and again as its neutral and its charged part), OPoly26 6.6 M, nabla2DFT 12 M,
# QCML 33.5 M, QM7-X 4.2 M, Transition1x 9.6 M, ANI-1x 5.0 M, MPtrj 1.6 M. Atoms and edges: ani1x, mptrj, alexandria and
# omol25 from samples; slabs, frameworks and polymers assumed.
DATASETS = {
    "alexandria": Dataset(6 * M, 9.7, 400.0, 0.97, True, True),
    "ani1x": Dataset(5 * M, 15.0, 202.0, 0.66, False),
    "mptrj": Dataset(1_600_000, 31.5, 1128.0, 1.00, True, True),
    "nabla2dft": Dataset(12 * M, 42.0, 700.0, 0.4, False),
    "oc20": Dataset(133_900_000, 73.0, 2900.0, 0.5, True),
    "oc22": Dataset(9_900_000, 80.0, 3200.0, 0.5, True),
    "oc25": Dataset(7_800_000, 144.0, 5700.0, 0.5, True),
    "odac23": Dataset(38 * M, 200.0, 6000.0, 0.5, True),
    "omat24": Dataset(110 * M, 19.0, 800.0, 0.9, True, True),
    "omol25": Dataset(83 * M, 50.0, 900.0, 0.7, False),
    "omol25_neutral": Dataset(42 * M, 50.0, 900.0, 0.7, False),
    "omol25_charged": Dataset(41 * M, 50.0, 900.0, 0.7, False),
    "opoly26": Dataset(6_600_000, 150.0, 3000.0, 0.5, False),
    "qcml": Dataset(33_500_000, 12.0, 140.0, 0.6, False),
    "qm7x": Dataset(4_200_000, 17.0, 230.0, 0.4, False),
    "transition1x": Dataset(9_600_000, 13.0, 170.0, 0.4, False),
}


@dataclass(frozen=True)
class Start:
    """What a rank knows of a run before it reads a structure."""

    datasets: Mapping[str, Dataset]
    draws: list[Draw]
    placement: dict[str, list[int]]

    @classmethod
    def of(cls, datasets: Mapping[str, Dataset], ranks: int, local_batch: int, seed: int = 0) -> "Start":
        """Rates, orders and the layout `auto` of so many ranks, with so many structures on each."""
        sizes = {name: int(0.8 * one.structures) for name, one in datasets.items()}
        batch = Fraction(local_batch * ranks, len(sizes))
        rate = rates(sizes, batch, SamplingConfig(), dict.fromkeys(sizes))
        draws = [Draw(n, (n,), Order(seed, f"content of {n}", n, sizes[n]), rate[n]) for n in sizes]
        loads = {n: Load(float(rate[n]) * one.edges, holding=0.01 * one.edges) for n, one in datasets.items()}
        return cls(datasets, draws, place(list(sizes), "auto", ranks, loads=loads))

    def structures(self, step: int) -> dict[str, np.ndarray]:
        """Of each dataset, which structures of the train split a step holds."""
        return {draw.name: draw.order(*draw.places(step)) for draw in self.draws}

    def costs(self, chosen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Edges of these structures: lognormal around the mean of the dataset, decided by their places."""
        return {name: _edges(self.datasets[name], index) for name, index in chosen.items()}

    def owners(self, costs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rank of every structure."""
        return shares(costs, self.placement)


def _edges(one: Dataset, index: np.ndarray) -> np.ndarray:
    """A normal deviate made of twelve uniform ones, each a hash of the index: the same on every rank."""
    sums = np.zeros(len(index))
    for k in range(12):
        x = (index.astype(np.uint64) + np.uint64(k + 1)) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(31)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        sums += (x >> np.uint64(11)).astype(np.float64) / 2.0**53
    width = math.sqrt(math.log1p(one.spread**2))
    return np.rint(one.edges * np.exp(width * (sums - 6.0) - width**2 / 2))


def by_rank(owners: Mapping[str, np.ndarray], ranks: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What all ranks pick, at once: of each dataset the places in the step by rank, and where each rank's begin."""
    out = {}
    for name, owner in owners.items():
        places = np.argsort(owner, kind="stable")
        out[name] = (places, np.searchsorted(owner[places], np.arange(ranks + 1)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--local-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--machine", default="frontier", choices=MACHINES)
    args = parser.parse_args()
    total = sum(one.structures for one in DATASETS.values())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print(f"{len(DATASETS)} tasks, {total:,} structures, {args.ranks:,} ranks, {args.local_batch} structures a rank")
    start = arithmetic(args.ranks, args.local_batch, args.steps)
    print(f"{args.machine}, forecast:")
    step_and_data(start, MACHINES[args.machine], args.ranks, args.local_batch)


def arithmetic(ranks: int, local_batch: int, steps: int) -> Start:
    """What a rank computes before its first steps, timed; and what all ranks pick of it."""
    clock = _Clock()
    start = clock("layout", lambda: Start.of(DATASETS, ranks, local_batch))
    for step in range(steps):
        chosen = clock("order", lambda step=step: start.structures(step))
        costs = start.costs(chosen)
        owners = clock("shares", lambda costs=costs: start.owners(costs))
        picked = clock("all ranks pick", lambda owners=owners: by_rank(owners, ranks))
        load = sum(np.bincount(owners[n], costs[n], ranks) for n in costs)
        count = sum(np.diff(bounds) for _, bounds in picked.values())
        print(
            f"  step {step}: {int(count.sum()):,} structures, {count.min()} to {count.max()} a rank; "
            f"edges of the fullest rank / mean {load.max() / load.mean():.4f}"
        )
    for name, seconds in clock.spent.items():
        each = f", {seconds / steps:.3f} s a step" if name in ("order", "shares") else ""
        print(f"  {name:15} {seconds:7.3f} s{each}")
    print(f"  {'sum':15} {sum(clock.spent.values()):7.3f} s")
    return start


def step_and_data(start: Start, machine: Machine, ranks: int, local_batch: int) -> None:
    """A step of the paper's model, and what the stores ask of disks, hosts and the file system."""
    tasks = {
        n: TaskLoad(1.0, d.atoms, d.edges, d.spread, CRYSTAL_ERROR if d.crystal else MOLECULE_ERROR)
        for n, d in start.datasets.items()
    }
    subject = scaled(make_subject(MODEL, tasks), local_batch * ranks)
    for name in ("replicated", "split", "auto"):
        found = forecast(subject, placed(subject, name, ranks, machine, balanced=True), machine)
        print(f"  {name:12} {1000 * found.seconds:8.1f} ms a step, {found.bytes / 2**30:6.2f} GiB a rank")
    sizes = {
        n: StoreSize.expected(d.structures, d.atoms, cells=d.crystal, stress=d.stress)
        for n, d in start.datasets.items()
    }
    data = data_of(sizes, start.placement, ranks, machine.per_node)
    print(
        f"  on disk {data.disk / 1e9:,.0f} GB; the largest store {max(s.bytes for s in sizes.values()) / 1e9:,.0f} GB"
    )
    print(f"  the host with most: {data.host / 1e9:,.0f} GB of stores, {data.windows / 1e9:,.1f} GB of windows")
    print(f"  with train.share_data: {data.shared / 1e9:,.1f} GB of pieces")
    print(f"  every host: {data.costs / 1e9:,.1f} GB of rows by which steps are divided")
    print(
        f"  starting: {data.opens:,} files opened, {data.opening:,.0f} s; staging {data.staging:,.0f} s (assumed rates)"
    )


class _Clock:
    """Seconds of kinds of work."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def __call__(self, name, work):
        started = time.perf_counter()
        out = work()
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started
        return out


if __name__ == "__main__":
    main()
