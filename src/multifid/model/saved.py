"""A potential on disk, whatever it was trained with: a run's model.safetensors and model.json, or one model file.

Tensor names are `encoder.*` and `branches.<branch>.*`; the description says how to build the potential again and what
its branches know (tasks, elements, reference energies, scales). A model file is a safetensors file with the description
and a checksum of the tensors in its header: it can hold some of the tasks only, and nothing in it is executed.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import multifid
from multifid.model.potential import ModelConfig, Potential

SCHEMA = 1
Description = dict[str, Any]


def describe(
    config: ModelConfig, branch_of: dict[str, str], tasks: dict[str, Any], trained: dict[str, Any]
) -> Description:
    """The content of model.json."""
    return {
        "schema": SCHEMA,
        "multifid": multifid.__version__,
        "architecture": config.model_dump(mode="json"),
        "cutoff": config.cutoff,
        "branches": sorted(set(branch_of.values())),
        "tasks": {t: {"branch": branch_of[t], **tasks[t]} for t in tasks},
        "trained": trained,
    }


def forces_said(description: Description) -> str:
    """Which forces the tasks have: one word, or, where they differ, each kind with its tasks."""
    config, kinds = ModelConfig.model_validate(description["architecture"]), dict[str, list[str]]()
    for task, about in description["tasks"].items():
        if "property" not in about:
            kinds.setdefault(config.shape(about["branch"]).forces, []).append(task)
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{kind} ({', '.join(tasks)})" for kind, tasks in kinds.items()) or "none"


def save_description(path: Path, description: Description) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(description, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(part, path)


def load_description(run: Path) -> Description:
    """model.json of a run, or what the header of a model file says. ValueError where none, or of another schema."""
    if run.is_file():
        return _description_of_file(run)
    path = run / "model.json"
    if not path.exists():
        raise ValueError(f"{path}: not found; {why_no_model(run)}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if description.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {description.get('schema')!r}, this version reads {SCHEMA}")
    return description


def _description_of_file(path: Path) -> Description:
    try:
        with safe_open(path, "pt", backend="pread") as held:
            description = json.loads((held.metadata() or {}).get("description", "{}"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a model file ({error})") from error
    if description.get("schema") != SCHEMA:
        raise ValueError(f"{path}: no model file of multifid, or of another schema than {SCHEMA}")
    return description


def why_no_model(run: Path) -> str:
    """What to say of the directory of a run without a model."""
    if (run / "config.yaml").exists():
        return "the run has no model yet: it has one from its first finite validation value on (see its train.log)"
    return f"is {run} the directory of a trained run?"


def load_potential(run: Path, weights: str = "model.safetensors") -> tuple[Potential, Description]:
    """The potential of a run, in evaluation mode on the CPU, and its description."""
    description = load_description(run)
    branch_of = {t: about["branch"] for t, about in description["tasks"].items()}
    config = ModelConfig.model_validate(description["architecture"])
    potential = Potential(config, description["branches"], branch_of, seed=0)
    if not (run / weights).exists():
        raise ValueError(f"{run / weights}: not found; {why_no_model(run)}")
    try:
        tensors = load_file(run / weights)
    except Exception as error:  # safetensors raises its own class, OSError or ValueError, by kind of damage
        raise ValueError(f"{run / weights}: cannot be read as safetensors ({error})") from error
    try:
        potential.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{run / weights}: does not fit {run / 'model.json'} ({error})") from error
    return potential.eval(), description
