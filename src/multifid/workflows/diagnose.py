"""`multifid diagnose RUN`: how the tasks of a run pull at its encoder, and which of them it learns by heart.

It reads the run's journals (metrics.jsonl, diagnosis.jsonl) and nothing else.
"""

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from multifid.config import load_config
from multifid.evaluation.figures import save
from multifid.evaluation.pulls import Gap, Pull, by_pair, figure, gaps, later, pulls
from multifid.training.diagnosis import NAME
from multifid.training.journal import METRICS, read_journal
from multifid.training.lines import number
from multifid.training.record import Row

PAIRS = 5  # that agree least, of many


def diagnose(run: Path, out: Path | None = None, console: Console | None = None) -> Path:
    """Print tables about a run, while it goes on or when it has ended, and draw the figure; returns its path.

    out: the figure; its suffix says the format; None: RUN/diagnosis.png. ValueError where the directory holds no run,
    or one that has not said anything yet.
    """
    run, console = Path(run), console or Console()
    tasks, journal, rows = read(run)
    console.print(screen(str(run), tasks, journal, rows))
    out = run / "diagnosis.png" if out is None else Path(out)
    save(figure(rows, journal, tasks), out)
    console.print(f"figure: {out}", soft_wrap=True)
    return out


def read(run: Path) -> tuple[list[str], list[Row], list[Row]]:
    """The tasks of a run, its metrics and its measurements. ValueError where it has neither."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run: it has no config.yaml; `multifid diagnose` takes the directory of a run")
    journal, rows = (read_journal(run, name) if (run / name).is_file() else [] for name in (METRICS, NAME))
    if not journal and not rows:
        raise ValueError(f"{run} has no metrics yet: they come every train.log_every steps")
    return list(load_config(run).tasks), journal, rows


def screen(run: str, tasks: list[str], journal: list[Row], rows: list[Row]) -> RenderableType:
    """What is printed about a run, from its journals."""
    parts: list[RenderableType] = []
    if rows:
        seen = sorted({row["step"] for row in later(rows)})
        parts += [
            Text(f"{run}: pull at the encoder, mean of {len(seen)} measurements, steps {seen[0]:,} to {seen[-1]:,}"),
            _pulls(pulls(rows, tasks)),
            Text("norm: of the gradient of the task's weighted objective; share: its part in the gradient of all"),
        ]
        if len(pairs := by_pair(rows, tasks)) > 1:
            least = ", ".join(f"{a} {b} {x:+.2f}" for (a, b), x in list(pairs.items())[:PAIRS])
            parts.append(Text(f"cosines that are lowest: {least}"))
    else:
        parts.append(Text(f"{run}: gradients were not measured (train.diagnose_every)"))
    if found := gaps(journal, tasks):
        parts += [
            Text(""),
            Text(f"objective of each task at step {max(g.step for g in found.values()):,}"),
            _gaps(found),
        ]
    return Group(*parts)


def _pulls(found: dict[str, Pull]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold")
    for title in ("norm", "share", "lowest cosine"):
        table.add_column(title, justify="right")
    table.add_column("with", overflow="fold")
    for task, pull in found.items():
        other, cosine = ("", "-") if pull.worst is None else (pull.worst[0], f"{pull.worst[1]:+.3f}")
        share = "-" if pull.share is None else f"{100 * pull.share:.1f} %"
        table.add_row(task, number(pull.norm), share, cosine, other)
    return table


def _gaps(found: dict[str, Gap]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold")
    for title in ("training", "validation", "ratio", "best", "at step", "above best"):
        table.add_column(title, justify="right")
    for task, gap in found.items():
        ratio = "-" if gap.ratio is None else f"{gap.ratio:.2f}"
        above = "-" if gap.above_best is None else f"{100 * gap.above_best:.1f} %"
        values = (number(gap.train), number(gap.validation), ratio, number(gap.best))
        table.add_row(task, *values, f"{gap.best_step:,}", above)
    return table
