"""Published files to a store: read, check, divide, fit reference energies, count, commit.

Streams: structures go to the store's own field files as they come, and what needs a second look (splits, reference
energies, scale) reads these files again in pieces. The store appears by one rename at the end, or not at all.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from multifid.data.array_file import Rows
from multifid.data.fields import TASK_NAME, file_checksum
from multifid.data.intake import Advance, Input, Intake
from multifid.data.readers import reader
from multifid.data.split import DIVIDED, divide, set_unseen_aside
from multifid.data.store import Store
from multifid.data.summary import summary
from multifid.data.survey import sample_edges, survey_task
from multifid.data.writer import StoreWriter
from multifid.structures.structure import SPLITS


def prepare(
    format: str,
    inputs: Sequence[Path | str],
    out: Path | str,
    *,
    task: str | None = None,
    limit: int | None = None,
    files_of_split: dict[str, list[Path]] | None = None,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    options: dict[str, Any] | None = None,
    level_of_theory: str | None = None,
    progress: bool = True,
) -> Store:
    """Make one store of one or several files of a published format, and open it.

    task: the name of its label set (by default the format's own). limit: at most so many structures of each file.
    files_of_split: split -> files that are this split as a whole, in addition to `inputs`. options: what the reader's
    `Options` take. progress: show a bar on a terminal, and print what the store holds. ValueError or OSError for
    anything that a user can mend, naming it.
    """
    module = reader(format)
    chosen = _options(module, format, options or {})
    if task is not None and not TASK_NAME.fullmatch(task):
        raise ValueError(f"a task is named by letters, digits, _ and -, not {task!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    files = _inputs(inputs, files_of_split or {})
    with StoreWriter(out) as writer:
        intake = Intake(module, writer, task, level_of_theory)
        with _bar(files, progress) as advance:
            intake.read(files, chosen, limit, advance)
        if writer.structures == 0:
            raise ValueError(f"{', '.join(str(f.path) for f in files)}: no structure can be used ({writer.skipped})")
        fields = writer.seal()
        split, splits = _divide(fields, intake, files, fractions, seed)
        source_options = {**chosen.model_dump(mode="json"), "limit": limit}
        writer.commit(
            split,
            {
                "source": {"format": format, "files": _sources(files, intake), "options": source_options},
                "tasks": {
                    name: {
                        "level_of_theory": labels.level_of_theory,
                        "energy_kind": labels.energy_kind,
                        "labels": writer.labels[name],
                        **survey_task(name, fields, split, intake.isolated.get(name, {})),
                    }
                    for name, labels in intake.label_sets.items()
                    if name in writer.labels
                },
                "splits": splits,
                "edges_per_atom": sample_edges(fields, split),
                "dropped_labels": dict(sorted(intake.dropped.items())),
            },
        )
    store = Store(out)
    if progress:
        Console().print(summary(store))
    return store


def _divide(
    fields: dict[str, Rows], intake: Intake, files: list[Input], fractions: tuple[float, float, float], seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    file = np.repeat(np.arange(len(files), dtype=np.uint32), intake.structures_of_file)
    given = [f.split for f in files]
    divided = divide(fields["relative"][:], fields["split"][:], file, given, intake.module.RELATIVE, fractions, seed)
    unseen = set_unseen_aside(divided.split, fields["numbers"], fields["offsets"])
    counts = {name: int((divided.split == code).sum()) for code, name in enumerate(SPLITS)}
    splits = {**counts, "seed": seed, "rule": divided.rule, "fractions": list(fractions), "unseen_elements": unseen}
    return divided.split, splits


def _sources(files: list[Input], intake: Intake) -> list[dict[str, Any]]:
    return [
        {"name": f.name, "bytes": f.path.stat().st_size, "xxh3": file_checksum(f.path), "structures": n}
        for f, n in zip(files, intake.structures_of_file, strict=True)
    ]


def _options(module: ModuleType, format: str, given: dict[str, Any]) -> Any:
    try:
        return module.Options(**given)
    except ValidationError as error:
        known = ", ".join(module.Options.model_fields) or "none"
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"options of {format}: {problems} (there are: {known})") from error


def _inputs(inputs: Sequence[Path | str], files_of_split: dict[str, list[Path]]) -> list[Input]:
    """All files in the order given, those of a split last; a file that is both is only its split's."""
    split_of: dict[Path, str | None] = {}
    for name, paths in files_of_split.items():
        if name not in DIVIDED:
            raise ValueError(f"files can be given for {', '.join(DIVIDED)}, not for {name!r}")
        for path in map(Path, paths):
            if path in split_of:
                raise ValueError(f"{path} is given twice: for {split_of[path]} and for {name}")
            split_of[path] = name
    paths = [*(path for path in map(Path, inputs) if path not in split_of), *split_of]
    if not paths:
        raise ValueError("no input file is given")
    for i, path in enumerate(paths):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        if any(path.samefile(other) for other in paths[:i]):
            raise ValueError(f"{path} is given twice: its structures would count twice")
    above = os.path.commonpath([path.resolve().parent for path in paths])
    return [Input(path, path.resolve().relative_to(above).as_posix(), split_of.get(path)) for path in paths]


@contextmanager
def _bar(files: list[Input], wanted: bool) -> Iterator[Advance]:
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
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        shown = bar.add_task("preparing", total=sum(sizes), structures=0, rate=0.0)

        drawn = 0.0

        def advance(number: int, fraction: float, structures: int) -> None:
            nonlocal drawn
            if bar.disable or (fraction < 1.0 and monotonic() - drawn < 0.1):
                return
            drawn = monotonic()
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(
                shown,
                description=files[number].name,
                completed=sum(sizes[:number]) + fraction * sizes[number],
                structures=structures,
                rate=structures / elapsed if elapsed else 0.0,
            )

        yield advance
