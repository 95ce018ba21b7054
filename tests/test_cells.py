"""Whole cells, from the file to the error of a stress: molecules, slabs, wires, boxes and crystals in one store."""

import itertools

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console
from scipy.stats import ortho_group

from conftest import data_of
from multifid.config import parse_config
from multifid.evaluation.evaluate import evaluate_run
from multifid.feed.loader import collate, open_sources
from multifid.model.saved import load_potential
from multifid.preparation.prepare import prepare
from multifid.preparation.validate import NO_VOLUME, screen
from multifid.quality.duplicates import fingerprints
from multifid.store.block import pack
from multifid.store.store import Store
from multifid.structures.cells import completed, kept_vectors, spans_volume
from multifid.structures.structure import Labels, Packed, Structure
from multifid.training.journal import read_journal
from multifid.training.run import train

KINDS = {  # periodic directions, and whether the third vector is given
    "bulk": ([True] * 3, True),
    "slab": ([True, True, False], True),
    "wire": ([False, True, False], True),
    "box": ([False] * 3, True),
    "layer": ([True, True, False], False),
    "molecule": ([False] * 3, None),
}
WHOLE = ("bulk", "slab", "wire", "box")


def argon(kind: str, rng: np.random.Generator) -> ase.Atoms:
    """Atoms in a tilted cell, some of them outside of it, with energy, forces and stress of a pair potential."""
    pbc, third = KINDS[kind]
    cell = np.diag([5.0, 4.0, 9.0]) + rng.normal(0, 0.3, (3, 3))
    inside = np.array([[0.1, 0.2, 0.2], [0.6, 0.7, 0.5], [0.1, 0.2, 0.8]]) + rng.normal(0, 0.02, (3, 3))
    atoms = ase.Atoms("Ar3", inside @ cell + cell[0] * 2, cell=cell, pbc=pbc)
    atoms.calc = LennardJones(sigma=2.6, epsilon=0.05, rc=4.0, smooth=True)
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    if not third:
        atoms.cell[2] = 0.0
    if third is None:
        atoms.cell[:] = 0.0
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twenty structures of each kind, as ASE writes them."""
    folder, rng = tmp_path_factory.mktemp("cells"), np.random.default_rng(5)
    frames = [argon(kind, rng) for _ in range(20) for kind in KINDS]
    ase.io.write(folder / "argon.xyz", frames, format="extxyz")
    prepare("extxyz", [folder / "argon.xyz"], folder / "argon", trust_units=True, progress=False)
    return folder / "argon", frames


def test_a_store_keeps_whole_cells_and_sets_stress_without_a_volume_aside(store):
    path, frames = store
    opened = Store(path, verify="open")
    packed = opened.read(np.arange(len(frames)))
    np.testing.assert_allclose(packed.cell, [f.cell.array for f in frames], atol=1e-7)
    np.testing.assert_array_equal(packed.pbc, [f.pbc for f in frames])
    stress = packed.labels["extxyz"].stress
    for k, (kind, frame) in enumerate(zip(list(KINDS) * 20, frames, strict=True)):
        if kind in WHOLE:
            np.testing.assert_allclose(stress[k], frame.get_stress(voigt=False), atol=1e-9)
        else:
            assert np.isnan(stress[k]).all()
    about = opened.manifest["tasks"]["extxyz"]["labels"]
    assert about == {"energy": 120, "forces": 120, "stress": 80}
    assert opened.manifest["dropped_labels"] == {NO_VOLUME: 40}


def test_training_and_evaluating_a_mixed_store_with_its_stress_is_finite_and_right(store, tmp_path):
    values = {
        "run": str(tmp_path / "run"),
        "tasks": {"argon": {"store": str(store[0]), "labels": "extxyz"}},
        "model": {
            "cutoff": 4.0,
            "encoder": {"name": "painn", "layers": 1, "hidden": 16},
            "branch": {"hidden": [16], "forces": "conservative"},
        },
        "objective": {"stress": 1.0},
        "train": {
            "batch": 12,
            "steps": 20,
            "epoch_steps": 10,
            "lr": 5e-3,
            "warmup": 5,
            "log_every": 5,
            "precision": "fp64",
        },
    }
    run = train(parse_config(values, "test"), Console(quiet=True)).run
    assert all(np.isfinite(r["loss"]) for r in read_journal(run))
    (row,) = evaluate_run(run, data_of(str(store[0])), "all", branch="argon")
    potential, description = load_potential(run)
    (source,) = open_sources(parse_config(values, "test").tasks)
    errors = []
    for k, frame in enumerate(store[1]):  # one by one, in float64, against what ASE has written
        batch = collate([(source, np.array([k]))], 4.0)
        stress = (
            potential.double()(batch, stress=True)["argon"].stress[0].numpy() * description["tasks"]["argon"]["scale"]
        )
        if list(KINDS)[k % len(KINDS)] in WHOLE:
            errors.append(stress - frame.get_stress(voigt=False))
        else:
            assert np.isnan(stress).all()
    assert row["structures"] == len(store[1]) and row["stress_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)


def test_a_store_that_kept_no_vectors_of_open_directions_gives_no_stress_there(store, tmp_path):
    """Stores of the first version: zero rows where not periodic, and the stress nevertheless."""
    config = parse_config({"run": "x", "tasks": {"argon": {"store": str(store[0]), "labels": "extxyz"}}}, "test")
    (source,) = open_sources(config.tasks)
    read = source.store.read

    def as_they_were(indices, tasks):
        packed = read(indices, tasks)
        packed.cell = np.where(packed.pbc[:, :, None], packed.cell, 0.0)
        packed.labels["extxyz"].stress[:] = 1.0
        return packed

    source.store.read = as_they_were
    labelled = ~collate([(source, np.arange(6))], 4.0).targets["argon"].stress.isnan().any(dim=(1, 2))
    assert labelled.tolist() == [True, False, False, False, False, False]


def test_what_spans_a_volume():
    cells = np.array([np.eye(3), np.diag([1.0, 1.0, 0.0]), np.ones((3, 3)), np.diag([5.0, 5.0, 1e-4]), -20 * np.eye(3)])
    assert spans_volume(cells).tolist() == [True, False, False, False, True]
    assert not spans_volume(np.full((3, 3), np.nan)) and not spans_volume(np.full((3, 3), np.inf))
    odd = np.array([np.diag([4.0, 4.0, np.nan]), np.diag([4.0, 4.0, 1e9]), np.diag([4.0, np.nan, 5.0])])
    kept = kept_vectors(odd, np.array([[True, True, False]] * 3))
    np.testing.assert_array_equal(kept[:2], [np.diag([4.0, 4.0, 0.0])] * 2)
    np.testing.assert_array_equal(kept[2], odd[2])  # periodic: refused, not mended


def test_what_is_periodic_without_any_cell_vector_is_refused_and_not_taken_for_a_molecule():
    atoms = {"numbers": np.array([18]), "positions": np.zeros((1, 3)), "labels": {"a": Labels(-1.0)}}
    flat = Structure(**atoms, relative="Ar1", source_id="0", cell=np.zeros((3, 3)), pbc=np.array([True, False, False]))
    assert screen(pack([flat]))[0] == ["a periodic cell vector is zero or not finite"]


@pytest.mark.parametrize("pbc", list(itertools.product([True, False], repeat=3)))
def test_open_directions_are_completed_at_right_angles_and_slabs_are_found_again_however_turned(pbc):
    rng, pbc = np.random.default_rng(3), np.array(pbc)
    cells = np.concatenate([rng.normal(0, 4, (20, 3, 3)), np.eye(3)[None, [2, 0, 1]] * 5])  # axes in another order too
    full = completed(cells, np.tile(pbc, (len(cells), 1)))
    np.testing.assert_array_equal(full[:, pbc], cells[:, pbc])
    for cell in full:
        gram = cell @ cell.T
        np.testing.assert_allclose(gram[~pbc], np.eye(3)[~pbc], atol=1e-12)
    if not pbc.any():
        return
    x, turn = rng.uniform(0, 4, (4, 3)), ortho_group.rvs(3, random_state=1) if pbc.sum() > 1 else np.eye(3)
    turn = turn * np.sign(np.linalg.det(turn))
    places, boxes = (
        [x, x @ turn + rng.normal(0, 5, 3), x + [0.1, 0, 0] * np.arange(4)[:, None]],
        [cells[-1], cells[-1] @ turn, cells[-1]],
    )
    boxes[1] = np.where(pbc[:, None], boxes[1], rng.normal(0, 9, (3, 3)))  # what open vectors are does not matter
    packed = Packed(
        np.tile(np.arange(1, 5, dtype=np.uint8), 3),
        np.concatenate(places),
        np.full(3, 4),
        np.array(boxes),
        np.tile(pbc, (3, 1)),
        np.zeros(3, np.int8),
        np.ones(3, np.uint8),
    )
    one, again, other = fingerprints(packed)
    assert (one == again).any() and not (one == other).any()
