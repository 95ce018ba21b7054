"""Using a trained model: predictions for atoms against the run's own path, laws of physics, and damaged files."""

import json
import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from conftest import data_of
from multifid.evaluation.evaluate import evaluate_run
from multifid.model.model_file import export_model, load_model, read_model_file
from multifid.model.potential import ModelConfig, Potential
from multifid.model.predictor import Predictor, load
from multifid.model.undetermined import UndeterminedEnergy
from multifid.preparation.prepare import prepare
from multifid.store.references import References
from multifid.store.store import Store
from multifid.training.about import read_as
from multifid.workflows.export import export, training_data
from test_train import config_of, start


@pytest.fixture(scope="module", params=["direct", "conservative"])
def run(request, stores, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return start(config_of(stores, folder / "run", model={"branch": {"hidden": [10], "forces": request.param}}))


def atoms_of(store: Store, index: np.ndarray) -> tuple[list[Atoms], np.ndarray, list[np.ndarray]]:
    packed = store.read(index, list(store.tasks))
    ends = packed.offsets
    labels = packed.labels[store.tasks[0]]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    atoms = [Atoms(packed.numbers[p], packed.positions[p]) for p in parts]
    return atoms, labels.energy, [labels.forces[p] for p in parts]


def test_errors_of_predictions_for_atoms_are_those_of_evaluate(run, stores):
    model = load(run)
    for task, path in stores.items():
        store = Store(path)
        atoms, energy, forces = atoms_of(store, np.asarray(store.index("test")).astype(np.int64))
        out = model.predict(atoms, task=task, max_edges=40)
        row = evaluate_run(run, data_of(f"{task}={path}"))[0]
        per_atom = np.abs(out.energy - energy) / [len(a) for a in atoms]
        apart = np.abs(np.concatenate(out.forces) - np.concatenate(forces))
        assert per_atom.mean() == pytest.approx(row["energy_mae"], rel=1e-5)
        assert apart.mean() == pytest.approx(row["forces_mae"], rel=1e-5)


def test_one_structure_is_one_of_many_and_atoms_add_up(run, stores):
    model = load(run, precision="fp64")
    atoms, *_ = atoms_of(Store(stores["apple"]), np.arange(5))
    state = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    many = model.predict(atoms, task="apple", features=True)
    for k, one in enumerate(atoms):
        alone = model.predict(one, task="apple", features=True)
        assert alone.energy.shape == (1,) and alone.forces.shape == (len(one), 3)
        np.testing.assert_allclose(alone.energy[0], many.energy[k], rtol=0, atol=1e-10)
        np.testing.assert_allclose(alone.forces, many.forces[k], rtol=0, atol=1e-10)
        np.testing.assert_allclose(alone.features, many.features[k], rtol=0, atol=1e-10)
        np.testing.assert_allclose(alone.energies.sum(), alone.energy[0], rtol=0, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (torch.get_default_dtype(), torch.get_num_threads()) == state[1:]
    single = load(run).predict(atoms, task="apple")
    np.testing.assert_allclose(single.energy, many.energy, rtol=0, atol=1e-4)
    again = load(run).predict(atoms, task="apple", precision="fp64")
    np.testing.assert_allclose(again.energy, many.energy, rtol=0, atol=1e-10)


def test_nothing_and_a_single_atom_are_predicted(run):
    model = load(run)
    assert model.predict([], task="apple").energy.shape == (0,)
    out = model.predict(Atoms("H"), task="apple")
    assert np.isfinite(out.energy).all() and out.forces.shape == (1, 3) and not out.forces.any()
    far = model.predict(Atoms("H", positions=[[1e6, 0, 0]]), task="apple")
    assert far.energy == pytest.approx(out.energy)


def planted() -> Predictor:
    """An untrained conservative model of two tasks that knows Na and Cl, far from zero, in float64."""
    config = ModelConfig(
        cutoff=4.0, encoder={"hidden": 12, "layers": 2}, branch={"hidden": [8], "forces": "conservative"}
    )
    potential = Potential(config, ["a", "b"], {"a": "a", "b": "b"}, seed=3)
    about = {"branch": "a", "references": {"11": -40.0, "17": -100.5}, "scale": 1.7, "elements": [11, 17]}
    description = {"cutoff": 4.0, "tasks": {"a": about, "b": about | {"branch": "b", "references": {"11": -1.0}}}}
    return Predictor(potential, description, dtype=torch.float64)


def test_forces_and_stress_are_slopes_of_the_energy_of_a_crystal():
    model, crystal = planted(), bulk("NaCl", "rocksalt", 5.2, cubic=True)
    crystal.rattle(0.1, seed=1)
    out, step = model.predict(crystal, task="a"), 1e-4
    assert model.predict(crystal.repeat((2, 1, 1)), task="a").energy == pytest.approx(2 * out.energy, abs=1e-9)
    for atom, axis in ((0, 0), (5, 2)):
        ends = []
        for sign in (1, -1):
            moved = crystal.copy()
            moved.positions[atom, axis] += sign * step
            ends.append(model.predict(moved, task="a").energy[0])
        assert out.forces[atom, axis] == pytest.approx(-(ends[0] - ends[1]) / (2 * step), abs=1e-6)
    for a, b in ((0, 0), (1, 2)):
        ends = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * step / 2
            strain[b, a] += sign * step / 2
            strained = crystal.copy()
            strained.set_cell(crystal.cell.array @ strain, scale_atoms=True)
            ends.append(model.predict(strained, task="a").energy[0])
        slope = (ends[0] - ends[1]) / (2 * step) / crystal.get_volume()
        assert out.stress[a, b] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("atoms", "task", "wrong"),
    [
        (Atoms("Na"), None, "several tasks: say which one answers.*a, b"),
        (Atoms("Na"), "c", "no task 'c'; it has a, b"),
        (Atoms("NaH", positions=[[0, 0, 0], [0, 0, 2]]), "a", "never seen H; it knows Na, Cl"),
        (Atoms("NaCl", positions=[[0, 0, 0], [0, 0, 3]]), "b", "never seen Cl; it knows Na; tasks that know all.*: a"),
        (Atoms("Na2", positions=[[0, 0, 0], [0, 0, 1e-5]]), "a", "atoms 0 and 1 are 1e-05 angstrom apart"),
        (Atoms("Na", positions=[[0, np.nan, 0]]), "a", "position of atom 0 is .* must be finite"),
        (Atoms("Na", cell=[3, 3, 0], pbc=True), "a", "periodic along abc, but the cell vectors there span nothing"),
        (Atoms("X"), "a", "atomic number 0"),
        (Atoms("Na", info={"charge": 0.5}), "a", r"info\['charge'\] is 0.5, it must be a whole number"),
        (Atoms("Na", info={"spin": 300}), "a", r"info\['spin'\] is 300, it must be within 0..255"),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_refused_with_the_reason(atoms, task, wrong):
    with pytest.raises(ValueError, match=wrong):
        planted().predict([Atoms("Na"), atoms], task=task)


def test_totals_that_the_data_do_not_determine_are_named(tmp_path):
    """All data of a task are water: what an atom of oxygen adds is the choice of a fit."""
    rng = np.random.default_rng(0)
    water = molecule("H2O")
    for _ in range(20):
        moved = water.copy()
        moved.positions += rng.normal(0, 0.05, (3, 3))
        moved.calc = SinglePointCalculator(moved, energy=-2076.0 + rng.normal(), forces=rng.normal(size=(3, 3)))
        moved.write(tmp_path / "water.xyz", append=True)
    prepare("extxyz", [tmp_path / "water.xyz"], tmp_path / "water", task="water", trust_units=True, progress=False)
    model = load(
        start(config_of({"water": tmp_path / "water"}, tmp_path / "run", train={"steps": 2, "epoch_steps": 2}))
    )
    export_model(tmp_path / "run", tmp_path / "m.mfid")
    hydroxide = water[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not model.predict([water, water + Atoms("H2O", water.positions + 3)]).undetermined.any()
    for one in (model, load(tmp_path / "m.mfid")):
        with pytest.warns(UndeterminedEnergy, match="structure 1 and 1 more: .* task 'water' .* combinations of H, O"):
            out = one.predict([water, hydroxide, Atoms("O")])
        assert out.undetermined.tolist() == [False, True, True] and np.isfinite(out.energy).all()
    del model.description["tasks"]["water"]["null_space"]  # a model of an earlier version says nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not model.predict(hydroxide).undetermined.any()


def test_a_model_file_is_the_run_and_some_tasks_of_it(run, tmp_path, stores):
    atoms, *_ = atoms_of(Store(stores["apple"]), np.arange(5))
    export_model(run, tmp_path / "all.mfid")
    export_model(run, tmp_path / "one.mfid", tasks=["apple"], weights="last")
    whole, one = load(tmp_path / "all.mfid"), load(tmp_path / "one.mfid")
    assert whole.tasks == ["apple", "berry", "cherry"] and one.tasks == ["apple"]
    assert not any("berry" in name for name, _ in one.potential.named_parameters())
    a, b = (model.predict(atoms, task="apple") for model in (load(run), whole))
    assert np.array_equal(a.energy, b.energy) and all(map(np.array_equal, a.forces, b.forces))
    assert np.isfinite(one.predict(atoms).energy).all(), "the only task need not be named"
    with pytest.raises(FileExistsError, match="exists already"):
        export_model(run, tmp_path / "all.mfid")
    with pytest.raises(ValueError, match="no task pear; the model has apple, berry, cherry"):
        export_model(run, tmp_path / "other.mfid", tasks=["pear"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.mfid", "one.mfid"]


def test_export_writes_a_model_and_its_card(run, tmp_path):
    path = export(run, tmp_path / "fruit.mfid", ["apple", "cherry"])
    card = (tmp_path / "fruit.md").read_text()
    assert load(path).tasks == ["apple", "cherry"] and "| apple |" in card and "| berry |" not in card
    assert 'multifid.load("fruit.mfid")' in card


def test_a_card_cites_the_published_data_that_a_model_was_trained_on_through_derived_stores():
    parent = {"format": "mptrj", "files": [{"name": "MPtrj.json"}], "options": {}}
    merged = {"format": "store", "files": [{"store": {"source": parent}}, {"name": "mine"}], "options": {}}
    aselmdb = {"format": "aselmdb", "files": [{"name": "DIR"}], "options": {"dataset": "omat24"}}
    tasks = {name: {"read_as": sorted(set(read_as(source)))} for name, source in (("m", merged), ("o", aselmdb))}
    lines = "\n".join(training_data(tasks | {"old": {}}))
    assert "m: files in the format of mptrj" in lines and "10.1038/s42256-023-00716-3" in lines
    assert "m: files read as store" in lines and "old: not recorded" in lines
    assert "o: files in the format of omat24" in lines and "licence CC BY 4.0; cite arXiv 2410.12771" in lines


def test_the_package_is_imported_without_torch_and_offers_its_names():
    code = "import multifid, sys; assert 'torch' not in sys.modules; print(multifid.load.__module__, dir(multifid))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "multifid.apply.model" in done.stdout and "'Store'" in done.stdout


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_training_and_evaluating_import_neither_the_compiler_of_torch_nor_large_parts_of_scipy(
    optimizer, stores, tmp_path
):
    """Each is a third of a second to a second and a half of every start, of a command that takes two."""
    config = config_of(stores, tmp_path / "run")
    config["train"] |= {"steps": 2, "epoch_steps": 2, "optimizer": optimizer}
    code = (
        "import json, sys, multifid; config = json.loads(sys.argv[1]); multifid.train(config, quiet=True); "
        "task = next(iter(config['tasks'])); store = config['tasks'][task]['store']; "
        "multifid.evaluate(config['run'], {task: store}, quiet=True); print(sorted({'torch._dynamo', "
        "'torch._inductor', 'sympy', 'scipy.optimize', 'scipy.stats', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_damaged_and_foreign_model_files_are_errors_that_say_what_to_do(run, tmp_path):
    path = tmp_path / "m.mfid"
    export_model(run, path)
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    flipped = bytearray(good)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"m\.mfid: damaged: the checksum of its tensors"):
        read_model_file(path)
    for size in (0, 7, header // 2, header + 20, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"m\.mfid: cannot be read as a model file"):
            read_model_file(path)
    about = json.loads(good[8 : 8 + header])
    description = json.loads(about["__metadata__"]["description"])
    about["__metadata__"]["description"] = json.dumps(description | {"schema": 99, "multifid": "9.0"})
    text = json.dumps(about).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + header :])
    with pytest.raises(ValueError, match=r"schema 99, written by multifid 9\.0; this version reads 1"):
        read_model_file(path)
    with pytest.raises(ValueError, match="no model file of multifid; make one"):
        read_model_file(run / "model.safetensors")
    with pytest.raises(ValueError, match="not found"):
        load_model(tmp_path / "nothing")


def test_total_energies_are_references_plus_scaled_predictions(run, stores):
    """The predictor's arithmetic against the store's own references."""
    model, store = load(run, precision="fp64"), Store(stores["berry"])
    atoms, *_ = atoms_of(store, np.arange(4))
    packed = store.read(np.arange(4), list(store.tasks))
    references = References.from_manifest(store.manifest["tasks"]["berry"])
    out = model.predict(atoms, task="berry")
    aligned = out.energy - references.total(packed.numbers, packed.natoms)
    assert np.abs(aligned).max() < 100 < np.abs(references.total(packed.numbers, packed.natoms)).max() * 20
