"""`multifid predict MODEL FILE... --task T --out OUT.xyz`: a model's energies, forces and stresses of files.

    frames --> chunks of some thousand atoms --> rank k mod size predicts chunk k --> its part of OUT --> one file

All ranks read all files, which costs little beside a prediction; each writes what it predicted to a part beside OUT,
and the first one puts the parts together in the order of the files. OUT appears by rename, when it is whole.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_xyz
from ase.stress import full_3x3_to_voigt_6_stress
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from multifid.apply.frames import Frame, Unread, frames
from multifid.apply.model import Model, load
from multifid.model.predictor import EDGES
from multifid.parallel import groups
from multifid.parallel.groups import World

ATOMS = 4096  # of a chunk, about
STRUCTURES = 512  # of a chunk, at most
NAMED = 5  # structures that a message names
ENDINGS = (".xyz", ".extxyz")


@dataclass
class Tally:
    """What one rank has done."""

    structures: int = 0
    refused: int = 0
    named: list[str] = field(default_factory=list)  # the first of those that were refused, with the reason
    lengths: list[int] = field(default_factory=list)  # bytes of each of its chunks in its part


def predict(
    model: Path,
    files: Sequence[Path],
    out: Path,
    task: str | None = None,
    *,
    device: str | None = None,
    precision: str = "fp32",
    max_edges: int | None = None,
    skip: bool = False,
    console: Console | None = None,
) -> int:
    """Write the structures of files with what a model says of them; returns how many.

    out: extended XYZ that ASE reads back: energy (eV, total), forces (eV/angstrom), stress (eV/angstrom^3) where there
    is one, `info["task"]`, and what else a structure had but its labels. files: see `frames`. skip: leave out what the
    model refuses, and count it, in place of an error. The same on every rank of a launch by torchrun or srun.

    ValueError names the structures that are refused: elements that the task has never seen, atoms that coincide,
    positions that are not finite, ...; FileExistsError where `out` exists. Then nothing is written.
    """
    refuse_out(out)
    console = console or Console()
    with groups.world(device) as world:
        loaded = load(model, world.device, precision)
        name = loaded.task(task)
        part = out.with_name(f".{out.name}.{world.rank}.part")
        try:
            with world.together():
                if world.first:
                    for left in out.parent.glob(f".{out.name}.*.part"):  # by a run that was killed
                        left.unlink()
            tally = _predicted(loaded, name, files, part, world, max_edges or EDGES, skip)
            lengths = [world.share(tally.lengths, rank) for rank in range(world.size)]
            first = [line for rank in range(world.size) for line in world.share(tally.named, rank)]
            sums = world.group.sum_(torch.tensor([tally.structures, tally.refused]))
            total, refused = sums.tolist()
            with world.together():
                if world.first:
                    _put_together(out, lengths, total, [*first, f"{refused} structures are refused"])
        finally:
            part.unlink(missing_ok=True)
        if world.first:
            left_out = f"; {refused} left out, as {'; '.join(first[:NAMED])}" if refused else ""
            console.print(
                f"{out}: {total} structures, task {name}{left_out}", soft_wrap=True, highlight=False, markup=False
            )
    return int(total)


def refuse_out(out: Path) -> None:
    """Before hours of work: ValueError or FileExistsError where it could not be written."""
    if not out.name.lower().endswith(ENDINGS):
        raise ValueError(f"--out {out}: predictions are extended XYZ, a name that ends in {' or '.join(ENDINGS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or choose another name")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {out.parent}")


def _predicted(
    model: Model, task: str, files: Sequence[Path], part: Path, world: World, max_edges: int, skip: bool
) -> Tally:
    """Predict this rank's chunks and write them to its part."""
    tally = Tally()
    with part.open("wb") as file, _progress(world) as advance:
        for k, chunk in enumerate(_chunks(files)):
            if k % world.size != world.rank:
                continue
            there, refused = _asked(model, task, [f for f in chunk if isinstance(f, Frame)], max_edges)
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
    return f"no prediction for\n  {listed}{more}\n--skip-refused leaves such structures out and counts them"


def _chunks(files: Sequence[Path]) -> Iterator[list[Frame | Unread]]:
    """Consecutive structures, some thousand atoms together."""
    chunk: list[Frame | Unread] = []
    atoms = 0
    for frame in frames(files):
        chunk.append(frame)
        atoms += len(frame.atoms) if isinstance(frame, Frame) else 0
        if atoms >= ATOMS or len(chunk) >= STRUCTURES:
            yield chunk
            chunk, atoms = [], 0
    if chunk:
        yield chunk


def _asked(model: Model, task: str, chunk: Sequence[Frame], max_edges: int) -> tuple[list, list[str]]:
    """Atoms with their predictions, and what was refused of a chunk: where and why."""
    try:
        out = model.predict([f.atoms for f in chunk], task, max_edges=max_edges)
    except ValueError as error:
        if len(chunk) == 1:
            return [], [f"{chunk[0].where}: {str(error).removeprefix('structure 0: ')}"]
        each = [_asked(model, task, [frame], max_edges) for frame in chunk]  # which one it is
        return [atoms for there, _ in each for atoms in there], [text for _, refused in each for text in refused]
    there, refused = [], []
    for k, frame in enumerate(chunk):
        results = {"energy": float(out.energy[k]), "forces": out.forces[k]}
        if not (np.isfinite(results["energy"]) and np.isfinite(out.forces[k]).all()):
            refused.append(f"{frame.where}: the model's answer is not finite")
            continue
        if out.stress is not None and np.isfinite(out.stress[k]).all():
            results["stress"] = full_3x3_to_voigt_6_stress(out.stress[k])
        there.append(labelled(frame.atoms, results, task))
    return there, refused


def labelled(atoms, results: dict, task: str):
    """Atoms that hold results as ASE writes them, in place of any labels that they had under these names."""
    for name in ("energy", "free_energy", "forces", "stress", "energies", "virial"):
        atoms.info.pop(name, None)
        atoms.arrays.pop(name, None)
    atoms.info["task"] = task
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _put_together(out: Path, lengths: Sequence[Sequence[int]], total: int, why: Sequence[str]) -> None:
    """The parts of all ranks, chunk by chunk, as one file that appears when it is whole."""
    if not total:
        raise ValueError(f"no structure is left to be written to {out}: {'; '.join(why[:NAMED])}")
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
def _progress(world: World):
    """A bar on rank 0 and on a terminal: how many structures, and how long it has taken."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} structures"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (world.first and console.is_terminal)) as bar:
        shown = bar.add_task("predict", total=None)
        yield lambda more: bar.advance(shown, more)
