"""Copies of stores near the ranks: whole or not there, made once, never taken for another store."""

import shutil
from multiprocessing import get_context
from types import SimpleNamespace

import pytest

from multifid.feed import stage as module
from multifid.feed.stage import stage, staged_path
from multifid.store.fields import file_checksum
from multifid.store.store import Store


def content(folder):
    return {str(p.relative_to(folder)): file_checksum(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def store(stores):
    return Store(stores["apple"])


def test_a_copy_is_the_store_and_is_made_once(store, tmp_path):
    copy = stage(store, tmp_path / "near")
    assert content(copy) == content(store.path) and Store(copy, verify="open").checksum == store.checksum
    before = copy.stat()
    assert stage(store, tmp_path / "near") == copy and copy.stat() == before
    assert [p.name for p in (tmp_path / "near").iterdir()] == [f"apple-{store.checksum}"]


def test_what_a_killed_process_left_is_not_taken_for_a_copy(store, tmp_path):
    left = tmp_path / f".{staged_path(store, tmp_path).name}.partial"
    shutil.copytree(store.path, left)
    (left / "positions.npy").write_bytes(b"half")
    (left / "more").mkdir()
    assert content(stage(store, tmp_path)) == content(store.path)
    assert not left.exists()


def test_many_processes_make_one_copy(store, tmp_path):
    with get_context("spawn").Pool(3) as pool:
        assert set(pool.starmap(stage, [(store, tmp_path)] * 6)) == {staged_path(store, tmp_path)}
    assert content(staged_path(store, tmp_path)) == content(store.path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_store_is_not_copied(store, tmp_path):
    damaged = tmp_path / "apple"
    shutil.copytree(store.path, damaged)
    data = bytearray((damaged / "positions.npy").read_bytes())
    data[200] ^= 1
    (damaged / "positions.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"positions.npy is damaged in bytes 0\.\."):
        stage(Store(damaged), tmp_path / "near")
    assert list((tmp_path / "near").iterdir()) == []


def test_a_store_that_does_not_fit_is_refused_before_it_is_copied(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"has 0\.0 GB left, and .*apple needs"):
        stage(store, tmp_path)
    assert not staged_path(store, tmp_path).exists()
