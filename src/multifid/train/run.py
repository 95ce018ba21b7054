"""A training run, read from top to bottom. READ FIRST.

    join the ranks -> open the run and the stores -> place the tasks -> build what lives here -> restore the newest
    checkpoint -> step, log, validate, save -> write the model

Everything between two checkpoints is a function of the config and of the step, so a run that is killed and started
again with the same command ends with the same bits; on another number of ranks, with the same numbers to rounding. All
ranks go through these lines; rank 0 talks, keeps the journal and commits what all have written.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multifid.config import Config
from multifid.data.loader import ahead, open_sources
from multifid.model.saved import describe, save_description
from multifid.parallel import groups
from multifid.parallel.devices import use
from multifid.structures.batch import Batch
from multifid.train.build import build
from multifid.train.checkpoint import Saver, folder_of, load_checkpoint
from multifid.train.feed import Feed, lists_of, make_draws, near, total_steps
from multifid.train.journal import Journal, finite
from multifid.train.resolve import needs_trial, open_run, placement_of, write_config
from multifid.train.state import Position, go_on, part_of_branch, restore, state_of, tensors_of
from multifid.train.step import ENCODER, Task, Totals, Trainer
from multifid.train.tensor_file import consolidate
from multifid.train.trial import measured

__all__ = ["make_draws", "total_steps", "train"]


@dataclass
class Run:
    """A run under way, on one of its ranks."""

    config: Config  # resolved
    folder: Path
    world: groups.World
    feed: Feed
    trainer: Trainer
    position: Position
    saver: Saver
    journal: Journal | None  # on rank 0


def train(config: Config, console: Console | None = None, joined: groups.World | None = None) -> Path:
    """Train, or go on training, what a config describes. Returns the run's directory.

    joined: the ranks, where the caller has joined them already.

    The same on every rank of a launch by torchrun or srun. Raises SystemExit(143) after SIGTERM on any rank, when the
    step is finished and everything saved; FloatingPointError when the gradient was not finite several steps in a row.
    """
    ranks = groups.world(config.train.device, config.parallel.silence) if joined is None else nullcontext(joined)
    with ranks as world:
        console = (console or Console(stderr=True)) if world.first else Console(quiet=True)
        run = open_all(config, world, console)
        try:
            with stop_on_sigterm() as stop, progress_bar(console, run) as advance:
                loop(run, stop, advance)
            finish(run, console)
        finally:
            run.saver.give_up()
            if run.journal is not None:
                run.journal.close()
    return run.folder


def open_all(config: Config, world: groups.World, console: Console) -> Run:
    """Everything at the newest whole checkpoint, or at the beginning where there is none."""
    with world.together():
        config, folder = open_run(config, world.size)
        sources = open_sources(config.tasks, config.train.verify)
        draws = make_draws(config, sources)
        lists = lists_of(config, world.device)
        trial = needs_trial(config, world.size)
    costs = measured(config, sources, draws, world) if trial else None
    with world.together():
        placement = placement_of(config, sources, draws, world.size, costs)
    placement = world.share(placement)  # computed from floats: one rank decides
    with world.together():  # only now: a run that cannot start leaves nothing behind
        if world.first:
            write_config(config, folder, placement, world.size)
    if config.train.stage is not None:
        sources = near(sources, placement, Path(config.train.stage), world)
    feed = Feed(config, sources, draws, placement, world.rank, lists)
    with world.together():
        trainer = build(config, sources, placement, feed.epoch_steps, world)
        position = Position(Totals([t.name for t in trainer.tasks], trainer.device))
        found = load_checkpoint(folder, world, [part.name for part in trainer.gradients.parts])
        if found is not None:
            state, files, complaints = found
            for complaint in complaints:
                console.print(f"[yellow]{complaint}; going back to the checkpoint before it[/yellow]")
            position = restore(trainer, state, files)
            feed = Feed(config, sources, go_on(draws, state), placement, world.rank, lists)
            console.print(f"resuming {folder} at step {position.step}")
        journal = Journal(folder, position.step, config.train.tensorboard) if world.first else None
    return Run(config, folder, world, feed, trainer, position, Saver(folder, world, config.train.keep), journal)


def loop(run: Run, stop: list[int], advance: Any) -> None:
    """Steps from the position to the end of the run."""
    t, feed, trainer, position = run.config.train, run.feed, run.trainer, run.position
    per_epoch, total = feed.epoch_steps, feed.total_steps

    def prepared(step: int) -> tuple[list[Batch], bytes]:
        micro, identities = feed.step(step)
        return [trainer.ready(batch) for batch in micro], identities

    steps = ahead(prepared, position.step, total, t.workers, begin=partial(use, trainer.device))
    started = time.monotonic() - position.seconds
    while position.step < total and not position.ended:
        micro, identities = next(steps)
        outcome = trainer.step(micro, position.totals, stop=bool(stop))
        position.step += 1
        position.seen = xxhash.xxh3_64_hexdigest(bytes.fromhex(position.seen) + identities)
        position.seconds = time.monotonic() - started
        if trainer.skipped_in_a_row > t.nonfinite:
            run.world.fail(
                FloatingPointError(
                    f"step {position.step}: the gradient was not finite {trainer.skipped_in_a_row} times in a row; "
                    f"lower train.lr or look at the labels. The last checkpoint in {run.folder} is whole."
                )
            )
        run.saver.check()
        advance(sum(b.structures for b in micro) * run.world.size)
        if position.step % t.log_every == 0:
            log(run, position.totals, "train")
            position.totals = Totals(position.totals.tasks, trainer.device)
        at_epoch_end = position.step % per_epoch == 0 or position.step == total
        better = end_epoch(run) if at_epoch_end else False
        if at_epoch_end or position.step % t.checkpoint_every == 0 or outcome.stop:
            save(run, better)
        if outcome.stop and position.step < total:
            run.saver.wait()
            raise SystemExit(groups.STOPPED)


def end_epoch(run: Run) -> bool:
    """Validate, log, decide whether to stop early, and say whether the model is better than ever before."""
    trainer, position = run.trainer, run.position
    totals = trainer.validate(run.feed.split("validation"))
    value = sum(task.weight * totals.objective(task) for task in trainer.tasks)
    log(run, totals, "validation")
    trainer.schedule.validated(value)
    position.epochs_without_better += 1
    better = value < position.best
    if better:
        position.best, position.best_step, position.epochs_without_better = value, position.step, 0
    patience = run.config.train.patience
    position.ended = patience is not None and position.epochs_without_better >= patience
    return better


def save(run: Run, better: bool) -> None:
    """A checkpoint of everything at the end of a step, and model.safetensors from its files if it is the best."""
    run.saver.wait()  # its copies are dropped before new ones are made
    description = describe_model(run)

    def write_best(folder: Path) -> None:
        consolidate(folder, run.folder / "model.safetensors")
        save_description(run.folder / "model.json", description)

    names = [*(part_of_branch(b) for b in sorted(set(run.config.branch_of().values()))), ENCODER]
    state = state_of(run.trainer, run.position, run.feed.draws)
    state["layout"] = {task: list(ranks) for task, ranks in run.feed.placement.items()}
    run.saver.save(run.position.step, tensors_of(run.trainer), names, state, write_best if better else None)


def finish(run: Run, console: Console) -> None:
    """Write the last model beside the best one and say where both are."""
    run.saver.wait()
    if not run.world.first:
        return
    position = run.position
    consolidate(folder_of(run.folder, position.step), run.folder / "last.safetensors")
    save_description(run.folder / "model.json", describe_model(run))
    why = "stopped early" if position.ended else "complete"
    console.print(
        f"{run.folder}: {why} after {position.step} steps ({position.seconds:.0f} s); best validation value "
        f"{position.best:.4g} at step {position.best_step}: {run.folder / 'model.safetensors'}"
    )


def log(run: Run, totals: Totals, split: str) -> None:
    """Rows of the journal, one for each task."""
    if run.journal is not None:
        run.journal.write(rows(totals, run.trainer.tasks, run.position, run.feed.epoch_steps, split))


def rows(totals: Totals, tasks: list[Task], position: Position, per_epoch: int, split: str) -> list[dict[str, Any]]:
    """What the journal says of each task."""
    out = []
    for task in tasks:
        errors = totals.errors(task.name).row("", task.name, split)
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


def describe_model(run: Run) -> dict[str, Any]:
    """The content of model.json: what the model is, and what its branches know."""
    config, position = run.config, run.position
    scales = {t.name: t.scale for t in run.trainer.tasks}
    tasks = {}
    for source in run.feed.sources:
        for task, label_set in source.tasks.items():
            about = source.store.manifest["tasks"][label_set]
            tasks[task] = {
                "elements": source.elements(task),
                "references": {str(z): e for z, e in source.references[task].energies.items()},
                "undetermined": about["undetermined"],
                "scale": scales[task],
                "level_of_theory": about["level_of_theory"],
                "structures": source.store.manifest["splits"]["train"],
                "labels": about["labels"],
            }
    trained = {
        "steps": position.step,
        "epochs": position.step / run.feed.epoch_steps,
        "seed": config.seed,
        "best": finite(position.best),
    }
    return describe(config.model, config.branch_of(), dict(sorted(tasks.items())), trained)


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
def progress_bar(console: Console, run: Run) -> Iterator[Any]:
    """A bar with the time left and structures per second; nothing where nobody looks."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} structures/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=run.feed.total_steps, completed=run.position.step, speed=0.0)
        started, seen = time.monotonic(), 0

        def advance(structures: int) -> None:
            nonlocal seen
            seen += structures
            bar.update(task, advance=1, speed=seen / max(time.monotonic() - started, 1e-9))

        yield advance
