"""How fast structures travel between ranks that hold a train split in pieces (`train.share_data`), and what steps wait.

    torchrun --nproc-per-node 2 benchmarks/share.py STORE RUNS [--windows 20] [--batch 32] [--hidden 128] [--steps 64]

Exchanges alone: whole windows, with the arithmetic that says what goes where, and the exchange by itself; beside
reading the same structures from the store. Then runs of EGNN with so many hidden units, with and without `share_data`
in turns: what the loader waits for windows, and how long runs take. Set OMP_NUM_THREADS=1.

    torchrun --nproc-per-node 4 benchmarks/share.py STORE RUNS --memory pieces      # or store, staged

Memory alone: what a rank holds (`/proc/self/smaps_rollup`) more than before it opened the store, after windows of its
piece and of what other ranks hold, or after it has read the whole train split from the store, which lies in the page
cache, or from a copy in memory (`train.stage`). One way in a launch.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.feed.stage import stage
from multifid.parallel import groups
from multifid.store.store import Store
from multifid.training import share
from multifid.training.division import Division
from multifid.training.feed import make_draws
from multifid.training.run import train

REFERENCE = 570e-6  # seconds that a sample takes from the reference's store, between two processes of one host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--batch", type=float, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", choices=("pieces", "store", "staged"))
    args = parser.parse_args()
    with groups.world("cpu") as world:
        if world.first:
            print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
        if args.memory:
            memory(args, world)
            return
        exchanges(args, world)
        if args.rounds:
            waiting(args, world)


def values(args: argparse.Namespace, run: str, sharing: bool) -> dict:
    return {
        "run": str(args.runs / run),
        "tasks": {"task": {"store": str(args.store)}},
        "model": {
            "cutoff": 5.0,
            "encoder": {"name": "egnn", "layers": 3, "hidden": args.hidden},
            "branch": {"hidden": [args.hidden, args.hidden], "forces": "direct"},
        },
        "train": {"batch": args.batch, "steps": args.steps, "epoch_steps": args.steps, "share_data": sharing},
        "parallel": {"placement": "replicated"},
    }


def exchanges(args: argparse.Namespace, world: groups.World) -> None:
    config = parse_config(values(args, "none", True), "benchmark")
    sources = open_sources(config.tasks)
    draws = make_draws(config, sources)
    placement = {"task": list(range(world.size))}
    exchange = share.Exchange(sources, draws, placement, config.model.cutoff, world)
    alone, shared, calls = [], exchange.sources[0].store, []
    once = share._exchanged

    def timed(*given):
        began = time.perf_counter()
        out = once(*given)
        alone.append(time.perf_counter() - began)
        calls.append(len(out[0]))
        return out

    share._exchanged = timed
    whole = []
    for window in range(args.windows):
        world.share(window)  # all ranks begin together
        began = time.perf_counter()
        exchange._fetch(window)
        whole.append(time.perf_counter() - began)
    share._exchanged = once
    known, _, _ = shared.windows[args.windows - 1]
    reads = []
    for _ in range(9):
        began = time.perf_counter()
        sources[0].store.read(np.random.default_rng(0).permutation(known))
        reads.append((time.perf_counter() - began) / len(known))
    count = np.array(calls)
    if world.first:
        mean = sum(x.nbytes for x in exchange.pieces["task"].rows.values()) / len(exchange.pieces["task"].natoms)
        held = sum(x.nbytes for x in exchange.pieces["task"].rows.values())
        print(f"a rank holds {held / 1e6:.1f} MB")
        each = {"whole windows": np.array(whole) / count, "the exchange": np.array(alone) / count, "reading": reads}
        print(
            f"{world.size} ranks, {count.mean():.0f} structures of {mean:.0f} bytes a window and rank; us a structure:"
        )
        for name, seconds in each.items():
            middle = float(np.median(seconds))
            print(f"  {name:15} {1e6 * middle:8.2f}   {REFERENCE / middle:8.0f} times the reference's rate")


def rollup() -> dict[str, float]:
    """What this process holds in MB: all of it, its share of what several have, and what it alone wrote."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    found = {words[0].rstrip(":"): int(words[1]) / 1e3 for words in lines}
    return {"RSS": found["Rss"], "PSS": found["Pss"], "anonymous": found["Anonymous"]}


def all_there(world: groups.World) -> None:
    """Every rank waits for every other one."""
    for rank in range(world.size):
        world.share(rank, rank)


def memory(args: argparse.Namespace, world: groups.World) -> None:
    """What a rank has more than before, by one way to hold the train split."""
    config = parse_config(values(args, "none", True), "benchmark")

    def pieces():
        sources = open_sources(config.tasks, verify="off")
        draws = make_draws(config, sources)
        made = share.Exchange(sources, draws, {"task": list(range(world.size))}, config.model.cutoff, world)
        for window in range(args.windows):
            made._fetch(window)
        return made

    def mapped(folder: Path | None = None):
        (source,) = open_sources(config.tasks, verify="off")
        store = source.store if folder is None else Store(stage(source.store, folder), verify="off")
        split = np.asarray(store.index("train"))
        for start in range(0, len(split), 4096):
            store.read(split[start : start + 4096])
        return store

    with tempfile.TemporaryDirectory(dir="/dev/shm") as own:
        near = Path(world.share(own))
        way = {"pieces": pieces, "store": mapped, "staged": lambda: mapped(near)}[args.memory]
        before = rollup()
        held = way()
        all_there(world)
        more = {kind: value - before[kind] for kind, value in rollup().items()}
        all_ranks = [world.share(more, rank) for rank in range(world.size)]  # nobody lets go before all have looked
        if isinstance(held, share.Exchange):
            held.leave()
        if world.first:
            means = "  ".join(f"{kind} {np.mean([one[kind] for one in all_ranks]):7.1f}" for kind in more)
            total = sum(one["PSS"] for one in all_ranks)
            print(f"{world.size} ranks, {args.memory:7} MB a rank: {means}   PSS of all ranks {total:7.1f}")


def waiting(args: argparse.Namespace, world: groups.World) -> None:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    waited = []
    wait = share.Exchange.wait

    def timed(self, step: int) -> Division:
        began = time.perf_counter()
        division = wait(self, step)
        if step >= share.WINDOW:  # the first window is waited for by everybody who begins
            waited.append(time.perf_counter() - began)
        return division

    share.Exchange.wait = timed
    for turn in range(args.rounds):
        for sharing in (False, True):
            config = parse_config(values(args, f"{turn}-{sharing}", sharing), "benchmark")
            began = time.perf_counter()
            with world.apart(f"{turn}-{sharing}"):
                ending = train(config, Console(quiet=True), joined=world)
            assert ending.complete
            seconds[sharing].append(time.perf_counter() - began)
    share.Exchange.wait = wait
    if world.first:
        total = sum(seconds[True])
        share_of = 100 * sum(waited) / total
        print(f"loader waits for windows: {sum(waited):.3f} s in {total:.1f} s of runs ({share_of:.2f} %)")
        for sharing, found in seconds.items():
            print(f"  share_data {sharing!s:5}: runs of {args.steps} steps in {' '.join(f'{s:.2f}' for s in found)} s")


if __name__ == "__main__":
    main()
