"""A table in CSV beside files of structures: a row for each structure, its file in one column, properties in others.

    file,gap,metal                      multifid finetune MODEL csv:table.csv --property gap:intensive ...
    cifs/0001.cif,1.13,no
    cifs/0002.cif,0.00,yes

Paths are relative to the table. The files are whatever ASE reads, of one structure each. Empty cells are labels that
are not there; vectors are three numbers in a cell.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from pydantic import Field, model_validator

from multifid.readers.ase_files import plain_structure, properties_of
from multifid.readers.charges import ChargeOptions
from multifid.readers.contract import LabelSet, Part, Progress, Record, cut
from multifid.readers.properties import NOTHING, PropertyOptions, Seeker
from multifid.readers.records import BadRecord, structure_or_skip
from multifid.structures.structure import Structure

TASKS: dict[str, LabelSet] = {}
RELATIVE = "formula"
ENDINGS = (".csv",)
FILES = ("file", "filename", "file_name", "path", "structure", "structure_file", "cif")  # columns, in lower case
PART = 2_000  # rows


class Options(ChargeOptions, PropertyOptions):
    """Which columns are read."""

    file_column: str | None = Field(
        None, description="column with the files of the structures; default: file, path, structure and the like"
    )
    ending: str = Field("", description="what is added to the names in that column, as .cif")

    @model_validator(mode="after")
    def _reads_something(self) -> "Options":
        if not self.properties:
            raise ValueError("a table has properties: say which, as --property gap:intensive")
        return self


def parts(path: Path, options: Options) -> list[Part]:
    """Rows in their order, PART at a time."""
    return cut([1] * max(len(_rows(path)[1]), 1), PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the rows of a table. `source_id`: the name of the structure's file. ValueError where it is no table."""
    columns, rows = _rows(path)
    where = _file_column(path, columns, options)
    start, stop = part or (0, len(rows))
    seeker = Seeker(path, options)
    for k, row in enumerate(rows[start:stop]):
        yield structure_or_skip(row[where], _structure, path, where, row, options, seeker)
        progress((k + 1) / (stop - start))
    if start == 0:
        seeker.check()


def companions(path: Path, options: Options) -> list[Path]:
    """The files that a table names and that are there: what is read of it depends on them too."""
    columns, rows = _rows(path)
    where = _file_column(path, columns, options)
    files = [path.parent / f"{row[where]}{options.ending}" for row in rows]
    return [file for file in files if file.is_file()]


def holds(path: Path) -> list[str]:
    """Columns and the first row."""
    columns, rows = _rows(path)
    return [f"{column} = {rows[0][column] if rows else ''}" for column in columns]


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            found = csv.DictReader(file)
            columns = [name.strip() for name in found.fieldnames or []]
            found.fieldnames = columns
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in found]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table in CSV ({error})") from None
    if not rows:
        raise ValueError(f"{path}: a table has a line with the names of its columns, and a row for each structure")
    return columns, rows


def _file_column(path: Path, columns: list[str], options: Options) -> str:
    named = [options.file_column] if options.file_column else [c for c in columns if c.lower() in FILES]
    if not named or named[0] not in columns:
        raise ValueError(
            f"{path}: no column {options.file_column or 'of files'} among {', '.join(columns)} "
            "(--option file_column=NAME says which one has the files of the structures)"
        )
    return named[0]


def _structure(path: Path, where: str, row: dict[str, str], options: Options, seeker: Seeker) -> Structure:
    file = path.parent / f"{row[where]}{options.ending}"
    if not file.is_file():
        raise BadRecord("the file of the structure is not there")
    try:
        found = ase.io.read(str(file), ":", do_not_split_by_at_sign=True)
    except Exception as error:  # ASE's readers raise whatever they meet
        raise BadRecord(f"ASE cannot read the file of the structure ({type(error).__name__})") from None
    frames = found if isinstance(found, list) else [found]
    if len(frames) != 1:
        raise BadRecord("the file holds several structures, not one")
    atoms: Atoms = frames[0]
    wanted = {one.key: one for one in seeker.wanted}
    for key, text in row.items():
        one = wanted.get(key)
        if text.lower() in NOTHING and not (one is not None and text in one.classes):
            atoms.info.pop(key, None)
        else:
            atoms.info[key] = text if one is None or one.kind == "class" else _cell(text)
    seeker.seen |= dict.fromkeys(row)
    for key in row:
        seeker.missing.pop(key, None)
    return plain_structure(atoms, properties_of(atoms, seeker, row[where]), row[where], options)


def _cell(text: str) -> Any:
    """The numbers in a cell."""
    words = text.replace(",", " ").strip("[]() ").split()
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError:
        raise BadRecord("a property is not a number") from None
    return numbers[0] if len(numbers) == 1 else numbers
