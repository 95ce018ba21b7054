"""Small stores with planted labels, shared by the tests of what trains and evaluates."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: threads of several processes would fight for two cores

from pathlib import Path

import numpy as np
import pytest

from multifid.data.prepare import prepare


def pair_energy_forces(numbers, positions, depth):
    """A Morse pair potential (no cutoff): energy (eV) and its exact forces (eV/angstrom)."""
    r = positions[None] - positions[:, None]
    d = np.linalg.norm(r, axis=-1) + np.eye(len(numbers))
    x = np.exp(-1.2 * (d - 1.4))
    pair = depth * (x * x - 2 * x) * (1 - np.eye(len(numbers)))
    slope = depth * (-2.4 * x * x + 2.4 * x) * (1 - np.eye(len(numbers)))
    return pair.sum() / 2, (slope / d)[..., None] * r


def write_molecules(path: Path, count: int, depth: float, offset: float, seed: int) -> None:
    """Random small molecules as extended XYZ, labelled by the pair potential plus an energy for each element."""
    rng = np.random.default_rng(seed)
    reference = {"H": -2.0 + offset, "C": -9.0 - offset, "O": -5.0 + 2 * offset}
    z = {"H": 1, "C": 6, "O": 8}
    with path.open("w") as file:
        for _ in range(count):
            n = int(rng.integers(2, 7))
            symbols = list(rng.choice(["H", "C", "O"], n))
            positions = np.zeros((0, 3))
            while len(positions) < n:
                trial = rng.uniform(-1.8, 1.8, 3)
                if all(np.linalg.norm(trial - p) > 0.9 for p in positions):
                    positions = np.vstack([positions, trial])
            energy, pairs = pair_energy_forces([z[s] for s in symbols], positions, depth)
            forces = pairs.sum(axis=1)
            energy += sum(reference[s] for s in symbols)
            file.write(
                f'{n}\nProperties=species:S:1:pos:R:3:forces:R:3 energy={energy!r} pbc="F F F"\n'.replace(
                    "np.float64(", ""
                ).replace(")", "")
            )
            for s, p, f in zip(symbols, positions, forces, strict=True):
                file.write(" ".join([s, *(f"{x:.17g}" for x in (*p, *f))]) + "\n")


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> dict[str, Path]:
    """Three tasks of one chemistry and three fidelities, of different sizes: {task: store}."""
    folder = tmp_path_factory.mktemp("stores")
    out = {}
    for task, count, depth, offset in (("apple", 60, 1.0, 0.0), ("berry", 37, 0.7, 1.5), ("cherry", 23, 1.3, -2.0)):
        write_molecules(folder / f"{task}.xyz", count, depth, offset, seed=count)
        prepare("extxyz", [folder / f"{task}.xyz"], folder / task, task=task, fractions=(0.6, 0.2, 0.2), progress=False)
        out[task] = folder / task
    return out


@pytest.fixture(scope="session")
def five(stores, tmp_path_factory) -> dict[str, Path]:
    """Two more tasks beside the three of all tests."""
    folder = tmp_path_factory.mktemp("more")
    out = dict(stores)
    for task, count, depth, offset in (("damson", 30, 0.9, 0.5), ("elder", 18, 1.1, -1.0)):
        write_molecules(folder / f"{task}.xyz", count, depth, offset, seed=count)
        prepare("extxyz", [folder / f"{task}.xyz"], folder / task, task=task, fractions=(0.6, 0.2, 0.2), progress=False)
        out[task] = folder / task
    return out


@pytest.fixture(scope="session")
def pool():
    """Processes that are the ranks of many small worlds (see `parallel_worker`)."""
    from parallel_worker import Pool

    pool = Pool(7)
    yield pool
    pool.close()
