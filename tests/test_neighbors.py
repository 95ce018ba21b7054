"""Neighbour lists against ASE's, which shares no code with ours, and against known crystals."""

import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from ase.neighborlist import primitive_neighbor_list

from multifid.graphs.neighbors import edges_per_atom, neighbor_list
from multifid.structures.structure import Packed


def pack(*systems, dtype=np.float64):
    """Systems (positions, cell, pbc) laid end to end."""
    natoms = np.array([len(s[0]) for s in systems], np.int64)
    return Packed(
        numbers=np.ones(natoms.sum(), np.uint8),
        positions=np.concatenate([np.reshape(s[0], (-1, 3)) for s in systems]).astype(dtype),
        natoms=natoms,
        cell=np.array([s[1] for s in systems], np.float64),
        pbc=np.array([s[2] for s in systems], bool),
        charge=np.zeros(len(systems), np.int8),
        spin=np.ones(len(systems), np.uint8),
    )


def of_ase(atoms):
    return atoms.positions, np.asarray(atoms.cell), atoms.pbc


def free(positions):
    return np.asarray(positions, float), np.zeros((3, 3)), [False] * 3


def entries(edges, shifts):
    return sorted(map(tuple, np.column_stack([edges.T, shifts]).astype(int).tolist()))


def expected(packed, cutoff):
    found = []
    for s, first in enumerate(packed.offsets[:-1]):
        positions = packed.positions[first : first + packed.natoms[s]].astype(np.float64)
        i, j, shifts = primitive_neighbor_list("ijS", packed.pbc[s], packed.cell[s], positions, cutoff)
        found += map(tuple, np.column_stack([i + first, j + first, shifts]).astype(int).tolist())
    return sorted(found)


def assert_equals_ase(packed, cutoff):
    edges, shifts = neighbor_list(packed, cutoff)
    assert edges.shape == (2, len(shifts)) and edges.dtype == np.int64 and shifts.shape[1] == 3
    assert (np.diff(edges[0]) >= 0).all()
    assert entries(edges, shifts) == expected(packed, cutoff)


RANDOM = np.random.default_rng(1)


def random_cell(kind):
    cell = np.diag(RANDOM.uniform(2.0, 9.0, 3))
    if kind == "triclinic":
        cell += RANDOM.normal(0, 1.0, (3, 3))
    if kind == "left-handed":
        cell = (cell + RANDOM.normal(0, 0.3, (3, 3)))[[1, 0, 2]]
    if kind == "tiny":
        cell = np.eye(3) * 1.9 + RANDOM.normal(0, 0.2, (3, 3))
    return cell


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_molecules_have_ases_neighbours(dtype):
    molecules = [of_ase(molecule(name)) for name in ("H2O", "CH4", "C6H6", "isobutane", "SiH4", "H2")]
    assert_equals_ase(pack(*molecules, dtype=dtype), 3.0)
    clouds = [free(RANDOM.uniform(0, 6, (n, 3))) for n in RANDOM.integers(1, 40, 60)]
    assert_equals_ase(pack(*clouds, dtype=dtype), 4.0)


@pytest.mark.parametrize("kind", ["orthorhombic", "triclinic", "left-handed", "tiny"])
def test_periodic_structures_have_ases_neighbours(kind):
    systems = []
    for pbc in ([1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]):
        for natoms in (1, 2, 7):  # positions far outside the cell, too
            systems.append((RANDOM.uniform(-15, 25, (natoms, 3)), random_cell(kind), pbc))
    assert_equals_ase(pack(*systems), 5.0)
    assert_equals_ase(pack(*systems, dtype=np.float32), 5.0)


def test_left_handed_cells_are_tested():
    assert np.linalg.det(random_cell("left-handed")) < 0


def test_slabs_and_crystals_and_molecules_mix_in_one_list():
    slab = fcc111("Al", (1, 1, 3), vacuum=6.0)
    assert not slab.pbc[2]
    flat = fcc111("Al", (1, 1, 3))  # no vacuum: the third cell vector is zero
    assert not np.asarray(flat.cell)[2].any()
    systems = [of_ase(a) for a in (molecule("H2O"), slab, bulk("NaCl", "rocksalt", 5.6), molecule("CH4"), flat)]
    assert_equals_ase(pack(*systems), 5.0)


def test_a_periodic_flag_decides_and_not_the_cell_vector():
    atoms = RANDOM.uniform(0, 4, (5, 3))
    assert_equals_ase(pack((atoms, np.eye(3) * 4, [0, 0, 0]), (atoms, np.eye(3) * 4, [1, 0, 0])), 5.0)


def test_large_molecules_have_ases_neighbours():
    assert_equals_ase(pack(free(RANDOM.uniform(0, 14, (300, 3))), free([[0, 0, 0], [0, 0, 1]])), 4.0)


