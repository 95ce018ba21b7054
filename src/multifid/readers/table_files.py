"""Tables, batch by batch: parquet by row groups (package `pyarrow`), CSV and JSON row by row, packed or not.

A batch gives its columns flat (`Ragged`). What a file as a whole is not is a ValueError with its name.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from multifid.readers.contract import Part, Progress, cut
from multifid.readers.json_array import array_elements
from multifid.readers.packed import LONGEST, endings, opened_text, unpacked_name
from multifid.readers.table_columns import Ragged, field_of, of_objects, paths
from multifid.readers.tfrecord import NAMES as TFRECORD
from multifid.readers.tfrecord import examples

PARQUET = (".parquet", ".pq")
TEXT = {".csv": ",", ".tsv": "\t"}
LINES, JSON = (".jsonl", ".ndjson"), (".json",)
ENDINGS = (*PARQUET, *endings(*TEXT, *LINES, *JSON))
BATCH = 1024  # rows read at once
PART = 1 << 15  # rows of a part
MOST = 1 << 27  # values of a column in one row group


class Batch(NamedTuple):
    """Some rows: the number of the first, how many, and column(name, text); KeyError for one that there is not."""

    first: int
    rows: int
    column: Callable[[str, bool], Ragged]


def row_groups(path: Path) -> list[Part]:
    """Row groups of a parquet file, about PART rows together; other files are read from their beginning."""
    if not _is(path, PARQUET):
        return [None]
    with _parquet(path) as file:
        return cut([file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)], PART)


def batches(path: Path, columns: Iterable[str], progress: Progress, part: Part = None) -> Iterator[Batch]:
    """The rows of a file, or of some row groups of it, for the columns that are named. ValueError names the file."""
    if _is(path, PARQUET):
        return _of_parquet(path, list(columns), progress, part)
    return _of_records(_records(path, progress))


def columns_of(path: Path) -> list[str]:
    """The columns of a file, each with its type (parquet) or its first value."""
    if _is(path, PARQUET):
        with _parquet(path) as file:
            return [f"{field.name}: {field.type}" for field in file.schema_arrow]
    for record in islice(_records(path, lambda far: None), 1):
        return [f"{key} = {value!r:.60}" for key, value in record.items()]
    return []


def _is(path: Path, known: Iterable[str]) -> bool:
    return unpacked_name(path).name.lower().endswith(tuple(known))


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open file; whatever Arrow finds wrong with it is a ValueError that names it."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f'{path}: parquet needs the package pyarrow: pip install "multifid[table]"') from None
    path.stat()
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (arrow.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"{path}: truncated, damaged or no parquet file: {error}") from None


def _of_parquet(path: Path, columns: list[str], progress: Progress, part: Part) -> Iterator[Batch]:
    with _parquet(path) as file:
        there = set(file.schema_arrow.names)
        wanted = {name for column in columns for name, _ in paths(column)[::-1] if name in there}
        start, stop = part or (0, file.metadata.num_row_groups)
        first = sum(file.metadata.row_group(i).num_rows for i in range(start))
        for group in range(start, stop):
            _refuse_bombs(path, file.metadata.row_group(group), group)
            for batch in file.iter_batches(BATCH, [group], sorted(wanted), use_threads=False):
                yield Batch(first, batch.num_rows, _of_arrow(batch))
                first += batch.num_rows
            progress((group + 1 - start) / (stop - start))


def _refuse_bombs(path: Path, group: Any, number: int) -> None:
    for i in range(group.num_columns):
        column = group.column(i)
        if column.num_values > MOST:
            raise ValueError(
                f"{path}: row group {number} has {column.num_values:,} values in {column.path_in_schema}: more"
                f" than {MOST:,} are not read at once; write it with smaller row groups"
            )


def _of_arrow(batch: Any) -> Callable[[str, bool], Ragged]:
    def column(name: str, text: bool) -> Ragged:
        for own, fields in paths(name):
            if own in batch.schema.names:
                return _flat(batch.column(own), fields, text)
        raise KeyError(name)

    return column


def _flat(array: Any, fields: list[str], text: bool) -> Ragged:
    """An Arrow array laid flat. KeyError for a field that there is not, TypeError for another type."""
    import pyarrow as arrow
    from pyarrow import compute, types

    count, rows, fields = len(array), np.arange(len(array)), list(fields)
    while True:
        kind = array.type
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            lengths = compute.fill_null(compute.list_value_length(array), 0).to_numpy(zero_copy_only=False)
            if fields and fields[0].isdigit():
                enough = lengths > int(fields[0])
                array, rows = compute.list_element(array.filter(arrow.array(enough)), int(fields.pop(0))), rows[enough]
            else:
                array, rows = array.flatten(), np.repeat(rows, lengths)
        elif types.is_struct(kind):
            if not fields or kind.get_field_index(fields[0]) < 0:
                raise KeyError(fields[0] if fields else "")
            array = compute.struct_field(array, fields.pop(0))
        elif types.is_dictionary(kind):
            array = array.dictionary_decode()
        else:
            break
    if fields:
        raise KeyError(fields[0])
    return _leaves(array, rows, count, text)


def _leaves(array: Any, rows: np.ndarray, count: int, text: bool) -> Ragged:
    from pyarrow import float64, string, types

    kind = array.type
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)
    words = types.is_string(kind) or types.is_large_string(kind)
    if not (types.is_null(kind) or (words or types.is_integer(kind) if text else number)):
        raise TypeError(str(kind))
    there = ~array.is_null().to_numpy(zero_copy_only=False)
    counts = np.bincount(rows, minlength=count)
    single = (counts == 1)[rows] & ~there  # null in place of a value: there is none
    array, rows = array.filter(~single) if single.any() else array, rows[~single]
    counts = np.bincount(rows, minlength=count).astype(np.int64)
    bad = np.zeros(count, bool)
    if text:
        values: Any = array.cast(string()).to_pylist()
        bad[rows[[value is None for value in values]]] = True
        return Ragged(["" if value is None else value for value in values], counts, bad)
    if types.is_boolean(kind):
        array = array.cast("int8")
    return Ragged(array.cast(float64(), safe=False).to_numpy(zero_copy_only=False), counts, bad)


def _of_records(records: Iterator[dict[str, Any]]) -> Iterator[Batch]:
    first = 0
    known: set[str] = set()
    while found := list(islice(records, BATCH)):
        for record in found:
            known.update(record)

        def column(name: str, text: bool, found: list[dict[str, Any]] = found) -> Ragged:
            for own, fields in paths(name):
                if own in known:
                    return of_objects([field_of(record.get(own), fields) for record in found], text)
            raise KeyError(name)

        yield Batch(first, len(found), column)
        first += len(found)


def _records(path: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    if TFRECORD.search(path.name):
        found: Iterator[Any] = examples(path, progress)
    elif _is(path, JSON):
        found = array_elements(path, progress)
    else:
        found = json_lines(path, progress) if _is(path, LINES) else _rows(path, progress)
    for number, record in enumerate(found):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: row {number} is no object with named values")
        yield record
    progress(1.0)


def _text(path: Path, progress: Progress) -> Any:
    size = max(path.stat().st_size, 1)
    return opened_text(path, lambda place: progress(place / size))


def json_lines(path: Path, progress: Progress) -> Iterator[Any]:
    """The values of JSON Lines, plain or packed. ValueError names file and line."""
    with _text(path, progress) as file:
        for number, line in enumerate(_bounded(path, file), start=1):
            if line.strip():
                try:
                    yield orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON: {error.msg}") from None


def _rows(path: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    delimiter = next(mark for ending, mark in TEXT.items() if _is(path, [ending]))
    csv.field_size_limit(LONGEST)
    with _text(path, progress) as file:
        rows = csv.reader(_bounded(path, file), delimiter=delimiter, strict=True)
        try:
            header = [name.strip().removeprefix("\ufeff") for name in next(rows, [])]
            if len(set(header)) != len(header):
                raise ValueError(f"{path}: two columns have one name: {', '.join(header)}")
            for row in rows:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {rows.line_num}: {len(row)} cells under {len(header)} names of columns"
                    )
                if row:
                    yield dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from None


def _bounded(path: Path, file: io.TextIOBase) -> Iterator[str]:
    """Lines of a text; ValueError for an endless one."""
    while line := file.readline(LONGEST):
        if len(line) == LONGEST and not line.endswith("\n"):
            raise ValueError(f"{path}: a line is longer than {LONGEST:,} characters")
        yield line
