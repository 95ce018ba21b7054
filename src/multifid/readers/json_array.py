"""A JSON file that is one array, `[{...}, {...}]`, or an object that has one, element by element.

Plain or packed. Where elements end is found without parsing (`Scan`); memory holds one element and a chunk.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from multifid.readers.contract import Progress
from multifid.readers.json_file import DEEPEST, LARGEST, chunks_of, elements
from multifid.readers.json_scan import Scan
from multifid.readers.json_seams import BARE

FIRST = 1 << 22  # bytes within which the key of the array must begin
KEY = re.compile(r'\s*[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')


def array_under(path: Path, key: str, progress: Progress) -> Iterator[Any]:
    """The elements of the array under a key of the outermost object, whatever stands before and behind it.

    ValueError names file and place where there is no such array within the first megabytes, or it is truncated.
    """
    chunks = chunks_of(path, 0, None, progress)
    start = b""
    while (place := _array_begins(start, key)) is None and len(start) < FIRST:
        if not (more := next(chunks, b"")):
            break
        start += more
    if place is None:
        chunks.close()
        raise ValueError(f"{path}: a JSON object with an array `{key}` is expected")
    yield from _elements(path, start[place:], chunks, alone=False)


def _array_begins(start: bytes, key: str) -> int | None:
    """Which byte is the bracket of the array under `key`; None where the text does not reach so far."""
    text, place, decoder = start.decode("utf-8", "replace"), 0, json.JSONDecoder()
    try:
        while match := KEY.match(text, place):
            if json.loads(match[1]) == key:
                return len(text[: match.end()].encode()) if text[match.end() : match.end() + 1] == "[" else None
            _, place = decoder.raw_decode(text, match.end())
    except (ValueError, RecursionError):
        return None
    return None


def array_elements(path: Path, progress: Progress) -> Iterator[Any]:
    """The elements of the array that the file is, or that its first key has.

    ValueError names file and place where it is truncated or no such array.
    """
    chunks = chunks_of(path, 0, None, progress)
    start = next(chunks, b"")
    while start.isspace() and (more := next(chunks, b"")):
        start = more
    if not start.lstrip().startswith(b"["):
        chunks.close()
        yield from (element for _, element in elements(path, progress))
        return
    yield from _elements(path, start, chunks, alone=True)


def _elements(path: Path, start: bytes, chunks: Iterator[bytes], alone: bool) -> Iterator[Any]:
    """Those of an array that begins at `start`; alone: nothing but space may follow it."""
    rest, at, first, scan = b"", 0, True, Scan(1)
    for chunk in (part for parts in ([start], chunks) for part in parts):
        if scan.closed:
            if alone and chunk.strip():
                raise ValueError(f"{path}: something follows the array near byte {at:,}")
            continue
        ends, done = scan.ends(chunk) + len(rest), 0
        if scan.deepest > DEEPEST:
            raise ValueError(f"{path}: brackets more than {DEEPEST} deep near byte {at:,}")
        rest += chunk
        for end in ends.tolist():
            text = rest[done:end].strip()
            if scan.closed and end == ends[-1]:
                text = text[:-1].rstrip()
            yield from _parsed(path, text, first, at + done)
            done, first = end, False
        rest, at = rest[done:], at + done
        if scan.closed and not alone:
            return
        if scan.closed and rest.strip():
            raise ValueError(f"{path}: something follows the array near byte {at:,}")
        if len(rest) > LARGEST:
            raise ValueError(f"{path}: an element longer than {LARGEST:,} bytes begins at byte {at:,}")
    if not scan.closed:
        raise ValueError(f"{path}: truncated or not JSON near byte {at:,}: the array does not end")


def _parsed(path: Path, text: bytes, first: bool, place: int) -> list[Any]:
    """The elements in a text that begins with a bracket (the first) or a comma, at most one."""
    if not text:
        return []
    mark, content = text[:1], text[1:]
    if mark != (b"[" if first else b","):
        raise ValueError(f"{path}: truncated or not JSON near byte {place:,}: a comma and an element are expected")
    try:
        try:
            return orjson.loads(b"[" + content + b"]")
        except orjson.JSONDecodeError:
            return orjson.loads(b"[" + BARE.sub(b"null", content) + b"]")
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path}: truncated or not JSON near byte {place:,}: {error.msg}") from None
