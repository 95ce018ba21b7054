"""The first pass of `prepare`: every record of every file is stored, skipped with a reason, or an isolated atom.

Files are cut into parts, processes read them (`parts`), and this one puts what they found together in the order of the
files. So the store does not depend on how many processes there were, nor on how often they were killed.
"""

import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from multifid.preparation.inputs import Input
from multifid.preparation.parts import (
    Assignment,
    ColumnFile,
    PartSummary,
    add_notes,
    found_in,
    is_done,
    place_piece,
    read_part,
)
from multifid.preparation.unfinished import Unfinished
from multifid.preparation.workers import Workers
from multifid.readers.contract import LabelSet, Part
from multifid.store.placing import Place
from multifid.store.writer import StoreWriter

Advance = Callable[[int, float, int], None]  # (number of the file, fraction of it done, structures stored so far)


def jobs(module: ModuleType, options: Any) -> dict[str, Callable[..., Any]]:
    """What workers can be asked to do."""
    return {
        "plan": lambda path, report: _named(path, lambda: module.parts(path, options)),
        "read": lambda work, report: _named(
            work.path, lambda: read_part(module, options, work, lambda *far: report(far))
        ),
        "place": lambda work, report: place_piece(*work),
    }


def _named(path: Path, work: Callable[[], Any]) -> Any:
    """Do it; whatever a library makes of damaged or hostile content, the error names the file."""
    try:
        return work()
    except OSError:  # of the system: it names what it is about
        raise
    except Exception as error:
        if path.name in str(error):
            raise
        named = ValueError(f"{path}: cannot be read: {type(error).__name__}: {error}")
        named.add_note("".join(traceback.format_tb(error.__traceback__)))
        raise named from None


def read_files(files: list[Input], unfinished: Unfinished, workers: Workers, limit: int | None, advance: Advance):
    """This rank's parts of all files, until they are done; the plan: (number of the file, part) of every part."""
    plan = unfinished.plan() if unfinished.rank == 0 else unfinished.wait_for_plan()
    if plan is None:
        plan = _plan(files, workers, limit)
        unfinished.write_plan(plan)
    mine = range(unfinished.rank, len(plan), unfinished.size)
    todo = [n for n in mine if not is_done(unfinished.part(n))]
    inputs = [files[plan[n][0]] for n in todo]
    work = [
        Assignment(file.path, file.name, plan[n][1], unfinished.part(n), limit)
        for file, n in zip(inputs, todo, strict=True)
    ]
    far = _Progress(plan, advance)
    for n in mine:
        if is_done(unfinished.part(n)):
            far.done(n, found_in(unfinished.part(n)).structures)
    for event in workers.run("read", work, lambda assigned: str(assigned.path)):
        n = todo[event.task]
        if event.done:
            far.done(n, found_in(unfinished.part(n)).structures)
        else:
            far.at(n, *event.value)
    return plan


def _plan(files: list[Input], workers: Workers, limit: int | None) -> list[tuple[int, Part]]:
    """With a limit for each file, a file is one part: where its first structures end is known only by reading."""
    if limit is not None:
        return [(number, None) for number in range(len(files))]
    parts: list[list[Part]] = [[] for _ in files]
    for event in workers.run("plan", [file.path for file in files], str):
        parts[event.task] = event.value
    return [(number, part) for number, found in enumerate(parts) for part in found]


class _Progress:
    """How far the parts of this rank are, told file by file."""

    def __init__(self, plan: list[tuple[int, Part]], advance: Advance) -> None:
        self.plan, self.advance = plan, advance
        self.parts_of_file = [0] * (max((file for file, _ in plan), default=-1) + 1)
        for file, _ in plan:
            self.parts_of_file[file] += 1
        self.fraction = [0.0] * len(self.parts_of_file)
        self.of_part: dict[int, float] = {}
        self.structures: dict[int, int] = {}

    def done(self, part: int, structures: int) -> None:
        self.at(part, 1.0, structures)

    def at(self, part: int, fraction: float, structures: int) -> None:
        file = self.plan[part][0]
        self.fraction[file] += (fraction - self.of_part.get(part, 0.0)) / self.parts_of_file[file]
        self.of_part[part], self.structures[part] = fraction, structures
        self.advance(file, self.fraction[file], sum(self.structures.values()))


class Intake:
    """Puts finished parts into a writer and remembers what does not go into field files.

    known: what the labels are that records may have. task, level_of_theory: what the user calls the label set; the
    records must then hold only one.
    """

    def __init__(
        self,
        module: ModuleType,
        known: dict[str, LabelSet],
        writer: StoreWriter,
        task: str | None,
        level_of_theory: str | None,
    ) -> None:
        self.module, self.known, self.writer = module, known, writer
        self.task, self.level_of_theory = task, level_of_theory
        self.structures_of_file: list[int] = []
        self.names: dict[str, str] = {}  # label set of the reader -> task of the store
        self.label_sets: dict[str, LabelSet] = {}  # task -> what its labels are
        self.isolated: dict[str, dict[int, float]] = {}  # task -> Z -> eV
        self.dropped: dict[str, int] = {}  # labels that are not numbers, by reason
        self.examples: dict[str, str] = {}  # reason of a skip -> the first record: file and place
        self.notes: dict[str, dict[str, int]] = {}  # how records were read: topic -> text -> how many
        self.assumed: dict[str, int] = {}  # what sources do not state, and what is taken for it -> structures

    def take(self, files: list[Input], plan: list[tuple[int, Part]], unfinished: Unfinished, pool: Workers) -> None:
        """All parts in the order of the files: where everything goes is said here, workers write it there."""
        self.structures_of_file = [0] * len(files)
        work: list[tuple[ColumnFile, dict[str, str], Place]] = []
        for number, (file, _) in enumerate(plan):
            found = found_in(unfinished.part(number))
            self._remember(found, files[file])
            for piece in found.pieces:
                work.append((piece, self.names, self.writer.reserve(piece.contents.renamed(self.names))))
            self.structures_of_file[file] += found.structures
        for _ in pool.run("place", work, lambda own: str(own[0].path)):
            pass

    def skips(self) -> str:
        """What was skipped, a line for each reason: how many records, and the first of them."""
        skipped = self.writer.skipped.items()
        return (
            "\n".join(f"  {n:,}: {reason} (first: {self.examples[reason]})" for reason, n in skipped) or "  no record"
        )

    def _remember(self, found: PartSummary, file: Input) -> None:
        for reason, where in found.examples.items():
            self.examples.setdefault(reason, f"{file.name}: {where}")
        for name in found.tasks:
            self._task_of(name)
        for name, number, energy in found.isolated:
            energies = self.isolated.setdefault(self._task_of(name), {})
            if (known := energies.setdefault(number, energy)) != energy:
                both = f"{known} and {energy} eV"
                raise ValueError(f"{file.path}: the isolated atom Z={number} has two energies: {both}")
        add_notes(self.notes, found.notes)
        for total, part in ((self.dropped, found.dropped), (self.assumed, found.assumed)):
            for what, count in part.items():
                total[what] = total.get(what, 0) + count

    def _task_of(self, name: str) -> str:
        if name in self.names:
            return self.names[name]
        if self.names and (self.task is not None or self.level_of_theory is not None):
            both = ", ".join([*self.names, name])
            raise ValueError(f"the files hold several label sets ({both}): one task or level of theory cannot name all")
        known = self.known[name]
        task = self.names[name] = self.task or name
        self.label_sets[task] = replace(known, level_of_theory=self.level_of_theory or known.level_of_theory)
        return task
