"""Readers of QM7-X, Transition1x, MPtrj, Alexandria and ASE databases, on files written here in the exact layouts."""

import bz2
import io
import json
import lzma
import re
import tarfile
import tempfile
import tracemalloc
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import ase.units
import h5py
import lmdb
import numpy as np
import pytest
from ase.stress import voigt_6_to_full_3x3_stress

from multifid.preparation.validate import NO_VOLUME, screen
from multifid.readers import alexandria, aselmdb, json_file, json_scan, mptrj, qm7x, transition1x, unpack
from multifid.readers.contract import IsolatedAtom, Skip
from multifid.store.block import pack
from multifid.structures.structure import Structure

READERS = [qm7x, transition1x, mptrj, alexandria, aselmdb]
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
rng = np.random.default_rng(7)


def records(reader: ModuleType, path: Path, **options) -> list:
    """All records of a file; the progress of every reading must rise from 0 to 1."""
    fractions: list[float] = []
    with np.errstate(invalid="ignore"):  # as prepare reads
        found = list(reader.read(path, reader.Options(**options), fractions.append))
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] == 1
    return found


def structures(found: list) -> list[Structure]:
    return [record for record in found if isinstance(record, Structure)]


def skips(found: list) -> dict[str, str]:
    return {record.where: record.reason for record in found if isinstance(record, Skip)}


def only(found: list) -> Structure:
    (structure,) = found
    return structure


# ---------------------------------------------------------------------------------------------------------- QM7-X

QM7X = {
    "atNUM": np.array([8, 1, 1]),
    "atXYZ": np.array([[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]]),
    "ePBE0+MBD": np.array([-2079.5]),
    "ePBE0": np.array([-2079.1]),
    "totFOR": np.array([[0.0, 0.0, 0.3], [0.0, 0.1, -0.15], [0.0, -0.1, -0.15]]),
    "pbe0FOR": np.array([[0.0, 0.0, 0.7], [0.0, 0.2, -0.35], [0.0, -0.2, -0.35]]),
}


def write_qm7x(path: Path, names: dict[str, list[str]], **changed) -> Path:
    with h5py.File(path, "w") as file:
        for molecule, conformations in names.items():
            for name in conformations:
                for key, value in {**QM7X, **changed}.items():
                    if value is not None:
                        file[f"{molecule}/{name}/{key}"] = value
    return path


@pytest.fixture
def water(tmp_path: Path) -> Path:
    return write_qm7x(
        tmp_path / "water.hdf5", {"12": ["Geom-m1-i1-c1-opt", "Geom-m1-i1-c1-50"], "13": ["Geom-m2-i1-c1-opt"]}
    )


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go in this test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("level", "task", "energy", "forces"),
    [("pbe0+mbd", "qm7x", -2079.5, "totFOR"), ("pbe0", "qm7x_pbe0", -2079.1, "pbe0FOR")],
)
def test_qm7x_pairs_each_energy_with_the_forces_of_its_level(water, level, task, energy, forces):
    for structure in records(qm7x, water, level=level):
        assert list(structure.labels) == [task] and task in qm7x.TASKS
        assert structure.labels[task].energy == energy
        np.testing.assert_array_equal(structure.labels[task].forces, QM7X[forces])
        np.testing.assert_array_equal(structure.positions, QM7X["atXYZ"])
        assert structure.numbers.tolist() == [8, 1, 1] and structure.pbc is None


def test_qm7x_displacements_are_relatives_of_their_molecule(water):
    found = records(qm7x, water)
    assert [(s.relative, s.source_id) for s in found] == [
        ("12", "12/Geom-m1-i1-c1-50"),
        ("12", "12/Geom-m1-i1-c1-opt"),
        ("13", "13/Geom-m2-i1-c1-opt"),
    ]


