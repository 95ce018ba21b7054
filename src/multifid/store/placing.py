"""Columns of structures into the field files of a store to be, by whichever process has them.

The writer counts (`Contents`) and says where rows go (`Place`); then several processes can write at once, in any order,
because no two of them write the same bytes.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from multifid.store.array_file import write_rows
from multifid.store.fields import SKIPPED
from multifid.store.fields import field as field_of
from multifid.structures.elements import MAX_Z

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Contents:
    """What some structures, and the records that were skipped among them, take up in a store."""

    structures: int = 0
    atoms: int = 0
    source_bytes: int = 0
    columns: list[str] = field(default_factory=list)  # those without labels
    labels: dict[str, int] = field(default_factory=dict)  # columns of labels -> how many structures have one, or none
    elements: list[tuple[int, int]] = field(default_factory=list)  # (Z, atoms)
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> how many records
    skipped_bytes: int = 0  # of their lines

    def renamed(self, tasks: dict[str, str]) -> "Contents":
        """With other names of label sets."""
        values = asdict(self)
        return Contents(**{**values, "labels": {renamed(name, tasks): n for name, n in self.labels.items()}})

    @property
    def stored(self) -> list[str]:
        """The columns that have rows of their own."""
        return [*self.columns, *(name for name, count in self.labels.items() if count)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of some structures begin in the field files of a folder."""

    folder: Path
    structure: int
    atom: int
    source_byte: int
    skipped_byte: int


def contents_of(columns: Columns, source_id: np.ndarray) -> Contents:
    """Of structures as columns (`Block`); source_id: their source ids as bytes."""
    natoms = columns["natoms"].astype(np.int64)
    labels = {name: _labelled(name, x, natoms) for name, x in columns.items() if name.startswith("labels/")}
    elements = np.bincount(columns["numbers"], minlength=MAX_Z + 1)
    return Contents(
        structures=len(natoms),
        atoms=int(natoms.sum()),
        source_bytes=len(source_id),
        columns=[name for name in columns if name not in labels],
        labels=labels,
        elements=[(int(z), int(elements[z])) for z in np.flatnonzero(elements)],
    )


def place(where: Place, contents: Contents, columns: Columns, source_id: np.ndarray, lengths: np.ndarray) -> None:
    """Write columns to their rows. lengths: bytes of the source id of each structure."""
    first = {"structures": where.structure, "atoms": where.atom}

    def write(name: str, row: int, values: np.ndarray) -> None:
        write_rows(field_file(where.folder, name), field_of(name), row, values)

    for name in contents.stored:
        write(name, first[field_of(name).rows], columns[name])
    if contents.structures:
        write("offsets", where.structure + 1, where.atom + np.cumsum(columns["natoms"], dtype=np.int64))
        write("source_id", where.source_byte, source_id)
        write("source_id_offsets", where.structure + 1, where.source_byte + np.cumsum(lengths))


def place_skipped(where: Place, lines: bytes) -> None:
    """Write the lines that say what was skipped."""
    if lines:
        with (where.folder / SKIPPED).open("r+b") as file:
            file.seek(where.skipped_byte)
            file.write(lines)


def skipped_line(file: str, where: str, reason: str) -> bytes:
    """A line of `skipped.jsonl`."""
    told: dict[str, Any] = {"file": file, "where": where, "reason": reason}
    try:
        return json.dumps(told, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a name that is no text
        return json.dumps(told).encode() + b"\n"


def field_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def renamed(column: str, tasks: dict[str, str]) -> str:
    """A column's name with another name of its label set."""
    match column.split("/"):
        case ["labels", task, kind]:
            return f"labels/{tasks[task]}/{kind}"
        case _:
            return column


def _labelled(name: str, values: np.ndarray, natoms: np.ndarray) -> int:
    """How many structures have a label in a column."""
    if not np.isnan(values).any():
        return len(natoms)
    has = ~np.isnan(values.reshape(len(values), -1)).all(axis=1)
    if field_of(name).rows == "atoms":
        has = np.logical_or.reduceat(has, np.cumsum(natoms) - natoms)
    return int(has.sum())
