"""The process that opens ADIOS2 files for a reader: `python -m multifid.readers.adios_process QUESTION`.

A damaged file can block inside the library for ever, or end the process; neither must reach the program. What is found
goes to stdout in frames (kind, length, bytes): J is JSON, T are arrays (safetensors), E is an error in words. While the
library works an alarm of the kernel ticks, which needs no help of a library that does not return.

Keys of the file are names to look for and are never executed, as the reference's own reader does.
"""

import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save

LABELS = ("trainset", "valset", "testset")  # train, validation, test, in the order of our splits
KEYS = (
    "pos", "atomic_numbers", "x", "natoms", "cell", "pbc", "energy", "energy_per_atom", "forces", "stress",
    "graph_attr",
)  # fmt: skip
FRAME = struct.Struct("<cQ")
STRUCTURES, ATOMS = 4096, 1 << 18  # read at once, at most
ROOM = 4 << 30  # bytes of memory beyond twice the file: a damaged size must not take the host's


def main() -> None:
    """Answer the question of the command line, or say what is wrong."""
    asked = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the library prints is no frame
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit = float(asked["limit"])
    sys.modules["torch"] = None  # type: ignore[assignment]  # the package would import it, which takes seconds
    try:
        import adios2
    except ImportError:
        _send(out, b"E", b'reading it needs the package adios2: pip install "multifid[adios]"')
        return
    try:
        _bound_memory(Path(asked["path"]))
        with _within(limit):
            file = adios2.FileReader(asked["path"])
        with _within(limit):
            found = _described(file)
        _send(out, b"J", json.dumps(found).encode())
        for label, start, stop in _ranges(found, *asked["part"]):
            for first, last in _pieces(file, label, start, stop, limit):
                with _within(limit):
                    columns = _columns(file, label, found["labels"][label]["keys"], first, last)
                head = json.dumps({"label": label, "first": first, "structures": last - first}).encode()
                _send(out, b"J", head)
                _send(out, b"T", save(columns))
    except BrokenPipeError:  # nobody listens any longer
        os._exit(1)
    except Exception as error:
        _send(out, b"E", f"truncated, damaged or not the expected layout: {_first_line(error)}".encode())


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """What is done inside ends the process where it takes longer."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _bound_memory(path: Path) -> None:
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    bound = ROOM + 2 * size
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))


def _described(file: Any) -> dict[str, Any]:
    """Labels with their structures and known keys, and what else the file says of itself."""
    labels = {}
    for label in LABELS:
        if file.inquire_attribute(f"{label}/ndata") is None:
            continue
        count = int(np.asarray(file.read_attribute(f"{label}/ndata")).reshape(-1)[0])
        keys = {key: described for key in KEYS if (described := _key(file, f"{label}/{key}", count)) is not None}
        labels[label] = {"count": count, "keys": keys, "listed": _names(file, f"{label}/keys")}
    return {"labels": labels, "dataset_name": "".join(_names(file, "dataset_name")[:1])}


def _key(file: Any, name: str, count: int) -> dict[str, Any] | None:
    """Type and shape of one key; ValueError where its parts do not fit together."""
    variable = file.inquire_variable(name)
    if variable is None:
        return None
    dim = file.read_attribute(f"{name}/variable_dim") if file.inquire_attribute(f"{name}/variable_dim") else 0
    shape = [int(n) for n in variable.shape()]
    if not shape or int(np.asarray(dim).reshape(-1)[0]) != 0:
        raise ValueError(f"{name} varies along another axis than the first")
    if variable.steps() != 1:
        raise ValueError(f"{name} has {variable.steps()} steps where files of this layout have one")
    for each in ("variable_count", "variable_offset"):
        index = file.inquire_variable(f"{name}/{each}")
        if index is None or [int(n) for n in index.shape()] != [count]:
            raise ValueError(f"{name}/{each} does not say where each of {count} structures lies")
    return {"type": variable.type(), "shape": shape}


def _names(file: Any, name: str) -> list[str]:
    """A list of texts; of one element the library makes a plain text."""
    if file.inquire_attribute(name) is None:
        return []
    found = file.read_attribute_string(name)
    return [found] if isinstance(found, str) else list(found)


def _ranges(found: dict[str, Any], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """The structures start .. stop-1 of the file as ranges within its labels."""
    begin = 0
    for label, about in found["labels"].items():
        end = begin + about["count"]
        first, last = max(start, begin), min(stop, end)
        if first < last:
            yield label, first - begin, last - begin
        begin = end


def _pieces(file: Any, label: str, start: int, stop: int, limit: float) -> Iterator[tuple[int, int]]:
    """A range cut into pieces of bounded size."""
    name = f"{label}/{'pos' if file.inquire_variable(f'{label}/pos') is not None else 'x'}"
    for outer in range(start, stop, 16 * STRUCTURES):
        with _within(limit):
            counts, _ = _lies(file, name, outer, min(outer + 16 * STRUCTURES, stop))
        first = 0
        while first < len(counts):
            atoms = np.cumsum(counts[first : first + STRUCTURES])
            taken = max(1, int(np.searchsorted(atoms, ATOMS, side="right")))
            yield outer + first, outer + first + taken
            first += taken


def _columns(file: Any, label: str, keys: dict[str, Any], start: int, stop: int) -> dict[str, np.ndarray]:
    """KEY, the rows of the structures start .. stop-1 end to end, and KEY/count, how many rows each has."""
    columns = {}
    for key, about in keys.items():
        name, rest = f"{label}/{key}", about["shape"][1:]
        counts, offsets = _lies(file, name, start, stop)
        if (counts < 0).any() or (offsets < 0).any() or (offsets > about["shape"][0] - counts).any():
            raise ValueError(f"{name}: structures {start}..{stop} lie beyond its {about['shape'][0]} rows")
        if (np.diff(offsets) == counts[:-1]).all():
            spans = [(int(offsets[0]), int(counts.sum()))]
        else:
            spans = list(zip(offsets.tolist(), counts.tolist(), strict=True))
        parts = [np.asarray(file.read(name, [at, *(0 for _ in rest)], [n, *rest])) for at, n in spans if n]
        columns[key] = np.concatenate(parts).reshape(-1, *rest) if parts else np.zeros((0, *rest), np.float32)
        columns[f"{key}/count"] = counts
    return columns


def _lies(file: Any, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """How many rows the structures have, and where they begin. A selection is given each time: it would stick."""
    found = [
        np.asarray(file.read(f"{name}/variable_{what}", [start], [stop - start])).astype(np.int64).reshape(-1)
        for what in ("count", "offset")
    ]
    return found[0], found[1]


def _send(out: BinaryIO, kind: bytes, data: bytes) -> None:
    out.write(FRAME.pack(kind, len(data)))
    out.write(data)
    out.flush()


def _first_line(error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return (lines[-1] if len(lines) > 1 and "Exception" in lines[-1] else lines[0])[:300]


if __name__ == "__main__":
    main()
