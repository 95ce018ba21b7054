"""The ASE calculator against the predictor, finite differences of ASE, and lists of neighbours made anew."""

import warnings

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet

import multifid
from multifid.apply.model import Model
from multifid.evaluation.data import Data
from multifid.evaluation.evaluate import evaluate
from multifid.feed.loader import trained_values
from multifid.graphs.neighbors import neighbor_list
from multifid.graphs.skin import SkinList
from multifid.model.potential import ModelConfig, Potential
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from multifid.structures.atoms import pack_atoms
from test_train import config_of, start

KNOWN = {1: -13.6, 6: -1030.0, 8: -2042.0, 11: -40.0, 17: -100.5, 29: -45.0}


def model(forces="conservative", seed=3, encoder="egnn", dtype=torch.float64, cutoff=4.0, **about) -> Model:
    """An untrained model of two tasks, a and b (which does not know copper), far from zero.

    encoder: a name, or a name and more.
    """
    known = {"name": encoder} if isinstance(encoder, str) else encoder
    config = ModelConfig(
        cutoff=cutoff, encoder={"hidden": 12, "layers": 2, **known}, branch={"hidden": [8], "forces": forces}
    )
    potential = Potential(config, ["a", "b"], {"a": "a", "b": "b"}, seed=seed)
    with torch.no_grad():  # rows of charges and spins begin at zero: as if they had been trained
        for table in (potential.encoder.embedding.charge, potential.encoder.embedding.spin):
            next(table.parameters()).normal_(generator=torch.Generator().manual_seed(1))
    a = {"branch": "a", "references": {str(z): e for z, e in KNOWN.items()}, "scale": 1.7, "elements": list(KNOWN)}
    a |= {"undetermined": []} | about
    b = a | {"branch": "b", "references": {str(z): 2 * e for z, e in KNOWN.items() if z != 29}}
    return Model(potential, {"cutoff": cutoff, "tasks": {"a": a, "b": b}}, dtype=dtype)


def crystal() -> Atoms:
    atoms = bulk("NaCl", "rocksalt", 5.4, cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=6.0)
    atoms.rattle(0.1, seed=2)
    return atoms


def structures() -> dict[str, Atoms]:
    """A molecule, a crystal, a slab, a layer without third vector, a triclinic cell, one smaller than the cutoff."""
    water = molecule("CH3CH2OH")
    skewed = bulk("NaCl", "rocksalt", 5.4)
    skewed.set_cell(skewed.cell.array @ [[1, 0.1, 0], [0, 1.1, 0.2], [0, 0, 0.9]], scale_atoms=True)
    layer = slab()
    layer.cell[2] = 0
    boxed = molecule("H2O", vacuum=4.0)
    return {
        "molecule": water,
        "boxed molecule": boxed,
        "crystal": crystal(),
        "slab": slab(),
        "layer": layer,
        "triclinic": skewed,
        "tiny": bulk("Cu", "fcc", 3.6),
    }


@pytest.mark.parametrize("name", structures())
@pytest.mark.parametrize(("dtype", "energy", "forces"), [("float64", 1e-10, 1e-10), ("float32", 1e-6, 1e-5)])
def test_the_calculator_says_what_predict_says(name, dtype, energy, forces):
    trained, atoms = model(), structures()[name]
    atoms.calc = trained.calculator("a", dtype=dtype)
    expected = trained.predict(atoms, "a", precision={"float64": "fp64", "float32": "fp32"}[dtype], features=True)
    assert atoms.get_potential_energy() == pytest.approx(expected.energy[0], abs=energy, rel=0)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    np.testing.assert_allclose(atoms.get_forces(), expected.forces, rtol=0, atol=forces)
    np.testing.assert_allclose(atoms.get_potential_energies(), expected.energies, rtol=0, atol=forces)
    np.testing.assert_allclose(atoms.calc.get_property("features", atoms), expected.features, rtol=0, atol=1e-5)
    if np.isnan(expected.stress).any():
        with pytest.raises(PropertyNotImplementedError, match="spans none"):
            atoms.get_stress()
    else:
        np.testing.assert_allclose(atoms.get_stress(voigt=False), expected.stress, rtol=0, atol=energy)


@pytest.mark.parametrize("name", ["molecule", "crystal", "slab", "triclinic", "tiny"])
def test_forces_and_stress_are_the_slopes_that_ase_measures(name):
    atoms = structures()[name]
    atoms.calc = model().calculator("a")
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, 1e-4), rtol=0, atol=1e-6)
    if atoms.cell.rank == 3:
        np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, 1e-5), rtol=0, atol=1e-7)


def edges_of(packed, edges, shifts):
    """Pairs with their vectors, in an order that rounding cannot change: along a direction that no lattice has."""
    vectors = packed.positions[edges[1]] - packed.positions[edges[0]] + shifts @ packed.cell[0]
    order = np.lexsort((vectors @ [1, np.sqrt(2), np.pi], edges[1], edges[0]))
    return np.column_stack([edges.T, vectors])[order]


