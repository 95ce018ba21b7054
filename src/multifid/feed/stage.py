"""Copies a store to a place near the ranks: memory (/dev/shm) or a disk of the host, checked against its checksums.

A copy is called NAME-CHECKSUM, so it can never be taken for another store: the checksum is the manifest's, of every
byte, so that a store with the same content but other fitted numbers has another copy. It appears by rename, and stays:
the next run on this host finds it. Removing it is up to the user, or to the end of the batch job that owns the
directory.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from multifid.store.fields import BLOCK, CHECKSUMS, MANIFEST, damaged
from multifid.store.manifest import manifest_bytes, manifest_file
from multifid.store.store import Store


def stage(store: Store, directory: Path) -> Path:
    """The path of a store's copy in a directory of this host, which is made unless it is there.

    Several processes may ask for the same: one copies, the others wait. ValueError where the store is damaged (it names
    file and place), OSError where the copy does not fit.
    """
    target = staged_path(store, directory)
    with _alone(target) as partial:
        if partial is None:
            return target
        try:
            need = sum(entry["bytes"] for part in store.parts.each for entry in part.manifest["files"].values()) + BLOCK
            free = shutil.disk_usage(directory).free
            if need > free:
                raise OSError(f"{directory} has {free / 1e9:.1f} GB left, and {store.path} needs {need / 1e9:.1f} GB")
            _copy_all(store, partial)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target


def staged_path(store: Store, directory: Path) -> Path:
    return directory / f"{store.path.resolve().name}-{store.checksum}"


@contextmanager
def _alone(target: Path) -> Iterator[Path | None]:
    """An empty hidden directory that only this process writes, or None once the target is there."""
    partial = target.parent / f".{target.name}.partial"
    while not target.exists():
        partial.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # renamed or removed by another process
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not partial.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
                continue
            for entry in partial.iterdir():  # what a killed process left
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield partial
            return
        finally:
            os.close(handle)
    yield None


def _copy_all(store: Store, folder: Path) -> None:
    """Part by part. A store that is opened as it was before an addition is copied as it was."""
    for number, part in enumerate(store.parts.each):
        near = folder / part.path.relative_to(store.path)
        for name, sums in part.sums.items():
            _copy(part.path / name, near / name, sums.tolist())
        for name in (CHECKSUMS, *([MANIFEST] if number else [])):  # compared with what is said of them when opened
            shutil.copyfile(part.path / name, near / name)
        if number:
            earlier = manifest_file(folder, number - 1)
            earlier.parent.mkdir(exist_ok=True)
            shutil.copyfile(manifest_file(store.path, number - 1), earlier)
    (folder / MANIFEST).write_bytes(manifest_bytes(store.manifest))  # not the file, which may have become another one


def _copy(source: Path, target: Path, sums: list[int]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, target.open("wb") as copy:
        for block, expected in enumerate(sums):
            data = file.read(BLOCK)
            if xxhash.xxh3_64_intdigest(data) != expected:
                raise ValueError(damaged(source, block, source.stat().st_size))
            copy.write(data)
