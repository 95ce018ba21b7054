"""Parts of a store as one: rows of a field across parts, structures of several, and the hash of what they hold.

A field is the rows of its parts, end to end; where a part lacks it, the value that says nothing stands for it. So
nothing of the parts before is touched when another one is added.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from multifid.store.content import SPLIT, STRUCTURES, Content, content_of
from multifid.store.fields import BLOCK, HEADER, Field, blocks, field, npy_header
from multifid.store.part import Part
from multifid.structures.properties import OF_ATOMS
from multifid.structures.structure import Packed, PackedLabels


class Joined:
    """The rows of one field in all parts, read by slices like the file of one part. Views, and no copies, in parts.

    ValueError for a damaged block: all rows are verified first.
    """

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self.what: Field = field(name)
        self.arrays: list[np.ndarray] = []
        self.added: list[int] = []  # to the numbers of a part: what lies before it
        before = 0
        for number, part in enumerate(parts):
            rows = part.files[name].whole() if name in part.files else self._absent(part)
            boundary = self.what.rows == "structures + 1" and number > 0  # it is the last one of the part before
            self.arrays.append(rows[1:] if boundary else rows)
            self.added.append(before)
            before += int(rows[-1]) if self.what.rows == "structures + 1" else 0
        self.ends = np.cumsum([len(rows) for rows in self.arrays])
        self.dtype = self.arrays[0].dtype
        self.shape = (int(self.ends[-1]), *self.what.row)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        assert step == 1
        found = []
        for rows, end, added in zip(self.arrays, self.ends.tolist(), self.added, strict=True):
            first = end - len(rows)
            if start < end and stop > first:
                own = rows[max(start - first, 0) : stop - first]
                found.append(own + self.dtype.type(added) if added else own)
        return np.concatenate(found) if len(found) != 1 else found[0]

    def parts(self, chosen: Sequence[slice]) -> np.ndarray:
        """Some small slices, end to end."""
        return np.concatenate([self[part] for part in chosen])

    def _absent(self, part: Part) -> np.ndarray:
        """Rows that say nothing, and take no memory."""
        rows = part.structures if self.what.rows == "structures" else part.atoms
        return np.broadcast_to(np.array(self.what.absent, self.what.dtype), (rows, *self.what.row))


class Parts:
    """The parts of a store as one: structures are counted through all of them. Indices must be in range.

    Attributes:
        each: the parts, in their order.
        starts: (parts + 1,) the first structure of each, and their number.
    """

    def __init__(self, each: Sequence[Part]) -> None:
        self.each = list(each)
        self.starts = np.cumsum([0, *(part.structures for part in self.each)])
        self.structures = int(self.starts[-1])

    def names(self) -> list[str]:
        """The fields that some part has."""
        return list(dict.fromkeys(name for part in self.each for name in part.files))

    def has(self, name: str) -> bool:
        """Whether some part has a field."""
        return any(name in part.files for part in self.each)

    def field(self, name: str) -> np.ndarray:
        """A whole field that some part has, verified; of several parts a copy."""
        if len(self.each) == 1:
            return self.each[0].files[name].whole()
        if not name.startswith("index/"):
            return Joined(name, self.each)[:]
        kind = np.dtype("<u4" if self.structures <= np.iinfo(np.uint32).max else "<u8").type
        parts = zip(self.each, self.starts.tolist(), strict=False)
        return np.concatenate([part.files[name].whole().astype(kind) + kind(start) for part, start in parts])

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of one field of structures, in that order."""
        if len(self.each) == 1:
            return self.each[0].rows(name, indices)
        what = field(name)
        out = np.empty((len(indices), *what.row), what.dtype)
        for chosen, part, own in self.by_part(indices):
            out[chosen] = part.rows(name, own)
        return out

    def pick(self, split: str, places: np.ndarray) -> np.ndarray:
        """The structures at some places of a split's index, (n,) int64."""
        if len(self.each) == 1:
            return self.each[0].pick(split, places)
        out, ends = np.empty(len(places), np.int64), np.cumsum([part.size(split) for part in self.each])
        owner = np.searchsorted(ends, places, side="right")
        for number in np.unique(owner).tolist():
            part, chosen = self.each[number], owner == number
            first = ends[number] - part.size(split)
            out[chosen] = self.starts[number] + part.pick(split, places[chosen] - first)
        return out

    def read(self, indices: np.ndarray, tasks: Mapping[str, str | None]) -> Packed:
        """The structures at `indices`, in that order. tasks: label set -> kind of property, or None."""
        if len(self.each) == 1:
            return self.each[0].read(indices, tasks)
        found = [(chosen, part.read(own, tasks)) for chosen, part, own in self.by_part(indices)]
        if len(found) <= 1:
            return found[0][1] if found else self.each[0].read(indices, tasks)
        return in_order([pack for _, pack in found], np.concatenate([chosen for chosen, _ in found]))

    def read_ahead(self, start: int, stop: int, tasks: Sequence[str]) -> None:
        """Ask the kernel for what `read` needs of the structures start .. stop-1."""
        for part, first in zip(self.each, self.starts.tolist(), strict=False):
            a, b = max(start - first, 0), min(stop - first, part.structures)
            if a < b:
                part.read_ahead(a, b, tasks)

    def by_part(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, Part, np.ndarray]]:
        """Which of the indices lie in a part, the part, and their indices in it; part by part."""
        owner = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(owner).tolist():
            chosen = np.flatnonzero(owner == number)
            yield chosen, self.each[number], indices[chosen] - self.starts[number]

    def fields(self) -> dict[str, Joined]:
        """All fields of structures and atoms, read by slices. All their blocks are verified."""
        wanted = ("structures", "atoms", "structures + 1")
        return {name: Joined(name, self.each) for name in self.names() if field(name).rows in wanted}

    def content(self) -> Content:
        """The content of all structures: that of a store of the same structures which was prepared at once.

        Of the first part only the blocks at both ends of a file are read: those between are what they would be there.
        """
        if len(self.each) == 1:
            return self.each[0].content
        files: dict[str, dict[str, Any]] = {}
        sums: list[int] = []
        names = [n for n in self.names() if n in (*STRUCTURES, SPLIT) or n.startswith("labels/")]
        for name in sorted(names, key=lambda name: f"{name}.npy"):
            what = field(name)
            shape = (sum(p.structures if what.rows == "structures" else p.atoms for p in self.each), *what.row)
            size = HEADER + int(np.prod(shape, dtype=np.int64)) * np.dtype(what.dtype).itemsize
            files[f"{name}.npy"] = {"bytes": size, "dtype": what.dtype, "shape": list(shape)}
            own = list(_sums(name, what, shape, size, self.each))
            assert len(own) == blocks(size)
            sums += own
        return content_of(files, np.array(sums, np.uint64))


