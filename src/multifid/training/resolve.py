"""Opening a run: the config is resolved once, at the first start, and later starts must say the same."""

import os
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from multifid.config import Config, differences, dump_config, load_config
from multifid.feed.loader import Source
from multifid.feed.order import Draw
from multifid.model.potential import ModelConfig
from multifid.model.property import PropertyConfig
from multifid.parallel.layout import Load, Placement, place
from multifid.training.costs import loads, memory
from multifid.training.settings import NEUTRAL

DEFAULT_BATCH = 32
STORE = re.compile(r"tasks\.[^.]+\.store")  # of a task that the run has
SCALE = re.compile(r"tasks\.[^.]+\.scale")  # of a task that was there: its branch means something in these units only
# What may change, beside the tasks themselves, where tasks join or leave a run.
WITH_TASKS = (
    "tasks.",
    "train.steps:",
    "train.minutes:",
    "train.epochs:",
    "train.epoch_steps:",
    "train.patience:",
)


def resolve(config: Config, ranks: int) -> Config:
    """The config with `train.batch` written out, which depends on the ranks of the first start."""
    train = config.train
    batch = train.batch or DEFAULT_BATCH
    if train.local_batch is not None:
        batch = float(Fraction(train.local_batch * ranks, len(config.tasks)))
    return config.model_copy(update={"train": train.model_copy(update={"batch": batch, "local_batch": None})})


def open_run(config: Config, ranks: int) -> tuple[Config, Path]:
    """The resolved config and the directory of a run, new or to be resumed. Writes nothing.

    ValueError with the differences where the directory holds a run of another config. Keys that change neither the
    mathematics nor the order of data (`NEUTRAL`, the layout, where the stores lie) may differ, and the new ones count;
    `train.change_tasks` lets the tasks differ.
    """
    run = Path(config.run)
    path = run / "config.yaml"
    if not path.exists():
        if run.exists() and any(run.iterdir()):
            raise ValueError(
                f"{run} exists, is not empty and holds no config.yaml: choose another directory for the run"
            )
        return resolve(config, ranks), run
    held = load_config(path)
    if config.train.local_batch is not None:  # turned into `batch` once, by the ranks of the first start
        config = config.model_copy(update={"train": config.train.model_copy(update=_batch_of(config, held))})
    if config.parallel.placement != held.parallel.placement:  # the user's, not what `auto` gave
        config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ranks": None})})
    properties = {**held.model.properties, **config.model.properties}  # those of the stores, from the first start
    config = config.model_copy(update={"model": config.model.model_copy(update={"properties": properties})})
    config = resolve(config, ranks)
    changed = [d for d in _compare(config, held) if not _may_change(d, config.train.change_tasks)]
    if changed:
        tasks = any(d.startswith("tasks.") for d in changed)
        hint = "To add tasks to the run, or drop some, set train.change_tasks=true.\n" if tasks else ""
        raise ValueError(
            f"{run} holds a run of another config:\n  " + "\n  ".join(changed) + f"\n{hint}"
            "Give the run another directory (run=...), or resume with the run's own config: multifid train " + str(run)
        )
    return config, run


def with_properties(config: Config, sources: list[Source]) -> Config:
    """The config with what the stores of its tasks hold in place of energies, in `model.properties`.

    ValueError where a store holds another property than the config says, or where a run cannot have any.
    """
    found: dict[str, PropertyConfig] = dict(config.model.properties)
    branch_of = config.branch_of()
    for source in sources:
        for task in source.tasks:
            about, branch = source.about(task).get("property"), branch_of[task]
            held = None if about is None else PropertyConfig(kind=about["kind"], classes=len(about["classes"]))
            said = config.model.properties.get(branch)
            if held is None and said is None:
                continue
            if config.branches == "shared" or config.train.compile:
                key = "branches: per_task" if config.branches == "shared" else "train.compile: false"
                raise ValueError(f"task {task!r} has a property in place of energies, which needs {key}")
            if said is not None and (held is None or said.kind != held.kind or said.classes < held.classes):
                raise ValueError(
                    f"task {task!r}: {source.store.path} holds {_in_words(held)}, where model.properties.{branch} says "
                    f"{_in_words(said)}"
                )
            found[branch] = said or held  # type: ignore[assignment]
    if found == config.model.properties:
        return config
    values = {**config.model.model_dump(), "properties": {name: one.model_dump() for name, one in found.items()}}
    return config.model_copy(update={"model": ModelConfig.model_validate(values)})


