"""The store: what goes in comes out bit for bit, damage is named and never read, a killed writer leaves no store."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import xxhash

from multifid.store.fields import BLOCK, CHECKSUMS, HEADER, npy_header
from multifid.store.store import Store
from multifid.store.writer import StoreWriter
from multifid.structures.structure import SPLITS, Labels, Structure

SPLIT_CYCLE = [0, 0, 0, 1, 2, 3]


def structures(count: int = 60, largest: int = 30, periodic: bool = True) -> list[Structure]:
    """Of all kinds: molecules and crystals, charged, and with labels of one, two or no kinds in two tasks."""
    random = np.random.default_rng(0)
    made = []
    for i in range(count):
        n = int(random.integers(1, largest + 1))
        labels = {}
        if i % 4 != 3:
            labels["a"] = Labels(random.normal(-45_000, 1), random.normal(0, 1, (n, 3)).astype(np.float32))
        if i % 3 == 0:
            stress = random.normal(0, 1, (3, 3)) if i % 2 else None
            labels["b"] = Labels(random.normal(0, 1) if i % 5 else float("nan"), None, stress)
        pbc = np.array([True, i % 4 == 0, True]) if periodic and i % 2 else None
        made.append(
            Structure(
                numbers=random.integers(1, 119, n),
                positions=random.normal(0, 9, (n, 3)),
                labels=labels,
                relative=f"r{i % 7}",
                source_id=f"é/{i}" if i % 10 else "",
                cell=None if pbc is None else random.normal(0, 9, (3, 3)),
                pbc=pbc,
                charge=-3 if i == 5 else 0,
                spin=4 if i == 7 else 1,
            )
        )
    return made


def write(path: Path, content: list[Structure], skips: int = 3) -> Store:
    with StoreWriter(path) as writer:
        for structure in content:
            writer.append(structure)
        for i in range(skips):
            writer.skip("input.xyz", str(i), "energy is NaN")
        writer.seal()
        split = np.resize(np.array(SPLIT_CYCLE, np.uint8), len(content))
        counts = {name: int((split == code).sum()) for code, name in enumerate(SPLITS)}
        writer.commit(
            split,
            {
                "source": {"format": "test", "files": [{"name": "input.xyz", "structures": len(content)}]},
                "tasks": {task: {"labels": labels} for task, labels in writer.labels.items()},
                "splits": {**counts, "seed": 0, "rule": "cycle"},
                "edges_per_atom": {},
            },
        )
    return Store(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write(tmp_path / "store", structures())


def same(read: np.ndarray, written: np.ndarray) -> bool:
    """Bit for bit, NaN included."""
    return read.tobytes() == np.ascontiguousarray(written, read.dtype).tobytes()


def test_every_structure_comes_back_bit_for_bit(store):
    for i, written in enumerate(structures()):
        read = store.read([i])
        n = len(written.numbers)
        assert same(read.numbers, written.numbers) and read.natoms.tolist() == [n]
        assert same(read.positions, written.positions)
        pbc = np.zeros(3, bool) if written.pbc is None else written.pbc
        cell = np.zeros((3, 3)) if written.cell is None else written.cell
        assert same(read.cell[0], cell) and same(read.pbc[0], pbc)
        assert (read.charge[0], read.spin[0]) == (written.charge, written.spin)
        assert store.source_id(i) == written.source_id and store.source_file(i) == "input.xyz"
        assert store.field("relative")[i] == xxhash.xxh3_64_intdigest(written.relative.encode())
        for task in ("a", "b"):
            labels = written.labels.get(task, Labels())
            assert same(read.labels[task].energy, np.array([labels.energy]))
        forces = written.labels["a"].forces if "a" in written.labels else np.full((n, 3), np.nan)
        assert same(read.labels["a"].forces, forces)
        stress = written.labels["b"].stress if "b" in written.labels else None
        assert same(read.labels["b"].stress[0], np.full((3, 3), np.nan) if stress is None else stress)
        assert read.labels["b"].forces is None and read.labels["a"].stress is None


def test_many_are_one_by_one_laid_end_to_end_in_any_order_with_repeats(store):
    chosen = np.random.default_rng(1).integers(0, store.structures, 200)
    packed, singles = store.read(chosen), [store.read([i]) for i in chosen]
    for name in ("numbers", "positions", "natoms", "cell", "pbc", "charge", "spin"):
        assert same(getattr(packed, name), np.concatenate([getattr(s, name) for s in singles]))
    assert same(packed.labels["a"].energy, np.concatenate([s.labels["a"].energy for s in singles]))
    assert same(packed.labels["a"].forces, np.concatenate([s.labels["a"].forces for s in singles]))
    assert same(packed.labels["b"].stress, np.concatenate([s.labels["b"].stress for s in singles]))
    assert list(store.read(chosen, ["b"]).labels) == ["b"]


def test_nothing_reads_as_nothing(store):
    packed = store.read([])
    assert packed.numbers.shape == (0,) and packed.positions.shape == (0, 3) and packed.cell.shape == (0, 3, 3)
    assert packed.labels["a"].energy.shape == (0,) and packed.labels["a"].forces.shape == (0, 3)


def test_every_array_file_is_plain_npy_of_the_dtype_that_the_manifest_says(store):
    for name, entry in store.manifest["files"].items():
        assert (store.path / name).stat().st_size == entry["bytes"]
        if entry["dtype"] is not None:
            array = np.load(store.path / name)
            assert array.dtype == np.dtype(entry["dtype"]) and list(array.shape) == entry["shape"]
    assert {name.removesuffix(".npy") for name in store.manifest["files"]} >= {"numbers", "labels/a/forces", "cell"}
    assert np.load(store.path / "numbers.npy").dtype == np.uint8
    assert np.load(store.path / "labels/a/energy.npy").dtype == np.float64
    assert np.load(store.path / "index/train.npy").dtype == np.uint32


def test_fields_that_no_structure_needs_are_absent(tmp_path):
    plain = structures(periodic=False)
    for structure in plain:
        structure.charge, structure.spin = 0, 1
    store = write(tmp_path / "plain", plain, skips=0)
    present = {p.name for p in store.path.rglob("*")}
    assert not present & {"cell.npy", "pbc.npy", "charge.npy", "spin.npy", "skipped.jsonl"}
    packed = store.read([3, 4])
    assert not packed.pbc.any() and not packed.cell.any() and packed.spin.tolist() == [1, 1]


def test_the_index_of_a_split_lists_its_structures(store):
    for code, name in enumerate(SPLITS):
        assert store.index(name).tolist() == np.flatnonzero(np.load(store.path / "split.npy") == code).tolist()
    with pytest.raises(ValueError, match="there is no split 'val'"):
        store.index("val")


def test_counts_are_those_of_the_structures(store):
    content = structures()
    assert (store.structures, store.atoms) == (60, sum(len(s.numbers) for s in content))
    numbers = np.concatenate([s.numbers for s in content])
    assert store.elements == {int(z): int((numbers == z).sum()) for z in np.unique(numbers)}
    assert store.tasks == ["a", "b"]
    with_a = sum("a" in s.labels for s in content)
    assert store.manifest["tasks"]["a"]["labels"] == {"energy": with_a, "forces": with_a, "stress": 0}
    assert store.manifest["skipped"] == {"energy is NaN": 3}
    assert [s["where"] for s in store.skipped()] == ["0", "1", "2"]


@pytest.mark.parametrize("bad", [[-1], [60], [0, 10**12], [1.5], [True]])
def test_an_index_that_is_none_is_an_index_error(store, bad):
    with pytest.raises(IndexError):
        store.read(bad)


def test_a_label_set_that_is_none_is_a_key_error(store):
    with pytest.raises(KeyError, match="it has a, b"):
        store.read([0], ["c"])
    with pytest.raises(KeyError, match="no field 'labels/b/forces'"):
        store.field("labels/b/forces")


def test_a_header_of_ours_is_what_numpy_writes(tmp_path):
    for array in (np.zeros((0, 3), "<f4"), np.zeros(7, "|b1"), np.zeros((2, 3, 3), "<f8")):
        header = npy_header(array.dtype.str, array.shape)
        (tmp_path / "x.npy").write_bytes(header + array.tobytes())
        assert len(header) == HEADER and np.load(tmp_path / "x.npy").shape == array.shape
    assert len(npy_header("<f8", (2**64 - 1, 3, 3))) == HEADER


def test_the_checksums_are_of_every_mebibyte_of_every_file_in_the_order_of_names(tmp_path):
    store = write(tmp_path / "store", structures(20, 20_000))
    expected = []
    for name in sorted(set(store.manifest["files"]) - {CHECKSUMS}):
        data = (store.path / name).read_bytes()
        expected += [xxhash.xxh3_64_intdigest(data[i : i + 2**20]) for i in range(0, len(data), 2**20)]
    assert np.load(store.path / CHECKSUMS).tolist() == expected
    assert max(entry["bytes"] for entry in store.manifest["files"].values()) > 2 * BLOCK


def test_a_flipped_byte_anywhere_is_an_error_that_names_the_file(store):
    random = np.random.default_rng(2)
    for file in sorted(p for p in store.path.rglob("*") if p.is_file()):
        intact = file.read_bytes()
        for place in {0, 9, HEADER - 2, len(intact) - 1, *random.integers(0, len(intact), 5).tolist()}:
            damaged = bytearray(intact)
            if place >= len(intact):
                continue
            damaged[place] ^= 1 << int(random.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=file.name):
                Store(store.path, verify="open")
        file.write_bytes(intact)
    Store(store.path, verify="open")


def test_a_truncated_or_missing_or_longer_file_is_an_error_at_opening(store):
    for file in sorted(p for p in store.path.rglob("*") if p.is_file()):
        intact = file.read_bytes()
        for data in (intact[:-1], intact[: len(intact) // 2], b"", intact + b"\0"):
            file.write_bytes(data)
            for verify in ("touch", "open", "off"):
                with pytest.raises(ValueError, match=file.name):
                    Store(store.path, verify=verify)
        file.unlink()
        with pytest.raises(ValueError, match=file.name):
            Store(store.path)
        file.write_bytes(intact)


def test_damage_is_found_at_first_touch_of_its_block_and_not_before(tmp_path):
    path = write(tmp_path / "store", structures(20, 20_000)).path
    file = path / "positions.npy"
    data = bytearray(file.read_bytes())
    data[BLOCK + 17] ^= 1
    file.write_bytes(data)
    store = Store(path)
    last_atom = np.cumsum(store.natoms.astype(int))
    clean = np.flatnonzero(HEADER + 12 * last_atom <= BLOCK)
    hit = int(np.flatnonzero(HEADER + 12 * last_atom > BLOCK + 17)[0])
    assert len(clean) > 0
    for _ in range(2):
        store.read(clean)
        with pytest.raises(ValueError, match=rf"positions.npy is damaged in bytes {BLOCK}\.\.{2 * BLOCK}"):
            store.read([hit])
    Store(path, verify="off").read([hit])


def test_every_block_is_verified_by_reading_everything_in_threads(tmp_path):
    store = write(tmp_path / "store", structures(20, 20_000))
    threads = [threading.Thread(target=store.read, args=(np.roll(np.arange(20), k),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    touched = store.parts.each[0].files["positions"]
    assert touched.left == 0 and touched.verified.all()
    assert store.parts.each[0].files["source_id"].left == 1


def test_what_is_no_store_is_refused(tmp_path, store):
    with pytest.raises(ValueError, match="is not a store: it has no manifest"):
        Store(tmp_path)
    with pytest.raises(ValueError, match="verify must be one of"):
        Store(store.path, verify="sometimes")
    manifest = json.loads((store.path / "manifest.json").read_text())
    (store.path / "manifest.json").write_text(json.dumps({**manifest, "schema": 3}))
    with pytest.raises(ValueError, match="schema 3"):
        Store(store.path)


def test_an_edited_manifest_is_refused(store):
    file = store.path / "manifest.json"
    file.write_text(file.read_text().replace('"rule": "cycle"', '"rule": "other"'))
    with pytest.raises(ValueError, match="was edited"):
        Store(store.path)


def test_a_store_travels_to_a_worker_process(store):
    copy = pickle.loads(pickle.dumps(store))
    assert copy.checksum == store.checksum and same(copy.read([1]).positions, store.read([1]).positions)


def test_the_same_input_gives_the_same_bytes_and_checksum(tmp_path):
    one, two = (write(tmp_path / name, structures()) for name in ("one", "two"))
    files = sorted(p.relative_to(one.path) for p in one.path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two.path) for p in two.path.rglob("*") if p.is_file())
    assert all((one.path / f).read_bytes() == (two.path / f).read_bytes() for f in files)
    assert one.checksum == two.checksum
    changed = structures()
    changed[50].positions = changed[50].positions + 1e-3
    assert write(tmp_path / "three", changed).checksum != one.checksum


def test_an_existing_path_is_not_overwritten(tmp_path):
    (tmp_path / "store").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        StoreWriter(tmp_path / "store")


def test_two_writers_of_one_store_do_not_mix(tmp_path):
    with (
        StoreWriter(tmp_path / "store"),
        pytest.raises(BlockingIOError, match="another process is writing"),
    ):
        StoreWriter(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_store import structures, StoreWriter
from pathlib import Path
import multifid.store.writer as module
writer = StoreWriter(Path({path!r}))
for structure in structures():
    writer.append(structure)
if {stage!r} == "append":
    os.kill(os.getpid(), signal.SIGKILL)
import numpy as np
writer.seal()
module.to_disk = lambda entry: os.kill(os.getpid(), signal.SIGKILL)  # the manifest is written, not renamed
writer.commit(np.zeros(60, np.uint8), {{"source": {{}}}})
"""


@pytest.mark.parametrize("stage", ["append", "commit"])
def test_a_killed_writer_leaves_no_store_and_the_next_one_starts_anew(tmp_path, stage):
    path = tmp_path / "store"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path), stage=stage)
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists() and [p.name for p in tmp_path.iterdir()] == [".store.partial"]
    again = write(path, structures())
    fresh = write(tmp_path / "fresh", structures())
    assert again.checksum == fresh.checksum and not (tmp_path / ".store.partial").exists()
    shutil.rmtree(path)
