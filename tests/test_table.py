"""Tables by a mapping: one content in parquet, CSV and JSON, units and signs, nested columns, what is refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from multifid.preparation.prepare import prepare
from multifid.readers import table, table_files
from multifid.readers.contract import Skip
from multifid.readers.table_mapping import load_mapping
from multifid.store.store import Store

HARTREE, BOHR, KBAR = 27.211386245988, 0.529177210903, 1 / 1602.176634
FULL = pytest.mark.full
WATER = np.array([[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])
MOLECULES = {
    "numbers": "z", "positions": "xyz", "charge": 0, "group": "mol", "split": "part", "id": "name",
    "units": {"energy": "hartree", "length": "bohr"},
    "labels": {"dft": {"level_of_theory": "HF", "energy": "e", "forces": "g", "forces_are_gradient": True}},
}  # fmt: skip


def molecules(count=12) -> list[dict]:
    """Water and hydroxyl radicals by turns, in atomic units, with gradients."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        n = 3 - i % 2
        place = (WATER[:n] + random.normal(0, 0.02, (n, 3))) / BOHR
        gradient = random.normal(0, 0.01, (n, 3))
        part = ("train", "val", "test")[i // 2 % 3]
        row = {"z": [8, 1, 1][:n], "xyz": place.tolist(), "e": -76.0 - 0.01 * i, "g": gradient.tolist(), "mol": f"m{i}"}
        rows.append({**row, "part": part, "name": f"frame {i}"})
    return rows


def write(path: Path, rows: list[dict], row_group: int = 5) -> Path:
    ending = path.name.partition(".")[2]
    if ending == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `table` is not installed")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group)
    elif ending == "csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow([json.dumps(v) if isinstance(v, list) else v for v in row.values()])
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        path.write_text(json.dumps(rows))
    return path


def mapping(folder: Path, content: dict, **more) -> Path:
    path = folder / "mapping.yaml"
    path.write_text(yaml.safe_dump({**content, **more}))
    return path


def records(path: Path, content: dict, part=None) -> list:
    return list(table.read(path, table.Options(mapping=content), lambda far: None, part))


@pytest.mark.parametrize(
    "name", ["t.parquet", *(pytest.param(f"t.{x}", marks=FULL) for x in ("csv", "jsonl.gz", "json"))]
)
def test_one_content_is_the_same_store_from_any_kind_of_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "PART", 5)
    monkeypatch.setattr(table_files, "BATCH", 4)
    rows = molecules()
    write(tmp_path / name, rows)
    path = mapping(tmp_path, MOLECULES, files=name)
    store = prepare("table", [path], tmp_path / "store", trust_units=True, progress=False, workers=2)
    assert isinstance(store, Store) and store.structures == 12 and store.tasks == ["dft"]
    packed = store.read(np.arange(12))
    labels, flat = packed.labels["dft"], np.concatenate
    assert np.allclose(labels.energy, [row["e"] * HARTREE for row in rows])
    assert np.allclose(labels.forces, flat([-np.array(row["g"]) * HARTREE / BOHR for row in rows]), rtol=1e-6)
    assert np.allclose(packed.positions, flat([np.array(row["xyz"]) * BOHR for row in rows]), rtol=1e-6)
    assert packed.natoms.tolist() == [3, 2] * 6 and packed.spin.tolist() == [1, 2] * 6
    assert store.source_id(7) == "frame 7" and store.source_file(7) == name
    assert store.rows("split", np.arange(12)).tolist() == [0, 0, 1, 1, 2, 2] * 2
    manifest = store.manifest
    assert manifest["tasks"]["dft"]["level_of_theory"] == "HF"
    assert manifest["source"]["options"]["mapping"]["units"]["energy"] == "hartree"


def test_crystals_with_stress_in_kbar_and_voigt_and_virials_and_nested_columns_of_pymatgen(tmp_path):
    lattice = [[4.0, 0, 0], [0, 4.1, 0], [0.5, 0, 4.2]]
    stress = np.arange(1.0, 7.0)  # xx yy zz yz xz xy, kbar, positive under pressure
    full = np.array([[1, 6, 5], [6, 2, 4], [5, 4, 3.0]])
    virial = full * KBAR * np.linalg.det(lattice)
    sites = [{"species": [{"element": e, "occu": 1}], "xyz": [x, x, x]} for e, x in (("Na", 0.0), ("Cl", 2.0))]
    row = {
        "structure": {"lattice": {"matrix": lattice, "pbc": [True, True, True]}, "sites": sites},
        "six": stress.tolist(), "nine": full.tolist(), "virial": virial.tolist(),
        "energy.total": -7.0, "per_atom": -3.5,
    }  # fmt: skip
    content = {
        "symbols": "structure.sites.species.0.element",
        "positions": "structure.sites.xyz",
        "cell": "structure.lattice.matrix",
        "pbc": "structure.lattice.pbc",
        "units": {"energy": "eV", "length": "A", "stress": "kbar"},
        "labels": {
            "a": {"level_of_theory": "PBE", "energy": "energy.total", "stress": "six", "stress_sign": "compression"},
            "b": {"level_of_theory": "PBE", "energy": "per_atom", "energy_per_atom": True, "virial": "virial"},
            "c": {"level_of_theory": "PBE", "energy": "energy.total", "stress": "nine", "stress_sign": "tension"},
        },
    }
    for name in ("t.json", "t.parquet"):
        (block,) = records(write(tmp_path / name, [row] * 3), content)
        assert block.columns["numbers"].tolist() == [11, 17] * 3 and np.allclose(block.columns["cell"], lattice)
        assert np.allclose(block.columns["labels/a/stress"], -full * KBAR)
        assert np.allclose(block.columns["labels/b/stress"], -full * KBAR)
        assert np.allclose(block.columns["labels/c/stress"], full * KBAR)
        assert np.allclose(block.columns["labels/b/energy"], -7.0) and np.allclose(block.columns["positions"][1], 2.0)


