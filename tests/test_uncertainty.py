"""Uncertainty by the rigidity of last layers: planted answers, exact derivatives, symmetries, files, ranks."""

import shutil
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console

import multifid
from multifid.apply.predict import predict
from multifid.evaluation import calibrate as calibration
from multifid.evaluation.calibrate import quality
from multifid.evaluation.calibration import binned
from multifid.evaluation.data import Data, Share
from multifid.graphs.graph import graph_of
from multifid.model import rigid
from multifid.model.model_file import export_model
from multifid.model.pieces import batch_of
from multifid.model.potential import under_strain
from multifid.model.rigid import held, inputs_of
from multifid.model.rigidity import BranchRigidity, Covariance, Rigidity, TaskConstants
from multifid.model.rigidity_file import load_rigidity, packed, save_rigidity
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from multifid.structures.atoms import pack_atoms
from multifid.workflows.calibrate import calibrate_run
from test_calculator import crystal, model
from test_train import config_of, start

MOLECULES = [molecule("CH3CH2OH"), molecule("H2O"), molecule("C6H6"), molecule("CH4")]


def planted(made, task="a", atoms=MOLECULES):
    """A model with covariances of a few structures, every constant two or three."""
    found = inputs_of(made.potential, batch_of(pack_atoms(atoms), made.cutoff, task), task)
    pair = [torch.eye(x.shape[1], dtype=x.dtype) * 1e-3 + x.T @ x for x in (found.energy, found.scalars)]
    vectors = None if found.vectors is None else Covariance(found.vectors.T @ found.vectors)
    energy, scalars = map(Covariance, pair)
    one = BranchRigidity(energy, scalars, vectors, energy.draws(len(energy.sum)))
    return replace(made, rigidity=Rigidity({}, {task: one}, {task: TaskConstants(2.0, 3.0, 1e-9, 4, 5.0)}))


