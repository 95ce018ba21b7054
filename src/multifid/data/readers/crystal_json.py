"""What MPtrj and Alexandria share: large JSON files streamed record by record, and pymatgen structure dictionaries.

The files are 1-12 GB of JSON, plain or bz2. They are parsed as they are read (`ijson`), one value of the outermost
object at a time, so that memory holds one material whatever the size of the file. JSON has no NaN and the parser
refuses it, but published files contain bare `NaN` tokens: they become `null` before the parser sees them.
"""

import bz2
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import ijson
import numpy as np

from multifid.data.readers import Progress
from multifid.data.readers.records import BadRecord, array, numbers_of, periodicity, vectors, whole

CHUNK = 1 << 18
MAX_TOKEN = 1 << 24  # no number or string of these files is longer; bounds memory on files that are something else
BARE = re.compile(rb"(?:(?<=[\[:,\s])|\A)(?:NaN|-?Infinity)(?=[\s,\]}])")
FIRST_KEY = re.compile(rb'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*(.)', re.DOTALL)


@dataclass(slots=True)
class Crystal:
    """Geometry of one pymatgen structure dictionary."""

    numbers: np.ndarray  # (atoms,)
    positions: np.ndarray  # (atoms, 3) angstrom
    cell: np.ndarray | None  # (3, 3) angstrom
    pbc: np.ndarray | None  # (3,) bool
    charge: int  # e


def crystal(structure: Any) -> Crystal:
    """Geometry from a pymatgen `Structure.as_dict()`; BadRecord where sites are disordered, unknown or missing."""
    try:
        lattice, sites = structure["lattice"], structure["sites"]
        species = [site["species"] for site in sites]
        ordered = all(len(kinds) == 1 and kinds[0]["occu"] == 1 for kinds in species)
        symbols = [kinds[0]["element"] for kinds in species]
        matrix = lattice["matrix"]
        if all("xyz" in site for site in sites):
            positions = [site["xyz"] for site in sites]
        else:  # as_dict(verbosity=0) writes fractional coordinates only
            positions = array([site["abc"] for site in sites], "positions") @ array(matrix, "cell")
    except (KeyError, IndexError, TypeError, ValueError):
        raise BadRecord("structure is not a pymatgen structure") from None
    if not ordered:
        raise BadRecord("structure with partially occupied sites")
    numbers = numbers_of(symbols)
    cell, pbc = periodicity(matrix, lattice.get("pbc") or [True] * 3)
    charge = whole(structure.get("charge") or 0, "charge")
    return Crystal(numbers, vectors(positions, len(numbers), "positions"), cell, pbc, charge)


class ParsableJson(io.RawIOBase):
    """The bytes of a JSON file with bare NaN and Infinity as null. Pieces end at commas, so that no token is cut."""

    def __init__(self, source: BinaryIO, progress: Progress, fraction: Any):
        self._source, self._progress, self._fraction = source, progress, fraction
        self._rest = b""  # read, but not yet up to a comma
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not len(self._ready):
            self._ready = memoryview(self._piece())
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _piece(self) -> bytes:
        while True:
            chunk = self._source.read(CHUNK)
            self._progress(self._fraction())
            end = chunk.rfind(b",") + 1 if chunk else 0
            if end:
                piece, self._rest = self._rest + chunk[:end], chunk[end:]
            elif chunk and len(self._rest) < MAX_TOKEN:
                self._rest += chunk
                continue
            else:
                piece, self._rest = self._rest + chunk, b""
            if b"NaN" in piece or b"Infinity" in piece:
                piece = BARE.sub(b"null", piece)
            return piece


@contextmanager
def streamed(path: Path, progress: Progress) -> Iterator[tuple[str, bytes, BinaryIO]]:
    """(first key, first byte of its value, stream) of a JSON object in a plain or bz2 file, told apart by content.

    The key is "" for an empty object. Whatever goes wrong with the file as a whole while it is open (truncated, not
    bz2, not JSON, not an object) is a ValueError that names it.
    """
    with open(path, "rb") as raw:
        size = max(path.stat().st_size, 1)
        compressed = raw.read(3) == b"BZh"
        raw.seek(0)
        try:
            key, opening = _first_key(_content(raw, compressed).read(CHUNK), path)
            raw.seek(0)
            source = _content(raw, compressed)
            yield key, opening, cast(BinaryIO, ParsableJson(source, progress, lambda: raw.tell() / size))
        except ijson.JSONError as error:
            reason = str(error).splitlines()[0].strip() if str(error) else "not JSON"
            raise ValueError(f"{path}: truncated or not JSON near byte {raw.tell():,}: {reason}") from None
        except (EOFError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: truncated or damaged near byte {raw.tell():,}: {error}") from None


def _content(raw: BinaryIO, compressed: bool) -> BinaryIO:
    return cast(BinaryIO, bz2.BZ2File(raw)) if compressed else raw


def _first_key(start: bytes, path: Path) -> tuple[str, bytes]:
    if match := FIRST_KEY.match(start):
        return match[1].decode("utf-8", "replace"), match[2]
    if re.fullmatch(rb"\s*\{\s*\}\s*", start):
        return "", b""
    raise ValueError(f"{path}: a JSON object is expected, but the file starts with {start[:40]!r}")


def pairs(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """(key, value) of the outermost object, one after the other."""
    return ijson.kvitems(stream, "", use_float=True)


def items(stream: BinaryIO, key: str) -> Iterator[Any]:
    """The elements of the array under `key` of the outermost object, one after the other."""
    return ijson.items(stream, f"{key}.item", use_float=True)
