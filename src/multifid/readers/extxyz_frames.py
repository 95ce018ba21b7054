"""The text of extended XYZ: frames, `key=value` pairs, columns of atoms, and the numbers in them.

What ASE writes is read as ASE reads it: values in quotes, brackets or braces with escaped quotes inside, `_JSON ...`
for arrays of more dimensions, keys without a value, `T` and `F`. Beyond it: arrays in nested brackets, Fortran's
exponents (`1.0D+02`), `None` and the like for what is not there, and names of columns and keys in other cases.
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np

from multifid.readers.packed import LONGEST
from multifid.readers.records import BadRecord
from multifid.store.fields import MAX_ATOMS
from multifid.structures.elements import MAX_Z, NUMBERS, no_element

LONGEST_ATOM = 1 << 16  # characters of the line of an atom
PLAIN = "species:S:1:pos:R:3"  # the columns of plain XYZ
NOTHING = {"", "none", "null", "nan", "na", "n/a", "~"}  # words for a value that is not there
FORTRAN = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))[dD]([+-]?\d+)")
_PAIR = re.compile(
    r"""("[^"]*"|[^\s="']+)              # a key
        (?:\s*=\s*(?!(?<=\s)[^\s"'=]+=)(  # an empty value is none, whatever pair comes behind it
            "[^"\\]*(?:\\.[^"\\]*)*"     # its value: in quotes, in braces, in brackets (of brackets), or one word
          | '[^'\\]*(?:\\.[^'\\]*)*'
          | \{[^}]*\}
          | \[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]
          | [^\s"']+
        ))?""",
    re.VERBOSE,
)
_BREAKS = re.compile(r"[\s,;\[\]{}()]+")


class Frame:
    """One frame: `info` (key -> text of its value, unquoted; "" where it has none) and `columns` (see `Columns`)."""

    __slots__ = ("_structural", "columns", "info", "keys", "natoms")

    def __init__(self, natoms: int, comment: str, lines: list[str]) -> None:
        self.natoms = natoms
        self.info = pairs(comment)
        keys = tuple(self.info)
        self._structural = _structural_keys(keys)
        self.columns = Columns(self.structural("properties") or PLAIN, natoms, lines)
        self.keys = (*keys, self.columns.properties)  # what there is, whatever the values

    def structural(self, name: str) -> str | None:
        """The text of `Lattice`, `Properties` or `pbc`, in whatever case; None where it is not there."""
        key = self._structural.get(name)
        return None if key is None else self.info[key]


@lru_cache(maxsize=256)
def _structural_keys(keys: tuple[str, ...]) -> dict[str, str]:
    """Name in lower case -> the key, of those that say how a frame is to be read."""
    return {key.lower(): key for key in keys if key.lower() in ("lattice", "properties", "pbc")}


class Columns:
    """Columns of atoms as text: `name in columns`, `columns.get(name)`: rows of words, None where there is none.

    BadRecord where Properties are not name:type:width, or the lines are not as they say.
    """

    def __init__(self, properties: str, natoms: int, lines: list[str]) -> None:
        self.properties, self.places = properties, _places(properties)
        self.natoms, self.lines = natoms, lines

    @cached_property
    def rows(self) -> list[list[str]]:
        """The words of every atom."""
        rows = [line.split() for line in self.lines]
        width = max((last for _, last in self.places.values()), default=0)
        if self.natoms < 1 or set(map(len, rows)) != {width}:
            raise BadRecord("lines of atoms do not have the columns that Properties say" if self.natoms else "no atoms")
        return rows

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def get(self, name: str) -> list[list[str]] | None:
        if name not in self.places:
            return None
        first, last = self.places[name]
        return [row[first:last] for row in self.rows]

    def width(self, name: str) -> int:
        first, last = self.places[name]
        return last - first

    def named(self, *names: str) -> str | None:
        """The column with the first of the names (lower case) that one has, in whatever case."""
        return _named(self.properties, names)


@lru_cache(maxsize=256)
def _places(properties: str) -> dict[str, tuple[int, int]]:
    """Name of a column -> (first word, behind its last) in the line of an atom."""
    words = properties.split(":")
    if len(words) % 3 or not all(width.isdecimal() and len(width) < 9 for width in words[2::3]):
        raise BadRecord("Properties are not name:type:width")
    ends = np.cumsum([int(width) for width in words[2::3]]).tolist()
    return dict(zip(words[::3], zip([0, *ends[:-1]], ends, strict=True), strict=True))


@lru_cache(maxsize=256)
def _named(properties: str, names: tuple[str, ...]) -> str | None:
    cases = {column.lower(): column for column in reversed(_places(properties))}
    return next((cases[name] for name in names if name in cases), None)


def frames(path: Path, file: TextIO) -> Iterator[tuple[int, str, list[str] | None]]:
    """(atoms, comment, lines of atoms) of every frame; lines are None where there are more than a store takes.

    ValueError names file and line where a frame does not begin with its number of atoms, or does not end.
    """
    number = 0
    atoms = iter(partial(file.readline, LONGEST_ATOM), "")
    while line := file.readline(LONGEST):
        number += 1
        if number == 1:
            line = line.removeprefix("\ufeff")  # some editors write one
        if not line.strip():  # blank lines after a frame
            continue
        try:
            natoms = int(line)
        except ValueError:
            shown = line.strip()[:40]
            raise ValueError(
                f"{path}, line {number}: a frame must begin with its number of atoms, not {shown!r}"
            ) from None
        comment = file.readline(LONGEST)
        if len(comment) == LONGEST:
            raise ValueError(f"{path}, line {number + 1}: a line of more than {LONGEST:,} characters")
        lines = list(islice(atoms, min(max(natoms, 0), MAX_ATOMS)))
        left = natoms - len(lines)
        if natoms > MAX_ATOMS:
            left -= sum(1 for _ in islice(atoms, min(left, sys.maxsize)))
        if not comment or left:
            raise ValueError(f"{path}, line {number}: the file ends within this frame of {natoms} atoms")
        number += 1 + natoms
        yield natoms, comment, lines if natoms <= MAX_ATOMS else None


def pairs(comment: str) -> dict[str, str]:
    """Keys of a comment line and the texts of their values, without what encloses them."""
    return {key.strip('"'): _unquoted(value) for key, value in _PAIR.findall(comment)}


def _unquoted(value: str) -> str:
    match value[:1]:
        case '"' | "'":
            text = value[1:-1]
            return re.sub(r"\\(.)", r"\1", text) if "\\" in text else text
        case "{" | "[" if value[-1] in "}]":
            return value[1:-1]
    return value


def numbers_in(text: str) -> np.ndarray | None:
    """The numbers of a value: () of one, (n,) of several, or as nested as they are in brackets or JSON; None of none.

    BadRecord where it is something else, which the caller names.
    """
    word = text.strip()
    try:
        return np.array(float(word)) if "_" not in word else _array_in(word)
    except ValueError:
        return None if word.lower() in NOTHING else _array_in(word)


def _array_in(text: str) -> np.ndarray:
    try:
        if text.startswith("_JSON"):
            found = np.array(json.loads(text[len("_JSON") :]), np.float64)
        else:
            rows = re.findall(r"\[[^\[\]]*\]", text) or [text]
            found = np.array([list(map(number_in, filter(None, _BREAKS.split(row)))) for row in rows])
            found = found if "[" in text else found[0]
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise BadRecord("not numbers") from None
    return found.reshape(()) if found.size == 1 else found


def number_in(word: str) -> float:
    """A number as C, Python or Fortran write it; NaN for the words for nothing. ValueError otherwise."""
    try:
        if "_" not in word:
            return float(word)
    except ValueError:
        if word.lower() in NOTHING:
            return float("nan")
        if match := FORTRAN.fullmatch(word):
            return float(f"{match[1]}e{match[2]}")
    raise ValueError(f"{word!r} is not a number")


def table(rows: list[list[str]]) -> tuple[np.ndarray, bool]:
    """Words of atoms as numbers (atoms, width); NaN for those that are none, and whether there are such."""
    try:
        return np.array(rows, np.float64), True
    except ValueError:
        pass
    sound, values = True, np.full((len(rows), len(rows[0])), np.nan)
    for i, row in enumerate(rows):
        for j, word in enumerate(row):
            try:
                values[i, j] = number_in(word)
            except ValueError:
                sound = False
    return values, sound


def elements(columns: Columns) -> np.ndarray:
    """(atoms,) int64, from symbols or atomic numbers."""
    symbols = columns.named("species", "symbols", "element", "elements")
    if symbols is not None:
        first = columns.places[symbols][0]
        words = [row[first] for row in columns.rows]
        try:
            return np.array([NUMBERS[word] for word in words])
        except KeyError:
            return np.array([_of_symbol(word) for word in words])
    numbers = columns.named("z", "numbers", "atomic_numbers")
    if numbers is None:
        raise BadRecord("no species")
    try:
        values = np.array([int(row[0]) for row in columns.get(numbers) or []])
    except (ValueError, OverflowError):
        raise BadRecord("atomic numbers are not whole numbers") from None
    if values.min() < 1 or values.max() > MAX_Z:
        raise BadRecord(no_element(int(values[(values < 1) | (values > MAX_Z)][0])))
    return values


def _of_symbol(word: str) -> int:
    if (number := NUMBERS.get(word.capitalize())) is None:  # as ASE takes them
        raise BadRecord(no_element(word))
    return number
