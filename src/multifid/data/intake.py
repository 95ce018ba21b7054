"""The first pass of `prepare`: every record of every file is stored, skipped with a reason, or an isolated atom."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from multifid.data.readers import IsolatedAtom, LabelSet, Skip
from multifid.data.validate import drop_infinite, invalid
from multifid.data.writer import StoreWriter
from multifid.structures.structure import Structure

Advance = Callable[[int, float, int], None]  # (number of the file, fraction of it done, structures stored so far)


@dataclass(frozen=True, slots=True)
class Input:
    """One source file: where it is, how the manifest calls it, and the split it was given for."""

    path: Path
    name: str
    split: str | None


class Intake:
    """Reads files into a writer and remembers what does not go into field files.

    task, level_of_theory: what the user calls the label set; the records must then hold only one.
    """

    def __init__(self, module: ModuleType, writer: StoreWriter, task: str | None, level_of_theory: str | None) -> None:
        self.module, self.writer, self.task, self.level_of_theory = module, writer, task, level_of_theory
        self.structures_of_file: list[int] = []
        self.names: dict[str, str] = {}  # label set of the reader -> task of the store
        self.label_sets: dict[str, LabelSet] = {}  # task -> what its labels are
        self.isolated: dict[str, dict[int, float]] = {}  # task -> Z -> eV
        self.dropped: dict[str, int] = {}  # labels that are not numbers, by reason

    def read(self, files: list[Input], options: Any, limit: int | None, advance: Advance) -> None:
        """All files, one after the other; at most `limit` structures of each."""
        for number, file in enumerate(files):
            before = self.writer.structures

            def report(fraction: float, number: int = number) -> None:
                advance(number, fraction, self.writer.structures)

            for record in self.module.read(file.path, options, report):
                self._take(record, file)
                if limit is not None and self.writer.structures - before >= limit:
                    break
            self.structures_of_file.append(self.writer.structures - before)
            report(1.0)

    def _take(self, record: Structure | Skip | IsolatedAtom, file: Input) -> None:
        match record:
            case Skip():
                self.writer.skip(file.name, record.where, record.reason)
            case IsolatedAtom():
                energies = self.isolated.setdefault(self._task_of(record.task), {})
                if (known := energies.setdefault(record.number, record.energy)) != record.energy:
                    energy = f"{known} and {record.energy} eV"
                    raise ValueError(f"{file.path}: the isolated atom Z={record.number} has two energies: {energy}")
            case Structure():
                record.labels = {self._task_of(name): labels for name, labels in record.labels.items()}
                dropped = drop_infinite(record)
                if (reason := invalid(record)) is not None:
                    self.writer.skip(file.name, record.source_id, reason)
                    return
                for what in dropped:
                    self.dropped[what] = self.dropped.get(what, 0) + 1
                self.writer.append(record)

    def _task_of(self, name: str) -> str:
        if name in self.names:
            return self.names[name]
        if self.names and (self.task is not None or self.level_of_theory is not None):
            both = ", ".join([*self.names, name])
            raise ValueError(f"the files hold several label sets ({both}): one task or level of theory cannot name all")
        known: LabelSet = self.module.TASKS[name]
        task = self.names[name] = self.task or name
        self.label_sets[task] = LabelSet(self.level_of_theory or known.level_of_theory, known.energy_kind)
        return task
