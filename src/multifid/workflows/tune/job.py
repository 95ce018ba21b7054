"""A trial under way, as the search sees it: a process, the journal of its run, and how it ended."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from multifid.config import Config, dump_config
from multifid.parallel.launch import command_of
from multifid.training.record import Row
from multifid.workflows.tune.settings import TuneConfig
from multifid.workflows.tune.strategies import UNITS
from multifid.workflows.tune.trial import ERROR, write_json
from multifid.workflows.watch import Tail

MODULE = "multifid.workflows.tune.trial"
SIGN = 10.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one, after which a search on another host is taken for dead


@dataclass(frozen=True)
class Files:
    """What belongs to a trial, beside the directory of its run. Continued trials share the files of the first."""

    folder: Path
    number: int

    @property
    def run(self) -> Path:
        return self.folder / f"{self.number:04d}"

    def beside(self, ending: str) -> Path:
        """`yaml`: the config; `json`: how it ended; `log`: what its processes printed; `alive`: whose it is."""
        return self.folder / f"{self.number:04d}.{ending}"


@dataclass
class Job:
    """The process of a trial."""

    trial: Any  # optuna's
    files: Files
    config: Config
    slot: int
    process: subprocess.Popen[bytes]
    tail: Tail
    told: dict[int, float] = field(default_factory=dict)  # unit of resource -> value that the study was told
    step: int = -1  # of the last validation that was looked at
    used: float = 0.0  # seconds of the processor, of this process and those it started
    pruned: bool = False
    signed: float = 0.0

    def sign(self) -> None:
        """Say that the search of this trial is alive."""
        if time.monotonic() - self.signed > SIGN:
            os.utime(self.files.beside("alive"))
            self.signed = time.monotonic()

    def over(self) -> bool:
        """Whether the process has ended; its processor time is then known."""
        if self.process.returncode is None:
            ended, status, used = os.wait4(self.process.pid, os.WNOHANG)
            if not ended:
                return False
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.used = used.ru_utime + used.ru_stime
            self.close()
        return True

    def close(self) -> None:
        """Tell it to stop after its step: the end of its input is the word."""
        stdin: BinaryIO | None = self.process.stdin  # type: ignore[assignment]
        if stdin is not None and not stdin.closed:
            stdin.close()

    def validations(self) -> list[list[Row]]:
        """The rows of validations that are new, one list for each."""
        if not self.tail.path.exists():
            return []
        self.tail.read()
        found: dict[int, list[Row]] = {}
        for row in self.tail.rows:
            if row["split"] == "validation" and row["step"] > self.step:
                found.setdefault(row["step"], []).append(row)
        tasks = len(self.config.tasks)
        whole = [rows for _, rows in sorted(found.items()) if len(rows) == tasks]
        self.step = whole[-1][0]["step"] if whole else self.step
        return whole

    def ending(self) -> dict[str, Any]:
        """How the run ended. ValueError with the reason where it failed."""
        code, path = self.process.returncode, self.files.beside("json")
        if code == 0 and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        raise ValueError(why_failed(code, self.files.beside("log")))


def start(trial: Any, files: Files, config: Config, tune: TuneConfig, slot: int) -> Job:
    """Write the config of a trial and start its processes. OSError where the launcher is not there."""
    files.folder.mkdir(parents=True, exist_ok=True)
    part = files.beside("part")
    part.write_text(dump_config(config), encoding="utf-8")
    part.replace(files.beside("yaml"))
    files.beside("json").unlink(missing_ok=True)
    module = [MODULE, str(files.beside("yaml")), tune.budget.kind or "none"]
    command, environment = command_of(module, tune.ranks, tune.launcher, slot, tune.at_once, tune.srun)
    if shutil.which(command[0]) is None:
        raise OSError(f"tune.launcher: {command[0]} is not there; inside an allocation of Slurm it should be")
    with files.beside("log").open("ab") as log:
        log.write(f"--- trial {trial.number}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    return Job(trial, files, config, slot, process, Tail(files.run / "metrics.jsonl"))


def claim(files: Files) -> None:
    """Say whose trial this is, before it is started."""
    files.folder.mkdir(parents=True, exist_ok=True)
    write_json(files.beside("alive"), {"host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid())})


def alive(files: Files, began: float) -> bool:
    """Whether the search that claimed a trial still lives. began: when the trial was asked for, by `time.time`."""
    path = files.beside("alive")
    try:
        owner, signed = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
    except (OSError, ValueError):
        return time.time() - began < SILENCE
    if owner["host"] != socket.gethostname():
        return time.time() - signed < SILENCE
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return born(owner["pid"]) == owner["born"]


def born(pid: int) -> str | None:
    """When a process began, in ticks of this host; numbers of processes are given again. None where it is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def progress(row: Row, config: Config, tune: TuneConfig) -> int:
    """Units of resource, of `UNITS` in the whole, that a run has spent at a row of its journal."""
    train, kind = config.train, tune.budget.kind
    if kind == "steps" or (kind is None and train.steps is not None):
        part = row["step"] / (train.steps or 1)
    elif train.minutes is not None:
        part = row["seconds"] / (60 * train.minutes)
    else:
        part = row["epoch"] / train.epochs
    return min(UNITS, int(UNITS * part + 1e-6))


def last_second(files: Files) -> float:
    """Seconds of the budget's clock in the last row of a trial's journal; 0 where there is none."""
    tail = Tail(files.run / "metrics.jsonl")
    if tail.path.exists():
        tail.read()
    return tail.rows[-1]["seconds"] if tail.rows else 0.0


def why_failed(code: int, log: Path) -> str:
    """The reason of a failed trial in one line: its own error, else the last line that it printed."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps because the host was out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.rpartition("--- trial")[2].splitlines() if line.strip()]
    said = [line.partition(ERROR)[2] for line in lines if ERROR in line]
    return said[0] if said else f"exit code {code}: {lines[-1] if len(lines) > 1 else 'it printed nothing'}"
