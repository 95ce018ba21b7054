"""ADIOS2 files of HydraGNN: the two by its own writer, files with planted traps, damage, and writing them back."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from multifid.preparation.prepare import prepare
from multifid.readers import adios
from multifid.readers.contract import Skip
from multifid.store.store import Store
from multifid.structures.structure import SPLITS
from multifid.workflows.export_adios import KEYS, export_adios

adios2 = pytest.importorskip("adios2", reason="the extra `adios` is not installed")
LABELS = ("trainset", "valset", "testset")
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "hydragnn"
published = pytest.mark.skipif(not SHARED.is_dir(), reason="the published samples are not at hand")


def contents(path: Path) -> tuple[dict, dict]:
    """All variables, whole, with their types, and all attributes."""
    file = adios2.FileReader(str(path))  # never closed: it would leave a file with timings in /tmp
    variables = {}
    for name, about in file.available_variables().items():
        shape = [int(n) for n in about["Shape"].split(",")]
        variables[name] = np.asarray(file.read(name, [0] * len(shape), shape)).reshape(shape)
    return variables, file.available_attributes()


def write(path: Path, attributes: dict, **labels: dict) -> Path:
    """label -> key -> one array for each structure, along the first axis."""
    with adios2.Stream(str(path), "w") as file:
        for label, keys in labels.items():
            for key, arrays in keys.items():
                rows = np.array([len(a) for a in arrays])
                values = np.concatenate(arrays)
                file.write(f"{label}/{key}", values, values.shape, [0] * values.ndim, values.shape)
                for what, x in (("count", rows), ("offset", np.cumsum(rows) - rows)):
                    file.write(f"{label}/{key}/variable_{what}", x, x.shape, [0], x.shape)
                file.write_attribute(f"{label}/{key}/variable_dim", np.array(0))
            file.write_attribute(f"{label}/ndata", np.array(len(next(iter(keys.values())))))
            file.write_attribute(f"{label}/keys", list(keys))
        for name, value in attributes.items():
            file.write_attribute(name, value)
    return path


def waters(count: int, seed: int = 0) -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(seed)
    place = np.array([[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])
    return {
        "pos": [(place + random.normal(0, 0.03, (3, 3))).astype(np.float32) for _ in range(count)],
        "atomic_numbers": [np.array([[8], [1], [1]], np.float32)] * count,
        "energy": [np.array([[-2080.0 + random.normal()]], np.float32) for _ in range(count)],
        "forces": [random.normal(0, 0.5, (3, 3)).astype(np.float32) for _ in range(count)],
        "cell": [1000 * np.eye(3, dtype=np.float32)] * count,
        "pbc": [np.zeros(3, np.int32)] * count,
        "graph_attr": [np.array([0, 1], np.float32)] * count,
    }


def records(path: Path, **options) -> list:
    return list(adios.read(path, adios.Options(**options), lambda fraction: None))


@published
@pytest.mark.parametrize(("name", "rows"), [("ani1x", (60, 12, 12)), ("MPTrj", (40, 5, 6))])
def test_a_published_file_becomes_a_store_and_the_same_file_again(name, rows, tmp_path):
    """One by the reference's own writer -> store -> file: the same keys, types, attributes and values."""
    path = SHARED / f"{name}-v3.bp"
    store = prepare("adios", [path], tmp_path / "store", task=name, progress=False)
    assert [store.size(split) for split in SPLITS[:3]] == list(rows)
    assert store.manifest["splits"]["rule"] == "published"
    assert "float32" in next(iter(store.manifest["notes"]["precision"]))
    assert ("pbc" in store.manifest["files"] or "pbc.npy" in store.manifest["files"]) == (name == "MPTrj")
    export_adios(tmp_path / "store", tmp_path / f"{name}.bp")
    (theirs, their_attributes), (ours, our_attributes) = contents(path), contents(tmp_path / f"{name}.bp")
    assert set(our_attributes) >= set(their_attributes) - {"energy_linear_regression_coeff", "minmax_node_feature"}
    assert {k: v["Type"] for k, v in our_attributes.items()} == {k: their_attributes[k]["Type"] for k in our_attributes}
    assert set(ours) == set(theirs) and {v.dtype for v in ours.values()} == {v.dtype for v in theirs.values()}
    for label, count in zip(LABELS, rows, strict=True):
        there = _samples(theirs, label)
        for i, own in enumerate(_samples(ours, label)):
            where = int(store.source_id(int(store.index(SPLITS[LABELS.index(label)])[i])).split("/")[1])
            for key in set(KEYS) - {"edge_index", "edge_attr", "edge_shifts"}:
                assert own[key].dtype == there[where][key].dtype and own[key].shape == there[where][key].shape, key
                exact = key not in ("energy_per_atom", "y")  # theirs were divided before they were rounded
                assert np.allclose(own[key], there[where][key], rtol=0 if exact else 1e-6, atol=0), (label, i, key)
            if name == "ani1x":  # of crystals the reference's sample has no periodic images
                pairs = [{tuple(e): d for e, d in zip(s["edge_index"].T.tolist(), s["edge_attr"][:, 0], strict=True)}
                         for s in (own, there[where])]  # fmt: skip
                assert pairs[0].keys() == pairs[1].keys()
                assert all(abs(d - pairs[1][e]) < 1e-5 for e, d in pairs[0].items())
        assert count == len(_samples(ours, label))


