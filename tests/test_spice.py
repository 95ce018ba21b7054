"""SPICE: atomic units, a gradient, charges from SMILES; planted values against independent conversions."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import units
from ase.calculators.lj import LennardJones
from ase.cluster import Octahedron

from multifid.preparation.prepare import prepare
from multifid.readers import spice
from multifid.readers.contract import Skip
from multifid.readers.smiles import read_smiles
from multifid.store.block import relative_hash
from multifid.structures.structure import Structure
from records import expanded

WATER = "[O:1]([H:2])[H:3]"
PLACES = np.array([[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])


def write(path: Path, **molecules) -> Path:
    """molecule -> its datasets; the units are those of the published file."""
    with h5py.File(path, "w") as file:
        for name, values in molecules.items():
            group = file.create_group(name)
            for key, value in values.items():
                if key in ("smiles", "subset"):
                    group.create_dataset(key, data=[value], dtype=h5py.string_dtype())
                else:
                    group[key] = value
                    if key in spice.UNITS:
                        group[key].attrs["units"] = spice.UNITS[key]
    return path


def water(smiles: str = WATER, frames: int = 4, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    return {
        "subset": "SPICE", "smiles": smiles, "atomic_numbers": np.array([8, 1, 1], np.int16),
        "conformations": ((PLACES + random.normal(0, 0.03, (frames, 3, 3))) / units.Bohr).astype(np.float32),
        "dft_total_energy": -76.4 + random.normal(0, 0.01, frames), "formation_energy": np.zeros(frames),
        "dft_total_gradient": random.normal(0, 0.01, (frames, 3, 3)).astype(np.float32),
    }  # fmt: skip


def records(path: Path) -> list:
    return list(expanded(spice.read(path, spice.Options(), lambda fraction: None)))


def test_values_are_converted_from_atomic_units_and_the_gradient_becomes_a_force(tmp_path):
    raw = water()
    found = records(write(tmp_path / "s.hdf5", w=raw))
    assert [s.source_id for s in found] == [f"w/{i}" for i in range(4)]
    for i, s in enumerate(found):
        labels = s.labels["spice"]
        assert labels.energy == pytest.approx(raw["dft_total_energy"][i] * units.Hartree, rel=1e-8)
        assert np.allclose(s.positions, raw["conformations"][i] * units.Bohr, rtol=1e-6)
        assert np.allclose(labels.forces, -raw["dft_total_gradient"][i] * units.Hartree / units.Bohr, rtol=1e-6)


def test_forces_are_minus_the_finite_difference_of_the_energy_along_the_positions(tmp_path):
    atoms = Octahedron("Ar", 2, 0, latticeconstant=5.3)
    atoms.calc = LennardJones(epsilon=0.2, sigma=3.3, rc=20.0)
    place, step = atoms.get_positions(), 1e-3
    frames, energies, gradients = [], [], []
    for k in range(-1, 2):
        moved = place.copy()
        moved[0] += k * step
        atoms.set_positions(moved)
        frames.append(moved / units.Bohr)
        energies.append(atoms.get_potential_energy() / units.Hartree)
        gradients.append(-atoms.get_forces() / units.Hartree * units.Bohr)
    raw = {"atomic_numbers": atoms.numbers, "conformations": np.array(frames)}
    raw |= {"dft_total_energy": np.array(energies), "dft_total_gradient": np.array(gradients)}
    before, middle, after = records(
        write(tmp_path / "s.hdf5", argon=raw | {"smiles": np.array([b".".join([b"[Ar]"] * len(atoms))])})
    )
    moved = (after.positions - before.positions)[0]
    change = after.labels["spice"].energy - before.labels["spice"].energy
    assert change == pytest.approx(-(middle.labels["spice"].forces[0] @ moved), rel=1e-4)


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [
        (WATER, 0),
        ("[O-:1][H:2]", -1),
        ("[Ca+2:1]", 2),
        ("[Mg++]", 2),
        ("[H:9][N+:1]([H:2])([H:3])[C@@:4]([H:5])([H:6])[C:7](=[O:8])[O-:10]", 0),
        ("[Na+:1].[Cl-:2].[Cl-:3]", -1),
        ("[15NH3+:1]/C=C\\[O--]", -1),
        ("[H:10][c:1]1[nH+]c[se]c1 a name-", 1),
        ("Cl[Zn-2](Cl)(Cl)Cl", -2),
        ("[H+]", 1),
        ("[CH3:1][C@@H:2](N)C%12.C%12", 0),
    ],
)
def test_charge_is_the_sum_of_formal_charges(smiles, charge):
    assert read_smiles(smiles).charge == charge


@pytest.mark.parametrize("smiles", ["", "  ", "*", "[Xx+]", "[O-", "water", "O=C>>CO", "[O+-]", "?"])
def test_what_is_no_smiles_has_no_charge(smiles):
    assert read_smiles(smiles) is None


@pytest.mark.parametrize(
    ("smiles", "numbers", "fits"),
    [
        (WATER, [8, 1, 1], True),
        ("O", [1, 8, 1], True),
        ("[OH2]", [8, 1, 1], True),
        ("[OH-:1]", [8, 1, 1], False),  # all of its atoms are written
        ("CO", [6, 8, 1, 1, 1, 1], True),
        ("CO", [6, 6, 8, 1, 1, 1], False),
        ("C[OH]", [6, 8], False),
    ],
)
def test_a_smiles_must_have_the_atoms_of_its_molecule(smiles, numbers, fits):
    assert read_smiles(smiles).fits(numbers) == fits


def test_a_charge_that_nothing_says_is_never_zero_in_silence(tmp_path):
    stated, atomic, unknown, odd, other = water(), water(), water(), water("[O-:1]]("), water("[O-:1][H:2]")
    stated["charge"] = 2
    del stated["smiles"], atomic["smiles"], unknown["smiles"]
    atomic["mbis_charges"] = np.full((4, 3, 1), -1 / 3) + np.random.default_rng(0).normal(0, 1e-3, (4, 3, 1))
    path = write(tmp_path / "s.hdf5", stated=stated, atomic=atomic, unknown=unknown, odd=odd, other=other)
    found = records(path)
    assert [r.charge for r in found if isinstance(r, Structure)] == [-1] * 4 + [2] * 4
    assert {r.where: r.reason.partition(" (")[0] for r in found if isinstance(r, Skip)} == {
        "unknown": "no charge is known: neither SMILES nor atomic charges",
        "odd": "no charge is known: its SMILES cannot be read",
        "other": "no charge is known: its SMILES has other atoms than the molecule",
    }
    told = list(expanded(spice.read(path, spice.Options(charge=0), lambda fraction: None)))
    assert [r.charge for r in told] == [-1] * 4 + [0] * 8 + [2] * 4 + [0] * 4


def test_charge_and_multiplicity_are_stored(tmp_path):
    found = records(write(tmp_path / "s.hdf5", w=water(), c=water("[O+:1]([H:2])[H:3]")))
    block = next(spice.read(tmp_path / "s.hdf5", spice.Options(), lambda fraction: None))
    assert block.columns["charge"].tolist() == [1] * 4 and block.columns["spin"].tolist() == [2] * 4
    assert len(found) == 8


def test_one_molecule_under_two_names_and_its_mirror_image_are_relatives(tmp_path):
    two = ("[H:1][C@:2]([F:3])[O:4]", "[H:5][C@@:1]([F:2])[O:3]", "[H:5][C:1]([O:2])[F:3]")
    same = {"atomic_numbers": np.array([1, 6, 9, 8])}
    same |= {key: np.zeros((4, 4, 3)) for key in ("conformations", "dft_total_gradient")}
    path = write(tmp_path / "s.hdf5", **{f"m{i}": water(smiles) | same for i, smiles in enumerate(two)})
    left, right, other = (s.relative for s in records(path)[::4])
    assert left == right != other
    del (nameless := water() | {"charge": 0})["smiles"]
    assert records(write(tmp_path / "n.hdf5", w=nameless))[0].relative == str(relative_hash("H2O1"))


def test_bad_molecules_cost_only_themselves(tmp_path):
    short, strange, no_energy, empty = water(), water(), water(), water()
    short["dft_total_gradient"] = short["dft_total_gradient"][:3]
    strange["atomic_numbers"] = np.array([8, 1, 119])
    del no_energy["dft_total_energy"]
    empty["atomic_numbers"] = np.zeros(0, int)
    bad = {"short": short, "strange": strange, "no_energy": no_energy, "empty": empty}
    found = records(write(tmp_path / "s.hdf5", good=water(), **bad))
    assert sum(isinstance(s, Structure) for s in found) == 4
    assert {s.reason for s in found if isinstance(s, Skip)} == {
        "dft_total_gradient of another shape than the atoms", "record without dft_total_energy", "no atoms",
        "unknown element: atomic number 119 is not within 1..118",
    }  # fmt: skip


def test_missing_gradients_and_nan_are_missing_labels(tmp_path):
    raw = water()
    del raw["dft_total_gradient"]
    raw["dft_total_energy"][1] = np.nan
    found = records(write(tmp_path / "s.hdf5", w=raw))
    assert found[0].labels["spice"].forces is None and isinstance(found[1], Skip)


def test_another_unit_or_layout_is_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "s.hdf5", w=water())
    with h5py.File(path, "a") as file:
        file["w/conformations"].attrs["units"] = "angstrom"
    with pytest.raises(ValueError, match=r"s\.hdf5: w/conformations is in 'angstrom', where SPICE has bohr"):
        records(path)
    with pytest.raises(ValueError, match=r"o\.hdf5 is not a SPICE file"):
        records(write(tmp_path / "o.hdf5", w={"coordinates": np.zeros((1, 1, 3))}))


def test_parts_are_the_file_and_workers_make_the_same_store(tmp_path, monkeypatch):
    monkeypatch.setattr(spice, "PART", 5)
    # water and ions of it under many names: relatives are the names of molecules, so that three splits can be filled
    smiles = [WATER.replace("[H:3]", "[H:3]" + "." * k) for k in range(1, 12)]
    path = write(tmp_path / "s.hdf5", **{f"m{i:02}": water(s, 3, i) for i, s in enumerate(smiles)})
    options = spice.Options()
    cuts = spice.parts(path, options)
    parted = [s for part in cuts for s in expanded(spice.read(path, options, lambda fraction: None, part))]
    assert len(cuts) > 3 and [s.source_id for s in parted] == [s.source_id for s in records(path)]
    one = prepare("spice", [path], tmp_path / "one", trust_units=True, progress=False)
    two = prepare("spice", [path], tmp_path / "two", trust_units=True, progress=False, workers=2)
    assert one.checksum == two.checksum and one.structures == 33
    assert one.manifest["splits"]["rule"] == "by molecule"
