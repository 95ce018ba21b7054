"""`train.neighbors`: where the lists of a run are made changes no number, and where they cannot be made is an error."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from multifid.config import parse_config
from multifid.feed.loader import host_lists, open_sources
from multifid.graphs import candidates
from multifid.graphs.device_neighbors import DeviceLists
from multifid.graphs.padding import pad
from multifid.preparation.prepare import prepare
from multifid.training.feed import lists_of
from multifid.training.step import pinned
from test_train import assert_same_bits, config_of, feed_of, start

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def toolkit():
    return pytest.importorskip("nvalchemiops", reason="needs nvalchemi-toolkit-ops: pip install 'multifid[gpu]'")


@pytest.fixture(scope="module")
def mixed(stores, tmp_path_factory):
    """The small stores, and one of crystals and slabs whose atoms see images of themselves."""
    folder, rng, frames = tmp_path_factory.mktemp("crystals"), np.random.default_rng(0), []
    for k in range(30):
        cell = np.diag(rng.uniform(2.2, 4.0, 3)) + rng.normal(0, 0.3, (3, 3))
        grid = np.argwhere(np.ones((2, 1, 1 + k % 2))) / (2, 1, 1 + k % 2)
        atoms = Atoms(
            rng.choice([6, 8], len(grid)), grid @ cell + rng.normal(0, 0.05, 3) + k, cell=cell, pbc=(1, 1, k % 3 > 0)
        )
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(-9, 1), forces=rng.normal(0, 1, (len(grid), 3)))
        frames.append(atoms)
    write(folder / "slabs.xyz", frames, format="extxyz")
    prepare(
        "extxyz",
        [folder / "slabs.xyz"],
        folder / "slabs",
        task="slabs",
        fractions=(0.6, 0.2, 0.2),
        trust_units=True,
        progress=False,
    )
    return stores | {"slabs": folder / "slabs"}


def config(stores, tmp_path, **train):
    return parse_config(config_of(stores, tmp_path / "run", train=train), "test")


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_a_run_with_lists_from_the_device_is_the_run_with_the_hosts(mixed, tmp_path, toolkit, forces):
    runs = {}
    for where in ("host", "device"):
        train = {"neighbors": where, "max_edges": 300, "precision": "fp64", "workers": 2, "steps": 10, "epoch_steps": 5}
        values = config_of(mixed, tmp_path / where, train=train)
        values["model"]["branch"]["forces"] = forces
        runs[where] = start(values)
    assert_same_bits(runs["host"], runs["device"])


def test_batches_have_the_same_edges_padded_or_not(mixed, tmp_path, toolkit):
    settings = config(mixed, tmp_path, max_edges=200)
    feed = feed_of(settings, open_sources(settings.tasks))
    for host, device in zip(feed.step(3)[0], replace(feed, lists=DeviceLists(CPU)).step(3)[0], strict=True):
        for one, other in ((host, device), (pad(host, 3.0), pad(device, 3.0))):
            assert torch.equal(one.edges, other.edges) and torch.equal(one.shifts, other.shifts)
        assert host.shifts.any() or "slabs" not in host.slices


def test_edges_stay_where_they_were_made(stores, tmp_path):
    settings = config(stores, tmp_path)
    elsewhere = torch.device("meta")  # as good a device as any to be on
    lists = lambda packed, cutoff: tuple(x.to(elsewhere) for x in host_lists(packed, cutoff))  # noqa: E731
    feed = feed_of(settings, open_sources(settings.tasks))
    (here,), (batch,) = feed.step(0).batches, replace(feed, lists=lists).step(0).batches
    assert batch.edges.device == batch.shifts.device == elsewhere and batch.positions.device == CPU
    padded = pad(batch, 3.0)
    assert padded.edges.device == padded.shifts.device == elsewhere and padded.positions.device == CPU
    assert padded.edges.shape == pad(here, 3.0).edges.shape
    assert pinned(padded.edges) is padded.edges


def test_without_the_toolkit_the_error_says_what_to_install(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "PACKAGE", "no-such-package")
    monkeypatch.setitem(sys.modules, "nvalchemiops", None)
    with pytest.raises(ValueError, match=r"train\.neighbors: device: .* pip install 'multifid\[gpu\]'"):
        start(config_of(stores, tmp_path / "run", train={"neighbors": "device"}))
    assert not (tmp_path / "run" / "config.yaml").exists()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert lists_of("auto", GPU) is host_lists
    assert lists_of("auto", CPU) is host_lists


def test_a_toolkit_that_was_not_tested_is_not_used(monkeypatch):
    monkeypatch.setattr(candidates, "version", lambda name: "0.3.1")
    assert candidates.missing(CPU) == "nvalchemi-toolkit-ops 0.3.1 is too old: pip install 'multifid[gpu]'"
    monkeypatch.setattr(candidates, "version", lambda name: "0.10.0rc1")
    assert candidates.missing(CPU) is None


def test_auto_is_the_host_until_a_gpu_has_been_seen_to_make_its_lists(monkeypatch, toolkit):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for device in (CPU, GPU):
        assert lists_of("auto", device) is host_lists
        assert lists_of("host", device) is host_lists
        assert lists_of("device", device) == DeviceLists(device)


def test_other_accelerators_have_no_lists_of_their_own(monkeypatch, toolkit):
    monkeypatch.setattr(torch.version, "cuda", None)  # as in torch for AMD, which calls its devices cuda
    for device in (GPU, torch.device("xpu")):
        assert lists_of("auto", device) is host_lists
        with pytest.raises(ValueError, match="NVIDIA GPUs and on the CPU, not on"):
            lists_of("device", device)


def test_lists_from_the_device_are_refused_with_cuda_graphs(stores, tmp_path):
    with pytest.raises(ValueError, match="which must not be while a CUDA graph is recorded"):
        config(stores, tmp_path, neighbors="device", compile="reduce-overhead")
