"""Raw files to structures: one file per published format, one entry each in `formats.FORMATS`.

A reader is a function `read(path, options, progress, part=None)` that streams one file: it yields a `Structure` (in our
units), many at once as a `Block` (whose values may still be unfit: prepare looks at them), a `Skip` for a record that
cannot be used (never an exception: one bad record must not cost the file), or an `IsolatedAtom`. It raises `ValueError`
naming the file where the file as a whole is not what it should be. Memory does not grow with the file. `progress` is
called now and then with the fraction done, 0..1.

`parts(path, options)` cuts a file into parts that can be read by different processes: `(start, stop)` in whatever the
reader counts, and `read` with one of them yields what lies there. All parts one after the other are the file.

Beside the two, a reader's module says what prepare writes into the manifest:

    TASKS     task (label set) -> LabelSet, for the default options; the first is the default
    ENDINGS   of the names of files of the format, lower case: which files of a directory are read
    RELATIVE  what makes structures relatives (they share a split): "formula", "material", ...
    Options   pydantic model of what the user may choose, each field with a description
    holds     function(path): names and examples of values of the first record, for the error where none can be used
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from multifid.readers.formats import FORMATS
from multifid.store.block import Block
from multifid.structures.structure import Structure

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class LabelSet:
    """What the labels of a task are, for the manifest."""

    level_of_theory: str
    energy_kind: str  # e.g. "total", "total, uncorrected (VASP)"


@dataclass(frozen=True, slots=True)
class Skip:
    """A record that is not stored, and why. Counted by `reason`, listed by `where`."""

    reason: str  # a short constant phrase: "forces of another length than the atoms", "energy is NaN"
    where: str  # source_id of the record


@dataclass(frozen=True, slots=True)
class IsolatedAtom:
    """The energy of a free atom: overrides the fitted reference energy of its element; no structure of the store."""

    task: str
    number: int
    energy: float  # eV


Record = Structure | Block | Skip | IsolatedAtom
Part = tuple[int, int] | None  # None: the whole file
Read = Callable[[Path, object, Progress, Part], Iterator[Record]]


def one_part(path: Path, options: object) -> list[Part]:
    """The one part of a file that can only be read from its beginning."""
    return [None]


def cut(sizes: Sequence[int], most: int) -> list[Part]:
    """Consecutive things cut into parts of at least `most` together (the last may be smaller), as (first, end)."""
    parts: list[Part] = []
    start = filled = 0
    for end, size in enumerate(sizes, start=1):
        filled += size
        if filled >= most:
            parts.append((start, end))
            start, filled = end, 0
    if start < len(sizes) or not parts:
        parts.append((start, len(sizes)))
    return parts


def reader(name: str) -> ModuleType:
    """The module of a format; imported only when asked for. ValueError names the formats there are."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: known are {', '.join(FORMATS)}")
    return import_module(FORMATS[name].reader)
