"""A training run, read from top to bottom. READ FIRST.

    join the ranks -> open the run and the stores -> place the tasks -> build what lives here -> restore the newest
    checkpoint -> step, log, validate, save -> write the model

Everything between two checkpoints is a function of the config and of the step, so a run that is killed and started
again with the same command ends with the same bits; on another number of ranks, with the same numbers to rounding. All
ranks go through these lines; rank 0 talks, keeps the journal and commits what all have written.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from rich.console import Console
from rich.markup import escape

from multifid.config import Config
from multifid.feed.loader import ahead, open_sources
from multifid.model.inherit import inherited
from multifid.model.saved import describe, save_description
from multifid.parallel import groups
from multifid.parallel.devices import use
from multifid.parallel.launch import OtherRankFailed
from multifid.training.about import about_tasks
from multifid.training.boards import find_boards, open_boards
from multifid.training.build import build, settings_of_torch_kept, started
from multifid.training.callbacks import Callback, Callbacks
from multifid.training.checkpoint import Saver, folder_of, load_checkpoint
from multifid.training.counts import announced
from multifid.training.diagnosis import Diagnosis, open_diagnosis
from multifid.training.ending import Ending
from multifid.training.feed import Feed, Step, lists_of, make_draws, near, total_steps
from multifid.training.finetune import with_references
from multifid.training.heap import keep_freed_memory
from multifid.training.identity import Kept, contents_of, kept_of, own_data, refuse_apart
from multifid.training.journal import Journal
from multifid.training.length import Length, length_of
from multifid.training.lines import Lines
from multifid.training.log import Bar, Log, duration
from multifid.training.loss import validation_value
from multifid.training.old_branches import described, keep_old_branches, kept_places
from multifid.training.opening import heading, opening
from multifid.training.pace import Pace
from multifid.training.pairs import fitted_pairs
from multifid.training.record import Moment, Recorder, finite, peak_device_memory, peak_memory, rows
from multifid.training.resolve import needs_trial, open_run, placement_of, with_properties, write_config
from multifid.training.share import Exchange
from multifid.training.shrink import keep_factors, shrink_forces
from multifid.training.signals import stop_on_signals
from multifid.training.state import Position, go_on, part_of_branch, restore, state_of, tensors_of
from multifid.training.step import ENCODER, Norms, Totals, Trainer
from multifid.training.tensor_file import consolidate
from multifid.training.trial import measured
from multifid.training.unlabelled import missing_labels
from multifid.training.watch import Watch

__all__ = ["make_draws", "total_steps", "train"]
A_SIGNAL = "a signal"
TOLD = 0.05  # a number of steps that differs by more than this part from the one before is told


@dataclass
class Run:
    """A run under way, on one of its ranks."""

    config: Config  # resolved
    folder: Path
    world: groups.World
    feed: Feed
    trainer: Trainer
    position: Position
    length: Length
    saver: Saver
    pace: Pace  # since the last rows of training
    log: Log  # on the console and in RUN/train.log; silent but on rank 0
    recorders: list[Recorder]  # of what is said at log steps and validations; on rank 0
    clock: Callable[[], float]  # seconds
    watch: Watch
    diagnosis: Diagnosis | None = None
    said: Moment | None = None  # last


def train(
    config: Config,
    console: Console | None = None,
    joined: groups.World | None = None,
    clock: Callable[[], float] = time.monotonic,
    callbacks: Sequence[Callback] = (),
    signals: bool = False,
) -> Ending:
    """Train, or go on training, what a config describes; says how that ended.

    joined: the ranks, where the caller has joined them already.  clock: seconds from any beginning.
    callbacks: called on rank 0 with the rows of every log step and validation; each may stop the run.
    signals: SIGTERM and Ctrl-C stop the run when the step is finished and everything is saved (main thread only).

    The same on every rank of a launch by torchrun or srun. FloatingPointError when the gradient was not finite several
    steps in a row, or no validation value of the whole run: on rank 0, with what began it. Where one rank fails, the
    others raise OtherRankFailed.
    """
    ranks = groups.world(config.train.device, config.parallel.silence) if joined is None else nullcontext(joined)
    stop: list[str] = []
    with ranks as world, ExitStack() as atlast:
        log = Log(console or Console(stderr=True), world.first)
        atlast.callback(log.close)
        atlast.enter_context(settings_of_torch_kept())
        keep_freed_memory()
        try:
            run = open_all(config, world, log, clock)
            atlast.callback(close, run)
            if world.first:
                run.recorders.append(Callbacks(callbacks, stop))
            with stop_on_signals(stop, A_SIGNAL) if signals else nullcontext():
                keep_beginning(run)
                loop(run, stop)
            run.feed.finish()
            return finish(run, stop)
        except OtherRankFailed:
            log.note("ended because another rank failed, which says why in the output of the job")
            raise
        except Exception as error:  # the caller prints it
            log.note(f"{type(error).__name__}: {error}")
            raise
        except KeyboardInterrupt:
            log.note("interrupted; the same command goes on from the newest checkpoint")
            raise


def close(run: Run) -> None:
    """Whatever happened: nothing is written any more, and what was written is complete."""
    run.feed.leave()
    run.saver.give_up()
    for recorder in run.recorders:
        recorder.close()
    if run.diagnosis is not None:
        run.diagnosis.close()


def open_all(config: Config, world: groups.World, log: Log, clock: Callable[[], float]) -> Run:
    """Everything at the newest whole checkpoint, or at the beginning where there is none."""
    with world.together():
        if world.first:
            find_boards(config.train.tensorboard, config.train.wandb)
        config, folder = open_run(config, world.size)
        sources = with_references(open_sources(config.tasks, config.train.verify), config.finetune)
        config = with_properties(config, sources)
    with world.together():
        found = load_checkpoint(folder, world)
    contents = world.share(contents_of(sources))
    with world.together():
        refuse_apart(contents_of(sources), contents)
        kept: Kept = {}
        if found is not None:
            sources, kept, said = own_data(folder, config.tasks, sources, found[0])
            for line in [*(f"{bad}; going back to the checkpoint before it" for bad in found[2]), *said]:
                log.print(f"[yellow]{escape(line)}[/yellow]")
        elif config.init is not None:
            elements = {z for source in sources for task in source.tasks for z in source.elements(task)}
            begun = started(config, sources)[0]
            for line in inherited(Path(config.init), config.model, set(config.branch_of().values()), elements, begun):
                log.print(escape(line))
        draws = make_draws(config, sources)
        lists = lists_of(config.train.neighbors, world.device)
        trial = needs_trial(config, world.size)
        lacking = missing_labels(config.objective, sources) if world.first else []
    costs = measured(config, sources, draws, world) if trial else None
    with world.together():
        placement = placement_of(config, sources, draws, world.size, costs)
    placement = world.share(placement)  # computed from floats: one rank decides
    with world.together():  # only now: a run that cannot start leaves nothing behind
        if world.first:
            write_config(config, folder, placement, world.size)
    if config.train.stage is not None:
        sources = near(sources, placement, Path(config.train.stage), world)
    pairs = None
    if found is None and any(shape.pairs for shape in config.model.shapes):
        with world.together():
            pairs, said = fitted_pairs(config, sources) if world.first else ({}, [])
            for line in said:
                log.print(escape(line))
        pairs = world.share(pairs)
    exchange = None
    if config.train.share_data:
        with world.together():
            exchange = Exchange(sources, draws, placement, config.model.cutoff, world, config.train.workers + 2)
            sources = exchange.sources
    feed = Feed(config, sources, draws, placement, world.rank, lists, exchange)
    with world.together():
        trainer = build(config, sources, placement, feed.epoch_steps, world, begins=found is None, pairs=pairs)
        position, state = Position(Totals([t.name for t in trainer.tasks], trainer.device)), None
        if found is not None:
            state, files, _ = found
            position = restore(trainer, state, files)
            feed = Feed(config, sources, go_on(draws, state, kept), placement, world.rank, lists)
        length = length_at(config, feed, position, trainer, state)
        log.open(folder, position.step)
        recorders = open_recorders(config, folder, position.step, log, world.device) if world.first else []
    saver, pace = Saver(folder, world, config.train.keep), Pace(position, length.pace.validated)
    watch = Watch(folder, world, trainer, feed, position, saver, log, config.train.nonfinite)
    diagnosis = open_diagnosis(config, trainer, feed, position.step, world.first)
    run = Run(
        config, folder, world, feed, trainer, position, length, saver, pace, log, recorders, clock, watch, diagnosis
    )
    if world.first:
        log.print(f"[bold]{escape(heading(str(folder), position.step))}[/bold]", highlight=False)
        log.record(opening(config, sources, draws, placement, world, length_in_words(run)))
        for text in lacking:
            log.print(f"[yellow]{escape(text)}[/yellow]")
        run.recorders.append(Bar(log.console, lambda: (position.step, length.known)))
    return run


def open_recorders(config: Config, folder: Path, step: int, log: Log, device: torch.device) -> list[Recorder]:
    """Who writes down what the run says, where it goes on at a step. On rank 0."""
    t, branch_of = config.train, config.branch_of()
    properties = sum(branch_of[task] in config.model.properties for task in config.tasks)
    weights = {name: task.weight for name, task in config.tasks.items()}
    value = partial(validation_value, weights, best_by=t.best_by) if t.best_by != "objective" else None
    return [
        Journal(folder, step),
        Lines(log, list(config.tasks), config.objective.stress > 0, device.type != "cpu", properties, value),
        *open_boards(folder, step, t.tensorboard, t.wandb, config.model_dump(mode="json")),
    ]


def length_at(config: Config, feed: Feed, position: Position, trainer: Trainer, state: dict[str, Any] | None) -> Length:
    """How long the run is; `state` of the checkpoint it goes on from, if there is one."""
    minutes, held = config.train.minutes, (state or {}).get("length")
    if minutes is None or held is None or held["minutes"] != minutes:
        trainer.schedule.straighten()
    steps = total_steps(config.train, feed.draws)
    return length_of(minutes, steps, feed.epoch_steps, position, feed.size("validation") / feed.structures, held)


def length_in_words(run: Run) -> str:
    length, per_epoch = run.length, run.feed.epoch_steps
    if length.minutes is None:
        return f"{length.total:,} steps, {length.total / per_epoch:.4g} epochs of {per_epoch:,} steps"
    over = f", of which {run.position.seconds / 60:.3g} are over" if run.position.step else ""
    known = "" if length.known is None else f", {length.known:,} steps as it seems"
    return f"{length.minutes:g} min of training{over}{known}; epochs of {per_epoch:,} steps"


def loop(run: Run, stop: list[str]) -> None:
    """Steps from the position to the end of the run, or until a rank has a reason to stop and all know it."""
    t, feed, trainer, position = run.config.train, run.feed, run.trainer, run.position
    per_epoch, length = feed.epoch_steps, run.length

    def prepared(step: int) -> Step:
        made = feed.step(step)
        return made._replace(batches=[trainer.ready(batch) for batch in made.batches])

    end = length.total if length.minutes is None else sys.maxsize  # by the clock it may come later than it seems
    steps = ahead(prepared, position.step, end, t.workers, begin=partial(use, trainer.device))
    counted = announced(steps, lambda made: trainer.counts(made.batches, made.known))
    began = run.clock() - position.seconds
    feed.reached(position.step)
    while position.step < length.total and not position.ended:
        (micro, identities, _), counts = next(counted)
        if run.diagnosis is not None:
            run.diagnosis.step(position.step, counts)
        trainer.step(micro, position.totals, counts, stop=bool(stop))
        position.step += 1
        feed.reached(position.step)
        position.seen = xxhash.xxh3_64_hexdigest(bytes.fromhex(position.seen) + identities)
        position.seconds = run.clock() - began
        run.saver.check()
        run.watch.step()
        if position.step == length.next:
            fix_length(run, began)
        if position.step % t.log_every == 0:
            trainer.settle()
            record(run, position.totals, "train")
            position.totals, trainer.norms = Totals(position.totals.tasks, trainer.device), Norms()
            run.pace.mark(position)
        at_epoch_end = position.step % per_epoch == 0 or position.step == length.total
        better = end_epoch(run, began) if at_epoch_end else False
        if at_epoch_end or position.step % t.checkpoint_every == 0 or trainer.stopped:
            save(run, better)
        if unfinished(run):
            return


def unfinished(run: Run) -> bool:
    """Whether the run was stopped before its end; the same on all ranks."""
    return run.trainer.stopped and run.position.step < run.length.total and not run.position.ended


def fix_length(run: Run, began: float) -> None:
    """All ranks agree, anew, on how many steps fit into the minutes of the run, and the schedule follows."""
    trainer, position, length = run.trainer, run.position, run.length
    trainer.settle()
    position.seconds = run.clock() - began
    before = length.known
    length.fix(position, run.world.share(length.fitting(position) if run.world.first else None))
    trainer.schedule.bend(trainer.updates, length.total - position.step)
    if before is None or abs(length.total - before) > TOLD * before:
        text = f"{length.total:,} steps, which is what fits into {length.minutes:g} min"
        run.log.record([f" length at step {position.step}: {text}"])


def end_epoch(run: Run, began: float) -> bool:
    """Validate, record, decide whether to stop early, and say whether the model is better than ever before."""
    trainer, position = run.trainer, run.position
    totals = trainer.validate(run.feed.split("validation"))
    losses = totals.objectives()
    value = validation_value({task.name: task.weight for task in trainer.tasks}, losses, run.config.train.best_by)
    run.watch.validation(totals, value)
    trainer.schedule.validated(value)
    position.epochs_without_better += 1
    better = value < position.best and trainer.updates > 0  # untrained weights are no model
    if better:
        position.best, position.best_step, position.epochs_without_better = value, position.step, 0
    patience = run.config.train.patience
    position.ended = patience is not None and position.epochs_without_better >= patience
    position.pause = run.clock() - began - position.seconds
    position.seconds += position.pause
    position.paused += position.pause
    record(run, totals, "validation")
    return better


def save(run: Run, better: bool) -> None:
    """A checkpoint of everything at the end of a step, and model.safetensors from its files if it is the best."""
    run.saver.wait()  # its copies are dropped before new ones are made
    description = describe_run(run)

    def write_best(folder: Path) -> None:
        write_model(run, folder, "model.safetensors", description)

    names = [*(part_of_branch(b) for b in sorted(set(run.config.branch_of().values()))), ENCODER]
    state = state_of(run.trainer, run.position, run.feed.draws)
    if run.length.minutes is not None:
        state["length"] = run.length.state(run.position)
    state["data"] = kept_of(run.config.tasks, run.feed.sources, run.feed.draws)
    state["layout"] = {task: list(ranks) for task, ranks in run.feed.placement.items()}
    run.saver.save(run.position.step, tensors_of(run.trainer), names, state, write_best if better else None)


def keep_beginning(run: Run) -> None:
    """What `init` gave is kept before the first step: from then on the other run is not needed."""
    if run.config.init is not None and run.position.step == 0 and not folder_of(run.folder, 0).exists():
        with run.world.together():
            if run.world.first:
                keep_old_branches(run.folder, run.config)
        save(run, better=False)


def write_model(run: Run, checkpoint: Path, name: str, description: dict[str, Any]) -> None:
    """The weights of a checkpoint, with the branches that a fine-tuned run keeps, and RUN/model.json."""
    whole = described(run.folder, description)
    if name == "last.safetensors":  # model.safetensors stays, and so does what is known of it
        keep_factors(run.folder, whole)
    consolidate(checkpoint, run.folder / name, kept_places(run.folder, whole))
    save_description(run.folder / "model.json", whole)


def finish(run: Run, stop: list[str]) -> Ending:
    """How the run ended. Where it is complete, the last model is written beside the best one."""
    run.saver.wait()
    position, patience = run.position, run.config.train.patience
    if unfinished(run):
        reason = f"stopped by {run.world.share(stop[0] if stop else A_SIGNAL)}"
        run.log.print(escape(f"{reason} at step {position.step}; the same command goes on from there"))
    else:
        run.watch.end()
        early = f"stopped early: no better validation value in {patience} epochs (train.patience)"
        reason = early if position.ended else "complete"
        if run.world.first:
            write_last(run)
    best = finite(position.best)
    step = None if best is None else position.best_step
    return Ending(run.folder, position.step, best, step, complete=not unfinished(run), reason=reason)


def write_last(run: Run) -> None:
    """Write the last model beside the best one and say where both are. On rank 0."""
    position = run.position
    write_model(run, folder_of(run.folder, position.step), "last.safetensors", describe_run(run))
    if run.config.train.shrink and (run.folder / "model.safetensors").exists():
        for line in shrink_forces(run.folder, run.feed.sources, run.world.device):
            run.log.print(escape(line))
    why = "stopped early" if position.ended else "complete"
    run.log.print(
        escape(
            f"{run.folder}: {why} after {position.step} steps ({duration(position.seconds)}); best validation value "
            f"{position.best:.4g} at step {position.best_step}: {run.folder / 'model.safetensors'}"
        )
    )


def record(run: Run, totals: Totals, split: str) -> None:
    """Tell all recorders what the run has reached."""
    if run.recorders:
        p, tasks = run.position, run.trainer.tasks
        told = rows(totals, tasks, p.step, p.step / run.feed.epoch_steps, split, p.seconds, moment(run, split))
        for recorder in run.recorders:
            recorder.write(told)


def moment(run: Run, split: str) -> Moment:
    """What is said of the run as a whole, with the rows of a split."""
    trainer, position, feed = run.trainer, run.position, run.feed
    spent = run.pace.spent(position)
    norm = trainer.norms.mean
    if norm is None and run.said is not None:  # a validation right after rows of training
        norm = run.said.grad_norm
    run.said = Moment(
        lr=trainer.lr * trainer.schedule(max(0, trainer.updates - 1)),
        grad_norm=norm,
        skipped=trainer.norms.skipped,
        best=finite(position.best),
        structures_per_second=feed.structures / spent.step if spent is not None and spent.step > 0 else None,
        seconds_left=run.length.seconds_left(position, run.pace, validated=split == "validation"),
        memory=peak_memory(),
        device_memory=peak_device_memory(trainer.device),
    )
    return run.said


def describe_run(run: Run) -> dict[str, Any]:
    """The content of model.json."""
    config, position = run.config, run.position
    trained = {
        "steps": position.step,
        "epochs": position.step / run.feed.epoch_steps,
        "seed": config.seed,
        "best": finite(position.best),
    }
    tasks = about_tasks(run.feed.sources, {t.name: t.unit for t in run.trainer.tasks})
    return describe(config.model, config.branch_of(), tasks, trained)
