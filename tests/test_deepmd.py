"""DeePMD-kit's npy layout as dpdata writes it: values, the sign of the virial, the mixed layout, what does not fit."""

from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from multifid.preparation.prepare import prepare
from multifid.readers import deepmd
from multifid.readers.contract import Skip
from multifid.readers.recognise import recognise
from multifid.workflows.asked import parse

WATER = np.array([[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])


def write(folder: Path, types, names=("H", "O"), periodic=True, sets=1, **arrays) -> Path:
    """The layout of dpdata: frames of a system in sets."""
    folder.mkdir(parents=True)
    np.savetxt(folder / "type.raw", types, fmt="%d")
    if names:
        np.savetxt(folder / "type_map.raw", names, fmt="%s")
    if not periodic:
        (folder / "nopbc").touch()
    for i, rows in enumerate(np.array_split(np.arange(len(arrays["coord"])), sets)):
        (folder / f"set.{i:03}").mkdir()
        for name, values in arrays.items():
            np.save(folder / f"set.{i:03}" / f"{name}.npy", np.asarray(values)[rows])
    return folder


def water(folder: Path, frames=6, dtype=np.float64, seed=0, **more) -> Path:
    random = np.random.default_rng(seed)
    arrays = {
        "coord": (WATER + random.normal(0, 0.03, (frames, 3, 3))).reshape(frames, 9).astype(dtype),
        "energy": (-470.0 + random.normal(0, 0.1, frames)).astype(dtype),
        "force": random.normal(0, 0.5, (frames, 9)).astype(dtype),
    }
    return write(folder, [1, 0, 0], **{"periodic": False, **arrays, **more})


def blocks(path, part=None, **options) -> list:
    return list(deepmd.read(path, deepmd.Options(**options), lambda fraction: None, part))


def strained() -> list:
    """A sheared copper crystal and two more, strained along xx by a little."""
    crystals = []
    for strain in (-1e-4, 0.0, 1e-4):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=1)
        atoms.set_cell(atoms.cell.array @ [[0.95, 0, 0], [0.03, 1, 0], [0, 0, 0.97]], scale_atoms=True)
        atoms.set_cell(atoms.cell.array @ np.diag([1 + strain, 1, 1]), scale_atoms=True)
        atoms.calc = EMT()
        crystals.append(atoms)
    return crystals


def test_stress_is_that_of_ase_and_the_slope_of_the_energy_with_strain(tmp_path):
    made = strained()
    path = write(
        tmp_path / "cu",
        [0] * 4,
        ["Cu"],
        coord=np.array([a.positions.reshape(-1) for a in made]),
        box=np.array([a.cell.array.reshape(-1) for a in made]),
        energy=np.array([[a.get_potential_energy()] for a in made]),
        force=np.array([a.get_forces().reshape(-1) for a in made]),
        virial=np.array([-a.get_volume() * a.get_stress(voigt=False).reshape(-1) for a in made]),  # as dpdata makes it
    )
    (block,) = blocks(path)
    energy, stress = block.columns["labels/deepmd/energy"], block.columns["labels/deepmd/stress"]
    slope = (energy[2] - energy[0]) / 2e-4 / made[1].get_volume()
    assert stress[1, 0, 0] == pytest.approx(slope, rel=1e-4) and abs(slope) > 0.01
    assert np.allclose(stress, [a.get_stress(voigt=False) for a in made], atol=1e-12)
    assert np.allclose(block.columns["labels/deepmd/forces"], np.concatenate([a.get_forces() for a in made]))
    assert np.allclose(block.columns["cell"], [a.cell.array for a in made]) and block.columns["pbc"].all()
    assert block.columns["numbers"].tolist() == [29] * 12 and block.told == ()
    (reverse,) = blocks(path, stress_sign="compression", energy_unit="hartree")
    assert np.allclose(reverse.columns["labels/deepmd/stress"], -27.211386245988 * stress)


