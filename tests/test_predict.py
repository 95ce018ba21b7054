"""`multifid predict`: files in, one file out that ASE reads back, whole or not there."""

import json
import signal
import subprocess
import sys

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from safetensors.torch import save_file
from typer.testing import CliRunner

import multifid
from multifid.apply.predict import predict
from multifid.apply.relax import Settings, relax
from multifid.cli import app
from multifid.model.saved import describe, save_description
from multifid.store.store import Store
from test_calculator import crystal, model, slab
from test_hostile import write_aselmdb


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained model of two tasks as the directory of a run."""
    folder, made = tmp_path_factory.mktemp("run"), model(charges=[-1, 0, 1], spins=[1])
    save_file(made.potential.state_dict(), folder / "model.safetensors")
    description = describe(made.potential.config, {"a": "a", "b": "b"}, made.description["tasks"], {})
    save_description(folder / "model.json", description)
    return folder


@pytest.fixture
def mixed(tmp_path):
    """An extended XYZ file with labels of its own, a trajectory, and an ASE database in LMDB."""
    ion = molecule("CH3")
    ion.info |= {"charge": 1, "name": "methyl", "energy_of_old": -3.0}
    fixed = slab()
    fixed.set_constraint(FixAtoms([0, 1]))
    fixed.calc = SinglePointCalculator(fixed, energy=-1.0, forces=np.ones((8, 3)), stress=np.ones(6))
    ase.io.write(tmp_path / "some.xyz", [ion, fixed, molecule("H2O")])
    ase.io.write(tmp_path / "more.traj", [crystal(), bulk("Cu", "fcc", 3.6)])
    write_aselmdb(tmp_path / "rows.aselmdb")
    return [tmp_path / "some.xyz", tmp_path / "more.traj", tmp_path / "rows.aselmdb"]


def test_what_is_written_is_what_the_model_says_and_ase_reads_it_back(run, mixed, tmp_path):
    assert predict(run, mixed, tmp_path / "out.xyz", "a", device="cpu", max_edges=300) == 45
    there = ase.io.read(tmp_path / "out.xyz", ":")
    given = [*ase.io.read(mixed[0], ":"), *ase.io.read(mixed[1], ":")]
    assert len(there) == 45 and {a.info["task"] for a in there} == {"a"}
    loaded = multifid.load(run)
    for before, after in zip(given, there, strict=False):
        said = loaded.predict(before, "a")
        assert after.get_potential_energy() == pytest.approx(said.energy[0], abs=1e-5)
        np.testing.assert_allclose(after.get_forces(apply_constraint=False), said.forces, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(after.pbc, before.pbc)
        if before.cell.rank == 3:
            np.testing.assert_allclose(after.get_stress(voigt=False), said.stress, rtol=0, atol=1e-6)
        else:
            assert "stress" not in after.calc.results
    assert there[0].info["charge"] == 1 and there[0].info["name"] == "methyl"
    assert there[1].constraints and not there[2].constraints
    assert sorted(a.info["source"] for a in there[5:]) == list(range(1, 41))  # LMDB sorts keys as text
    assert not list(tmp_path.glob(".out*"))


def test_a_store_is_predicted_like_the_structures_that_it_holds(run, stores, tmp_path):
    store = Store(stores["apple"])
    assert predict(run, [stores["apple"]], tmp_path / "out.xyz", "b", device="cpu") == store.structures
    packed = store.read(np.array([3]), [])
    said = multifid.load(run).predict(Atoms(packed.numbers, packed.positions), "b")
    assert ase.io.read(tmp_path / "out.xyz", "3").get_potential_energy() == pytest.approx(said.energy[0], abs=1e-4)


def test_ranks_write_the_file_of_one_process(run, mixed, tmp_path, pool):
    files = [str(path) for path in mixed] * 13  # two chunks
    assert predict(run, mixed * 13, tmp_path / "one.xyz", "a", device="cpu", precision="fp64") == 585
    assert pool.run(2, "predicted", str(run), files, str(tmp_path / "two.xyz"), "a") == [585, 585]
    assert (tmp_path / "one.xyz").read_bytes() == (tmp_path / "two.xyz").read_bytes()


def stop(run, files, out, monkeypatch):
    """Stop a command in the middle of its second chunk; what it has done of the first is left."""
    asked, really = [], multifid.apply.predict._predicted

    def stopped(model, task, chunk, *settings):
        asked.append(len(chunk))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return really(model, task, chunk, *settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(multifid.apply.predict, "_predicted", stopped)
        predict(run, files, out, "a", device="cpu", precision="fp64")
    assert len(asked) == 2 and not out.exists()
    journal = next((out.parent / ".out.xyz.parts").glob("*.jsonl"))
    journal.write_bytes(journal.read_bytes() + b'{"chunk": 1, "fi')  # a line that was torn off


@pytest.mark.full
def test_a_command_that_was_stopped_goes_on_with_another_number_of_ranks(run, mixed, tmp_path, monkeypatch, pool):
    files, out = [str(path) for path in mixed * 13], tmp_path / "out.xyz"
    stop(run, mixed * 13, out, monkeypatch)
    assert pool.run(2, "predicted", str(run), files, str(out), "a") == [585, 585]
    assert predict(run, mixed * 13, tmp_path / "whole.xyz", "a", device="cpu", precision="fp64") == 585
    assert out.read_bytes() == (tmp_path / "whole.xyz").read_bytes()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_command_that_was_stopped_goes_on(run, mixed, tmp_path, monkeypatch, damaged, capsys):
    out, left = tmp_path / "out.xyz", tmp_path / ".out.xyz.parts"
    monkeypatch.setattr(multifid.apply.predict, "STRUCTURES", 20)
    stop(run, mixed, out, monkeypatch)
    if damaged:
        next(left.glob("*.xyz")).write_bytes(b"what is this?")  # bytes that are not those of the journal
    assert predict(run, mixed, out, "a", device="cpu", precision="fp64") == 45
    assert ("20 were there from a command that was stopped" in capsys.readouterr().out) == (not damaged)
    assert not left.exists()
    assert predict(run, mixed, tmp_path / "whole.xyz", "a", device="cpu", precision="fp64") == 45
    assert out.read_bytes() == (tmp_path / "whole.xyz").read_bytes()


KILLED = """
import os, signal, sys
import multifid.apply.predict as at
really, asked = at._predicted, []
def killed(*given):
    asked.append(given)
    return os.kill(os.getpid(), signal.SIGKILL) if len(asked) == 3 else really(*given)