def test_the_variance_of_a_linear_model_is_that_of_many_refits():
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(60, 6)) * [1, 1, 1, 0.1, 0.1, 3], rng.normal(size=(5, 6))
    noise = rng.normal(size=(60, 20_000))  # of unit variance: deviations of refits need no constant
    fits = np.linalg.lstsq(x, noise, rcond=None)[0]
    covariance = Covariance(torch.from_numpy(x.T @ x))
    found = covariance.variance(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(found, (new @ fits).var(axis=1), rtol=0.06)
    w = covariance.draws(12)  # two whole sets of orthogonal draws have the covariance exactly
    np.testing.assert_allclose((w.T @ w / 12).numpy(), np.linalg.inv(x.T @ x), rtol=1e-5, atol=1e-6)


def test_quality_and_bins_find_a_planted_calibration():
    rng = np.random.default_rng(1)
    sigma = rng.uniform(0.5, 2.0, 20_000)
    pairs = np.stack([sigma, np.abs(rng.normal(size=20_000)) * sigma], axis=1)
    found = quality(pairs)
    assert found["z"] == pytest.approx(1, abs=0.02) and found["within_1"] == pytest.approx(0.683, abs=0.01)
    assert found["within_2"] == pytest.approx(0.954, abs=0.01) and found["rank"] > 0.3
    np.testing.assert_allclose(binned(pairs)[:, 1], binned(pairs)[:, 0], rtol=0.1)
    assert np.isnan(quality(pairs[:2])["z"])


@pytest.mark.parametrize("encoder", ["egnn", "schnet"])
@pytest.mark.parametrize("readout", ["last", "layers"])
def test_predictions_are_linear_in_what_is_taken_for_last_features(encoder, readout):
    """Energies, and direct forces of both kinds of heads: over vectors, and over edges."""
    made = model("direct", encoder=encoder)
    config = made.potential.config
    config = config.model_copy(update={"branch": config.branch.model_copy(update={"readout": readout})})
    potential = type(made.potential)(config, ["a"], {"a": "a"}, seed=1).double().eval().requires_grad_(False)
    batch = batch_of(pack_atoms([*MOLECULES, crystal()]), made.cutoff, "a")
    found, said, branch = inputs_of(potential, batch, "a"), potential(batch)["a"], potential.branches["a"]
    last = (branch.forces.rest if encoder == "schnet" else branch.forces).linears()[-1]
    np.testing.assert_allclose(found.energy @ branch.last_weights() * batch.natoms, said.energy, rtol=0, atol=1e-12)
    v = found.vectors.view(len(batch.numbers), 3, -1)
    w = torch.cat([last.weight, last.bias[:, None]], dim=1)  # (C, D)
    forces = v @ w[0] if encoder == "schnet" else torch.einsum("ch,nh,nxc->nx", w, found.scalars, v)
    np.testing.assert_allclose(forces, said.forces, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_with_all_draws_sampled_forces_and_stresses_have_the_exact_variance_and_predictions_stay(at_once, monkeypatch):
    """By one backward pass for each draw, for four, for all."""
    monkeypatch.setattr("multifid.model.rigid._at_once", lambda *_: at_once)
    made = planted(model())
    batch = batch_of(pack_atoms([MOLECULES[1], crystal()]), made.cutoff, "a")
    one = made.rigidity.branches["a"]
    found, said = held(made.potential, batch, "a", one, stress=True), made.potential(batch, stress=True)["a"]
    for name in ("energy", "forces", "energies", "stress"):
        np.testing.assert_allclose(
            getattr(found.prediction, name), getattr(said, name), rtol=0, atol=1e-12, err_msg=name
        )

    def sums(x, strain=None):
        branch, features = made.potential.branches["a"], []
        hook = made.potential.encoder.register_forward_hook(lambda *seen: features.append(seen[-1]))
        moved = replace(batch, positions=x)
        made.potential.encoder(graph_of(moved if strain is None else under_strain(moved, strain)))
        hook.remove()
        return branch.last_features(features[0])

    slopes = torch.autograd.functional.jacobian(lambda x: sums(x).sum(dim=0), batch.positions)  # (D, N, 3)
    exact = one.energy.variance(slopes.permute(1, 2, 0)).mean(dim=1)
    local = one.scalars.variance(sums(batch.positions).detach())
    np.testing.assert_allclose(found.forces, (exact * local).sqrt(), rtol=1e-7)

    def strained(strain):
        return sums(batch.positions, strain).sum(dim=0)

    slopes = torch.autograd.functional.jacobian(strained, torch.zeros_like(batch.cell))  # (D, S, 3, 3)
    exact = one.energy.variance(slopes.permute(1, 2, 3, 0))[1].mean() / np.linalg.det(batch.cell[1]) ** 2
    assert found.stress[1] == pytest.approx(float(exact), rel=1e-7) and found.stress[0].isnan()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("encoder", ["egnn", {"name": "egnn", "tensors": 4, "vectors": 3}, "painn", "schnet"], ids=str)
def test_gradients_of_several_last_layers_come_from_one_backward_pass(encoder, threads, set_threads):
    """Also where edges and maps are compiled kernels, which share what a tile of edges needs."""
    set_threads(threads)
    made = model(encoder=encoder)
    batch = batch_of(pack_atoms([MOLECULES[1], crystal()]), made.cutoff, "a")
    positions = batch.positions.clone().requires_grad_()
    features = made.potential.encoder(graph_of(replace(batch, positions=positions)))
    phi = made.potential.branches["a"].last_features(features)
    last = torch.randn(3, phi.shape[1], dtype=phi.dtype, generator=torch.Generator().manual_seed(0))
    (found,) = rigid._batched(phi, [positions], last)
    for slopes, (expected,) in zip(found, rigid._in_turn(phi, [positions], last, keep=False), strict=True):
        np.testing.assert_allclose(slopes, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_uncertainties_do_not_turn_move_or_depend_on_the_order_of_atoms(forces):
    made = planted(model(forces))
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]  # a reflection or a rotation
    for atoms in (MOLECULES[0], crystal()):
        order = np.random.default_rng(1).permutation(len(atoms))
        turned = Atoms(atoms.numbers, atoms.positions @ turn + 7, cell=atoms.cell.array @ turn, pbc=atoms.pbc)[order]
        a, b = (made.predict(x, "a", uncertainty=True) for x in (atoms, turned))
        np.testing.assert_allclose(b.energy_uncertainty, a.energy_uncertainty, rtol=1e-7)
        np.testing.assert_allclose(b.energies_uncertainty, a.energies_uncertainty[order], rtol=1e-7)
        np.testing.assert_allclose(b.forces_uncertainty, a.forces_uncertainty[order], rtol=1e-6)
        np.testing.assert_allclose(b.stress_uncertainty, a.stress_uncertainty, rtol=1e-6)  # NaN without a volume
        assert np.isfinite(a.stress_uncertainty[0]) == (forces == "conservative" and atoms.pbc.any())
        assert (a.forces_uncertainty > 0).all() and np.isfinite(a.energy_uncertainty).all()
        plain = made.predict(atoms, "a")
        np.testing.assert_allclose(a.energy, plain.energy, rtol=0, atol=1e-9)
        np.testing.assert_allclose(a.forces, plain.forces, rtol=0, atol=1e-9)


def test_small_systems_symmetric_ones_and_supercells():
    made = planted(model())
    copper = bulk("Cu", "fcc", 3.6)
    out = made.predict([Atoms("H"), copper, copper * (2, 1, 1), Atoms()], "a", uncertainty=True)
    floor = 3.0 * 1e-9**0.5
    np.testing.assert_allclose(np.concatenate(out.forces_uncertainty[:3]), floor)  # vanish by symmetry: no 0 / 0
    assert out.energy_uncertainty[2] == pytest.approx(2 * out.energy_uncertainty[1], rel=1e-8) and out.energy[3] == 0
    assert out.energy_uncertainty[3] == 0 and out.forces_uncertainty[3].shape == (0,)
    assert np.isnan(made.predict(copper, "a", uncertainty="energy").forces_uncertainty).all()


@pytest.fixture(scope="module", params=["conservative", "direct"])
def run(request, stores, tmp_path_factory):
    """A run of a few steps."""
    branch = {"hidden": [10], "forces": request.param}
    train = {"steps": 4, "epoch_steps": 2}
    values = config_of(stores, tmp_path_factory.mktemp("calibrate") / "run", model={"branch": branch}, train=train)
    return start(values)


def test_a_run_is_calibrated_the_same_by_any_number_of_ranks(run, pool):
    one = pool.run(1, "calibrated", str(run))[0]
    for found in pool.run(3, "calibrated", str(run)):
        for name, x in one.items():
            np.testing.assert_allclose(found[name], x, rtol=1e-10 if "." in name else 1e-5, atol=1e-13, err_msg=name)


def test_uncertainties_travel_with_the_run_and_its_model_file_and_are_those_of_its_weights(run, tmp_path):
    found = calibrate_run(run, console=Console(quiet=True), figure=tmp_path / "plot.png", device="cpu")
    assert set(found.test) == set(found.rigidity.tasks) == {"apple", "berry", "cherry"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    loaded, water = multifid.load(run), molecule("H2O")
    said = loaded.predict(water, "berry", uncertainty=True)
    export_model(run, tmp_path / "m.mfid", ["berry"], uncertainty=packed(load_rigidity(run)))
    again = multifid.load(tmp_path / "m.mfid")
    there = again.predict(water, "berry", uncertainty=True)
    for name in ("energy_uncertainty", "energies_uncertainty", "forces_uncertainty"):
        np.testing.assert_array_equal(getattr(there, name), getattr(said, name))
    water.calc = loaded.calculator("berry")
    assert water.get_potential_energy() == pytest.approx(said.energy[0])
    np.testing.assert_allclose(water.calc.get_property("forces_uncertainty", water), said.forces_uncertainty, rtol=1e-3)
    assert water.calc.get_property("energy_uncertainty", water) == pytest.approx(said.energy_uncertainty[0], rel=1e-3)
    ase.io.write(tmp_path / "in.xyz", [water, molecule("CO2")])
    predict(run, [tmp_path / "in.xyz"], tmp_path / "out.xyz", "berry", device="cpu", uncertainty=True)
    read = ase.io.read(tmp_path / "out.xyz", "0")
    assert read.info["energy_uncertainty"] == pytest.approx(said.energy_uncertainty[0], rel=1e-3)
    np.testing.assert_allclose(read.arrays["forces_uncertainty"], said.forces_uncertainty, rtol=1e-3, atol=1e-7)

    other = tmp_path / "other"  # weights that were trained on: what was calibrated says nothing of them
    shutil.copytree(run, other)
    for name, about in found.rigidity.weights.items():
        found.rigidity.weights[name] = about[::-1]
    save_rigidity(other, found.rigidity)
    with pytest.raises(ValueError, match="multifid calibrate RUN"):
        multifid.load(other).predict(molecule("H2O"), "berry", uncertainty=True)
    (other / "uncertainty.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"uncertainty\.safetensors: cannot be read"):
        multifid.load(other)


def test_what_was_not_calibrated_is_refused_with_what_to_run():
    made = model()
    with pytest.raises(ValueError, match="multifid calibrate RUN"):
        made.predict(molecule("H2O"), "a", uncertainty=True)
    water = molecule("H2O")
    water.calc = made.calculator("a")
    with pytest.raises(ValueError, match="multifid calibrate RUN"):
        water.calc.get_property("energy_uncertainty", water)
    with pytest.raises(ValueError, match="export it again"):
        calibrate_run(Path(__file__))


def test_the_calculator_gives_the_deviation_of_a_stress_where_there_is_one():
    made, salt, water = planted(model()), crystal(), molecule("H2O")
    salt.calc = made.calculator("a")
    said = made.predict(salt, "a", uncertainty=True)
    assert salt.calc.get_property("stress_uncertainty", salt) == pytest.approx(said.stress_uncertainty[0], rel=1e-9)
    np.testing.assert_allclose(salt.calc.get_property("forces_uncertainty", salt), said.forces_uncertainty, rtol=1e-9)
    water.calc = made.calculator("a")
    with pytest.raises(PropertyNotImplementedError, match="spans none"):
        water.calc.get_property("stress_uncertainty", water)
    assert np.isfinite(water.calc.get_property("forces_uncertainty", water)).all()
    with pytest.raises(PropertyNotImplementedError, match="has no stress"):
        planted(model("direct")).calculator("a").get_property("stress_uncertainty", salt)


@pytest.mark.full
def test_deviations_of_stresses_have_the_size_of_their_errors_on_the_validation_split(tmp_path):
    made, frames = planted(model()), []
    for k in range(5):
        atoms = crystal()
        atoms.rattle(0.1, seed=k)
        out = made.predict(atoms, "a")
        apart = SinglePointCalculator(
            atoms, energy=out.energy[0], forces=out.forces, stress=out.stress + 0.02 * np.eye(3)
        )
        atoms.calc = apart
        frames.append(atoms)
    ase.io.write(tmp_path / "s.xyz", frames)
    prepare("extxyz", [tmp_path / "s.xyz"], tmp_path / "s", fractions=(0, 1, 0), trust_units=True, progress=False)
    store = Store(tmp_path / "s")
    source = calibration._source(made, Data("a", store, store.tasks[0]))
    one = made.rigidity.branches["a"]
    constants = calibration._constants(made, source, "a", one, Share())
    known = replace(made.rigidity, tasks={"a": constants})
    found = calibration.points(made, source, "a", known, "validation", Share()).stress
    np.testing.assert_allclose(found[:, 1], 0.02 / 3**0.5, rtol=1e-3)
    assert len(found) == 5 and quality(found)["z"] == pytest.approx(1)
