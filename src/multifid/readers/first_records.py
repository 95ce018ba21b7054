"""A reader that ends after some records of a file, for a look at it."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from multifid.readers.contract import Part, Progress, Record
from multifid.store.block import Block


class FirstRecords:
    """A reader (`multifid.readers`) that ends after some records of a file."""

    def __init__(self, module: ModuleType, records: int) -> None:
        self._module, self._records = module, records

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def read(self, path: Path, options: Any, progress: Progress, part: Part = None) -> Iterator[Record]:
        """As the reader does it, from the beginning of the file."""
        left = self._records
        found = self._module.read(path, options, progress, part)
        for record in islice(found, self._records):
            if isinstance(record, Block) and len(record) > left:
                record = record.take(np.arange(len(record)) < left)
            yield record
            left -= len(record) if isinstance(record, Block) else 1
            if left <= 0:
                return
