"""Labels of extended XYZ: read as ASE reads what it wrote, under the names people use; nothing left out in silence."""

import tempfile
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from hypothesis import given, settings
from hypothesis import strategies as st

from multifid.preparation.prepare import prepare
from multifid.readers.contract import Skip
from multifid.readers.extxyz import Options, read

GPA = 0.006241509074460763  # eV/angstrom^3
TEXTS = st.sampled_from(['say "yes"', "it's", "a = b", "{x} [y]", "None", "T", "1 2 3", "C[C@H](O)=O", "über", "_JSON"])
VALUES = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | TEXTS
    | st.sampled_from([np.arange(3), np.eye(3), np.ones((2, 2, 2)), np.array([True, False]), [1, None], {"a": 1.5}])
)  # fmt: skip


def records(path: Path, **options) -> list:
    return list(read(path, Options(**options), lambda fraction: None))


@st.composite
def labelled(draw) -> ase.Atoms:
    """Atoms as people write them: some results, some notes, some arrays, perhaps constraints."""
    n, random = draw(st.integers(1, 4)), np.random.default_rng(draw(st.integers(0, 2**32)))
    cell = draw(st.sampled_from([None, np.diag([3.0, 4, 5]), np.array([[4.0, 0, 0], [1, 5, 0], [0.5, -1, 6]])]))
    pbc = draw(st.lists(st.booleans(), min_size=3, max_size=3)) if cell is not None else False
    atoms = ase.Atoms(random.choice(["H", "C", "Cl", "Fe"], n), random.uniform(0, 3, (n, 3)), cell=cell, pbc=pbc)
    results = {
        "energy": random.normal(0, 1e3), "free_energy": random.normal(), "forces": random.normal(0, 1, (n, 3)),
        "stress": random.normal(0, 0.1, 6), "dipole": random.normal(0, 1, 3), "magmoms": random.normal(0, 1, n),
        "energies": random.normal(0, 1, n), "stresses": random.normal(0, 1, (n, 6)),
    }  # fmt: skip
    kept = draw(st.sets(st.sampled_from(sorted(results)))) | {"energy"}
    atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in results.items() if k in kept})
    atoms.info |= draw(st.dictionaries(st.sampled_from(["note", "Fmax", "t-1", "dipole_au", "source"]), VALUES))
    for name, values in {
        "tags2": np.arange(n),
        "mask": np.arange(n) > 1,
        "hirshfeld": random.normal(0, 1, (n, 2)),
    }.items():
        if draw(st.booleans()):
            atoms.set_array(name, values)
    if draw(st.booleans()):
        atoms.set_constraint([FixAtoms([0]), FixCartesian(0, [True, False, True])][: draw(st.integers(1, 2))])
    return atoms


@settings(max_examples=60, deadline=None)
@given(st.lists(labelled(), min_size=1, max_size=3))
def test_what_ase_wrote_is_read_as_ase_reads_it(images):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.xyz"
        ase.io.write(path, images, format="extxyz")
        found, expected = records(path), ase.io.read(path, ":", format="extxyz")
    assert len(found) == len(expected)
    for structure, atoms in zip(found, expected, strict=True):
        labels, results = structure.labels["extxyz"], atoms.calc.results
        assert (structure.numbers == atoms.numbers).all() and (structure.positions == atoms.positions).all()
        assert (structure.pbc if structure.pbc is not None else np.zeros(3, bool)).tolist() == atoms.pbc.tolist()
        if structure.cell is not None:
            assert (structure.cell == atoms.cell[:]).all()
        assert labels.energy == results["energy"]
        assert (labels.forces is None) == ("forces" not in results)
        if labels.forces is not None:
            assert (labels.forces == results["forces"]).all()
        if "stress" in results:
            assert (labels.stress == atoms.get_stress(voigt=False)).all()


def frame(comment: str, *columns: str, cell: bool = True) -> str:
    lattice = 'Lattice="4 0 0 0 5 0 0 0 6" ' if cell else ""
    names = "".join(f":{name}:R:3" for name in columns)
    tail = "".join(f" {k}.5 {k}.25 -{k}" for k in range(1, len(columns) + 1))
    return f"2\n{lattice}Properties=species:S:1:pos:R:3{names} {comment}\nH 0 0 0{tail}\nO 0 0 1{tail}\n"


@pytest.fixture
def one(tmp_path):
    def run(comment: str, *columns: str, cell: bool = True, **options):
        (tmp_path / "in.xyz").write_text(frame(comment, *columns, cell=cell))
        (found,) = records(tmp_path / "in.xyz", **options)
        return found

    return run


