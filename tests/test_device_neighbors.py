"""Neighbour lists by the toolkit's kernels, on the CPU here, are those of `neighbor_list`, edge by edge."""

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule

from multifid.graphs import candidates, device_neighbors
from multifid.graphs.candidates import Candidates
from multifid.graphs.device_neighbors import DeviceLists, compare, device_neighbor_list
from multifid.graphs.neighbors import neighbor_list
from multifid.structures.structure import Packed
from test_neighbors import free, of_ase, pack, random_cell

pytest.importorskip("nvalchemiops", reason="needs nvalchemi-toolkit-ops: pip install 'multifid[gpu]'")

HERE = torch.device("cpu")
PBC = ((1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 1), (1, 0, 0), (0, 0, 0))


def assert_the_hosts(packed, cutoff):
    """The same edges with the same shifts at the same places."""
    edges, shifts = device_neighbor_list(packed, cutoff, HERE)
    assert edges.dtype == torch.int64 and shifts.dtype == torch.float64
    host_edges, host_shifts = neighbor_list(packed, cutoff)
    assert np.array_equal(edges.numpy(), host_edges)
    assert np.array_equal(shifts.numpy(), host_shifts)
    return edges


def systems_of(rng, kind):
    """Structures of few atoms, many of them outside their cell."""
    extents = {pbc: (-15, 25) if any(pbc) else (0, 7) for pbc in PBC}
    return [(rng.uniform(*extents[pbc], (n, 3)), random_cell(kind), pbc) for pbc in PBC for n in (1, 2, 9)]


def skewed(rng):
    """A cell whose vectors are longer than they are apart."""
    while True:
        cell = np.diag(rng.uniform(2, 8, 3)) @ (np.eye(3) + rng.normal(0, 1.0, (3, 3)))
        if abs(np.linalg.det(cell)) > 8:
            return cell


@pytest.mark.parametrize("kind", ["orthorhombic", "triclinic", "left-handed", "tiny"])
@pytest.mark.parametrize("all_pairs_up_to", [candidates.ALL_PAIRS_UP_TO, 0], ids=["all pairs", "cells"])
def test_every_kind_of_structure_has_the_hosts_edges(kind, all_pairs_up_to, monkeypatch):
    monkeypatch.setattr(candidates, "ALL_PAIRS_UP_TO", all_pairs_up_to)
    systems = systems_of(np.random.default_rng(2), kind)
    assert_the_hosts(pack(*systems, dtype=np.float32), 5.0)
    assert_the_hosts(pack(*systems[::-1]), 2.5)


