"""The estimate of edges: right on average where it is calibrated, close for shapes that it was not calibrated on."""

import ase
import numpy as np
import pytest
from ase.build import bulk
from ase.io import write

from multifid.feed.loader import TaskConfig, edge_costs, open_sources
from multifid.graphs.neighbors import neighbor_list
from multifid.preparation.prepare import prepare

CUTOFF = 5.0


def source_of(frames, folder):
    """Frames with a planted energy, each a relative of its own where it can be, as a store of one task."""
    for atoms in frames:
        atoms.info["energy"] = -1.0
    write(folder / "frames.xyz", frames, format="extxyz")
    prepare("extxyz", [folder / "frames.xyz"], folder / "store", task="planted", trust_units=True, progress=False)
    return open_sources({"planted": TaskConfig(store=str(folder / "store"))})[0]


def counted(source, index, cutoff=CUTOFF):
    packed = source.store.read(index, [])
    edges, _ = neighbor_list(packed, cutoff)
    return np.bincount(np.repeat(np.arange(len(index)), packed.natoms)[edges[0]], minlength=len(index))


def every(source):
    return np.arange(source.store.structures)


def ball(natoms, rng):
    """Carbon atoms at random places in a ball of molecular density."""
    radius = np.cbrt(3 * natoms / (4 * np.pi * 0.09))
    points = rng.normal(size=(natoms, 3))
    points *= radius * np.cbrt(rng.random((natoms, 1))) / np.linalg.norm(points, axis=1, keepdims=True)
    return ase.Atoms(f"C{natoms}", positions=points)


def test_a_molecule_has_the_pairs_of_a_ball(tmp_path):
    rng = np.random.default_rng(0)
    source = source_of([ball(n, rng) for n in (4, 12, 40, 90, 120) for _ in range(40)], tmp_path)
    costs, true, natoms = edge_costs(source, every(source), CUTOFF), counted(source, every(source)), source.store.natoms
    for n in (4, 12, 40, 90, 120):
        assert costs[natoms == n].mean() == pytest.approx(true[natoms == n].mean(), rel=0.05)


def test_a_crystal_has_as_many_edges_as_its_density_asks(tmp_path):
    """Dense and open metals, in cells of one atom and of many: one mean per atom would be off by a factor of ten."""
    frames = [
        bulk(symbol, "fcc", a) * (k, 1, 1)
        for symbol, a in (("Cu", 3.6), ("Al", 4.05), ("Ca", 5.6), ("Xe", 6.2), ("Rn", 7.0))
        for k in (1, 2, 3)
    ]
    source = source_of(frames, tmp_path)
    costs, true = edge_costs(source, every(source), 6.0), counted(source, every(source), 6.0)
    assert true.max() / source.store.natoms[true.argmax()] > 5 * true.min() / source.store.natoms[true.argmin()]
    np.testing.assert_allclose(costs, true, rtol=0.35)  # shells of neighbours come all at once
    assert np.corrcoef(np.log(costs), np.log(true))[0, 1] > 0.98


@pytest.mark.parametrize("cutoff", [4.0, 5.0, 6.0])
def test_the_estimate_is_right_on_average_where_the_manifest_counted(stores, cutoff):
    for path in stores.values():
        source = open_sources({path.name: TaskConfig(store=str(path))})[0]
        train = source.store.index("train").astype(np.int64)
        total = counted(source, train, cutoff).sum()
        assert edge_costs(source, train, cutoff).sum() == pytest.approx(total, rel=0.03)


def test_no_molecule_has_more_edges_than_pairs_and_an_atom_alone_none(tmp_path):
    rng = np.random.default_rng(1)
    source = source_of([ball(n, rng) for n in (1, 2, 3, 60) for _ in range(10)], tmp_path)
    natoms = source.store.natoms.astype(int)
    costs = edge_costs(source, every(source), 50.0)
    assert (costs <= natoms * (natoms - 1)).all() and (costs[natoms == 1] == 0).all()


def test_a_slab_in_vacuum_is_no_crystal(tmp_path):
    """Not periodic in all directions: its cell says nothing about its density."""
    slab = bulk("Cu", "fcc", 3.6, cubic=True) * (2, 2, 2)
    slab.pbc = (True, True, False)
    slab.cell[2, 2] = 0.0
    source = source_of([slab.copy() for _ in range(5)], tmp_path)
    costs, true = edge_costs(source, every(source), CUTOFF), counted(source, every(source))
    assert costs.sum() == pytest.approx(true.sum(), rel=0.05)