MATRIX = np.arange(1.0, 10).reshape(3, 3)
ROWS = "1 2 3 4 5 6 7 8 9"
JSON = "_JSON [[1, 2, 3], [4, 5, 6], [7, 8, 9]]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'REF_stress="{JSON}"', MATRIX), (f'stress="{JSON}"', MATRIX), (f'REF_stress="{ROWS}"', MATRIX),
        (f'stress="{ROWS}"', MATRIX.T), (f"stress={{{ROWS}}}", MATRIX.T), (f"stress='{ROWS}'", MATRIX.T),
        ("stress=[[1,2,3],[4,5,6],[7,8,9]]", MATRIX), ('stress="[[1, 2, 3], [4, 5, 6], [7, 8, 9]]"', MATRIX),
        ('stresses="1,2,3,4,5,6"', [[1, 6, 5], [6, 2, 4], [5, 4, 3]]),
        ('REF_stress="_JSON [1, 2, 3, 4, 5, 6]"', [[1, 6, 5], [6, 2, 4], [5, 4, 3]]),
        (f'virials="{ROWS}"', -MATRIX / 120), (f'virial="{ROWS}"', -MATRIX.T / 120),
        (f'dft_virial="{JSON}"', -MATRIX / 120), ('REF_virials="1.0D+00 2d0 3 4 5 6 7 8 9.0D-00"', -MATRIX / 120),
    ],
)  # fmt: skip
def test_stress_in_every_form(one, text, expected):
    np.testing.assert_allclose(one(f"energy=-1 {text}").labels["extxyz"].stress, expected, rtol=1e-14)


def test_a_virial_is_the_strain_derivative_of_the_energy(tmp_path):
    """Of ASE's EMT: virial = -dE/d(strain), so that stress = -virial/volume = dE/d(strain)/volume."""
    atoms = ase.Atoms("CuAu", [[0, 0, 0], [1.8, 1.7, 1.9]], cell=np.diag([3.5, 3.7, 3.9]), pbc=True)

    def energy(strain: np.ndarray) -> float:
        strained = atoms.copy()
        strained.set_cell(atoms.cell[:] @ (np.eye(3) + strain), scale_atoms=True)
        strained.calc = EMT()
        return strained.get_potential_energy()

    steps = 1e-5 * np.eye(9).reshape(9, 3, 3)
    virial = -np.array([(energy(e) - energy(-e)) / 2e-5 for e in (s + s.T for s in steps)]).reshape(3, 3) / 2
    atoms.info |= {"virial": virial, "energy": energy(np.zeros((3, 3)))}
    ase.io.write(tmp_path / "in.xyz", atoms, format="extxyz")
    (found,) = records(tmp_path / "in.xyz")
    atoms.calc = EMT()
    np.testing.assert_allclose(found.labels["extxyz"].stress, atoms.get_stress(voigt=False), atol=1e-7)
    (reversed_,) = records(tmp_path / "in.xyz", stress_sign="compression")
    np.testing.assert_array_equal(reversed_.labels["extxyz"].stress, -found.labels["extxyz"].stress)


FORCES = np.array([[1.5, 1.25, -1.0]] * 2)


@pytest.mark.parametrize(
    ("comment", "columns", "energy", "forces", "left"),
    [
        ("energy=-1", ["force"], -1, FORCES, []),
        ("Energy=-1", ["Forces"], -1, FORCES, []),
        ("free_energy=-1", ["forces"], -1, FORCES, []),
        ("energy=-1 free_energy=-2", ["forces"], -1, FORCES, ["free_energy"]),
        ("dft_energy=-1", ["dft_forces"], -1, FORCES, []),
        ("energy_dft=-1", ["dft_force"], -1, FORCES, []),
        ("dft_energy=-1 energy=-2", ["dft_forces", "forces"], -1, FORCES, ["energy", "forces"]),
        ("REF_energy=-1", ["forces"], -1, FORCES, []),
        ("energy=-1", ["REF_forces"], -1, FORCES, []),
        ("REF_energy=-1 energy=-2", ["forces"], -1, None, ["energy", "forces"]),
        ("REF_dipole=3 energy=-1", ["forces", "REF_dipoles"], -1, FORCES, []),
        ("energy=-1 xtb_energy=-2", ["forces", "xtb_forces"], -1, FORCES, ["xtb_energy", "xtb_forces"]),
        ("mace_energy=-2", ["mace_forces"], None, None, ["mace_energy", "mace_forces"]),
        ("energy=-1 energy_weight=2 kinetic_energy=3 energy_above_hull=0.1", ["forces"], -1, FORCES, []),
        ("energy_per_atom=-1", ["gradient"], None, None, ["energy_per_atom", "gradient"]),
        ('energy=-1 stress="1 0 0 0 1 0 0 0 1"', ["forces", "stresses", "energies"], -1, FORCES, []),
        ("note=1", ["forces", "stresses", "energies"], None, FORCES, ["stresses", "energies"]),
        ('energy=-1 forces="_JSON [[1.5, 1.25, -1], [1.5, 1.25, -1]]"', [], -1, FORCES, []),
    ],
)  # fmt: skip
def test_labels_are_found_under_other_names_or_named_with_the_option_that_takes_them(
    one, comment, columns, energy, forces, left
):
    found = one(comment, *columns)
    labels = found.labels["extxyz"]
    assert labels.energy == energy if energy is not None else np.isnan(labels.energy)
    assert labels.forces is None if forces is None else (labels.forces == forces).all()
    named = [text.split()[0] for topic, text in found.told if topic == "not taken"]
    assert sorted(named) == sorted(left)
    for _, text in (told for told in found.told if told[0] == "not taken" and "--option" in told[1]):
        options = dict(part.split("=") for part in text[text.index("(") + 1 : -1].split(";")[0].split()[1::2])
        taken = one(comment, *columns, **options).told
        assert ("labels read from", f"{next(iter(options)).removesuffix('_key')}: {text.split()[0]}") in taken


