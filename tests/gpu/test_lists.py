"""Neighbour lists made on a device are the host's: the same edges with the same shifts at the same places."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule

from multifid.graphs import candidates, device_neighbors
from multifid.graphs.candidates import missing
from multifid.graphs.device_neighbors import device_neighbor_list
from multifid.graphs.neighbors import neighbor_list
from multifid.parallel.devices import use
from test_neighbors import free, of_ase, pack, random_cell

PBC = ((1, 1, 1), (1, 1, 0), (0, 0, 1), (0, 0, 0))


@pytest.fixture
def where(device) -> torch.device:
    pytest.importorskip("nvalchemiops", reason="needs nvalchemi-toolkit-ops: pip install 'multifid[gpu]'")
    if trouble := missing(device):
        pytest.skip(trouble)
    return device


def assert_the_hosts(packed, cutoff: float, device: torch.device) -> None:
    edges, shifts = device_neighbor_list(packed, cutoff, device)
    assert edges.device == shifts.device == device
    host_edges, host_shifts = neighbor_list(packed, cutoff)
    assert np.array_equal(edges.cpu().numpy(), host_edges)
    assert np.array_equal(shifts.cpu().numpy(), host_shifts)


@pytest.mark.parametrize("all_pairs_up_to", [candidates.ALL_PAIRS_UP_TO, 0])
@pytest.mark.parametrize("kind", ["orthorhombic", "triclinic", "left-handed", "tiny"])
def test_molecules_slabs_and_crystals(where, kind, all_pairs_up_to, monkeypatch):
    """Both searches: all pairs, and lists of cells."""
    for module in (candidates, device_neighbors):
        monkeypatch.setattr(module, "ALL_PAIRS_UP_TO", all_pairs_up_to)
    rng = np.random.default_rng(5)
    extents = {pbc: (-15, 25) if any(pbc) else (0, 7) for pbc in PBC}
    systems = [(rng.uniform(*extents[pbc], (n, 3)), random_cell(kind), pbc) for pbc in PBC for n in (1, 2, 9)]
    assert_the_hosts(pack(*systems), 3.5, where)


def test_known_structures(where):
    known = [of_ase(bulk("Cu")), of_ase(bulk("NaCl", "rocksalt", a=5.64)), of_ase(fcc111("Al", (2, 2, 3), vacuum=8.0))]
    assert_the_hosts(pack(*known, free(molecule("C6H6").positions)), 5.0, where)


def test_lists_that_threads_make_side_by_side_are_right(where):
    """As loader threads do, while the device computes something else."""
    rng = np.random.default_rng(1)
    packs = [pack(*(free(rng.uniform(0, 6, (int(rng.integers(2, 30)), 3))) for _ in range(40))) for _ in range(8)]
    x = torch.ones(512, 512, device=where)
    with ThreadPoolExecutor(4, initializer=partial(use, where)) as pool:
        found = [pool.submit(device_neighbor_list, packed, 3.0, where) for packed in packs]
        for _ in range(50):
            x = (x @ x).clamp(max=1.0)
        lists = [future.result() for future in found]
    for packed, (edges, shifts) in zip(packs, lists, strict=True):
        host_edges, host_shifts = neighbor_list(packed, 3.0)
        assert np.array_equal(edges.cpu().numpy(), host_edges) and np.array_equal(shifts.cpu().numpy(), host_shifts)
    assert bool((x == 1.0).all())
