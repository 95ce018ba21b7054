"""The folder in which a store is prepared: what is done stays there, so that a killed prepare resumes.

    .NAME.parts/KEY.plan.json        how the files are cut into parts: written by the first rank
    .NAME.parts/KEY-000012.*         parts that are done, see `parts`
    .NAME.parts/KEY.rank-3           a number that grows while rank 3 lives

KEY says what was asked for and of which files (format, options, names, sizes, times of change): a call that asks for
something else starts anew, and the first rank removes files of other calls. Ranks meet here only, so that nothing but
a common file system is needed.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import xxhash

from multifid import __version__
from multifid.preparation.parts import is_done
from multifid.readers.contract import Part
from multifid.store.fields import SCHEMA

PARTS = 2  # what parts look like on disk: others are made anew
BEAT = 2.0  # seconds
SILENCE = 120.0  # seconds without a beat after which a rank is given up
POLL = 0.2  # seconds


class Unfinished:
    """The folder beside the store to be, for one of `size` ranks."""

    def __init__(self, store: Path, question: dict[str, Any], rank: int, size: int) -> None:
        self.folder = store.parent / f".{store.name}.parts"
        text = json.dumps([__version__, SCHEMA, PARTS, question], sort_keys=True)
        self.key = xxhash.xxh3_64_hexdigest(text.encode())
        self.rank, self.size = rank, size
        self._stop = threading.Event()
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for entry in self.folder.iterdir():
                if not entry.name.startswith(self.key) or ".rank-" in entry.name:
                    entry.unlink(missing_ok=True)
        else:
            threading.Thread(target=self._beat, daemon=True).start()

    def part(self, number: int) -> Path:
        """The path of a part without its ending."""
        return self.folder / f"{self.key}-{number:06}"

    def plan(self) -> list[tuple[int, Part]] | None:
        """(number of the file, part) of every part, if the first rank has written it."""
        path = self.folder / f"{self.key}.plan.json"
        if not path.is_file():
            return None
        return [(file, None if part is None else (part[0], part[1])) for file, part in json.loads(path.read_text())]

    def write_plan(self, plan: Sequence[tuple[int, Part]]) -> None:
        path = self.folder / f"{self.key}.plan.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plan))
        partial.replace(path)

    def wait_for_plan(self) -> list[tuple[int, Part]]:
        """The plan, on another rank than the first. TimeoutError if that one is silent."""
        began = time.monotonic()
        while (plan := self.plan()) is None:
            self.raise_failure()
            if time.monotonic() - began > 30 * SILENCE:
                raise TimeoutError(f"rank 0 has not planned the work in {self.folder} for {30 * SILENCE:.0f} s")
            time.sleep(POLL)
        return plan

    def wait_for_parts(self, count: int) -> None:
        """Until all parts are there, on the first rank. TimeoutError if a rank that has some left is silent."""
        heard = {rank: (b"", time.monotonic()) for rank in range(1, self.size)}
        left = [n for n in range(count) if n % self.size]
        while left := [n for n in left if not is_done(self.part(n))]:
            self.raise_failure()
            for rank in {n % self.size for n in left}:
                path = self.folder / f"{self.key}.rank-{rank}"
                beat = path.read_bytes() if path.is_file() else b""
                if beat != heard[rank][0]:
                    heard[rank] = beat, time.monotonic()
                elif time.monotonic() - heard[rank][1] > SILENCE:
                    raise TimeoutError(f"rank {rank} has been silent for {SILENCE:.0f} s; the same command goes on")
            time.sleep(POLL)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks."""
        if self.size > 1 and self.folder.is_dir():
            (self.folder / f"{self.key}.rank-failed").write_text(f"rank {self.rank}: {error}")

    def raise_failure(self) -> None:
        path = self.folder / f"{self.key}.rank-failed"
        if path.is_file():
            raise ValueError(path.read_text())
        if not self.folder.is_dir():
            raise ValueError(f"rank 0 has given up: {self.folder} is gone")

    def leave(self) -> None:
        self._stop.set()

    def remove(self) -> None:
        """The store is there, or there is none to be."""
        with contextlib.suppress(OSError), ThreadPoolExecutor() as threads:  # the kernel takes long over large files
            wait([threads.submit(entry.unlink, True) for entry in self.folder.iterdir()])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(0 if count == 0 else BEAT):
            count += 1
            try:
                (self.folder / f"{self.key}.rank-{self.rank}").write_text(str(count))
            except OSError:  # the folder is gone: the next look into it says so
                return
