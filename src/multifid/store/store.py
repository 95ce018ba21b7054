"""Reads a store: memory-mapped fields, gathered without a loop over structures, verified block by block.

Opening compares the manifest with its own checksum, and every file's size and header with the manifest, so that no
later read can fault. The blocks of a file are compared with `checksums.npy` the first time they are touched
(`verify="touch"`), all at once (`"open"`), or never (`"off"`). What differs is a ValueError that names file and place.

A store to which files were added is several parts, end to end, and can be opened as it was before any of them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from multifid.store.content import Content
from multifid.store.fields import MANIFEST
from multifid.store.joined import Parts
from multifid.store.manifest import folders_of, read_manifest
from multifid.store.part import Part
from multifid.structures.structure import SPLITS, Packed

VERIFY = ("touch", "open", "off")


class Store:
    """A prepared dataset, read from memory-mapped files; what is damaged is a ValueError that names file and place.

    Args:
        path: its directory. ValueError where that is no store.
        verify: when blocks are compared with their checksums: "touch" (when first read), "open" (all now) or "off".
        additions: as it was after so many additions of files (`multifid add`); None: as it is now.

    Attributes:
        path: its directory.
        manifest: what manifest.json says: source, tasks with reference energies and scale, splits, counts.
        additions: how often files were added to it.
        structures: their number.
        atoms: of all structures.
        tasks: names of the label sets, in the order of the manifest.
        elements: atomic number -> number of atoms.
        content: hash of the data alone, the same wherever and by whichever version they were prepared.
        checksum: hash of every byte, fitted numbers and version included.
        parts: what was prepared at once, and what was added, in this order.
    """

    def __init__(self, path: Path | str, verify: str = "touch", additions: int | None = None) -> None:
        if verify not in VERIFY:
            raise ValueError(f"verify must be one of {', '.join(VERIFY)}, not {verify!r}")
        self.path, self.verify = Path(path), verify
        self.manifest, self.checksum = read_manifest(self.path, additions)
        self.structures: int = self.manifest["structures"]
        self.atoms: int = self.manifest["atoms"]
        self.tasks: list[str] = list(self.manifest["tasks"])
        self.elements: dict[int, int] = {int(z): n for z, n in self.manifest["elements"].items()}
        self.parts = Parts([Part(folder, own, verify) for folder, own in folders_of(self.path, self.manifest)])
        self.additions = len(self.parts.each) - 1
        self.content = Content(self.manifest["content_of"]) if self.additions else self.parts.each[0].content
        if self.structures != self.parts.structures:
            counts = f"{self.structures} structures, its parts {self.parts.structures}"
            raise ValueError(f"{self.path / MANIFEST} says {counts}")

    def __reduce__(self) -> tuple[type["Store"], tuple[Path, str, int]]:
        """A worker process opens the store for itself."""
        return Store, (self.path, self.verify, self.additions)

    def as_it_was(self, wanted: Callable[["Store"], bool]) -> "Store | None":
        """The store after the most additions with which it is what is `wanted`; None where it never was."""
        for additions in range(self.additions, -1, -1):
            store = self if additions == self.additions else Store(self.path, self.verify, additions)
            if wanted(store):
                return store
        return None

    @property
    def natoms(self) -> np.ndarray:
        """(structures,) uint16 atoms of each structure, memory-mapped."""
        return self.field("natoms")

    def has(self, name: str) -> bool:
        """Whether some structure may say something in a field ("cell", "labels/<task>/forces")."""
        return self.parts.has(name)

    def field(self, name: str) -> np.ndarray:
        """A whole field, verified: "numbers", "split", "labels/<task>/energy", "index/train".

        Memory-mapped; of a store in several parts a copy. KeyError where the store has no such field.
        """
        self._refuse_unknown(name)
        return self.parts.field(name)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of one field of structures ("natoms", "cell"), in that order; only the blocks they lie in are verified.

        KeyError where the store has no such field, IndexError for an index outside 0..structures-1.
        """
        self._refuse_unknown(name)
        return self.parts.rows(name, self._checked(np.asarray(indices)))

    def index(self, split: str) -> np.ndarray:
        """The structures of a split, ascending. ValueError for another name than those in SPLITS. See `field`."""
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
        return self.parts.pick(split, _checked(places, size, f"{self.path}/index/{split}"))

    def read_ahead(self, start: int, stop: int, tasks: Sequence[str]) -> None:
        """Ask the kernel for what `read` needs of the structures start .. stop-1. Returns before it is there."""
        self.parts.read_ahead(start, stop, tasks)

    def source_id(self, i: int) -> str:
        """Where structure `i` lies in its source file (`source_file`)."""
        ((_, part, own),) = self.parts.by_part(self._checked(np.array([i])))
        return part.source_id(int(own[0]))

    def source_file(self, i: int) -> str:
        """The name of the source file of structure `i`: files come one after the other in the order of the manifest."""
        i = int(self._checked(np.array([i]))[0])
        files = self.manifest["source"]["files"]
        ends = np.cumsum([file["structures"] for file in files])
        return files[int(np.searchsorted(ends, i, side="right"))]["name"]

    def skipped(self) -> Iterator[dict[str, str]]:
        """The records that were not stored: file, where (source id) and reason of each, in the order of reading."""
        for part in self.parts.each:
            yield from part.skipped()

    def read(self, indices: Sequence[int] | np.ndarray, tasks: Sequence[str] | None = None) -> Packed:
        """The structures at `indices`, in that order, repeats allowed, with the labels of `tasks` (all by default).

        IndexError for an index outside 0..structures-1; KeyError for a task that the store has not.
        """
        indices = self._checked(np.asarray(indices))
        kinds = {task: self._kind(task) for task in (self.tasks if tasks is None else tasks)}
        return self.parts.read(indices, kinds)

    def property_kind(self, task: str) -> str | None:
        """The kind of property that a label set holds (`structures.properties`); None: energies, forces, stress."""
        about = self.manifest["tasks"][task].get("property")
        return None if about is None else str(about["kind"])

    def _kind(self, task: str) -> str | None:
        if task not in self.manifest["tasks"]:
            raise KeyError(f"{self.path} has no labels {task!r}: it has {', '.join(self.tasks)}")
        return self.property_kind(task)

    def _refuse_unknown(self, name: str) -> None:
        if not self.has(name):
            raise KeyError(f"{self.path} has no field {name!r}: it has {', '.join(self.parts.names())}")

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        return _checked(indices, self.structures, str(self.path))


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
