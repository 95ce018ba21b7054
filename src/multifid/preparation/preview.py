"""What `prepare` would take from files, told from their first records; nothing is left on disk.

The records go through all of `prepare` into a store in a temporary directory: what is told is what would happen.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from multifid.preparation.inputs import find_inputs
from multifid.preparation.prepare import prepare
from multifid.preparation.summary import not_taken, summary
from multifid.readers import folder_marks, reader
from multifid.readers.recognise import recognise

RECORDS = 100  # that are looked at, of all files together
FILES = 10  # that are looked at
ONLY_TEST = (0.0, 0.0, 1.0)  # few structures can be divided badly, and need not be


def preview(
    format: str,
    inputs: Sequence[Path | str],
    files_of_split: dict[str, list[Path]],
    options: dict[str, Any],
    console: Console | None = None,
    **more: Any,
) -> None:
    """Print what the first records hold, and what would be taken of them. more: as for `prepare`.

    ValueError as `prepare` raises it, but units that are doubtful are only told.
    """
    console = console or Console()
    module = reader(format)
    resolve = getattr(module, "resolved", lambda *given: given)
    inputs, files_of_split, options = resolve(inputs, files_of_split, options)
    files = find_inputs(inputs, files_of_split, module.ENDINGS, folder_marks(module))
    looked = files[:FILES]
    each = -(-RECORDS // len(looked))

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    say(f"format {format}: {len(files):,} files; of each up to {each} records: {', '.join(f.name for f in looked)}")
    for line in _first_record(module, looked[0].path):
        say(f"  {line}")
    with tempfile.TemporaryDirectory(prefix="multifid-dry-run-") as folder:
        store = prepare(
            format,
            [file.path for file in looked],
            Path(folder) / "dry-run",
            options=options,
            fractions=ONLY_TEST,
            first=each,
            limit=each,  # a file is one part then, and none is searched for where to cut it
            trust_units=True,
            progress=False,
            **more,
        )
        assert store is not None, "this process is the first rank"
        table = summary(store)
        table.title = "of these records"
        console.print(table)
        for line in not_taken(store):
            say(line)
        doubts = store.manifest.get("doubts", [])
    for doubt in doubts:
        say(f"doubtful: {doubt}")
    say(f"nothing was written{'; prepare refuses these units without --trust-units' if doubts else ''}")


def _first_record(module: ModuleType, path: Path) -> list[str]:
    """Names and values of the first record; nothing where its reader cannot say."""
    try:
        lines: list[str] = getattr(module, "holds", lambda path: [])(path)
    except (ValueError, OSError, KeyError, RuntimeError):  # what is wrong with the file, reading it says better
        return []
    return ["the first record holds", *(f"  {line}" for line in lines)] if lines else []


def format_of(format: str, inputs: Sequence[Path]) -> str:
    """`auto` as the format that the first input is of. ValueError where nothing says it."""
    if format != "auto":
        return format
    if not inputs:
        raise ValueError("auto: no input file is given")
    return recognise(inputs[0])
