"""LMDB files, opened so that a damaged one is an error: the library maps the file, and would end the process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb


@contextmanager
def opened_lmdb(path: Path) -> Iterator[tuple[Any, int]]:
    """(transaction, number of keys, at least 1). ValueError names the file where it is truncated or no LMDB file."""
    size = path.stat().st_size
    try:
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=True, max_readers=1) as database:
            needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
            if size < needed:
                raise ValueError(f"{path}: truncated: {size:,} bytes, but its header says {needed:,}")
            with database.begin() as transaction:
                yield transaction, max(database.stat()["entries"], 1)
    except lmdb.Error as error:
        raise ValueError(f"{path}: damaged or not an LMDB file: {error}") from error
