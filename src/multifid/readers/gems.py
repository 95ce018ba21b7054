"""GEMS and its kin (`general_protein_fragments.db` and others): fragments of proteins, SQLite databases of their own.

    data       id, charge, unpaired electrons, atomic numbers, positions, energy, forces, dipole; arrays as bytes
    metadata   the last column of row 1: how many

Unke et al., Science Advances 10, eadn4397 (2024); files: https://zenodo.org/records/10720941. Positions float32 in
angstrom, energies in eV, forces float32 in eV/angstrom, PBE0/def2-TZVPP+MBD, as the loader of openQDC documents them;
columns are told by their order. Relatives are the formula: which fragments are of one protein is not said.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from multifid.readers.contract import LabelSet, Part, Progress, Record, cut
from multifid.readers.records import BadRecord, atomic_numbers, number, structure_or_skip, vectors, whole
from multifid.structures.elements import formula
from multifid.structures.structure import Labels, Structure

TASK = "gems"
TASKS = {TASK: LabelSet("PBE0+MBD/def2-TZVPP", "as in the file")}
RELATIVE = "formula"
ENDINGS = (".db",)
PART = 1 << 16  # rows of a part
LARGEST = 1 << 24  # bytes of an array
COLUMNS = 8


class Options(BaseModel):
    """GEMS leaves nothing to choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parts(path: Path, options: Options) -> list[Part]:
    """Rows by their numbers, PART at a time."""
    with _opened(path) as database:
        lowest, highest = database.execute("SELECT MIN(id), MAX(id) FROM data").fetchone()
        first, end = int(lowest or 0), int(highest or 0) + 1
        blocks = range(first, end, PART) if (end - first) // PART < 1 << 20 else []
        return [(low, min(low + PART, end)) for low in blocks] or cut([1], 1)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the rows of one database; part: their numbers. `source_id`: the number.

    ValueError if the file is damaged, or no such database.
    """
    with _opened(path) as database:
        start, stop = part or (-(1 << 62), 1 << 62)
        rows = database.execute("SELECT * FROM data WHERE id >= ? AND id < ? ORDER BY id", (start, stop))
        if len(rows.description) != COLUMNS:
            raise ValueError(f"{path}: {COLUMNS} columns are expected in `data`, and there are {len(rows.description)}")
        for row in rows:
            yield structure_or_skip(str(row[0]), _structure, row)
            if part and row[0] % 100 == 0:
                progress((row[0] - start) / (stop - start))
    progress(1.0)


def holds(path: Path) -> list[str]:
    """The columns."""
    with _opened(path) as database:
        return [f"data.{column[0]}" for column in database.execute("SELECT * FROM data LIMIT 1").description]


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    path.stat()
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST)
            yield database
    except (sqlite3.Error, OverflowError) as error:
        raise ValueError(f"{path}: truncated, damaged or no database of GEMS: {error}") from error


def _structure(row: tuple[Any, ...]) -> Structure:
    where, charge, unpaired, numbers, positions, energy, forces, _ = row
    elements = atomic_numbers(_array(numbers, "<i4", "atomic numbers"))
    count = len(elements)
    labels = Labels(
        energy=float("nan") if energy is None else number(energy, "energy"),
        forces=None if forces is None else _vectors(forces, count, "forces"),
    )
    return Structure(
        numbers=elements,
        positions=_vectors(positions, count, "positions"),
        labels={TASK: labels},
        relative=formula(elements),
        source_id=str(where),
        charge=None if charge is None else whole(charge, "charge"),
        spin=None if unpaired is None else whole(unpaired, "unpaired electrons") + 1,
    )


def _array(value: Any, dtype: str, what: str) -> np.ndarray:
    if not isinstance(value, bytes) or len(value) % 4:
        raise BadRecord(f"{what} are not an array of numbers")
    return np.frombuffer(value, dtype)


def _vectors(value: Any, count: int, what: str) -> np.ndarray:
    flat = _array(value, "<f4", what)
    return vectors(flat.reshape(-1, 3) if flat.size % 3 == 0 else flat, count, what)
