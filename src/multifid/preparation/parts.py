"""One part of a source file: read, screened and laid down in pieces that a store is put together from.

A part is what one process reads at a time; how a file is cut into parts depends on the file alone, so that the store is
the same whatever reads it. Each part becomes some pieces of bounded size (`NAME.0000.piece`, safetensors) and, when it
is whole, `NAME.json` with their sizes, checksums and what is no column: a part is there if this file is.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from multifid.preparation.validate import assumed, malformed, screen
from multifid.readers.contract import IsolatedAtom, Part, Record, Skip
from multifid.store.block import Block, join, pack, tasks_of
from multifid.store.placing import Columns, Contents, Place, contents_of, place, place_skipped, renamed, skipped_line
from multifid.structures.structure import Structure

AT_ONCE = 1024, 1 << 16  # structures and atoms that are laid into columns together, at most
PIECE = 1 << 24  # bytes of columns of a piece
MOST_REASONS = 100  # of skips in a part: they name what a file holds, and a hostile one holds anything
TOLD = 100  # texts of one topic that are kept
DROPPED = "dropped"  # the topic of labels that a structure should have and that cannot be used


@dataclass(frozen=True, slots=True)
class Assignment:
    """A part of a file, and the path of what is made of it without its ending."""

    path: Path
    name: str  # of the file, as the manifest calls it
    part: Part
    out: Path
    limit: int | None


@dataclass(frozen=True, slots=True)
class ColumnFile:
    """A file of some structures as columns, and the lines of what was skipped among them."""

    path: Path
    bytes: int
    xxh3: str
    contents: Contents


@dataclass(slots=True)
class PartSummary:
    """What a part holds, beside its columns."""

    structures: int = 0
    tasks: list[str] = field(default_factory=list)  # label sets as the reader calls them, in order
    isolated: list[tuple[str, int, float]] = field(default_factory=list)  # label set, Z, eV
    dropped: dict[str, int] = field(default_factory=dict)
    assumed: dict[str, int] = field(default_factory=dict)  # charges and multiplicities that the source does not state
    examples: dict[str, str] = field(default_factory=dict)  # reason of a skip -> the first record
    notes: dict[str, dict[str, int]] = field(default_factory=dict)  # what structures tell: topic -> text -> how many
    pieces: list["ColumnFile"] = field(default_factory=list)


def add_notes(known: dict[str, dict[str, int]], more: dict[str, dict[str, int]]) -> None:
    """Count more of them: topic -> text -> how many. What exceeds TOLD texts of a topic is counted as others."""
    for topic, texts in more.items():
        own = known.setdefault(topic, {})
        for text, count in texts.items():
            kept = text if text in own or len(own) < TOLD else "others"
            own[kept] = own.get(kept, 0) + count


def read_part(module: ModuleType, options: Any, work: Assignment, report: Callable[[float, int], None]) -> None:
    """Read a part to its pieces. report(fraction done, structures so far)."""
    pieces = _Pieces(work)

    def progress(fraction: float) -> None:
        report(fraction, pieces.found.structures)

    with np.errstate(invalid="ignore"):  # infinite numbers become skips, and need no warning
        for record in module.read(work.path, options, progress, work.part):
            pieces.take(record)
            if pieces.full:
                break
    pieces.finish()


def is_done(out: Path) -> bool:
    return out.with_name(f"{out.name}.json").is_file()


def found_in(out: Path) -> PartSummary:
    """What a finished part holds."""
    told = json.loads(out.with_name(f"{out.name}.json").read_text())
    pieces = [
        ColumnFile(_piece(out, number), size, digest, Contents(**contents))
        for number, (size, digest, contents) in enumerate(told["pieces"])
    ]
    return PartSummary(**{**told, "pieces": pieces})


def columns_of(piece: ColumnFile) -> Columns:
    """The columns of a piece, with `source_id` (bytes), `source_id_lengths` and `skipped` (bytes).

    ValueError where it is damaged.
    """
    data = piece.path.read_bytes() if piece.path.is_file() else b""
    if len(data) != piece.bytes or xxhash.xxh3_64_hexdigest(data) != piece.xxh3:
        raise ValueError(f"{piece.path} is damaged or was changed: remove {piece.path.parent} and prepare again")
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"{piece.path} is not what it should be: {error}") from error


def place_piece(piece: ColumnFile, tasks: dict[str, str], where: Place) -> None:
    """Write what a piece holds into a store to be. tasks: label set -> its name there."""
    columns = columns_of(piece)
    source_id, lengths, skipped = (columns.pop(name) for name in ("source_id", "source_id_lengths", "skipped"))
    columns = {renamed(name, tasks): values for name, values in columns.items()}
    place(where, piece.contents.renamed(tasks), columns, source_id, lengths)
    place_skipped(where, skipped.tobytes())


def _piece(out: Path, number: int) -> Path:
    return out.with_name(f"{out.name}.{number:04}.piece")


class _Pieces:
    """Takes records, lays them into columns, and writes a piece whenever there is enough for one."""

    def __init__(self, work: Assignment) -> None:
        self.work, self.found = work, PartSummary()
        self.records: list[Structure | Skip] = []  # in the order of reading
        self.atoms = 0
        self.blocks: list[Block] = []
        self.skips: list[tuple[str, str]] = []
        self.told: Counter[tuple[tuple[str, str], ...]] = Counter()
        self.bytes = 0

    @property
    def full(self) -> bool:
        """Whether there are as many structures as were asked for."""
        limit = self.work.limit
        if limit is not None and self.found.structures + len(self.records) >= limit:
            self._flush()
        return limit is not None and self.found.structures >= limit

    def take(self, record: Record) -> None:
        match record:
            case Block():
                self._flush()
                self._screened(record, list(range(len(record))), [])
                self.told[record.told] += len(record)
            case IsolatedAtom():
                self.found.isolated.append((record.task, record.number, record.energy))
                self._name(record.task)
            case Skip():
                self.records.append(record)
            case Structure():
                reason = malformed(record)
                self.records.append(record if reason is None else Skip(reason, record.source_id))
                self.atoms += len(record.numbers) if reason is None else 0
                self.told[record.told] += 1
                if len(self.told) > TOLD:
                    self._count_told()
        if len(self.records) >= AT_ONCE[0] or self.atoms >= AT_ONCE[1]:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._write()
        self._count_told()
        done = self.work.out.with_name(f"{self.work.out.name}.json")
        pieces = [(piece.bytes, piece.xxh3, asdict(piece.contents)) for piece in self.found.pieces]
        told = {name: getattr(self.found, name) for name in PartSummary.__slots__} | {"pieces": pieces}
        _replace(done, json.dumps(told).encode())

    def _flush(self) -> None:
        """What was taken record by record goes into columns."""
        records, self.records, self.atoms = self.records, [], 0
        places = [k for k, record in enumerate(records) if isinstance(record, Structure)]
        skips = [(k, (r.where, r.reason)) for k, r in enumerate(records) if isinstance(r, Skip)]
        if places:
            self._screened(pack([r for r in records if isinstance(r, Structure)]), places, skips)
        else:
            self._skipped(skips)

    def _screened(self, block: Block, places: list[int], skips: list[tuple[int, tuple[str, str]]]) -> None:
        """Take what a store may take. The structures lay at `places` among the records, and `skips` between them."""
        reasons, dropped = screen(block)
        good = [s for s, reason in enumerate(reasons) if reason is None]
        room = len(good) if self.work.limit is None else self.work.limit - self.found.structures
        if len(good) > room:  # cut behind the last structure that is asked for
            end = good[room - 1] + 1
            skips = [skip for skip in skips if skip[0] < places[end - 1]]
            self._screened(block.take(np.arange(len(block)) < end), places[:end], skips)
            return
        for task in tasks_of(block.columns):
            self._name(task)
        for what, count in dropped.items():
            self.found.dropped[what] = self.found.dropped.get(what, 0) + count
        refused = [(places[s], (block.sources[s], reason)) for s, reason in enumerate(reasons) if reason is not None]
        self._skipped(sorted([*refused, *skips]))
        if good:
            kept = block.take(np.array([reason is None for reason in reasons]))
            for what, count in assumed(kept).items():
                self.found.assumed[what] = self.found.assumed.get(what, 0) + count
            self.blocks.append(kept)
            self.found.structures += len(kept)
            self.bytes += sum(values.nbytes for values in kept.columns.values())
        if self.bytes >= PIECE:
            self._write()

    def _skipped(self, skips: list[tuple[int, tuple[str, str]]]) -> None:
        for _, (where, reason) in skips:
            if reason not in self.found.examples and len(self.found.examples) >= MOST_REASONS:
                reason = "other reasons"
            self.found.examples.setdefault(reason, where)
            self.skips.append((where, reason))
        self.bytes += sum(len(where) + len(reason) + 100 for _, (where, reason) in skips)

    def _count_told(self) -> None:
        for told, count in self.told.items():
            for topic, text in told:
                if topic == DROPPED:
                    self.found.dropped[text] = self.found.dropped.get(text, 0) + count
                else:
                    add_notes(self.found.notes, {topic: {text: count}})
        self.told.clear()

    def _name(self, task: str) -> None:
        if task not in self.found.tasks:
            self.found.tasks.append(task)

    def _write(self) -> None:
        """What was screened becomes a piece."""
        if not self.blocks and not self.skips:
            return
        block = join(self.blocks)
        source = [text.encode() for text in block.sources]
        source_id = np.frombuffer(b"".join(source), np.uint8)
        skipped = b"".join(skipped_line(self.work.name, *skip) for skip in self.skips)
        contents = contents_of(block.columns, source_id) if source else Contents()
        reasons = Counter(reason for _, reason in self.skips)
        columns = {
            **block.columns,
            "source_id": source_id,
            "source_id_lengths": np.array([len(text) for text in source], np.int64),
            "skipped": np.frombuffer(skipped, np.uint8),
        }
        data, path = save(columns), _piece(self.work.out, len(self.found.pieces))
        _replace(path, data)
        contents = replace(contents, skipped=dict(reasons), skipped_bytes=len(skipped))
        self.found.pieces.append(ColumnFile(path, len(data), xxhash.xxh3_64_hexdigest(data), contents))
        self.blocks, self.skips, self.bytes = [], [], 0


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, whoever else writes it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)
