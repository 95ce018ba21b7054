"""What a model cannot answer is an error that says why, the same for files, the ASE calculator and torch-sim."""

import json

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

import multifid
from multifid.apply.predict import predict
from multifid.apply.relax import Settings, relax
from multifid.model.model_file import export_model
from test_calculator import crystal
from test_predict import run  # noqa: F401


def moved(atoms, atom, place):
    atoms.positions[atom] = place
    return atoms


def in_cell(atoms, cell):
    atoms.cell, atoms.pbc = cell, True
    return atoms


def ask(way, model, atoms, task, folder):
    """The energy that one way of use gives, or its error."""
    if way == "calculator":
        atoms.calc = multifid.Calculator(model, task)
        return atoms.get_potential_energy()
    if way == "torch-sim":
        torch_sim = pytest.importorskip("torch_sim", reason="torch-sim is not installed")
        from multifid.apply.torch_sim import TorchSimModel

        asked = TorchSimModel(multifid.load(model), task)
        return float(asked(torch_sim.io.atoms_to_state([atoms], torch.device("cpu"), torch.float64))["energy"])
    ase.io.write(folder / "in.xyz", atoms)
    if way == "predict":
        predict(model, [folder / "in.xyz"], folder / "out.xyz", task, device="cpu")
    else:
        relax(model, [folder / "in.xyz"], folder / "out.xyz", task, Settings(steps=0), device="cpu")
    return ase.io.read(folder / "out.xyz").get_potential_energy()


def file_of(run, folder, kind):  # noqa: F811
    """A model file that is damaged, or of a schema to come."""
    path = folder / "model.mfid"
    export_model(run, path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    about = json.loads(whole[8 : 8 + length])
    description = json.loads(about["__metadata__"]["description"]) | {"schema": 99, "multifid": "9.0"}
    about["__metadata__"]["description"] = json.dumps(description)
    text = json.dumps(about).encode()
    newer = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    path.write_bytes(newer if kind == "newer" else whole[:-9])
    return path


CASES = {
    "task": (lambda: molecule("H2O"), "no task 'c'; it has a, b"),
    "element": (lambda: molecule("SiH4"), "structure 0: task 'a' has never seen Si; it knows H, C, O, Na, Cl, Cu"),
    "overlap": (lambda: moved(molecule("H2O"), 1, molecule("H2O").positions[0]), "atoms 0 and 1 coincide"),
    "close": (lambda: moved(molecule("H2O"), 1, molecule("H2O").positions[0] + 1e-4), "atoms 0 and 1 are 0.00017"),
    "nan": (lambda: moved(molecule("H2O"), 1, np.nan), r"(position of atom 1 is \[nan|system 0).* finite"),
    "small cell": (lambda: in_cell(Atoms("Cu"), np.eye(3) * 1e-4), "is too small for its 1 atoms.* in angstrom"),
    "flat cell": (lambda: in_cell(crystal(), [[5, 0, 0], [0, 5, 0], [0, 5, 0]]), "(span nothing|Singular matrix)"),
    "damaged": (lambda: molecule("H2O"), "cannot be read as a model file"),
    "newer": (lambda: molecule("H2O"), "schema 99, written by multifid 9.0; this version reads 1"),
}
FULL = [
    pytest.param(case, way, marks=pytest.mark.full)
    for case in CASES
    for way in ("predict", "relax")
    if (case, way) not in (("small cell", "relax"), ("newer", "predict"))
]


@pytest.mark.parametrize(
    ("case", "way"),
    [
        *((case, way) for case in CASES for way in ("calculator", "torch-sim")),
        ("small cell", "relax"),
        ("newer", "predict"),
        *FULL,
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason_and_nothing_is_written(run, tmp_path, case, way):  # noqa: F811
    given, wrong = CASES[case]
    model = file_of(run, tmp_path, case) if case in ("damaged", "newer") else run
    with pytest.raises((ValueError, np.linalg.LinAlgError), match=rf"(?s){wrong}"):
        ask(way, model, given(), "c" if case == "task" else "a", tmp_path)
    assert not list(tmp_path.glob("*out*"))


def test_an_atom_alone_has_the_same_energy_everywhere(run, tmp_path):  # noqa: F811
    found = []
    for way in ("calculator", "torch-sim", "predict", "relax"):
        (tmp_path / way).mkdir()
        found.append(ask(way, run, Atoms("H"), "a", tmp_path / way))
    np.testing.assert_allclose(found, found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("command", [predict, relax])
def test_a_file_without_structures_is_refused_by_name(run, tmp_path, command):  # noqa: F811
    (tmp_path / "empty.xyz").touch()
    with pytest.raises(ValueError, match=r"empty\.xyz: .*(no structure|Empty file)"):
        command(run, [tmp_path / "empty.xyz"], tmp_path / "out.xyz", "a", device="cpu")
    assert not list(tmp_path.glob("*out*"))
