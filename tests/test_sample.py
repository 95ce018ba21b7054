"""What `multifid sample` writes: read back by the readers of the published formats, judged by tblite and by physics."""

import bz2
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from multifid.readers import reader
from multifid.structures.structure import Structure
from multifid.workflows.sample import (
    SOURCES,
    alexandria,
    ani1x,
    crystals,
    molecules,
    mptrj,
    qm7x,
    reactions,
    sample,
    transition1x,
    xtb,
)
from records import expanded

os.putenv("OMP_NUM_THREADS", "1")  # before tblite loads its OpenMP: many threads on a busy machine are slower than one
tblite = pytest.importorskip("tblite.interface", reason="the extra 'demo' is not installed")

HARTREE, BOHR = 27.211386245988, 0.529177210903  # eV, angstrom (CODATA 2018); ASE's differ in the ninth digit
FILES = ("ani1x.h5", "qm7x.hdf5", "transition1x.h5", "mptrj.json", "alexandria.json.bz2", "alex_go.json.bz2")
METHODS = {
    "ani1x": "GFN2-xTB",
    "qm7x": "IPEA1-xTB",
    "transition1x": "GFN1-xTB",
    "mptrj": "GFN1-xTB",
    "alexandria": "GFN1-xTB",
}
REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("sample")
    return out, sample(out, structures=10, workers=2, progress=False)


def read_back(path: Path, form: str) -> list:
    module = reader(form)
    return list(expanded(module.read(path, module.Options(), lambda fraction: None)))


def energy(method: str, structure: Structure, positions: np.ndarray, cell: np.ndarray | None = None) -> float:
    """eV, straight from tblite."""
    lattice = {} if cell is None else {"lattice": cell / BOHR, "periodic": np.array([True] * 3)}
    calculator = tblite.Calculator(method, np.array(structure.numbers), positions / BOHR, **lattice)
    calculator.set("verbosity", 0)
    return calculator.singlepoint().get("energy") * HARTREE


@pytest.mark.parametrize("name", FILES)
def test_the_reader_of_the_published_format_reads_every_structure_and_skips_none(made, name):
    out, said = made
    records = read_back(out / name, said[name]["format"])
    assert len(records) == said[name]["structures"] > 0
    assert all(isinstance(record, Structure) for record in records)


@pytest.mark.parametrize("name", FILES)
def test_what_a_reader_reads_is_the_energy_and_minus_its_gradient(made, name):
    out, said = made
    structure = read_back(out / name, said[name]["format"])[0]
    (task, labels), h = next(iter(structure.labels.items())), 0.01
    method = METHODS[said[name]["task"]]
    assert task == said[name]["task"]
    assert labels.energy == pytest.approx(energy(method, structure, structure.positions, structure.cell), abs=5e-4)
    i, k = np.unravel_index(np.abs(labels.forces).argmax(), labels.forces.shape)
    step = np.zeros(structure.positions.shape)
    step[i, k] = h
    up = energy(method, structure, structure.positions + step, structure.cell)
    down = energy(method, structure, structure.positions - step, structure.cell)
    assert labels.forces[i, k] == pytest.approx(-(up - down) / 2 / h, abs=0.01)
    assert abs(labels.forces[i, k]) > 0.02


@pytest.mark.parametrize("name", ["mptrj.json", "alex_go.json.bz2"])
def test_what_a_reader_reads_as_stress_is_the_strain_derivative_of_the_energy(made, name):
    out, said = made
    structure = read_back(out / name, said[name]["format"])[0]
    stress = structure.labels[said[name]["task"]].stress
    i, k = np.unravel_index(np.abs(stress).argmax(), (3, 3))
    h = 2e-3
    strained = []
    for sign in (1, -1):
        deformation = np.eye(3)
        deformation[i, k] += sign * h / 2
        deformation[k, i] += sign * h / 2
        args = structure.positions @ deformation, structure.cell @ deformation
        strained.append(energy("GFN1-xTB", structure, *args))
    derivative = (strained[0] - strained[1]) / 2 / h / abs(np.linalg.det(structure.cell))
    assert stress[i, k] == pytest.approx(derivative, rel=0.02, abs=1e-4)
    assert abs(stress[i, k]) > 1e-3