def test_structures_too_large_for_all_images_have_the_same_neighbours(monkeypatch):
    systems = [of_ase(bulk("NaCl", "rocksalt", 5.6)), of_ase(fcc111("Al", (1, 1, 3), vacuum=6.0))]
    packed = pack(*systems, free(RANDOM.uniform(0, 14, (150, 3))), *systems)
    by_images = entries(*neighbor_list(packed, 5.0))
    monkeypatch.setattr("multifid.graphs.images.ALL_IMAGES_UP_TO", 0)
    assert entries(*neighbor_list(packed, 5.0)) == by_images


def test_an_atom_is_seen_by_all_that_it_sees_also_at_the_very_cutoff():
    crystals = [of_ase(bulk("Cu", "sc", a) * (k, 1, 2)) for a in (5.0, 2.5, 5 / 3) for k in (1, 2, 3)]
    crystals = [(p + RANDOM.uniform(-9, 9, 3), cell, pbc) for p, cell, pbc in crystals]
    edges, shifts = neighbor_list(pack(*crystals), 5.0)
    assert entries(edges, shifts) == entries(edges[::-1], -shifts)


def test_every_copper_atom_has_42_neighbours_within_5_angstrom():
    primitive = of_ase(bulk("Cu", "fcc", 3.61))
    edges, shifts = neighbor_list(pack(primitive, dtype=np.float32), 5.0)
    assert edges.shape == (2, 42) and not edges.any()
    assert (np.abs(shifts).sum(axis=1) > 0).all()  # every one of them an image of the atom itself
    assert edges_per_atom(pack(primitive, of_ase(bulk("Cu", "fcc", 3.61, cubic=True))), 5.0) == 42


def test_shifts_give_vectors_shorter_than_the_cutoff():
    packed = pack((RANDOM.uniform(-9, 9, (6, 3)), random_cell("triclinic"), [1, 1, 1]))
    edges, shifts = neighbor_list(packed, 6.0)
    vectors = packed.positions[edges[1]] - packed.positions[edges[0]] + shifts @ packed.cell[0]
    assert np.linalg.norm(vectors, axis=1).max() < 6.0


def test_nothing_and_lone_atoms_have_no_edges():
    nothing = Packed(*(np.zeros(s) for s in (0, (0, 3))), np.zeros(0, np.int64), *(np.zeros((0, 3)) for _ in range(4)))
    assert neighbor_list(nothing, 5.0)[0].shape == (2, 0) and edges_per_atom(nothing, 5.0) == 0
    lone = pack(free([[1.0, 2.0, 3.0]]), (np.zeros((1, 3)), np.eye(3) * 9, [1, 1, 1]))
    edges, shifts = neighbor_list(lone, 5.0)
    assert edges.shape == (2, 0) and shifts.shape == (0, 3)


@pytest.mark.parametrize(
    "clash",
    [
        free([[0, 0, 0], [1, 0, 0], [1, 0, 1e-8]]),
        ([[0, 0, 0], [0, 0, 1], [0, 4, 1]], np.eye(3) * 4, [1, 1, 1]),
        ([[0, 0, 0], [0, 0, 1], [0, 4, 1]], np.eye(3) * 4, [0, 1, 0]),
    ],
)
def test_coincident_atoms_are_refused(clash):
    with pytest.raises(ValueError, match=r"structure 1: atoms \d and \d coincide"):
        neighbor_list(pack(free([[0, 0, 0], [0, 0, 1]]), clash), 5.0)


def test_images_in_a_direction_without_periodicity_do_not_coincide():
    assert_equals_ase(pack(([[0, 0, 0], [0, 4, 0]], np.eye(3) * 4, [1, 0, 1])), 5.0)


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (np.zeros((3, 3)), [1, 1, 1]),
        (np.diag([4.0, 4.0, 0.0]), [1, 1, 1]),
        ([[4, 0, 0], [0, 4, 0], [4, 4, 0]], [1, 1, 1]),
        ([[4, 0, 0], [8, 0, 0], [0, 0, 4]], [1, 1, 0]),
    ],
)
def test_periodic_directions_without_volume_are_refused(cell, pbc):
    with pytest.raises(ValueError, match="linearly independent cell vectors"):
        neighbor_list(pack(([[0, 0, 0]], cell, pbc)), 5.0)


def test_extents_that_would_crash_the_cell_lists_are_refused():
    with pytest.raises(ValueError, match="extend less than"):
        neighbor_list(pack(([[0, 0, 0], [0, 0, 1e5]], np.diag([8, 8, 0]), [1, 1, 0])), 5.0)
    with pytest.raises(ValueError, match="extend less than"):
        neighbor_list(pack(([[0, 0, 0]], np.diag([8, 8, 1e6]), [1, 1, 1])), 5.0)
    with pytest.raises(ValueError, match="finite"):
        neighbor_list(pack(([[0, 0, np.nan]], np.eye(3), [1, 1, 1])), 5.0)
