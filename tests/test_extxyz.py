"""Extended XYZ: what ase reads, in our units, with the place of every error."""

import bz2
import gzip
import lzma
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from multifid.preparation.prepare import prepare
from multifid.readers.contract import IsolatedAtom, Skip
from multifid.readers.extxyz import Options, read
from multifid.readers.packed import zstd

DATA = Path(__file__).parents[2] / "shared" / "data" / "organic_dft"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the published sample data are not beside the repository")
WATER = "O 0 0 0.119 {}\nH 0 0.763 -0.477 {}\nH 0 -0.763 -0.477 {}\n"


def records(path: Path, **options) -> list:
    return list(read(path, Options(**options), lambda fraction: None))


def frame(comment: str, tail: str = "", natoms: int = 3) -> str:
    return f"{natoms}\n{comment}\n" + WATER.format(tail, tail, tail)


@pytest.fixture
def written(tmp_path):
    def write(text: str, **options) -> list:
        (tmp_path / "in.xyz").write_text(text)
        return records(tmp_path / "in.xyz", **options)

    return write


@real
@pytest.mark.parametrize("name", ["acac/train_300K.xyz", "acac/test_H_transfer.xyz", "acac/test_dihedral.xyz"])
def test_real_files_read_as_ase_reads_them(name):
    expected = ase.io.read(DATA / name, ":")
    found = records(DATA / name)
    assert len(found) == len(expected)
    for i, (structure, atoms) in enumerate(zip(found, expected, strict=True)):
        assert (structure.numbers == atoms.numbers).all() and (structure.positions == atoms.positions).all()
        assert structure.labels["extxyz"].energy == atoms.get_potential_energy()
        if "forces" in atoms.calc.results:
            assert (structure.labels["extxyz"].forces == atoms.get_forces()).all()
        else:
            assert structure.labels["extxyz"].forces is None
        assert structure.pbc is None and structure.source_id == str(i) and structure.relative == "C5H8O2"


@real
def test_isolated_atoms_are_no_structures():
    found = records(DATA / "acac" / "isolated_atoms.xyz")
    assert found == [
        IsolatedAtom("extxyz", 1, -13.568422178253735),
        IsolatedAtom("extxyz", 6, -1026.8538996116154),
        IsolatedAtom("extxyz", 8, -2037.796869412825),
    ]


@real
def test_a_file_in_kcal_per_mol_is_read_in_ev():
    first = records(DATA / "ethanol_reduced_100.xyz", energy_unit="kcal/mol")[0].labels["extxyz"]
    assert first.energy == pytest.approx(-97079.92222178938 * 0.0433641153, rel=1e-6)
    assert first.energy / 27.211386245988 == pytest.approx(-154.707, abs=1e-3)  # hartree, ethanol by PBE
    assert first.forces[0, 0] == pytest.approx(-32.31755688687498 * 0.0433641153, rel=1e-6)


def test_a_crystal_reads_as_ase_wrote_it(tmp_path):
    random = np.random.default_rng(0)
    expected = []
    for pbc in ([True, True, True], [True, True, False], [False, False, False]):
        atoms = ase.Atoms("NaCl", random.uniform(0, 4, (2, 3)), cell=random.normal(0, 5, (3, 3)), pbc=pbc)
        stress = random.normal(0, 1, 6)
        atoms.calc = SinglePointCalculator(atoms, energy=-3.5, forces=random.normal(0, 1, (2, 3)), stress=stress)
        atoms.info["note"] = "a = b, {braces} [brackets] and 'quotes'"
        expected.append(atoms)
    ase.io.write(tmp_path / "c.xyz", expected)
    for structure, atoms in zip(records(tmp_path / "c.xyz"), expected, strict=True):
        np.testing.assert_allclose(structure.positions, atoms.positions, atol=1e-7)
        if atoms.pbc.any():
            np.testing.assert_allclose(structure.cell, atoms.cell[:], atol=1e-7)
            assert (structure.pbc == atoms.pbc).all()
        else:
            assert structure.pbc is None
        label = structure.labels["extxyz"]
        np.testing.assert_allclose(label.forces, atoms.get_forces(), atol=1e-7)
        np.testing.assert_allclose(label.stress, atoms.get_stress(voigt=False), atol=1e-7)