def packed(water: Path, form: str) -> bytes:
    content = water.read_bytes()
    if form == "hdf5":
        return content
    if form == "two xz streams":
        return lzma.compress(content[:5000]) + b"\0" * 8 + lzma.compress(content[5000:])
    if form == "tar.xz":
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, data in (("README", b"no data"), ("../../evil.hdf5", content)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("/etc/evil")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        content = archive.getvalue()
    return lzma.compress(content)


@pytest.mark.parametrize("form", ["hdf5", "xz", "two xz streams", "tar.xz"])
def test_qm7x_is_told_apart_by_content_and_leaves_nothing_behind(water, tmp_path, scratch, form):
    path = tmp_path / "1000.xz"  # the published name, whatever is inside
    path.write_bytes(packed(water, form))
    before = sorted(tmp_path.rglob("*"))
    plain, found = records(qm7x, water), records(qm7x, path)
    assert [s.source_id for s in found] == [s.source_id for s in plain] and len(found) == 3
    np.testing.assert_array_equal(found[2].positions, plain[2].positions)
    assert sorted(tmp_path.rglob("*")) == before and not list(scratch.iterdir())


def test_qm7x_removes_its_temporary_file_when_the_reader_is_abandoned(water, tmp_path, scratch):
    (tmp_path / "1000.xz").write_bytes(packed(water, "xz"))
    reading = qm7x.read(tmp_path / "1000.xz", qm7x.Options(), lambda fraction: None)
    next(reading)
    assert list(scratch.rglob("*.hdf5"))
    reading.close()
    assert not list(scratch.iterdir())


def test_qm7x_refuses_an_archive_that_unpacks_to_more_than_is_plausible(tmp_path, monkeypatch, scratch):
    monkeypatch.setattr(unpack, "MOST", (1 << 20, 2))
    (tmp_path / "bomb.xz").write_bytes(lzma.compress(unpack.HDF5_MAGIC + bytes(1 << 22)))
    with pytest.raises(ValueError, match=r"bomb\.xz.*plausible"):
        records(qm7x, tmp_path / "bomb.xz")
    assert not list(scratch.iterdir())


def test_qm7x_damaged_files_are_errors_that_name_the_file(water, tmp_path, scratch):
    whole, path = packed(water, "xz"), tmp_path / "7000.xz"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    tar_without = lzma.compress(packed(water, "tar.xz")[:0] + bytes(10240))
    for damage in (
        b"",
        b"garbage" * 100,
        whole[: len(whole) // 2],
        bytes(flipped),
        tar_without,
        water.read_bytes()[:3000],
    ):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"7000\.xz"):
            records(qm7x, path)


def test_qm7x_duplicates_go_with_their_displacements_and_are_counted(water, tmp_path):
    names = tmp_path / "DupMols.dat"
    names.write_text("Geom-m1-i1-c1-opt\n\n")
    found = records(qm7x, water, duplicates=names)
    assert [s.relative for s in structures(found)] == ["13"]
    assert set(skips(found)) == {"12/Geom-m1-i1-c1-opt", "12/Geom-m1-i1-c1-50"}
    names.write_text("Geom-m1-i1-c1-opt\nmethane\n")
    with pytest.raises(ValueError, match=r"DupMols\.dat, line 2.*methane"):
        records(qm7x, water, duplicates=names)


def test_qm7x_free_atoms_are_isolated_atoms_of_the_level_that_is_read(water):
    found = [r for r in records(qm7x, water, free_atoms=True, level="pbe0") if isinstance(r, IsolatedAtom)]
    assert {(a.task, a.number): a.energy for a in found}["qm7x_pbe0", 17] == -12516.444619523 and len(found) == 6
    assert not any(isinstance(r, IsolatedAtom) for r in records(qm7x, water))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"totFOR": QM7X["totFOR"][:2]}, "forces of another length than the atoms"),
        ({"ePBE0+MBD": np.array([np.nan])}, "energy is not finite"),
        ({"totFOR": None}, "record without totFOR"),
        ({"atXYZ": np.full((3, 3), np.inf)}, "positions are not finite"),
        ({"atNUM": np.array([8, 1, 0])}, "unknown element: atomic number 0 is not within 1..118 (a dummy atom?)"),
    ],
)
def test_qm7x_bad_records_are_skipped_with_a_reason(tmp_path, changed, reason):
    path = write_qm7x(tmp_path / "bad.hdf5", {"1": ["Geom-m1-i1-c1-opt"]}, **changed)
    assert skips(records(qm7x, path)) == {"1/Geom-m1-i1-c1-opt": reason}


# --------------------------------------------------------------------------------------------------- Transition1x

ENERGY, FORCES = "wB97x_6-31G(d).energy", "wB97x_6-31G(d).forces"


def write_reaction(group: h5py.Group, frames: int, atoms: int = 4) -> None:
    group["atomic_numbers"] = np.array([6, 1, 1, 8][:atoms])
    for place in (group, *(group.create_group(name) for name in transition1x.END_POINTS)):
        n = frames if place is group else 1
        if place is not group:
            place["atomic_numbers"] = group["atomic_numbers"][:]
        place["positions"] = rng.normal(size=(n, atoms, 3))
        place[ENERGY] = rng.normal(-3000, 1, n)
        place[FORCES] = rng.normal(size=(n, atoms, 3))


@pytest.fixture
def paths(tmp_path: Path) -> Path:
    path = tmp_path / "Transition1x.h5"
    with h5py.File(path, "w") as file:
        for split, formula, reaction, frames in (
            ("train", "CH2O", "rxn0001", 5),
            ("train", "CH2O", "rxn0002", 3),
            ("val", "C2H2", "rxn0003", 4),
            ("test", "CHN", "rxn0004", 2),
        ):
            write_reaction(file.create_group(f"{split}/{formula}/{reaction}"), frames)
            file[f"data/{formula}/{reaction}"] = file[f"{split}/{formula}/{reaction}"]  # the union of the three
    return path


def test_transition1x_counts_no_frame_twice_and_keeps_the_published_split(paths):
    found = records(transition1x, paths)
    assert Counter(s.split for s in found) == {"train": 5 + 3 + 6, "validation": 4 + 3, "test": 2 + 3}
    assert len({s.source_id for s in found}) == len(found) == 26
    assert not any(s.source_id.startswith("data/") for s in found)


def test_transition1x_without_its_splits_reads_data_with_formulas_as_relatives(paths):
    with h5py.File(paths, "a") as file:
        for split in ("train", "val", "test"):
            del file[split]
    found = records(transition1x, paths)
    assert Counter((s.relative, s.split) for s in found) == {("CH2O", None): 14, ("C2H2", None): 7, ("CHN", None): 5}


def test_transition1x_values_are_in_our_units_already(paths):
    found = {s.source_id: s for s in records(transition1x, paths)}
    with h5py.File(paths) as file:
        for where, group, i in (
            ("train/CH2O/rxn0001/3", file["train/CH2O/rxn0001"], 3),
            ("test/CHN/rxn0004/transition_state", file["test/CHN/rxn0004/transition_state"], 0),
        ):
            labels = found[where].labels["transition1x"]
            assert labels.energy == group[ENERGY][i]
            np.testing.assert_array_equal(labels.forces, group[FORCES][i])
            np.testing.assert_array_equal(found[where].positions, group["positions"][i])


def test_transition1x_end_point_that_is_a_frame_of_its_path_counts_once(paths):
    with h5py.File(paths, "a") as file:
        reaction = file["train/CH2O/rxn0001"]
        reaction["product/positions"][...] = reaction["positions"][4:5] + 1e-7
    found = records(transition1x, paths)
    assert skips(found) == {"train/CH2O/rxn0001/product": "end point is a frame of its path"} and len(found) == 26


