"""Tables for a console of any width: nothing is cut, what does not fit beside the rest goes below it."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

PADDING = (0, 1, 0, 0)  # of cells: above, right, below, left
LEAST_TEXT = 24  # columns that a column of text must have beside numbers; else it goes below them


@dataclass(frozen=True)
class FittedTable:
    """Names to the left, numbers to the right, then perhaps one column of text that wraps.

    Rows hold as many cells as there are names, numbers and text, with rich's markup. Where the console is too narrow,
    columns of numbers (and the text) are divided among several tables, each with the names; a name is folded only where
    it leaves no room for one number.
    """

    title: str
    names: Sequence[str]
    numbers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str | None = None
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        for chosen in self._division(console, options):
            yield self._table(chosen)
        for note in self.notes:
            yield Text.from_markup(note)

    def _division(self, console: Console, options: ConsoleOptions) -> list[list[int]]:
        """The columns of each table, by their place among numbers and text."""
        columns = range(len(self.numbers) + (self.text is not None))
        tables: list[list[int]] = []
        for column in columns:
            if tables and self._width([*tables[-1], column], console, options) <= options.max_width:
                tables[-1].append(column)
            else:
                tables.append([column])
        return tables

    def _width(self, chosen: list[int], console: Console, options: ConsoleOptions) -> int:
        """Columns that a table needs if nothing is folded but text."""
        numbers = [column for column in chosen if column < len(self.numbers)]
        beside = 0 if numbers == chosen else 1 + min(LEAST_TEXT, self._longest(len(self.numbers)))
        return console.measure(self._table(numbers), options=options.update(max_width=10_000)).maximum + beside

    def _longest(self, column: int) -> int:
        """Columns that the cells below the head take."""
        cells = (row[len(self.names) + column] for row in self.rows)
        return max((cell_len(Text.from_markup(cell).plain) for text in cells for cell in text.split("\n")), default=0)

    def _table(self, chosen: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=PADDING)
        for name in self.names:
            table.add_column(name, overflow="fold")
        for column in chosen:
            if column == len(self.numbers):
                table.add_column(self.text or "", overflow="fold")
                continue
            head, longest = self.numbers[column], self._longest(column)
            stacked = head.replace(" ", "\n") if "\n" not in head and cell_len(head) > longest else head
            table.add_column(stacked, justify="right", no_wrap=True)
        named = len(self.names)
        for row in self.rows:
            table.add_row(*row[:named], *(row[named + column] for column in chosen))
        return table
