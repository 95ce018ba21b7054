"""Rows of a run as lines for people: one for each log step, a small table for each validation.

                                  ani1x           mptrj
        step   epoch    loss  energy  forces  energy  forces      lr  |grad|  str/s  memory     left
          50    0.42  0.8123   12.31   123.4   45.10   234.0 1.0e-03   3.210   1234   1.20G  0:12:34

Energies are in meV/atom, forces in meV/angstrom, stress in meV/angstrom^3; the value of a property is in its own unit,
of a class it is the part that is wrong. Where the tasks do not fit beside each other
a line shows the mean over those that have labels and, if there is room, the task with the largest loss; the table has
all of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from multifid.training.log import Log, duration
from multifid.training.record import Row

GIB = 2**30
REPEAT = 40  # lines after which the heads of the columns are shown again
QUANTITIES = ("energy", "forces", "stress", "property")
HEADS = {"property": "value"}  # of columns that are called otherwise than their quantity
ALL = "mean"  # the head of the columns that stand for all tasks
UNITS = "energy meV/atom, forces meV/angstrom, stress meV/angstrom^3, |grad| unclipped, str/s structures/s"
_CELL = 8  # columns of an error
_NAME = 24  # longer names of tasks have a line of their own


class Lines:
    """Prints rows as lines into a log. stress: whether there is anything to say about it.

    properties: how many of the tasks have one in place of energies. value: by which models are compared where that is
    not the objective, of the tasks' losses by name.
    """

    def __init__(
        self,
        log: Log,
        tasks: Sequence[str],
        stress: bool,
        accelerator: bool,
        properties: int = 0,
        value: Callable[[Mapping[str, float]], float] | None = None,
    ) -> None:
        self.log = log
        self.value = value
        self.quantities: Sequence[str] = QUANTITIES[:3] if stress else QUANTITIES[:2]
        if properties:
            self.quantities = QUANTITIES[3:] if properties == len(tasks) else (*self.quantities, *QUANTITIES[3:])
        self.accelerator = accelerator
        each = sum(_width(task, self.quantities) for task in tasks)
        self.columns = list(tasks) if len(self._tail_heads()) + 24 + each <= log.width else [ALL]
        self._since_heads = REPEAT

    def write(self, rows: list[Row]) -> None:
        if rows[0]["split"] == "train":
            if self._since_heads >= REPEAT:
                self.log.record(self.heads())
                self._since_heads = 0
            self.log.record([self.line(rows)])
            self._since_heads += 1
        else:
            self.log.record(self.table(rows))
            self._since_heads = REPEAT

    def close(self) -> None:
        """The log is not closed: more is said after the last row."""

    def heads(self) -> list[str]:
        """The heads of the columns: names of tasks, and what is in their columns."""
        names = "".join(f" {name:^{_width(name, self.quantities) - 1}}" for name in self.columns)
        kinds = "".join(
            "".join(f"{HEADS.get(q, q):>{_CELL}}" for q in self.quantities).rjust(_width(n, self.quantities))
            for n in self.columns
        )
        return [f"{'':24}{names}".rstrip(), f"{'step':>8}{'epoch':>8}{'loss':>8}{kinds}{self._tail_heads()}"]

    def line(self, rows: list[Row]) -> str:
        """All rows of a log step on one line."""
        first, of_task = rows[0], {row["task"]: row for row in rows}
        errors = []
        for name in self.columns:
            values = _means(rows) if name == ALL else of_task[name]
            cells = "".join(f"{_shown(values, q):>{_CELL}}" for q in self.quantities)
            errors.append(cells.rjust(_width(name, self.quantities)))
        begin = f"{first['step']:>8}{first['epoch']:>8.2f}{number(first['objective']):>8}"
        skipped = f"  {first['skipped']} updates skipped: gradient not finite" if first["skipped"] else ""
        text = begin + "".join(errors) + self._tail(first) + skipped
        worst = self._worst(rows)
        return text + worst if len(text) + len(worst) <= self.log.width else text

    def table(self, rows: list[Row]) -> list[str]:
        """All rows of a validation: a line for the run, a line for each task."""
        first = rows[0]
        value, loss = first["objective"], number(first["objective"])
        if self.value is not None:
            value = self.value({row["task"]: row["loss"] for row in rows})
            loss += f", geometric mean {number(value)}"
        loss += " (best so far)" if first["best"] == value else ""
        left = duration(first["seconds_left"])
        about = [f"lr {first['lr']:.1e}", f"|grad| {number(first['grad_norm'])}"]
        if first["structures_per_second"] is not None:
            about.append(f"{first['structures_per_second']:.0f} structures/s")
        about.append(f"memory {self._memory(first)}")
        wide = max([len(row["task"]) for row in rows if len(row["task"]) <= _NAME], default=4)
        heads = f"{'structures':>12}" + "".join(f"{HEADS.get(q, q):>9}" for q in self.quantities) + f"{'loss':>9}"
        lines = [
            f" validation at step {first['step']}, epoch {first['epoch']:.2f}: loss {loss}, {left} left",
            f"   | {', '.join(about)}",
            f"   | {'task':<{wide}}{heads}",
        ]
        for row in rows:
            values = "".join(f"{_shown(row, q):>9}" for q in self.quantities)
            values = f"{row['structures']:>12}{values}{number(row['loss']):>9}"
            if len(row["task"]) > wide:
                lines += [f"   | {row['task']}", f"   | {'':<{wide}}{values}"]
            else:
                lines.append(f"   | {row['task']:<{wide}}{values}")
        return lines

    def _tail_heads(self) -> str:
        device = f"{'device':>8}" if self.accelerator else ""
        return f"{'lr':>8}{'|grad|':>8}{'str/s':>7}{'memory':>8}{device}{'left':>9}"

    def _tail(self, row: Row) -> str:
        speed = "-" if row["structures_per_second"] is None else f"{row['structures_per_second']:.0f}"
        device = f"{_gib(row['device_memory']):>8}" if self.accelerator else ""
        left = duration(row["seconds_left"])
        return f"{row['lr']:>8.1e}{number(row['grad_norm']):>8}{speed:>7}{_gib(row['memory']):>8}{device}{left:>9}"

    def _worst(self, rows: list[Row]) -> str:
        """The task with the largest loss, where not all are shown."""
        if self.columns != [ALL] or len(rows) == 1:
            return ""
        worst = max(rows, key=lambda row: row["loss"] if math.isfinite(row["loss"]) else math.inf)
        errors = " ".join(_milli(worst[f"{q}_mae"]) for q in self.quantities)
        return f"  largest loss {worst['task']} {number(worst['loss'])}: {errors}"

    def _memory(self, row: Row) -> str:
        device = f" + device {_gib(row['device_memory'])}" if self.accelerator else ""
        return _gib(row["memory"]) + device


def number(value: float | None, width: int = 7) -> str:
    """Four digits in at most `width` characters: 12.31, 1234, 0.01234, 1.2e-05; `-` for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return f"{value:.0f}"
    size = math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.{max(0, 3 - max(size, -3))}f}"
    return text if size >= -4 and len(text) <= width else f"{value:.1e}"


def _shown(row: Row, quantity: str) -> str:
    """Errors in milli, those of properties in their own unit (of classes: the part that is wrong)."""
    value = row.get(f"{quantity}_mae")
    return number(value) if quantity == "property" else _milli(value)


def _milli(value: float | None) -> str:
    return number(None if value is None else 1000 * value)


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / GIB:.2f}G"


def _width(task: str, quantities: Sequence[str]) -> int:
    """Columns that a task takes on a line; its name is not cut."""
    return max(_CELL * len(quantities), len(task) + 1)


def _means(rows: list[Row]) -> Row:
    """The errors in the mean over the tasks that have labels."""
    out: Row = {}
    for quantity in QUANTITIES:
        known = [row[f"{quantity}_mae"] for row in rows if row.get(f"{quantity}_mae") is not None]
        out[f"{quantity}_mae"] = sum(known) / len(known) if known else None
    return out
