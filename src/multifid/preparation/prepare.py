"""Published files to a store: read, check, divide, fit reference energies, count, commit.

Workers read parts of the files to pieces on disk (`intake`); these are put together in order, and what needs a second
look (splits, reference energies, scale) reads the store's field files again. The store appears by one rename at the
end, or not at all, and has the same bytes whatever number of workers and ranks made it, killed however often.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from multifid.preparation.inputs import Input, find_inputs
from multifid.preparation.intake import Advance, Intake, jobs, read_files
from multifid.preparation.split import Divided, NothingLeft, divide, fitted, set_unseen_aside
from multifid.preparation.summary import not_taken, summary
from multifid.preparation.survey import sample_edges, survey_task
from multifid.preparation.unfinished import Unfinished
from multifid.preparation.workers import Call, Workers
from multifid.quality.check import check_fields, geometries
from multifid.quality.doubts import Doubt
from multifid.quality.leakage import set_aside
from multifid.quality.outliers import outliers_of_fields
from multifid.readers import reader
from multifid.store.array_file import Rows
from multifid.store.fields import TASK_NAME, file_checksum
from multifid.store.references import References
from multifid.store.store import Store
from multifid.store.writer import StoreWriter
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
    trust_units: bool = False,
    drop_duplicates: bool = False,
    drop_duplicates_of: Sequence[Path | str] = (),
    workers: int = 1,
    rank: int = 0,
    size: int = 1,
    progress: bool = True,
    talk: bool = True,
) -> Store | None:
    """Make one store of one or several files of a published format, and open it.

    inputs: files, directories (all files of the format below them) or patterns. task: the name of its label set (by
    default the format's own). limit: at most so many structures of each file. files_of_split: split -> files that are
    this split as a whole, in addition to `inputs`. options: what the reader's `Options` take. trust_units: make
    the store also where its units look wrong (what speaks against them goes into the manifest). drop_duplicates: set
    structures aside (split `unused`) that repeat an earlier one. drop_duplicates_of: stores; set aside what is trained
    on here and tested on there, or the other way round. workers: processes that
    read. rank, size: this process among others that prepare the same store on a common file system; only the first has
    a store to return. progress: show a bar on a terminal, and, with `talk`, print what the store holds.

    ValueError or OSError for anything that a user can correct, naming it; nothing is left then. What was done when the
    process was killed or interrupted stays, and the same call resumes from it.
    """
    module = reader(format)
    chosen = _options(module, format, options or {})
    if task is not None and not TASK_NAME.fullmatch(task):
        raise ValueError(f"a task is named by letters, digits, _ and -, not {task!r}")
    for name, value in (("limit", limit), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    others = [Store(path) for path in drop_duplicates_of]
    files = find_inputs(inputs, files_of_split or {}, module.ENDINGS)
    if rank and Path(out).exists():  # the first rank was that much faster, or complains of it
        return None
    unfinished = Unfinished(Path(out), _question(format, files, chosen, limit), rank, size)
    try:
        with Workers(workers, jobs(module, chosen)) as pool:
            if rank:
                read_files(files, unfinished, pool, limit, lambda *far: None)
                return None
            if Path(out).exists() and unfinished.plan() is not None:  # killed between the rename and the cleaning
                unfinished.remove()
                return Store(out)
            with StoreWriter(out, workers) as writer:
                intake = Intake(module, writer, task, level_of_theory)
                with _bar(files, progress) as advance:
                    plan = read_files(files, unfinished, pool, limit, advance)
                    unfinished.wait_for_parts(len(plan))
                intake.take(files, plan, unfinished, pool)
                if writer.structures == 0:
                    named = ", ".join(str(f.path) for f in files)
                    there = _holdings(format, files[0])
                    raise ValueError(f"{named}: no structure can be used\n{intake.skips()}{there}")
                asked = {"format": format, "options": {**chosen.model_dump(mode="json"), "limit": limit}}

                def divided(fields: dict[str, Rows]) -> tuple[np.ndarray, dict[str, Any]]:
                    return _divide(fields, intake, files, fractions, seed, drop_duplicates, others)

                _finish(writer, intake, files, asked, divided, trust_units, pool)
    except (KeyboardInterrupt, TimeoutError, ChildProcessError):
        raise  # what is done stays for the next time
    except Exception as error:
        unfinished.fail(error)
        if rank == 0:
            unfinished.remove()
        raise
    finally:
        unfinished.leave()
    unfinished.remove()
    store = Store(out)
    if progress and talk:
        console = Console()
        console.print(summary(store))
        for line in not_taken(store):  # unbroken, so that its options can be copied
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    return store


def _finish(
    writer: StoreWriter,
    intake: Intake,
    files: list[Input],
    asked: dict[str, Any],
    divided: Callable[[dict[str, Rows]], tuple[np.ndarray, dict[str, Any]]],
    trust_units: bool,
    pool: Workers,
) -> None:
    """All structures are written: doubt, divide, fit, count, commit."""
    fields = writer.seal()
    label_sets = {name: about for name, about in intake.label_sets.items() if name in writer.labels}
    levels = {name: about.level_of_theory for name, about in label_sets.items()}
    isolated = {name: intake.isolated.get(name, {}) for name in label_sets}
    judged: Call = (check_fields, (fields, levels, isolated))
    calls: list[Call] = [judged, *((file_checksum, (file.path,)) for file in files)]
    (checked, *sums), (split, splits) = pool.beside(calls, lambda: divided(fields))
    doubts = _doubts(checked.doubts, trust_units, [file.name for file in files])
    tasks = {
        name: {
            "level_of_theory": labels.level_of_theory,
            "energy_kind": labels.energy_kind,
            "labels": writer.labels[name],
            **survey_task(name, fields, split, writer.present, isolated[name], pool.each),
            **({"isolated": {str(z): e for z, e in sorted(isolated[name].items())}} if isolated[name] else {}),
        }
        for name, labels in label_sets.items()
    }
    outliers = _outliers(tasks, fields, files, intake.structures_of_file, pool)
    writer.commit(
        split,
        {
            "source": {"format": asked["format"], "files": _sources(files, intake, sums), "options": asked["options"]},
            "tasks": tasks,
            "splits": splits,
            "edges_per_atom": sample_edges(fields, split),
            "skipped_first": dict(sorted(intake.examples.items())),
            "dropped_labels": dict(sorted(intake.dropped.items())),
            **({"assumed": dict(sorted(intake.assumed.items()))} if intake.assumed else {}),
            "measured": checked.to_manifest(),
            **({"outliers": outliers} if outliers else {}),
            **(
                {"notes": {k: dict(sorted(v.items())) for k, v in sorted(intake.notes.items())}} if intake.notes else {}
            ),
            **({"doubts": doubts} if doubts else {}),
        },
    )


def _outliers(
    tasks: dict[str, dict[str, Any]], fields: dict[str, Rows], files: list[Input], counts: list[int], pool: Workers
) -> dict[str, dict[str, Any]]:
    """Labels far from all others, by task and kind. counts: structures of each file."""
    ends = np.cumsum(counts)

    def place(structure: int) -> str:
        first, last = fields["source_id_offsets"][structure : structure + 2].tolist()
        source = fields["source_id"][first:last].tobytes().decode()
        return f"{files[int(np.searchsorted(ends, structure, side='right'))].name}: {source}"

    references = {name: References.from_manifest(about) for name, about in tasks.items()}
    told: dict[str, dict[str, Any]] = {}
    for found in outliers_of_fields(fields, references, pool.each):
        told.setdefault(found.task, {})[found.kind] = found.to_manifest(place)
    return told


def _holdings(format: str, file: Input) -> str:
    """What the first record of a file holds, and the options that say which of it is what."""
    module = reader(format)
    try:
        lines: list[str] = getattr(module, "holds", lambda path: [])(file.path)
    except (ValueError, OSError, KeyError, RuntimeError):  # a damaged file; the reasons of the skips say more
        lines = []
    listed = "".join(f"\n  {line}" for line in lines)
    options = ", ".join(module.Options.model_fields) or "none"
    return (f"\nthe first record of {file.name} holds:{listed}" if lines else "") + (
        f"\noptions of {format}: {options} (`multifid formats {format}` explains them)"
    )


def _question(format: str, files: list[Input], options: Any, limit: int | None) -> dict[str, Any]:
    """What decides over the parts of the files: format, options and the files as they are now."""
    stats = [(file.path, file.path.stat()) for file in files]
    return {
        "format": format,
        "options": options.model_dump(mode="json"),
        "limit": limit,
        "files": [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
    }


def _doubts(found: list[Doubt], trusted: bool, files: list[str]) -> list[str]:
    """What speaks against the declared units, one line each; a ValueError unless they are trusted."""
    if found and not trusted:
        listed = "\n  ".join(map(str, found))
        named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        raise ValueError(f"{named}: units are doubtful (--trust-units, where they are right all the same):\n  {listed}")
    return [str(doubt) for doubt in found]


def _divide(
    fields: dict[str, Rows],
    intake: Intake,
    files: list[Input],
    fractions: tuple[float, float, float],
    seed: int,
    drop_duplicates: bool,
    others: list[Store],
) -> tuple[np.ndarray, dict[str, Any]]:
    file = np.repeat(np.arange(len(files), dtype=np.uint32), intake.structures_of_file)
    given = [f.split for f in files]
    columns = (fields["relative"][:], fields["split"][:], file, given, intake.module.RELATIVE, fractions, seed)
    aside: dict[str, int] = {}

    def divided_by(within: bool) -> tuple[Divided, list[int]]:
        divided = divide(*columns, within)
        if drop_duplicates or others:
            filled = set(divided.split.tolist())
            aside["duplicates"] = set_aside(divided.split, geometries(fields), drop_duplicates, others)
            for code in sorted(filled - set(divided.split.tolist())):
                raise ValueError(
                    f"every {SPLITS[code]} structure is a duplicate that is set aside: nothing is left of it"
                )
        return divided, set_unseen_aside(divided.split, fields["numbers"], fields["offsets"], intake.writer.present)

    try:
        divided, unseen = divided_by(within=False)
    except NothingLeft as nothing:  # as where each formula is one element
        try:
            divided, unseen = divided_by(within=True)
        except ValueError:
            raise nothing from None
    counts = {name: int((divided.split == code).sum()) for code, name in enumerate(SPLITS)}
    rule: dict[str, Any] = {"seed": seed, "rule": divided.rule, "fractions": list(fractions)}
    if not counts["train"]:
        rule["fitted_on"] = SPLITS[fitted(divided.split)[0]]
    return divided.split, {**counts, **rule, "unseen_elements": unseen, **aside}


def _sources(files: list[Input], intake: Intake, sums: list[str]) -> list[dict[str, Any]]:
    return [
        {"name": file.name, "bytes": file.path.stat().st_size, "xxh3": digest, "structures": count}
        for file, digest, count in zip(files, sums, intake.structures_of_file, strict=True)
    ]


def _options(module: ModuleType, format: str, given: dict[str, Any]) -> Any:
    try:
        return module.Options(**given)
    except ValidationError as error:
        known = ", ".join(module.Options.model_fields) or "none"
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        more = f"multifid formats {format} says what they mean"
        raise ValueError(f"options of {format}: {problems} (there are: {known}); {more}") from error


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

        drawn, done = 0.0, [0.0] * len(files)

        def advance(number: int, fraction: float, structures: int) -> None:
            nonlocal drawn
            done[number] = fraction
            if bar.disable or (fraction < 1.0 and monotonic() - drawn < 0.1):
                return
            drawn = monotonic()
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(
                shown,
                description=files[number].name,
                completed=sum(part * size for part, size in zip(done, sizes, strict=True)),
                structures=structures,
                rate=structures / elapsed if elapsed else 0.0,
            )

        yield advance
