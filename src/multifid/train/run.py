"""A training run, read from top to bottom. READ FIRST.

    open the run -> open the stores -> fix the order of data -> build the potential -> restore the newest checkpoint
    -> step, log, validate, save -> write the model

Everything between two checkpoints is a function of the config and of the step, so a run that is killed and started
again with the same command ends with the same bits.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multifid.config import Config
from multifid.data.loader import Source, ahead, edge_costs, micro_batches, open_sources
from multifid.data.order import Draw, Order, rates
from multifid.model.potential import Potential
from multifid.model.saved import describe, save_description, save_weights, start_from
from multifid.parallel import groups
from multifid.structures.batch import Batch
from multifid.train.checkpoint import load_checkpoint, save_checkpoint
from multifid.train.journal import Journal, finite
from multifid.train.optimizer import MovingAverage, Schedule, adamw
from multifid.train.resolve import open_run
from multifid.train.state import restore, state_of, tensors_of
from multifid.train.step import Task, Totals, Trainer


@dataclass
class Position:
    """How far a run has come. Part of every checkpoint."""

    step: int = 0
    seen: str = ""  # running hash of the identities of all structures seen
    seconds: float = 0.0  # of training, over all starts
    best: float = math.inf  # validation value of model.safetensors
    best_step: int = 0
    epochs_without_better: int = 0
    ended: bool = False  # by early stopping
    totals: Totals | None = field(default=None, repr=False)  # since the last training rows of the journal


def train(config: Config, console: Console | None = None) -> Path:
    """Train, or go on training, what a config describes. Returns the run's directory.

    Raises SystemExit(143) after SIGTERM, when the step is finished and everything saved; FloatingPointError when the
    gradient was not finite several steps in a row.
    """
    console = console or Console(stderr=True)
    world = groups.world()
    config, run = open_run(config, world.size)
    device = groups.device(config.train.device)
    sources = open_sources(config.tasks, config.train.verify)
    draws = make_draws(config, sources)
    trainer = build(config, sources, device, epoch_steps(config, draws), world)
    position, draws = resume(run, trainer, draws, console)

    journal = Journal(run, position.step, config.train.tensorboard)
    try:
        with stop_on_sigterm() as stop, progress_bar(console, position.step, total_steps(config, draws)) as advance:
            loop(config, run, sources, draws, trainer, position, journal, stop, advance)
    finally:
        journal.close()
    finish(config, run, sources, draws, trainer, position, console)
    return run


def loop(
    config: Config,
    run: Path,
    sources: list[Source],
    draws: list[Draw],
    trainer: Trainer,
    position: Position,
    journal: Journal,
    stop: list[int],
    advance: Any,
) -> None:
    """Steps from the position to the end of the run."""
    t, per_epoch, total = config.train, epoch_steps(config, draws), total_steps(config, draws)
    steps = ahead(lambda k: prepare_step(config, sources, draws, k), position.step, total, t.workers)
    started = time.monotonic() - position.seconds
    if position.totals is None:
        position.totals = Totals([x.name for x in trainer.tasks], trainer.device)
    while position.step < total and not position.ended:
        micro, identities = next(steps)
        trainer.step(micro, position.totals)
        position.step += 1
        position.seen = xxhash.xxh3_64_hexdigest(bytes.fromhex(position.seen) + identities)
        position.seconds = time.monotonic() - started
        if trainer.skipped_in_a_row > t.nonfinite:
            raise FloatingPointError(
                f"step {position.step}: the gradient was not finite {trainer.skipped_in_a_row} times in a row; lower "
                f"train.lr or look at the labels with `multifid check`. The last checkpoint in {run} is whole."
            )
        advance(sum(b.structures for b in micro))
        if position.step % t.log_every == 0:
            journal.write(rows(position.totals, trainer.tasks, position, per_epoch, "train"))
            position.totals = Totals([x.name for x in trainer.tasks], trainer.device)
        at_epoch_end = position.step % per_epoch == 0 or position.step == total
        if at_epoch_end:
            end_epoch(config, run, sources, draws, trainer, position, journal, per_epoch)
        if at_epoch_end or position.step % t.checkpoint_every == 0 or stop:
            save(config, run, draws, trainer, position)
        if stop and position.step < total:
            raise SystemExit(128 + signal.SIGTERM)


def make_draws(config: Config, sources: list[Source]) -> list[Draw]:
    """Which tasks are drawn together, in which order, how fast: one draw for each store."""
    sizes = {t: len(s.store.index("train")) for s in sources for t in s.tasks}
    batch = Fraction(str(config.train.batch))
    rate = rates(sizes, batch, config.sampling, {t: c.per_step for t, c in config.tasks.items()})
    draws = []
    for source in sources:
        tasks = tuple(source.tasks)
        if len({rate[t] for t in tasks}) > 1:
            raise ValueError(f"tasks {', '.join(tasks)} share one store and are drawn together: give them one per_step")
        name = tasks[0] if len(tasks) == 1 else source.store.tasks[0]
        order = Order(config.seed, source.store.checksum, name, sizes[tasks[0]])
        draws.append(Draw(tasks[0], tasks, order, rate[tasks[0]]))
    return draws


def epoch_steps(config: Config, draws: list[Draw]) -> int:
    """Steps in which the task with the longest pass completes it."""
    return config.train.epoch_steps or max(draw.pass_steps for draw in draws)


def total_steps(config: Config, draws: list[Draw]) -> int:
    return config.train.steps or config.train.epochs * epoch_steps(config, draws)


def prepare_step(config: Config, sources: list[Source], draws: list[Draw], step: int) -> tuple[list[Batch], bytes]:
    """The micro-batches of a step, and the identities of its structures."""
    parts, identities = [], b""
    for source, draw in zip(sources, draws, strict=True):
        indices = np.asarray(source.store.index("train"))[draw.order(*draw.places(step))].astype(np.int64)
        parts.append((source, indices))
        identities += draw.name.encode() + indices.astype("<i8").tobytes()
    return micro_batches(parts, config.model.cutoff, config.train.max_edges), identities


def task_scales(config: Config, sources: list[Source]) -> dict[str, float]:
    """What divides the residuals of each task; one pooled scale where all tasks share a branch."""
    about = {t: s.store.manifest["tasks"][name] for s in sources for t, name in s.tasks.items()}
    if config.objective.scale == "none":
        return dict.fromkeys(about, 1.0)
    own = {t: float(a["scale"]) for t, a in about.items()}
    if config.branches == "per_task":
        return own
    counts = {t: max(a["labels"]["forces"], a["labels"]["energy"]) for t, a in about.items()}
    pooled = math.sqrt(sum(counts[t] * own[t] ** 2 for t in own) / sum(counts.values()))
    return dict.fromkeys(own, pooled)


def build(config: Config, sources: list[Source], device: torch.device, per_epoch: int, world: groups.Group) -> Trainer:
    """Potential, optimizer, schedule and moving average, all at their beginning."""
    t, branch_of = config.train, config.branch_of()
    torch.manual_seed(config.seed)  # nothing here draws from the global generator; what may one day is a function of it
    potential = Potential(config.model, sorted(set(branch_of.values())), branch_of, config.seed)
    if config.init is not None:
        start_from(potential, Path(config.init))
    potential.to(device=device, dtype=torch.float64 if t.precision == "fp64" else torch.float32).train()
    parameters = dict(potential.named_parameters())
    scales = task_scales(config, sources)
    return Trainer(
        potential=potential,
        parameters=parameters,
        optimizer=adamw(parameters, t.lr, t.weight_decay),
        schedule=Schedule(
            t.schedule, t.warmup, t.steps or t.epochs * per_epoch, factor=t.plateau_factor, patience=t.plateau_patience
        ),
        average=None if t.ema is None else MovingAverage(parameters, t.ema),
        objective=config.objective,
        tasks=[Task(name, config.tasks[name].weight, scales[name]) for name in config.tasks],
        world=world,
        device=device,
        precision=t.precision,
        clip=t.clip,
        lr=t.lr,
    )


def resume(run: Path, trainer: Trainer, draws: list[Draw], console: Console) -> tuple[Position, list[Draw]]:
    """Where the newest whole checkpoint left off; the beginning where there is none."""
    found = load_checkpoint(run)
    if found is None:
        return Position(), draws
    state, files, complaints = found
    for complaint in complaints:
        console.print(f"[yellow]{complaint}; going back to the checkpoint before it[/yellow]")
    restore(trainer, state, files)
    p = state["position"]
    totals = Totals([t.name for t in trainer.tasks], trainer.device)
    totals.put(torch.tensor(p.pop("totals"), dtype=torch.float64))
    p["best"] = math.inf if p["best"] is None else p["best"]
    console.print(f"resuming {run} at step {state['step']}")
    return Position(step=state["step"], totals=totals, **p), draws


def save(config: Config, run: Path, draws: list[Draw], trainer: Trainer, position: Position) -> None:
    """A checkpoint of everything at the end of a step."""
    assert position.totals is not None
    state = state_of(trainer) | {
        "position": {
            "seen": position.seen,
            "seconds": position.seconds,
            "best": finite(position.best),
            "best_step": position.best_step,
            "epochs_without_better": position.epochs_without_better,
            "ended": position.ended,
            "totals": position.totals.as_tensor().tolist(),
        },
        "places": {task: draw.places(position.step)[0] for draw in draws for task in draw.tasks},
        "layout": config.parallel.model_dump(mode="json")["placement"],
    }
    save_checkpoint(run, position.step, tensors_of(trainer), state, config.train.keep)


def end_epoch(
    config: Config,
    run: Path,
    sources: list[Source],
    draws: list[Draw],
    trainer: Trainer,
    position: Position,
    journal: Journal,
    per_epoch: int,
) -> None:
    """Validate, log, keep the best model, and say whether to stop early."""
    totals = trainer.validate(split_batches(config, sources, "validation"))
    value = sum(task.weight * totals.objective(task) for task in trainer.tasks)
    journal.write(rows(totals, trainer.tasks, position, per_epoch, "validation"))
    trainer.schedule.validated(value)
    position.epochs_without_better += 1
    if value < position.best:
        position.best, position.best_step, position.epochs_without_better = value, position.step, 0
        write_model(config, run, sources, draws, trainer, position, "model.safetensors")
    patience = config.train.patience
    position.ended = patience is not None and position.epochs_without_better >= patience


def split_batches(config: Config, sources: list[Source], split: str) -> Iterator[Batch]:
    """All structures of a split, store after store, in batches of about a training step's edges."""
    for source in sources:
        index = np.asarray(source.store.index(split)).astype(np.int64)
        if not len(index):
            continue
        costs = edge_costs(source, index, config.model.cutoff)
        most = config.train.max_edges or max(float(costs.mean()) * max(1.0, float(config.train.batch or 1)), 1.0)
        yield from micro_batches([(source, index)], config.model.cutoff, int(most))


