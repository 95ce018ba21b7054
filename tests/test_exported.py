"""Exported files and compiled calculators: equal to the model, and refused with the reason where they cannot be used.

Compiling takes a minute, so that the ordinary suite lets the function compute that would be compiled; the full product
compiles.
"""

import ast
import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError

from multifid.apply import compiled
from multifid.apply.model import Exported, load
from multifid.apply.torch_sim import TorchSimModel
from multifid.model import aot, package
from multifid.model.aot import export_package
from multifid.model.attention import AttentionConfig
from multifid.model.encoders import ENCODERS
from multifid.model.fixed import Fixed, Written, inputs_for, tensors_of, write_down
from multifid.model.model_file import load_model, write_model_file
from multifid.model.package import KEY, instructions, read_about, refuse_elsewhere
from multifid.model.pieces import batch_of
from multifid.model.potential import Potential
from multifid.model.saved import describe
from multifid.structures.atoms import pack_atoms
from multifid.workflows.export import Compilation, export
from test_calculator import model, structures

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


def about_of(trained, task="a", weights=()):
    function = Fixed(trained, task)
    return aot._about(trained, task, function, Written(None, dict(weights)), "baseline", False), function


class Uncompiled:
    """A package whose function is not compiled."""

    path = Path("copper.pt2")

    def __init__(self, trained, task="a"):
        self.about, self.function = about_of(trained, task)

    def run(self, tensors):
        return [x.detach() for x in self.function(*tensors)]


def state_of(atoms):
    """What torch-sim gives of one structure."""
    return {k: torch.as_tensor(v) for k, v in {
        "positions": atoms.positions, "cell": atoms.cell.array.T[None], "pbc": True,
        "atomic_numbers": atoms.numbers, "system_idx": np.zeros(len(atoms), np.int64),
    }.items()}  # fmt: skip