def _samples(variables: dict[str, np.ndarray], label: str) -> list[dict[str, np.ndarray]]:
    """What the reference's reader makes of a label: rows offset .. offset + count of each key, along its axis."""
    keys = {name.split("/")[1] for name in variables if name.startswith(f"{label}/")}
    samples: list[dict] = [{} for _ in variables[f"{label}/natoms/variable_count"]]
    for key in keys:
        counts, offsets = (variables[f"{label}/{key}/variable_{what}"] for what in ("count", "offset"))
        for sample, n, at in zip(samples, counts, offsets, strict=True):
            sample[key] = variables[f"{label}/{key}"].take(np.arange(at, at + n), axis=int(key == "edge_index"))
    return samples


def test_periodic_edges_are_vectors_between_the_right_images(tmp_path):
    """A crystal written out: every edge is as long as it says, and each atom has its neighbours of the rock salt."""
    text = '2\nProperties=species:S:1:pos:R:3:forces:R:3 Lattice="4.2 0 0 0 4.2 0 0 0 4.2" energy=-7.0 pbc="T T T"\n'
    frame = text + "Na 0 0 0 0 0 0.1\nCl 2.1 2.1 2.1 0 0 -0.1\n"
    (tmp_path / "in.xyz").write_text(frame + frame.replace("4.2", "4.3") + frame.replace("4.2", "4.4"))
    prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "store", trust_units=True, progress=False)
    variables, _ = contents(export_adios(tmp_path / "store", tmp_path / "out.bp", cutoff=4.0))
    sample = _samples(variables, "trainset")[0]
    sender, receiver = sample["edge_index"]
    vectors = sample["pos"][receiver] - sample["pos"][sender] + sample["edge_shifts"]
    assert np.allclose(np.linalg.norm(vectors, axis=1), sample["edge_attr"][:, 0], atol=1e-5)
    assert len(sender) == 16 and np.allclose(sample["edge_attr"], 2.1 * np.sqrt(3), atol=1e-5)  # 8 of each, at a corner


