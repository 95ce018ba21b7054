"""One part of a store: field files in one folder, memory-mapped, and the manifest that promises what they are.

A store that was prepared at once is one part. Files that are added later are another part behind it (`joined`), with
structures and atoms that are counted from 0 again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multifid.store.array_file import MappedFile
from multifid.store.content import Content, content_of
from multifid.store.fields import BLOCK, CHECKSUMS, FIELDS, LABELS, MANIFEST, PROPERTIES, SKIPPED, blocks, field
from multifid.store.manifest import check_array, check_size, open_checksums, verify_text
from multifid.structures.properties import OF_ATOMS
from multifid.structures.structure import SPLITS, Packed, PackedLabels

GEOMETRY = ("natoms", "offsets", "numbers", "positions", "cell", "pbc", "charge", "spin")  # fields, beside labels


class Part:
    """Field files in a folder. ValueError where they are not what the manifest says, naming file and place.

    Attributes:
        path: the folder.
        manifest: of this part.
        files: field name -> its mapped file.
        sums: file name, as the manifest lists it -> checksums of its blocks.
        content: hashes of its data.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], verify: str) -> None:
        self.path, self.manifest, self.verify = path, manifest, verify
        self.structures: int = manifest["structures"]
        self.atoms: int = manifest["atoms"]
        checksums = open_checksums(path, manifest)
        self.sums: dict[str, np.ndarray] = {}
        self.files = self._open_files(checksums)
        self.content = self._content(checksums)

    def size(self, split: str) -> int:
        """The number of structures of a split."""
        return int(self.manifest["splits"][split])

    def pick(self, split: str, places: np.ndarray) -> np.ndarray:
        """The structures at some places of a split's index, (n,) int64."""
        return self.rows(f"index/{split}", places).astype(np.int64)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of one field, verified; of one that is absent, what stands for it."""
        if name not in self.files:
            what = field(name)
            return np.full((len(indices), *what.row), what.absent, what.dtype)
        file = self.files[name]
        file.touch(indices, indices)
        return file.rows.take(indices, axis=0)

    def read(self, indices: np.ndarray, tasks: Mapping[str, str | None]) -> Packed:
        """The structures at `indices` (in range), in that order. tasks: label set -> kind of property, or None."""
        first = self.rows("offsets", indices).astype(np.int64)
        natoms = self.rows("natoms", indices).astype(np.int64)
        ends = np.cumsum(natoms)
        total = int(ends[-1]) if len(ends) else 0
        atoms = np.repeat(first - ends + natoms, natoms) + np.arange(total)
        last = first + natoms - 1
        n = len(indices)
        return Packed(
            numbers=self._atom_rows("numbers", atoms, first, last),
            positions=self._atom_rows("positions", atoms, first, last),
            natoms=natoms,
            cell=self.rows("cell", indices) if "cell" in self.files else np.zeros((n, 3, 3)),
            pbc=self.rows("pbc", indices) if "pbc" in self.files else np.zeros((n, 3), bool),
            charge=self.rows("charge", indices) if "charge" in self.files else np.zeros(n, np.int8),
            spin=self.rows("spin", indices) if "spin" in self.files else np.ones(n, np.uint8),
            labels={task: self._labels(task, kind, indices, atoms, first, last) for task, kind in tasks.items()},
        )

    def read_ahead(self, start: int, stop: int, tasks: Sequence[str]) -> None:
        """Ask the kernel for what `read` needs of the structures start .. stop-1. Returns before it is there."""
        first, last = (int(x) for x in self.rows("offsets", np.array([start, stop])))
        kinds = [f"labels/{task}/{kind}" for task in tasks for kind in (*LABELS, *PROPERTIES)]
        for name in (*GEOMETRY, *kinds):
            if name in self.files:
                a, b = (first, last) if field(name).rows == "atoms" else (start, stop)
                self.files[name].ahead(a, b)

    def source_id(self, i: int) -> str:
        """Where structure `i` (in range) lies in its source file."""
        bounds = self.rows("source_id_offsets", np.array([i, i + 1]))
        start, end = int(bounds[0]), int(bounds[1])
        every_block = np.append(np.arange(start, end, BLOCK), end - 1) if end > start else np.zeros(0, np.int64)
        self.rows("source_id", every_block)
        return self.files["source_id"].rows[start:end].tobytes().decode() if end > start else ""

    def skipped(self) -> Iterator[dict[str, str]]:
        """The records that were not stored: file, where (source id) and reason of each, in the order of reading."""
        path = self.path / SKIPPED
        if SKIPPED in self.sums:
            verify_text(path, self.sums[SKIPPED])
            with path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def _labels(
        self, task: str, kind: str | None, indices: np.ndarray, atoms: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> PackedLabels:
        energy, forces, stress = (f"labels/{task}/{kind}" for kind in LABELS)
        value = None
        if kind is not None and (name := f"labels/{task}/{kind}") in self.files:
            value = self.rows(name, indices) if kind not in OF_ATOMS else self._atom_rows(name, atoms, first, last)
        return PackedLabels(
            kind=kind,
            value=value,
            energy=self.rows(energy, indices) if energy in self.files else np.full(len(indices), np.nan),
            forces=self._atom_rows(forces, atoms, first, last) if forces in self.files else None,
            stress=self.rows(stress, indices) if stress in self.files else None,
        )

    def _atom_rows(self, name: str, atoms: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        file = self.files[name]
        file.touch(first, last)
        return file.take(atoms)

    def _content(self, checksums: np.ndarray) -> Content:
        content = content_of(self.manifest["files"], checksums)
        if (said := self.manifest.get("content", content.key)) != content.key:
            raise ValueError(f"{self.path / MANIFEST} says content {said}, but its files have {content.key}")
        return content

    def _open_files(self, checksums: np.ndarray) -> dict[str, MappedFile]:
        opened: dict[str, MappedFile] = {}
        start = 0
        for name, entry in sorted(self.manifest["files"].items()):
            if name == CHECKSUMS:
                continue
            path = self.path / name
            check_size(path, entry["bytes"])
            self.sums[name] = sums = checksums[start : start + blocks(entry["bytes"])]
            start += len(sums)
            if entry["dtype"] is None:
                if self.verify == "open":
                    verify_text(path, sums)
                continue
            key = name.removesuffix(".npy")
            shape = tuple(entry["shape"])
            check_array(path, key, entry, self.manifest)
            opened[key] = MappedFile(path, entry["dtype"], shape, sums, self.verify != "off")
            if self.verify == "open":
                opened[key].whole()
        required = {key for key, what in FIELDS.items() if what.absent is None} | {f"index/{s}" for s in SPLITS}
        if missing := sorted(required - set(opened)):
            raise ValueError(f"{self.path / MANIFEST} lists no file for {', '.join(missing)}")
        return opened
