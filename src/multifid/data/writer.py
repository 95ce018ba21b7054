"""Writes a store: structures stream in, one growing file per field, and nothing is a store before the last rename.

Everything goes to a hidden sibling `.NAME.partial` of the store to be. `commit` writes checksums and manifest, syncs
and renames. A killed writer leaves at most the hidden directory, which the next writer removes and starts anew: the
same input ends with the same bytes (no clock, no absolute path, no random number enters a file).

Memory does not grow with the number of structures: what is written is read again from the files themselves.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash

from multifid import __version__
from multifid.data.array_file import ArrayFile, Rows
from multifid.data.fields import (
    CHECKSUMS,
    HEADER,
    LABELS,
    MANIFEST,
    NO_SPLIT,
    SCHEMA,
    SKIPPED,
    Field,
    block_checksums,
    field,
)
from multifid.data.manifest import manifest_bytes
from multifid.structures.elements import MAX_Z
from multifid.structures.structure import SPLITS, Labels, Structure


class StoreWriter:
    """Append structures, `seal`, look at the fields, `commit`. As a context manager it cleans up unless committed.

    FileExistsError where `directory` exists already, BlockingIOError where another process is writing it.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        _refuse_existing(self.directory)
        self.partial = self.directory.parent / f".{self.directory.name}.partial"
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.partial, self.directory)
        for entry in self.partial.iterdir():  # what a killed writer left
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.structures = self.atoms = self._source_bytes = 0
        self.elements = np.zeros(MAX_Z + 1, np.int64)
        self.labels: dict[str, dict[str, int]] = {}
        self.skipped: dict[str, int] = {}
        self._files: dict[str, ArrayFile] = {}
        self._skipped_file: BinaryIO | None = None
        self._file("offsets").put(0)
        self._file("source_id_offsets").put(0)

    def append(self, structure: Structure) -> None:
        """Store one structure, which must be valid (`multifid.data.validate`)."""
        numbers = np.asarray(structure.numbers)
        source = np.frombuffer(structure.source_id.encode(), np.uint8)
        self._source_bytes += len(source)
        self._file("numbers").append(numbers)
        self._file("positions").append(structure.positions)
        self._file("natoms").put(len(numbers))
        self._file("offsets").put(self.atoms + len(numbers))
        self._file("split").put(NO_SPLIT if structure.split is None else SPLITS.index(structure.split))
        self._file("relative").put(xxhash.xxh3_64_intdigest(structure.relative.encode()))
        self._file("source_id").append(source)
        self._file("source_id_offsets").put(self._source_bytes)
        if structure.pbc is not None and np.any(structure.pbc):
            pbc = np.asarray(structure.pbc, bool)
            self._optional("pbc", pbc)
            self._optional("cell", np.where(pbc[:, None], np.asarray(structure.cell, np.float64), 0.0))
        if structure.charge != 0:
            self._optional("charge", np.int8(structure.charge))
        if structure.spin != 1:
            self._optional("spin", np.uint8(structure.spin))
        for task, labels in structure.labels.items():
            self._label(task, labels)
        self.elements += np.bincount(numbers, minlength=MAX_Z + 1)
        self.structures += 1
        self.atoms += len(numbers)

    def skip(self, file: str, where: str, reason: str) -> None:
        """Count a record that is not stored and list it in `skipped.jsonl`."""
        if self._skipped_file is None:
            self._skipped_file = (self.partial / SKIPPED).open("wb")
        line = json.dumps({"file": file, "where": where, "reason": reason}, ensure_ascii=False)
        self._skipped_file.write(line.encode() + b"\n")
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def seal(self) -> "dict[str, Rows]":
        """No more structures: finish the field files and return them, by field name."""
        for array in self._files.values():
            rows = {"structures": self.structures, "atoms": self.atoms}.get(array.what.rows)
            if rows is not None:
                array.pad(rows)
            array.close()
        if self._skipped_file is not None:
            _sync_and_close(self._skipped_file)
        return {name: Rows(array) for name, array in self._files.items()}

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
        present = np.flatnonzero(self.elements)
        body = {
            "schema": SCHEMA,
            "created_by": f"multifid {__version__}",
            "source": manifest.pop("source"),
            "structures": self.structures,
            "atoms": self.atoms,
            "elements": {str(z): int(self.elements[z]) for z in present},
            **manifest,
            "skipped": dict(sorted(self.skipped.items())),
            "files": dict(sorted(files.items())),
            "checksums": xxhash.xxh3_64_hexdigest(sums.tobytes()),
        }
        with (self.partial / MANIFEST).open("wb") as file:
            file.write(manifest_bytes(body))
            file.flush()
            os.fsync(file.fileno())
        for folder in (*(p for p in self.partial.rglob("*") if p.is_dir()), self.partial):
            _sync_folder(folder)
        _refuse_existing(self.directory)
        self.partial.rename(self.directory)
        _sync_folder(self.directory.parent)
        os.close(self._lock)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.partial.exists():
            shutil.rmtree(self.partial)
            os.close(self._lock)

    def _file(self, name: str) -> ArrayFile:
        if name not in self._files:
            self._files[name] = ArrayFile(self.partial / f"{name}.npy", field(name))
        return self._files[name]

    def _optional(self, name: str, value: np.ndarray | np.generic) -> None:
        """A field that most structures may lack: those before this one get the value that says nothing."""
        self._file(name).pad(self.structures)
        self._file(name).append(np.asarray(value)[None])

    def _label(self, task: str, labels: Labels) -> None:
        counts = self.labels.setdefault(task, dict.fromkeys(LABELS, 0))
        for kind, what in LABELS.items():
            value = getattr(labels, kind)
            if value is None or np.isnan(value).all():
                continue
            counts[kind] += 1
            array = self._file(f"labels/{task}/{kind}")
            array.pad(self.structures if what.rows == "structures" else self.atoms)
            array.append(value if what.rows == "atoms" else np.asarray(value)[None])

    def _whole(self, name: str, values: np.ndarray) -> None:
        """Write (or write again) a field that is known as a whole."""
        what = field(name)
        if name.startswith("index/") and self.structures > np.iinfo(np.uint32).max:
            what = Field("<u8", what.rows)
        array = self._files[name] = ArrayFile(self.partial / f"{name}.npy", what)
        array.append(values)
        array.close()

    def _listing(self) -> dict[str, dict[str, Any]]:
        """The manifest's `files`."""
        files: dict[str, dict[str, Any]] = {}
        for name, array in self._files.items():
            size = (self.partial / f"{name}.npy").stat().st_size
            files[f"{name}.npy"] = {"bytes": size, "dtype": array.what.dtype, "shape": list(array.shape)}
        if self._skipped_file is not None:
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


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
