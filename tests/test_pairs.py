"""Pair potentials from the periodic table: their energies, their fit, and runs that have them."""

import copy
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from safetensors.torch import load_file

import multifid
from multifid.config import dump_config, parse_config
from multifid.feed.loader import open_sources
from multifid.graphs.graph import graph_of
from multifid.graphs.padding import pad
from multifid.model.compiled import compile_training
from multifid.model.domain import in_domains, share_of
from multifid.model.fixed import Fixed, inputs_for, tensors_of
from multifid.model.model_file import load_model
from multifid.model.pairs import PairEnergies, pair_properties
from multifid.model.pieces import batch_of
from multifid.model.potential import ModelConfig
from multifid.model.predictor import Predictor
from multifid.model.suite import samples
from multifid.model.suite.samples import potential_with
from multifid.preparation.prepare import prepare
from multifid.structures.atoms import pack_atoms
from multifid.structures.periodic import RADIUS
from multifid.training.pairs import fitted_pairs
from multifid.workflows.finetune import refit_references
from multifid.workflows.study import models_of

CUTOFF, FUNCTIONS = 4.0, 5
SYMBOLS = ("Li", "O", "F", "Mg", "Ti", "Cs", "Gd")


def crystals(count: int, seed: int) -> list[Atoms]:
    """Small triclinic cells and molecules of any elements."""
    random, out = np.random.default_rng(seed), []
    while len(out) < count:
        n = int(random.integers(2, 5))
        cell = 3.8 * np.eye(3) + random.uniform(-0.4, 0.4, (3, 3))
        atoms = Atoms(random.choice(SYMBOLS, n), cell=cell, pbc=True, scaled_positions=random.random((n, 3)))
        if len(out) % 3 == 0:
            atoms = Atoms(atoms.symbols, atoms.positions)
        if n < 2 or min(neighbor_list("d", atoms, 6.0), default=0.0) > 1.2:
            out.append(atoms)
    return out


def with_coefficients() -> PairEnergies:
    """Some that give energies of a few eV."""
    random = np.random.default_rng(0)
    pairs = PairEnergies(FUNCTIONS, CUTOFF).double()
    coefficients, of_element = random.normal(size=pairs.coefficients.shape) / 20, random.normal(size=119)
    of_element[0] = 0.0
    pairs.set(coefficients.tolist(), of_element.tolist())
    return pairs


def energy_by_hand(pairs: PairEnergies, atoms: Atoms) -> float:
    """The formula at the head of the module, a pair at a time."""
    c, e = pairs.coefficients.numpy(), pairs.of_element.numpy()
    properties, total = pair_properties(), float(e[atoms.numbers].sum())
    centres = np.linspace(0.5, 2.5, FUNCTIONS)
    width = 1.5 * (centres[1] - centres[0])
    for i, j, d in zip(*neighbor_list("ijd", atoms, CUTOFF), strict=True):
        a, b = atoms.numbers[i], atoms.numbers[j]
        x = d / CUTOFF
        u = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
        basis = np.exp(-(((d / (RADIUS[a] + RADIUS[b]) - centres) / width) ** 2))
        total += u * float(basis @ c @ properties[a, b])
    return total


