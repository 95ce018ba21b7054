"""How a fine-tuned run begins: from which branches, with which reference energies, what moves; all in one config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.config import apply_override
from multifid.evaluation.nearest import Agreement, agreement, ranking, table
from multifid.model.lora import chosen_maps
from multifid.model.model_file import load_model
from multifid.model.predictor import Predictor
from multifid.model.saved import Description
from multifid.structures.elements import SYMBOLS
from multifid.workflows.finetune.asked import Target
from multifid.workflows.finetune.distil import distilled
from multifid.workflows.finetune.presets import preset
from multifid.workflows.finetune.replay import replayed

SCRATCH = "scratch"
REPLAYED = 0.5  # structures of a replayed task in a step, in parts of `train.batch`


def begun(
    path: Path,
    asked: list[Target],
    run: Path,
    overrides: list[str],
    start: str | None,
    replay: list[str],
    new_elements: bool,
    console: Console,
    distil: str | None = None,
    cache: Path = Path(),
) -> dict[str, Any]:
    """The values of a config. ValueError for what does not fit the model.

    distil: structures on which the model labels old tasks.  cache: where such stores lie.
    """
    model = Predictor(*load_model(path)).in_precision("fp64")
    for target in asked:
        refuse(model.description, target, new_elements)
    old = replayed(model, path, replay)
    for task, about in old.items():
        console.print(f"replay of {task}: {about['store']}", soft_wrap=True, highlight=False, markup=False)
    if distil is not None:
        old |= distilled(model, distil, asked, set(old), cache, console)
    train_sizes = [target.store.size("train") for target in asked]
    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    sharded = (given.get("parallel") or {}).get("shard_encoder", False)
    asked_train = given.get("train") or {}
    optimizer = asked_train.get("optimizer") or ("adamw" if sharded else None)
    chosen = preset(min(train_sizes), optimizer, (given.get("finetune") or {}).get("moves", "all"))
    energies = [target for target in asked if target.property is None]
    origin = {target.name: nearest(model, target, start, console) for target in energies}
    tasks: dict[str, Any] = {t.name: {"store": str(t.store.path), "labels": t.label_set} for t in asked}
    tasks |= {task: {**about, "per_step": max(1.0, REPLAYED * chosen["train"]["batch"])} for task, about in old.items()}
    references = {name: a.energies for name, a in origin.items() if a is not None}
    references |= {t: {int(z): e for z, e in model.description["tasks"][t]["references"].items()} for t in old}
    branches: dict[str, Any] = {name: None if a is None else a.branch for name, a in origin.items()}
    branches |= {t.name: alike(model.description, t, start) for t in asked if t.property is not None}
    values: dict[str, Any] = {
        "run": str(run),
        "init": str(path),
        "tasks": tasks,
        "model": shaped_like(model.description["architecture"], branches),
        "train": chosen["train"],
        "finetune": {**chosen["finetune"], "branches": branches},
    }
    for override in overrides:
        apply_override(values, override)
    if values["finetune"].get("moves") == "lora":
        chosen_maps(model.potential.encoder, values["finetune"].get("maps") or "")
    if "steps" not in asked_train and ("minutes" in asked_train or "epochs" in asked_train):
        values["train"]["steps"] = None  # the length is given otherwise
    values["finetune"]["references"] = {t: {str(z): e for z, e in r.items()} for t, r in references.items()}
    return values


def shaped_like(architecture: dict[str, Any], begun: Mapping[str, str | None]) -> dict[str, Any]:
    """The architecture of a model with new branches, each of the shape of the one that it begins with."""
    own = architecture.get("branches", {})
    return architecture | {"branches": own | {new: own[old] for new, old in begun.items() if old in own}}


def nearest(model: Predictor, target: Target, start: str | None, console: Console) -> Agreement | None:
    """The branch that a new one begins with, None for fresh weights; prints the ranking where the choice is free."""
    if start == SCRATCH:
        return None
    if start is not None:
        return agreement(model, task_of(model.description, start), target.store, target.label_set)
    found = ranking(model, target.store, target.label_set)
    console.print(table(target.name, found))
    return found[0]


def alike(description: Description, target: Target, start: str | None) -> str | None:
    """The branch that one of a property begins with: fresh weights, unless one of the same property is named."""
    if start in (None, SCRATCH):
        return None
    about = description["tasks"][task_of(description, str(start))]
    held, wanted = about.get("property"), target.property
    if wanted is None or held is None or held["kind"] != wanted.kind or len(held["classes"]) < len(wanted.classes):
        raise ValueError(
            f"--from {start}: {target.name} is a property ({wanted.kind if wanted else ''}) and begins with fresh "
            "weights, or with those of a branch of the same kind and classes"
        )
    return str(about["branch"])


def task_of(description: Description, name: str) -> str:
    """The task of a model that is called so, or whose branch is."""
    tasks = description["tasks"]
    found = [task for task, about in tasks.items() if name in (task, about["branch"])]
    if not found:
        raise ValueError(f"--from {name}: the model has {', '.join(tasks)} (and there is {SCRATCH})")
    return found[0]


def refuse(description: Description, target: Target, new_elements: bool) -> None:
    """ValueError where a task's name is taken, or its elements are unknown and must not be new."""
    if target.name in {*description["tasks"], *description["branches"]}:
        raise ValueError(
            f"the model has a task {target.name!r} already: give the new data a name of their own, "
            f"NAME={target.store.path}, or train on more of that task's data with --replay {target.name}=STORE"
        )
    known = {z for about in description["tasks"].values() for z in about["elements"]}
    if strange := sorted(set(target.store.elements) - known):
        names = " ".join(SYMBOLS[z] for z in strange)
        if not new_elements:
            raise ValueError(f"{target.store.path}: the model has never seen {names} (and --no-new-elements is given)")
