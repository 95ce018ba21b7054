"""Structures of files, what was computed for each, and one file of them that is whole or not there.

    frames --> chunks --> rank k mod size works on chunk k --> its part beside OUT --> one file, in the order of FILES

All ranks read all files, which costs little beside what a model does; the first one puts the parts together. OUT
appears by rename.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_xyz
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from multifid.apply.frames import Given, Unread, frames
from multifid.parallel.groups import World

NAMED = 5  # structures that a message names
ENDINGS = (".xyz", ".extxyz")
Work = Callable[[int, Sequence[Given]], tuple[list[Atoms], list[str]]]  # number, chunk -> results, what was refused


@dataclass
class Tally:
    """What was done: by one rank, or by all."""

    structures: int = 0
    refused: int = 0
    named: list[str] = field(default_factory=list)  # the first of those that were refused, with the reason
    lengths: list[int] = field(default_factory=list)  # bytes of each chunk in a rank's part

    def left_out(self) -> str:
        """The end of a message."""
        return f"; {self.refused} left out, as {'; '.join(self.named[:NAMED])}" if self.refused else ""


def refuse_out(out: Path) -> None:
    """Before hours of work: ValueError or FileExistsError where it could not be written."""
    if not out.name.lower().endswith(ENDINGS):
        raise ValueError(f"--out {out}: results are extended XYZ, a name that ends in {' or '.join(ENDINGS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or choose another name")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {out.parent}")


def write_all(
    files: Sequence[Path], out: Path, work: Work, world: World, *, atoms: int, structures: int, skip: bool, title: str
) -> Tally:
    """Write what `work` makes of the structures of files; called on all ranks. Returns the sums over them.

    atoms, structures: of a chunk, about and at most. skip: leave out what is refused, in place of an error. title: of
    the bar. ValueError names what is refused, and is raised too where nothing is left to be written.
    """
    part = out.with_name(f".{out.name}.{world.rank}.part")
    try:
        with world.together():
            if world.first:
                for left in out.parent.glob(f".{out.name}.*.part"):  # by a run that was killed
                    left.unlink()
        mine = _own_part(files, part, work, world, (atoms, structures), skip, title)
        lengths = [world.share(mine.lengths, rank) for rank in range(world.size)]
        named = [line for rank in range(world.size) for line in world.share(mine.named, rank)]
        total, refused = (int(n) for n in world.group.sum_(torch.tensor([mine.structures, mine.refused])))
        tally = Tally(total, refused, named)
        with world.together():
            if world.first:
                if not total:
                    raise ValueError(f"nothing is left to be written to {out}{tally.left_out()}")
                _put_together(out, lengths)
    finally:
        part.unlink(missing_ok=True)
    return tally


def labelled(atoms: Atoms, results: dict[str, Any], **info: Any) -> Atoms:
    """Atoms that hold results as ASE writes them, in place of any labels that they had under these names."""
    for name in ("energy", "free_energy", "forces", "stress", "energies", "virial", *info):
        atoms.info.pop(name, None)
        atoms.arrays.pop(name, None)
    atoms.info |= info
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _own_part(
    files: Sequence[Path], part: Path, work: Work, world: World, most: tuple[int, int], skip: bool, title: str
) -> Tally:
    """Work on this rank's chunks and write them to its part."""
    tally = Tally()
    with part.open("wb") as file, _progress(world, title) as advance:
        for k, chunk in enumerate(_chunks(files, *most)):
            if k % world.size != world.rank:
                continue
            there, refused = work(k, [f for f in chunk if isinstance(f, Given)])
            refused = [*(f"{u.where}: {u.why}" for u in chunk if isinstance(u, Unread)), *refused]
            if refused and not skip:
                raise ValueError(_refusal(refused))
            written = StringIO()
            write_xyz(written, there)
            tally.lengths.append(file.write(written.getvalue().encode()))
            tally.structures += len(there)
            tally.refused += len(refused)
            tally.named += refused[: NAMED - len(tally.named)]
            advance(len(chunk) * world.size)
    return tally


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


def _put_together(out: Path, lengths: Sequence[Sequence[int]]) -> None:
    """The parts of all ranks, chunk by chunk, as one file that appears when it is whole."""
    whole = out.with_name(f".{out.name}.part")
    parts = [out.with_name(f".{out.name}.{rank}.part").open("rb") for rank in range(len(lengths))]
    try:
        with whole.open("wb") as file:
            for k in range(sum(map(len, lengths))):
                rank, number = k % len(lengths), k // len(lengths)
                file.write(parts[rank].read(lengths[rank][number]))
            file.flush()
            os.fsync(file.fileno())
        whole.replace(out)
    finally:
        for part in parts:
            part.close()
        whole.unlink(missing_ok=True)


@contextmanager
def _progress(world: World, title: str) -> Iterator[Callable[[int], None]]:
    """A bar on rank 0 and on a terminal: how many structures, and how long it has taken."""
    counted = TextColumn("{task.completed:,} structures")
    columns = (TextColumn("{task.description}"), BarColumn(), counted, TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (world.first and console.is_terminal)) as bar:
        shown = bar.add_task(title, total=None)
        yield lambda more: bar.advance(shown, more)
