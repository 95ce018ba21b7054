"""Small stores with planted labels, shared by the tests of what trains and evaluates."""

import os
import time

# Before torch is loaded: threads of several processes would fight for two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

# Processes that tests start find the encoders of another package too.
os.environ["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{Path(__file__).parent / 'elsewhere'}"

import numpy as np
import pytest

from multifid.evaluation.evaluate import Data, label_sets
from multifid.preparation.prepare import prepare
from multifid.store.store import Store

# Of the rows of a journal, what two runs of one config do not have in common.
MEASURED = ("seconds", "structures_per_second", "seconds_left", "memory", "device_memory")


def data_of(text: str) -> list[Data]:
    """`[TASK=]STORE`: the label set TASK (or the only one) under the name TASK; without TASK all label sets."""
    name, equals, path = text.rpartition("=")
    return label_sets(Store(Path(path)), name if equals else None)


def measured_effort(work):
    """What a function returns, and its processor time in units of adding up three million integers in plain Python.

    A ratio on the same machine: no machine is too slow for a bound on it.
    """

    def seconds(function):
        started = time.process_time()
        return function(), time.process_time() - started

    yardstick = min(seconds(lambda: sum(range(3_000_000)))[1] for _ in range(3))
    result, spent = seconds(work)
    return result, spent / yardstick


def pair_energy_forces(numbers, positions, depth):
    """A pair potential like Morse's (no cutoff): energy (eV) and its exact forces (eV/angstrom).

    x^2 - 2 x with 1 / x = 1 + v + v^2 / 2 + v^3 / 6 in place of exp(v), whose last bits are the processor's: labels,
    and so the order of data, are the same anywhere.
    """
    r = positions[None] - positions[:, None]
    d = np.linalg.norm(r, axis=-1) + np.eye(len(numbers))
    v = 1.2 * (d - 1.4)
    slope_of_v = 1 + v + v * v / 2
    x = 1 / (slope_of_v + v * v * v / 6)
    pair = depth * (x * x - 2 * x) * (1 - np.eye(len(numbers)))
    slope = depth * 2.4 * slope_of_v * x * x * (1 - x) * (1 - np.eye(len(numbers)))
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
                if all(((trial - p) ** 2).sum() > 0.81 for p in positions):
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


# What starts several processes itself, or watches clocks and memory, runs in one worker, one after the other.
ALONE = ("test_two_hosts.py", "test_memory.py", "test_scaling.py", "test_workers.py", "test_train.py")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()) or item.path.name in ALONE:
            item.add_marker(pytest.mark.xdist_group("ranks"))


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