def write_archive(path: Path, about) -> Path:
    """A file with the metadata of an exported one and no code in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/aotinductor/model/wrapper_metadata.json", json.dumps({KEY: json.dumps(about)}))
        archive.writestr("data/aotinductor/model/code.so", bytes(2000))
    return path


@pytest.fixture(scope="module")
def about():
    return about_of(model())[0]


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_an_exported_model_answers_as_the_model(forces):
    trained = model(forces)
    exported = Exported(Uncompiled(trained))
    for name, atoms in structures().items():
        expected, found = trained.predict(atoms, "a"), exported.predict(atoms)
        assert found.energy == pytest.approx(expected.energy, abs=1e-10, rel=0), name
        np.testing.assert_allclose(found.energies, expected.energies, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=1e-10)
        if forces == "conservative":
            np.testing.assert_allclose(found.stress, expected.stress, rtol=0, atol=1e-10)
    everything = list(structures().values())
    np.testing.assert_allclose(exported.predict(everything).energy, trained.predict(everything, "a").energy, atol=1e-9)
    atoms = structures()["crystal"]
    atoms.calc = exported.calculator()
    np.testing.assert_allclose(atoms.get_forces(), trained.predict(atoms, "a").forces, rtol=0, atol=1e-10)
    if forces == "conservative":
        np.testing.assert_allclose(atoms.get_stress(voigt=False), trained.predict(atoms, "a").stress, atol=1e-10)
    batched = TorchSimModel(exported)(state_of(atoms))
    np.testing.assert_allclose(batched["forces"], trained.predict(atoms, "a").forces, rtol=0, atol=1e-10)


def test_an_exported_model_has_one_task_and_one_precision_and_no_features():
    exported = Exported(Uncompiled(model()))
    assert exported.tasks == ["a"] and exported.cutoff == 4.0 and "Cu" in exported.elements()
    with pytest.raises(ValueError, match="no task 'b'; it has a"):
        exported.calculator("b")
    with pytest.raises(ValueError, match=r"float64 only.*--precision fp32"):
        exported.calculator(dtype="float32")
    with pytest.raises(ValueError, match="never seen Fe"):
        exported.predict(bulk("Fe"))
    atoms = molecule("H2O")
    atoms.calc = exported.calculator()
    with pytest.raises(PropertyNotImplementedError):
        atoms.calc.get_property("features", atoms)
    assert len(exported.predict(Atoms()).forces) == 0


def test_what_says_of_itself_what_it_is_needs_nothing_but_torch():
    tree = ast.parse(Path(package.__file__).read_text())
    imported = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"torch"}


def test_files_that_cannot_be_used_are_refused_with_the_reason(about, tmp_path, monkeypatch):
    whole = write_archive(tmp_path / "whole.pt2", about)
    assert read_about(whole)["task"] == "a"
    with pytest.raises(ValueError, match=r"absent.pt2: not found"):
        load(tmp_path / "absent.pt2")
    content = whole.read_bytes()
    for name, damaged in (("cut", content[:-300]), ("empty", b"")):
        (tmp_path / f"{name}.pt2").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}.pt2: cannot be read .* export it again"):
            load(tmp_path / f"{name}.pt2")
    flipped = bytearray(content)
    flipped[content.index(bytes(500)) + 100] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"damaged: .*code.so in it is not what was written"):
        load(tmp_path / "flipped.pt2")
    with pytest.raises(ValueError, match=r"schema 2.*reads 1"):
        load(write_archive(tmp_path / "newer.pt2", about | {"schema": 2}))
    with pytest.raises(ValueError, match="no exported model of multifid"):
        load(write_archive(tmp_path / "other.pt2", {"format": "other"}))
    with pytest.raises(ValueError, match=r"cannot load it .*export the run again"):
        load(whole)  # no code in it
    with pytest.raises(ValueError, match="computes on the CPU, not on cuda"):
        load(whole, device="cuda")
    with pytest.raises(ValueError, match="for linux sparc, this machine is"):
        refuse_elsewhere(about | {"system": "linux", "machine": "sparc"}, whole)
    with pytest.raises(ValueError, match=r"compiled code, without a model"):
        load_model(whole)


@pytest.mark.skipif(instructions() not in package.INSTRUCTIONS, reason="not an x86-64 processor")
def test_code_for_a_better_processor_is_refused(about, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert instructions() == "avx2"
    for fine in ("baseline", "avx2"):
        refuse_elsewhere(about | {"instructions": fine}, tmp_path)
    with pytest.raises(ValueError, match=r"needs a processor with avx512, this one has avx2; .*--instructions avx2"):
        refuse_elsewhere(about | {"instructions": "avx512"}, tmp_path)
    with pytest.raises(ValueError, match="this processor compiles and tries baseline, avx2"):
        export_package(model(), "a", tmp_path / "x.pt2", level="avx512")


def test_exports_that_cannot_be_are_refused_before_anything_is_compiled(tmp_path, monkeypatch):
    for wanted, code, message in (
        ({"format": "mfid"}, Compilation(task="a"), "--task is for compiled code only"),
        ({"format": "onnx"}, Compilation(), "mfid .* or pt2"),
        ({"tasks": ["a"]}, Compilation(), "name it by --task"),
        ({}, Compilation(threads="two"), "must be one or all"),
        ({}, Compilation(precision="fp16"), "must be one of fp32, fp64"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "run", tmp_path / "x.pt2", code=code, **wanted)
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        export(tmp_path / "run", tmp_path / "x.mfid", format="pt2")
    (tmp_path / "there.pt2").touch()
    with pytest.raises(FileExistsError):
        export_package(model(), "a", tmp_path / "there.pt2")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler .*apt-get install g\+\+"):
        export_package(model(), "a", tmp_path / "x.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["there.pt2"]


def test_code_is_exported_of_a_model_file_too(tmp_path, monkeypatch):
    trained = model()
    about = {"level_of_theory": "PBE", "structures": 5, "labels": {"energy": 5}}
    tasks = {task: of_task | about for task, of_task in trained.description["tasks"].items()}
    ended = {"steps": 1, "epochs": 1.0, "seed": 0, "best": 0.5}
    description = describe(trained.potential.config, trained.potential.branch_of, tasks, ended)
    write_model_file(trained.potential, description | {"weights": "best"}, tmp_path / "m.mfid")

    def compile_(model, task, out, *, level, threaded):
        assert (task, level, threaded, model.dtype) == ("b", "baseline", False, torch.float64)
        out.write_text("code")

    monkeypatch.setattr("multifid.workflows.export.export_package", compile_)
    with pytest.raises(ValueError, match="several tasks: say which one"):
        export(tmp_path / "m.mfid", tmp_path / "b.pt2")
    export(tmp_path / "m.mfid", tmp_path / "b.pt2", code=Compilation("b", "fp64", "baseline"))
    card = (tmp_path / "b.md").read_text()
    assert "| b | PBE | 5 |" in card and "| a |" not in card and "Errors: not evaluated yet" in card


def test_compiled_code_is_kept_for_an_architecture_and_checked_before_use(tmp_path, monkeypatch):
    made = []

    class Kept(Uncompiled):
        """Computes with the weights that it is given."""

        def __init__(self, path):
            trained = dict(made)[path]
            self.path, self.function = path, Fixed(trained, "a")
            if path.read_text() != "code":
                raise ValueError("damaged")
            held = dict(self.function.named_parameters()) | dict(self.function.named_buffers())
            self.about = about_of(trained, weights=held.items())[0]
            self.names = list(held)

        def run(self, tensors):
            k = len(self.names)
            weights = dict(zip(self.names, tensors[:k], strict=True))
            return [x.detach() for x in torch.func.functional_call(self.function, weights, tuple(tensors[k:]))]

        def __call__(self, *tensors):
            return self.run(list(tensors))

    def compile_(trained, task, place, **_):
        made.append((place, trained))
        place.write_text("code")

    monkeypatch.setattr(aot, "export_package", compile_)
    monkeypatch.setattr(compiled, "Package", Kept)
    first, second, single = model(), model(seed=4), model(dtype=torch.float32)
    atoms = structures()["crystal"]
    for trained, count in ((first, 1), (second, 1), (single, 2), (first, 2)):
        for task in ("a", "b"):
            atoms.calc = trained.calculator(task, compiled=tmp_path)
            expected = trained.predict(atoms, task, features=True)
            tolerance = 1e-10 if trained.dtype == torch.float64 else 1e-4
            np.testing.assert_allclose(atoms.get_forces(), expected.forces, rtol=0, atol=tolerance)
            np.testing.assert_allclose(atoms.get_stress(voigt=False), expected.stress, rtol=0, atol=tolerance)
            assert atoms.get_potential_energy() == pytest.approx(expected.energy[0], abs=100 * tolerance)
            assert len(made) == count
    np.testing.assert_allclose(atoms.calc.get_property("features", atoms), expected.features, atol=1e-10)
    atoms.calc = atoms.calc.switch("a")
    np.testing.assert_allclose(atoms.get_forces(), first.predict(atoms, "a").forces, rtol=0, atol=1e-10)
    batched = TorchSimModel(first, "b", compiled=tmp_path)
    np.testing.assert_allclose(batched(state_of(atoms))["forces"], first.predict(atoms, "b").forces, rtol=0, atol=1e-10)
    assert type(batched.model) is compiled.Compiled and len(made) == 2
    for path in tmp_path.glob("*.pt2"):
        path.write_text("damage")
    first.calculator("a", compiled=tmp_path)
    assert len(made) == 3


PRODUCT = [  # every pair of two settings; a case takes most of a minute
    pytest.param(encoder, forces, dtype, id=f"{encoder}-{forces}-{dtype}", marks=pytest.mark.full)
    for encoder, forces, dtype in (
        ("egnn", "conservative", "float64"),
        ("egnn", "direct", "float32"),
        ("painn", "conservative", "float32"),
        ("painn", "direct", "float64"),
    )
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("encoder", "forces", "dtype"), PRODUCT)
def test_compiled_code_computes_what_the_model_computes(encoder, forces, dtype, tmp_path):
    trained = model(forces, encoder=encoder, dtype=PRECISIONS[dtype])
    told = export_package(trained, "a", tmp_path / "a.pt2")
    exported = load(tmp_path / "a.pt2")
    tolerance = 1e-10 if dtype == "float64" else 1e-4
    one, far = Atoms("O"), Atoms("O2", [[0, 0, 0], [9, 0, 0]])
    for atoms in (*structures().values(), one, far):
        expected, found = trained.predict(atoms, "a"), exported.predict(atoms, "a")
        assert found.energy == pytest.approx(expected.energy, abs=tolerance * (1 if dtype == "float64" else 10), rel=0)
        np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=tolerance)
        if forces == "conservative":
            np.testing.assert_allclose(found.stress, expected.stress, rtol=0, atol=tolerance)
    everything = [*structures().values(), one, far]
    together = exported.predict(everything)
    np.testing.assert_allclose(np.concatenate(together.energies), np.concatenate([
        trained.predict(atoms, "a").energies for atoms in everything
    ]), rtol=0, atol=10 * tolerance)  # fmt: skip
    names = [x.name for x in inputs_for(trained.potential.encoder.needs)]
    nothing = exported.package(*tensors_of(batch_of(pack_atoms([]), 4.0, "a"), names))
    assert [x.shape[0] for x in nothing] == [0] * len(told["outputs"])
    with pytest.raises(ValueError, match=r"numbers is \(1, 3\) torch.float64, not \(1\) torch.int64"):
        exported.package(*tensors_of(batch_of(pack_atoms([bulk("Cu")]), 4.0, "a"), names)[:1] * len(names))
    plain = torch._inductor.aoti_load_package(str(tmp_path / "a.pt2"))
    assert json.loads(plain.get_metadata()[KEY])["model"] == told["model"]
    inputs = tensors_of(batch_of(pack_atoms([structures()["crystal"]]), 4.0, "a"), names)
    for x, y in zip(plain(*inputs), exported.package(*inputs), strict=True):
        assert torch.equal(x, y)
    # In a process that has nothing of multifid but the loader.
    code = (
        "import sys, torch; from multifid.model.package import Package; p = Package(sys.argv[1]); "
        "assert not {'ase', 'pydantic', 'scipy'} & set(sys.modules); print(p.about['task'], len(p.inputs))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.pt2")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["a", str(len(names))]


@pytest.mark.full
@pytest.mark.parametrize("encoder", [*ENCODERS, "egnn with attention"])
def test_every_encoder_is_written_down_for_any_sizes(encoder):
    """The list of operations that is compiled: of many structures, one, one atom, two alone, nothing."""
    trained = model(encoder=encoder.split()[0])
    if "attention" in encoder:
        config = trained.potential.config
        attentive = config.encoder.model_copy(update={"attention": AttentionConfig(heads=2)})
        potential = Potential(config.model_copy(update={"encoder": attentive}), ["a"], {"a": "a"}, seed=0)
        trained = dataclasses.replace(trained, potential=potential)
    function = Fixed(trained, "a")
    batches = aot.examples(trained, "a", function)
    written = write_down(function, batches[0])
    assert len(batches[-1].numbers) == 0
    for batch in batches:
        tensors = tensors_of(batch, [x.name for x in inputs_for(function.needs)])
        for found, expected in zip(written.operations(*tensors), function(*tensors), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_compiled_calculator_serves_all_weights_of_an_architecture(tmp_path):
    atoms = structures()["crystal"]
    for seed, task in ((3, "a"), (4, "b")):
        trained = model(seed=seed)
        atoms.calc = trained.calculator(task, compiled=tmp_path)
        expected = trained.predict(atoms, task)
        np.testing.assert_allclose(atoms.get_forces(), expected.forces, rtol=0, atol=1e-10)
        np.testing.assert_allclose(atoms.get_stress(voigt=False), expected.stress, rtol=0, atol=1e-10)
    assert len(list(tmp_path.glob("*.pt2"))) == 1
