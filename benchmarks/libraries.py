"""Own code beside libraries that do the same: neighbour lists, JSON, unpacking, placements. In processor seconds.

    pip install ijson rapidgzip
    python benchmarks/libraries.py --molecules STORE --crystals STORE --json MPTRJ.json --bz2 FILE.bz2

Ratios are medians over pairs that are measured one right after the other: above 1 the library takes longer.
"""

import argparse
import bz2
import gc
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from multifid.graphs.neighbors import neighbor_list
from multifid.parallel.assign import Unit, cheapest, step_time
from multifid.readers.json_file import pairs
from multifid.readers.packed import packing_of, unpacked
from multifid.store.store import Store
from multifid.structures.structure import Packed

CUTOFF = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecules", type=Path, required=True)
    parser.add_argument("--crystals", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--bz2", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    lists(given)
    json(given)
    unpack(given)
    placements()


def compare(what: str, own: Callable[[], object], library: Callable[[], object], times: int, clock=time.process_time):
    """One line: seconds of both, and the median of the ratios of pairs."""
    spent: list[tuple[float, float]] = []
    for _ in range(times + 1):
        pair = []
        for function in (own, library):
            gc.collect()
            begun = clock()
            function()
            pair.append(clock() - begun)
        spent.append((pair[0], pair[1]))
    first, second = np.array(spent[1:]).T  # the first pair warms up
    print(
        f"{what}: own {np.median(first):.4f} s, library {np.median(second):.4f} s, "
        f"ratio {np.median(second / first):.2f}"
    )


def lists(given: argparse.Namespace) -> None:
    """A batch of molecules, a batch of crystals, one large cell: vesin and ASE's calls for each structure."""
    import vesin

    def by_vesin(packed: Packed) -> int:
        calculator, edges = vesin.NeighborList(cutoff=CUTOFF, full_list=True), 0
        for a, b, cell, pbc in zip(packed.offsets[:-1], packed.offsets[1:], packed.cell, packed.pbc, strict=True):
            points = packed.positions[a:b].astype(np.float64)
            i, _, _ = calculator.compute(points, cell.astype(np.float64), pbc, "ijS")
            edges += len(i)
        return edges

    molecules, crystals = Store(given.molecules), Store(given.crystals)
    batches = {
        "lists, 64 molecules": molecules.read(np.arange(64)),
        "lists, 32 crystals": crystals.read(np.arange(32)),
        "lists, one cell of 4,096 atoms": supercell(4096),
    }
    for name, packed in batches.items():
        assert neighbor_list(packed, CUTOFF)[0].shape[1] == by_vesin(packed)
        compare(name, lambda p=packed: neighbor_list(p, CUTOFF), lambda p=packed: by_vesin(p), given.pairs)


def supercell(atoms: int) -> Packed:
    side = round(atoms ** (1 / 3))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3) * 2.3
    moved = grid + np.random.default_rng(0).normal(scale=0.1, size=grid.shape)
    n = len(grid)
    return Packed(
        np.full(n, 14, np.uint8),
        moved,
        np.array([n]),
        np.eye(3)[None] * side * 2.3,
        np.ones((1, 3), bool),
        np.zeros(1, np.int8),
        np.ones(1, np.uint8),
    )


def json(given: argparse.Namespace) -> None:
    """All materials of an MPtrj file: ijson with its fastest backend (yajl in C)."""
    import ijson

    def own() -> int:
        return sum(1 for _ in pairs(given.json, lambda _: None))

    def library() -> int:
        with given.json.open("rb") as file:
            return sum(1 for _ in ijson.kvitems(file, "", use_float=True))

    assert own() == library()
    compare(f"JSON of {given.json.stat().st_size / 1e6:.1f} MB", own, library, given.pairs)


def unpack(given: argparse.Namespace) -> None:
    """A bz2 file: rapidgzip's reader on one thread; the standard library is what `unpacked` calls."""
    import rapidgzip

    packing = packing_of(given.bz2)
    assert packing is not None

    def own() -> int:
        return sum(len(chunk) for chunk in unpacked(given.bz2, packing, 1 << 20, lambda _: None))

    def library() -> int:
        with rapidgzip.IndexedBzip2File(str(given.bz2), parallelization=1) as file:
            return sum(len(chunk) for chunk in iter(lambda: file.read(1 << 20), b""))

    assert own() == library() == len(bz2.decompress(given.bz2.read_bytes()))
    compare("bz2", own, library, given.pairs)


def placements() -> None:
    """The placement with the shortest step: scipy's mixed-integer solver (HiGHS) with at most 60 s for each."""
    from scipy.optimize import LinearConstraint, milp

    # costs and holding costs of five tasks, in the proportions of ANI-1x, QM7-X, Transition1x, MPtrj, Alexandria
    units = [Unit((name,), cost, 1.0, 1) for name, cost in zip("abcde", (18.0, 17.0, 14.0, 29.0, 22.0), strict=True)]
    for ranks in (3, 5, 8, 12, 40):
        begun = time.process_time()
        held = cheapest(units, ranks, None)
        own = time.process_time() - begun
        assert held is not None
        n = len(units) * ranks  # unknowns: share[u, r], holds[u, r], the longest step
        costs = np.array([u.cost for u in units])
        done = np.zeros((len(units), 2 * n + 1))
        for u in range(len(units)):
            done[u, u * ranks : (u + 1) * ranks] = 1
        only = np.hstack([np.diag(1 / np.repeat(costs, ranks)), -np.eye(n), np.zeros((n, 1))])
        load = np.zeros((ranks, 2 * n + 1))
        for r in range(ranks):
            load[r, r:n:ranks] = 1
            load[r, n + r : 2 * n : ranks] = [u.holding for u in units]
        load[:, -1] = -1
        begun = time.process_time()
        found = milp(
            np.eye(2 * n + 1)[-1],
            constraints=[
                LinearConstraint(done, costs, costs),
                LinearConstraint(only, -np.inf, 0),
                LinearConstraint(load, -np.inf, 0),
            ],
            integrality=np.r_[np.zeros(n), np.ones(n), 0],
            bounds=(0, np.r_[np.full(n, np.inf), np.ones(n), np.inf]),
            options={"time_limit": 60},
        )
        seconds = time.process_time() - begun
        print(
            f"placement of 5 tasks on {ranks} ranks: own {float(step_time(units, held)):.4f} in {own:.4f} s, "
            f"HiGHS {float('nan') if found.fun is None else found.fun:.4f} in {seconds:.2f} s, none is below "
            f"{found.mip_dual_bound:.4f}"
        )


if __name__ == "__main__":
    main()
