"""The files of a store: names, dtypes, shapes, npy headers and block checksums. The writer and the reader share them.

Every array file is a plain `.npy` (format 1.0) with a header of exactly 128 bytes, so that it can be rewritten in
place once the number of rows is known, and so that a reader can compare it byte for byte with what it must be.

`checksums.npy` holds the xxh3-64 of every 1 MiB block (headers included, the last block of a file may be short) of
every file that the manifest lists, except itself: files in the sorted order of their names, blocks in file order.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from multifid.structures.properties import KINDS, OF_ATOMS, shape_of
from multifid.structures.structure import SPLITS

SCHEMA = 1
PARTED = 2  # of the manifest of a store in several parts
BLOCK = 1 << 20  # bytes
HEADER = 128  # bytes
MAX_ATOMS = 65_535  # of one structure: what uint16 holds; 12 bytes each, so a structure never spans three blocks
NO_SPLIT = 255  # in split.npy of a store that is being written: nothing was published
MANIFEST = "manifest.json"
CHECKSUMS = "checksums.npy"
SKIPPED = "skipped.jsonl"
TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Field:
    """One array file: the dtype, how many rows ("structures", "atoms", "structures + 1", "bytes"), a row's shape."""

    dtype: str
    rows: str
    row: tuple[int, ...] = ()
    absent: float | None = None  # the value where a structure says nothing; None: every structure has one


FIELDS: dict[str, Field] = {
    "numbers": Field("|u1", "atoms"),
    "positions": Field("<f4", "atoms", (3,)),
    "natoms": Field("<u2", "structures"),
    "offsets": Field("<u8", "structures + 1"),
    "cell": Field("<f8", "structures", (3, 3), absent=0),
    "pbc": Field("|b1", "structures", (3,), absent=0),
    "charge": Field("|i1", "structures", absent=0),
    "spin": Field("|u1", "structures", absent=1),
    "split": Field("|u1", "structures"),
    "relative": Field("<u8", "structures"),
    "source_id": Field("|u1", "bytes"),
    "source_id_offsets": Field("<u8", "structures + 1"),
}
LABELS: dict[str, Field] = {
    "energy": Field("<f8", "structures", absent=np.nan),
    "forces": Field("<f4", "atoms", (3,), absent=np.nan),
    "stress": Field("<f8", "structures", (3, 3), absent=np.nan),
}


PROPERTIES: dict[str, Field] = {  # a label set has one of them, or those above
    kind: Field(
        "<f4" if kind in OF_ATOMS else "<f8", "atoms" if kind in OF_ATOMS else "structures", shape_of(kind), np.nan
    )
    for kind in KINDS
}


def field(name: str) -> Field:
    """What `labels/<task>/energy`, `index/<split>` or a name in FIELDS is. KeyError for anything else."""
    match name.split("/"):
        case ["labels", _, kind] if kind in LABELS:
            return LABELS[kind]
        case ["labels", _, kind] if kind in PROPERTIES:
            return PROPERTIES[kind]
        case ["index", split] if split in SPLITS:
            return Field("<u4", split)
        case _:
            return FIELDS[name]


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first 128 bytes of an npy file (format 1.0), as `numpy.load` reads it."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(shape)}, }}".encode()
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11) + b"\n"


def blocks(size: int) -> int:
    """The number of checksum blocks of a file of `size` bytes."""
    return -(-size // BLOCK)


def block_checksums(path: Path) -> Iterator[int]:
    """The xxh3-64 of each block of a file, in order."""
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            yield xxhash.xxh3_64_intdigest(data)


def files_of(path: Path) -> list[Path]:
    """The file, or all files of a directory that is read as one, by name."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def file_checksum(path: Path) -> str:
    """The xxh3-64 of a whole file, in hexadecimal; of a directory: of the names and contents of all its files."""
    digest = xxhash.xxh3_64()
    for each in files_of(path):
        if each != path:
            digest.update(f"{each.relative_to(path).as_posix()}\n".encode())
        with each.open("rb") as file:
            while data := file.read(BLOCK):
                digest.update(data)
    return digest.hexdigest()


def damaged(path: Path, block: int, size: int) -> str:
    """What is said of a file of `size` bytes whose block differs from its checksum."""
    start, end = block * BLOCK, min((block + 1) * BLOCK, size)
    return f"{path} is damaged in bytes {start}..{end}: the checksum of block {block} differs; prepare the store again"
