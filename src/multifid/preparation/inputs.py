"""What a user names as input, as a list of files: files, directories and patterns."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from multifid.preparation.split import DIVIDED
from multifid.readers.packed import unpacked_name


@dataclass(frozen=True, slots=True)
class Input:
    """One source file: where it is, how the manifest calls it, and the split it was given for."""

    path: Path
    name: str
    split: str | None


def find_inputs(
    inputs: Sequence[Path | str],
    files_of_split: dict[str, list[Path]],
    endings: tuple[str, ...],
    marks: tuple[str, ...] = (),
) -> list[Input]:
    """All files in the order given, those of a split last; a file that is both is only its split's.

    A directory stands for all files below it with one of the `endings`, a pattern (`*`, `?`, `[`; `**` for any depth)
    for the files that match it, both sorted by name. A directory that holds a file of one of the names `marks` is read
    as one file. ValueError for a file named twice (or once packed and once not),
    FileNotFoundError for what stands for no file.
    """
    split_of: dict[Path, str | None] = {}
    for name, paths in files_of_split.items():
        if name not in DIVIDED:
            raise ValueError(f"files can be given for {', '.join(DIVIDED)}, not for {name!r}")
        for path in (file for given in paths for file in _files(given, endings, marks)):
            if path in split_of:
                raise ValueError(f"{path} is given twice: for {split_of[path]} and for {name}")
            split_of[path] = name
    given = [path for entry in inputs for path in _files(entry, endings, marks)]
    paths = [*(path for path in given if path not in split_of), *split_of]
    if not paths:
        raise ValueError("no input file is given: name INPUT, or files with --train, --validation, --test")
    seen, there = set(), set(paths)
    for path in paths:
        if (plain := unpacked_name(path)) != path and plain in there:
            raise ValueError(f"{path} is {plain.name} packed, by its name: its structures would count twice; name one")
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            raise ValueError(f"{path} is given twice: its structures would count twice")
        seen.add((status.st_dev, status.st_ino))
    above = os.path.commonpath([path.resolve().parent for path in paths])
    return [Input(path, path.resolve().relative_to(above).as_posix(), split_of.get(path)) for path in paths]


def _files(given: Path | str, endings: tuple[str, ...], marks: tuple[str, ...]) -> list[Path]:
    path = Path(given)

    def whole(p: Path) -> bool:
        return p.is_file() or (p.is_dir() and any((p / mark).is_file() for mark in marks))

    if whole(path):
        return [path]
    if path.is_dir():
        entries = [p for p in path.rglob("*") if p.is_file()]
        marked = {p.parent for p in entries if p.name in marks}
        folders = {p for p in marked if not marked.intersection(p.parents)}  # a store may have parts
        plain = [p for p in entries if p.name.lower().endswith(endings) and not folders.intersection(p.parents)]
        found = sorted([*plain, *folders])
        ways = [f"ends with {', '.join(endings)}"] * bool(endings) + [f"is called {', '.join(marks)}"] * bool(marks)
        wanted = f"no file in {path} {' or '.join(ways)}"
    elif any(sign in str(path) for sign in "*?["):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if whole(p))
        wanted = f"no file matches {path}"
    else:
        found, wanted = [], f"there is no file {path}"
    if not found:
        raise FileNotFoundError(wanted)
    return found
