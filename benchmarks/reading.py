"""How fast stores are read: warm in random batches, with neighbour lists, cold in blocks, and at full size.

    python benchmarks/reading.py FOLDER [warm neighbors cold full wait] [--structures 24000000] [--molecules STORE] ...

Stores are synthetic, written by the project's own writer into FOLDER (which must be on the disk that is measured) and
kept there: molecules of ANI-1x's sizes and crystals of about 50 atoms, atoms at the density of their kind. Set
OMP_NUM_THREADS=1. Ratios are medians of pairs that are measured in turns.
"""

import argparse
import os
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from multifid.feed.order import Blocks, Order
from multifid.feed.readahead import ReadAhead
from multifid.graphs.neighbors import neighbor_list
from multifid.store.store import Store
from multifid.store.writer import StoreWriter
from multifid.structures.structure import SPLITS, Packed

BATCH = 128
CHUNK = 100_000  # structures that are made together
KINDS = {"molecules": 200_000, "crystals": 50_000}  # and how many are made
PARTS = ("warm", "neighbors", "cold", "full", "wait")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--structures", type=int, default=24_000_000, help="of the full store")
    parser.add_argument("--molecules", type=Path, help="a prepared store in place of the synthetic one")
    parser.add_argument("--crystals", type=Path, help="a prepared store; those of 40 to 60 atoms are taken")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    for part in args.parts or PARTS:
        {"warm": warm, "neighbors": neighbors, "cold": cold, "full": full, "wait": wait}[part](args)


def warm(args: argparse.Namespace) -> None:
    """Random batches against plain numpy on one array of the same bytes, and against a copy of memory."""
    for kind in KINDS:
        warm_of(kind, open_verified(args, kind), args.rounds)


