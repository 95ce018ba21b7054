"""`multifid finetune ... --sizes`: errors against the number of structures, fine-tuned and from scratch.

    OUT/data/TASK-SIZE-SEED-KEY       the stores of the subsets
    OUT/SIZE-SEED/fine-tuned          a run, as `multifid finetune` makes it
    OUT/SIZE-SEED/from-scratch        the same data, keys and steps, from random weights
    OUT/curve.json, OUT/curve.png     errors of all runs that are complete, and their figure

Every run is an ordinary one, and the same command goes on where it was stopped, run by run.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.config import apply_override, load_config, parse_config
from multifid.environment import cache_directory
from multifid.evaluation.data import Data, Share
from multifid.evaluation.evaluate import evaluate
from multifid.evaluation.figures import save
from multifid.evaluation.learning_curve import FINETUNED, HOW, figure, tables
from multifid.evaluation.matrix import Row
from multifid.evaluation.rows import read_rows, write_rows
from multifid.model.predictor import Predictor
from multifid.model.saved import load_description, load_potential
from multifid.parallel import groups
from multifid.store.store import Store
from multifid.training.ending import Ending
from multifid.training.run import train as train_run
from multifid.workflows.asked import distinct, open_data
from multifid.workflows.finetune import finetune
from multifid.workflows.finetune.asked import Fractions, Target, targets
from multifid.workflows.finetune.begin import refuse
from multifid.workflows.finetune.refit import refit_at_the_end
from multifid.workflows.finetune.subsets import sizes_of, subset_of

ROWS, FIGURE = "curve.json", "curve.png"


@dataclass(frozen=True)
class Curve:
    """What all runs of a curve have in common."""

    model: Path
    out: Path
    task: str
    overrides: list[str]
    scratch: list[str]
    device: str | None
    console: Console
    signals: bool
    how: dict[str, Any]  # further arguments of `finetune`


@dataclass(frozen=True)
class Point:
    """So many structures, drawn by a seed."""

    size: int
    seed: int
    store: Path


def learning_curve(
    model: Path | str,
    data: Path | str,
    out: Path | str,
    overrides: Sequence[str] = (),
    *,
    sizes: Sequence[str | int],
    repeat: int = 1,
    tests: Sequence[str] = (),
    scratch: Sequence[str] = (),
    start: str | None = None,
    replay: Sequence[str] = (),
    new_elements: bool = True,
    fractions: Fractions = (0.8, 0.1, 0.1),
    options: Mapping[str, Any] | None = None,
    trust_units: bool = False,
    cache: Path | str | None = None,
    quiet: bool = False,
    signals: bool = False,
) -> list[Row] | None:
    """Fine-tune a model to subsets of a dataset, and train from scratch on the same; or go on with such a curve.

    Of both models the one of the best validation value is tested, after a last fit of its reference energies to its
    own train split. The same on every rank of a launch by torchrun or srun.

    Args:
        model, data, out, overrides, start, replay, new_elements, fractions, options, trust_units, cache, quiet,
            signals: as `finetune`; one dataset, which becomes one task. The key `seed` is that of the first repetition.
        sizes: numbers of structures of the train split, "all" for all of them. The validation split is reduced in the
            same proportion.
        repeat: so many times, each with other structures and other random weights.
        tests: `NAME=FILE` or `NAME=STORE`: what all models are tested on, beside the test split of the data.
        scratch: `key.key=value` for the runs from scratch only, as a learning rate that suits them better. All other
            keys are those of the fine-tuned run, without the `finetune` section and replayed tasks.

    Returns:
        A row, as of `evaluate`, for each model ("fine-tuned", "from scratch"), size, seed and test, with size, steps,
        best (validation value) and processor_seconds (of one process; None where the run was begun by an earlier
        call); or None where a run was stopped by a signal.

    Raises:
        ValueError: for what a user can mend, before anything is trained.
    """
    console = Console(stderr=True, quiet=quiet)
    where, run = Path(cache) if cache is not None else cache_directory(), Path(out)
    early: dict[str, Any] = {}
    for override in overrides:
        apply_override(early, override)
    seed, device = early.get("seed", 0), (early.get("train") or {}).get("device")
    for name, value, least in (("--repeat", repeat, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} {value!r}: must be a whole number of at least {least}")
    with groups.world(device) as world:
        told: list[Any] = []
        with world.together():
            if world.first:
                [target, *more] = targets([str(data)], fractions, dict(options or {}), trust_units, where, console)
                if more:
                    names = ", ".join(one.name for one in (target, *more))
                    raise ValueError(f"--sizes is for one task, and the data have {names}: one command for each")
                if target.property is not None:
                    raise ValueError(f"--sizes is for energies and forces, and {target.name} is a property")
                refuse(load_description(Path(model)), target, new_elements)
                numbers = sizes_of(sizes, target.store)
                told = [target.name, str(target.store.path), target.label_set, numbers]
        task, store, label_set, numbers = world.share(told)
        tested = open_data(list(tests), dict(options or {}), trust_units, where, world, console) if tests else []
        target = Target(task, Store(store), label_set)
        with world.together():
            tested = _tested(target, tested)
            made = _points(target, numbers, seed, repeat, run) if world.first else []
        points = [Point(size, number, Path(place)) for size, number, place in world.share(made)]
    own = [text for text in overrides if not text.startswith("seed=")]
    how: dict[str, Any] = {"start": start, "replay": replay, "new_elements": new_elements, "quiet": quiet}
    curve = Curve(Path(model), run, task, own, list(scratch), device, console, signals, how)
    return _rows(curve, points, tested)


def _tested(target: Target, given: list[Data]) -> list[Data]:
    """The test split of the data, where there is one, and what was given. ValueError where there is neither."""
    if target.store.size("test"):
        given = distinct([Data("test", target.store, target.label_set), *given])
    if not given:
        raise ValueError(f"{target.store.path} has no test split: say what is tested on, --test NAME=FILE")
    return given


def _points(target: Target, sizes: list[int], seed: int, repeat: int, out: Path) -> list[tuple[int, int, str]]:
    """(size, seed, store) of all points, the smallest first."""
    return [(n, s, str(subset_of(target, n, s, out / "data"))) for n in sizes for s in range(seed, seed + repeat)]


def _rows(curve: Curve, points: list[Point], tested: list[Data]) -> list[Row] | None:
    """Train and test what is not yet; None where a run was stopped."""
    earlier, rows = read_rows(curve.out, ROWS), list[Row]()
    for point in points:
        for model in HOW:
            place = curve.out / f"{point.size}-{point.seed}" / model.replace(" ", "-")
            begun, clock = (place / "config.yaml").exists(), time.process_time()
            ending = _tuned(curve, point, place) if model == FINETUNED else _from_scratch(curve, place)
            spent: float | None = time.process_time() - clock
            if not ending.complete:
                return None
            same = [r for r in earlier if (r["model"], r["size"], r["seed"]) == (model, point.size, point.seed)]
            if begun:
                spent = same[0].get("processor_seconds") if same else None
            about = {"size": point.size, "seed": point.seed, "steps": ending.steps, "best": ending.best}
            if begun and _known(same, about, tested):
                rows += same
                continue
            with groups.world(curve.device) as world:
                potential = Predictor(*load_potential(place), world.device)
                share = Share(world.rank, world.size, world.group.sum_)
                for data in tested:
                    row = evaluate(potential, model, replace(data, name=curve.task), share=share) | about
                    rows.append(row | {"data": data.name, "store": str(data.store.path), "processor_seconds": spent})
                if world.first:
                    write_rows(curve.out / ROWS, rows)
    with groups.world(curve.device) as world, world.together():
        if world.first:
            save(figure(rows), curve.out / FIGURE)
            for table in tables(rows):
                curve.console.print(table)
            names = f"{curve.out / ROWS}, {curve.out / FIGURE}"
            curve.console.print(f"all errors: {names}", soft_wrap=True, highlight=False, markup=False)
    return rows


def _known(rows: list[Row], about: Row, tested: list[Data]) -> bool:
    """Whether these are the rows of this very model on these very tests."""
    stores = {(data.name, str(data.store.path)) for data in tested}
    return {(r["data"], r.get("store")) for r in rows} == stores and all(about.items() <= r.items() for r in rows)


def _tuned(curve: Curve, point: Point, place: Path) -> Ending:
    keys = [*curve.overrides, f"seed={point.seed}"]
    return finetune(curve.model, f"{curve.task}={point.store}", place, keys, signals=curve.signals, **curve.how)


def _from_scratch(curve: Curve, place: Path) -> Ending:
    """The fine-tuned run beside it, from random weights: its data of the new task, its keys, and those of `scratch`."""
    values = load_config(place.parent / FINETUNED.replace(" ", "-")).model_dump(mode="json")
    values |= {"run": str(place), "init": None, "finetune": None, "tasks": {curve.task: values["tasks"][curve.task]}}
    for override in curve.scratch:
        apply_override(values, override)
    config = parse_config(values, str(place))
    with groups.world(curve.device) as world:
        ending = train_run(config, curve.console, joined=world, signals=curve.signals)
        with world.together():
            if world.first and ending.complete:
                refit_at_the_end(place, load_config(place), [curve.task], curve.console)
    return ending