def test_options_for_energies_per_atom_and_for_alternatives(one):
    assert one("note= energy=-1").labels["extxyz"].energy == -1
    assert one("e=-1.5", "forces", energy_key="e", energy_per_atom=True).labels["extxyz"].energy == -3
    assert one("E=-1.5", "forces", energy_key="REF_energy, E").labels["extxyz"].energy == -1.5
    label = one('energy=-1 stress="1 0 0 0 1 0 0 0 1"', stress_unit="kbar", stress_sign="compression").labels["extxyz"]
    np.testing.assert_allclose(label.stress, -0.1 * GPA * np.eye(3), rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('stress="1 2 3"', "stress has a wrong shape"), ('stress="a b c"', "stress: not numbers"),
        ('stress="_JSON [[1, 2], [3]]"', "stress: not numbers"), ("energy=1.0.0", "energy: not numbers"),
        ('energy="1 2"', "energy is not one number"), ("energy=****", "energy: not numbers"),
    ],
)  # fmt: skip
def test_a_bad_value_costs_its_label_and_is_counted(tmp_path, text, reason):
    good = 'energy=-9 stress="1 0 0 0 1 0 0 0 1"'
    name = text.split("=")[0]
    bad = " ".join([part for part in ("energy=-8", 'stress="1 0 0 0 1 0 0 0 1"') if not part.startswith(name)] + [text])
    frames = [
        frame(comment, "forces").replace("O 0 0 1 ", f"O 0 0 1.{k} ") for k, comment in enumerate([good, bad] * 10)
    ]
    (tmp_path / "in.xyz").write_text("".join(frames))
    store = prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "out", trust_units=True, progress=False)
    labels = store.manifest["tasks"]["extxyz"]["labels"]
    assert labels == {"energy": 20, "forces": 20, "stress": 20} | {name: 10}
    assert store.manifest["dropped_labels"] == {reason: 10} and store.manifest["skipped"] == {}


def test_words_for_nothing_are_missing_labels_and_one_bad_force_costs_that_of_its_atom(one, tmp_path):
    found = one('energy=None free_energy=nan stress="" REF_energy', "forces")
    assert np.isnan(found.labels["extxyz"].energy) and found.labels["extxyz"].stress is None
    assert found.told == (("labels read from", "forces: forces"),)
    (tmp_path / "in.xyz").write_text(frame("energy=-1", "forces").replace("1.25", "****", 1))
    (odd,) = records(tmp_path / "in.xyz")
    assert np.isnan(odd.labels["extxyz"].forces[0]).any() and (odd.labels["extxyz"].forces[1] == FORCES[1]).all()
    assert ("dropped", "forces are not numbers") in odd.told
    (tmp_path / "in.xyz").write_text(frame("energy=x"))
    assert records(tmp_path / "in.xyz") == [Skip("energy: not numbers", "0")]


