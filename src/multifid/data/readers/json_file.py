"""Large JSON files, plain or bz2, record by record: the file is cut where records end, and a fast parser gets the rest.

    {"mp-1": {...}, "mp-2": {...}}                depth 1: a record is a key and its value
    {"entries": [{...}, {...}], "more": ...}      depth 2: a record is an element of the array

The files have 1-12 GB. Where records end is found without parsing: of the structural characters, outside strings, a
closing bracket that returns to the depth ends a record. That costs 2-3 ns for each byte in numpy, a tenth of parsing,
and is exact, so that plain files can be read in parts by several processes. Memory holds one record.

JSON has no NaN and the parser refuses it, but published files contain bare `NaN` tokens: they become `null`.
"""

import bz2
import queue
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson

from multifid.data.readers import Part, Progress

CHUNK = 1 << 18
PACKED = 1 << 12, 1 << 16  # bytes of bz2 that are unpacked at once: they count as unpacked when they are read
USUAL = 50  # times as many bytes unpacked as packed: below it, steps become longer
SWITCH = 5e-4  # seconds that the thread that unpacks waits for the interpreter; by default ten times as much
PART = 1 << 25  # bytes of a part
LARGEST = 1 << 27  # bytes of a record; the largest published ones are below 2^24
DEEPEST = 1024  # levels of brackets: more, the parser does not take
MOST = (1 << 20, 200)  # unpacked bytes: this many and this many times the packed ones; real files stay below 20 times
BARE = re.compile(rb"(?:(?<=[\[:,\s])|\A)(?:NaN|-?Infinity)(?=[\s,\]}])")
FIRST_KEY = re.compile(rb'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*(.)', re.DOTALL)
# What stands before the first record, by depth.
OPEN = {
    1: re.compile(rb"\s*\{"),
    2: re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\[', re.DOTALL),
}  # before the first record

QUOTE, OPENING, CLOSING, ESCAPE = 1, 2, 3, 4
KINDS = np.zeros(256, np.uint8)
KINDS[list(b'"{[}]\\')] = [QUOTE, OPENING, OPENING, CLOSING, CLOSING, ESCAPE]
STRUCTURAL = (KINDS > 0).tobytes()  # a table for `bytes.translate`
STEPS = np.array([0, 0, 1, -1, 0], np.int8)  # of the level, by kind


class Text(NamedTuple):
    """One record or a few, as they lie in the file, and at which (unpacked) byte."""

    start: int
    text: bytes


def first_key(path: Path) -> tuple[str, bytes]:
    """(first key, first byte of its value) of the JSON object in a file; ("", b"") where it is empty.

    ValueError names the file where it is no JSON object.
    """
    chunks = _chunks(path, 0, None, lambda fraction: None)
    start = next(chunks, b"")
    chunks.close()
    if match := FIRST_KEY.match(start):
        return match[1].decode("utf-8", "replace"), match[2]
    if re.fullmatch(rb"\s*\{\s*\}\s*", start):
        return "", b""
    raise ValueError(f"{path}: a JSON object is expected, but the file starts with {start[:40]!r}")


def json_parts(path: Path, depth: int) -> list[Part]:
    """A plain file cut between records, about PART bytes each; a packed file can only be read from its beginning."""
    if is_packed(path):
        return [None]
    size, cuts, at, scan = path.stat().st_size, [0], 0, Scan(depth)
    for chunk in _chunks(path, 0, None, lambda fraction: None):
        ends = scan.ends(chunk)
        ends = ends[:-1] if scan.closed else ends
        if scan.deepest > DEEPEST:
            raise ValueError(f"{path}: brackets more than {DEEPEST} deep near byte {at:,}")
        while len(ends) and (place := np.searchsorted(ends, cuts[-1] + PART - at)) < len(ends):
            cuts.append(at + int(ends[place]))
        if scan.closed:
            break
        at += len(chunk)
    return [(start, stop) for start, stop in zip(cuts, [*cuts[1:], size], strict=True) if start < stop]


def is_packed(path: Path) -> bool:
    """Whether a file is bz2, whatever its name."""
    with path.open("rb") as file:
        return file.read(3) == b"BZh"


def pairs(path: Path, progress: Progress, part: Part = None) -> Iterator[tuple[str, Any]]:
    """(key, value) of the outermost object, one after the other."""
    for record in _records(path, 1, progress, part):
        yield from _parsed(path, record, b"{", b"}").items()


def elements(path: Path, progress: Progress, part: Part = None) -> Iterator[tuple[int, Any]]:
    """(first byte, element) of the array under the first key of the outermost object, one after the other."""
    for record in _records(path, 2, progress, part):
        for element in _parsed(path, record, b"[", b"]"):
            yield record.start, element


def _parsed(path: Path, record: Text, before: bytes, after: bytes) -> Any:
    text = before + record.text + after
    if b"NaN" in text or b"Infinity" in text:
        text = BARE.sub(b"null", text)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        place = record.start + error.pos - 1
        raise ValueError(f"{path}: truncated or not JSON near byte {place:,}: {error.msg}") from None


class Scan:
    """Finds where records end in a file that comes chunk by chunk, from its beginning or from behind a record."""

    def __init__(self, depth: int, at_start: bool = True) -> None:
        self.depth = depth
        self.level = 0 if at_start else depth
        self.deepest = 0
        self.closed = False  # the object or array of the records has ended
        self._in_string = 0
        self._escaping = False  # the chunk before ended with a backslash that escapes what comes

    def ends(self, chunk: bytes) -> np.ndarray:
        """Places behind the records that end in this chunk; the last is that of the bracket around all, if `closed`."""
        at = np.flatnonzero(np.frombuffer(chunk.translate(STRUCTURAL), bool))
        kind = KINDS[np.frombuffer(chunk, np.uint8)[at]]
        if self._escaping or b"\\" in chunk:
            keep = self._unescaped(at, kind, len(chunk))
            at, kind = at[keep], kind[keep]
        quotes = np.cumsum(kind == QUOTE, dtype=np.int32) + np.int32(self._in_string)
        step = STEPS[kind]
        step[(quotes & 1) == 1] = 0
        levels = np.cumsum(step, dtype=np.int32) + np.int32(self.level)
        if len(at):
            self.deepest = max(self.deepest, int(levels.max()))
            self._in_string, self.level = int(quotes[-1] & 1), int(levels[-1])
        out = np.flatnonzero((step < 0) & (levels < self.depth))
        last = int(out[0]) if len(out) else len(at)
        self.closed = len(out) > 0
        return at[: last + 1][(step[: last + 1] < 0) & (levels[: last + 1] <= self.depth)] + 1

    def _unescaped(self, at: np.ndarray, kind: np.ndarray, size: int) -> np.ndarray:
        """Which of the structural characters are none behind a backslash (itself not escaped)."""
        slashes = at[kind == ESCAPE]
        if self._escaping:
            slashes = np.concatenate([[-1], slashes])
        runs = np.flatnonzero(np.diff(slashes, prepend=-3) != 1)
        lengths = np.diff([*runs, len(slashes)])
        behind = slashes[runs] + lengths  # the first character behind each run of backslashes
        escaped = behind[lengths % 2 == 1]
        self._escaping = bool(len(escaped) and escaped[-1] == size)
        return (kind != ESCAPE) & ~np.isin(at, escaped)


def _records(path: Path, depth: int, progress: Progress, part: Part) -> Iterator[Text]:
    """The records of a part, commas removed. ValueError if the file is truncated or something follows the object."""
    start, stop = part or (0, None)
    scan = Scan(depth, start == 0)
    rest, at = bytearray(), start  # what is read but not given out, and where that starts
    header: re.Pattern | None = OPEN[depth] if start == 0 else None
    chunks = _chunks(path, start, stop, progress)
    for chunk in chunks:
        ends = scan.ends(chunk) + len(rest)
        if scan.deepest > DEEPEST:
            raise ValueError(f"{path}: brackets more than {DEEPEST} deep in the record at byte {at:,}")
        rest += chunk
        done = 0
        for end in ends.tolist():
            closing = scan.closed and end == ends[-1]
            text = bytes(rest[done : end - closing])
            if header is not None:
                text = text[header.match(text).end() :]  # type: ignore[union-attr]
            elif text and not text.isspace():
                text = _without_comma(path, text, at + done)
            if text and not text.isspace():
                yield Text(at + end - closing - len(text), text)
            done, header = end, None
        del rest[:done]
        at += done
        if scan.closed:
            break
        if len(rest) > LARGEST:
            raise ValueError(f"{path}: a record longer than {LARGEST:,} bytes begins at byte {at:,}")
    if scan.closed:
        _check_end(path, bytes(rest), chunks, at, depth)
    elif stop is None or stop == path.stat().st_size or rest:
        raise ValueError(f"{path}: truncated or not JSON near byte {at + len(rest):,}: it ends within a record")


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


def _chunks(path: Path, start: int, stop: int | None, progress: Progress) -> Generator[bytes, None, None]:
    """The content of a file, unpacked, in chunks of about CHUNK bytes."""
    size = max(path.stat().st_size, 1)
    if is_packed(path):
        assert start == 0 and stop is None, "a packed file has one part"
        yield from _unpacked(path, lambda place: progress(place / size))
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


def _unpacked(path: Path, progress: Callable[[int], None]) -> Iterator[bytes]:
    """The content of a bz2 file, a few chunks ahead: unpacking, in a thread, needs no interpreter."""
    ahead: queue.Queue[tuple[int, bytes] | Exception | None] = queue.Queue(maxsize=8)
    stop = threading.Event()

    def put(item: tuple[int, bytes] | Exception | None) -> None:
        while not stop.is_set():
            try:
                return ahead.put(item, timeout=0.1)
            except queue.Full:
                continue

    def unpack() -> None:
        try:
            with path.open("rb") as raw:
                for chunk in _streams(path, raw):
                    put((raw.tell(), chunk))
                    if stop.is_set():
                        return
            put(None)
        except Exception as error:
            put(error)

    thread = threading.Thread(target=unpack, daemon=True)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(SWITCH, interval))
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item[1]
            progress(item[0])
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def _streams(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The content of one bz2 stream after the other; what follows the last and is none is an error."""
    step, unpacked = PACKED[0], 0

    def more() -> bytes:
        nonlocal step
        step = min(2 * step, PACKED[1]) if unpacked < USUAL * raw.tell() else PACKED[0]
        return raw.read(step)

    decoder, packed = bz2.BZ2Decompressor(), raw.read(step)
    try:
        while True:
            if chunk := decoder.decompress(packed, CHUNK):
                unpacked += len(chunk)
                if unpacked > max(MOST[0], MOST[1] * raw.tell()):
                    raise EOFError("it unpacks to more than is plausible")
                yield chunk
            if decoder.eof:
                packed = decoder.unused_data or more()
                if not packed:
                    return
                decoder = bz2.BZ2Decompressor()
            else:
                packed = more() if decoder.needs_input else b""
                if decoder.needs_input and not packed:
                    raise EOFError("the file ends inside a bz2 stream")
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: truncated or damaged near byte {raw.tell():,}: {error}") from None