@pytest.mark.parametrize("kind", ["crystal", "slab", "molecule", "moving cell"])
def test_a_list_with_a_skin_is_a_list_made_anew(kind):
    atoms = {"crystal": crystal, "slab": slab, "moving cell": crystal}.get(kind, lambda: molecule("CH3CH2OH"))()
    rng, kept = np.random.default_rng(0), SkinList(4.0, 0.6)
    velocity, strain = rng.normal(0, 0.03, (len(atoms), 3)), rng.normal(0, 2e-3, (3, 3))
    atoms.positions += [300.0, -2e4, 7.0]
    for step in range(60):
        packed = pack_atoms([atoms])
        found = edges_of(kept.update(packed), *kept.within(4.0))
        expected = edges_of(packed, *neighbor_list(packed, 4.0))
        assert found.shape == expected.shape, step
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        atoms.positions += velocity
        if kind == "moving cell":
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        if step == 30:
            atoms.wrap()
    assert 1 < kept.made < 40


def test_dynamics_with_a_skin_are_dynamics_without_and_conserve_energy():
    ends = []
    for skin in (0.5, 0.0):
        atoms = crystal()
        atoms.calc = model().calculator("a", skin=skin)
        atoms.set_velocities(np.random.default_rng(4).normal(0, 0.02, (8, 3)))
        start = atoms.get_total_energy()
        VelocityVerlet(atoms, 1.0 * units.fs).run(60)
        assert atoms.get_total_energy() == pytest.approx(start, abs=2e-3)
        ends.append((atoms.positions, atoms.calc.neighbors.made))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=0, atol=1e-8)
    assert ends[0][1] < 10 < 60 <= ends[1][1]


def test_where_a_structure_lies_does_not_matter_even_in_float32():
    trained = model(dtype=torch.float32)
    for atoms in (molecule("CH3CH2OH"), crystal()):
        here, far = atoms.copy(), atoms.copy()
        far.positions += [1e6, -3e5, 2e6]
        spread = atoms.copy()  # atoms that have diffused through many cells
        spread.positions += 0 if not atoms.pbc.all() else np.arange(len(atoms))[:, None] * 20 * atoms.cell[0]
        for a in (here, far, spread):
            a.calc = trained.calculator("a")
        for other in (far, spread):
            assert other.get_potential_energy() == pytest.approx(here.get_potential_energy(), rel=0, abs=1e-4)
            np.testing.assert_allclose(other.get_forces(), here.get_forces(), rtol=0, atol=1e-5)


def test_no_atoms_one_atom_and_two():
    nothing = Atoms()
    nothing.calc = model().calculator("a")
    assert nothing.get_potential_energy() == 0 and nothing.get_forces().shape == (0, 3)
    one = Atoms("Cu", positions=[[1e5, 0, 0]])
    one.calc = model().calculator("a")
    assert not one.get_forces().any() and np.isfinite(one.get_potential_energy())
    two = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 30.0]])
    two.calc = model().calculator("a")
    assert two.get_potential_energy() == pytest.approx(2 * one.get_potential_energy(), abs=1e-9)


def test_the_task_is_named_where_there_are_several_and_switching_shares_the_weights():
    trained = model()
    with pytest.raises(ValueError, match=r"several tasks: say which one answers.*a, b"):
        trained.calculator()
    with pytest.raises(ValueError, match="no task 'c'; it has a, b"):
        trained.calculator("c")
    atoms = molecule("H2O")
    atoms.calc = trained.calculator("a")
    energy, other = atoms.get_potential_energy(), atoms.calc.switch("b")
    assert atoms.calc.get_potential_energy(atoms) == energy
    assert other.get_potential_energy(atoms) == pytest.approx(trained.predict(atoms, "b").energy[0], abs=1e-10)
    assert trained.switch("b").predict(atoms).energy[0] == pytest.approx(other.results["energy"], abs=1e-10)
    assert trained.switch("b").potential is trained.potential is other.models[0].potential
    with pytest.raises(ValueError, match="fixed when it is made"):
        atoms.calc.set(task="b")


def test_charge_and_spin_count_where_the_task_was_trained_with_several():
    atoms = molecule("H2O")
    varied = model(charges=[-1, 0, 1], spins=[1, 2])
    atoms.calc = varied.calculator("a")
    neutral = atoms.get_potential_energy()
    atoms.info |= {"charge": 1, "spin": 2}
    assert atoms.get_potential_energy() != pytest.approx(neutral, abs=1e-6), "info is part of what a result is of"
    with pytest.raises(ValueError, match=r"info\['charge'\] is 2, but task 'a' was trained with -1, 0, 1 only"):
        atoms.info["charge"] = 2
        atoms.get_potential_energy()
    plain = model(charges=[0])
    atoms.calc = plain.calculator("a")
    atoms.info["spin"] = 1
    with pytest.warns(UserWarning, match=r"info\['charge'\] = 2 is not used: task 'a' was trained with charge 0 only"):
        assert atoms.get_potential_energy() == pytest.approx(neutral, abs=1e-9)
    with pytest.warns(UserWarning, match="is not used"):
        assert plain.predict(atoms, "a").energy[0] == pytest.approx(neutral, abs=1e-9)
    older = model()
    assert older.predict(atoms, "a").energy[0] != pytest.approx(neutral, abs=1e-6), "a file that does not say"
    with pytest.warns(UserWarning, match="odd number of electrons and is taken as a singlet"):
        varied.predict(molecule("CH3"), "a")


