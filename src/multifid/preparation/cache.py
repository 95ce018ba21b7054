"""Stores of files that are only evaluated, made on the fly and kept for the next time.

    CACHE/NAME-KEY/        a store that is only test; may be removed at any time
    CACHE/.NAME-KEY.lock   held by the process that makes it, where the file system has locks
    CACHE/.NAME-KEY.*/     what is being made: it becomes the store by rename

KEY is a hash of everything that decides over the store: what is in the files, format, options, version.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from multifid import __version__
from multifid.preparation.inputs import find_inputs
from multifid.preparation.prepare import prepare
from multifid.readers import folder_marks, reader
from multifid.store.fields import SCHEMA, file_checksum
from multifid.store.store import Store

ONLY_TEST = (0.0, 0.0, 1.0)
ERROR = "error"  # the file in which a fresh interpreter says what went wrong
STDERR = 2  # what is printed while files are read is no result


@dataclass(frozen=True)
class Files:
    """What is to be evaluated: a file (or directory, or pattern), its format, and how it is read."""

    path: Path
    format: str
    options: dict[str, Any]
    trust_units: bool = False
    fractions: tuple[float, float, float] = ONLY_TEST  # of train, validation and test
    fold: tuple[int, int] | None = None  # (k, n): test is the k-th of n parts
    keep_splits: bool = False  # in place of fractions


def place_of(files: Files, cache: Path) -> Path:
    """Where the store of some files lies, or will. Reads them once. FileNotFoundError where there are none."""
    module = reader(files.format)
    resolve = getattr(module, "resolved", lambda *given: given)
    named, of_splits, options = resolve([], {"test": [files.path]}, files.options)
    inputs = find_inputs(named, of_splits, module.ENDINGS, folder_marks(module))
    asked = [__version__, SCHEMA, files.format, options, files.trust_units]
    asked += [] if files.fractions == ONLY_TEST else [list(files.fractions)]
    asked += [] if files.fold is None else [list(files.fold)]
    asked += ["keep_splits"] if files.keep_splits else []
    companions: Callable[[Path, Any], list[Path]] = getattr(module, "companions", lambda path, options: [])
    paths = [p for file in inputs for p in (file.path, *companions(file.path, module.Options(**options)))]
    text = json.dumps([*asked, *map(file_checksum, paths)], sort_keys=True)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", files.path.name)[:80]  # a pattern may be anything
    return cache / f"{name}-{xxhash.xxh3_128_hexdigest(text.encode())}"


def cached(files: Files, place: Path, progress: bool = False) -> tuple[Store, bool]:
    """The store of some files at its place, and whether it was there before.

    Several processes may ask for the same one: one makes it, the others wait, and where files cannot be locked, the
    first that is done is right. ValueError or OSError as `prepare`.
    """
    with _locked(place):
        if (found := _whole(place)) is not None:
            return found, True
        with tempfile.TemporaryDirectory(
            prefix=f".{place.name}.", dir=place.parent, ignore_cleanup_errors=True
        ) as made:
            _prepare_apart(files, Path(made), progress)
            with contextlib.suppress(OSError):  # another process, that could not be locked out, was faster
                (Path(made) / "store").rename(place)
    return Store(place), False


def _prepare_apart(files: Files, folder: Path, progress: bool) -> None:
    """FOLDER/store, made by a fresh interpreter: `prepare` forks, and this process may have threads and a device."""
    question = {**asdict(files), "path": str(files.path), "progress": progress}
    command = [sys.executable, "-m", "multifid.preparation.cache", str(folder)]
    done = subprocess.run(command, input=json.dumps(question), text=True, stdout=STDERR)
    if (error := folder / ERROR).exists():
        raise ValueError(error.read_text(encoding="utf-8"))
    if done.returncode:
        raise ValueError(f"{files.path}: preparing it ended with exit code {done.returncode}")


def main() -> None:
    """The fresh interpreter: a question on stdin, the store or an error in the folder of the command line."""
    folder, asked = Path(sys.argv[1]), json.load(sys.stdin)
    first, second, third = asked["fractions"]
    whole = (first, second, third) == ONLY_TEST and not asked["keep_splits"]
    try:
        prepare(
            asked["format"],
            [] if whole else [asked["path"]],
            folder / "store",
            files_of_split={"test": [Path(asked["path"])]} if whole else {},
            fractions=(first, second, third),
            options=asked["options"],
            trust_units=asked["trust_units"],
            keep_splits=asked["keep_splits"],
            fold=None if asked["fold"] is None else (asked["fold"][0], asked["fold"][1]),
            progress=asked["progress"],
            talk=False,
        )
    except (ValueError, OSError) as error:
        (folder / ERROR).write_text(str(error), encoding="utf-8")


def _whole(place: Path) -> Store | None:
    """The store, if it can be opened; what cannot was damaged, and is removed to be made again."""
    if not place.exists():
        return None
    try:
        return Store(place)
    except ValueError:
        shutil.rmtree(place, ignore_errors=True)
        return None


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Alone among the processes that ask for one place; what killed ones left of it is removed."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(place.parent / f".{place.name}.lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ValueError(f"nothing can be kept in {place.parent} ({error}); say another place, --cache DIR") from None
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
            for left in place.parent.iterdir():
                if left.name.startswith(f".{place.name}.") and left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)


if __name__ == "__main__":
    main()
