"""Columns of a table whose rows have different lengths, out of Arrow arrays, text cells and JSON values.

A column is laid flat: its values one after the other, and how many each row has.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

MARKS = re.compile(r"[\[\](),;'\"\s]+")


class Ragged(NamedTuple):
    """A column laid flat.

    values: float64, or a list of texts. counts: (rows,) how many each row has, 0 where it has none. bad: (rows,) bool,
    where a value is not what it should be.
    """

    values: Any
    counts: np.ndarray
    bad: np.ndarray

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The values of some rows, (rows,) bool."""
        return np.asarray(self.values[np.repeat(rows, self.counts)])

    def text(self) -> list[str | None]:
        """The only text of each row, None where there is none."""
        ends = np.cumsum(self.counts).tolist()
        return [self.values[end - 1] if n == 1 else None for end, n in zip(ends, self.counts.tolist(), strict=True)]


def of_objects(found: Sequence[Any], text: bool) -> Ragged:
    """From Python's values, one for each row: numbers or texts, in lists of any depth, None where there is none."""
    rows = [_texts(value) if text else _numbers(value) for value in found]
    counts = np.array([0 if row is None else len(row) for row in rows], np.int64)
    bad = np.array([row is None for row in rows], bool)
    whole = [row for row in rows if row is not None]
    if text:
        return Ragged([word for row in whole for word in row], counts, bad)
    return Ragged(np.concatenate([*whole, np.zeros(0)]), counts, bad)


def _numbers(value: Any) -> np.ndarray | None:
    """Flat float64; None where it is no number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return np.zeros(0)
    try:
        if isinstance(value, str):
            return _numbers_in(value)
        return np.asarray(value, np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        return None


def _numbers_in(cell: str) -> np.ndarray:
    """Numbers in a cell of text: JSON, as numpy prints them, or with spaces, commas or semicolons between them."""
    if cell.lstrip().startswith("["):
        try:
            return np.asarray(orjson.loads(cell), np.float64).reshape(-1)
        except orjson.JSONDecodeError:
            pass
    words = MARKS.sub(" ", cell).split()
    special = {"none": "nan", "null": "nan", "true": "1", "false": "0"}
    return np.array([float(special.get(word.lower(), word)) for word in words])


def _texts(value: Any) -> list[str] | None:
    """Flat texts; None where something else is among them."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, bool | float):
        return None
    if isinstance(value, int):
        return [str(value)]
    if isinstance(value, list):
        parts = [_texts(each) for each in value]
        return None if any(part is None for part in parts) else [word for part in parts if part for word in part]
    return None


def split_words(column: Ragged) -> Ragged:
    """Texts with several words in them, as `C H H` or `['C', 'H']`, word by word."""
    words = [MARKS.sub(" ", text).split() for text in column.values]
    lengths = np.array([len(own) for own in words], np.int64)
    rows = np.repeat(np.arange(len(column.counts)), column.counts)
    counts = np.bincount(rows, weights=lengths, minlength=len(column.counts)).astype(np.int64)
    return Ragged([word for own in words for word in own], counts, column.bad)


def field_of(value: Any, keys: Sequence[str]) -> Any:
    """The field of a nested value: keys of dictionaries, a number for an element of a list, else that of all of them.

    None where there is none.
    """
    for place, key in enumerate(keys):
        if isinstance(value, list):
            if key.isdigit():
                value = value[int(key)] if int(key) < len(value) else None
                continue
            return [field_of(each, keys[place:]) for each in value]
        value = value.get(key) if isinstance(value, dict) else None
    return value


def paths(column: str) -> list[tuple[str, list[str]]]:
    """How a name may be meant: (column, fields in it); the longest column first, since names may have dots."""
    words = column.split(".")
    return [(".".join(words[:n]), words[n:]) for n in range(len(words), 0, -1)]
