"""`multifid plan CONFIG --ranks N [--machine NAME]`: what a run would take, before anything is run.

Reads manifests and the mapped headers and columns of the stores, no structures. Where the branches would live in each
placement, what a rank holds, the largest batch that fits, what travels, and how long a step should take.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from multifid.config import Config
from multifid.evaluation.fitted import FittedTable
from multifid.feed.loader import open_sources
from multifid.forecast.data import ALL, HOST, OPENS, Data, StoreSize, data_of
from multifid.forecast.estimate import Forecast, forecast
from multifid.forecast.machines import Machine, read_machine
from multifid.forecast.subject import Subject, subject_of
from multifid.forecast.this_machine import this_machine, tried
from multifid.parallel.layout import GIB, place, ranges
from multifid.training.costs import loads, memory
from multifid.training.feed import epoch_steps, make_draws, total_steps
from multifid.training.log import duration
from multifid.training.resolve import placement_of, resolve

MUCH = 3.0  # from this ratio on one of encoder and branches outweighs the other
USABLE = 0.9  # of a device's memory: the rest goes to the driver, communication buffers and fragments
GOOD_ENOUGH = 1.02  # a simpler placement is proposed if its step is at most this much longer
CASES = {
    1: "P_s >> N_h P_h: the encoder outweighs the branches; shard it (parallel.shard_encoder)",
    2: "P_s << N_h P_h: the branches outweigh the encoder; split them (parallel.placement: split)",
    3: "P_s and N_h P_h are comparable: split the branches, and shard the encoder where memory asks for it",
}
SHARDED = "_sharded"  # after the name of a placement: with the encoder sharded over all ranks
STATE = ("parameters", "gradients", "optimizer", "averages")


@dataclass(frozen=True)
class Plan:
    """Everything that is printed."""

    ranks: int
    machine: Machine
    subject: Subject
    limit: float  # bytes of a rank
    forecasts: dict[str, Forecast]
    chosen: str
    asked: str  # what the config says
    passes: dict[str, float]  # over each dataset in an epoch
    epoch_steps: int
    steps: int | None  # of the run; None: as many as fit
    minutes: float | None  # of the run, where the clock ends it
    data: Data
    trial: bool  # the run will weigh tasks by trial steps, which may place `auto` and `split` otherwise

    @property
    def case(self) -> int:
        ratio = len(set(self.subject.branch_of.values())) * self.subject.branch.count / self.subject.encoder.count
        return 1 if ratio * MUCH < 1 else 2 if ratio > MUCH else 3

    @property
    def length(self) -> tuple[int, float]:
        """Steps and seconds of the run as the config places it, without validation."""
        step = self.forecasts.get(self.asked, self.forecasts[self.chosen]).seconds
        steps = max(1, int(60 * self.minutes / step)) if self.minutes is not None else self.steps or 0
        return steps, steps * step

    def fits(self, name: str) -> bool:
        return self.forecasts[name].bytes <= self.limit


def plan(
    config: Config, ranks: int, machine: str | None = None, as_json: bool = False, console: Console | None = None
) -> Plan:
    """Print the plan of a run on `ranks` ranks, as tables or as JSON. ValueError for what `multifid train` refuses too.

    machine: a known name, or a YAML file; None: the machine that this runs on, measured in a moment.
    """
    if ranks < 1:
        raise ValueError(f"--ranks {ranks} must be at least 1")
    there = this_machine(config.train.device, ranks) if machine is None else read_machine(machine)
    made = make_plan(config, ranks, there, trial=machine is None)
    console = console or Console()
    if as_json:
        console.print_json(json.dumps(as_dict(made)))
    else:
        for table in tables(made):
            console.print(table)
        for line in remarks(made):
            console.print(line, highlight=False)
    return made


def make_plan(config: Config, ranks: int, machine: Machine, trial: bool = False) -> Plan:
    """trial: the machine is this one, and a pass and some updates are made to see how long they take."""
    config = resolve(config, ranks)
    sources = open_sources(config.tasks, verify="off")
    draws = make_draws(config, sources)
    subject = subject_of(config, sources, draws, ranks, processor=not machine.queued)
    machine = tried(machine, subject, config.train.device) if trial else machine
    limit = USABLE * machine.memory if config.parallel.memory is None else config.parallel.memory * GIB
    tasks, asked = list(config.tasks), config.parallel.placement
    work, room = loads(config, sources, draws), memory(config, ranks)
    together = [list(source.tasks) for source in sources]
    placements = {name: place(tasks, name, ranks, together=together, loads=work) for name in ("replicated", "split")}
    try:
        placements["auto"] = place(tasks, "auto", ranks, together=together, loads=work, memory=room)
    except ValueError:  # nothing fits: shown as it would be without the limit, and marked
        placements["auto"] = place(tasks, "auto", ranks, together=together, loads=work)
    if isinstance(asked, dict):
        unlimited = config.parallel.model_copy(update={"memory": None})
        placements["config"] = placement_of(config.model_copy(update={"parallel": unlimited}), sources, draws, ranks)
    forecasts = {name: forecast(subject, where, machine, memory=limit) for name, where in placements.items()}
    if ranks > 1:
        for name in ("replicated", "split"):
            forecasts[f"{name}{SHARDED}"] = forecast(subject, placements[name], machine, memory=limit, sharded=True)
    sharded = SHARDED if config.parallel.shard_encoder else ""
    steps = epoch_steps(config.train, draws)
    chosen = choose(forecasts, limit)
    named = ("config" if isinstance(asked, dict) else asked) + sharded
    sizes = {draw.name: StoreSize.of(source.store) for draw, source in zip(draws, sources, strict=True)}
    ranks_of = forecasts.get(named, forecasts[chosen]).ranks_of
    return Plan(
        ranks=ranks,
        machine=machine,
        subject=subject,
        limit=limit,
        forecasts=forecasts,
        chosen=chosen,
        asked=named,
        passes={t: float(draw.rate) * steps / draw.order.size for draw in draws for t in draw.tasks},
        epoch_steps=steps,
        steps=None if config.train.minutes is not None else total_steps(config.train, draws),
        minutes=config.train.minutes,
        data=data_of(sizes, ranks_of, ranks, machine.per_node, config.sampling.blocks()),
        trial=config.parallel.costs == "measured",
    )


def choose(forecasts: Mapping[str, Forecast], limit: float) -> str:
    """The first that is within 2 % of the shortest step, of those that fit; where none does, the smallest.

    A sharded encoder is for models that do not fit otherwise: it is not proposed for a few per cent of time.
    """
    for suffix in ("", SHARDED):
        of_kind = {name: f for name, f in forecasts.items() if name.endswith(SHARDED) == bool(suffix)}
        fitting = {name: f for name, f in of_kind.items() if f.bytes <= limit and name != "config"}
        if fitting:
            break
    else:
        return min(forecasts, key=lambda name: forecasts[name].bytes)
    best = min(f.seconds for f in fitting.values())
    return next(name for name, f in fitting.items() if f.seconds <= best * GOOD_ENOUGH)


def as_dict(made: Plan) -> dict[str, Any]:
    """What `--json` prints."""
    subject = made.subject
    return {
        "ranks": made.ranks,
        "machine": made.machine.name,
        "case": made.case,
        "parameters": {
            "encoder": subject.encoder.count,
            "branches": dict.fromkeys(subject.tasks, subject.branch.count),
        },
        "memory_per_rank": int(made.limit),
        "epoch_steps": made.epoch_steps,
        "steps": made.length[0],
        "seconds": made.length[1],
        "passes_per_epoch": made.passes,
        "placements": {
            name: {
                "ranks_of": f.ranks_of,
                "bytes_per_rank": f.bytes_per_rank,
                "fits": made.fits(name),
                "largest_local_batch": f.largest_local_batch,
                "bytes_per_step": f.bytes_per_step,
                "step_seconds": f.seconds,
                "phases": f.phases,
            }
            for name, f in made.forecasts.items()
        },
        "chosen": made.chosen,
        "data": {**asdict(made.data), "opening_seconds": made.data.opening, "staging_seconds": made.data.staging},
    }


def tables(made: Plan) -> list[FittedTable]:
    """What a rank holds, how long a step takes, where the branches live, what an epoch is."""
    names = list(made.forecasts)
    return [
        memory_model(made.subject),
        _table(
            f"The fullest of {made.ranks} ranks, GiB (room: {_gib(made.limit)}), and the largest local batch that fits",
            ("", "weights", "grads", "moments", "EMA", "activ.", "sum", "batch"),
            [_held(made, name) for name in names],
        ),
        _table(
            f"A step on {made.machine.name}, ms",
            ("", "forward", "back-\nward", "reduc-\ntions", "waiting", "opti-\nmizer", "sum", "MB sent"),
            [_timed(made, name) for name in names],
        ),
        FittedTable(
            "Where the branches live",
            ("tasks",),
            (),
            [row for name in names if name in ("split", "auto", "config") for row in where(name, made.forecasts[name])],
            text="ranks (replicated: all)",
        ),
        _table(
            f"An epoch, {made.epoch_steps} step{'s' * (made.epoch_steps > 1)}",
            ("task", "structures/step", "passes"),
            [(t, f"{made.subject.tasks[t].structures:.4g}", f"{p:.4g}") for t, p in made.passes.items()],
        ),
        data_table(made.data),
    ]


def data_table(data: Data) -> FittedTable:
    """What the stores take up on disk and in the memory of hosts, and how long starting takes."""
    many = "s" * (data.hosts > 1)
    rows = [
        ("on disk, all stores", _gib(data.disk)),
        ("of the host with most: stores of its tasks (staged, or in its page cache)", _gib(data.host)),
        ("two windows of these (sampling.order: blocks)", _gib(data.windows)),
        ("pieces of these in the memory of its ranks (train.share_data)", _gib(data.shared)),
        ("of every host: rows of all stores by which steps are divided", _gib(data.costs)),
    ]
    note = (
        f"starting on {data.hosts:,} host{many}: {data.opens:,} files opened, {duration(data.opening)}; copying with "
        f"train.stage {duration(data.staging)} (assumed: {OPENS:,.0f} opens/s, {HOST / 1e9:g} GB/s a host, "
        f"{ALL / 1e12:g} TB/s in all)"
    )
    return _table("Data, GiB", ("", "GiB"), rows, note)


def memory_model(subject: Subject) -> FittedTable:
    """The paper's comparison: every branch on a rank, or one."""
    width, heads = subject.width, len(set(subject.branch_of.values()))
    shared, head = subject.encoder.count, subject.branch.count
    copies = (1, 1, 2, int(subject.averaged))

    def row(name: str, number: int) -> tuple[str, ...]:
        return (
            name,
            f"{number / 1e6:.2f} M",
            *(_gib(number * width * c) for c in copies),
            _gib(number * width * sum(copies)),
        )

    rows = [
        row("P_s (encoder)", shared),
        row("P_h (branch)", head),
        row(f"P_s + {heads} P_h", shared + heads * head),
        row("P_s + P_h", shared + head),
    ]
    title = "Memory model, GiB"
    per = subject.footprint.moments.each(subject.size.vector())
    note = f"activations: {per[4] / 1024:.1f} KiB an edge, {(per[2] + per[3]) / 1024:.1f} KiB an atom"
    return _table(title, ("", "numbers", "weights", "gradients", "moments", "average", "sum"), rows, note)