def test_a_model_says_which_charges_and_spins_its_tasks_were_trained_with(tmp_path, stores):
    frames = []
    for k, (charge, spin) in enumerate([(0, 1), (1, 2), (-1, 2), (0, 3)] * 3):
        frames.append(molecule("H2O"))
        frames[-1].positions *= 1 + 0.01 * k
        frames[-1].info |= {"charge": charge, "spin": spin}
        frames[-1].calc = SinglePointCalculator(frames[-1], energy=-10.0 + k, forces=np.full((3, 3), 0.1 * k))
    ase.io.write(tmp_path / "ions.xyz", frames)
    prepare("extxyz", [tmp_path / "ions.xyz"], tmp_path / "ions", fractions=(1, 0, 0), trust_units=True, progress=False)
    ions = Store(tmp_path / "ions")
    assert (trained_values(ions, "charge"), trained_values(ions, "spin")) == ([-1, 0, 1], [1, 2, 3])
    run = start(config_of(stores, tmp_path / "run"))
    about = multifid.load(run).description["tasks"]["apple"]
    assert (about["charges"], about["spins"]) == ([0], [1])
    plain = model(charges=[0], spins=[1])
    with pytest.warns(UserWarning, match="is not used"):
        energies = plain.predict(frames, "a").energy
    apart = np.abs(energies - [f.calc.results["energy"] for f in frames]) / 3
    row = evaluate(plain, "m", Data("a", ions, ions.tasks[0]), "train")  # asks the same question
    assert row["energy_mae"] == pytest.approx(apart.mean(), rel=1e-9)


def test_direct_forces_have_no_stress_and_say_so_once_in_dynamics():
    atoms = crystal()
    atoms.calc = model("direct").calculator("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.get_forces()
    with pytest.raises(PropertyNotImplementedError, match=r"predicted directly.*no stress; a model with"):
        atoms.get_stress()
    atoms.set_velocities(np.random.default_rng(4).normal(0, 0.02, (8, 3)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        VelocityVerlet(atoms, 1.0 * units.fs).run(4)
    assert ["not conserved" in str(w.message) for w in said] == [True]


def test_a_committee_is_the_mean_and_the_deviation_of_its_models():
    members = [model(seed=s, cutoff=c) for s, c in ((1, 4.0), (2, 3.5), (3, 4.5))]
    atoms = crystal()
    atoms.calc = multifid.Calculator(members, "a")
    each = [m.predict(atoms, "a") for m in members]
    energies, forces = np.array([e.energy[0] for e in each]), np.array([e.forces for e in each])
    atoms.get_stress()
    results = atoms.calc.results
    assert results["energy"] == pytest.approx(energies.mean(), abs=1e-9)
    assert results["energy_std"] == pytest.approx(energies.std(ddof=1), abs=1e-9)
    np.testing.assert_allclose(results["forces"], forces.mean(axis=0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(results["forces_std"], forces.std(axis=0, ddof=1), rtol=0, atol=1e-10)
    assert results["stress_std"].shape == (6,) and results["energies_std"].shape == (len(atoms),)
    np.testing.assert_array_equal(atoms.calc.get_property("forces_std", atoms), results["forces_std"])


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda a: a.positions.__setitem__((0, 1), np.nan), "position of atom 0 is .* must be finite"),
        (lambda a: a.positions.__setitem__(1, a.positions[0]), "coincid|apart"),
        (lambda a: a.positions.__setitem__(1, a.positions[0] + 1e-4), "angstrom apart"),
        (lambda a: a.cell.__setitem__(2, a.cell[1]), "span nothing"),
        (lambda a: a.numbers.__setitem__(0, 54), "task 'a' has never seen Xe; it knows H, C, O, Na, Cl, Cu"),
    ],
)
def test_what_has_no_answer_is_refused_with_the_reason_also_in_the_middle_of_a_trajectory(change, wrong):
    atoms = crystal()
    atoms.calc = model().calculator("a")
    energy = atoms.get_potential_energy()
    sound = atoms.copy()
    change(atoms)
    with pytest.raises(ValueError, match=wrong):
        atoms.get_potential_energy()
    assert atoms.calc.get_potential_energy(sound) == pytest.approx(energy, abs=1e-10)


def test_nothing_global_is_touched():
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    numpy_before = np.random.get_state()[1].tolist()
    atoms = crystal()
    atoms.calc = model().calculator("a", dtype="float32")
    atoms.get_forces()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == before[1:]
    assert np.random.get_state()[1].tolist() == numpy_before