def rows(totals: Totals, tasks: list[Task], position: Position, per_epoch: int, split: str) -> list[dict[str, Any]]:
    """What the journal says of each task."""
    out = []
    for task in tasks:
        errors = totals.errors[task.name].row("", task.name, split)
        out.append(
            {
                "step": position.step,
                "epoch": position.step / per_epoch,
                "split": split,
                "task": task.name,
                "loss": finite(totals.objective(task)),
                "energy_mae": _finite_or_none(errors["energy_mae"]),
                "forces_mae": _finite_or_none(errors["forces_mae"]),
                "structures": errors["structures"],
                "seconds": round(position.seconds, 3),
            }
        )
    return out


def _finite_or_none(value: Any) -> float | None:
    return None if value is None else finite(value)


def write_model(
    config: Config,
    run: Path,
    sources: list[Source],
    draws: list[Draw],
    trainer: Trainer,
    position: Position,
    name: str,
) -> None:
    """The consolidated model (averaged weights where there are some), and what it knows."""
    scales = {t.name: t.scale for t in trainer.tasks}
    tasks = {}
    for source in sources:
        for task, label_set in source.tasks.items():
            about = source.store.manifest["tasks"][label_set]
            tasks[task] = {
                "elements": sorted(source.references[task].energies),
                "references": {str(z): e for z, e in source.references[task].energies.items()},
                "undetermined": about["undetermined"],
                "scale": scales[task],
                "level_of_theory": about["level_of_theory"],
                "structures": source.store.manifest["splits"]["train"],
                "labels": about["labels"],
            }
    trained = {
        "steps": position.step,
        "epochs": position.step / epoch_steps(config, draws),
        "seed": config.seed,
        "best": finite(position.best),
    }
    if trainer.average is not None:
        trainer.average.swap()
    try:
        save_weights(run / name, trainer.potential)
    finally:
        if trainer.average is not None:
            trainer.average.swap()
    save_description(
        run / "model.json", describe(config.model, config.branch_of(), dict(sorted(tasks.items())), trained)
    )


def finish(
    config: Config,
    run: Path,
    sources: list[Source],
    draws: list[Draw],
    trainer: Trainer,
    position: Position,
    console: Console,
) -> None:
    """Write the last model beside the best one and say where both are."""
    write_model(config, run, sources, draws, trainer, position, "last.safetensors")
    why = "stopped early" if position.ended else "complete"
    console.print(
        f"{run}: {why} after {position.step} steps ({position.seconds:.0f} s); best validation value "
        f"{position.best:.4g} at step {position.best_step}: {run / 'model.safetensors'}"
    )


@contextmanager
def stop_on_sigterm() -> Iterator[list[int]]:
    """A list that SIGTERM (or Ctrl-C) makes non-empty; the loop looks at it between steps."""
    heard: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, lambda number, frame: heard.append(number)) for s in signals}
    try:
        yield heard
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextmanager
def progress_bar(console: Console, step: int, total: int) -> Iterator[Any]:
    """A bar with the time left and structures per second; nothing where nobody looks."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} structures/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=step, speed=0.0)
        started, seen = time.monotonic(), 0

        def advance(structures: int) -> None:
            nonlocal seen
            seen += structures
            bar.update(task, advance=1, speed=seen / max(time.monotonic() - started, 1e-9))

        yield advance