def test_a_virial_is_minus_the_stress_times_the_volume(written):
    lattice = 'Lattice="2 0 0 0 3 0 1 0 4" pbc="T T T"'
    virial = " ".join(map(str, range(1, 10)))
    (one,) = written(frame(f'{lattice} energy=-1 virial="{virial}"'))
    np.testing.assert_allclose(one.labels["extxyz"].stress, -np.arange(1.0, 10).reshape(3, 3).T / 24)  # Fortran's order
    (other,) = written(frame(f'{lattice} energy=-1 REF_virial="{virial}" virial="9 9 9 9 9 9 9 9 9"'))
    np.testing.assert_allclose(other.labels["extxyz"].stress, -np.arange(1.0, 10).reshape(3, 3) / 24)
    (open_,) = written(frame(f'energy=-1 virial="{virial}"'))
    assert open_.labels["extxyz"].energy == -1.0  # `prepare` sets the virial aside, and counts it


def test_reference_labels_are_not_mixed_with_predictions(written):
    properties = "Properties=species:S:1:pos:R:3:forces:R:3:REF_forces:R:3"
    (both,) = written(frame(f"{properties} energy=-1 REF_energy=-2", "1 1 1 2 2 2"))
    assert both.labels["extxyz"].energy == -2 and (both.labels["extxyz"].forces == 2).all()
    (half,) = written(frame("Properties=species:S:1:pos:R:3:forces:R:3 energy=-1 REF_energy=-2", "1 1 1"))
    assert half.labels["extxyz"].energy == -2 and half.labels["extxyz"].forces is None
    (chosen,) = written(frame(f"{properties} energy=-1 REF_energy=-2", "1 1 1 2 2 2"), forces_key="forces")
    assert (chosen.labels["extxyz"].forces == 1).all()


def test_units_and_a_gradient_are_converted(written):
    text = frame(
        'Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3:grad:R:3 E=-2 stress="1 2 3 4 5 6"', "1 -2 3"
    )
    (one,) = written(
        text, energy_key="E", forces_key="grad", energy_unit="hartree", length_unit="bohr", forces_are_gradient=True
    )
    hartree, bohr = 27.211386245988, 0.529177210903
    label = one.labels["extxyz"]
    assert label.energy == pytest.approx(-2 * hartree, rel=1e-12)
    np.testing.assert_allclose(label.forces[0], [-hartree / bohr, 2 * hartree / bohr, -3 * hartree / bohr], rtol=1e-9)
    np.testing.assert_allclose(np.diag(one.cell), 5 * bohr, rtol=1e-9)
    np.testing.assert_allclose(one.positions[0, 2], 0.119 * bohr, rtol=1e-9)
    assert label.stress[1, 2] == pytest.approx(4 * hartree / bohr**3, rel=1e-9)  # Voigt xx yy zz yz xz xy
    assert label.stress[0, 1] == pytest.approx(6 * hartree / bohr**3, rel=1e-9)
    mixed = {"energy_key": "E", "forces_key": "grad", "energy_unit": "hartree", "force_length_unit": "bohr"}
    assert written(text, **mixed)[0].labels["extxyz"].forces[0, 0] == pytest.approx(hartree / bohr, rel=1e-9)


def test_charge_and_multiplicity_are_read_under_both_names(written):
    found = written(
        frame("energy=-1 charge=-2 spin=3") + frame("energy=-1 total_charge=1.0 total_spin=2") + frame("energy=1")
    )
    assert [(s.charge, s.spin) for s in found] == [(-2, 3), (1, 2), (None, None)]
    assert written(frame("energy=-1 charge=0.5")) == [Skip("charge is not a whole number", "0")]


