"""The branches of the model that a fine-tuned run began with: kept in RUN, and part of every model that it writes.

    RUN/old_branches.safetensors    tensors `weight/branches.<branch>.*` of branches that are not trained, and, in its
                                    header, what the start model knew of all its tasks

They still answer. Where the encoder moves and their own data are not trained on again, they are marked as stale. The
start model itself is needed before the first step only.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from multifid.config import Config
from multifid.model.model_file import load_model
from multifid.model.saved import Description
from multifid.training.tensor_file import Places, places_of

NAME = "old_branches.safetensors"
KNOWN = ("elements", "charges", "spins")  # of a task: what its data had, in the old ones or in those trained on here
OF_THE_OLD = ("undetermined", "null_space", "structures", "labels")  # references and first training were theirs


def keep_old_branches(run: Path, config: Config) -> None:
    """Write RUN/old_branches.safetensors. On one rank, before the first step; nothing for a run of another kind.

    No tensors are kept where heads have another shape than those of the run.
    """
    if config.finetune is None or config.init is None:
        return
    potential, old = load_model(Path(config.init))
    trained = set(config.branch_of().values())
    wanted = {
        about["branch"]
        for task, about in old["tasks"].items()
        if about["branch"] not in trained
        and task not in config.tasks
        and potential.config.shape(about["branch"]) == config.model.shape(about["branch"])
    }
    prefixes = tuple(f"branches.{branch}." for branch in sorted(wanted))
    tensors = {f"weight/{n}": t.contiguous() for n, t in potential.state_dict().items() if n.startswith(prefixes)}
    header = {
        "model": str(config.init),
        "moved": config.finetune.moves != "branch",
        "branches": sorted(wanted),
        "tasks": old["tasks"],
    }
    part = run / f".{NAME}.part"
    save_file(tensors, part, metadata={"description": json.dumps(header, allow_nan=False)})
    os.replace(part, run / NAME)


def described(run: Path, description: Description) -> Description:
    """model.json of a run with the old branches; without such a file as it is.

    A task that is trained on again keeps what the start model knew of it: elements, charges and spins of both its data.
    """
    path = run / NAME
    if not path.exists():
        return description
    held = _header(path)
    tasks = {t: _known_before(a, held["tasks"].get(t)) for t, a in description["tasks"].items()}
    trained = {about["branch"] for about in tasks.values()}
    for task, about in held["tasks"].items():
        if task not in tasks and about["branch"] in held["branches"] and about["branch"] not in trained:
            stale = held["moved"] or about.get("stale", False)
            tasks[task] = {**about, "stale": stale, "kept_from": held["model"]}
    branches = sorted({about["branch"] for about in tasks.values()})
    return {**description, "tasks": dict(sorted(tasks.items())), "branches": branches}


def kept_places(run: Path, description: Description) -> Places:
    """Where the tensors of those old branches lie that a description names; for `consolidate`."""
    path = run / NAME
    if not path.exists():
        return {}
    prefixes = tuple(f"branches.{branch}." for branch in description["branches"])
    return {name: place for name, place in places_of(path).items() if name.startswith(prefixes)}


def _known_before(about: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """A task of the run, with what the start model knew of it."""
    if before is None:
        return about
    both = {key: _both(about.get(key), before.get(key)) for key in KNOWN}
    kept = {key: before[key] for key in OF_THE_OLD if key in before}
    again = {"structures": about["structures"], "labels": about["labels"]}
    return {**about, **both, **kept, "references": before["references"] | about["references"], "again": again}


def _both(now: list[int] | None, before: list[int] | None) -> list[int] | None:
    """All values that were trained with; None where a description does not say so."""
    return None if now is None or before is None else sorted({*now, *before})


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt", backend="pread") as held:
        found: dict[str, Any] = json.loads(held.metadata()["description"])
    return found