def test_the_files_are_the_same_bytes_whatever_the_number_of_workers(made, tmp_path):
    out, said = made
    assert sample(tmp_path, structures=10, workers=1, progress=False) == said
    assert {p.name for p in tmp_path.iterdir()} == {*FILES, "sources.json"}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_another_seed_gives_other_structures():
    one, other = (ani1x.compute("H2O", 1, seed).records[0][1].positions for seed in (0, 1))
    assert np.abs(one - other).max() > 1e-3


def test_larger_molecules_have_nine_to_twenty_six_atoms_and_closed_shells():
    larger = molecules.larger().values()
    assert sorted(Counter(len(m.numbers) for m in larger).items()) == [(atoms, 2) for atoms in range(9, 27)]
    for mol in larger:
        assert mol.numbers.sum() % 2 == 0, mol.name
        bonded = molecules.bonds(mol.numbers, mol.positions)
        reached = np.linalg.matrix_power(np.eye(len(bonded), dtype=int) + bonded, len(bonded)) > 0
        assert reached.all(), f"{mol.name} is more than one molecule"


@pytest.mark.parametrize("cells", [2, 3])
def test_cells_one_above_the_other_are_the_same_crystal(cells):
    for material in crystals.MATERIALS[::20]:
        around = []
        for of in (material, replace(material, cells=cells)):
            cell, fractional = crystals.ideal(of)
            images = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
            apart = ((images + fractional - fractional[0]) @ cell).reshape(-1, 3)
            numbers, distances = np.tile(of.numbers, len(images)), np.linalg.norm(apart, axis=1)
            around.append(sorted(zip(numbers[distances < 8.0].tolist(), distances[distances < 8.0], strict=True)))
        assert len(around[0]) > 8
        np.testing.assert_allclose(around[1], around[0], atol=1e-9)


def test_sources_json_says_the_level_of_theory_that_was_computed(made):
    out, said = made
    assert json.loads((out / "sources.json").read_text()) == said
    assert set(said) == set(FILES)
    for about in said.values():
        assert about["level_of_theory"].startswith(METHODS[about["task"]])
        assert "tblite" in about["made_by"] and about["seed"] == 0
    for name in ("ani1x.h5", "qm7x.hdf5", "transition1x.h5"):
        with h5py.File(out / name) as file:
            assert file.attrs["level_of_theory"] == said[name]["level_of_theory"]


def key_tree(value, depth: int = 12):
    """The shape of a JSON value: keys of objects, and of the first element of arrays."""
    if isinstance(value, dict):
        return {key: key_tree(own, depth - 1) for key, own in value.items()} if depth else dict
    if isinstance(value, list):
        return [key_tree(value[0], depth - 1)] if value and depth else []
    return None


def real(path: str) -> Path:
    if not (REAL / path).exists():
        pytest.skip(f"the published sample {path} is not here")
    return REAL / path


def test_ani1x_groups_hold_the_keys_kinds_and_ranks_of_a_published_file(made):
    with h5py.File(real("ani1x/physicsml_tests_ani1x.h5")) as theirs, h5py.File(made[0] / "ani1x.h5") as ours:
        published = {key: (d.dtype, d.ndim) for key, d in theirs[next(iter(theirs))].items()}
        for group in ours.values():
            written = {key: (d.dtype, d.ndim) for key, d in group.items()}
            for key in published:
                assert written[key] == published[key], key
            assert set(written) - set(published) <= {"wb97x_tz.forces"}  # in the release, not in every excerpt


def test_mptrj_frames_hold_the_keys_of_a_published_file(made):
    theirs = next(iter(next(iter(json.loads(real("mptrj/mptrj_sample.json").read_text()).values())).values()))
    ours = next(iter(next(iter(json.loads((made[0] / "mptrj.json").read_text()).values())).values()))
    assert key_tree(ours["structure"]) == key_tree(theirs["structure"])
    assert set(ours) - set(theirs) == {"ef_per_atom", "bandgap"}  # in the release, lost in the conversion
    assert set(theirs) <= set(ours)


