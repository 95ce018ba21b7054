"""ADIOS2 files by way of a process of their own (`adios_process`): what is in one, and its columns piece by piece."""

import json
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from signal import SIGALRM
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load

from multifid.readers.adios_process import FRAME


class Piece(NamedTuple):
    """Consecutive structures of one label; columns: KEY, rows end to end, and KEY/count, the rows of each."""

    label: str
    first: int
    structures: int
    columns: dict[str, np.ndarray]


ALL = 0, 1 << 62
NOTHING = 0, 0


@contextmanager
def opened(path: Path, part: tuple[int, int], limit: float) -> Iterator[tuple[dict[str, Any], Iterator[Piece]]]:
    """What the file says of itself, and the structures of a part of it, all labels one after the other.

    {labels: {label: {count, keys: {key: {type, shape}}, listed}}, dataset_name}. limit: seconds that one call into the
    library may take. ValueError naming the file where it is damaged, blocks the library or ends its process, or where
    the library is not installed.
    """
    with closing(_frames(path, part, limit)) as frames:
        kind, data = next(frames, (b"", b""))
        if kind != b"J":
            raise ValueError(f"{path}: the process that reads it said nothing")
        yield json.loads(data), _pieces(frames)


def _pieces(frames: Iterator[tuple[bytes, bytes]]) -> Iterator[Piece]:
    about: dict[str, Any] = {}
    for kind, data in frames:
        if kind == b"J":
            about = json.loads(data)
        else:
            yield Piece(columns=load(data), **about)


def _frames(path: Path, part: tuple[int, int], limit: float) -> Generator[tuple[bytes, bytes], None, None]:
    path.stat()  # one that is not there is a FileNotFoundError
    question = json.dumps({"path": str(path), "part": part, "limit": limit})
    command = [sys.executable, "-m", "multifid.readers.adios_process", question]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            while head := process.stdout.read(FRAME.size):
                kind, size = FRAME.unpack(head) if len(head) == FRAME.size else (b"", 0)
                data = process.stdout.read(size)
                if len(data) < size or not kind:
                    break
                if kind == b"E":
                    raise ValueError(f"{path}: {data.decode(errors='replace')}")
                yield kind, data
        finally:
            if process.poll() is None:
                process.stdout.close()
        code = process.wait()
    if code == -SIGALRM:
        raise ValueError(
            f"{path}: damaged, or very slow: the library took longer than {limit:g} s (--option time_limit)"
        )
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ValueError(f"{path}: reading it ended the process ({how}): the file is damaged")
