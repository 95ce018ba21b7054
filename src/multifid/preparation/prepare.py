"""Published files to a store: read, check, divide, fit reference energies, count, commit.

Workers read parts of the files to pieces on disk (`intake`); these are put together in order, and what needs a second
look (splits, reference energies, scale) reads the store's field files again (`finish`). The store appears by one rename
at the end, or not at all, and has the same bytes whatever number of workers and ranks made it, killed however often.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from multifid.preparation.bar import bar
from multifid.preparation.finish import Rule, finish
from multifid.preparation.inputs import Input, find_inputs
from multifid.preparation.intake import Intake, jobs, read_files
from multifid.preparation.summary import not_taken, summary
from multifid.preparation.unfinished import Unfinished
from multifid.preparation.workers import Workers
from multifid.readers import folder_marks, reader
from multifid.readers.first_records import FirstRecords
from multifid.readers.properties import property_sets
from multifid.store.fields import TASK_NAME, files_of
from multifid.store.store import Store
from multifid.store.writer import StoreWriter


def prepare(
    format: str,
    inputs: Sequence[Path | str],
    out: Path | str,
    *,
    task: str | None = None,
    limit: int | None = None,
    first: int | None = None,
    files_of_split: dict[str, list[Path]] | None = None,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    options: dict[str, Any] | None = None,
    level_of_theory: str | None = None,
    trust_units: bool = False,
    drop_duplicates: bool = False,
    drop_duplicates_of: Sequence[Path | str] = (),
    keep_splits: bool = False,
    fold: tuple[int, int] | None = None,
    onto: Store | None = None,
    workers: int = 1,
    rank: int = 0,
    size: int = 1,
    progress: bool = True,
    talk: bool = True,
) -> Store | None:
    """Make one store of one or several files of a published format, and open it.

    inputs: files, directories (all files of the format below them) or patterns. task: the name of its label set (by
    default the format's own). limit: at most so many structures of each file. first: at most so many
    records of each, whatever they are. files_of_split: split -> files that are
    this split as a whole, in addition to `inputs`. options: what the reader's `Options` take. trust_units: make
    the store also where its units look wrong (what speaks against them goes into the manifest). drop_duplicates: set
    structures aside (split `unused`) that repeat an earlier one. drop_duplicates_of: stores; set aside what is trained
    on here and tested on there, or the other way round. keep_splits: as every record says. fold: (k, n), the k-th of n
    parts is test (`split.folded`). onto: the store that this will be a part of (`append`). workers: processes that
    read. rank, size: this process among others that prepare the same store on a common file system; only the first has
    a store to return. progress: show a bar on a terminal, and, with `talk`, print what the store holds.

    ValueError or OSError for anything that a user can correct, naming it; nothing is left then. What was done when the
    process was killed or interrupted stays, and the same call resumes from it.
    """
    module: Any = reader(format) if first is None else FirstRecords(reader(format), first)
    resolve = getattr(module, "resolved", lambda *given: given)
    inputs, files_of_split, options = resolve(inputs, files_of_split or {}, options or {})
    chosen = _options(module, format, options)
    _refuse_wrong(task, limit, workers)
    rule = Rule(fractions, seed, drop_duplicates, keep_splits, fold, [Store(path) for path in drop_duplicates_of], onto)
    files = find_inputs(inputs, files_of_split, module.ENDINGS, folder_marks(module))
    if rank and Path(out).exists():  # the first rank was that much faster, or complains of it
        return None
    unfinished = Unfinished(Path(out), _question(format, files, chosen, limit), rank, size)
    with _kept_when_interrupted(unfinished), Workers(workers, jobs(module, chosen)) as pool:
        if rank:
            read_files(files, unfinished, pool, limit, lambda *far: None)
            return None
        if Path(out).exists() and unfinished.plan() is not None:  # killed between the rename and the cleaning
            return Store(out)
        with StoreWriter(out, workers) as writer:
            label_sets = getattr(module, "label_sets", lambda paths, options: module.TASKS)
            known = property_sets(chosen) or label_sets([file.path for file in files], chosen)
            intake = Intake(module, known, writer, task, level_of_theory)
            with bar(files, progress) as advance:
                plan = read_files(files, unfinished, pool, limit, advance)
                unfinished.wait_for_parts(len(plan))
            intake.take(files, plan, unfinished, pool)
            if writer.structures == 0:
                named = ", ".join(str(f.path) for f in files)
                raise ValueError(f"{named}: no structure can be used\n{intake.skips()}{_holdings(format, files[0])}")
            asked = {"format": format, "options": {**chosen.model_dump(mode="json"), "limit": limit}}
            finish(writer, intake, files, asked, rule, trust_units, pool)
    store = Store(out)
    if progress and talk:
        console = Console()
        console.print(summary(store))
        for line in not_taken(store):  # unbroken, so that its options can be copied
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    return store


def _refuse_wrong(task: str | None, limit: int | None, workers: int) -> None:
    if task is not None and not TASK_NAME.fullmatch(task):
        raise ValueError(f"a task is named by letters, digits, _ and -, not {task!r}")
    for name, value in (("limit", limit), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


@contextmanager
def _kept_when_interrupted(unfinished: Unfinished) -> Iterator[None]:
    """What is done stays for the next time where the process is interrupted; after success or an error nothing does."""
    try:
        yield
    except (KeyboardInterrupt, TimeoutError, ChildProcessError):
        raise
    except Exception as error:
        unfinished.fail(error)
        if unfinished.rank == 0:
            unfinished.remove()
        raise
    else:
        unfinished.leave()
        if unfinished.rank == 0:
            unfinished.remove()
    finally:
        unfinished.leave()


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
    stats = [(path, path.stat()) for file in files for path in files_of(file.path)]
    return {
        "format": format,
        "options": options.model_dump(mode="json"),
        "limit": limit,
        "files": [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
    }


def _options(module: ModuleType, format: str, given: dict[str, Any]) -> Any:
    try:
        return module.Options(**given)
    except ValidationError as error:
        known = ", ".join(module.Options.model_fields) or "none"
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        more = f"multifid formats {format} says what they mean"
        raise ValueError(f"options of {format}: {problems} (there are: {known}); {more}") from error
