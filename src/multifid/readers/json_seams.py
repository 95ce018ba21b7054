"""Where records of a JSON text meet, looked for by the bytes that stood there between the first two of them.

A record found so is only a guess until it is parsed. Then it is certain: a text behind a record that parses as one *is*
the next, because it ends with the bracket that its first one asks for.

JSON has no NaN and the parser refuses it, but published files contain bare `NaN` tokens: they become `null`.
"""

import re
from typing import Any

import orjson

BARE = re.compile(rb"(?:(?<=[\[:,\s])|\A)(?:NaN|-?Infinity)(?=[\s,\]}])")
COLON = re.compile(rb"\s*:")
LONGEST = 256  # bytes that are looked at on each side of a seam
ENDING = re.compile(rb"[\]}](?:\s*[\]}])*\Z")  # the brackets that end a record
BEGINNING = {  # from the comma on, what all records have: their first brackets (1) or their first key (2)
    1: re.compile(rb'(?P<fixed>\s*,\s*")[^"\\]*"(?P<opening>\s*:\s*[\[{]\s*(?:[\[{]\s*)*"?)'),
    2: re.compile(rb'(?P<fixed>\s*,\s*\{\s*"[^"\\]*")'),
}


class Seam:
    """The bytes where one record ends and the next one begins, learned from two records of a file."""

    def __init__(self, ending: bytes, beginning: re.Match, depth: int) -> None:
        self.ending, self.bytes = len(ending), ending + beginning["fixed"]
        self.depth = depth
        self.key = None if depth == 2 else re.compile(rb'[^"\\]*"' + re.escape(beginning["opening"]))

    @classmethod
    def between(cls, record: bytes, behind: bytes, depth: int) -> "Seam | None":
        """Of a record and what follows it; None where they are unlike anything that is looked for."""
        ending, beginning = ENDING.search(record[-LONGEST:]), BEGINNING[depth].match(behind[:LONGEST])
        return cls(ending[0], beginning, depth) if ending and beginning else None

    def find(self, text: bytearray, start: int) -> int:
        """Where the record that begins at `start` ends, probably; -1 where that is not in the text."""
        while (place := text.find(self.bytes, start)) >= 0:
            if self.key is None or self.key.match(text, place + len(self.bytes)):
                return place + self.ending
            start = place + 1
        return -1

    def parse(self, text: bytes) -> Any:
        """Exactly one record, as an object or array of one member; None where the text is anything else."""
        if self.depth == 1 and not _of_one_key(text.lstrip()):
            return None
        try:
            record = parse(text, self.depth)
        except orjson.JSONDecodeError:
            return None
        return record if len(record) == 1 else None


def _of_one_key(text: bytes) -> bool:
    """Whether the first key of some members is surely not that of another one: the parser keeps the last of a key."""
    end = text.find(b'"', 1) + 1
    if text[:1] != b'"' or end == 0 or b"\\" in text:
        return False
    place = text.find(text[:end], end)
    while place >= 0:
        if COLON.match(text, place + end):
            return False
        place = text.find(text[:end], place + end)
    return True


def parse(text: bytes, depth: int) -> Any:
    """Records as the members of an object (depth 1) or an array (depth 2). orjson.JSONDecodeError where it is none."""
    text = b"".join((b"{", text, b"}") if depth == 1 else (b"[", text, b"]"))
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        if b"NaN" in text or b"Infinity" in text:
            return orjson.loads(BARE.sub(b"null", text))
        raise
