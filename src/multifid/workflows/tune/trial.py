"""One trial of a search, in a process of its own: `python -m multifid.workflows.tune.trial CONFIG.yaml CLOCK`.

It trains what the config says by the clock of the budget, and writes how that ended beside the config. The end of its
standard input is the search's word to stop: the run then ends after its step, with everything saved. A search that is
killed closes that pipe too, so no trial outlives its search.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.config import load_config
from multifid.parallel.launch import launch
from multifid.training.run import train
from multifid.workflows.tune.clocks import clock_of

ERROR = "multifid: error: "


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, on file systems that know locks: one that was told to stop may still be ending."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def write_json(path: Path, content: Any) -> None:
    """Whole or not there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(path)


def _stop_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 64):  # not through sys.stdin: its lock would be held when the process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(path: Path, kind: str) -> None:
    config = load_config(path)
    clock = clock_of(None if kind == "none" else kind)
    if launch().rank > 0:
        train(config, Console(quiet=True), clock=clock, signals=True)
        return
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    with locked(path.with_suffix(".lock")):
        ending = train(config, Console(quiet=True), clock=clock, signals=True)
        about = {
            "steps": ending.steps,
            "best": ending.best,
            "best_step": ending.best_step,
            "complete": ending.complete,
            "reason": ending.reason,
        }
        write_json(path.with_suffix(".json"), about)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{ERROR}{error}", file=sys.stderr, flush=True)
        sys.exit(1)
