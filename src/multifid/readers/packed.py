"""Files packed with gzip, xz, bz2 or zstd, told apart by their first bytes, never by name; unpacked within bounds.

A thread unpacks ahead of whoever reads. Memory does not grow with the file, whatever it claims: a step of the decoder
gives at most a chunk, and a file that unpacks to implausibly more than it has bytes is refused where that begins.
"""

import bz2
import io
import lzma
import queue
import sys
import threading
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STEPS = 1 << 12, 1 << 14  # packed bytes that are unpacked at once: they count as unpacked when they are read
USUAL = 50  # times as many bytes unpacked as packed: below it, steps become longer
SWITCH = 5e-4  # seconds that the thread that unpacks waits for the interpreter; by default ten times as much
MOST = (1 << 20, 64)  # bytes that two steps may unpack to: this many and this many times the packed ones; blocks of bz2
# hold 0.9 MB, and real files stay below 20 times
MEMORY = 1 << 29  # bytes that the decoder of xz may use; `xz -9` needs 2^26
WINDOW = 27  # log2 of the bytes that the decoder of zstd may look back; `zstd -19` needs 2^23, `--long` 2^27
SKIPPABLE = tuple(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))  # zstd frames without content
LONGEST = 1 << 26  # characters of a line of text
ENDINGS = (".gz", ".xz", ".bz2", ".zst")

Progress = Callable[[int], None]


class Decoder(Protocol):
    """One stream, as bz2, lzma and zstd decode it."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class Gunzip:
    """A gzip stream, decoded as the other libraries do it."""

    def __init__(self) -> None:
        self._decoder, self.needs_input = zlib.decompressobj(wbits=31), True

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        output = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self.needs_input = not self._decoder.unconsumed_tail and len(output) < max_length
        return output


class Packing(NamedTuple):
    """A way to pack files."""

    name: str
    magics: tuple[bytes, ...]  # the first bytes of a file
    decoder: Callable[[], Decoder]  # for one stream: a file may have several, one after the other
    padding: bytes  # may stand between streams and behind the last


PACKINGS = (
    Packing("gzip", (b"\x1f\x8b\x08",), Gunzip, b"\0"),
    Packing("xz", (b"\xfd7zXZ\x00",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY), b"\0"),
    Packing("bz2", (b"BZh",), bz2.BZ2Decompressor, b""),
    Packing(
        "zstd",
        (b"\x28\xb5\x2f\xfd", *SKIPPABLE),
        lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW}),
        b"",
    ),
)


def endings(*plain: str) -> tuple[str, ...]:
    """Endings of names, each alone and with those of packed files."""
    return tuple(ending + packed for ending in plain for packed in ("", *ENDINGS))


def unpacked_name(path: Path) -> Path:
    """The path without the ending of a packed file."""
    return path.with_suffix("") if path.suffix.lower() in ENDINGS else path


def packing_of(path: Path) -> Packing | None:
    """How a file is packed; None where it is not."""
    with path.open("rb") as file:
        start = file.read(max(len(magic) for packing in PACKINGS for magic in packing.magics))
    return next((packing for packing in PACKINGS if start.startswith(packing.magics)), None)


def unpacked(path: Path, packing: Packing, at_most: int, progress: Progress) -> Generator[bytes, None, None]:
    """The content of a packed file in chunks of at most so many bytes, a few ahead: the thread needs no interpreter.

    progress(bytes of the file that are read). ValueError names file and place where it is damaged or a bomb.
    """
    ahead: queue.Queue[tuple[int, bytes] | Exception | None] = queue.Queue(maxsize=8)
    stop = threading.Event()

    def put(item: tuple[int, bytes] | Exception | None) -> None:
        while not stop.is_set():
            try:
                return ahead.put(item, timeout=0.1)
            except queue.Full:
                continue

    def unpack() -> None:
        try:
            with path.open("rb") as raw:
                for chunk in _streams(path, packing, raw, at_most):
                    put((raw.tell(), chunk))
                    if stop.is_set():
                        return
            put(None)
        except Exception as error:
            put(error)

    thread = threading.Thread(target=unpack, daemon=True)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(SWITCH, interval))
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item[1]
            progress(item[0])
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def _streams(path: Path, packing: Packing, raw: BinaryIO, at_most: int) -> Generator[bytes, None, None]:
    """The content of one stream after the other; what follows the last and is none is an error."""
    step, total = STEPS[0], 0
    before = last = (0, 0)  # bytes packed and unpacked when the last step but one and the last were read

    def more() -> bytes:
        nonlocal step, before, last
        before, last = last, (raw.tell(), total)
        step = min(2 * step, STEPS[1]) if total < USUAL * raw.tell() else STEPS[0]
        return raw.read(step)

    decoder, packed = packing.decoder(), raw.read(step)
    try:
        while True:
            if chunk := decoder.decompress(packed, at_most):
                total += len(chunk)
                if total - before[1] > MOST[0] + MOST[1] * (raw.tell() - before[0]):
                    raise EOFError("it unpacks to more than is plausible (where it is sound, unpack it by hand)")
                yield chunk
            if decoder.eof:
                packed = decoder.unused_data.lstrip(packing.padding)
                while not packed and (packed := more()):
                    packed = packed.lstrip(packing.padding)
                if not packed:
                    return
                decoder = packing.decoder()
            else:
                packed = more() if decoder.needs_input else b""
                if decoder.needs_input and not packed:
                    raise EOFError(f"the file ends within its {packing.name} stream")
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        raise ValueError(f"{path}: truncated or damaged near byte {raw.tell():,}: {error}") from None


class _Content(io.RawIOBase):
    """Chunks as a file that can be read once."""

    def __init__(self, chunks: Generator[bytes, None, None]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


@contextmanager
def opened_bytes(path: Path, progress: Progress) -> Generator[io.BufferedReader, None, None]:
    """The bytes of a file, packed or not, to be read once. progress: as for `opened_text`."""
    packing = packing_of(path)
    if packing is None:
        with path.open("rb") as file:
            yield file
        return
    chunks = unpacked(path, packing, 1 << 18, progress)
    try:
        yield io.BufferedReader(_Content(chunks), 1 << 18)
    finally:
        chunks.close()


@contextmanager
def opened_text(path: Path, progress: Progress) -> Generator[TextIO, None, None]:
    """The text of a file, packed or not (UTF-8; bytes that are none are replaced).

    progress(bytes of the file that are read) is called while a packed file is read.
    """
    with opened_bytes(path, progress) as file:
        yield io.TextIOWrapper(file, encoding="utf-8", errors="replace")
