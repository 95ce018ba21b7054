"""Whole runs on a device are the CPU's: one stream or two, threads, ranks, resumed, evaluated."""

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from multifid.config import parse_config
from multifid.evaluation.data import Data, Share
from multifid.evaluation.evaluate import evaluate_run
from multifid.graphs.candidates import missing
from multifid.store.store import Store
from multifid.training.journal import read_journal
from multifid.training.run import train
from test_train import assert_same_bits, config_of

MEASURES = ("loss", "energy_mae", "forces_mae")


def run_on(both, folder, device, parallel=None, forces="direct", **train_):
    """A run of ten steps in float64 with two epochs, and what it is called."""
    settings = {"precision": "fp64", "steps": 10, "epoch_steps": 5, "log_every": 2, "workers": 2, "device": str(device)}
    values = config_of(both, folder, train=settings | train_, parallel=parallel or {})
    values["model"]["branch"]["forces"] = forces
    return values


def ended(values: dict):
    train(parse_config(values, "test"), Console(quiet=True))
    return Path(values["run"])


def assert_the_same(run, other, tolerance: float = 1e-8) -> None:
    """Rounding apart: sums over neighbours are in no order on an accelerator."""
    for name in ("last.safetensors", "model.safetensors"):
        a, b = load_file(f"{run}/{name}"), load_file(f"{other}/{name}")
        assert a.keys() == b.keys()
        for key in a:
            assert float((a[key] - b[key]).abs().max()) <= tolerance * max(float(b[key].abs().max()), 1e-3), key
    for mine, theirs in zip(read_journal(run), read_journal(other), strict=True):
        assert (mine["step"], mine["task"], mine["structures"]) == (
            theirs["step"],
            theirs["task"],
            theirs["structures"],
        )
        for key in MEASURES:
            assert mine[key] == theirs[key] or math.isclose(mine[key], theirs[key], rel_tol=tolerance), key


@pytest.fixture
def reference(both, tmp_path):
    """The run on the CPU."""
    return ended(run_on(both, tmp_path / "reference", "cpu"))


def test_a_run_is_the_cpus_and_so_is_one_that_was_stopped_and_resumed(both, device, tmp_path, reference):
    assert_the_same(ended(run_on(both, tmp_path / "whole", device)), reference)
    half = run_on(both, tmp_path / "half", device)
    ended(half | {"train": half["train"] | {"steps": 5, "schedule": "constant"}})
    whole = run_on(both, tmp_path / "constant", "cpu", schedule="constant")
    resumed = half | {"train": half["train"] | {"schedule": "constant", "change_tasks": True}}
    assert_the_same(ended(resumed), ended(whole))


def test_a_deterministic_run_ends_with_the_same_bits(both, device, tmp_path):
    one, other = (
        ended(run_on(both, tmp_path / name, device, precision="fp32", deterministic=True)) for name in ("one", "other")
    )
    assert_same_bits(one, other)


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_lists_on_a_stream_of_their_own_change_no_number(both, device, tmp_path, forces):
    """Two streams and two loader threads beside the step, against lists of the host."""
    pytest.importorskip("nvalchemiops", reason="needs nvalchemi-toolkit-ops: pip install 'multifid[gpu]'")
    if trouble := missing(device):
        pytest.skip(trouble)
    one, two = (
        ended(run_on(both, tmp_path / where, device, forces=forces, neighbors=where, max_edges=200))
        for where in ("host", "device")
    )
    assert_the_same(two, one)


@pytest.mark.parametrize(
    "parallel", [{"placement": "split"}, {"placement": "replicated"}, {"placement": "split", "shard_encoder": True}]
)
def test_two_ranks_are_one_process(both, device, tmp_path, pool, parallel, reference):
    """NCCL, a device for each rank; Gloo on the CPU."""
    if device.type != "cpu" and (torch.accelerator.device_count() < 2 or device.index):
        pytest.skip("NCCL needs a device for each of two ranks")
    values = run_on(both, tmp_path / "ranks", device.type, parallel)
    assert pool.run(2, "whole_run", values) == [0, 0]
    assert_the_same(Path(values["run"]), reference)


def test_sigterm_on_one_rank_stops_all_at_the_same_step(both, device, tmp_path, pool):
    if device.type != "cpu" and (torch.accelerator.device_count() < 2 or device.index):
        pytest.skip("NCCL needs a device for each of two ranks")
    values = run_on(both, tmp_path / "stopped", device.type, steps=40, epoch_steps=20)
    assert pool.run(2, "whole_run", values, 3, 1) == [143, 143]
    steps = {step for step, _, complaints in pool.run(2, "newest_checkpoint", str(values["run"])) if not complaints}
    assert steps == {4 if device.type == "cpu" else 5}, "on an accelerator all hear of it one step later"


def test_a_run_leaves_the_other_devices_alone(both, device, tmp_path, pool):
    """A context takes some hundred MB of a device, and any thread that forgets its device opens one on device 0."""
    if device.type == "cuda" and device.index != 1:
        pytest.skip("device 0 is the one of this run")
    values = run_on(both, tmp_path / "alone", device)
    assert pool.run(1, "contexts_after_a_run", values) == [[device.index] if device.index else []]


def test_an_evaluation_is_the_cpus(both, device, tmp_path, reference):
    data = [Data(name, Store(path), name) for name, path in both.items()]
    here, there = (
        evaluate_run(reference, data, share=Share(workers=2), device=place) for place in (device, torch.device("cpu"))
    )
    for one, other in zip(here, there, strict=True):
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
