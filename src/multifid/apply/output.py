"""Structures of files, what was computed for each, and one file of them that is whole or not there.

    frames --> chunks --> the ranks work on them in turn --> their parts beside OUT --> one file, in the order of FILES

All ranks read all files, which costs little beside what a model does; the first one puts the parts together. OUT
appears by rename. What a command that was stopped has done stays beside OUT, and the same command goes on from there
(`parts`), with the same bytes in the end.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_xyz
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from multifid import __version__
from multifid.apply.frames import Given, Unread, frames, refuse_missing
from multifid.apply.parts import Parts, Record, Writer, contents
from multifid.parallel.groups import World

NAMED = 5  # structures that a message names
ENDINGS = (".xyz", ".extxyz")
RESULTS = ("energy", "forces", "stress", "energies")
DEVIATIONS = ("uncertainty", "disagreement")  # how names of standard deviations of results end


@dataclass
class Done:
    """What was made of a chunk."""

    atoms: list[Atoms] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # where, and why
    flagged: list[str] = field(default_factory=list)  # of those that are there: where something is to be said


Work = Callable[[Sequence[Given]], Done]


@dataclass
class Tally:
    """What was done by all ranks, now and before the command was stopped."""

    structures: int = 0
    refused: int = 0
    flagged: int = 0
    kept: int = 0  # of the structures: those that were there from before
    named: list[str] = field(default_factory=list)  # the first of those that were refused, with the reason
    flags: list[str] = field(default_factory=list)  # the first of those that were flagged

    def rest(self) -> str:
        """The end of a message."""
        text = f"; {self.refused} left out, as {'; '.join(self.named[:NAMED])}" if self.refused else ""
        return text + (f"; {self.kept} were there from a command that was stopped" if self.kept else "")


def refuse_out(out: Path) -> None:
    """Before hours of work: ValueError or FileExistsError where it could not be written."""
    if not out.name.lower().endswith(ENDINGS):
        raise ValueError(f"--out {out}: results are extended XYZ, a name that ends in {' or '.join(ENDINGS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or choose another name")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {out.parent}")


def write_all(
    files: Sequence[Path],
    out: Path,
    work: Work,
    world: World,
    request: dict[str, Any],
    *,
    atoms: int,
    structures: int,
    skip: bool,
    title: str,
) -> Tally:
    """Write what `work` makes of the structures of files; called on all ranks. Returns the sums over them.

    request: what results depend on beside the files, as JSON has it: an attempt at the same one that was stopped goes
    on. atoms, structures: of a chunk, about and at most. skip: leave out what is refused, in place of an error. title:
    of the bar. ValueError names what is refused, and is raised too where nothing is left to be written.
    """
    refuse_missing(files)
    request = request | {"version": __version__, "files": [contents(file) for file in files]}
    parts = Parts(out, request | {"chunks": [atoms, structures]}, world, skip)
    _say_begun_again(out, parts)
    mine: list[Record] = []
    try:
        with parts.writer() as writer:
            mine = writer.records
            _own_part(_chunks(files, atoms, structures), work, parts, writer, skip, title)
        everyone = [[vars(r) for r in mine] if rank == world.rank else None for rank in range(world.size)]
        new = [Record(**record) for rank in range(world.size) for record in world.share(everyone[rank], rank)]
        tally = _tally(parts.done, new)
        with world.together():
            if world.first:
                if not tally.structures:
                    raise ValueError(f"nothing is left to be written to {out}{tally.rest()}")
                parts.put_together(out, sorted([*parts.done, *new], key=lambda record: record.chunk))
                parts.remove()
    except ValueError:
        if not any(record.structures for record in [*parts.done, *mine]):
            parts.remove()
        raise
    finally:
        parts.release()
    return tally


def labelled(atoms: Atoms, results: dict[str, Any], **info: Any) -> Atoms:
    """Atoms that hold results as ASE writes them, in place of any labels that they had under these names."""
    deviations = (f"{what}_{kind}" for kind in DEVIATIONS for what in RESULTS)  # of what another model had said
    for name in (*RESULTS, "free_energy", "virial", *deviations, *info):
        atoms.info.pop(name, None)
        atoms.arrays.pop(name, None)
    atoms.info |= info
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _say_begun_again(out: Path, parts: Parts) -> None:
    if parts.other and parts.world.first:
        text = (
            f"{out}: what a command that was stopped had left was made with other {', '.join(parts.other)}; begun again"
        )
        Console(stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)


def _tally(before: Sequence[Record], new: Sequence[Record]) -> Tally:
    records = sorted([*before, *new], key=lambda record: record.chunk)
    return Tally(
        sum(r.structures for r in records),
        sum(r.refused for r in records),
        sum(r.flagged for r in records),
        sum(r.structures for r in before),
        [line for r in records for line in r.named],
        [line for r in records for line in r.flags],
    )


def _own_part(
    chunks: Iterator[list[Given | Unread]], work: Work, parts: Parts, writer: Writer, skip: bool, title: str
) -> None:
    """Work on this rank's share of the chunks that are not there yet, and write them to its part."""
    there, world = {record.chunk for record in parts.done}, parts.world
    turn = 0
    with _progress(world, title) as advance:
        for k, chunk in enumerate(chunks):
            if k in there:
                advance(len(chunk))
                continue
            turn += 1
            if turn % world.size != world.rank:
                continue
            done = work([f for f in chunk if isinstance(f, Given)])
            refused = [*(f"{u.where}: {u.why}" for u in chunk if isinstance(u, Unread)), *done.refused]
            if refused and not skip:
                raise ValueError(_refusal(refused))
            written = StringIO()
            write_xyz(written, done.atoms)
            writer.add(
                k,
                written.getvalue().encode(),
                structures=len(done.atoms),
                refused=len(refused),
                named=refused[:NAMED],
                flagged=len(done.flagged),
                flags=done.flagged[:NAMED],
            )
            advance(len(chunk) * world.size)


def _refusal(refused: Sequence[str]) -> str:
    more = f"\n  and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
    listed = "\n  ".join(refused[:NAMED])
    return f"no result for\n  {listed}{more}\n--skip-refused leaves such structures out and counts them"


def _chunks(files: Sequence[Path], atoms: int, structures: int) -> Iterator[list[Given | Unread]]:
    """Consecutive structures, about so many atoms together."""
    chunk: list[Given | Unread] = []
    there = 0
    for given in frames(files):
        chunk.append(given)
        there += len(given.atoms) if isinstance(given, Given) else 0
        if there >= atoms or len(chunk) >= structures:
            yield chunk
            chunk, there = [], 0
    if chunk:
        yield chunk


@contextmanager
def _progress(world: World, title: str) -> Iterator[Callable[[int], None]]:
    """A bar on rank 0 and on a terminal: how many structures, and how long it has taken."""
    counted = TextColumn("{task.completed:,} structures")
    columns = (TextColumn("{task.description}"), BarColumn(), counted, TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (world.first and console.is_terminal)) as bar:
        shown = bar.add_task(title, total=None)
        yield lambda more: bar.advance(shown, more)
