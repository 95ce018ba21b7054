"""Writes a store: one growing file per field, and nothing is a store before the last rename.

Structures are appended here, or a place is reserved for them to which another process writes (`placing`).

Everything goes to a hidden sibling `.NAME.partial` of the store to be. `commit` writes checksums and manifest, syncs
and renames. A killed writer leaves at most the hidden directory, which the next writer removes and starts anew: the
same input ends with the same bytes (no clock, no absolute path, no random number enters a file).

Memory does not grow with the number of structures: what is written is read again from the files themselves.
"""

import fcntl
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from multifid import __version__
from multifid.store.array_file import ArrayFile, Rows
from multifid.store.block import Block, pack
from multifid.store.content import content_of
from multifid.store.fields import (
    CHECKSUMS,
    HEADER,
    LABELS,
    MANIFEST,
    SCHEMA,
    SKIPPED,
    Field,
    block_checksums,
    field,
)
from multifid.store.manifest import manifest_bytes
from multifid.store.placing import (
    Columns,
    Contents,
    Place,
    contents_of,
    field_file,
    place,
    place_skipped,
    skipped_line,
)
from multifid.structures.elements import MAX_Z
from multifid.structures.structure import SPLITS, Structure


class StoreWriter:
    """Append structures, `seal`, look at the fields, `commit`. As a context manager it cleans up unless committed.

    threads: so many files are on their way to the disk at once. FileExistsError where `directory` exists already,
    BlockingIOError where another process is writing it.
    """

    def __init__(self, directory: Path | str, threads: int = 1) -> None:
        self.directory = Path(directory)
        _refuse_existing(self.directory)
        self.partial = self.directory.parent / f".{self.directory.name}.partial"
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.partial, self.directory)
        for entry in self.partial.iterdir():  # what a killed writer left
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.structures = self.atoms = self._source_bytes = 0
        self.elements = np.zeros(MAX_Z + 1, np.int64)  # how many atoms of each
        self.labels: dict[str, dict[str, int]] = {}
        self.skipped: dict[str, int] = {}
        self._files: dict[str, ArrayFile] = {}
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)  # starts threads when they have something to do
        self._syncs: dict[Path, Future[None]] = {}  # files that are on their way to the disk
        self._skipped_bytes = 0
        for name in ("offsets", "source_id_offsets"):
            self._file(name).append(np.zeros(1, np.uint64))
        self._file("source_id")

    @property
    def present(self) -> list[int]:
        """The atomic numbers that occur."""
        return [int(z) for z in np.flatnonzero(self.elements)]

    def append(self, structure: Structure) -> None:
        """Store one structure, which must be valid (`multifid.preparation.validate`)."""
        self.append_block(pack([structure]))

    def append_block(self, block: Block) -> None:
        """Store structures, which must be valid (`multifid.preparation.validate`)."""
        sources = [source.encode() for source in block.sources]
        lengths = np.array([len(source) for source in sources], np.int64)
        self.append_columns(block.columns, np.frombuffer(b"".join(sources), np.uint8), lengths)

    def append_columns(self, columns: Columns, source_id: np.ndarray, lengths: np.ndarray) -> None:
        """Store structures as columns (`Block`), with their source ids end to end and the length of each in bytes."""
        contents = contents_of(columns, source_id)
        place(self.reserve(contents), contents, columns, source_id, lengths)

    def reserve(self, contents: Contents) -> Place:
        """Where structures go that come next; they are counted as stored, and must be written there (`place`)."""
        where = Place(self.partial, self.structures, self.atoms, self._source_bytes, self._skipped_bytes)
        here = {"structures": self.structures, "atoms": self.atoms}
        there = {"structures": self.structures + contents.structures, "atoms": self.atoms + contents.atoms}
        for name in contents.stored:
            array = self._file(name)
            if array.what.absent is not None:  # those before these may have said nothing
                array.pad(here[array.what.rows])
            array.rows = there[array.what.rows]
        self.structures, self.atoms = there["structures"], there["atoms"]
        self._source_bytes += contents.source_bytes
        self._file("source_id").rows = self._source_bytes
        for name in ("offsets", "source_id_offsets"):
            self._file(name).rows = self.structures + 1
        for name, count in contents.labels.items():
            _, task, kind = name.split("/")
            counts = self.labels.setdefault(task, dict.fromkeys(LABELS, 0))
            counts[kind] = counts.get(kind, 0) + count
        for z, count in contents.elements:
            self.elements[z] += count
        for reason, count in contents.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        if contents.skipped_bytes:
            (self.partial / SKIPPED).touch()
            self._skipped_bytes += contents.skipped_bytes
        return where

    def skip(self, file: str, where: str, reason: str) -> None:
        """Count a record that is not stored and list it in `skipped.jsonl`."""
        line = skipped_line(file, where, reason)
        place_skipped(self.reserve(Contents(skipped={reason: 1}, skipped_bytes=len(line))), line)

    def seal(self) -> "dict[str, Rows]":
        """No more structures: finish the field files and return them, by field name. They go to the disk meanwhile."""
        for array in self._files.values():
            rows = {"structures": self.structures, "atoms": self.atoms}.get(array.what.rows)
            if rows is not None:
                array.pad(rows)
            array.close()
            self._syncs[array.path] = self._pool.submit(to_disk, array.path)
        return {name: Rows(array) for name, array in sorted(self._files.items())}

    def commit(self, split: np.ndarray, manifest: dict[str, Any]) -> None:
        """Write split, index, checksums and manifest (to which counts and files are added), then rename.

        split: (structures,) codes 0..3.
        """
        self._whole("split", split)
        for code, name in enumerate(SPLITS):
            self._whole(f"index/{name}", np.flatnonzero(split == code))
        files = self._listing()
        names = sorted(files)
        sums = np.array([s for name in names for s in block_checksums(self.partial / name)], np.uint64)
        checksums = ArrayFile(self.partial / CHECKSUMS, Field("<u8", "blocks"))
        checksums.append(sums)
        checksums.close()
        files[CHECKSUMS] = {"bytes": HEADER + sums.nbytes, "dtype": "<u8", "shape": [len(sums)]}
        body = {
            "schema": SCHEMA,
            "created_by": f"multifid {__version__}",
            "source": manifest.pop("source"),
            "structures": self.structures,
            "atoms": self.atoms,
            "elements": {str(z): int(self.elements[z]) for z in self.present},
            **manifest,
            "skipped": dict(sorted(self.skipped.items())),
            "files": dict(sorted(files.items())),
            "content": content_of(files, sums).key,
            "checksums": xxhash.xxh3_64_hexdigest(sums.tobytes()),
        }
        (self.partial / MANIFEST).write_bytes(manifest_bytes(body))
        for entry in (*self.partial.rglob("*"), self.partial):
            if entry in self._syncs:
                self._syncs[entry].result()
            else:
                to_disk(entry)
        self._pool.shutdown()
        _refuse_existing(self.directory)
        self.partial.rename(self.directory)
        to_disk(self.directory.parent)
        os.close(self._lock)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._pool.shutdown(cancel_futures=True)
        if self.partial.exists():
            shutil.rmtree(self.partial)
            os.close(self._lock)

    def _file(self, name: str) -> ArrayFile:
        if name not in self._files:
            self._files[name] = ArrayFile(field_file(self.partial, name), field(name))
        return self._files[name]

    def _whole(self, name: str, values: np.ndarray) -> None:
        """Write (or write again) a field that is known as a whole."""
        what = field(name)
        if name.startswith("index/") and self.structures > np.iinfo(np.uint32).max:
            what = Field("<u8", what.rows)
        path = field_file(self.partial, name)
        if (sync := self._syncs.pop(path, None)) is not None:
            sync.result()
        array = self._files[name] = ArrayFile(path, what)
        array.append(values)
        array.close()

    def _listing(self) -> dict[str, dict[str, Any]]:
        """The manifest's `files`."""
        files: dict[str, dict[str, Any]] = {}
        for name, array in self._files.items():
            size = field_file(self.partial, name).stat().st_size
            files[f"{name}.npy"] = {"bytes": size, "dtype": array.what.dtype, "shape": list(array.shape)}
        if self._skipped_bytes:
            files[SKIPPED] = {"bytes": (self.partial / SKIPPED).stat().st_size, "dtype": None, "shape": None}
        return files


def _refuse_existing(directory: Path) -> None:
    if directory.exists() or directory.is_symlink():
        raise FileExistsError(f"{directory} exists already: a store is written once; remove it or choose another name")


def _lock(folder: Path, directory: Path) -> int:
    """Hold `folder` until the process ends: two writers of one store would mix their rows."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BlockingIOError(f"another process is writing {directory} (it holds {folder})") from error
    return handle


def to_disk(entry: Path) -> None:
    """A file or a folder to the disk."""
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