def test_alexandria_entries_and_steps_hold_the_keys_of_published_files(made):
    def load(path):
        return json.loads(bz2.decompress(path.read_bytes()))

    theirs = load(real("alexandria/alexandria_sample.json.bz2"))["entries"][0]
    ours = load(made[0] / "alexandria.json.bz2")["entries"][0]
    theirs["data"].pop("stress_unit")  # added by the conversion
    assert key_tree(ours) == key_tree(theirs)
    their_step = next(iter(load(real("alexandria/alex_go_sample.json.bz2")).values()))[0]
    our_step = next(iter(load(made[0] / "alex_go.json.bz2").values()))[0]
    assert set(our_step) == set(their_step) and set(our_step["steps"][0]) == set(their_step["steps"][0])


def test_transition1x_data_is_the_union_of_disjoint_splits(made):
    with h5py.File(made[0] / "transition1x.h5") as file:
        reactions_of = {name: {f"{f}/{r}" for f in file[name] for r in file[name][f]} for name in file}
        assert set(reactions_of) == {"data", "train", "val", "test"}
        assert reactions_of["data"] == reactions_of["train"] | reactions_of["val"] | reactions_of["test"]
        assert sum(map(len, reactions_of.values())) == 2 * len(reactions_of["data"])


def test_the_shipped_split_keeps_formulas_together_and_every_element_in_train():
    jobs = transition1x.jobs(300, 0)
    formulas = [molecules.library()[reactant].formula for _, reactant, *_ in jobs]
    elements = [set(molecules.library()[reactant].numbers.tolist()) for _, reactant, *_ in jobs]
    for seed in range(5):
        splits = transition1x.shipped_split(formulas, elements, seed)
        assert all(len({s for f, s in zip(formulas, splits, strict=True) if f == g}) == 1 for g in formulas)
        counts = Counter(splits)
        assert 1 <= counts["val"] <= 3 and 1 <= counts["test"] <= 3
        in_train = set().union(*(e for e, s in zip(elements, splits, strict=True) if s == "train"))
        assert in_train == {1, 6, 7, 8}


def test_the_default_size_covers_enough_chemistry():
    library = molecules.library()
    assert {z for m in library.values() for z in m.numbers} == {1, 6, 7, 8}
    assert max(len(m.numbers) for m in library.values()) <= 12
    assert len({library[name].formula for name, *_ in ani1x.jobs(300, 0)}) >= 40
    assert len(qm7x.jobs(300, 0)) >= 40
    paths = transition1x.jobs(300, 0)
    assert len(paths) >= 20
    assert Counter(library[r].formula for _, r, *_ in paths).most_common(1)[0][1] >= 3
    relaxing, snapshots = ({material.serial for material, *_ in s.jobs(300, 0)} for s in (alexandria, mptrj))
    assert len(relaxing) >= 60 and len(snapshots) >= 60
    assert not relaxing & snapshots
    for source in SOURCES:
        assert len(source.jobs(1, 0)) == 1


def test_every_crystal_is_eight_atoms_that_do_not_touch():
    for material in crystals.MATERIALS:
        cell, fractional = crystals.ideal(material)
        images = np.array([[i, j, k] for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)])
        apart = (fractional[:, None, None] - fractional[None, :, None] + images) @ cell
        distances = np.linalg.norm(apart, axis=-1)
        distances[distances < 1e-9] = np.inf
        assert fractional.shape == (8, 3) and len(material.numbers) == 8
        nearest = distances.min(axis=(1, 2))
        assert nearest.min() > 1.5 and np.ptp(nearest) < 1e-6, material  # every site sees the same first shell


