"""`multifid add`: a store grows by a part behind it, holds what it would hold at once, and is never half a store."""

import fcntl
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from conftest import write_molecules
from multifid.feed.stage import stage
from multifid.preparation import append
from multifid.preparation import prepare as prepare_module
from multifid.preparation.prepare import prepare
from multifid.preparation.split import appended
from multifid.store.fields import BLOCK
from multifid.store.store import Store
from multifid.structures.structure import SPLITS, TRAIN, UNUSED
from multifid.workflows.derive import add, subset
from test_derive import rows
from test_identity import go, values_of
from test_train import assert_same_bits

LATER = {"quiet": True, "trust_units": True}  # of labels without physics


def made(folder: Path, name: str, frames: int = 40, seed: int = 1, **molecules) -> Path:
    path = folder / f"{name}.xyz"
    write_molecules(path, frames, 1.0, 0.0, seed=seed, **molecules)
    return path


def prepared(folder: Path, name: str, *files: Path, **options) -> Path:
    prepare("extxyz", files, folder / name, task="a", progress=False, trust_units=True, **options)
    return folder / name


def state_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_store_that_grew_holds_what_one_prepared_at_once_holds(tmp_path):
    """Rows, content, references and scale (fitted again); nothing that was stored is written, and no file is left."""
    files = [made(tmp_path, name, seed=k) for k, name in enumerate("xyz")]
    given = {"files_of_split": {"validation": files[1:2]}, "fractions": (1, 0, 0)}
    whole = Store(prepared(tmp_path, "whole", files[0], files[2], **given))
    grown = prepared(tmp_path, "grown", files[0], fractions=(1, 0, 0))
    before = state_of(grown)
    add(grown, files[2:], **LATER)
    store = add(grown, [], validation=files[1:2], refit=True, **LATER)
    after = state_of(grown)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert after["earlier/0.json"] == before["manifest.json"]
    assert not [name for name in after if "partial" in name] and not list(grown.glob(".*"))
    assert rows(store) == rows(whole)
    assert store.content == whole.content and store.content.key == whole.content.key
    for key in ("references", "scale", "complete", "labels", "undetermined"):
        assert store.manifest["tasks"]["a"][key] == whole.manifest["tasks"]["a"][key], key
    for key in ("structures", "atoms", "elements", "edges_per_atom"):
        assert store.manifest[key] == whole.manifest[key], key
    assert [store.source_file(i) for i in (0, 40, 80)] == ["x.xyz", "z.xyz", "y.xyz"]
    for split in SPLITS:
        assert np.array_equal(store.index(split), whole.index(split))
        places = np.random.default_rng(0).permutation(whole.size(split))
        assert np.array_equal(store.pick(split, places), whole.pick(split, places))
    mixed = np.random.default_rng(1).integers(0, store.structures, 200)
    here, there = store.read(mixed), whole.read(mixed)
    assert np.array_equal(here.positions, there.positions) and np.array_equal(here.natoms, there.natoms)
    assert np.array_equal(here.labels["a"].forces, there.labels["a"].forces)
    assert all(np.array_equal(store.field(name), whole.field(name)) for name in ("natoms", "offsets", "numbers"))


def test_the_content_is_that_of_one_file_across_many_blocks(tmp_path, monkeypatch):
    """With small blocks parts begin and end inside them; the same structures in one piece have the same hash."""
    for module in ("store.fields", "store.array_file", "store.content", "store.joined", "store.part"):
        monkeypatch.setattr(f"multifid.{module}.BLOCK", 1 << 10)
    assert BLOCK == 1 << 20
    files = [made(tmp_path, name, frames=n, seed=n) for name, n in (("x", 90), ("y", 31), ("z", 7))]
    grown = prepared(tmp_path, "grown", files[0])
    for file in files[1:]:
        store = add(grown, [file], **LATER)
    assert store.additions == 2 and len(store.parts.each[0].sums["positions.npy"]) > 3
    copy = subset(grown, tmp_path / "copy", ["atoms > 0"])
    assert copy.additions == 0 and copy.content == store.content


