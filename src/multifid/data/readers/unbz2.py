"""The content of a bz2 file, unpacked by a thread ahead of whoever reads it, within bounds."""

import bz2
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

PACKED = 1 << 12, 1 << 14  # bytes of bz2 that are unpacked at once: they count as unpacked when they are read
USUAL = 50  # times as many bytes unpacked as packed: below it, steps become longer
SWITCH = 5e-4  # seconds that the thread that unpacks waits for the interpreter; by default ten times as much
MOST = (1 << 20, 64)  # bytes that two steps may unpack to: this many and this many times the packed ones; blocks hold
# 0.9 MB, and real files stay below 20 times


def unpacked(path: Path, at_most: int, progress: Callable[[int], None]) -> Iterator[bytes]:
    """The content of a bz2 file in chunks of at most so many bytes, a few ahead: the thread needs no interpreter.

    progress(bytes of the file that are read). ValueError names the file where it is damaged or a bomb.
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
                for chunk in _streams(path, raw, at_most):
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


def _streams(path: Path, raw: BinaryIO, at_most: int) -> Iterator[bytes]:
    """The content of one bz2 stream after the other; what follows the last and is none is an error."""
    step, total = PACKED[0], 0
    before = last = (0, 0)  # bytes packed and unpacked when the last step but one and the last were read

    def more() -> bytes:
        nonlocal step, before, last
        before, last = last, (raw.tell(), total)
        step = min(2 * step, PACKED[1]) if total < USUAL * raw.tell() else PACKED[0]
        return raw.read(step)

    decoder, packed = bz2.BZ2Decompressor(), raw.read(step)
    try:
        while True:
            if chunk := decoder.decompress(packed, at_most):
                total += len(chunk)
                if total - before[1] > MOST[0] + MOST[1] * (raw.tell() - before[0]):
                    raise EOFError("it unpacks to more than is plausible")
                yield chunk
            if decoder.eof:
                packed = decoder.unused_data or more()
                if not packed:
                    return
                decoder = bz2.BZ2Decompressor()
            else:
                packed = more() if decoder.needs_input else b""
                if decoder.needs_input and not packed:
                    raise EOFError("the file ends inside a bz2 stream")
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: truncated or damaged near byte {raw.tell():,}: {error}") from None