def remarks(made: Plan) -> list[str]:
    """What follows from the numbers."""
    lines = [f"case {made.case}: {CASES[made.case]}"]
    key = f"parallel.placement={made.chosen.removesuffix(SHARDED)}"
    if made.chosen.endswith(SHARDED):
        key += " parallel.shard_encoder=true"
    if not made.fits(made.chosen):
        lines.append(
            f"no placement fits {_gib(made.limit)} GiB at this batch; {made.chosen} is the smallest. Cut the step into "
            "micro-batches (train.max_edges), take a smaller batch, or more ranks"
        )
    elif made.chosen == made.asked or (made.asked == "auto" and _same(made, "auto", made.chosen)):
        lines.append(f"proposed: {made.chosen}, as the config says")
    else:
        lines.append(f"proposed: {made.chosen} ({key}); the config says {made.asked}")
    steps, seconds = made.length
    about = "about " if made.minutes is not None else ""
    epochs = f"{steps / made.epoch_steps:.3g} epochs"
    lines.append(f"the run: {about}{steps:,} steps, {epochs}, in {duration(seconds)} without validation")
    if made.trial:
        lines.append("auto and split are sized by estimates here; the run sizes them by trial steps (parallel.costs)")
    return lines


def _same(made: Plan, a: str, b: str) -> bool:
    return not b.endswith(SHARDED) and made.forecasts[a].ranks_of == made.forecasts[b].ranks_of