def test_a_store_of_systems_below_a_directory_is_the_same_for_any_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(deepmd, "PART", 6)
    for i in range(3):
        water(tmp_path / "all" / f"sys{i}", 7, np.float32, i, sets=2)
    stores = [
        prepare("deepmd", [tmp_path / "all"], tmp_path / f"out{n}", trust_units=True, progress=False, workers=n)
        for n in (1, 2)
    ]
    assert stores[0].checksum == stores[1].checksum and stores[0].structures == 21
    assert stores[0].source_id(8) == "set.000/1" and stores[0].source_file(8) == "sys1"
    assert "float32" in str(stores[0].manifest["notes"]["precision"])
    assert stores[0].manifest["assumed"] == {"no charge stated: taken as neutral": 21}
    assert recognise(tmp_path / "all" / "sys0") == recognise(tmp_path / "all") == "deepmd"
    assert parse(str(tmp_path / "all" / "sys0")).format == "deepmd"


def test_in_the_mixed_layout_frames_have_their_own_elements_and_what_fills_up_is_no_atom(tmp_path):
    types = np.array([[2, 0, 0, 0, 0], [3, 0, 0, -1, -1], [-1, -1, -1, -1, -1], [7, 0, 0, 0, 0]])
    methane, drop = molecule("CH4").positions, molecule("H2O").positions
    coord = np.zeros((4, 5, 3))
    coord[0], coord[1, :3] = methane, drop
    force = np.arange(60.0).reshape(4, 15)
    path = write(
        tmp_path / "mixed", [0] * 5, ["H", "He", "C", "O"], False,
        coord=coord.reshape(4, 15), energy=np.arange(4.0), force=force, real_atom_types=types,
    )  # fmt: skip
    *skips, block = blocks(path)
    assert [(s.reason, s.where) for s in skips if isinstance(s, Skip)] == [
        ("no atoms", "set.000/2"),
        ("a type of an atom is no element", "set.000/3"),
    ]
    assert block.natoms.tolist() == [5, 3] and block.columns["numbers"].tolist() == [6, 1, 1, 1, 1, 8, 1, 1]
    assert np.allclose(block.columns["positions"], np.concatenate([methane, drop])) and "cell" not in block.columns
    assert np.allclose(block.columns["labels/deepmd/forces"][5:], force[1, :9].reshape(3, 3))
    assert block.columns["relative"][0] != block.columns["relative"][1]


def test_types_without_an_element_are_named_by_an_option(tmp_path):
    nameless, others = water(tmp_path / "a", names=None), water(tmp_path / "b", names=["HW", "OW"])
    with pytest.raises(ValueError, match=r"a: without type_map\.raw, --option type_map=H,O"):
        blocks(nameless)
    with pytest.raises(ValueError, match=r"b.type\.raw: type 1 is no element: it is called 'OW' \(--option type_map"):
        blocks(others)
    for path in (nameless, others):
        assert blocks(path, type_map="H,O")[0].columns["numbers"].tolist()[:3] == [8, 1, 1]
    with pytest.raises(ValueError, match=r"'Hx' is no element"):
        deepmd.Options(type_map="Hx")


def test_arrays_that_do_not_fit_together_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"set\.000: box\.npy is missing .*nopbc"):
        blocks(water(tmp_path / "a", periodic=True))
    with pytest.raises(ValueError, match=r"force\.npy has the shape \(6, 6\), where 6 frames of 9 numbers"):
        blocks(water(tmp_path / "b", force=np.zeros((6, 6))))
    with pytest.raises(ValueError, match=r"energy\.npy: truncated, damaged or no npy file"):
        blocks(water(tmp_path / "c", energy=np.array([{}] * 6)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "type.raw").write_text("0\n")
    (tmp_path / "d" / "coord.raw").write_text("0 0 0\n")
    with pytest.raises(ValueError, match=r"d: a system of DeePMD-kit needs a directory set\.000 .*the text files"):
        blocks(tmp_path / "d")


@pytest.mark.full
def test_damage_is_an_error_that_names_the_system_or_a_store(tmp_path):
    path = water(tmp_path / "sys", 24)
    random = np.random.default_rng(3)
    for i, file in enumerate([path / "type.raw", path / "set.000" / "coord.npy", path / "set.000" / "energy.npy"]):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[random.integers(min(len(whole), 128))] ^= 1 << int(random.integers(8))
        for k, damage in enumerate((whole[: len(whole) // 2], b"", bytes(flipped))):
            file.write_bytes(damage)
            out = tmp_path / f"out{i}.{k}"
            try:
                prepare("deepmd", [path], out, trust_units=True, progress=False)
            except (ValueError, OSError) as error:
                assert "sys" in str(error) and not out.exists(), error
        file.write_bytes(whole)