def test_transition1x_bad_frames_are_skipped_and_the_others_kept(paths):
    with h5py.File(paths, "a") as file:
        file["train/CH2O/rxn0001"][ENERGY][2] = np.nan
        file["train/CH2O/rxn0001"][FORCES][3, 1, 1] = np.inf
        del file["val/C2H2/rxn0003"][FORCES]
    found = records(transition1x, paths)
    assert skips(found) == {
        "train/CH2O/rxn0001/2": "energy is not finite",
        "train/CH2O/rxn0001/3": "forces are not finite",
        "val/C2H2/rxn0003": f"record without {FORCES}",
    }
    assert len(structures(found)) == 26 - 2 - 7


def test_transition1x_damaged_files_are_errors_that_name_the_file(paths, tmp_path):
    whole = paths.read_bytes()
    for damage in (b"", b"garbage" * 100, whole[: len(whole) // 2]):
        paths.write_bytes(damage)
        with pytest.raises(ValueError, match=r"Transition1x\.h5"):
            records(transition1x, paths)
    with h5py.File(paths, "w") as file:
        file.create_group("C10H10")
    with pytest.raises(ValueError, match=r"train, val, test or data"):
        records(transition1x, paths)


# ------------------------------------------------------------------------------------------ crystals: MPtrj, Alexandria

CELL = [[0.0, 2.1, 2.1], [2.1, 0.0, 2.1], [2.1, 2.1, 0.0]]
KBAR = [[10.0, 2.0, 3.0], [2.0, 20.0, 4.0], [3.0, 4.0, 30.0]]  # compression positive
TENSION = -np.array(KBAR) * 0.1 * ase.units.GPa  # ASE's constants, not ours
FORCE = [[0.0, 0.1, -0.2], [0.0, -0.1, 0.2]]


def salt(forces=None, **changed) -> dict:
    own = [{} if forces is None else {"forces": f, "magmom": 0.0} for f in forces or [None, None]]
    sites = [
        {
            "species": [{"element": "Mg", "occu": 1}],
            "abc": [0.0, 0.0, 0.0],
            "xyz": [0.0, 0.0, 0.0],
            "properties": own[0],
        },
        {
            "species": [{"element": "O", "occu": 1}],
            "abc": [0.5, 0.5, 0.5],
            "xyz": [2.1, 2.1, 2.1],
            "properties": own[1],
        },
    ]
    lattice = {"matrix": CELL, "pbc": [True] * 3, "volume": 18.522}
    return {"@class": "Structure", "charge": 0, "lattice": lattice, "sites": sites, **changed}


def frame(**changed) -> dict:
    values = {
        "structure": salt(),
        "uncorrected_total_energy": -11.9,
        "corrected_total_energy": -12.6,
        "energy_per_atom": -6.3,
        "force": FORCE,
        "stress": KBAR,
        "magmom": None,
        "bandgap": 4.4,
        "mp_id": "mp-1265",
    }
    return values | changed


def write(path: Path, content: dict) -> Path:
    text = json.dumps(content)
    path.write_bytes(bz2.compress(text.encode()) if path.suffix == ".bz2" else text.encode())
    return path


def disordered() -> dict:
    structure = salt()
    structure["sites"][0]["species"] = [{"element": "Mg", "occu": 0.5}, {"element": "Ca", "occu": 0.5}]
    return structure


def test_mptrj_stress_of_vasp_becomes_tension_positive_per_cubic_angstrom(tmp_path):
    structure = only(records(mptrj, write(tmp_path / "m.json", {"mp-1265": {"mp-7-0-3": frame()}})))
    np.testing.assert_allclose(structure.labels["mptrj"].stress, TENSION, rtol=1e-7)
    np.testing.assert_array_equal(structure.labels["mptrj"].forces, FORCE)
    np.testing.assert_array_equal(structure.cell, CELL)
    np.testing.assert_array_equal(structure.positions, [[0, 0, 0], [2.1, 2.1, 2.1]])
    assert structure.numbers.tolist() == [12, 8] and structure.pbc.all()
    assert (structure.relative, structure.source_id) == ("mp-1265", "mp-1265/mp-7-0-3")


def test_mptrj_energy_is_the_one_the_forces_belong_to_unless_the_corrected_is_asked_for(tmp_path):
    path = write(tmp_path / "m.json", {"mp-1": {"a": frame(), "b": frame(corrected_total_energy=None)}})
    assert [s.labels["mptrj"].energy for s in records(mptrj, path)] == [-11.9, -11.9]
    found = records(mptrj, path, energy="corrected")
    assert [s.labels["mptrj_corrected"].energy for s in structures(found)] == [-12.6]
    assert skips(found) == {"mp-1/b": "corrected energy is not finite"}
    assert "uncorrected" in mptrj.TASKS["mptrj"].energy_kind and "MP2020" in mptrj.TASKS["mptrj_corrected"].energy_kind


def test_mptrj_null_labels_are_missing_and_malformed_ones_are_skipped(tmp_path):
    frames = {
        "no forces": frame(force=None, stress=None),
        "ragged": frame(force=[[0.0, 0.1], [0.0]]),
        "short": frame(force=FORCE[:1]),
        "NaN": frame(force=[[float("nan"), 0.0, 0.0], [0.0] * 3]),
        "no energy": frame(uncorrected_total_energy=None),
        "disordered": frame(structure=disordered()),
        "no structure": frame(structure=None),
        "text": "no frame",
        "good": frame(),
    }
    found = records(mptrj, write(tmp_path / "m.json", {"mp-1": frames, "mp-2": 3}))
    assert len(found) == 10
    assert [s.source_id for s in structures(found)] == ["mp-1/no forces", "mp-1/good"]
    missing = structures(found)[0].labels["mptrj"]
    assert missing.forces is None and missing.stress is None and missing.energy == -11.9
    assert skips(found)["mp-1/ragged"] == "forces are not an array of numbers"
    assert skips(found)["mp-1/NaN"] == "forces are not finite"
    assert skips(found)["mp-1/disordered"] == "structure with partially occupied sites"
    assert skips(found)["mp-2"] == "material is not an object of frames"


def test_mptrj_memory_does_not_grow_with_the_file(tmp_path):
    material = json.dumps({f"mp-7-0-{i}": frame() for i in range(10)})
    peaks = []
    for materials in (120, 480):
        path = tmp_path / f"{materials}.json"
        path.write_text("{" + ",".join(f'"mp-{i}": {material}' for i in range(materials)) + "}")
        tracemalloc.start()
        count = sum(1 for _ in mptrj.read(path, mptrj.Options(), lambda fraction: None))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == 10 * materials
    assert path.stat().st_size > 3e6
    assert peaks[1] < 1.1 * peaks[0] < 3e6


@pytest.mark.parametrize("reader", [mptrj, alexandria])
def test_json_files_that_are_not_what_they_should_be_are_errors_that_name_the_file(tmp_path, reader):
    whole = {"mp-1": {"a": frame()}} if reader is mptrj else trajectory(step(), step())
    text = json.dumps(whole).encode()
    for name, damage in (
        ("empty", b""),
        ("garbage", b"garbage" * 100),
        ("list", b"[1, 2]"),
        ("half", text[: len(text) // 2]),
        ("half bz2", bz2.compress(text)[:-20]),
        ("damaged bz2", b"BZh9" + b"garbage" * 20),
        ("other", b'{"mp-1": 3}'),
        ("two", text + b"{}"),
        ("comma", text[:-1] + b",}"),
        ("no comma", b'{"mp-1": {} "mp-2": {}}'),
    ):
        path = tmp_path / f"{name}.json"
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            records(reader, path)


@pytest.mark.parametrize("depth", [1, 2])
def test_json_records_are_whole_wherever_the_file_is_cut(tmp_path, monkeypatch, depth):
    odd = {'"}{\\"': ["}]", '\\"', "\\\\"], "NaN": [1, {"a": [{}]}], "": {"x": "NaN, ]"}, "é\\": [[]]}
    values = [{"b": odd}, odd, {}, {"c": {"d": [1.5, None]}}, [], {"last": "\\\\"}]
    content = {"entries": values, "more": {"e": [odd]}} if depth == 2 else {f"k{i}": v for i, v in enumerate(values)}
    text = json.dumps(content, ensure_ascii=False).encode().replace(b"1.5", b"NaN").replace(b"}, ", b"} ,\n")
    expected = json.loads(text, parse_constant=lambda token: None)
    read = json_file.pairs if depth == 1 else json_file.elements
    (tmp_path / "a.json").write_bytes(text)
    (tmp_path / "packed").write_bytes(bz2.compress(text))
    for chunk in range(1, len(text) + 2, 3):
        monkeypatch.setattr(json_file, "CHUNK", chunk)
        monkeypatch.setattr(json_file, "PART", chunk)
        parts = json_file.json_parts(tmp_path / "a.json", depth)
        assert (parts[0][0], parts[-1][1]) == (0, len(text)) and all(a[1] == b[0] for a, b in pairwise(parts))
        for path, cut in ((tmp_path / "a.json", [None]), (tmp_path / "a.json", parts), (tmp_path / "packed", [None])):
            found = [record for part in cut for record in read(path, lambda fraction: None, part)]
            assert (dict(found) if depth == 1 else [value for _, value in found]) == (
                expected if depth == 1 else expected["entries"]
            )


RECORDS = {  # of one file; all but the first two are not where the seam between those says, or look as if they were
    "alike": ['{"m": {"x": [1]}}'] * 9,
    "in a string": ['{"m": {"x": [1]}}', '{"m": {"x": "}}, \\"k1\\": {\\"m\\""}}', '{"m": {"x": "}}, "}}'],
    "deeper": ['{"m": {"x": [1]}}', '{"m": {"n": {"x": 2}}, "k9": {"m": {"x": [3]}}, "y": 3}', '{"m": {"x": 4}}'],
    "no numbers": ['{"m": {"x": [1]}}', '{"m": {"x": [NaN, -Infinity]}}', '{"m": {"x": [5]}}'],
    "of other kinds": ['{"m": {"x": [1]}}', '{"m": {"x": [2]}}', "[]", '{"m": {}}', "{}", '{"m": {"x": [5]}}'],
}


@pytest.mark.parametrize("keys", [["k1", "k2"], ["k"], ['\\"\\\\', "k1"]], ids=["two", "one", "escaped"])
@pytest.mark.parametrize("commas", [[", "], [",", " ,\n "]], ids=["even", "uneven"])
@pytest.mark.parametrize("content", RECORDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_json_records_are_the_same_wherever_one_seems_to_end(tmp_path, monkeypatch, depth, content, commas, keys):
    values = RECORDS[content] * 3
    names = [f'"{keys[i % len(keys)]}"' for i in range(len(values))]
    members = [f"{name}: {value}" for name, value in zip(names, values, strict=True)] if depth == 1 else values
    joined = "".join(f"{commas[i % len(commas)] if i else ''}{member}" for i, member in enumerate(members))
    path = tmp_path / "a.json"
    path.write_text(f"{{{joined}}}" if depth == 1 else f'{{"entries": [{joined}]}}')
    read = json_file.pairs if depth == 1 else json_file.elements
    expected = [json.loads(value, parse_constant=lambda token: None) for value in values]
    for chunk in (1, 7, 40, 1000):
        monkeypatch.setattr(json_file, "CHUNK", chunk)
        found = list(read(path, lambda fraction: None))
        assert [value for _, value in found] == expected
        if depth == 2:
            monkeypatch.setattr(json_file, "PATIENCE", 0)  # no seam is learned: brackets alone
            assert found == list(read(path, lambda fraction: None))
            monkeypatch.undo()
        assert depth == 2 or [key for key, _ in found] == [json.loads(name) for name in names]


@pytest.mark.parametrize(
    "damaged", ["1]}}", '"k1]}}', "]}}", '{"m": {"x": [2]}}', '"": {"m": {"x": [2]}}, "": 1]}}', 'k": [2]}}']
)
def test_what_stands_in_place_of_a_json_record_ends_in_an_error_and_not_never(tmp_path, damaged):
    good = '"k": {"m": {"x": [1]}}'
    path = tmp_path / "a.json"
    path.write_text(f"{{{good}, {good}, {damaged}, {good}, {good}}}")
    with pytest.raises(ValueError, match=r"a\.json"):
        list(json_file.pairs(path, lambda fraction: None))


def test_of_json_records_that_are_alike_only_the_first_and_the_last_are_scanned(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({f"mp-{i}": {"a": frame()} for i in range(200)}))
    scanned, ends = [], json_scan.Scan.ends
    monkeypatch.setattr(json_file, "CHUNK", 4096)
    monkeypatch.setattr(json_scan.Scan, "ends", lambda scan, chunk: scanned.append(len(chunk)) or ends(scan, chunk))
    assert len(records(mptrj, path)) == 200
    assert sum(scanned) < 0.05 * path.stat().st_size


def entry(mat_id: str = "agm001", energy=-11.9, forces=FORCE, **data) -> dict:
    values = {
        "mat_id": mat_id,
        "energy_total": energy,
        "energy_corrected": -12.6,
        "e_form": -3.0,
        "stress": KBAR,
        **data,
    }
    return {"@class": "ComputedStructureEntry", "energy": -99.0, "structure": salt(forces), "data": values}


def step(**changed) -> dict:
    return {"structure": salt(), "energy": -11.9, "forces": FORCE, "stress": KBAR} | changed


def trajectory(*steps: dict, mat_id: str = "agm001") -> dict:
    return {mat_id: [{"run": 0, "steps": list(steps)}]}


@pytest.mark.parametrize("name", ["a.json", "a.json.bz2"])
@pytest.mark.parametrize(("content", "where"), [({"entries": [entry()]}, "agm001"), (trajectory(step()), "agm001/0/0")])
def test_alexandria_entries_and_trajectories_are_told_apart_by_content(tmp_path, name, content, where):
    structure = only(records(alexandria, write(tmp_path / name, content)))
    assert (structure.relative, structure.source_id) == ("agm001", where)
    assert structure.labels["alexandria"].energy == -11.9  # energy_total; not per atom, not corrected
    np.testing.assert_array_equal(structure.labels["alexandria"].forces, FORCE)
    np.testing.assert_allclose(structure.labels["alexandria"].stress, TENSION, rtol=1e-7)


def test_alexandria_bz2_of_several_streams_is_one_file_whatever_its_name(tmp_path):
    text = json.dumps({"entries": [entry("agm001"), entry("agm002")]}).encode()
    (tmp_path / "a.json").write_bytes(bz2.compress(text[:700]) + bz2.compress(text[700:]))
    assert [s.relative for s in records(alexandria, tmp_path / "a.json")] == ["agm001", "agm002"]


def test_alexandria_stress_is_read_in_the_convention_it_is_written_in(tmp_path):
    voigt = [TENSION[0, 0], TENSION[1, 1], TENSION[2, 2], TENSION[1, 2], TENSION[0, 2], TENSION[0, 1]]
    stresses = {
        "vasp": step(),
        "ase": step(stress=voigt),
        "ev": step(stress=TENSION.tolist(), stress_unit="eV/A^3 (as converted)"),
        "kbar": step(stress_unit="kbar"),
    }
    for name, one in stresses.items():
        structure = only(records(alexandria, write(tmp_path / f"{name}.json", trajectory(one))))
        np.testing.assert_allclose(structure.labels["alexandria"].stress, TENSION, rtol=1e-7, err_msg=name)
    path = write(tmp_path / "told.json", trajectory(step()))
    np.testing.assert_array_equal(only(records(alexandria, path, stress="ase")).labels["alexandria"].stress, KBAR)
    assert only(records(alexandria, path, stress="none")).labels["alexandria"].stress is None
    for unit in ("psi", "GPa"):  # neither says what its sign means
        path = write(tmp_path / "odd.json", trajectory(step(stress_unit=unit)))
        assert skips(records(alexandria, path)) == {"agm001/0/0": "stress in an unknown unit"}
    told = only(records(alexandria, path, stress_sign="compression")).labels["alexandria"].stress
    np.testing.assert_allclose(told, 10 * TENSION, rtol=1e-7)


def test_unit_and_sign_of_stress_are_options_where_there_is_stress_and_refused_elsewhere(tmp_path):
    path = write(tmp_path / "m.json", {"mp-1265": {"mp-7-0-3": frame()}})
    told = only(records(mptrj, path, stress_unit="GPa", stress_sign="tension")).labels["mptrj"].stress
    np.testing.assert_allclose(told, -10 * TENSION, rtol=1e-7)
    path = write(tmp_path / "a.json", trajectory(step()))
    for options, expected in ({"stress_sign": "tension"}, -TENSION), ({"stress_unit": "GPa"}, 10 * TENSION):
        found = only(records(alexandria, path, **options)).labels["alexandria"].stress
        np.testing.assert_allclose(found, expected, rtol=1e-7)
    with pytest.raises(ValueError, match="stress=none leaves stress_unit"):
        alexandria.Options(stress="none", stress_unit="GPa")
    for reader in (qm7x, transition1x):
        with pytest.raises(ValueError, match=r"Extra inputs are not permitted|stress_unit"):
            reader.Options(stress_unit="GPa")


def test_alexandria_bad_steps_are_skipped_with_an_id_and_never_stored(tmp_path):
    nan = float("nan")  # json writes the bare token NaN
    steps = [
        step(),
        step(energy=nan),
        step(forces=None),
        step(forces=[[0.0, 0.1, -0.2], [0.0, nan, 0.2]]),
        step(forces=[[0.0, 0.1, -0.2], [0.0, -0.1]]),
        step(forces=[FORCE]),
        step(stress=[[nan] * 3] * 3),
        step(structure={}),
        step(),
    ]
    found = records(alexandria, write(tmp_path / "a.json.bz2", trajectory(*steps) | {"agm002": [{"run": 0}]}))
    assert [s.source_id for s in structures(found)] == ["agm001/0/0", "agm001/0/6", "agm001/0/8"]
    assert structures(found)[1].labels["alexandria"].stress is None
    assert skips(found) == {
        "agm001/0/1": "energy is not finite",
        "agm001/0/2": "forces are null",
        "agm001/0/3": "forces are not finite",
        "agm001/0/4": "forces are not an array of numbers",
        "agm001/0/5": "forces of another length than the atoms",
        "agm001/0/7": "structure is not a pymatgen structure",
        "agm002/0": "calculation without a list of steps",
    }


def test_alexandria_bad_entries_are_skipped_and_entries_without_forces_train_energy(tmp_path):
    half = entry("agm004", forces=[[0.0] * 3, None])
    entries = [
        entry(forces=None),
        entry("agm002", energy=None),
        entry("agm003", energy=float("nan")),
        half,
        {"data": {}},
    ]
    found = records(alexandria, write(tmp_path / "a.json", {"entries": entries}))
    assert only(structures(found)).labels["alexandria"].forces is None
    assert set(skips(found)) == {
        "agm002",
        "agm003",
        "agm004",
        next(w for w in skips(found) if w.startswith("entry at byte")),
    }


def test_crystals_keep_partial_periodicity_and_positions_from_fractions(tmp_path):
    slab = salt(lattice={"matrix": CELL, "pbc": [True, True, False]})
    for site in slab["sites"]:
        del site["xyz"]
    structure = only(records(mptrj, write(tmp_path / "m.json", {"mp-1": {"a": frame(structure=slab)}})))
    assert structure.pbc.tolist() == [True, True, False]
    np.testing.assert_array_equal(structure.cell, CELL)  # whole: stress is an energy per its volume
    np.testing.assert_allclose(structure.positions, [[0, 0, 0], [2.1, 2.1, 2.1]], atol=1e-15)


# --------------------------------------------------------------------------------------------------------- aselmdb

VOIGT = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]


def nd(values, dtype="float64") -> dict:
    return {"__ndarray__": [list(np.shape(values)), dtype, np.ravel(values).tolist()]}


def row(encode=lambda values, dtype="float64": values, **changed) -> dict:
    values = {
        "numbers": encode([12, 8], "int64"),
        "positions": encode([[0.0, 0.0, 0.0], [2.1, 2.1, 2.1]]),
        "cell": encode(CELL),
        "pbc": encode([True, True, True], "bool"),
        "energy": -11.9,
        "forces": encode(FORCE),
        "stress": encode(VOIGT),
        "unique_id": "x",
        "data": {"sid": "agm011722394_0_2", "charge": -1, "spin": 3, "s_squared": 0.0},
    }
    return values | changed


def write_lmdb(path: Path, rows: dict[str, dict | bytes], **others) -> Path:
    with (
        lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 26) as database,
        database.begin(write=True) as put,
    ):
        for key, value in {**rows, **others, "nextid": len(rows) + 1}.items():
            put.put(key.encode(), value if isinstance(value, bytes) else zlib.compress(json.dumps(value).encode()))
    return path


@pytest.mark.parametrize("encode", [lambda values, dtype="float64": values, nd], ids=["lists", "ndarrays"])
def test_aselmdb_reads_both_encodings(tmp_path, encode):
    structure = only(records(aselmdb, write_lmdb(tmp_path / "a.aselmdb", {"1": row(encode)})))
    labels = structure.labels["aselmdb"]
    assert structure.numbers.tolist() == [12, 8] and labels.energy == -11.9
    np.testing.assert_array_equal(structure.cell, CELL)
    np.testing.assert_array_equal(labels.forces, FORCE)
    np.testing.assert_array_equal(labels.stress, voigt_6_to_full_3x3_stress(VOIGT))
    assert (structure.charge, structure.spin, structure.source_id) == (-1, 3, "1")


def test_aselmdb_units_are_options(tmp_path):
    path = write_lmdb(tmp_path / "a.aselmdb", {"1": row()})
    atomic = {"energy_unit": "hartree", "length_unit": "bohr", "stress_unit": "GPa", "stress_sign": "compression"}
    plain, told = only(records(aselmdb, path)), only(records(aselmdb, path, **atomic))
    energy, length = ase.units.Hartree, ase.units.Bohr  # ASE's constants, not ours
    for name, factor in ("positions", length), ("cell", length):
        np.testing.assert_allclose(getattr(told, name), getattr(plain, name) * factor, rtol=1e-7)
    labels, own = told.labels["aselmdb"], plain.labels["aselmdb"]
    np.testing.assert_allclose(labels.energy, own.energy * energy, rtol=1e-7)
    np.testing.assert_allclose(labels.forces, np.array(own.forces) * energy / length, rtol=1e-7)
    np.testing.assert_allclose(labels.stress, -own.stress * ase.units.GPa, rtol=1e-7)
    assert only(records(aselmdb, path, force_unit="eV/nm")).labels["aselmdb"].forces[0][1] == pytest.approx(0.01)


def test_aselmdb_other_keys_are_no_rows_and_deleted_rows_are_skipped(tmp_path):
    rows = {str(i): row() for i in range(1, 12)}
    path = write_lmdb(tmp_path / "a.aselmdb", rows, metadata={"name": "x"}, deleted_ids=[3, 11])
    found = records(aselmdb, path, dataset="omat24")
    assert {s.source_id for s in structures(found)} == {str(i) for i in range(1, 11)} - {"3"}
    assert skips(found) == {"3": "row is deleted", "11": "row is deleted"}
    assert list(structures(found)[0].labels) == ["omat24"]


def test_aselmdb_relatives_are_materials_where_the_row_names_one_and_formulas_elsewhere(tmp_path):
    sids = ["agm011722394_0_2", "agm011722394_3_9", "mp-19_rattled-300_1", "agm5x", "random123", 17, None]
    rows = {str(i): row(data={"sid": sid}) for i, sid in enumerate(sids, start=1)}
    found = sorted(records(aselmdb, write_lmdb(tmp_path / "a.aselmdb", rows)), key=lambda s: s.source_id)
    assert [s.relative for s in found] == ["agm011722394", "agm011722394", "mp-19", *["Mg1O1"] * 4]
    assert {(s.charge, s.spin) for s in found} == {(None, None)}


OPEN = {"cell": [[0.0] * 3] * 3, "pbc": [False] * 3, "stress": None}  # Mg and O far from crystals


@pytest.mark.parametrize(
    ("stated", "charge", "spin"),
    [
        ({"key_value_pairs": {"charge": -1, "spin": 2}}, -1, 2),
        ({"data": {"info": {"total_charge": 1.0, "multiplicity": 4}}}, 1, 4),
        ({"info": {"charge": 2}, "data": {"charge": None}}, 2, None),
        ({"data": {"charge": 0, "uhf": 2}}, 0, 3),
        ({"data": {"charge": 0, "multiplicity": 3, "spin": 2}}, 0, 3),  # 2S beside 2S + 1
        ({"data": {"charge": 0, "multiplicity": 3, "total_spin": 1.0}}, 0, 3),  # S beside 2S + 1
        ({"data": {"charge": 0, "spin": 0}}, 0, None),
        ({"data": {}, "initial_charges": nd([-1.5, 0.5]), "initial_magmoms": nd([0.0, 1.0])}, -1, 2),
        ({"data": {}, "initial_charges": nd([0.3, 0.3]), "initial_magmoms": nd([1.0, 2.0])}, None, None),
        ({"data": {"charge": 0}, "magmom": 2.0, "initial_magmoms": nd([0.0, 0.0])}, 0, 3),
        ({"data": {}}, None, None),
    ],
)
def test_aselmdb_charge_and_spin_are_found_wherever_a_molecule_has_them(tmp_path, stated, charge, spin):
    path = write_lmdb(tmp_path / "a.aselmdb", {"1": row(**{"data": {}, **OPEN, **stated})})
    structure = only(records(aselmdb, path))
    assert (structure.charge, structure.spin) == (charge, spin)


def test_aselmdb_moments_and_charges_of_a_crystals_atoms_are_not_its_spin_and_charge(tmp_path):
    atoms = {"initial_charges": nd([2.0, -1.0]), "initial_magmoms": nd([5.0, 0.0]), "magmom": 5.0}
    structure = only(records(aselmdb, write_lmdb(tmp_path / "a.aselmdb", {"1": row(data={}, **atoms)})))
    assert (structure.charge, structure.spin) == (None, None)


def test_aselmdb_charges_that_contradict_each_other_or_are_missing_are_skips(tmp_path):
    two, three = {"charge": 0, "total_charge": 1}, {"charge": 0, "multiplicity": 3, "spin": 5}
    rows = {str(k): row(data=data, **OPEN) for k, data in enumerate((two, three, {"charge": 0}, {}), start=1)}
    path = write_lmdb(tmp_path / "a.aselmdb", rows)
    assert skips(records(aselmdb, path)) == {
        "1": "charge and total_charge differ",
        "2": "multiplicity and spin differ",
    }
    omol = skips(records(aselmdb, path, dataset="omol25"))
    assert omol["4"] == "no charge is stated (--option charge=0 states it)" and "3" not in omol
    stated = structures(records(aselmdb, path, dataset="omol25", charge=0, spin=3))
    assert [(s.charge, s.spin, s.source_id) for s in stated] == [(0, 3, "3"), (0, 3, "4")]
    unpaired = write_lmdb(tmp_path / "b.aselmdb", {"1": row(data={"charge": 0, "spin": 0}, **OPEN)})
    assert only(records(aselmdb, unpaired, spin_counts="unpaired")).spin == 1


def test_aselmdb_molecules_have_no_cell(tmp_path):
    molecule = row(cell=[[0.0] * 3] * 3, pbc=nd([False] * 3, "bool"), stress=None)
    structure = only(records(aselmdb, write_lmdb(tmp_path / "a.aselmdb", {"1": molecule})))
    assert structure.cell is None and structure.pbc is None and structure.labels["aselmdb"].stress is None


@pytest.mark.parametrize("pbc", [[True, True, False], [False, True, False], [False] * 3])
def test_aselmdb_keeps_the_whole_cell_of_slabs_wires_and_boxes_and_their_stress(tmp_path, pbc):
    changed = {"pbc": nd(pbc, "bool"), "data": {"charge": 0, "spin": 1}}
    rows = {"1": row(**changed), "2": row(**changed, cell=[[0.0] * 3, *CELL[1:]])}
    whole, part = records(aselmdb, write_lmdb(tmp_path / "a.aselmdb", rows))
    np.testing.assert_allclose(whole.cell, CELL)
    assert (whole.pbc is None) == (not any(pbc)) and whole.labels["aselmdb"].stress is not None
    reasons, dropped = screen(pack([whole, part]))
    assert dropped == ({} if pbc[0] else {NO_VOLUME: 1})  # a periodic vector must be there
    assert reasons == [None, "a periodic cell vector is zero or not finite" if pbc[0] else None]


def test_aselmdb_bad_rows_are_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(aselmdb, "LARGEST_ROW", 1 << 16)
    packed_row = zlib.compress(json.dumps(row()).encode())
    rows = {
        "1": row(),
        "2": row(energy=None),
        "3": row(forces=[[float("nan")] * 3] * 2),
        "4": row(forces={"__ndarray__": [[3, 3], "float64", [0.0] * 6]}),
        "5": row(numbers=nd([12, 0], "int64")),
        "6": b"garbage",
        "7": packed_row[:-20],
        "8": zlib.compress(bytes(1 << 20)),
        "9": {"numbers": [1]},
        "10": row(data={"charge": 0.5}),
        "11": row(energy=float("nan"), data={}),
        "12": row(forces=None, stress=[0.0] * 6, data={"unused": float("nan")}),
    }
    found = records(aselmdb, write_lmdb(tmp_path / "a.aselmdb", rows))
    assert {s.source_id for s in structures(found)} == {"1", "12"}
    assert skips(found) == {
        "2": "energy is not finite",
        "3": "forces are not finite",
        "4": "forces are not an array of numbers",
        "5": "unknown element: atomic number 0 is not within 1..118 (a dummy atom?)",
        "6": "row is not compressed JSON",
        "7": "row is truncated",
        "8": "row is implausibly large",
        "9": "row without numbers and positions",
        "10": "charge is not a whole number",
        "11": "energy is not finite",
    }


def test_aselmdb_damaged_files_are_errors_that_name_the_file(tmp_path):
    whole = write_lmdb(tmp_path / "a.aselmdb", {str(i): row() for i in range(1, 200)}).read_bytes()
    used = len(whole.rstrip(b"\0"))
    for name, damage in (("empty", b""), ("garbage", b"garbage" * 5000), ("half", whole[: used // 2])):
        path = tmp_path / f"{name}.aselmdb"
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            records(aselmdb, path)
    with pytest.raises(ValueError, match="no key is the number of a row"):
        records(aselmdb, write_lmdb(tmp_path / "none.aselmdb", {}))


# ------------------------------------------------------------------------------------------------------ all readers


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_missing_file_is_a_missing_file_and_an_unknown_option_an_error(tmp_path, reader):
    with pytest.raises(FileNotFoundError):
        records(reader, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="extra"):
        reader.Options(no_such_option=1)
    assert reader.RELATIVE and all(labels.level_of_theory for labels in reader.TASKS.values())
    assert all(option.description for option in reader.Options.model_fields.values())


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"real published labels ({name}) are not here")
    return REAL / name


@pytest.mark.parametrize(
    ("reader", "name", "count"),
    [
        (mptrj, "mptrj/mptrj_sample.json", 801),
        (alexandria, "alexandria/alexandria_sample.json.bz2", 800),
        (alexandria, "alexandria/alex_go_sample.json.bz2", 1860),
        (aselmdb, "omol25/data0001.aselmdb", 347),
        (aselmdb, "omol25/data0002.aselmdb", 347),
    ],
)
def test_every_record_of_the_real_files_is_accounted_for(reader, name, count):
    found = records(reader, real(name))
    assert len(found) == count and len(structures(found)) + len(skips(found)) == count
    assert len({s.source_id for s in structures(found)}) == len(structures(found)) > 0.9 * count
    assert all(np.isfinite(next(iter(s.labels.values())).energy) for s in structures(found))


def test_work_of_forces_and_stress_along_real_relaxations_is_the_change_in_energy():
    runs: dict[str, list[Structure]] = {}
    for s in structures(records(alexandria, real("alexandria/alex_go_sample.json.bz2"))):
        runs.setdefault(s.source_id.rpartition("/")[0], []).append(s)
    by_stress, by_forces = [], []
    for before, after in (pair for run in runs.values() for pair in pairwise(run)):
        a, b = before.labels["alexandria"], after.labels["alexandria"]
        cell = (before.cell + after.cell) / 2
        strain = np.linalg.solve(cell, after.cell - before.cell)
        moved = after.positions @ np.linalg.inv(after.cell) - before.positions @ np.linalg.inv(before.cell)
        moved = (moved - np.round(moved)) @ cell
        stress = abs(np.linalg.det(cell)) * np.sum((a.stress + b.stress) / 2 * strain)
        forces = -np.sum((a.forces + b.forces) / 2 * moved)
        change = b.energy - a.energy
        if abs(change) < 2e-3 or np.abs(strain).max() > 0.02 or np.abs(moved).max() > 0.1:
            continue  # too small for the digits in the file, or too large for the trapezoidal rule
        if abs(stress) > 5 * abs(forces):
            by_stress.append((stress + forces) / change)
        elif abs(forces) > 5 * abs(stress):
            by_forces.append((stress + forces) / change)
    assert len(by_stress) > 15 and len(by_forces) > 50
    assert abs(np.median(by_stress) - 1) < 0.02 and abs(np.median(by_forces) - 1) < 0.02


def same(one: Structure, two: Structure) -> bool:
    return one.source_id == two.source_id and all(
        np.array_equal(getattr(one, name), getattr(two, name)) for name in ("numbers", "positions", "split", "relative")
    )


def test_the_parts_of_a_file_are_the_file(tmp_path, paths, monkeypatch):
    names = {str(molecule): [f"Geom-m1-i1-c1-{i}" for i in range(1, 4)] for molecule in range(8)}
    files = {
        qm7x: write_qm7x(tmp_path / "q.hdf5", names),
        transition1x: paths,
        aselmdb: write_lmdb(tmp_path / "a.aselmdb", {str(i): row() for i in range(1, 20)}, deleted_ids=[3]),
        mptrj: write(tmp_path / "m.json", {f"mp-{i}": {"a": frame(), "b": 3} for i in range(9)}),
        alexandria: write(tmp_path / "e.json", {"entries": [entry(f"agm{i}") for i in range(9)]}),
    }
    monkeypatch.setattr(json_file, "PART", 1500)
    for reader, path in files.items():
        if hasattr(reader, "PART"):
            monkeypatch.setattr(reader, "PART", 3)
        options = reader.Options()
        cuts = reader.parts(path, options)
        whole = records(reader, path)
        found = [record for part in cuts for record in reader.read(path, options, lambda fraction: None, part)]
        assert len(cuts) > 2 and len(found) == len(whole) and skips(found) == skips(whole)
        assert all(same(*both) for both in zip(structures(found), structures(whole), strict=True))