at._predicted, at.STRUCTURES = killed, 16
run, out, *files = sys.argv[1:]
at.predict(at.Path(run), [at.Path(f) for f in files], at.Path(out), "a", device="cpu", precision="fp64")
"""


@pytest.mark.full
def test_a_command_that_was_killed_goes_on(run, mixed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.xyz"
    done = subprocess.run([sys.executable, "-c", KILLED, run, out, *mixed], timeout=100)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    monkeypatch.setattr(multifid.apply.predict, "STRUCTURES", 16)
    assert predict(run, mixed, out, "a", device="cpu", precision="fp64") == 45
    assert "32 were there from a command that was stopped" in capsys.readouterr().out
    assert predict(run, mixed, tmp_path / "whole.xyz", "a", device="cpu", precision="fp64") == 45
    assert out.read_bytes() == (tmp_path / "whole.xyz").read_bytes()


def test_a_relaxation_that_was_stopped_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch, capsys):
    ase.io.write(tmp_path / "in.xyz", [crystal(), molecule("H2O"), molecule("CO"), slab()])
    monkeypatch.setattr(multifid.apply.relax, "STRUCTURES", 1)
    asked, really = [], multifid.apply.relax._relaxed

    def stopped(*given):
        asked.append(given)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return really(*given)

    def relaxed(name):
        settings = Settings(fmax=0.01, steps=3, trajectory=tmp_path / f"{name} paths")
        relax(run, [tmp_path / "in.xyz"], tmp_path / f"{name}.xyz", "a", settings, device="cpu")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(multifid.apply.relax, "_relaxed", stopped)
        relaxed("stopped")
    assert not (tmp_path / "stopped.xyz").exists()
    relaxed("stopped")
    assert "2 were there from a command that was stopped" in capsys.readouterr().out
    relaxed("whole")
    assert (tmp_path / "stopped.xyz").read_bytes() == (tmp_path / "whole.xyz").read_bytes()
    for k in range(4):
        path = [ase.io.read(tmp_path / f"{name} paths" / f"{k:06}.traj", ":") for name in ("stopped", "whole")]
        assert len(path[0]) == len(path[1]) > 1
        assert all(np.array_equal(a.positions, b.positions) for a, b in zip(*path, strict=True))
        assert all(np.array_equal(a.get_forces(), b.get_forces()) for a, b in zip(*path, strict=True))


def test_what_another_request_left_is_thrown_away_and_that_is_said(run, mixed, tmp_path, capsys):
    left = tmp_path / ".out.xyz.parts"
    left.mkdir()
    (left / "request.json").write_text('{"task": "b"}')
    assert predict(run, mixed, tmp_path / "out.xyz", "a", device="cpu") == 45
    assert "was made with other" in capsys.readouterr().err and not left.exists()


def test_what_has_no_prediction_is_named_or_left_out_and_counted(run, tmp_path, capsys):
    close = molecule("H2O")
    close.positions[1] = close.positions[0] + [0, 0, 1e-5]
    ion = molecule("H2O")
    ion.info["charge"] = 4
    strange = [molecule("H2O"), molecule("SiH4"), close, ion, Atoms("H")]
    ase.io.write(tmp_path / "in.xyz", strange)
    with pytest.raises(ValueError, match=r"(?s)no result for.*in.xyz, structure 1: task 'a' has never seen Si") as e:
        predict(run, [tmp_path / "in.xyz"], tmp_path / "out.xyz", "a", device="cpu")
    assert "structure 2: atoms 0 and 1 are 1e-05" in str(e.value) and "--skip-refused" in str(e.value)
    assert "structure 3: info['charge'] is 4, but" in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.xyz"]
    assert predict(run, [tmp_path / "in.xyz"], tmp_path / "out.xyz", "a", device="cpu", skip=True) == 2
    assert "2 structures, task a; 3 left out, as" in capsys.readouterr().out
    assert [len(a) for a in ase.io.read(tmp_path / "out.xyz", ":")] == [3, 1]


def test_totals_that_training_does_not_determine_are_marked_and_counted(run, tmp_path, capsys):
    about = json.loads((run / "model.json").read_text())
    third = {"8": 1 / 3, "1": -2 / 3, "6": 2 / 3}
    about["tasks"]["a"] |= {"null_space": [third], "undetermined": [[1, 6, 8]]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.json").write_text(json.dumps(about))
    (tmp_path / "run" / "model.safetensors").symlink_to(run / "model.safetensors")
    ase.io.write(tmp_path / "in.xyz", [crystal(), molecule("H2O")])
    predict(tmp_path / "run", [tmp_path / "in.xyz"], tmp_path / "out.xyz", "a", device="cpu")
    assert "; 1 of compositions whose total energy the training data of a do not" in capsys.readouterr().out
    assert ["undetermined" in a.info for a in ase.io.read(tmp_path / "out.xyz", ":")] == [False, True]


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("in.xyz", b"", "in.xyz: .*"),
        ("in.xyz", b"2\n\nH 0 0 0\n", r"in\.xyz: ASE cannot read structure 0"),
        ("in.xyz", b"1\n\nH 0 0 0\n2\nbroken\n", r"in\.xyz: ASE cannot read structure 1"),
        ("in.unknown", b"what is this?", r"in\.unknown: ASE cannot read"),
        ("in.aselmdb", b"no database", r"in\.aselmdb: damaged or not an LMDB file"),
    ],
)
def test_files_that_are_none_are_refused_by_name_and_nothing_is_written(run, tmp_path, name, content, wrong):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=wrong):
        predict(run, [tmp_path / name], tmp_path / "out.xyz", "a", device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_where_nothing_can_be_written_is_said_before_the_work(run, mixed, tmp_path):
    for out, wrong in (("out.cif", "ends in .xyz"), ("no/out.xyz", "there is no directory"), ("some.xyz", "exists")):
        with pytest.raises((ValueError, FileExistsError), match=wrong):
            predict(run, mixed, tmp_path / out, "a", device="cpu")
    with pytest.raises(ValueError, match="several tasks"):
        predict(run, mixed, tmp_path / "out.xyz", device="cpu")
    with pytest.raises(ValueError, match="nothing: not found"):
        predict(run, [tmp_path / "nothing"], tmp_path / "out.xyz", "a", device="cpu")


def test_relaxed_structures_are_where_forces_and_stress_vanish(run, tmp_path, capsys):
    fixed = slab()
    fixed.set_constraint(FixAtoms([0, 1, 2, 3]))
    ase.io.write(tmp_path / "in.xyz", [crystal(), fixed, molecule("H2O")])
    settings = Settings(fmax=0.02, cell=True, trajectory=tmp_path / "paths")
    assert relax(run, [tmp_path / "in.xyz"], tmp_path / "out.xyz", "a", settings, device="cpu")
    assert "3 structures, task a, all converged to 0.02 eV/angstrom" in capsys.readouterr().out
    given, there = ase.io.read(tmp_path / "in.xyz", ":"), ase.io.read(tmp_path / "out.xyz", ":")
    for before, after in zip(given, there, strict=True):
        after.calc = multifid.load(run).calculator("a", dtype="float64")
        before.calc = after.calc
        assert np.linalg.norm(after.get_forces(), axis=1).max() < 0.021 and after.info["converged"]
        assert after.get_potential_energy() <= before.get_potential_energy() + 1e-9
    assert np.abs(there[0].get_stress()).max() * there[0].get_volume() / 8 < 0.021
    np.testing.assert_allclose(there[1].positions[:4], given[1].positions[:4], rtol=0, atol=1e-7)
    np.testing.assert_allclose(there[1].cell, given[1].cell, rtol=0, atol=1e-7)
    assert not np.allclose(there[0].cell, given[0].cell, atol=1e-3)
    path = ase.io.read(tmp_path / "paths" / "000000.traj", ":")
    assert len(path) == there[0].info["steps"] + 1 and len(list((tmp_path / "paths").iterdir())) == 3


def test_what_has_not_converged_is_named_and_the_exit_code_says_so(run, tmp_path):
    ase.io.write(tmp_path / "in.xyz", [crystal(), Atoms("H")])
    command = ["multifid", "relax", run, tmp_path / "in.xyz", "--task", "a", "--steps", "1", "--fmax", "1e-5"]
    command += ["--device", "cpu", "--out", tmp_path / "out.xyz"]
    done = CliRunner().invoke(app, list(map(str, command[1:])))
    assert done.exit_code == 1 and "1 not converged in 1 steps, as" in done.output, done.output
    assert "in.xyz, structure 0 (fmax " in done.output
    assert [bool(a.info["converged"]) for a in ase.io.read(tmp_path / "out.xyz", ":")] == [False, True]


def test_relaxations_that_cannot_be_are_refused(run, tmp_path):
    ase.io.write(tmp_path / "in.xyz", [crystal(), molecule("SiH4")])
    with pytest.raises(ValueError, match="structure 1: task 'a' has never seen Si"):
        relax(run, [tmp_path / "in.xyz"], tmp_path / "out.xyz", "a", Settings(steps=1), device="cpu")
    with pytest.raises(ValueError, match="must be one of fire, lbfgs, bfgs"):
        Settings(optimizer="newton")
    with pytest.raises(ValueError, match="must be a positive force"):
        Settings(fmax=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.xyz"]
