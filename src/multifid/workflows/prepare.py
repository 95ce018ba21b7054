"""`multifid prepare`, and preparing from Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multifid.parallel.launch import launch
from multifid.preparation.prepare import prepare as prepare_store
from multifid.preparation.preview import format_of
from multifid.preparation.preview import preview as preview_files
from multifid.store.store import Store

Paths = Path | str | Sequence[Path | str]


def prepare(
    format: str,
    inputs: Paths,
    out: Path | str,
    *,
    task: str | None = None,
    limit: int | None = None,
    train: Paths = (),
    validation: Paths = (),
    test: Paths = (),
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    level_of_theory: str | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    trust_units: bool = False,
    drop_duplicates: bool = False,
    drop_duplicates_of: Paths = (),
    quiet: bool = False,
) -> Store | None:
    """Turn published files, or files of your own, into a store; the same call goes on with one that was killed.

    Args:
        format: as `multifid formats` lists them: ani1x, mptrj, extxyz, aselmdb, ...; auto: as the first input looks.
        inputs: files, directories or patterns, one or several; [] where all files are given by split.
        out: directory of the new store, which must not exist.
        task: name of the label set; default: the format's.
        limit: at most so many structures of each file.
        train: inputs that are all training split.
        validation: inputs that are all validation split.
        test: inputs that are all test split.
        fractions: of the other inputs, for train, validation and test, by relatives; (0, 0, 1) makes only a test set.
        seed: of the split.
        level_of_theory: for the manifest, where it is not the format's.
        options: of the format, as `multifid formats FORMAT` lists them.
        workers: processes that read; the store is the same for all.
        trust_units: make the store though its units look wrong.
        drop_duplicates: set structures aside that repeat an earlier one.
        drop_duplicates_of: stores; set aside what is trained on here and tested on there, or the other way round.
        quiet: print nothing.

    Returns:
        The store. In a launch of several ranks, which share the work, None on all but the first.

    Raises:
        ValueError: for what a user can mend, naming file and place. (OSError where files cannot be read or written.)
    """
    given = {"train": _listed(train), "validation": _listed(validation), "test": _listed(test)}
    who = launch()
    return prepare_store(
        format_of(format, [path for files in (_listed(inputs), *given.values()) for path in files]),
        _listed(inputs),
        out,
        task=task,
        limit=limit,
        files_of_split={split: files for split, files in given.items() if files},
        fractions=fractions,
        seed=seed,
        options=dict(options or {}),
        level_of_theory=level_of_theory,
        workers=workers,
        rank=who.rank,
        size=who.size,
        trust_units=trust_units,
        drop_duplicates=drop_duplicates,
        drop_duplicates_of=_listed(drop_duplicates_of),
        progress=not quiet,
        talk=not quiet,
    )


def preview(
    format: str,
    inputs: Paths,
    *,
    task: str | None = None,
    train: Paths = (),
    validation: Paths = (),
    test: Paths = (),
    level_of_theory: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Print what `prepare` would take from the first hundred records of files, and what is doubtful; write nothing.

    Args:
        format: as for `prepare`; auto: as the first input looks.
        inputs: files, directories or patterns, one or several; [] where all files are given by split.
        task: name of the label set; default: the format's.
        train: inputs that are all training split.
        validation: inputs that are all validation split.
        test: inputs that are all test split.
        level_of_theory: for the manifest, where it is not the format's.
        options: of the format.

    Raises:
        ValueError: for what a user can mend, naming file and place, and where nothing could be used.
    """
    given = {"train": _listed(train), "validation": _listed(validation), "test": _listed(test)}
    found = format_of(format, [path for files in (_listed(inputs), *given.values()) for path in files])
    divided = {split: files for split, files in given.items() if files}
    preview_files(found, _listed(inputs), divided, dict(options or {}), task=task, level_of_theory=level_of_theory)


def _listed(paths: Paths) -> list[Path]:
    return [Path(paths)] if isinstance(paths, Path | str) else [Path(path) for path in paths]