def test_ases_columns_of_charges_and_moments_state_those_of_a_molecule(written):
    columns = "Properties=species:S:1:pos:R:3:initial_charges:R:1:initial_magmoms:R:1"
    molecule, crystal = (
        f"2\n{columns} energy=-1{cell}\nO 0 0 0 -1.4 1.9\nH 0 0 0.96 0.4 0.1\n"
        for cell in ("", ' Lattice="9 0 0 0 9 0 0 0 9"')
    )
    found = written(molecule.replace("1.9", "-2.1") + molecule + crystal)
    assert [(s.charge, s.spin) for s in found] == [(-1, 3), (-1, 3), (None, None)]


def test_atomic_numbers_stand_for_symbols(written):
    (one,) = written("2\nProperties=Z:I:1:pos:R:3 energy=-1\n8 0 0 0\n1 0 0 1\n")
    assert one.numbers.tolist() == [8, 1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (frame("energy=-1").replace("H", "Hx", 1), "unknown element 'Hx'"),
        (frame("energy=-1", "extra"), "lines of atoms do not have the columns that Properties say"),
        (frame("energy=-1").replace("0.763", "x.xxx", 1), "positions are not numbers"),
        (frame("Properties=species:S:1:pos:R energy=-1"), "Properties are not name:type:width"),
        (frame("energy=x"), "energy: not numbers"),
        (frame('energy=-1 pbc="T T"'), "pbc is not three flags"),
        ("1\nconfig_type=IsolatedAtom\nH 0 0 0\n", "isolated atom without an energy"),
    ],
)
def test_a_bad_frame_costs_only_itself(written, text, reason):
    found = written(frame("energy=-1") + text + frame("energy=-3"))
    assert found[1] == Skip(reason, "1")
    assert [found[0].labels["extxyz"].energy, found[2].labels["extxyz"].energy] == [-1, -3]


def test_packed_files_of_a_directory_make_one_store_for_any_number_of_workers(tmp_path):
    names = {"a.xyz": bytes, "b.xyz.gz": gzip.compress, "c.extxyz.bz2": bz2.compress, "d.XYZ.xz": lzma.compress}
    folders = {folder: tmp_path / folder for folder in ("plain", "packed")}
    for k, (name, pack) in enumerate({**names, "e.xyz.zst": zstd.compress}.items()):
        text = "".join(frame(f"energy={-2000 - k - i / 7:.6f}").replace("0.763", f"0.7{i}") for i in range(8)).encode()
        for folder, content in (("plain", text), ("packed", pack(text))):
            folders[folder].mkdir(exist_ok=True)
            (folders[folder] / name).write_bytes(content)
    quiet = {"progress": False, "trust_units": True}
    one = prepare("extxyz", [folders["packed"]], tmp_path / "one", **quiet)
    three = prepare("extxyz", [folders["packed"]], tmp_path / "three", workers=3, **quiet)
    plain = prepare("extxyz", [folders["plain"] / "*"], tmp_path / "same", **quiet)
    files = [{p.name: p.read_bytes() for p in store.path.rglob("*.npy")} for store in (one, three, plain)]
    assert files[0] == files[1] == files[2] and one.structures == 40
    assert (one.path / "manifest.json").read_bytes() == (three.path / "manifest.json").read_bytes()
    (folders["packed"] / "a.xyz.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"a\.xyz\.gz is a\.xyz packed"):
        prepare("extxyz", [folders["packed"]], tmp_path / "no", **quiet)


def test_a_bad_file_is_an_error_that_names_file_and_line(written):
    for text, message in [
        ("", "holds no frame"),
        (frame("energy=-1") + "three\n", r"in\.xyz, line 6: a frame must begin with its number of atoms, not 'three'"),
        (
            frame("energy=-1") + "3\nenergy=-1\nO 0 0 0\n",
            r"in\.xyz, line 6: the file ends within this frame of 3 atoms",
        ),
        (frame("energy=-1", natoms=10**12), r"line 1: the file ends within"),
        (frame("energy=-1", natoms=-3), r"line 1"),
        (frame("energy=-1", natoms=2), r"line 5: a frame must begin"),
    ]:
        with pytest.raises(ValueError, match=message):
            written(text)
