"""What a command has done before it was stopped: results chunk by chunk, in a directory beside OUT until OUT is whole.

    .OUT.parts/request.json   what was asked for; what another request left is thrown away
    .OUT.parts/N-R.xyz        results of rank R in the N-th attempt, chunk after chunk
    .OUT.parts/N-R.jsonl      a line for each of those chunks, written after it: which one, where it lies, its hash

The next attempt may have any number of ranks: chunks that are there are not worked on again.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import xxhash

from multifid.parallel.groups import World
from multifid.store.fields import MANIFEST

REQUEST = "request.json"


@dataclass
class Record:
    """One chunk that is done: where its results lie, and what is to be said of it at the end."""

    chunk: int
    file: str
    start: int
    bytes: int
    hash: str  # xxh3 of the bytes
    structures: int = 0
    refused: int = 0
    named: list[str] = field(default_factory=list)  # the first of those that were refused, with the reason
    flagged: int = 0
    flags: list[str] = field(default_factory=list)  # the first of those to which something is to be said


class Parts:
    """The directory of parts of one OUT; made on all ranks together."""

    def __init__(self, out: Path, request: dict[str, Any], world: World, skip: bool) -> None:
        """Keep what an earlier attempt at the same request has left. `skip`: what was refused may be left out.

        BlockingIOError where another command is at work on the same OUT.
        """
        self.folder, self.world, self.other = out.with_name(f".{out.name}.parts"), world, list[str]()
        self._lock: int | None = None
        found: list[Record] = []
        with world.together():
            if world.first:
                found = self._begin(out, request)
        shared = world.share([asdict(r) for r in found if skip or not r.refused])
        self.done = [Record(**record) for record in shared]
        self.attempt = int(world.share(_next_attempt(self.folder) if world.first else None))

    def _begin(self, out: Path, request: dict[str, Any]) -> list[Record]:
        """On the first rank: lock the directory, and read what is there of the same request."""
        self.folder.mkdir(exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process is writing {out} (it holds {self.folder})") from error
        there = self.folder / REQUEST
        asked = json.loads(json.dumps(request))
        if there.exists():
            before = _json(there.read_bytes())
            if before == asked:
                return list(_records(self.folder))
            self.other = [key for key in asked if before.get(key) != asked[key]]
        for left in self.folder.iterdir():
            left.unlink()
        whole = there.with_suffix(".new")
        whole.write_text(json.dumps(asked))
        whole.replace(there)
        return []

    @contextmanager
    def writer(self) -> Iterator["Writer"]:
        """What this rank writes its chunks with."""
        name = f"{self.attempt}-{self.world.rank}"
        with (self.folder / f"{name}.xyz").open("xb") as data, (self.folder / f"{name}.jsonl").open("xb") as journal:
            yield Writer(data, journal, f"{name}.xyz")

    def put_together(self, out: Path, records: Sequence[Record]) -> None:
        """On one rank: the chunks in their order as one file, which appears when it is whole."""
        whole = self.folder / "whole"
        files: dict[str, IO[bytes]] = {}
        try:
            with whole.open("wb") as file:
                for record in records:
                    part = files.get(record.file) or (self.folder / record.file).open("rb")
                    files[record.file] = part
                    part.seek(record.start)
                    file.write(part.read(record.bytes))
                file.flush()
                os.fsync(file.fileno())
        finally:
            for part in files.values():
                part.close()
        whole.replace(out)

    def remove(self) -> None:
        """The directory and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        """Let other commands have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@dataclass
class Writer:
    """Appends chunks to a rank's part, and notes each one once it is there."""

    data: IO[bytes]
    journal: IO[bytes]
    name: str
    records: list[Record] = field(default_factory=list)

    def add(self, chunk: int, text: bytes, **about: Any) -> None:
        """One chunk; `about`: the rest of its record."""
        record = Record(chunk, self.name, self.data.tell(), len(text), xxhash.xxh3_64_hexdigest(text), **about)
        self.data.write(text)
        self.data.flush()
        self.journal.write(json.dumps(asdict(record)).encode() + b"\n")
        self.journal.flush()
        self.records.append(record)


def contents(path: Path) -> list[Any]:
    """What changes when a file, a store or a run does: its place, and its bytes or its times."""
    if (path / MANIFEST).exists():
        return [str(path.resolve()), xxhash.xxh3_64_hexdigest((path / MANIFEST).read_bytes())]
    files = sorted(path.glob("model.*")) if path.is_dir() else [path]
    return [str(path.resolve()), *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists())]


def _records(folder: Path) -> Iterator[Record]:
    """Chunks of earlier attempts that are whole; a line or bytes that were torn off count for nothing."""
    known: set[int] = set()
    for journal in sorted(folder.glob("*.jsonl")):
        part = journal.with_suffix(".xyz")
        if not part.exists():
            continue
        with part.open("rb") as data:
            for line in journal.read_bytes().split(b"\n")[:-1]:
                about = _json(line)
                if not about or about["chunk"] in known:
                    continue
                record = Record(**about)
                data.seek(record.start)
                if xxhash.xxh3_64_hexdigest(data.read(record.bytes)) == record.hash:
                    known.add(record.chunk)
                    yield record


def _json(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _next_attempt(folder: Path) -> int:
    return 1 + max((int(path.name.split("-")[0]) for path in folder.glob("*-*.xyz")), default=0)
