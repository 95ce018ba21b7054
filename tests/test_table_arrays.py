"""Tables of arrays: HDF5 and zarr by a mapping, held to the readers of the same files, and what is refused."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from multifid.preparation.prepare import prepare
from multifid.readers import reader, table, table_arrays
from multifid.readers.contract import Skip
from multifid.store.block import Block

HARTREE, BOHR = 27.211386245988, 0.529177210903
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WATER = np.array([[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])
MAPPING = {
    "numbers": "z", "positions": "r", "units": {"energy": "eV", "length": "angstrom"},
    "labels": {"dft": {"level_of_theory": "HF", "energy": "e", "forces": "f"}},
}  # fmt: skip


def records(path: Path, mapping: dict, part=None) -> list:
    return list(table.read(path, table.Options(mapping=mapping), lambda far: None, part))


def columns(found: list) -> dict[str, np.ndarray]:
    blocks = [one for one in found if isinstance(one, Block)]
    return {name: np.concatenate([block.columns[name] for block in blocks]) for name in blocks[0].columns}


def conformers(count: int) -> np.ndarray:
    return WATER + np.random.default_rng(0).normal(0, 0.02, (count, 3, 3))


@pytest.fixture
def groups(tmp_path):
    """Groups of conformers, of one structure, and below another group; charge and name as attributes."""
    path = tmp_path / "groups.h5"
    with h5py.File(path, "w") as file:
        for name, positions in (("w", conformers(4)), ("train/one", WATER), ("val/oh", WATER[None, :2])):
            group = file.create_group(name)
            natoms = positions.shape[-2]
            group["z"] = np.array([[8], [1], [1]])[:natoms]  # a column for each atom, as some converters write it
            group["r"], group["f"] = positions, np.ones(positions.shape)
            group["e"] = np.arange(float(len(positions))) if name == "w" else np.array(-76.0)
            group.attrs["q"] = -1 if name == "val/oh" else 0
            group.attrs["name"] = f"molecule {name}"
        file.create_group("notes")["text"] = "nothing"
    return path


def test_groups_of_conformers_and_of_one_structure_are_read_with_attributes_and_paths(groups):
    found = records(groups, {**MAPPING, "charge": "@q", "group": "@name"})
    (block,) = found
    own = block.columns
    assert block.sources == ["train/one", "val/oh", "w/0", "w/1", "w/2", "w/3"]
    assert own["natoms"].tolist() == [3, 2, 3, 3, 3, 3] and own["charge"].tolist() == [0, -1, 0, 0, 0, 0]
    assert own["labels/dft/energy"].tolist() == [-76.0, -76.0, 0.0, 1.0, 2.0, 3.0]
    assert len(set(own["relative"].tolist())) == 3  # conformers of one group are relatives
    assert np.array_equal(own["positions"][5:8], conformers(4)[0])
    split = records(groups, {**MAPPING, "split": "$path.0", "within": ["train", "val"]})
    assert columns(split)["split"].tolist() == [0, 1]


def test_the_parts_of_a_file_are_the_file(groups, monkeypatch):
    whole = columns(records(groups, MAPPING))
    monkeypatch.setattr(table_arrays, "PART", 3)
    monkeypatch.setattr(table_arrays, "BATCH", 2)
    cuts = table.parts(groups, table.Options(mapping=MAPPING))
    pieces = columns([record for part in cuts for record in records(groups, MAPPING, part)])
    assert len(cuts) > 1 and all(np.array_equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.skipif(not SHARED.exists(), reason="the published samples are not here")
@pytest.mark.parametrize(
    ("format", "name", "mapping"),
    [
        (
            "ani1x",
            "ani1x/modelforge_ani1_n5.hdf5",
            {
                "numbers": "atomic_numbers", "positions": "coordinates", "charge": 0,
                "units": {"energy": "hartree", "length": "angstrom"},
                "labels": {"ani1x": {
                    "level_of_theory": "x", "energy": "wb97x_dz.energy", "forces": "wb97x_dz.forces",
                }},
            },
        ),
    ],
)  # fmt: skip
def test_a_mapping_reads_a_published_file_as_its_own_reader_does(format, name, mapping):
    module = reader(format)
    own = [r for r in module.read(SHARED / name, module.Options(), lambda far: None, None) if not isinstance(r, Skip)]
    mine = columns(records(SHARED / name, mapping))
    theirs = columns(own)
    for key in ("numbers", "natoms", "positions", "labels/ani1x/energy", "labels/ani1x/forces"):
        assert np.allclose(mine[key], theirs[key], rtol=1e-10, atol=1e-12), key


def flat(root, padded: bool) -> None:
    """Water and hydroxyl, padded to three atoms or laid end to end, in a group of HDF5 or zarr."""
    if padded:
        root["z"], root["r"] = np.array([[8, 1, 1], [8, 1, 0]]), np.stack([WATER, WATER])
        root["f"] = np.arange(18.0).reshape(2, 3, 3)
    else:
        root["n"], root["z"] = np.array([3, 2]), np.array([8, 1, 1, 8, 1])
        root["r"], root["f"] = np.concatenate([WATER, WATER[:2]]), np.arange(15.0).reshape(5, 3)
    root["e"], root["cell"] = np.array([-76.0, -75.0]), np.eye(3)[None] * [[[9.0]], [[8.0]]]
    root["which"] = np.array([1, 1])


@pytest.mark.parametrize("kind", ["h5", "zarr"])
@pytest.mark.parametrize("padded", [True, False])
def test_arrays_of_all_structures_are_read_padded_or_laid_end_to_end(kind, padded, tmp_path):
    path = tmp_path / f"flat.{kind}"
    if kind == "zarr":
        flat(pytest.importorskip("zarr", reason="the extra `zarr` is not installed").open_group(str(path)), padded)
    else:
        with h5py.File(path, "w") as file:
            flat(file, padded)
    mapping = {**MAPPING, "cell": "cell", "pbc": True, "only": {"which": [1, 2]}}
    own = columns(records(path, mapping if padded else {**mapping, "natoms": "n"}))
    assert own["natoms"].tolist() == [3, 2] and own["numbers"].tolist() == [8, 1, 1, 8, 1]
    assert own["labels/dft/energy"].tolist() == [-76.0, -75.0] and own["cell"][1, 0, 0] == 8.0
    assert own["labels/dft/forces"][3].tolist() == [9.0, 10.0, 11.0]
    assert records(path, {**mapping, "only": {"which": 0}} | ({} if padded else {"natoms": "n"}))[0] == Skip(
        "only: which is another", "0"
    )


def test_what_does_not_fit_costs_its_group_and_a_missing_column_is_an_error(groups):
    with h5py.File(groups, "a") as file:
        del file["train/one/z"]
        file["w"].create_dataset("short", data=np.arange(3.0))
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/")
        file["again"] = h5py.SoftLink("/w")
        file["w/loop"] = file["w"]  # a hard link to itself
        large = file.create_group("large")
        large.create_dataset("r", (1 << 22, 3, 3), "f8", chunks=(1 << 16, 3, 3), fillvalue=1.0)
    found = records(groups, MAPPING)
    assert {(r.reason, r.where) for r in found if isinstance(r, Skip)} == {
        ("numbers: record without z", "train/one"),
        ("a dataset unpacks to more than is plausible", "large"),
    }
    assert columns(found)["natoms"].tolist() == [2, 3, 3, 3, 3]
    (skip,) = [r for r in records(groups, _labels(energy="short")) if isinstance(r, Skip) and r.where == "w"]
    assert skip.reason == "labels.dft.energy: another length than the structures"
    with pytest.raises(ValueError, match=r"groups\.h5: labels\.dft\.forces: there is no 'g' in the first 4 groups"):
        records(groups, _labels(forces="g"))
    with pytest.raises(ValueError, match=r"positions: no group has 'x'"):
        records(groups, {**MAPPING, "positions": "x"})


def _labels(**own: str) -> dict:
    return {**MAPPING, "labels": {"dft": {**MAPPING["labels"]["dft"], **own}}}


@pytest.mark.parametrize("size", [100, 5_000])
def test_a_damaged_file_is_an_error_that_names_it(size, groups):
    groups.write_bytes(groups.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"groups\.h5"):
        records(groups, MAPPING)


def test_a_store_of_zarr_is_a_table_and_missing_or_damaged_chunks_are_told(tmp_path):
    zarr = pytest.importorskip("zarr", reason="the extra `zarr` is not installed")
    path = tmp_path / "water.zarr"
    root = zarr.open_group(str(path))
    root["z"], root["r"] = np.array([8, 1, 1]), conformers(20)
    root["e"], root["f"] = -76.0 + np.arange(20.0) / 100, np.zeros((20, 3, 3))
    (tmp_path / "m.yaml").write_text(json.dumps({**MAPPING, "files": "water.zarr"}))
    store = prepare("table", [tmp_path / "m.yaml"], tmp_path / "store", trust_units=True, progress=False)
    assert store.structures == 20
    chunk = next(p for p in (path / "r").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"water\.zarr: truncated, damaged"):
        records(path, MAPPING)
    chunk.unlink()
    assert [r.reason for r in records(path, MAPPING)] == ["chunks of an array are missing"]


def test_pickles_in_a_store_of_zarr_are_not_executed(tmp_path):
    zarr = pytest.importorskip("zarr", reason="the extra `zarr` is not installed")
    path, sign = tmp_path / "hostile.zarr", tmp_path / "executed"
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root["r"], root["e"], root["f"] = conformers(2), np.zeros(2), np.zeros((2, 3, 3))
    (path / "z").mkdir()
    (path / "z" / ".zarray").write_text(
        json.dumps(
            {
                "chunks": [2], "shape": [2], "dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}],
                "compressor": None, "fill_value": 0, "order": "C", "zarr_format": 2,
            }
        )
    )  # fmt: skip
    (path / "z" / "0").write_bytes(f"cos\nsystem\n(S'touch {sign}'\ntR.".encode())
    try:
        found = records(path, MAPPING)
        assert [type(r) for r in found] == [Skip]
    except ValueError as error:
        assert "hostile.zarr" in str(error)
    assert not os.path.exists(sign)
