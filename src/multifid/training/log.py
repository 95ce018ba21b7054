"""What people read of a run: on the console, and in RUN/train.log.

A batch job's console is a file, so there is nothing in either that a file should not hold: no colours, no control
characters, no lines wrapped at the width of a terminal that is not there. On a terminal a bar is shown too.

Lines that begin with a blank are records: they say what a run is, or what it has reached at a step, and come again when
the run goes on at an earlier one. Opening the log there cuts them off; messages, which begin at the margin, stay.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from multifid.training.record import Row

FILE_WIDTH = 200  # columns of a line in a file, at most, where tasks are shown one by one
_STEP = re.compile(r" +(?:\w+ at step )?(\d+)[ ,:]")
_CONTROL = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Log:
    """Prints on a console and into RUN/train.log; on every rank but the first it is silent."""

    def __init__(self, console: Console, first: bool = True) -> None:
        self.first = first
        self.console = console if first else Console(quiet=True)
        self._file: TextIO | None = None
        self._waiting: list[str] = []  # what was said before there was a file

    @property
    def width(self) -> int:
        """Columns that a line may have: of the terminal, if there is one."""
        return self.console.width if self.console.is_terminal else FILE_WIDTH

    def open(self, run: Path, step: int) -> None:
        """Write into RUN/train.log from now on, where the run goes on at `step`."""
        if not self.first:
            return
        path = run / "train.log"
        if path.exists():
            part = path.with_suffix(".part")
            part.write_text("".join(kept(path.read_text(encoding="utf-8", errors="replace"), step)), encoding="utf-8")
            os.replace(part, path)
        self._file = path.open("a", encoding="utf-8")
        for text in self._waiting:
            self._write(text)
        self._waiting.clear()

    def print(self, text: str, **options: Any) -> None:
        """Print a message, with rich's markup, and write it down without."""
        self.console.print(text, soft_wrap=True, **options)
        self.note(Text.from_markup(text).plain)

    def record(self, lines: list[str]) -> None:
        """Print lines as they are, and write them down."""
        text = "\n".join(_plain(line) for line in lines)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._write(text)

    def note(self, text: str) -> None:
        """Write a message down without printing it: what others print anyway."""
        self._write(re.sub(r"(?m)^ +", "| ", _plain(text)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, text: str) -> None:
        if not self.first:
            return
        if self._file is None:
            self._waiting.append(text)
            return
        self._file.write(text.rstrip() + "\n")
        self._file.flush()


def kept(text: str, step: int) -> Iterator[str]:
    """Lines of a log that stay where its run goes on at `step`: from the first record of a later step on, messages."""
    later = False
    for line in text.splitlines(keepends=True):
        found = _STEP.match(line)
        later = later or (found is not None and int(found[1]) > step) or not line.endswith("\n")
        if line.endswith("\n") and (not later or not line.startswith(" ")):
            yield line


def _plain(text: str) -> str:
    return text.translate(_CONTROL)


class Bar:
    """A recorder that shows a bar, on a terminal only: steps, and loss, speed and time left as of the last rows.

    steps: says how many steps are made, and how many there will be (None where that is not known yet). The bar looks
    by itself, some times in a second, so that a step has nothing to tell it.
    """

    def __init__(self, console: Console, steps: Callable[[], tuple[int, int | None]]) -> None:
        self._steps, self._said = steps, ""
        self._live = Live(get_renderable=self._bar, console=console, refresh_per_second=4, transient=True)
        self._shown = console.is_terminal
        if self._shown:
            self._live.start()

    def _bar(self) -> Table:
        done, total = self._steps()
        line = Table.grid(padding=(0, 1))
        for _ in range(4):
            line.add_column(no_wrap=True)
        share = ProgressBar(total or 100, done if total else 0, width=12, pulse=total is None)
        line.add_row("training", share, f"{done}/{total or '?'}", self._said)
        return line

    def write(self, rows: list[Row]) -> None:
        row = rows[0]
        if row["split"] == "train":
            speed = row["structures_per_second"] or 0.0
            self._said = f"loss {row['objective']:.4g}, {speed:.0f} structures/s, {duration(row['seconds_left'])} left"

    def close(self) -> None:
        if self._shown:
            self._live.stop()


def duration(seconds: float | None) -> str:
    """1:02:03, from a day on 2d03h, `-` for None."""
    if seconds is None:
        return "-"
    minutes, s = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}d{hours % 24:02}h" if hours >= 24 else f"{hours}:{minutes:02}:{s:02}"
