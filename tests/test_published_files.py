"""Files of published datasets in their exact layouts, made by hand: values, units, charges, relatives, traps."""

import gzip
import io
import json
import sqlite3
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from multifid.preparation.prepare import prepare
from multifid.readers import reader
from multifid.readers.contract import Skip
from multifid.readers.recognise import recognise
from multifid.readers.tfrecord import _masked
from multifid.store.block import Block
from multifid.structures.structure import Structure
from multifid.training.about import read_as

HARTREE, BOHR, KBAR = 27.211386245988, 0.529177210903, 1 / 1602.1766208
WATER = np.array([[0, 0, 0.1], [0, 0.76, 0.69], [0, -0.76, 0.69]])


def records(format: str, path: Path, **options) -> list:
    module = reader(format)
    return list(module.read(path, module.Options(**options), lambda far: None, None))


def structures(found: list) -> list[Structure]:
    return [one for one in found if isinstance(one, Structure)]


def skips(found: list) -> list[tuple[str, str]]:
    return [(one.reason, one.where) for one in found if isinstance(one, Skip)]


def block(found: list) -> dict[str, np.ndarray]:
    (one,) = [one for one in found if isinstance(one, Block)]
    return one.columns


# MatPES: the document of its page on the dataset, shortened


def matpes(functional: str, number: int = 1) -> dict:
    sites = [
        {"species": [{"element": e, "occu": 1}], "abc": [x, x, x], "xyz": [4 * x, 4 * x, 4 * x], "label": e}
        for e, x in (("Sr", 0.0), ("Cd", 0.5))
    ]  # fmt: skip
    matrix = [[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0]]
    return {
        "builder_meta": {"license": None}, "nsites": 2, "elements": ["Cd", "Sr"], "chemsys": "Cd-Sr",
        "structure": {"charge": 0, "lattice": {"matrix": matrix, "pbc": [True] * 3}, "sites": sites},
        "energy": -34.9 + number, "forces": [[0.25, 0.5, 0.125], [-0.25, -0.5, -0.125]],
        "stress": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "matpes_id": f"matpes-20240214_30496_{number}",
        "functional": functional, "bader_charges": None, "cohesive_energy_per_atom": -1.29,
        "provenance": {"original_mp_id": "mp-30496", "md_temperature": 300.0},
    }  # fmt: skip


def test_matpes_is_recognised_and_its_functionals_are_not_mixed(tmp_path):
    path = tmp_path / "MatPES-PBE-2025.2-charges.json.gz"
    documents = [matpes("PBE", 1), matpes("PBE", 2), matpes("r2SCAN", 3)]
    path.write_bytes(gzip.compress(json.dumps(documents).encode()))
    assert recognise(path) == "table"
    with pytest.raises(ValueError, match=r"several mappings fit, matpes-pbe, matpes-r2scan"):
        prepare("table", [path], tmp_path / "store", progress=False)
    own = block(records("table", path, mapping="matpes-pbe"))
    assert own["labels/matpes_pbe/energy"].tolist() == [-33.9, -32.9]


@pytest.mark.parametrize("functional", ["PBE", "r2SCAN"])
def test_matpes_stress_has_vasps_sign_and_snapshots_of_one_material_are_relatives(functional, tmp_path):
    path = tmp_path / "MatPES-X-2025.2.json"
    path.write_text(json.dumps([matpes(functional, 1), matpes(functional, 2)]))
    assert recognise(path) == "table"
    name = f"matpes-{functional.lower()}"
    own = block(records("table", path, mapping=name))
    task = name.replace("-", "_")
    assert own["labels/" + task + "/energy"].tolist() == [-33.9, -32.9] and own["numbers"].tolist() == [38, 48] * 2
    stress = np.array([[1, 6, 5], [6, 2, 4], [5, 4, 3]]) * -KBAR  # Voigt xx yy zz yz xz xy, positive under pressure
    assert np.allclose(own[f"labels/{task}/stress"], stress, rtol=1e-6)
    assert own["relative"][0] == own["relative"][1] and own["pbc"].all()
    other = "matpes-pbe" if functional == "r2SCAN" else "matpes-r2scan"
    assert {reason for reason, _ in skips(records("table", path, mapping=other))} == {"only: functional is another"}
    store = prepare("table", [path], tmp_path / "store", trust_units=True, progress=False, fractions=(1.0, 0.0, 0.0))
    assert store.tasks == [task]  # no mapping was named: the one that fits is taken
    assert store.manifest["source"]["options"]["mapping"]["only"] == {"functional": functional}
    assert list(read_as(store.manifest["source"])) == ["matpes"]  # whose citations reach the model card