def test_one_family_is_read_throughout_a_file_and_what_that_costs_is_said(tmp_path):
    mixed = [frame("energy=-3", "forces"), frame("REF_energy=-4", "REF_forces"), frame("REF_energy=-5 energy=-6")]
    (tmp_path / "in.xyz").write_text("".join(mixed))
    plain, both, last = records(tmp_path / "in.xyz")
    assert np.isnan(plain.labels["extxyz"].energy) and plain.labels["extxyz"].forces is None
    assert both.labels["extxyz"].energy == -4 and last.labels["extxyz"].energy == -5
    assert [text.split()[0] for topic, text in plain.told if topic == "not taken"] == ["energy", "forces"]
    assert "energy_key=REF_energy,energy" in plain.told[0][1]
    energies = [s.labels["extxyz"].energy for s in records(tmp_path / "in.xyz", energy_key="REF_energy,energy")]
    assert energies == [-3, -4, -5]
    late = frame("energy=-1 stress=None") * 1200 + frame('energy=-1 stress="1 0 0 0 1 0 0 0 1" REF_energy=-2', "forces")
    (tmp_path / "in.xyz").write_text(late)  # kinds that begin late are taken, another family is not
    end = records(tmp_path / "in.xyz")[-1]
    assert end.labels["extxyz"].energy == -1 and end.labels["extxyz"].stress is not None
    assert (end.labels["extxyz"].forces == FORCES).all()
    assert [text.split()[0] for topic, text in end.told if topic == "not taken"] == ["REF_energy"]


def test_declared_units_are_converted_frame_by_frame(one, tmp_path):
    hartree, bohr = 27.211386245988, 0.529177210903
    label = one("energy=-0.5 energy-unit=hartree force-unit=hartree/bohr", "force").labels["extxyz"]
    assert label.energy == pytest.approx(-0.5 * hartree, rel=1e-14)
    np.testing.assert_allclose(label.forces, FORCES * hartree / bohr, rtol=1e-14)
    label = one('energy=-1 stress="1 0 0 0 2 0 0 0 3" stress_units=GPa').labels["extxyz"]
    np.testing.assert_allclose(label.stress, np.diag([1, 2, 3]) * GPA, rtol=1e-14)
    found = one('energy=-1 virial="1 0 0 0 1 0 0 0 1" virial-unit=hartree units="eV, bohr"', "forces")
    np.testing.assert_allclose(np.diag(found.cell), np.array([4, 5, 6]) * bohr, rtol=1e-14)
    np.testing.assert_allclose(found.labels["extxyz"].stress, -np.eye(3) * hartree / (120 * bohr**3), rtol=1e-12)
    np.testing.assert_allclose(found.labels["extxyz"].forces, FORCES / bohr, rtol=1e-14)
    (tmp_path / "in.xyz").write_text(frame("energy=-1 energy-unit=kcal/mol") + frame("energy=-1"))
    first, second = records(tmp_path / "in.xyz")
    assert first.labels["extxyz"].energy == pytest.approx(-0.0433641, rel=1e-6)
    assert second.labels["extxyz"].energy == -1
    assert one("energy=-1 energy-unit=hartree", energy_unit="eV").labels["extxyz"].energy == -1  # who says so, knows


@pytest.mark.parametrize(
    "declared", ["energy-unit=foo", "energy_unit=GPa", "units=kelvin", "stress-unit=psi", "virial-unit=J/cal"]
)
def test_an_unknown_unit_is_refused_with_those_that_are_known(one, declared):
    with pytest.raises(ValueError, match=r"in\.xyz, frame 0: .*(eV, meV, hartree|GPa, MPa).*--option"):
        one(f"energy=-1 {declared}")
    for option in ("energy_unit", "stress_unit", "force_unit"):
        with pytest.raises(ValueError, match="is not a unit of"):
            Options(**{option: "furlong"})


def test_prepare_keeps_in_the_manifest_what_was_read_and_what_was_not(tmp_path, capsys):
    frames = [frame(f"energy={-k}.5 energy-unit=eV", "forces", "dft2_forces") for k in range(9)]
    (tmp_path / "in.xyz").write_text("".join(f.replace("O 0 0 1 ", f"O 0 0 1.{k} ") for k, f in enumerate(frames)))
    store = prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "out", trust_units=True, limit=8)
    assert store.manifest["notes"] == {
        "labels read from": {"energy: energy": 8, "forces: forces": 8},
        "not taken": {"dft2_forces looks like forces (--option forces_key=dft2_forces)": 8},
        "units": {"energy in eV": 8},
    }
    assert "--option forces_key=dft2_forces" in capsys.readouterr().out


def test_where_nothing_can_be_used_the_error_lists_what_is_there_and_the_options(tmp_path):
    (tmp_path / "in.xyz").write_text(frame("E_x=-3.5 xtb_energy=-4", "grads", "xtb_forces") * 3)
    with pytest.raises(ValueError, match=r"3: no label") as caught:
        prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "out", progress=False)
    lines = str(caught.value).splitlines()
    assert "  column grads = 1.5 1.25 -1" in lines and "  E_x = -3.5" in lines
    assert "  column xtb_forces = 2.5 2.25 -2   (--option forces_key=xtb_forces)" in lines
    assert "  xtb_energy = -4   (--option energy_key=xtb_energy)" in lines
    assert "energy_key" in lines[-1] and "stress_unit" in lines[-1] and "multifid formats extxyz" in lines[-1]