def warm_of(kind: str, store: Store, rounds: int) -> None:
    total = bytes_of(store.read(np.arange(store.structures)))
    size = total // store.structures
    structures = np.ones((store.structures, size), np.uint8)  # zeros would all be one page of memory
    atoms = np.ones((store.atoms, total // store.atoms), np.uint8)
    target = np.empty((BATCH, size), np.uint8)
    random = np.random.default_rng(0)
    chosen = [random.integers(0, store.structures, BATCH) for _ in range(400)]
    rows = [atom_rows(store, index) for index in chosen]
    mapped = [np.load(store.path / f"{name}.npy", mmap_mode="r") for name in ("positions", *labels_of(store))]
    seconds = alternate(
        rounds,
        store=lambda: [store.read(index) for index in chosen],
        structures=lambda: [structures[index] for index in chosen],
        atoms=lambda: [atoms[row] for row in rows],
        mapped=lambda: [[array[row] for array in mapped] for row in rows],
        copy=lambda: [np.copyto(target, structures[:BATCH]) for _ in chosen],
    )
    own = seconds["store"]
    print(
        f"warm, {kind}, {size} bytes each: {len(chosen) / np.median(own):,.0f} batches of {BATCH}/s, "
        f"{len(chosen) * BATCH * size / np.median(own) / 1e9:.2f} GB/s; of numpy on one array with a row for an "
        f"atom {ratio(seconds['atoms'], own):.2f}, for a structure {ratio(seconds['structures'], own):.2f}, "
        f"on the mapped positions and forces alone {ratio(seconds['mapped'], own):.2f}; "
        f"of a copy of memory {ratio(seconds['copy'], own):.3f}"
    )


def neighbors(args: argparse.Namespace) -> None:
    """Reading and neighbour lists at 5 angstrom, structures per second of one core."""
    for kind in KINDS:
        store = open_verified(args, kind)
        random, natoms = np.random.default_rng(0), store.natoms.astype(int)
        pool = np.flatnonzero((natoms >= 40) & (natoms <= 60)) if kind == "crystals" else np.arange(store.structures)
        batches = [random.choice(pool, BATCH) for _ in range(12)]
        packs = [store.read(index) for index in batches]
        seconds = alternate(args.rounds, lists=partial(lists, packs), both=partial(read_and_list, store, batches))
        count = len(batches) * BATCH
        print(
            f"neighbours at 5 A, {kind} of {natoms[pool].mean():.1f} atoms, {lists(packs) / count:.0f} edges: "
            f"{count / np.median(seconds['lists']):,.0f}/s (best {count / min(seconds['lists']):,.0f}), with reading "
            f"{count / np.median(seconds['both']):,.0f}/s (best {count / min(seconds['both']):,.0f})"
        )


def lists(packs: list[Packed]) -> int:
    return sum(neighbor_list(pack, 5.0)[0].shape[1] for pack in packs)


def read_and_list(store: Store, batches: list[np.ndarray]) -> int:
    return lists([store.read(index) for index in batches])


def open_verified(args: argparse.Namespace, kind: str) -> Store:
    """A store as it comes from the disk, whose blocks have all been verified, so that they are in the page cache."""
    path = getattr(args, kind) or synthetic(args.folder, kind, KINDS[kind])
    drop(path)
    return Store(path, verify="open")


def cold(args: argparse.Namespace) -> None:
    """Batches in blocks, nothing in the page cache at the beginning, against reading the same files from end to end."""
    path = synthetic(args.folder, "molecules", min(args.structures, 2_000_000))
    for verify in ("touch", "off"):
        rates: dict[str, list[float]] = {"blocks": [], "sequential": []}
        for _ in range(3):
            drop(path)
            rates["sequential"].append(sequential(path))
            drop(path)
            rates["blocks"].append(in_blocks(Store(path, verify)))  # gone before the next drop: mapped pages stay
        print(
            f"cold, in blocks, verify {verify}: {np.median(rates['blocks']) / 1e6:,.0f} MB/s of structures, "
            f"{np.median(np.divide(rates['blocks'], rates['sequential'])):.2f} of the files from end to end "
            f"({np.median(rates['sequential']) / 1e6:,.0f} MB/s)"
        )


def in_blocks(store: Store) -> float:
    """Bytes per second of half a pass."""
    steps = store.size("train") // BATCH // 2
    order = Order(0, store.checksum, "synthetic", store.size("train"), Blocks(16384, 32))
    ahead, done, started = ReadAhead(store, order, store.tasks), 0, time.perf_counter()
    for step in range(steps):
        ahead(step * BATCH)
        done += bytes_of(store.read(store.pick("train", order(step * BATCH, BATCH))))
    return done / (time.perf_counter() - started)


def sequential(path: Path) -> float:
    buffer, done, started = bytearray(1 << 20), 0, time.perf_counter()
    for file in path.rglob("*.npy"):
        with file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while n := opened.readinto(buffer):
                done += n
    return done / (time.perf_counter() - started)


def drop(path: Path) -> None:
    """Out of the page cache."""
    for file in path.rglob("*.npy"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def full(args: argparse.Namespace) -> None:
    """Opening a store of full size, the private memory that it costs, and 100 steps of training from it."""
    path = synthetic(args.folder, "molecules", args.structures)
    size = sum(file.stat().st_size for file in path.rglob("*"))
    drop(path)
    for state in ("cold", "warm"):
        before, started = private(), time.perf_counter()
        store = Store(path)
        seconds = time.perf_counter() - started
        print(f"full, {store.structures:,} structures, {size / 1e9:.1f} GB: opened {state} in {seconds:.3f} s")
    for blocks in (Blocks(16384, 32), None):
        order = Order(0, store.checksum, "synthetic", store.size("train"), blocks)
        for step in range(300):
            store.read(store.pick("train", order(step * BATCH, BATCH)))
    print(f"full: {(private() - before) / 1e6:.1f} MB of private memory after 600 random batches")
    train_100(args, "small", synthetic(args.folder, "molecules", KINDS["molecules"]), 16)  # torch's own first needs
    for name, structures in (("small", KINDS["molecules"]), ("full", args.structures)):
        train_100(args, name, synthetic(args.folder, "molecules", structures), 16)


def wait(args: argparse.Namespace) -> None:
    """How long a step waits for its data with one loader thread, at 128 hidden units."""
    train_100(args, "small", synthetic(args.folder, "molecules", KINDS["molecules"]), 128, steps=20)


def train_100(args: argparse.Namespace, name: str, store: Path, hidden: int, steps: int = 100) -> None:
    """Train from a store in blocks; print private memory and the time that was spent waiting for batches."""
    from rich.console import Console

    import multifid.training.run as run
    from multifid.config import parse_config
    from multifid.feed.loader import ahead

    folder = args.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    values = {
        "run": str(folder),
        "tasks": {"synthetic": {"store": str(store)}},
        "model": {"encoder": {"hidden": hidden}, "branch": {"hidden": [hidden, hidden]}},
        "sampling": {"order": "blocks"},
        "train": {"steps": steps, "epoch_steps": 1000, "batch": BATCH, "patience": None},
    }
    waited, stepped = [], []

    def timed(*work):
        batches, began = ahead(*work), time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            waited.append(time.perf_counter() - asked)
            stepped.append(time.perf_counter() - began)
            began = time.perf_counter()
            yield batch

    before = private()
    run.ahead = timed
    run.train(parse_config(values, "benchmark"), Console(quiet=True))
    run.ahead = ahead
    shutil.rmtree(folder)
    later = slice(2, None)  # the first batch cannot be prepared ahead
    print(
        f"train from the {name} store, {hidden} hidden units, {steps} steps of {BATCH}: "
        f"{(private() - before) / 1e6:.0f} MB of private memory more; a step takes "
        f"{np.mean(stepped[later]):.3f} s, of which it waits for data "
        f"{np.sum(waited[later]) / np.sum(stepped[later]):.2%} (first batch {waited[0]:.2f} s)"
    )


def private() -> int:
    """Bytes of this process's own (Linux). Clean pages of mapped files are the page cache's, which all ranks share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def alternate(rounds: int, **work: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each kind of work, measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(reference: list[float], own: list[float]) -> float:
    """How fast the own work is by the reference: 1 is as fast."""
    return float(np.median(np.divide(reference, own)))


def bytes_of(packed: Packed) -> int:
    """Bytes that were read from the store for these structures."""
    arrays = [packed.numbers, packed.positions, *(getattr(x, k) for x in packed.labels.values() for k in x.__slots__)]
    arrays += [packed.cell, packed.pbc] if packed.pbc.any() else []
    return sum(a.nbytes for a in arrays if a is not None)


def labels_of(store: Store) -> list[str]:
    return [f"labels/{task}/forces" for task in store.tasks]


def atom_rows(store: Store, index: np.ndarray) -> np.ndarray:
    offsets = store.field("offsets")
    return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in index]).astype(np.int64)


def synthetic(folder: Path, kind: str, structures: int) -> Path:
    """A store of one task, with energies, forces and, in crystals, stress; one in 20,000 is validation."""
    path = folder / f"{kind}-{structures}"
    if path.exists():
        return path
    random = np.random.default_rng(structures)
    with StoreWriter(path) as writer:
        for start in range(0, structures, CHUNK):
            append(writer, random, kind, min(CHUNK, structures - start))
        writer.seal()
        split = (np.arange(structures) % 20_000 == 19_999).astype(np.uint8)
        counts = {name: int((split == code).sum()) for code, name in enumerate(SPLITS)}
        labels = {"energy": structures, "forces": structures, "stress": structures if kind == "crystals" else 0}
        about = {
            "level_of_theory": "none",
            "labels": labels,
            "references": {"1": 0.0, "6": 0.0, "8": 0.0},
            "undetermined": [],
            "rank": 3,
            "residual": 0.0,
            "scale": 1.0,
        }
        writer.commit(
            split,
            {
                "source": {"format": "synthetic", "files": [{"name": "none", "structures": structures}], "options": {}},
                "tasks": {"synthetic": about},
                "splits": {**counts, "seed": 0, "rule": "every 20,000th"},
                "edges_per_atom": {"5": 30.0},
            },
        )
    return path


def append(writer: StoreWriter, random: np.random.Generator, kind: str, count: int) -> None:
    """Many structures at once, column by column."""
    molecules = kind == "molecules"
    natoms = np.clip(random.normal(16, 5, count).astype(int), 2, 60) if molecules else random.integers(40, 61, count)
    atoms = int(natoms.sum())
    edge = np.repeat(np.cbrt(natoms / (0.09 if molecules else 0.06)), natoms)
    numbers = random.choice(np.array([1, 1, 6, 8], np.uint8), atoms)
    rows = {
        "numbers": numbers,
        "positions": random.random((atoms, 3), np.float32) * edge[:, None],
        "natoms": natoms,
        "split": np.zeros(count),
        "relative": np.arange(count),
        "labels/synthetic/energy": random.random(count),
        "labels/synthetic/forces": random.random((atoms, 3), np.float32),
    }
    if not molecules:
        rows["pbc"] = np.ones((count, 3), bool)
        rows["cell"] = np.cbrt(natoms / 0.06)[:, None, None] * np.eye(3)
        rows["labels/synthetic/stress"] = random.random((count, 3, 3))
    writer.append_columns(rows, np.zeros(0, np.uint8), np.zeros(count, np.int64))


if __name__ == "__main__":
    main()
