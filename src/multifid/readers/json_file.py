"""Large JSON files, plain or packed, record by record: cut where records end, and a fast parser gets the rest.

    {"mp-1": {...}, "mp-2": {...}}                depth 1: a record is a key and its value
    {"entries": [{...}, {...}], "more": ...}      depth 2: a record is an element of the array

The files have 1-12 GB. Where records end is found without parsing: of the structural characters, outside strings, a
closing bracket that returns to the depth ends a record (`Scan`). That is exact, so that plain files can be read in
parts by several processes, but costs up to a fifth of parsing. So it is done for the first records, and then the bytes
at their seams are looked for: what lies between two of them is the next record if it parses as one. Memory holds one.
"""

import re
from collections.abc import Generator, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from multifid.readers.contract import Part, Progress
from multifid.readers.json_scan import Scan
from multifid.readers.json_seams import BARE, LONGEST, Seam, parse
from multifid.readers.packed import packing_of, unpacked

CHUNK = 1 << 18
PART = 1 << 25  # bytes of a part
LARGEST = 1 << 27  # bytes of a record; the largest published ones are below 2^24
PATIENCE = 100  # records behind which a seam is tried to be learned
UNSURE = 1 << 22  # bytes without a seam, after which seams are no longer looked for
DEEPEST = 1024  # levels of brackets: more, the parser does not take
COMMA = re.compile(rb"\s*,")
FIRST_KEY = re.compile(rb'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*(.)', re.DOTALL)
# What stands before the first record, by depth.
OPEN = {
    1: re.compile(rb"\s*\{"),
    2: re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\[', re.DOTALL),
}


def first_key(path: Path) -> tuple[str, bytes]:
    """(first key, first byte of its value) of the JSON object in a file; ("", b"") where it is empty.

    ValueError names the file where it is no JSON object.
    """
    chunks = chunks_of(path, 0, None, lambda fraction: None)
    start = next(chunks, b"")
    chunks.close()
    if match := FIRST_KEY.match(start):
        return match[1].decode("utf-8", "replace"), match[2]
    if re.fullmatch(rb"\s*\{\s*\}\s*", start):
        return "", b""
    raise ValueError(f"{path}: a JSON object is expected, but the file starts with {start[:40]!r}")


def json_parts(path: Path, depth: int) -> list[Part]:
    """A plain file cut between records, about PART bytes each; a packed file can only be read from its beginning."""
    if packing_of(path) is not None:
        return [None]
    size, cuts, at, scan = path.stat().st_size, [0], 0, Scan(depth)
    for chunk in chunks_of(path, 0, None, lambda fraction: None):
        if at + len(chunk) <= cuts[-1] + PART:
            scan.skip(chunk)
        else:
            ends = scan.ends(chunk)
            ends = ends[:-1] if scan.closed else ends
            while len(ends) and (place := np.searchsorted(ends, cuts[-1] + PART - at)) < len(ends):
                cuts.append(at + int(ends[place]))
        if scan.deepest > DEEPEST:
            raise ValueError(f"{path}: brackets more than {DEEPEST} deep near byte {at:,}")
        if scan.closed:
            break
        at += len(chunk)
    return [(start, stop) for start, stop in zip(cuts, [*cuts[1:], size], strict=True) if start < stop]


def pairs(path: Path, progress: Progress, part: Part = None) -> Iterator[tuple[str, Any]]:
    """(key, value) of the outermost object, one after the other."""
    for _, record in _records(path, 1, progress, part):
        yield from record.items()


def elements(path: Path, progress: Progress, part: Part = None) -> Iterator[tuple[int, Any]]:
    """(first byte, element) of the array under the first key of the outermost object, one after the other."""
    for start, record in _records(path, 2, progress, part):
        for element in record:
            yield start, element


class _Records:
    """Takes the records from a text that grows at its end, by a scan or at learned seams."""

    def __init__(self, path: Path, depth: int, start: int) -> None:
        self.path, self.depth = path, depth
        self.rest, self.at = bytearray(), start  # what is read but not given out, and where that starts
        self.header: re.Pattern | None = OPEN[depth] if start == 0 else None
        self.scan, self.scanned = Scan(depth, start == 0), 0  # and how much of the rest it has seen
        self.seam: Seam | None = None
        self.unlearned = 0  # records behind which no seam could be learned

    def at_seams(self) -> Iterator[tuple[int, Any]]:
        """Those that end at seams. After it the rest begins behind a record; the scan begins anew there."""
        done = 0
        while self.seam is not None and (end := self.seam.find(self.rest, done)) >= 0:
            comma = COMMA.match(self.rest, done)
            record = None if comma is None else self.seam.parse(bytes(self.rest[comma.end() : end]))
            if comma is None or record is None:
                self.doubt()
            else:
                yield self.at + comma.end(), record
                done = end
        self._drop(done)
        self.scan, self.scanned = Scan(self.depth, at_start=False), 0

    def by_scan(self) -> Iterator[tuple[int, Any]]:
        """Those that end in what has been added since the last time."""
        ends = self.scan.ends(bytes(self.rest[self.scanned :])) + self.scanned
        if self.scan.deepest > DEEPEST:
            raise ValueError(f"{self.path}: brackets more than {DEEPEST} deep in the record at byte {self.at:,}")
        rest, done = bytes(self.rest) if len(ends) else b"", 0
        for end in ends.tolist():
            last = end - (self.scan.closed and end == ends[-1])
            text = rest[done:last]
            if self.header is not None:
                text = text[self.header.match(text).end() :]  # type: ignore[union-attr]
            elif text and not text.isspace():
                text = _without_comma(self.path, text, self.at + done)
            if text and not text.isspace():
                place = self.at + last - len(text)
                yield place, _parsed(self.path, text, self.depth, place)
                if self.seam is None and self.unlearned < PATIENCE:
                    self.seam = Seam.between(text, rest[end : end + LONGEST], self.depth)
                    self.unlearned += 1
            done, self.header = end, None
        self.scanned = len(self.rest)
        self._drop(done)

    def doubt(self) -> None:
        """From here on the scan decides."""
        self.seam, self.unlearned = None, PATIENCE

    def _drop(self, done: int) -> None:
        del self.rest[:done]
        self.at += done
        self.scanned -= done


def _records(path: Path, depth: int, progress: Progress, part: Part) -> Iterator[tuple[int, Any]]:
    """(first byte, object or array of one member) for every record of a part.

    ValueError if the file is truncated or something follows the object.
    """
    start, stop = part or (0, None)
    records = _Records(path, depth, start)
    chunks = chunks_of(path, start, stop, progress)
    for chunk in chain(chunks, [b""]):  # at last nothing: what is left has no seam behind it
        records.rest += chunk
        if records.seam is not None:
            yield from records.at_seams()
            if len(records.rest) > UNSURE:
                records.doubt()
        if (records.seam is None or not chunk) and len(records.rest) > records.scanned:
            yield from records.by_scan()
        if records.scan.closed:
            break
        if len(records.rest) > LARGEST:
            raise ValueError(f"{path}: a record longer than {LARGEST:,} bytes begins at byte {records.at:,}")
    rest, at = bytes(records.rest), records.at
    if records.scan.closed:
        _check_end(path, rest, chunks, at, depth)
    elif stop is None or stop == path.stat().st_size or rest:
        raise ValueError(f"{path}: truncated or not JSON near byte {at + len(rest):,}: it ends within a record")


def _parsed(path: Path, text: bytes, depth: int, place: int) -> Any:
    try:
        return parse(text, depth)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}: truncated or not JSON near byte {place + error.pos - 1:,}: {error.msg}") from None