def test_old_structures_keep_their_split_and_relatives_go_with_them(tmp_path):
    old = Store(prepared(tmp_path, "s", made(tmp_path, "x", seed=1), fractions=(0.6, 0.2, 0.2)))
    split, relative = old.field("split").copy(), old.field("relative").copy()
    store = add(tmp_path / "s", [made(tmp_path, "y", seed=2)], **LATER)
    assert np.array_equal(store.field("split")[:40], split)
    home = dict(zip(relative.tolist(), split.tolist(), strict=True))
    new = zip(store.field("relative")[40:].tolist(), store.field("split")[40:].tolist(), strict=True)
    assert {known for name, own in new if (known := home.get(name, own)) != own} == set()
    about = store.manifest["tasks"]["a"]
    assert about["references"] == old.manifest["tasks"]["a"]["references"]
    assert about["scale"] == old.manifest["tasks"]["a"]["scale"]
    assert store.manifest["parts"][0]["parent"] == old.content.key


def test_duplicates_of_what_is_stored_are_set_aside_where_that_is_asked(tmp_path):
    first = made(tmp_path, "x")
    store = prepared(tmp_path, "s", first)
    (tmp_path / "y.xyz").write_text(first.read_text() + made(tmp_path, "z", frames=5, seed=9).read_text())
    grown = add(store, [tmp_path / "y.xyz"], drop_duplicates=True, **LATER)
    split = grown.field("split")
    assert (split[40:80] == UNUSED).all() and not (split[80:] == UNUSED).any() and not (split[:40] == UNUSED).any()
    assert grown.manifest["splits"]["duplicates"] == 40


WATER = "3\nProperties=species:S:1:pos:R:3 energy={energy}\nO 0 0 0\nH 0 {a} 1.11\nH 0 {b} 1.11\n"


def one(energy: float, symbol: str = "N", key: str = "energy") -> str:
    return f"2\nProperties=species:S:1:pos:R:3:forces:R:3 {key}={energy}\n{symbol} 0 0 0 0 0 0\nH 0 0 1.1 0 0 0\n"