def _in_words(held: PropertyConfig | None) -> str:
    if held is None:
        return "energies or forces"
    return f"a property of kind {held.kind}" + (f" with {held.classes} classes" if held.classes else "")


def _batch_of(config: Config, held: Config) -> dict[str, float | None]:
    """The batch of a run that was begun with a local batch; ValueError if it was begun with another one."""
    local, batch = config.train.local_batch, Fraction(str(held.train.batch)) * len(held.tasks)
    if (batch / Fraction(local or 1)).denominator != 1:
        raise ValueError(
            f"train.local_batch: {local} here, but the run in {config.run} takes {float(batch):g} structures per step, "
            "which no number of ranks makes of it"
        )
    return {"batch": held.train.batch, "local_batch": None}


def _compare(config: Config, held: Config) -> list[str]:
    return differences(config.model_dump(mode="json"), held.model_dump(mode="json"))


def _may_change(difference: str, change_tasks: bool) -> bool:
    key = difference.split(":")[0]
    if STORE.fullmatch(key):  # data may be moved: what a store holds is compared (`identity`), not where it lies
        return True
    if key.startswith("parallel.") or key in {f"train.{k}" for k in NEUTRAL}:
        return True
    return change_tasks and difference.startswith(WITH_TASKS) and not SCALE.fullmatch(key)


def asked_placement(config: Config, ranks: int) -> Placement:
    """What the config asks for. A map that was written out for other ranks or tasks is chosen anew."""
    asked, parallel = config.parallel.placement, config.parallel
    written = isinstance(asked, dict) and parallel.ranks is not None
    return "auto" if written and (parallel.ranks != ranks or set(asked) != set(config.tasks)) else asked


def needs_trial(config: Config, ranks: int) -> bool:
    """Whether costs must be measured now. ValueError where they are asked for and no placement would follow them."""
    if config.parallel.costs == "estimated" or ranks == 1:
        return False
    asked = asked_placement(config, ranks)
    if asked == "replicated" or (isinstance(asked, dict) and config.parallel.ranks is None):
        raise ValueError(
            "parallel.costs: measured is for the placements auto and split; "
            f"{'replicated' if asked == 'replicated' else 'a map'} follows no costs"
        )
    return not isinstance(asked, dict)


def placement_of(
    config: Config, sources: list[Source], draws: list[Draw], ranks: int, measured: Mapping[str, Load] | None = None
) -> dict[str, list[int]]:
    """The ranks of every task, by estimated loads if none were measured."""
    return place(
        list(config.tasks),
        asked_placement(config, ranks),
        ranks,
        together=[list(source.tasks) for source in sources],
        loads=measured or loads(config, sources, draws),
        memory=memory(config, ranks),
        allow_idle=config.parallel.allow_idle,
    )


def write_config(config: Config, run: Path, placement: dict[str, list[int]], ranks: int) -> None:
    """RUN/config.yaml, with a placement that was left to `auto` written out."""
    asked, parallel = config.parallel.placement, config.parallel
    automatic = asked == "auto" or (isinstance(asked, dict) and parallel.ranks is not None)
    written = {"placement": placement, "ranks": ranks} if automatic else {"ranks": None}
    parallel = parallel.model_copy(update=written)
    train = config.train.model_copy(update={"change_tasks": False})
    run.mkdir(parents=True, exist_ok=True)
    path = run / "config.yaml"
    part = path.with_suffix(".part")
    part.write_text(dump_config(config.model_copy(update={"parallel": parallel, "train": train})), encoding="utf-8")
    os.replace(part, path)