def test_rows_that_do_not_fit_are_skips_that_name_the_key_and_the_row(tmp_path):
    rows = molecules(9)
    rows[0]["xyz"] = rows[0]["xyz"][:2]
    rows[1]["z"] = []
    rows[2]["z"] = [8, 1, 0]
    rows[3]["g"] = [[0.0, 0.0, 0.0]]
    rows[4]["part"] = "unknown"
    rows[5]["e"] = None
    rows[6]["g"] = None
    rows[7]["xyz"] = None
    expected = [
        ("positions of another length than the atoms", "frame 0"), ("no atoms", "frame 1"),
        ("atomic numbers are not whole numbers", "frame 2"),
        ("labels.dft.forces of another length than the atoms", "frame 3"),
        ("split: none of train, validation, test", "frame 4"),
        ("positions of another length than the atoms", "frame 7"),
    ]  # fmt: skip
    for name in ("t.parquet", "t.jsonl.gz"):
        *skips, block = records(write(tmp_path / name, rows), MOLECULES)
        skips = [s for s in [*skips, block] if isinstance(s, Skip)]
        assert [(s.reason, s.where) for s in skips] == expected
    rows = [*molecules(2), {**molecules(1)[0], "xyz": "a word", "name": "w"}]
    found = records(write(tmp_path / "w.json", rows), MOLECULES)
    assert found[0] == Skip("positions is not made of numbers", "w") and len(found[1]) == 2


def test_a_molecule_among_crystals_and_what_is_not_stated(tmp_path):
    rows = [{**row, "cell": np.eye(3).tolist() if i % 2 else None} for i, row in enumerate(molecules(4))]
    content = {**{k: v for k, v in MOLECULES.items() if k != "charge"}, "cell": "cell", "pbc": True}
    (block,) = records(write(tmp_path / "t.json", rows), content)
    assert block.columns["pbc"][:, 0].tolist() == [False, True] * 2
    assert (block.unstated == 3).all() and block.columns["spin"].tolist() == [1] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "xzy"}, r"t\.json: positions: there is no column 'xzy'; the file has z, xyz, e, g"),
        ({"units": {"energy": "eV", "length": "eV"}}, r"yaml: units: units\.length: 'eV' is not a unit of length"),
        ({"units": {"energy": "eV"}}, r"mapping\.yaml: units\.length: Field required"),
        ({"cells": "cell"}, r"mapping\.yaml: cells: unknown key; known are files, numbers"),
        ({"cell": "cell"}, r"mapping\.yaml: `cell` needs `pbc`"),
        ({"symbols": "s"}, r"mapping\.yaml: name one column of `numbers` or `symbols`"),
        ({"labels": {"a": {"level_of_theory": "x"}}}, r"labels\.a: a label set needs a column `energy` or `forces`"),
        ({"labels": {"a": {"level_of_theory": "x", "energy": "e", "stress": "s"}}}, r"and `stress_sign` go together"),
        ({"files": "nothing.json"}, r"there is no file .*nothing\.json"),
    ],
)  # fmt: skip
def test_a_mapping_that_says_too_little_or_too_much_is_an_error_that_names_the_key(change, message, tmp_path):
    write(tmp_path / "t.json", molecules())
    path = mapping(tmp_path, MOLECULES, **{"files": "t.json", **change})
    with pytest.raises((ValueError, OSError), match=message):
        prepare("table", [path], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_column_of_another_type_is_an_error_and_a_table_needs_a_mapping(tmp_path):
    write(tmp_path / "t.parquet", molecules())
    path = mapping(tmp_path, MOLECULES, numbers="name", files="t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet: numbers: column 'name' holds string, where numbers are"):
        prepare("table", [path], tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"a table needs one mapping, MAPPING\.yaml"):
        prepare("table", [tmp_path / "t.parquet"], tmp_path / "out", progress=False)
    options = {"mapping": str(mapping(tmp_path, MOLECULES))}
    made = prepare("table", [tmp_path / "t.parquet"], tmp_path / "o", options=options, trust_units=True, progress=False)
    assert made.structures == 12 and load_mapping(tmp_path / "mapping.yaml").files == ()


@pytest.mark.parametrize("name", [pytest.param("t.parquet", marks=FULL), "t.json", "t.csv"])
def test_damaged_tables_are_errors_that_name_the_file_or_counted_skips(name, tmp_path):
    path, random = write(tmp_path / name, molecules(24)), np.random.default_rng(2)
    whole, options = path.read_bytes(), table.Options(mapping=MOLECULES)
    damages = [whole[:n] for n in (0, 10, len(whole) // 2, len(whole) - 1)]
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        damages.append(bytes(flipped))
    for damage in damages:
        path.write_bytes(damage)
        try:
            for part in table.parts(path, options):
                assert all(isinstance(r, Skip) or len(r) for r in table.read(path, options, lambda far: None, part))
        except ValueError as error:
            assert name in str(error), error
