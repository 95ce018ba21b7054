"""The disagreement of branches: against predictions of each task by hand, planted agreement, who has a say."""

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from safetensors.torch import save_file

from multifid.apply.model import Exported
from multifid.apply.predict import predict
from multifid.model.disagreement import voices
from multifid.model.saved import describe, save_description
from multifid.structures.atoms import pack_atoms
from test_calculator import KNOWN, crystal, model
from test_exported import Uncompiled

GIVEN = [molecule("CH3CH2OH"), crystal(), molecule("H2O"), bulk("Cu", "fcc", 3.6), Atoms()]  # b has never seen copper


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_it_is_the_deviation_of_what_each_task_says_beyond_its_references(forces):
    made = model(forces)
    out = made.predict(GIVEN, "a", disagreement=True, max_edges=300)
    assert out.branches.tolist() == [2, 2, 2, 1, 2]
    for k, atoms in enumerate(GIVEN[:3]):
        each = [made.predict(atoms, task) for task in ("a", "b")]
        own = np.array([KNOWN[z] for z in atoms.numbers])
        energies = [each[0].energies - own, each[1].energies - 2 * own]
        exact = np.std([e.sum() for e in energies], ddof=1)
        assert out.energy_disagreement[k] == pytest.approx(exact, rel=1e-6)  # of thousands of eV
        np.testing.assert_allclose(out.energies_disagreement[k], np.std(energies, axis=0, ddof=1), atol=1e-9)
        of_forces = np.var([e.forces for e in each], axis=0, ddof=1).mean(axis=1) ** 0.5
        np.testing.assert_allclose(out.forces_disagreement[k], of_forces, atol=1e-10)
        assert out.energy_disagreement[k] > 1e-3 and (out.forces_disagreement[k] > 0).all()
        if forces == "conservative" and atoms.pbc.any():
            of_stress = np.var([e.stress for e in each], axis=0, ddof=1).mean() ** 0.5
            assert out.stress_disagreement[k] == pytest.approx(of_stress, rel=1e-8) and of_stress > 1e-6
        else:
            assert np.isnan(out.stress_disagreement[k])
    assert np.isnan(out.energy_disagreement[3]) and np.isnan(out.forces_disagreement[3]).all()
    assert out.energy_disagreement[4] == 0 and out.forces_disagreement[4].shape == (0,)
    water = made.predict(GIVEN[2], "b", disagreement=True)
    np.testing.assert_allclose(water.forces_disagreement, out.forces_disagreement[2], atol=1e-10)


def test_branches_of_one_mind_agree_and_those_without_a_say_are_left_out():
    made = model(charges=[0], spins=[1])
    tasks = made.description["tasks"]
    made.potential.branches["b"].load_state_dict(made.potential.branches["a"].state_dict())
    same = made.predict(GIVEN[:2], "a", disagreement=True)
    assert abs(same.energy_disagreement).max() < 1e-12 and abs(np.concatenate(same.forces_disagreement)).max() < 1e-12
    tasks["c"] = tasks["b"] | {"charges": [-1, 1], "spins": [1, 2]}  # of the same branch: it says what b does not know
    made.potential.branch_of["c"] = "b"
    assert voices(made) == {"a": ["a"], "b": ["b", "c"]}
    ion = molecule("CH3")
    ion.info |= {"charge": 1, "spin": 1}
    found = made.disagreement(pack_atoms([ion, molecule("H2O")]), stress=False)
    assert found.branches.tolist() == [1, 2]  # a was trained with neutral molecules only
    del tasks["c"]
    tasks["b"] |= {"stale": True}
    with pytest.raises(ValueError, match=r"needs two or more .* this model has a: `multifid calibrate RUN`"):
        made.predict(GIVEN[0], "a", disagreement=True)


def test_the_calculator_has_it_and_says_who_could_disagree():
    made, salt, copper = model(), crystal(), bulk("Cu", "fcc", 3.6)
    out = made.predict(salt, "a", disagreement=True)
    for atoms in (salt, copper):
        atoms.calc = made.calculator("a")
    for name in ("energy", "forces", "stress"):
        found = salt.calc.get_property(f"{name}_disagreement", salt)
        np.testing.assert_allclose(found, np.squeeze(getattr(out, f"{name}_disagreement")), rtol=1e-7)
    assert salt.get_potential_energy() == pytest.approx(out.energy[0], abs=1e-9)
    with pytest.raises(ValueError, match="a disagreement needs two; tasks and their elements: a: H, C, O"):
        copper.calc.get_property("energy_disagreement", copper)
    with pytest.raises(ValueError, match="not from compiled code"):
        Exported(Uncompiled(made)).predict(salt, "a", disagreement=True)


def test_a_file_has_it_where_two_branches_know_a_structure_and_nothing_of_an_earlier_model(tmp_path):
    run, made = tmp_path / "run", model()
    run.mkdir()
    save_file(made.potential.state_dict(), run / "model.safetensors")
    tasks = made.description["tasks"]
    save_description(run / "model.json", describe(made.potential.config, {"a": "a", "b": "b"}, tasks, {}))
    salt, copper = crystal(), bulk("Cu", "fcc", 3.6)
    for atoms in (salt, copper):
        atoms.info["energy_uncertainty"] = atoms.info["energy_disagreement"] = 99.0
    ase.io.write(tmp_path / "in.xyz", [salt, copper])
    asked = {"disagreement": True, "device": "cpu", "precision": "fp64"}
    predict(str(run), [str(tmp_path / "in.xyz")], str(tmp_path / "out.xyz"), "a", **asked)
    first, second = ase.io.read(tmp_path / "out.xyz", ":")
    out = made.predict(salt, "a", disagreement=True)
    assert first.info["branches"] == 2 and second.info["branches"] == 1
    assert first.info["energy_disagreement"] == pytest.approx(out.energy_disagreement[0], rel=1e-4)
    assert first.info["stress_disagreement"] == pytest.approx(out.stress_disagreement[0], rel=1e-4)
    np.testing.assert_allclose(first.arrays["forces_disagreement"], out.forces_disagreement, atol=1e-7)
    left = {*second.info, *second.arrays, *(k for k in first.info if "uncertainty" in k)}
    assert not [name for name in left if "uncertainty" in name or "disagreement" in name]
