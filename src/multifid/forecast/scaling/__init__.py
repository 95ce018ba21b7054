"""`multifid scaling CONFIG`: weak and strong scaling, measured on the ranks at hand and forecast beyond.

    three times, for each number of ranks: launch it
        -> an epoch of weak and of strong scaling, replicated and split -> OUT/measured-<ranks>.json
    fit a description of this machine to some of the points -> forecast the others -> OUT/machine.yaml
    forecast the described machines -> OUT/scaling.json, OUT/scaling.png

On several hosts each number of ranks is launched by srun or torchrun with `--here`; the command without it then takes
what it finds in OUT.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.config import Config
from multifid.evaluation.fitted import FittedTable
from multifid.feed.loader import open_sources
from multifid.forecast.machines import MACHINES, Machine, write_machine
from multifid.forecast.scaling.beyond import Predicted, curves, rank_numbers, shortest
from multifid.forecast.scaling.calibrate import MeasuredCase, calibrate, like_here, used
from multifid.forecast.scaling.measure import PHASES, MeasuredPoint, at_point, measure, points
from multifid.forecast.subject import subject_of
from multifid.forecast.this_machine import this_machine
from multifid.parallel import groups
from multifid.training.feed import make_draws
from multifid.training.resolve import placement_of

SHORT = {"communication": "sums", "bookkeeping": "books", "optimizer": "update"}
ERROR = "multifid: error: "  # before what the user should read, see `cli.main`
EPOCHS = 3  # that are measured


def scaling_here(
    config: Config, out: Path, local_batch: float, global_batch: float, epoch_steps: int, epoch: int | None = None
) -> None:
    """Measure on the ranks of this launch, and write OUT/measured-<ranks>.json.

    epoch: only this one, beside what the file holds of those before it (the first, 0, begins anew); None: all, anew.
    ValueError where the file holds other points.
    """
    with groups.world(config.train.device) as world:
        wanted = points(world.size, len(config.tasks), local_batch, global_batch)
        path = out / f"measured-{world.size}.json"
        before = read_measured(path) if epoch else []
        if epoch and [m.point for m in before] != wanted:
            raise ValueError(f"{path}: its points are not those of this command, so --epoch {epoch} cannot be added")
        found = measure(config, wanted, world, range(EPOCHS) if epoch is None else [epoch], epoch_steps)
        if world.first:
            found = [a.and_(b) for a, b in zip(before, found, strict=True)] if epoch else found
            path.write_text(json.dumps([m.as_dict() for m in found], indent=1), encoding="utf-8")


def read_measured(path: Path) -> list[MeasuredPoint]:
    """What `scaling_here` wrote."""
    return [MeasuredPoint.from_dict(values) for values in json.loads(path.read_text(encoding="utf-8"))]


def launch(arguments: Sequence[str], ranks: int) -> None:
    """The same command on so many ranks of this host, with --here. ValueError with what a rank said where it fails."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *run, "-m", "multifid", "scaling", *arguments, "--here"]
    with groups.one_thread_each():
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line.partition(ERROR)[2] for line in done.stderr.splitlines() if ERROR in line]
        before = done.stderr.partition("torch/distributed/elastic")[0]  # the launcher's own account is long
        raise ValueError(f"measuring on {ranks} ranks failed: {said[0] if said else before[-2000:]}")