# QCML: TFRecord of the feature group dft_force_field


def varint(value: int) -> bytes:
    value, out = value & (1 << 64) - 1, b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: dict) -> bytes:
    entries = b""
    for name, value in features.items():
        if isinstance(value, str):
            inner = field(1, field(1, value.encode()))
        elif np.asarray(value).dtype.kind == "f":
            inner = field(2, field(1, np.asarray(value, "<f4").tobytes()))
        else:
            inner = field(3, field(1, b"".join(varint(int(v)) for v in np.asarray(value).reshape(-1))))
        entries += field(1, field(1, name.encode()) + field(2, inner))
    return field(1, entries)


def tfrecord(path: Path, rows: list[dict]) -> Path:
    with path.open("wb") as file:
        for row in rows:
            message, head = example(row), struct.pack("<Q", len(example(row)))
            file.write(head + struct.pack("<I", _masked(head)) + message + struct.pack("<I", _masked(message)))
    return path


def qcml(number: int, **more) -> dict:
    return {
        "atomic_numbers": [8, 1], "positions": np.float32(WATER[:2] / BOHR), "pbe0_energy": [-75.5],
        "pbe0_formation_energy": [-0.25], "pbe0_forces": np.float32([[0, 0, 0.5], [0, 0, -0.5]]), "charge": [-1],
        "multiplicity": [1], "is_outlier": [0], "key_hash": f"key{number}", **more,
    }  # fmt: skip