def test_energies_are_those_of_the_formula_pair_by_pair():
    pairs = with_coefficients()
    for atoms in crystals(6, seed=1):
        packed = pack_atoms([atoms, atoms.repeat(2) if atoms.pbc.any() else atoms])
        graph = graph_of(batch_of(packed, CUTOFF, "t"))
        of_atoms = pairs(graph)
        found = torch.zeros(2, dtype=torch.float64).index_add(0, graph.structure, of_atoms)
        expected = energy_by_hand(pairs, atoms)
        assert float(found[0]) == pytest.approx(expected, abs=1e-9)
        assert float(found[1]) == pytest.approx(expected * (8 if atoms.pbc.any() else 1), abs=1e-9)
    properties = pair_properties()
    np.testing.assert_array_equal(properties, properties.transpose(1, 0, 2))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A store whose energies are a pair potential's, with force labels of no meaning."""
    folder, pairs = tmp_path_factory.mktemp("planted"), with_coefficients()
    frames = crystals(260, seed=2)
    for atoms in frames:
        random = np.random.default_rng(len(atoms))
        energy, forces = energy_by_hand(pairs, atoms), random.normal(size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    ase.io.write(folder / "planted.xyz", frames, format="extxyz")
    options = {"task": "planted", "fractions": (0.8, 0.1, 0.1), "trust_units": True, "progress": False}
    prepare("extxyz", [folder / "planted.xyz"], folder / "planted", **options)
    return folder / "planted"


def values_of(store: Path, run: Path, **train) -> dict:
    return {
        "run": str(run),
        "tasks": {"planted": {"store": str(store)}, "again": {"store": str(store), "labels": "planted"}},
        "model": {
            "cutoff": CUTOFF,
            "encoder": {"name": "painn", "layers": 1, "hidden": 8},
            "branch": {"hidden": [6]},
            "branches": {"planted": {"pairs": FUNCTIONS}},
        },
        "train": {"batch": 4, "steps": 6, "epoch_steps": 3, "checkpoint_every": 2, "precision": "fp64"} | train,
    }


def test_a_planted_potential_is_found(planted, tmp_path, monkeypatch):
    """Hardly held, it predicts structures that it has not seen; where nothing validates, it is held more."""
    config = parse_config(values_of(planted, tmp_path / "run"), "test")
    sources = open_sources(config.tasks)
    monkeypatch.setattr("multifid.training.pairs.HELD", (1e-12, 1.0))
    monkeypatch.setattr("multifid.training.pairs.OF_ELEMENTS", 1e-14)
    found, lines = fitted_pairs(config, sources)
    assert list(found) == ["planted"], "the other branch has none"
    (line,) = lines
    error, before = (float(x) for x in re.findall(r"([\d.e-]+) meV/atom on .* alone have ([\d.e+]+) ", line)[0])
    assert error < 0.02 * before and "ridge 1e-12" in line, line


def test_runs_with_pairs_resume_exactly_and_are_used(planted, tmp_path, pool):
    """A run in two parts, and on two ranks, is the run in one; what it is used by has the energies of the fit too."""
    whole, parts, ranks = (values_of(planted, tmp_path / name) for name in ("whole", "parts", "ranks"))
    pool.run(1, "whole_run", whole)
    pool.run(1, "whole_run", parts, 3)
    pool.run(1, "whole_run", parts)
    pool.run(2, "whole_run", ranks)
    one, two, many = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts", "ranks"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-10, atol=1e-10)
    fitted = one["branches.planted.pairs.coefficients"]
    assert fitted.abs().max() > 0 and not any("again.pairs" in name for name in one)

    potential, _ = load_model(tmp_path / "whole")
    assert torch.equal(potential.branches["planted"].pairs.coefficients, fitted.float())
    model = multifid.load(tmp_path / "whole")
    atoms = crystals(3, seed=3)
    output = model.predict(atoms, task="planted", precision="fp64")
    for k, one_of_them in enumerate(atoms):
        one_of_them.calc = model.calculator(task="planted", dtype="float64")
        assert one_of_them.get_potential_energy() == pytest.approx(output.energy[k], abs=1e-8)


def test_what_begins_with_such_a_branch_has_its_shape_and_its_pairs(planted, tmp_path):
    """Fine-tuning, references fitted anew, and the models of a study, whose branches are fewer or one."""
    values = values_of(planted, tmp_path / "start")
    multifid.train(values, quiet=True)
    known = load_file(tmp_path / "start" / "model.safetensors")["branches.planted.pairs.coefficients"]
    common = {"start": "planted", "quiet": True, "trust_units": True}
    for name, overrides in (("tuned", ["train.steps=2", "train.warmup=0", "finetune.moves=branch"]), ("refit", None)):
        out = tmp_path / name
        if overrides is None:
            refit_references(tmp_path / "start", f"new={planted}", out, **common)
        else:
            multifid.finetune(tmp_path / "start", f"new={planted}", out, overrides, **common)
        assert torch.equal(
            load_file(out / "model.safetensors")["branches.new.pairs.coefficients"].float(), known.float()
        )
        assert multifid.load(out).predict(crystals(1, seed=4), task="new").energy.shape == (1,)

    for config in models_of(parse_config(values, "test"), seed=0):
        again = parse_config(yaml.safe_load(dump_config(config)), "test")
        assert set(again.model.branches) == ({"planted"} if "planted" in again.branch_of().values() else set())


@pytest.mark.parametrize("encoder", ["painn", "schnet"])
def test_domains_and_exported_passes_have_the_energies_of_pairs_too(encoder):
    """SchNet has no vectors: its direct forces read edges as well."""
    model = potential_with({"name": encoder, "layers": 2, "hidden": 8}, "direct", pairs=3)
    batch = samples.batch_of(samples.system(9, samples.skewed(5.0)))
    whole = model(batch)[samples.TASK]
    graph, home, _ = in_domains(batch, [0, 1, 1, 0, 0, 1, 0, 1, 1])
    share = share_of(model, samples.TASK, graph, home)
    torch.testing.assert_close(share.energies, whole.energies, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(share.forces, whole.forces, rtol=1e-12, atol=1e-12)

    numbers = range(1, 21)
    about = {
        "branch": samples.TASK,
        "elements": list(numbers),
        "references": {str(z): 0.0 for z in numbers},
        "scale": 1.0,
    }
    description = {"cutoff": samples.CUTOFF, "tasks": {samples.TASK: about}}
    function = Fixed(Predictor(model, description, dtype=torch.float64), samples.TASK)
    names = [x.name for x in inputs_for(function.needs)]
    energies, forces = function(*tensors_of(batch, names))
    torch.testing.assert_close(energies, whole.energies, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(forces, whole.forces, rtol=1e-12, atol=1e-12)


def test_pairs_are_not_rounded_by_bf16_and_know_atoms_that_are_alone():
    model = potential_with({"name": "painn", "layers": 1, "hidden": 8}, "direct", pairs=3, dtype=torch.float32)
    pairs = model.branches[samples.TASK].pairs
    graph = graph_of(samples.batch_of(samples.system(5), samples.system(1)).to(dtype=torch.float32))
    exact = pairs(graph)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pairs(graph), exact) and exact.dtype == torch.float32
    assert exact[5] == pairs.of_element[graph.numbers[5]], "nothing but the energy of its element"


def test_compiled_passes_have_pairs_too():
    eager = potential_with({"name": "painn", "layers": 1, "hidden": 8}, "direct", pairs=3).train()
    compiled = copy.deepcopy(eager)
    compile_training(compiled, True, "aot_eager")
    batch = pad(samples.batch_of(samples.system(5), samples.system(4, samples.skewed(4.0))), samples.CUTOFF)
    one, other = (model(batch)[samples.TASK] for model in (eager, compiled))
    torch.testing.assert_close(other.energy, one.energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other.forces, one.forces, rtol=1e-10, atol=1e-10)


def test_pairs_with_conservative_forces_are_refused():
    for values in (
        {"branch": {"pairs": 3, "forces": "conservative"}},
        {"branches": {"x": {"pairs": 3, "forces": "conservative"}}},
    ):
        with pytest.raises(ValueError, match="fitted to energies alone, and its gradient spoils conservative forces"):
            ModelConfig.model_validate(values)