def _without_comma(path: Path, text: bytes, place: int) -> bytes:
    comma, record = text.lstrip()[:1], text.lstrip()[1:]
    if comma != b"," or not record or record.isspace():
        raise ValueError(f"{path}: truncated or not JSON near byte {place:,}: a comma and a record are expected")
    return record


def _check_end(path: Path, rest: bytes, chunks: Iterator[bytes], at: int, depth: int) -> None:
    """What follows the records must complete the object, and nothing more."""
    for chunk in chunks:
        rest += chunk
        if len(rest) > LARGEST:
            raise ValueError(f"{path}: more than {LARGEST:,} bytes follow the records, which end at byte {at:,}")
    try:
        orjson.loads(BARE.sub(b"null", b'{"records": 0' + rest if depth == 2 else b"{}" + rest))
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}: truncated or not JSON behind byte {at:,}: {error.msg}") from None


def chunks_of(path: Path, start: int, stop: int | None, progress: Progress) -> Generator[bytes, None, None]:
    """The content of a file, unpacked, in chunks of about CHUNK bytes."""
    size = max(path.stat().st_size, 1)
    if (packing := packing_of(path)) is not None:
        assert start == 0 and stop is None, "a packed file has one part"
        yield from unpacked(path, packing, CHUNK, lambda place: progress(place / size))
        return
    end = size if stop is None else stop
    with path.open("rb") as file:
        file.seek(start)
        while left := end - file.tell():
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                return
            yield chunk
            progress((file.tell() - start) / (end - start))