def test_the_checksum_of_tfrecord_is_that_of_its_specification():
    assert _masked(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_qcml_is_read_without_tensorflow_in_atomic_units_with_charge_and_spin(tmp_path):
    path = tfrecord(tmp_path / "qcml-full.tfrecord-00000-of-00002", [qcml(0), qcml(1, is_outlier=[1]), qcml(2)])
    assert recognise(path) == "table"
    found = records("table", path, mapping="qcml")
    own = block(found)
    assert np.allclose(own["labels/qcml/energy"], -75.5 * HARTREE) and own["charge"].tolist() == [-1, -1]
    assert own["spin"].tolist() == [1, 1] and np.allclose(own["positions"][:2], WATER[:2], atol=1e-6)
    assert np.allclose(own["labels/qcml/forces"][0], [0, 0, 0.5 * HARTREE / BOHR])
    assert skips(found) == [("only: is_outlier is another", "key1")]
    content = path.read_bytes()
    for damaged in (
        content[:-3],
        content[:20],
        content[:3] + b"\x01" + content[4:],
        content[:40] + b"\xff" + content[41:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"qcml-full"):
            records("table", path, mapping="qcml")


def test_colabfits_multiplicity_is_no_spin_and_its_stress_is_not_taken(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `table` is not installed")
    import pyarrow

    row = {
        "property_id": "PO_1", "multiplicity": 3, "method": "DFT-PBEsol", "energy": -20.5,
        "atomic_forces": [[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]], "cauchy_stress": [[1.0] * 3] * 3,
        "cauchy_stress_volume_normalized": True, "configuration_id": "CO_1", "cell": (np.eye(3) * 5).tolist(),
        "positions": [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], "pbc": [True, True, True], "atomic_numbers": [11, 17],
    }  # fmt: skip
    path = tmp_path / "co_0.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert recognise(path) == "table"
    own = block(records("table", path, mapping="colabfit"))
    assert own["labels/colabfit/energy"].tolist() == [-20.5] and own["spin"].tolist() == [1]
    assert "labels/colabfit/stress" not in own


# OPTIMADE


def optimade(number: int, **more) -> dict:
    attributes = {
        "cartesian_site_positions": [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], "lattice_vectors": (np.eye(3) * 4).tolist(),
        "dimension_types": [1, 1, 1], "species_at_sites": ["Ti1", "O"], "structure_features": [],
        "species": [
            {"name": "Ti1", "chemical_symbols": ["Ti"], "concentration": [1.0]},
            {"name": "O", "chemical_symbols": ["O"], "concentration": [1.0]},
        ],
        "_x_total_energy": -1.0 - number, "_x_hull_distance": 0.0, **more,
    }  # fmt: skip
    return {"id": f"x-{number}", "type": "structures", "attributes": attributes}


def test_optimade_needs_the_name_of_the_energy_and_refuses_what_was_not_calculated(tmp_path):
    half = {"name": "O", "chemical_symbols": ["O", "vacancy"], "concentration": [0.5, 0.5]}
    slab = {"dimension_types": [1, 1, 0], "lattice_vectors": [[4.0, 0, 0], [0, 4.0, 0], [None, None, None]]}
    entries = [
        optimade(0),
        optimade(1, species=[optimade(0)["attributes"]["species"][0], half]),
        optimade(2, structure_features=["disorder"]),
        optimade(3, **slab),
        optimade(4, _x_total_energy=None),
    ]
    page = {"links": {"next": "{["}, "meta": {"note": "data é"}, "data": entries, "included": []}
    path = tmp_path / "page.json"
    path.write_text(json.dumps(page, ensure_ascii=False), encoding="utf-8")
    assert recognise(path) == "optimade"
    with pytest.raises(ValueError, match=r"page\.json: .*--option energy=FIELD.*_x_total_energy, _x_hull_distance"):
        records("optimade", path)
    found = records("optimade", path, energy="_x_total_energy", energy_unit="hartree", energy_per_atom=True)
    first, surface = structures(found)
    assert first.numbers.tolist() == [22, 8] and first.labels["optimade"].energy == -2.0 * HARTREE
    assert surface.pbc.tolist() == [True, True, False] and surface.source_id == "x-3"
    assert skips(found) == [
        ("structure with partially occupied sites", "x-1"), ("structure with disorder", "x-2"),
        ("no _x_total_energy", "x-4"),
    ]  # fmt: skip
    lines = tmp_path / "export.jsonl"
    lines.write_text("\n".join(json.dumps(x) for x in [{"x-optimade": {}}, {"type": "info", "id": "/"}, *entries]))
    assert len(structures(records("optimade", lines, energy="_x_total_energy"))) == 2
    path.write_text(path.read_text(encoding="utf-8")[:-400], encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.json: truncated"):
        records("optimade", path, energy="_x_total_energy")


# QM9

METHANE = """5
gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t-40.47893\t-40.47606\t\
-40.475117\t-40.498597\t6.469\t
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 2.150416*^-3\t-0.0060313176\t 1.9761204*^-3\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 2.7657481*^-4\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""


def qm9_archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:bz2") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_qm9_numbers_vibrations_and_uncharacterized_molecules(tmp_path):
    second = METHANE.replace("gdb 1\t", "gdb 2\t")
    files = {"dsgdb9nsd_000001.xyz": METHANE, "dsgdb9nsd_000002.xyz": second, "readme.txt": "no molecule"}
    path = qm9_archive(tmp_path / "dsgdb9nsd.xyz.tar.bz2", files)
    assert recognise(path) == "qm9"
    found = records("qm9", path)
    one, two = structures(found)
    assert one.labels["qm9"].energy == pytest.approx((-40.47893 - 0.044749) * HARTREE, abs=1e-12)
    assert one.positions[1].tolist() == [2.150416e-3, -0.0060313176, 1.9761204e-3]
    assert (one.charge, one.spin, one.source_id) == (0, 1, "1") and one.relative == two.relative == "C"
    assert skips(found) == [("not a molecule of QM9", "readme.txt")]
    assert structures(records("qm9", path, energy="U0"))[0].labels["qm9"].energy == -40.47893 * HARTREE
    left_out = tmp_path / "uncharacterized.txt"
    left_out.write_text("3054 molecules\n\n=====\n 2  O=C  x  y\n")
    assert [s.source_id for s in structures(records("qm9", path, uncharacterized=left_out))] == ["1"]
    alpha = structures(records("qm9", path, properties="polarisability=alpha:intensive"))[0].labels
    assert alpha["polarisability"].value == 13.21
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"dsgdb9nsd\.xyz\.tar\.bz2"):
        records("qm9", path)


# GEMS


def gems(path: Path) -> Path:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE data (id INTEGER PRIMARY KEY, Q, S, Z, R, E, F, D)")
    database.execute("CREATE TABLE metadata (id INTEGER PRIMARY KEY, N)")
    database.execute("INSERT INTO metadata VALUES (1, 3)")
    positions, forces = WATER.astype("<f4").tobytes(), np.full((3, 3), 0.5, "<f4").tobytes()
    numbers = np.array([8, 1, 1], "<i4").tobytes()
    for row in (
        (0, 0, None, numbers, positions, -76.25, forces, b""),
        (1, 1, 1, numbers, positions, None, forces, b""),
        (2, 0, 0, numbers, positions[:-4], -1.0, forces, b""),
    ):
        database.execute("INSERT INTO data VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    database.commit()
    database.close()
    return path


def test_gems_counts_unpaired_electrons_and_is_no_database_of_ase(tmp_path):
    path = gems(tmp_path / "general_protein_fragments.db")
    assert recognise(path) == "gems"
    found = records("gems", path)
    first, second = structures(found)
    assert first.labels["gems"].energy == -76.25 and (first.charge, first.spin) == (0, None)
    assert (second.charge, second.spin) == (1, 2) and np.isnan(second.labels["gems"].energy)
    assert np.allclose(first.positions, WATER, atol=1e-7) and skips(found) == [
        ("positions of another length than the atoms", "2")
    ]
    module = reader("gems")
    assert module.parts(path, module.Options()) == [(0, 3)]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"general_protein_fragments\.db: truncated"):
        records("gems", path)


# Extended XYZ as others write it

OC20 = """2
Lattice="7.0 0.0 0.0 0.0 8.0 0.0 0.0 0.0 30.0" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 \
energy=-321.5 free_energy=-321.75 pbc="T T T"
Cu 0.0 0.0 10.0 F 0 0.0 0.0 0.25
O 0.0 0.0 12.0 T 2 0.0 0.0 -0.25
"""
MAD = """2
Lattice="4.0 0.0 0.0 0.0 4.0 0.0 0.0 0.0 4.0" Properties=species:S:1:pos:R:3:forces:R:3 subset=MC3D-rattled \
energy=-100.5 stress="1.0 0 0 0 1.0 0 0 0 1.0" pbc="T T T"
Na 0.0 0.0 0.0 0.0 0.0 0.5
Cl 2.0 2.0 2.0 0.0 0.0 -0.5
"""


@pytest.mark.parametrize(("text", "energy", "force"), [(OC20, -321.5, 0.25), (MAD, -100.5, 0.5)])
def test_extended_xyz_of_oc20_and_mad_is_read_packed_and_as_a_crystal(text, energy, force, tmp_path):
    path = tmp_path / "0.extxyz.xz"
    import lzma

    path.write_bytes(lzma.compress(text.encode()))
    assert recognise(path) == "extxyz"
    (one,) = structures(records("extxyz", path))
    assert one.labels["extxyz"].forces[0, 2] == force and one.pbc.all() and one.labels["extxyz"].energy == energy
