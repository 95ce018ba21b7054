"""`multifid watch RUN`: a run in the terminal while it goes on: curves, errors, speed, time left.

It reads RUN/metrics.jsonl and nothing else, so it may run anywhere the directory can be seen, and disturbs no rank.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from multifid.training.log import duration
from multifid.training.record import Row

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # points of a curve
QUIET = 300.0  # seconds without a new line after which the run is called silent
KINDS = (
    ("energy_mae", "energy, meV/atom"),
    ("forces_mae", "forces, meV/Å"),
    ("stress_mae", "stress, meV/Å³"),
    ("property_mae", "property"),
)


@dataclass
class Tail:
    """The rows of a journal that is being written: whole lines are taken, a line that is half there is waited for."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    changed: float = 0.0  # when the file was last written to
    _at: int = 0

    def read(self) -> None:
        """Take what is new. A journal that became shorter (a run that went back to a checkpoint) is read anew."""
        about = self.path.stat()
        if about.st_size < self._at:
            self.rows, self._at = [], 0
        self.changed = about.st_mtime
        with self.path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._at += len(line)
                self.rows.append(json.loads(line))


def watch(run: Path, interval: float = 2.0, once: bool = False, console: Console | None = None) -> None:
    """Show the run until Ctrl-C, or until it is complete; `once`: show what there is and return.

    interval: seconds between two looks. ValueError where the directory holds no run.
    """
    path = Path(run) / "metrics.jsonl"
    if not (Path(run) / "config.yaml").is_file():
        raise ValueError(f"{run} is no run: it has no config.yaml; `multifid watch` takes the directory of a run")
    console, tail = console or Console(), Tail(path)
    if once:
        if path.exists():
            tail.read()
        console.print(screen(str(run), tail, time.time()))
        return
    try:
        with Live(console=console, refresh_per_second=4) as live:
            while True:
                if path.exists():
                    tail.read()
                live.update(screen(str(run), tail, time.time()))
                if (Path(run) / "last.safetensors").exists() and tail.rows and tail.rows[-1].get("seconds_left") == 0:
                    return
                time.sleep(interval)
    except KeyboardInterrupt:
        return


def screen(run: str, tail: Tail, now: float) -> RenderableType:
    """What is shown of a journal."""
    if not tail.rows:
        return Text(f"{run}: no metrics yet")
    latest = tail.rows[-1]
    validated = [row for row in tail.rows if row["split"] == "validation"]
    speed, left, memory = latest.get("structures_per_second"), latest.get("seconds_left"), latest.get("memory")
    parts = [
        f"step {latest['step']:,}",
        f"epoch {latest['epoch']:.2f}",
        f"{duration(latest['seconds'])} so far",
        "" if left is None else "complete" if left == 0 else f"{duration(left)} left",
        "" if speed is None else f"{speed:,.0f} structures/s",
        "" if memory is None else f"{memory / 2**30:.2f} GiB a rank",
    ]
    head = Text(f"{run}  ", style="bold") + Text(", ".join(p for p in parts if p), style="not bold")
    below: list[RenderableType] = [head]
    if validated:
        below += [_objective(validated), _errors(validated)]
    else:
        below.append(Text(f"loss of the last step {_number(latest.get('loss'))}; not validated yet"))
    silent = now - tail.changed
    if silent > QUIET and left != 0:
        below.append(Text(f"nothing was written for {duration(silent)}: it may have been stopped", style="yellow"))
    return Group(*below)


def curve(values: Sequence[float | None]) -> str:
    """The last values as bars, from the lowest to the highest that are shown."""
    known = [v for v in values if v is not None][-WIDTH:]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] for v in known)


def _objective(rows: list[Row]) -> Text:
    values = list({row["step"]: row.get("objective") for row in rows}.values())
    best = rows[-1].get("best")
    return Text(f"validation value {_number(values[-1])}, best {_number(best)}  ") + Text(curve(values), style="cyan")


def _errors(rows: list[Row]) -> Table:
    """The last validation of every task, and how it came about."""
    kinds = [(key, title) for key, title in KINDS if any(row.get(key) is not None for row in rows)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold")
    for _, title in kinds:
        table.add_column(title, justify="right")
        table.add_column("", style="cyan", no_wrap=True)
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        cells = [task]
        for key, _ in kinds:
            last = own[-1].get(key)
            cells += [
                _number(None if last is None else last if key == "property_mae" else 1000 * last),
                curve([row.get(key) for row in own]),
            ]
        table.add_row(*cells)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
