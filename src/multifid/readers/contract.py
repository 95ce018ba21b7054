"""What a reader yields, and how it cuts a file into parts; see `multifid.readers`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from multifid.store.block import Block
from multifid.structures.properties import Property
from multifid.structures.structure import Structure

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class LabelSet:
    """What the labels of a task are, for the manifest."""

    level_of_theory: str
    energy_kind: str  # e.g. "total", "total, uncorrected (VASP)"; "property" where the labels are one
    property: Property | None = None


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