def _sums(name: str, what: Field, shape: tuple[int, ...], size: int, parts: Sequence[Part]) -> Iterator[int]:
    """The checksums of the blocks of the file that would hold the rows of all parts."""
    known = parts[0].sums[f"{name}.npy"] if name in parts[0].files else np.zeros(0, np.uint64)
    whole = parts[0].files[name].content.nbytes + HEADER if len(known) else 0
    full = whole // BLOCK  # of these, all but the one with the header are those of the first part
    for block in range(blocks(size)):
        if 0 < block < full:
            yield int(known[block])
            continue
        start, stop = block * BLOCK, min((block + 1) * BLOCK, size)
        head = npy_header(what.dtype, shape) if block == 0 else b""
        yield xxhash.xxh3_64_intdigest(head + _bytes(name, what, parts, max(start - HEADER, 0), stop - HEADER))


def _bytes(name: str, what: Field, parts: Sequence[Part], start: int, stop: int) -> bytes:
    """Bytes of the rows of all parts, end to end. They begin and end with an item, which has 1, 2, 4 or 8."""
    item, row = np.dtype(what.dtype).itemsize, int(np.prod(what.row, dtype=np.int64))
    found, first = [], 0
    for part in parts:
        length = (part.structures if what.rows == "structures" else part.atoms) * row * item
        a, b = max(start - first, 0), min(stop - first, length)
        if a < b and name in part.files:
            file = part.files[name]
            rows = np.array([a // file.row_bytes, (b - 1) // file.row_bytes])
            file.touch(rows, rows)
            found.append(file.content[a:b].tobytes())
        elif a < b:
            found.append(np.full((b - a) // item, what.absent, what.dtype).tobytes())
        first += length
    return b"".join(found)


def in_order(packs: Sequence[Packed], places: np.ndarray) -> Packed:
    """Structures of several parts in the order of `places` (structures,): where each one goes."""
    natoms = np.concatenate([pack.natoms for pack in packs])
    chosen = np.argsort(places)
    first, sizes = np.cumsum(natoms) - natoms, natoms[chosen]
    atoms = np.repeat(first[chosen] - np.cumsum(sizes) + sizes, sizes) + np.arange(int(sizes.sum()))

    def of_structures(name: str) -> np.ndarray:
        return np.concatenate([getattr(pack, name) for pack in packs])[chosen]

    return Packed(
        numbers=np.concatenate([pack.numbers for pack in packs])[atoms],
        positions=np.concatenate([pack.positions for pack in packs])[atoms],
        natoms=sizes,
        cell=of_structures("cell"),
        pbc=of_structures("pbc"),
        charge=of_structures("charge"),
        spin=of_structures("spin"),
        labels={task: _labels(packs, task, chosen, atoms) for task in packs[0].labels},
    )


def _labels(packs: Sequence[Packed], task: str, chosen: np.ndarray, atoms: np.ndarray) -> PackedLabels:
    kind = packs[0].labels[task].kind
    columns: dict[str, Any] = {}
    for name in ("energy", "forces", "stress", "value"):
        held = [getattr(pack.labels[task], name) for pack in packs]
        shaped = next((values for values in held if values is not None), None)
        if shaped is None:
            columns[name] = None
            continue
        of_atoms = name == "forces" or (name == "value" and kind in OF_ATOMS)
        rows = [len(pack.numbers) if of_atoms else len(pack.natoms) for pack in packs]
        known = [
            np.full((n, *shaped.shape[1:]), np.nan, shaped.dtype) if values is None else values
            for values, n in zip(held, rows, strict=True)
        ]
        columns[name] = np.concatenate(known)[atoms if of_atoms else chosen]
    return PackedLabels(kind=kind, **columns)
