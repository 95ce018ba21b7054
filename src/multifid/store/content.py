"""What the data of a store are, as hashes: the same files give the same ones on every processor and in every release.

    structures   numbers, positions, natoms, cell, pbc, charge, spin
    labels       energy, forces, stress, or a property, of one label set
    split        which structures are train, validation, test, unused

The order of data is keyed by all of them together, and a run knows its data by them. Not covered: what is fitted
(references, scale, rank, residual, edges per atom), what only says where structures come from (source files and their
names, source ids, relatives, the names of label sets, what was skipped), options, and the version that wrote the store.

The hash of a field is that of the checksums of its blocks, so it costs nothing, binds what is verified when it is
read, and is known of every store, also of one whose manifest does not say `content` yet.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from multifid.store.fields import BLOCK, CHECKSUMS, LABELS, PROPERTIES, Field, blocks, field, npy_header

STRUCTURES = ("numbers", "positions", "natoms", "cell", "pbc", "charge", "spin")
SPLIT = "split"


@dataclass(frozen=True)
class Content:
    """The hashes of a store's fields (hexadecimal) by name; a field that says nothing anywhere counts as absent."""

    fields: Mapping[str, str]

    @property
    def key(self) -> str:
        """One hash of everything. Names of label sets do not enter."""
        label_sets = sorted({name.split("/")[1] for name in self.fields if name.startswith("labels/")})
        labels = sorted(_hash(self.labels(name).items()) for name in label_sets)
        structures = _hash((name, self.fields[name]) for name in STRUCTURES if name in self.fields)
        parts = [("structures", structures), *(("labels", each) for each in labels), (SPLIT, self.fields[SPLIT])]
        return _hash(parts)

    def labels(self, label_set: str) -> dict[str, str]:
        """The hashes of one label set: "energy", "forces", "stress" or that of its property, those that there are."""
        names = {kind: f"labels/{label_set}/{kind}" for kind in (*LABELS, *PROPERTIES)}
        return {kind: self.fields[name] for kind, name in names.items() if name in self.fields}

    def of(self, label_set: str) -> dict[str, str]:
        """What a task sees that learns one label set: all but the labels of others, which are left out."""
        plain = {name: self.fields[name] for name in (*STRUCTURES, SPLIT) if name in self.fields}
        return plain | self.labels(label_set)


def content_of(files: Mapping[str, Mapping[str, Any]], sums: np.ndarray) -> Content:
    """Of a manifest's `files` and the block checksums of all of them (see `fields`)."""
    found, start = {}, 0
    for file, entry in sorted(files.items()):
        if file == CHECKSUMS:
            continue
        own = sums[start : start + blocks(entry["bytes"])]
        start += len(own)
        name = file.removesuffix(".npy")
        if (name in (*STRUCTURES, SPLIT) or name.startswith("labels/")) and not _says_nothing(name, entry, own):
            found[name] = xxhash.xxh3_64_hexdigest(own.astype("<u8").tobytes())
    return Content(found)


def _says_nothing(name: str, entry: Mapping[str, Any], sums: np.ndarray) -> bool:
    """Whether every row is what an absent field stands for; told by the checksums, at most three of them computed."""
    what = field(name)
    if what.absent is None:
        return False
    size, count, rows = entry["bytes"], len(sums), _absent(what)
    expected = {0: (npy_header(what.dtype, tuple(entry["shape"])) + rows)[: min(size, BLOCK)]}
    if count > 1:
        expected[count - 1] = rows[: size - (count - 1) * BLOCK]
    if count > 2:
        expected[1] = rows
    alike = bool((sums[2:-1] == sums[1]).all()) if count > 2 else True
    return alike and all(xxhash.xxh3_64_intdigest(data) == int(sums[k]) for k, data in expected.items())


def _absent(what: Field) -> bytes:
    """A block of rows of a field that say nothing."""
    dtype = np.dtype(what.dtype)
    return np.full(BLOCK // dtype.itemsize, what.absent, dtype).tobytes()


def _hash(parts: Iterable[tuple[str, str]]) -> str:
    return xxhash.xxh3_64_hexdigest("".join(f"{name} {digest}\n" for name, digest in parts).encode())
