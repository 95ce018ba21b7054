"""Where records end in a JSON text that comes chunk by chunk, found without parsing it.

Of the structural characters, outside strings, a closing bracket that returns to the depth of the records ends one. That
is exact and takes some nanoseconds for each byte, in numpy.
"""

import numpy as np

QUOTE, OPENING, CLOSING, ESCAPE = 1, 2, 3, 4
KINDS = np.zeros(256, np.uint8)
KINDS[list(b'"{[}]\\')] = [QUOTE, OPENING, OPENING, CLOSING, CLOSING, ESCAPE]
STRUCTURAL = (KINDS > 0).tobytes()  # a table for `bytes.translate`
PLAIN = np.flatnonzero(KINDS == 0).astype(np.uint8).tobytes()  # all other characters
STEPS = np.array([0, 0, 1, -1, 0], np.int8)  # of the level, by kind


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
        return at[self._follow(kind)] + 1

    def skip(self, chunk: bytes) -> None:
        """As `ends`, where nobody asks for the places."""
        if self._escaping or b"\\" in chunk:
            self.ends(chunk)
        else:
            self._follow(KINDS[np.frombuffer(chunk.translate(None, PLAIN), np.uint8)])

    def _follow(self, kind: np.ndarray) -> np.ndarray:
        """The structural characters one after the other: which of them end a record."""
        quotes = np.cumsum(kind == QUOTE, dtype=np.int32) + np.int32(self._in_string)
        step = STEPS[kind]
        step[(quotes & 1) == 1] = 0
        levels = np.cumsum(step, dtype=np.int32) + np.int32(self.level)
        if len(kind):
            self.deepest = max(self.deepest, int(levels.max()))
            self._in_string, self.level = int(quotes[-1] & 1), int(levels[-1])
        out = np.flatnonzero((step < 0) & (levels < self.depth))
        last = int(out[0]) if len(out) else len(kind)
        self.closed = len(out) > 0
        return np.flatnonzero((step[: last + 1] < 0) & (levels[: last + 1] <= self.depth))

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