def where(name: str, f: Forecast) -> list[tuple[str, str]]:
    """Rows of tasks and ranges of ranks; tasks on the same ranks share a row."""
    tasks_on: dict[tuple[int, ...], list[str]] = {}
    for task, ranks in f.ranks_of.items():
        tasks_on.setdefault(tuple(ranks), []).append(task)
    rows = [(", ".join(tasks), ranges(ranks)) for ranks, tasks in tasks_on.items()]
    return [(f"[bold]{name}[/bold]", ""), *rows]


def _held(made: Plan, name: str) -> tuple[str, ...]:
    f = made.forecasts[name]
    parts = [_gib(f.bytes_per_rank[kind]) for kind in (*STATE, "activations")]
    mark = "" if made.fits(name) else "\ntoo much"
    return (_label(made, name), *parts, _gib(f.bytes) + mark, str(f.largest_local_batch))


def _timed(made: Plan, name: str) -> tuple[str, ...]:
    f = made.forecasts[name]
    shown = ("forward", "backward", "communication", "waiting", "optimizer")
    parts = [_ms(f.phases[phase] + (f.phases["data"] if phase == "waiting" else 0.0)) for phase in shown]
    return (_label(made, name), *parts, _ms(f.seconds), f"{f.bytes_per_step / 1e6:.4g}")


def _label(made: Plan, name: str) -> str:
    text = name.replace("_", "\n")
    return f"[bold]{text}[/bold]" if name == made.chosen else text


def _gib(count: float) -> str:
    return "0" if count == 0 else f"{count / GIB:.3f}" if count < GIB else f"{count / GIB:.2f}"


def _ms(seconds: float) -> str:
    value = seconds * 1e3
    return "0" if value == 0 else f"{value:.{max(0, 2 - int(math.log10(max(value, 1e-2))))}f}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str | None = None) -> FittedTable:
    return FittedTable(title, columns[:1], columns[1:], rows, notes=[] if note is None else [note])