def test_traps(tmp_path):
    """Dummy cells, radicals under the writer's default, one split of one key, keys that are code, broken structures."""
    path = write(tmp_path / "t.bp", {"dataset_name": "t"}, trainset=(made := waters(6)))
    (block,) = records(path)
    assert "cell" not in block.columns and block.columns["split"].tolist() == [0] * 6
    assert np.array_equal(block.columns["positions"], np.concatenate(made["pos"]).astype(np.float64))
    assert np.array_equal(block.columns["labels/adios/energy"], np.concatenate(made["energy"])[:, 0].astype(np.float64))

    made = waters(6)
    made["atomic_numbers"][1] = np.array([[8], [1], [6]], np.float32)  # an odd number of electrons, under (0, 1)
    made["forces"][2] = made["forces"][2][:2]
    made["graph_attr"][3] = np.array([-1, 2], np.float32)
    made["__import__('os').system('touch /tmp/executed')"] = [np.zeros((1, 1), np.float32)] * 6
    found = records(write(tmp_path / "u.bp", {}, valset=made))
    (skip,) = [r for r in found if isinstance(r, Skip)]
    assert (skip.where, skip.reason) == ("valset/2", "forces of another length than the atoms")
    (block,) = [r for r in found if not isinstance(r, Skip)]
    assert block.sources == [f"valset/{i}" for i in (0, 1, 3, 4, 5)]
    assert block.columns["spin"].tolist() == [1, 2, 2, 1, 1] and block.columns["charge"].tolist() == [0, 0, -1, 0, 0]
    assert block.unstated.tolist() == [0, 2, 0, 0, 0] and block.columns["split"].tolist() == [1] * 5


def test_numbers_positions_and_forces_may_lie_in_x_alone(tmp_path):
    made = waters(4)
    columns = [made.pop("atomic_numbers"), made.pop("pos"), made.pop("forces")]
    made["x"] = [np.concatenate(parts, axis=1) for parts in zip(*columns, strict=True)]
    (block,) = records(write(tmp_path / "x.bp", {}, testset=made))
    assert block.columns["numbers"].tolist() == [8, 1, 1] * 4
    assert np.array_equal(block.columns["labels/adios/forces"], np.concatenate(columns[2]).astype(np.float64))
    made["energy_per_atom"] = [e / 3 for e in made["energy"]]
    (block,) = records(write(tmp_path / "y.bp", {}, testset=made), energy="energy_per_atom")
    expected = 3 * np.concatenate(made["energy_per_atom"])[:, 0].astype(np.float64)
    assert np.allclose(block.columns["labels/aligned/energy"], expected, rtol=1e-12)


def test_parts_are_the_file_and_workers_make_the_same_store(tmp_path, monkeypatch):
    monkeypatch.setattr(adios, "PART", 8)
    made = {label: waters(n, seed=n) for label, n in zip(LABELS, (9, 2, 3), strict=True)}
    path = write(tmp_path / "w.bp", {}, **made)
    assert adios.parts(path, adios.Options()) == [(0, 8), (8, 14)]
    stores = [
        prepare(
            "adios", [tmp_path], tmp_path.parent / f"{tmp_path.name}-{n}", trust_units=True, workers=n, progress=False
        )
        for n in (1, 2)
    ]
    assert stores[0].checksum == stores[1].checksum
    assert [stores[0].size(split) for split in SPLITS[:3]] == [9, 2, 3]
    assert stores[0].source_id(10) == "valset/1"


