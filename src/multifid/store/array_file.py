"""One array file of a store in its three lives: growing, finished and read by slices, mapped and verified."""

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from multifid.store.fields import BLOCK, HEADER, Field, damaged, npy_header

CACHE_LINE = 64  # bytes
READ_AHEAD = 1 << 17  # bytes: of one request Linux reads no more than the device's read-ahead, 128 KiB by default


class ArrayFile:
    """A growing npy file: rows are written anywhere (`write_rows`), the header is filled in at the end."""

    def __init__(self, path: Path, what: Field) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.what, self.rows = path, what, 0
        self.dtype = np.dtype(what.dtype)
        path.write_bytes(bytes(HEADER))

    def append(self, rows: np.ndarray) -> None:
        write_rows(self.path, self.what, self.rows, rows)
        self.rows += len(rows)

    def pad(self, rows: int) -> None:
        """Rows that say nothing, until there are `rows` of them."""
        while self.rows < rows:
            n = min(rows - self.rows, 65_536)
            self.append(np.full((n, *self.what.row), self.what.absent, self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.what.row)

    def close(self) -> None:
        """Finish the file; it is not on the disk yet (`writer.commit` sees to that, when much of it has arrived)."""
        with self.path.open("r+b") as file:
            file.write(npy_header(self.what.dtype, self.shape))


def write_rows(path: Path, what: Field, first: int, rows: np.ndarray) -> None:
    """Rows of a field file that exists, from row `first` on. OSError names the file."""
    content = np.ascontiguousarray(rows, what.dtype).reshape(-1).view(np.uint8).data
    try:
        with path.open("r+b") as file:
            file.seek(HEADER + first * np.dtype(what.dtype).itemsize * math.prod(what.row))
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


class Rows:
    """A finished field file, read by slices. Not memory-mapped: pages once touched would stay in the process."""

    def __init__(self, array: ArrayFile) -> None:
        self.path, self.dtype, self.shape = array.path, array.dtype, array.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        assert step == 1
        row = self.shape[1:]
        items = math.prod(row)
        offset = HEADER + start * items * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, (stop - start) * items, offset=offset).reshape(stop - start, *row)

    def parts(self, chosen: Sequence[slice]) -> np.ndarray:
        """Some small slices, end to end."""
        mapped = np.memmap(self.path, self.dtype, "r", HEADER, self.shape)
        return np.concatenate([mapped[part] for part in chosen])


class MappedFile:
    """One array file of an open store: its rows, and which of its blocks have been verified."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...], checksums: np.ndarray, verify: bool) -> None:
        self.path, self.checksums = path, checksums
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: a random row of a file in small pages costs a walk of page tables
            with contextlib.suppress(OSError):  # a kernel without huge pages refuses
                self.bytes.madvise(mmap.MADV_HUGEPAGE)
        self.rows = np.frombuffer(self.bytes, dtype, math.prod(shape), HEADER).reshape(shape)
        self.row_bytes = self.rows.itemsize * math.prod(shape[1:])
        self.line = max(CACHE_LINE // max(self.row_bytes, 1), 1)  # rows
        self.content = np.frombuffer(self.bytes, np.uint8, self.rows.nbytes, HEADER)
        self.lock = threading.Lock()  # a loader reads ahead in threads
        self.verified = np.full(len(checksums), not verify)
        self.left = len(checksums) if verify else 0

    def touch(self, first: np.ndarray, last: np.ndarray) -> None:
        """Verify the blocks that hold the rows `first` and `last` (equal-length arrays, inclusive).

        The rows in between must lie in the same blocks: true for the atoms of one structure (see `fields.MAX_ATOMS`).
        """
        if self.left == 0:
            return
        bytes_of = np.concatenate((first * self.row_bytes, (last + 1) * self.row_bytes - 1)) + HEADER
        touched = bytes_of // BLOCK
        new = touched[~self.verified[touched]]
        for block in np.unique(new):
            self._verify(int(block))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Some rows, mostly runs of consecutive ones: (n,) indices that exist."""
        if 1 < self.line < CACHE_LINE:
            # Rows are copied one call each, and wait for memory one after the other. Single bytes, one of each line of
            # the processor's cache, are fetched many at a time; then the rows are near.
            self.content.take(rows[:: self.line] * self.row_bytes)
        return self.rows.take(rows, axis=0)

    def ahead(self, start: int, stop: int) -> None:
        """Ask the kernel for the rows start .. stop-1, and for all of the blocks that will be verified with them."""
        first, last = HEADER + start * self.row_bytes, HEADER + stop * self.row_bytes
        if self.left:
            first, last = first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, len(self.bytes))
        for at in range(first // READ_AHEAD * READ_AHEAD, last, READ_AHEAD):
            self.bytes.madvise(mmap.MADV_WILLNEED, at, min(READ_AHEAD, len(self.bytes) - at))

    def whole(self) -> np.ndarray:
        """All rows, verified."""
        if self.left:
            for block in np.flatnonzero(~self.verified):
                self._verify(int(block))
        return self.rows

    def _verify(self, block: int) -> None:
        start = block * BLOCK
        with memoryview(self.bytes) as view, view[start : start + BLOCK] as part:
            found = xxhash.xxh3_64_intdigest(part)
        if found != int(self.checksums[block]):
            raise ValueError(damaged(self.path, block, len(self.bytes)))
        with self.lock:
            self.left -= not self.verified[block]
            self.verified[block] = True