def test_other_data_are_refused_and_the_store_is_as_it_was(tmp_path):
    first = made(tmp_path, "x")
    store = prepared(tmp_path, "s", first, level_of_theory="PBE")
    before = state_of(store)
    more = made(tmp_path, "y", seed=2)
    wrong = tmp_path / "wrong.xyz"
    wrong.write_text(one(-3.0, "U"))
    pbe = {"level_of_theory": "PBE", **LATER}
    bohr = tmp_path / "bohr.xyz"
    bohr.write_text("".join(WATER.format(energy=-5.0 - 0.01 * k, a=1.43 + 0.002 * k, b=-1.43) for k in range(60)))
    for files, options, message in (
        ([more], LATER, "level of theory of 'a': 'PBE' in .* in the files"),
        ([first], pbe, r"x\.xyz is in .* already"),
        ([more], {**pbe, "task": "b"}, "has no label set 'b': it has a"),
        ([bohr], {**pbe, "trust_units": False}, "units are doubtful.*bohr taken for angstrom"),
        ([wrong], pbe, "no reference energy of U: --refit"),
        ([tmp_path / "none.xyz"], pbe, "there is no file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
            add(store, files, **{"format": "extxyz", **options})
        assert state_of(store) == before, message
    with pytest.raises(FileNotFoundError, match="there is no store"):
        add(tmp_path / "nowhere", [more], **LATER)
    grown = add(store, [wrong], train=[more], refit=True, **pbe)
    assert 92 in grown.elements and "92" in grown.manifest["tasks"]["a"]["references"]


def killed(place: str, store: Path, file: Path) -> int:
    """The signal that ended a process which adds a file and is killed at a place."""
    if (child := os.fork()) == 0:
        whole = append.to_disk

        def die(*given) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if place == "before the part":
            prepare_module.finish = die
        if place == "before the manifest":
            append._commit = die
        append.to_disk = lambda entry: die() if entry.name == place else whole(entry)
        try:
            add(store, [file], **LATER)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("place", ["before the part", "before the manifest", ".manifest.json.partial"])
def test_killed_in_the_middle_the_store_is_as_it_was_and_the_same_command_adds(place, tmp_path):
    store, more = prepared(tmp_path, "s", made(tmp_path, "x")), made(tmp_path, "y", seed=2)
    expected = Store(shutil.copytree(store, tmp_path / "other"))
    expected = add(tmp_path / "other", [more], **LATER)
    before = Store(store)
    assert killed(place, store, more) == signal.SIGKILL
    assert (store / "part-1" / "manifest.json").exists() == (place != "before the part")
    assert bool(list(store.glob(".part-1.parts/*.piece"))) == (place == "before the part")  # gone on with
    after = Store(store, verify="open")
    assert (after.checksum, after.structures) == (before.checksum, before.structures)
    assert add(store, [more], **LATER).checksum == expected.checksum
    assert state_of(store) == state_of(tmp_path / "other")


def test_two_additions_at_once_are_refused(tmp_path, monkeypatch):
    store, more = prepared(tmp_path, "s", made(tmp_path, "x")), made(tmp_path, "y", seed=2)
    monkeypatch.setattr(append, "PATIENCE", 0.1)
    held = os.open(store, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match=f"another process is adding to {store}"):
        add(store, [more], **LATER)
    os.close(held)
    assert add(store, [more], **LATER).structures > Store(tmp_path / "s", additions=0).structures


@pytest.fixture
def two(tmp_path) -> Path:
    for name, seed in (("a", 1), ("b", 2)):
        path = made(tmp_path, name, seed=seed)
        prepare("extxyz", [path], tmp_path / name, task=name, progress=False, fractions=(0.6, 0.2, 0.2))
    return tmp_path


def test_a_run_goes_on_with_what_it_began_with(two):
    """The same bits as without the addition."""
    whole, _ = go(values_of(two, "whole"))
    go(values_of(two), upto=3)
    add(two / "a", [made(two, "x", seed=3)], refit=True, **LATER)
    run, said = go(values_of(two))
    assert "40 structures were added to" in said and "goes on with the 40 that it began with" in said
    assert_same_bits(whole, run)


@pytest.mark.full
def test_a_run_that_began_between_two_additions_goes_on_staged_and_a_new_one_sees_all(two):
    add(two / "a", [made(two, "x", seed=3)], refit=True, **LATER)
    whole, _ = go(values_of(two, "whole"))
    go(values_of(two), upto=3)
    add(two / "a", [made(two, "y", seed=4)], **LATER)
    near = Store(stage(Store(two / "a", additions=1), two / "near"), verify="open")
    assert near.additions == 1 and near.content == Store(two / "a", additions=1).content
    run, said = go(values_of(two, train={"stage": str(two / "near")}))
    assert "40 structures were added to" in said and "goes on with the 80 that it began with" in said
    assert_same_bits(whole, run)
    _, said = go(values_of(two, "new"))
    assert Store(two / "a").structures == 120 and "began with" not in said


def test_a_store_of_several_parts_is_one_input(tmp_path):
    """Under a directory of stores too; what it becomes has the same content."""
    store = prepared(tmp_path / "all", "s", made(tmp_path, "x"))
    grown = add(store, [made(tmp_path, "y", seed=2)], **LATER)
    taken = prepare("store", [tmp_path / "all"], tmp_path / "out", trust_units=True, keep_splits=True, progress=False)
    assert taken.content == grown.content
    with pytest.raises(ValueError, match="2 times, not 3"):
        Store(add(store, [made(tmp_path, "z", seed=3)], **LATER).path, additions=3)


def test_parts_of_two_stores_do_not_mix(tmp_path):
    store = prepared(tmp_path, "s", made(tmp_path, "x"))
    add(store, [made(tmp_path, "y", seed=2)], **LATER)
    shutil.copyfile(store / "earlier" / "0.json", store / "part-1" / "manifest.json")
    with pytest.raises(ValueError, match="parts of two stores are mixed"):
        Store(store)


def test_train_takes_relatives_that_are_in_several_splits():
    stored = np.array([5, 5, 6, 7], np.uint64), np.array([2, 0, 1, 3], np.uint8)
    relative = np.array([5, 6, 7, 5], np.uint64)
    published, file = np.array([255, 255, 255, 1], np.uint8), np.zeros(4, np.uint32)
    divided = appended(relative, published, file, [None], "formula", stored, (0.8, 0.1, 0.1), 0)
    assert divided.split.tolist() == [TRAIN, 1, TRAIN, 1]