def damage(path: Path, file: str, how: str) -> None:
    data = bytearray((path / file).read_bytes())
    if how == "gone":
        (path / file).unlink()
        return
    if how == "cut":
        data = data[: len(data) // 2]
    else:
        for place in range(64, len(data), max(1, len(data) // 40)):
            data[place] ^= 0xFF
    (path / file).write_bytes(data)


FULL = [("mmd.0", "flip"), ("mmd.0", "cut"), ("data.0", "cut"), ("md.0", "flip"), ("md.idx", "cut"), ("mmd.0", "gone")]


@pytest.mark.parametrize(("file", "how"), [("md.0", "cut"), *(pytest.param(*x, marks=pytest.mark.full) for x in FULL)])
def test_damage_is_an_error_that_names_the_file(file, how, tmp_path):
    path = write(tmp_path / "d.bp", {}, trainset=waters(40))
    damage(path, file, how)
    with pytest.raises(ValueError, match=r"d\.bp"):
        records(path, time_limit=2.0)


def outcome(path: Path, good: list, limit: float) -> str:
    """What reading a damaged file gives: an error that names it, or as many structures as there were."""
    try:
        found = records(path, time_limit=limit)
    except ValueError as error:
        assert path.name in str(error)
        return "error"
    assert sum(1 if isinstance(r, Skip) else len(r) for r in found) == sum(map(len, good))
    return "read"


def flipped(path: Path, whole: dict[str, bytes], random: np.random.Generator) -> str:
    """Flip one bit anywhere in the files of a sound copy, and name the file."""
    name = list(whole)[int(random.integers(len(whole)))]
    data = bytearray(whole[name])
    data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    for each, own in whole.items():
        (path / each).write_bytes(data if each == name else own)
    return name


@pytest.mark.parametrize("flips", [4, pytest.param(120, marks=pytest.mark.full)])
def test_a_flipped_bit_is_an_error_or_other_numbers_of_as_many_structures(flips, tmp_path):
    path, random = write(tmp_path / "b.bp", {}, trainset=waters(60), valset=waters(9)), np.random.default_rng(flips)
    good, whole = records(path), {p.name: p.read_bytes() for p in path.iterdir() if p.suffix != ".json"}
    for _ in range(flips):
        flipped(path, whole, random)
        outcome(path, good, limit=2.0)
    assert adios.Options().time_limit < 10  # seconds of one call of the library, where a user says nothing
    assert not list(Path("/tmp").glob("b.bp_*_profiling.json"))


@pytest.mark.full
def test_a_file_cut_anywhere_is_an_error(tmp_path):
    """Every 4 KB of every file of a file."""
    path = write(tmp_path / "c.bp", {}, trainset=waters(600), testset=waters(40))
    good = records(path)
    for file in ("data.0", "md.0", "md.idx", "mmd.0"):
        data = (path / file).read_bytes()
        for size in range(0, len(data), 4096):
            (path / file).write_bytes(data[:size])
            assert outcome(path, good, limit=2.0) == "error", (file, size)
        (path / file).write_bytes(data)
    assert outcome(path, good, limit=8.0) == "read"


def test_a_library_that_does_not_return_is_ended(tmp_path, monkeypatch):
    """In place of the library a module that waits for ever inside a call: an error in time, and no process is left."""
    stand_in = tmp_path / "stand_in"
    stand_in.mkdir()
    (stand_in / "adios2.py").write_text("import time\ndef FileReader(path):\n    time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", f"{stand_in}:{Path(adios.__file__).parents[2]}")
    path = write(tmp_path / "h.bp", {}, trainset=waters(2))
    with pytest.raises(ValueError, match=r"h\.bp: damaged, or very slow: .* 0\.5 s"):
        records(path, time_limit=0.5)
    (stand_in / "adios2.py").write_text("import os\ndef FileReader(path):\n    os.abort()\n")
    with pytest.raises(ValueError, match=r"h\.bp: reading it ended the process \(signal 6\)"):
        records(path)


def test_what_is_not_of_the_layout_says_what_is_missing(tmp_path):
    made = waters(2)
    del made["energy"], made["forces"]
    with pytest.raises(ValueError, match=r"n\.bp: trainset has no energy and no forces: its keys are pos, "):
        records(write(tmp_path / "n.bp", {}, trainset=made))
    with adios2.Stream(str(tmp_path / "o.bp"), "w") as file:
        file.write("a", np.zeros(3), [3], [0], [3])
    with pytest.raises(ValueError, match=r"o\.bp is not a file of HydraGNN"):
        records(tmp_path / "o.bp")


def test_a_store_without_forces_cannot_be_exported(tmp_path):
    frames = "".join(f"1\nProperties=species:S:1:pos:R:3 energy={-1 - k}\nH 0 0 0\n" for k in range(12))
    (tmp_path / "in.xyz").write_text(frames)
    prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "store", trust_units=True, progress=False)
    with pytest.raises(ValueError, match="no structure has an energy and a force on every atom"):
        export_adios(tmp_path / "store", tmp_path / "out.bp")
    assert not list(tmp_path.glob("*out.bp*")) and Store(tmp_path / "store").structures == 12
    shutil.rmtree(tmp_path / "store")
