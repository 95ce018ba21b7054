"""The branches of the model that a run began with, kept in what it has made.

They still answer. Where the encoder has moved and their own data were not trained on again, they are marked as stale.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from multifid.model.model_file import load_model
from multifid.model.saved import load_description, save_description


def keep_old_branches(run: Path, model: Path, encoder_moved: bool) -> list[str]:
    """Put the branches of `model` that the run did not train into its model; the tasks that are kept.

    Nothing is kept where their heads have another shape than those of the run. Doing it twice changes nothing.
    """
    potential, old = load_model(model)
    description = load_description(run)
    heads = old["architecture"]["branch"] == description["architecture"]["branch"]
    branches = {about["branch"] for t, about in description["tasks"].items() if "kept_from" not in about}
    tasks = {
        task: about
        for task, about in old["tasks"].items()
        if heads and about["branch"] not in branches and task not in description["tasks"]
    }
    if not tasks:
        return [t for t, about in description["tasks"].items() if "kept_from" in about]
    prefixes = tuple(f"branches.{branch}." for branch in {about["branch"] for about in tasks.values()})
    kept = {n: x.contiguous() for n, x in potential.state_dict().items() if n.startswith(prefixes)}
    for name in ("model.safetensors", "last.safetensors"):
        path = run / name
        if path.exists():
            part = path.with_suffix(".part")
            save_file(load_file(path) | kept, part)
            os.replace(part, path)
    stale = {task: {**about, "stale": encoder_moved or about.get("stale", False)} for task, about in tasks.items()}
    save_description(run / "model.json", _with(description, stale, str(model)))
    return list(tasks)


def _with(description: dict[str, Any], tasks: dict[str, Any], model: str) -> dict[str, Any]:
    all_tasks = description["tasks"] | {task: {**about, "kept_from": model} for task, about in tasks.items()}
    branches = sorted({about["branch"] for about in all_tasks.values()})
    return json.loads(json.dumps({**description, "tasks": dict(sorted(all_tasks.items())), "branches": branches}))
