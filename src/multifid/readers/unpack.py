"""An HDF5 file from where it lies: plain, inside xz, or inside a tar inside xz, told apart by content.

Unpacking streams, is bounded in memory and disk, and writes to one file whose path the caller chose: names and links
inside an archive never reach the file system.
"""

import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from multifid.readers.contract import Progress

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
XZ_MAGIC = b"\xfd7zXZ\x00"
CHUNK = 1 << 20
MEMORY = 1 << 29  # bytes the decoder may use; `xz -9` needs 2^26
MOST = (1 << 28, 200)  # unpacked bytes: this many and this many times the packed ones; real files stay below 10 times


def hdf5_files(path: Path, scratch: Path, progress: Progress) -> Iterator[tuple[Path, float, float]]:
    """(HDF5 file, a, b) for each one in `path`; reading it covers the fractions a..b of the whole.

    Compressed ones are unpacked to `scratch`, which holds one at a time and is removed afterwards. ValueError names
    `path` where it is damaged, holds no HDF5, or unpacks to more than is plausible.
    """
    with open(path, "rb") as raw:
        magic = raw.read(len(HDF5_MAGIC))
        raw.seek(0)
        if magic == HDF5_MAGIC:
            yield path, 0.0, 1.0
            return
        if not magic.startswith(XZ_MAGIC):
            raise ValueError(f"{path}: neither HDF5 nor xz, it starts with {magic!r}")
        size, done = path.stat().st_size, 0.0
        try:
            for content in _hdf5_streams(io.BufferedReader(Unxz(raw, size), CHUNK)):
                with open(scratch, "wb") as out:
                    while chunk := content.read(CHUNK):
                        out.write(chunk)
                        progress(done + (raw.tell() / size - done) / 2)
                end = raw.tell() / size
                yield scratch, (done + end) / 2, end
                scratch.unlink()
                done = end
        except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
            raise ValueError(f"{path}: truncated or damaged near byte {raw.tell():,}: {error}") from error
        if not done:
            raise ValueError(f"{path}: the archive holds no HDF5 file")


def _hdf5_streams(unpacked: io.BufferedReader) -> Iterator[BinaryIO]:
    if unpacked.peek(len(HDF5_MAGIC)).startswith(HDF5_MAGIC):
        yield cast(BinaryIO, unpacked)
        return
    with tarfile.open(fileobj=unpacked, mode="r|") as archive:  # streaming: members in the order in which they lie
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                continue
            head = content.read(len(HDF5_MAGIC))
            if head == HDF5_MAGIC:
                yield cast(BinaryIO, _Rejoined(head, content))


class _Rejoined:
    """A stream whose first bytes have already been read."""

    def __init__(self, head: bytes, rest: object):
        self._head, self._rest = head, rest

    def read(self, count: int) -> bytes:
        head, self._head = self._head, b""
        return head or self._rest.read(count)  # type: ignore[attr-defined]


class Unxz(io.RawIOBase):
    """The unpacked bytes of one or more xz streams, with bounds on the decoder's memory and on the output."""

    def __init__(self, raw: BinaryIO, size: int):
        self._raw, self._decoder, self._input = raw, self._new(), b""
        self._left = max(MOST[0], MOST[1] * size)

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while True:
            if self._decoder.eof:
                self._input = self._next_stream()
                if not self._input:
                    return 0
                self._decoder = self._new()
            elif self._decoder.needs_input and not self._input:
                self._input = self._raw.read(CHUNK)
                if not self._input:
                    raise EOFError("the file ends inside an xz stream")
            output = self._decoder.decompress(self._input, max_length=len(buffer))
            self._input = b""  # the decoder keeps what it has not used yet
            if output:
                self._left -= len(output)
                if self._left < 0:
                    raise EOFError("it unpacks to more than is plausible")
                buffer[: len(output)] = output
                return len(output)

    def _next_stream(self) -> bytes:
        """The first bytes after the zeros that may pad an xz stream; empty at the end of the file."""
        rest = self._decoder.unused_data.lstrip(b"\0")
        while not rest and (chunk := self._raw.read(CHUNK)):
            rest = chunk.lstrip(b"\0")
        return rest