def report(
    config: Config, out: Path, local_batch: float, console: Console | None = None, forecast_batch: float | None = None
) -> dict[str, Any]:
    """Calibrate, forecast, draw and write, from what has been measured in OUT.

    forecast_batch: structures a rank on the described machines; None: as measured here.
    """
    console = console or Console()
    paths = sorted(out.glob("measured-*.json"), key=lambda p: int(p.stem.partition("-")[2]))
    measured = [point for path in paths for point in read_measured(path)]
    if not measured:
        raise ValueError(f"{out} holds no measured-<ranks>.json: measure first (--ranks 1,2,...)")
    here = this_machine(config.train.device, max(m.point.ranks for m in measured))
    cases = [_case(config, m, processor=not here.queued) for m in measured]
    fitted = calibrate(here, cases)
    told = [case.on(fitted) for case in cases]
    machines = [like_here(m, fitted, here) for m in MACHINES.values()]
    batch = forecast_batch or local_batch
    subject = _case(config, measured[-1], processor=False).subject
    predicted = [p for m in machines for p in curves(subject, m, batch)]
    write_machine(fitted, out / "machine.yaml")
    errors = [t.seconds / m.step - 1 for t, m in zip(told, measured, strict=True)]
    rows = [
        {**m.as_dict(), "forecast": t.seconds, "forecast_phases": t.phases, "fitted": used(m.point), "error": e}
        for m, t, e in zip(measured, told, errors, strict=True)
    ]
    values = {
        "measured": rows,
        "machine": asdict(fitted),
        "this_machine": asdict(here),
        "forecast_on": [asdict(m) for m in machines],
        "forecast": [p.as_dict() for p in predicted],
    }
    (out / "scaling.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    from multifid.forecast.scaling.figure import draw

    draw(measured, [t.seconds for t in told], predicted, out / "scaling.png")
    console.print(_measured_table(measured, [t.seconds for t in told]))
    for machine in machines:
        console.print(_forecast_table(machine, predicted))
    console.print(f"{out / 'scaling.json'}, {out / 'scaling.png'}, {out / 'machine.yaml'} (for plan --machine)")
    return values


def _case(config: Config, measured: MeasuredPoint, processor: bool) -> MeasuredCase:
    at = at_point(config, measured.point)
    sources = open_sources(at.tasks, verify="off")
    draws = make_draws(at, sources)
    placement = placement_of(at, sources, draws, measured.point.ranks)
    subject = subject_of(at, sources, draws, measured.point.ranks, processor)
    told = sum(subject.tasks[unit[0]].structures * subject.tasks[unit[0]].edges for unit in subject.together)
    # a few steps do not hold mean structures
    return MeasuredCase(measured, subject.times(measured.edges / told), placement)


def _measured_table(measured: Sequence[MeasuredPoint], told: Sequence[float]) -> FittedTable:
    rows = []
    for m, t in zip(measured, told, strict=True):
        parts = [f"{m.phases[p] * 1e3:.1f}" for p in PHASES]
        mark = "" if used(m.point) else f" ({t / m.step - 1:+.0%})"
        name = f"{m.point.mode} {m.point.placement}"
        rows.append(
            [name, str(m.point.ranks), f"{m.point.batch:g}", *parts, f"{m.step * 1e3:.1f}", f"{t * 1e3:.1f}{mark}"]
        )
    heads = [SHORT.get(column, column) for column in ("ranks", "batch", *PHASES, "sum", "forecast")]
    note = "forecasts with a deviation are of points that the machine was not fitted to"
    return FittedTable("Measured here, ms a step", [""], heads, rows, notes=[note])


def _forecast_table(machine: Machine, predicted: Sequence[Predicted]) -> FittedTable:
    numbers, rows = rank_numbers(machine), []
    mine = [p for p in predicted if p.machine == machine.name]
    for mode, placement, balanced in dict.fromkeys((p.mode, p.placement, p.balanced) for p in mine):
        times = [p.forecast.seconds for p in mine if (p.mode, p.placement, p.balanced) == (mode, placement, balanced)]
        label = f"{mode} {placement}" + ("" if balanced else ", not balanced")
        rows.append([label, *(f"{t * 1e3:.3g}" for t in times), f"{efficiency(mode, numbers, times):.2f}"])
    faster = shortest(mine)
    for mode in ("weak", "strong"):
        rows.append([f"{mode}: faster", *(faster[machine.name, mode, n] for n in numbers), ""])
    heads = [*map(str, numbers), "efficiency"]
    return FittedTable(f"Forecast on {machine.name}, ms a step", [""], heads, rows)


def efficiency(mode: str, ranks: Sequence[int], seconds: Sequence[float]) -> float:
    """Of the most ranks against the fewest."""
    speedup = seconds[0] / seconds[-1]
    return speedup if mode == "weak" else speedup * ranks[0] / ranks[-1]