@pytest.mark.parametrize("seed", range(20))
def test_random_batches_have_the_hosts_edges(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(candidates, "ALL_PAIRS_UP_TO", int(rng.choice([0, 2000, candidates.ALL_PAIRS_UP_TO])))
    systems = []
    for _ in range(int(rng.integers(1, 8))):
        pbc, cell = rng.random(3) < 0.6, skewed(rng)
        inside = rng.uniform(*((0, 1) if rng.random() < 0.5 else (-2, 3)), (int(rng.integers(1, 20)), 3)) @ cell
        systems.append((inside + rng.normal(0, 9, 3), cell, pbc))
    packed, cutoff = pack(*systems, dtype=np.float32), float(rng.choice([2.5, 4.0, 6.0]))
    compare(packed, cutoff, *device_neighbor_list(packed, cutoff, HERE))


def test_known_structures_have_the_hosts_edges():
    slab, flat = fcc111("Al", (1, 1, 3), vacuum=6.0), fcc111("Al", (1, 1, 3))
    copper = pack(of_ase(bulk("Cu", "fcc", 3.61)), dtype=np.float32)
    assert assert_the_hosts(copper, 5.0).shape == (2, 42)  # all of them images of the one atom
    names = ("H2O", "CH4", "C6H6")
    mixed = [of_ase(a) for a in (slab, bulk("NaCl", "rocksalt", 5.6), flat, *map(molecule, names))]
    assert_the_hosts(pack(*mixed, free([[1.0, 2.0, 3.0]]), *mixed[::-1], dtype=np.float32), 5.0)
    cloud = np.random.default_rng(0).uniform(0, 14, (300, 3))
    assert_the_hosts(pack(free(cloud), of_ase(molecule("H2")), (cloud, np.eye(3) * 14, [1, 1, 1])), 4.0)


def test_nothing_and_lone_atoms_have_no_edges():
    nothing = Packed(*(np.zeros(s) for s in (0, (0, 3))), np.zeros(0, np.int64), *(np.zeros((0, 3)) for _ in range(4)))
    assert assert_the_hosts(nothing, 5.0).shape == (2, 0)
    lone = pack(free([[1.0, 2.0, 3.0]]), (np.zeros((1, 3)), np.eye(3) * 9, [1, 1, 1]))
    assert assert_the_hosts(lone, 5.0).shape == (2, 0)


def test_rows_that_are_too_short_are_made_longer(monkeypatch):
    packed = pack(*systems_of(np.random.default_rng(3), "tiny"))
    monkeypatch.setattr(candidates, "DENSITY", 1e-9)
    for all_pairs_up_to in (1 << 25, 0):
        monkeypatch.setattr(candidates, "ALL_PAIRS_UP_TO", all_pairs_up_to)
        assert_the_hosts(packed, 5.0)


@pytest.mark.parametrize("limit", ["LAUNCH", "ATOMS_AT_ONCE"])
def test_structures_that_are_too_many_for_one_launch_are_searched_in_portions(limit, monkeypatch):
    monkeypatch.setattr(candidates, limit, 40)
    assert_the_hosts(pack(*systems_of(np.random.default_rng(4), "triclinic")), 4.0)


def test_an_atom_is_seen_by_all_that_it_sees_also_at_the_very_cutoff():
    rng = np.random.default_rng(5)
    crystals = [of_ase(bulk("Cu", "sc", a) * (k, 1, 2)) for a in (5.0, 2.5, 5 / 3) for k in (1, 2, 3)]
    packed = pack(*((p + rng.uniform(-9, 9, 3), cell, pbc) for p, cell, pbc in crystals))
    edges, shifts = device_neighbor_list(packed, 5.0, HERE)
    forth, back = np.column_stack([edges.T, shifts]).tolist(), np.column_stack([edges.flip(0).T, -shifts]).tolist()
    assert sorted(forth) == sorted(back) and forth


def test_the_order_in_which_a_kernel_finds_pairs_changes_nothing(monkeypatch):
    packed = pack(*systems_of(np.random.default_rng(6), "tiny"))
    edges, shifts = device_neighbor_list(packed, 5.0, HERE)
    again = device_neighbor_list(packed, 5.0, HERE)
    assert torch.equal(edges, again[0]) and torch.equal(shifts, again[1])

    def stirred(*arguments):
        for k, part in enumerate(candidates.candidates(*arguments)):
            order = torch.randperm(len(part.receivers), generator=torch.Generator().manual_seed(k))
            yield Candidates(part.receivers[order], part.senders[order], part.shifts[order])

    monkeypatch.setattr(device_neighbors, "candidates", stirred)
    again = device_neighbor_list(packed, 5.0, HERE)
    assert torch.equal(edges, again[0]) and torch.equal(shifts, again[1])


@pytest.mark.parametrize(
    "odd",
    [
        free([[0, 0, 0], [1, 0, 0], [1, 0, 1e-8]]),
        ([[0, 0, 0], [0, 0, 1], [0, 4, 1]], np.eye(3) * 4, [1, 1, 1]),
        ([[0, 0, 0], [0, 0, 1], [0, 4, 1]], np.eye(3) * 4, [0, 1, 0]),
        ([[0, 0, 0]], np.diag([4.0, 4.0, 0.0]), [1, 1, 1]),
        ([[0, 0, 0]], [[4, 0, 0], [8, 0, 0], [0, 0, 4]], [1, 1, 0]),
        ([[0, 0, 0], [0, 0, 1e5]], np.diag([8, 8, 0]), [1, 1, 0]),
        ([[0, 0, np.nan]], np.eye(3), [1, 1, 1]),
    ],
)
def test_what_the_host_refuses_is_refused_in_the_same_words(odd, monkeypatch):
    packed = pack(free([[0, 0, 0], [0, 0, 1]]), odd)
    with pytest.raises(ValueError, match="structure 1: ") as of_the_host:
        neighbor_list(packed, 5.0)
    for all_pairs_up_to in (1 << 25, 0):
        monkeypatch.setattr(candidates, "ALL_PAIRS_UP_TO", all_pairs_up_to)
        with pytest.raises(ValueError, match="structure 1: ") as here:
            device_neighbor_list(packed, 5.0, HERE)
        assert str(here.value) == str(of_the_host.value)


def test_the_first_list_of_a_device_is_compared_with_the_hosts(monkeypatch):
    packed = pack(*systems_of(np.random.default_rng(7), "triclinic"))

    def forgetful(*arguments):
        for part in candidates.candidates(*arguments):
            yield Candidates(part.receivers[1:], part.senders[1:], part.shifts[1:])

    lists = DeviceLists(HERE)
    lists(packed, 4.0)
    monkeypatch.setattr(device_neighbors, "candidates", forgetful)
    lists(packed, 4.0)  # it is trusted now
    with pytest.raises(RuntimeError, match=r"made on cpu are wrong: .* set train.neighbors to host"):
        DeviceLists(HERE)(packed, 4.0)
