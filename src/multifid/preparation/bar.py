"""The progress bar of `prepare`."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from multifid.preparation.inputs import Input
from multifid.preparation.intake import Advance


@contextmanager
def bar(files: list[Input], wanted: bool) -> Iterator[Advance]:
    """One progress bar over the bytes of all files, with structures/s; nothing where stderr is no terminal."""
    sizes = [max(file.path.stat().st_size, 1) for file in files]
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[structures]:,} structures, {task.fields[rate]:,.0f}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as shown_bar:
        shown = shown_bar.add_task("preparing", total=sum(sizes), structures=0, rate=0.0)

        drawn, done = 0.0, [0.0] * len(files)

        def advance(number: int, fraction: float, structures: int) -> None:
            nonlocal drawn
            done[number] = fraction
            if shown_bar.disable or (fraction < 1.0 and monotonic() - drawn < 0.1):
                return
            drawn = monotonic()
            elapsed = shown_bar.tasks[0].elapsed or 0.0
            shown_bar.update(
                shown,
                description=files[number].name,
                completed=sum(part * size for part, size in zip(done, sizes, strict=True)),
                structures=structures,
                rate=structures / elapsed if elapsed else 0.0,
            )

        yield advance
