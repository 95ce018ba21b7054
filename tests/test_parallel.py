"""One process that holds every branch is the definition; any number of ranks, placed in any way, equals it."""

import json
import math
import os
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_molecules
from parallel_worker import HOST, Pool, train_until_killed
from safetensors.torch import load_file
from torch import nn
from torch.distributed import HashStore, TCPStore

from multifid.data.prepare import prepare
from multifid.parallel import heartbeat
from multifid.parallel.gradients import Gradients, Part
from multifid.parallel.groups import Group, Launch, launch
from multifid.train.checkpoint import load_checkpoint
from multifid.train.journal import read_journal

TASKS = ("apple", "berry", "cherry", "damson", "elder")


@pytest.fixture(scope="session")
def pool():
    pool = Pool(7)
    yield pool
    pool.close()


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


def values_of(stores, tasks: int, run: str = "unused", placement="auto", forces="direct", **train) -> dict:
    return {
        "run": str(run),
        "tasks": {t: {"store": str(stores[t]), "weight": 1.0 + i / 2} for i, t in enumerate(TASKS[:tasks])},
        "model": {
            "cutoff": 3.0,
            "encoder": {"name": "egnn", "layers": 1, "hidden": 8, "vectors": 2},
            "branch": {"hidden": [6], "forces": forces},
        },
        "train": {"batch": 3, "steps": 12, "epoch_steps": 6, "warmup": 2, "clip": 0.5, "precision": "fp64"} | train,
        "parallel": {"placement": placement},
    }


def random_placement(tasks: int, ranks: int, seed: int) -> dict[str, list[int]]:
    """Any placement at all: groups of any sizes that overlap as they happen to; nobody idle."""
    generator = random.Random(seed)
    out = {t: sorted(generator.sample(range(ranks), generator.randint(1, ranks))) for t in TASKS[:tasks]}
    for idle in set(range(ranks)) - {r for where in out.values() for r in where}:
        task = generator.choice(TASKS[:tasks])
        out[task] = sorted({*out[task], idle})
    return out


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300))


def assert_equal_to_one_process(one: dict, many: list[dict], tolerance: float) -> None:
    for rank in many:
        for a, b in zip(one["totals"], rank["totals"], strict=True):
            np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(rank["validation"], one["validation"], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(rank["norms"], one["norms"], rtol=tolerance)
        assert rank["norms"] == many[0]["norms"], "all ranks decide from the same bits"
        for mine, reference in zip(rank["gradients"], one["gradients"], strict=True):
            largest = max(np.abs(g).max() for g in reference.values())
            for name, g in mine.items():
                a = reference[name]
                assert np.abs(g - a).max() <= tolerance * max(np.abs(a).max(), 1e-3 * largest), name
        for kind in ("weights", "averages"):
            for name, tensor in rank[kind].items():
                assert difference(one[kind][name], tensor) <= tolerance, name
    assert set().union(*(rank["weights"] for rank in many)) == set(one["weights"])
    for step in range(5):
        seen = [s for rank in many for batch in rank["structures"][step] for s in batch]
        assert sorted(seen) == sorted(s for batch in one["structures"][step] for s in batch)


SIZES = [(5, 1), (5, 2), (5, 3), (5, 5), (5, 7), (3, 5), (2, 4), (1, 3)]
UNEVEN = {"apple": [0, 1, 2, 3], "berry": [3, 4], "cherry": [4], "damson": [5, 6], "elder": [0, 6]}
CASES = [(tasks, ranks, placement) for tasks, ranks in SIZES for placement in ("replicated", "split", "random")]
CASES += [(5, 7, "uneven"), (5, 3, "auto")]
MODES = [  # forces, most edges of a micro-batch, task without forces, task without labels in the third step
    ("direct", None, None, None),
    ("conservative", None, "berry", None),
    ("direct", 20, "apple", "cherry"),
    ("conservative", 20, None, "apple"),
    ("direct", None, None, "apple"),
]
_reference: dict = {}


@pytest.mark.parametrize(("tasks", "ranks", "placement", "mode"), [(*c, i % len(MODES)) for i, c in enumerate(CASES)])
def test_any_number_of_ranks_equals_one_process(pool, five, tasks, ranks, placement, mode):
    forces, max_edges, *missing = MODES[mode]
    if (tasks, mode) not in _reference:
        values = values_of(five, tasks, forces=forces, max_edges=None)
        _reference[tasks, mode] = pool.run(1, "five_steps", values, *missing, 10_000)[0]
    where = {"random": random_placement(tasks, ranks, seed=ranks), "uneven": UNEVEN}.get(placement, placement)
    values = values_of(five, tasks, placement=where, forces=forces, max_edges=max_edges)
    many = pool.run(ranks, "five_steps", values, *missing, 2_000)
    if max_edges is not None and ranks < tasks:
        assert max(rank["micro"] for rank in many) > 1
    assert_equal_to_one_process(_reference[tasks, mode], many, tolerance=1e-10)