def test_gfn2_and_ipea1_differ_after_alignment_as_much_as_the_task_says():
    rng = np.random.default_rng(0)
    energies, forces, compositions = {"GFN2-xTB": [], "IPEA1-xTB": []}, {"GFN2-xTB": [], "IPEA1-xTB": []}, []
    for mol in list(molecules.library().values())[: len(molecules.G2)]:
        positions = molecules.distorted(mol, rng, 0.06)
        compositions.append([(mol.numbers == z).mean() for z in (1, 6, 7, 8)])
        for method in energies:
            point = xtb.singlepoint(method, mol.numbers, positions)
            energies[method].append(point.energy / len(mol.numbers))
            forces[method].append(point.forces.ravel())
    x = np.array(compositions)
    aligned = {m: np.array(e) - x @ np.linalg.lstsq(x, np.array(e), rcond=None)[0] for m, e in energies.items()}

    def rms(v):
        return float(np.sqrt(np.mean(np.square(v))))

    assert rms(aligned["GFN2-xTB"] - aligned["IPEA1-xTB"]) == pytest.approx(0.06, abs=0.02)  # eV/atom
    between = rms(np.concatenate(forces["GFN2-xTB"]) - np.concatenate(forces["IPEA1-xTB"]))
    assert between == pytest.approx(0.49, abs=0.1)  # eV/angstrom
    assert 1.0 < rms(np.concatenate(forces["GFN2-xTB"])) < 2.0


def test_the_dispersion_of_qm7x_is_attractive_and_its_force_is_minus_its_gradient(made):
    with h5py.File(made[0] / "qm7x.hdf5") as file:
        geometry = file[next(iter(file))]
        record = {key: d[()] for key, d in geometry[next(iter(geometry))].items()}
    assert record["ePBE0+MBD"].shape == (1,) and record["eAT"][0] < 0 and record["eMBD"][0] < 0
    np.testing.assert_allclose(record["ePBE0"] + record["eMBD"], record["ePBE0+MBD"], atol=1e-9)
    np.testing.assert_allclose(record["pbe0FOR"] + record["vdwFOR"], record["totFOR"], atol=1e-9)

    def dispersion(positions):
        total, without = (xtb.singlepoint("IPEA1-xTB", record["atNUM"], positions, dispersion=d) for d in (True, False))
        return total.energy - without.energy

    i, k = np.unravel_index(np.abs(record["vdwFOR"]).argmax(), record["vdwFOR"].shape)
    step = np.zeros(record["atXYZ"].shape)
    step[i, k] = 0.02
    slope = (dispersion(record["atXYZ"] + step) - dispersion(record["atXYZ"] - step)) / 0.04
    assert record["vdwFOR"][i, k] == pytest.approx(-slope, rel=0.05)


def test_the_mapping_of_atoms_joins_like_with_like_and_finds_the_identity_of_a_rotated_copy():
    mol = molecules.library()["CH3CONH2"]
    turn = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    shuffled = np.array([0, 1, 2, 3, 4])  # carbon, nitrogen and oxygen stay; hydrogens come in another order
    hydrogens = np.flatnonzero(mol.numbers == 1)
    order = np.arange(len(mol.numbers))
    order[hydrogens] = hydrogens[[*shuffled][::-1]]
    copy = molecules.Molecule("copy", mol.numbers[order], mol.positions[order] @ turn)
    laid = reactions.mapped(mol, copy, np.random.default_rng(0))
    np.testing.assert_allclose(laid, mol.positions - mol.positions.mean(0), atol=1e-6)


def test_what_is_absurd_or_does_not_converge_is_skipped_and_counted(monkeypatch):
    with pytest.raises(xtb.Unusable, match="a force above 30 eV/angstrom"):
        xtb.singlepoint("GFN2-xTB", np.array([1, 1]), np.array([[0.0, 0, 0], [0.3, 0, 0]]))
    monkeypatch.setattr(xtb, "LARGEST_FORCE", 0.5)
    outcome = ani1x.compute("CH4", 3, 0)
    assert outcome.skipped == Counter({"a force above 0 eV/angstrom": 3}) and not outcome.records
    monkeypatch.setattr(alexandria, "STEPS", 1)
    monkeypatch.setattr(xtb, "LARGEST_FORCE", 30.0)
    material = alexandria.jobs(1, 0)[0][0]
    assert alexandria.compute(material, 0).skipped == Counter({"relaxation did not end in 1 steps": 1})


def test_without_tblite_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tblite.interface", None)
    with pytest.raises(ValueError, match=r"pip install 'multifid\[demo\]'"):
        sample(tmp_path / "out", structures=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"structures": 0}, {"workers": 0}])
def test_sizes_below_one_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1, not 0"):
        sample(tmp_path, **wrong)
