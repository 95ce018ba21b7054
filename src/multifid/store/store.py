"""Reads a store: memory-mapped fields, gathered without a loop over structures, verified block by block.

Opening compares the manifest with its own checksum, and every file's size and header with the manifest, so that no
later read can fault. The blocks of a file are compared with `checksums.npy` the first time they are touched
(`verify="touch"`), all at once (`"open"`), or never (`"off"`). What differs is a ValueError that names file and place.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from multifid.store.array_file import MappedFile
from multifid.store.content import Content, content_of
from multifid.store.fields import BLOCK, CHECKSUMS, FIELDS, LABELS, MANIFEST, PROPERTIES, SKIPPED, blocks, field
from multifid.store.manifest import check_array, check_size, open_checksums, read_manifest, verify_text
from multifid.structures.properties import OF_ATOMS
from multifid.structures.structure import SPLITS, Packed, PackedLabels

VERIFY = ("touch", "open", "off")


class Store:
    """A prepared dataset, read from memory-mapped files; what is damaged is a ValueError that names file and place.

    Args:
        path: its directory. ValueError where that is no store.
        verify: when blocks are compared with their checksums: "touch" (when first read), "open" (all now) or "off".

    Attributes:
        path: its directory.
        manifest: what manifest.json says: source, tasks with reference energies and scale, splits, counts.
        structures: their number.
        atoms: of all structures.
        tasks: names of the label sets, in the order of the manifest.
        elements: atomic number -> number of atoms.
        content: hash of the data alone, the same wherever and by whichever version they were prepared.
        checksum: hash of every byte, fitted numbers and version included.
    """

    def __init__(self, path: Path | str, verify: str = "touch") -> None:
        if verify not in VERIFY:
            raise ValueError(f"verify must be one of {', '.join(VERIFY)}, not {verify!r}")
        self.path, self.verify = Path(path), verify
        self.manifest, self.checksum = read_manifest(self.path)
        self.structures: int = self.manifest["structures"]
        self.atoms: int = self.manifest["atoms"]
        self.tasks: list[str] = list(self.manifest["tasks"])
        self.elements: dict[int, int] = {int(z): n for z, n in self.manifest["elements"].items()}
        checksums = open_checksums(self.path, self.manifest)
        self._files = self._open_files(checksums)
        self.content = self._content(checksums)

    def __reduce__(self) -> tuple[type["Store"], tuple[Path, str]]:
        """A worker process opens the store for itself."""
        return Store, (self.path, self.verify)

    @property
    def natoms(self) -> np.ndarray:
        """(structures,) uint16 atoms of each structure, memory-mapped."""
        return self.field("natoms")

    def field(self, name: str) -> np.ndarray:
        """A whole field, memory-mapped and verified: "numbers", "split", "labels/<task>/energy", "index/train".

        KeyError where the store has no such field.
        """
        if name not in self._files:
            raise KeyError(f"{self.path} has no field {name!r}: it has {', '.join(self._files)}")
        return self._files[name].whole()

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of one field of structures ("natoms", "cell"), in that order; only the blocks they lie in are verified.

        KeyError where the store has no such field, IndexError for an index outside 0..structures-1.
        """
        if name not in self._files:
            raise KeyError(f"{self.path} has no field {name!r}: it has {', '.join(self._files)}")
        return self._rows(name, self._checked(np.asarray(indices)))

    def index(self, split: str) -> np.ndarray:
        """The structures of a split, ascending, memory-mapped. ValueError for another name than those in SPLITS."""
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}: splits are {', '.join(SPLITS)}")
        return self.field(f"index/{split}")

    @property
    def fitted_on(self) -> str:
        """The split that reference energies and scale are fitted to: "train" unless the store has none."""
        return str(self.manifest["splits"].get("fitted_on", "train"))

    def size(self, split: str) -> int:
        """The number of structures of a split."""
        return int(self.manifest["splits"][split])

    def pick(self, split: str, places: np.ndarray | slice) -> np.ndarray:
        """The structures at some places of a split's index, (n,) int64; only the blocks they lie in are verified.

        IndexError for places outside 0..size(split)-1.
        """
        size = self.size(split)
        if isinstance(places, slice):
            places = np.arange(*places.indices(size))
        return self._rows(f"index/{split}", _checked(places, size, f"{self.path}/index/{split}")).astype(np.int64)

    def read_ahead(self, start: int, stop: int, tasks: Sequence[str]) -> None:
        """Ask the kernel for what `read` needs of the structures start .. stop-1. Returns before it is there."""
        first, last = (int(x) for x in self._rows("offsets", np.array([start, stop])))
        kinds = [f"labels/{task}/{kind}" for task in tasks for kind in (*LABELS, *PROPERTIES)]
        for name in ("natoms", "offsets", "numbers", "positions", "cell", "pbc", "charge", "spin", *kinds):
            if name in self._files:
                a, b = (first, last) if field(name).rows == "atoms" else (start, stop)
                self._files[name].ahead(a, b)

    def source_id(self, i: int) -> str:
        """Where structure `i` lies in its source file (`source_file`)."""
        i = int(self._checked(np.array([i]))[0])
        bounds = self._rows("source_id_offsets", np.array([i, i + 1]))
        start, end = int(bounds[0]), int(bounds[1])
        every_block = np.append(np.arange(start, end, BLOCK), end - 1) if end > start else np.zeros(0, np.int64)
        self._rows("source_id", every_block)
        return self._files["source_id"].rows[start:end].tobytes().decode() if end > start else ""

    def source_file(self, i: int) -> str:
        """The name of the source file of structure `i`: files come one after the other in the order of the manifest."""
        i = int(self._checked(np.array([i]))[0])
        files = self.manifest["source"]["files"]
        ends = np.cumsum([file["structures"] for file in files])
        return files[int(np.searchsorted(ends, i, side="right"))]["name"]

    def skipped(self) -> Iterator[dict[str, str]]:
        """The records that were not stored: file, where (source id) and reason of each, in the order of reading."""
        path = self.path / SKIPPED
        if SKIPPED in self.manifest["files"]:
            verify_text(path, self._skipped_sums)
            with path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def read(self, indices: Sequence[int] | np.ndarray, tasks: Sequence[str] | None = None) -> Packed:
        """The structures at `indices`, in that order, repeats allowed, with the labels of `tasks` (all by default).

        IndexError for an index outside 0..structures-1; KeyError for a task that the store has not.
        """
        indices = self._checked(np.asarray(indices))
        first = self._rows("offsets", indices).astype(np.int64)
        natoms = self._rows("natoms", indices).astype(np.int64)
        ends = np.cumsum(natoms)
        total = int(ends[-1]) if len(ends) else 0
        atoms = np.repeat(first - ends + natoms, natoms) + np.arange(total)
        last = first + natoms - 1
        n = len(indices)
        return Packed(
            numbers=self._atom_rows("numbers", atoms, first, last),
            positions=self._atom_rows("positions", atoms, first, last),
            natoms=natoms,
            cell=self._rows("cell", indices) if "cell" in self._files else np.zeros((n, 3, 3)),
            pbc=self._rows("pbc", indices) if "pbc" in self._files else np.zeros((n, 3), bool),
            charge=self._rows("charge", indices) if "charge" in self._files else np.zeros(n, np.int8),
            spin=self._rows("spin", indices) if "spin" in self._files else np.ones(n, np.uint8),
            labels={t: self._labels(t, indices, atoms, first, last) for t in (self.tasks if tasks is None else tasks)},
        )

    def property_kind(self, task: str) -> str | None:
        """The kind of property that a label set holds (`structures.properties`); None: energies, forces, stress."""
        about = self.manifest["tasks"][task].get("property")
        return None if about is None else str(about["kind"])

    def _labels(self, task: str, indices: np.ndarray, atoms: np.ndarray, first: np.ndarray, last: np.ndarray):
        if task not in self.manifest["tasks"]:
            raise KeyError(f"{self.path} has no labels {task!r}: it has {', '.join(self.tasks)}")
        energy, forces, stress = (f"labels/{task}/{kind}" for kind in LABELS)
        kind = self.property_kind(task)
        value = None
        if kind is not None and (name := f"labels/{task}/{kind}") in self._files:
            value = self._rows(name, indices) if kind not in OF_ATOMS else self._atom_rows(name, atoms, first, last)
        return PackedLabels(
            kind=kind,
            value=value,
            energy=self._rows(energy, indices) if energy in self._files else np.full(len(indices), np.nan),
            forces=self._atom_rows(forces, atoms, first, last) if forces in self._files else None,
            stress=self._rows(stress, indices) if stress in self._files else None,
        )

    def _rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        file = self._files[name]
        file.touch(indices, indices)
        return file.rows.take(indices, axis=0)

    def _atom_rows(self, name: str, atoms: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        file = self._files[name]
        file.touch(first, last)
        return file.take(atoms)

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        return _checked(indices, self.structures, str(self.path))

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
            sums = checksums[start : start + blocks(entry["bytes"])]
            start += len(sums)
            if entry["dtype"] is None:
                self._skipped_sums = sums
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


def _checked(indices: np.ndarray, size: int, where: str) -> np.ndarray:
    """Indices as int64, all of them in 0..size-1."""
    if len(indices) == 0:
        return np.zeros(0, np.int64)
    if indices.dtype.kind not in "iu":
        raise IndexError(f"structures are read by integers, not by {indices.dtype}")
    indices = indices.astype(np.int64, copy=False)
    if indices.view(np.uint64).max() >= size:  # negative ones are the largest
        wrong = int(indices[(indices < 0) | (indices >= size)][0])
        raise IndexError(f"structure {wrong} of {where}: it has structures 0..{size - 1}")
    return indices
