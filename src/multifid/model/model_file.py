"""One file that is a model: what `multifid export` writes, and `multifid.load` reads beside runs.

A safetensors file. Its tensors are the encoder and the branches of the tasks that were chosen; its header holds the
description (as model.json) and a checksum of all tensors. Reading executes nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from multifid.model.potential import ModelConfig, Potential
from multifid.model.saved import SCHEMA, Description, load_potential

FORMAT = "multifid model"
UNCERTAINTY = "uncertainty."  # how names of tensors begin that are not weights: see `rigidity_file.py`
WEIGHTS = {"best": "model.safetensors", "last": "last.safetensors"}


def load_model(path: Path, weights: str = "best") -> tuple[Potential, Description]:
    """The potential and its description, of a run's directory or of a model file; on the CPU, in evaluation mode.

    weights: of a run, best (by validation) or last.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} must be one of {', '.join(WEIGHTS)}")
    if path.is_dir():
        return load_potential(path, WEIGHTS[weights])
    if not path.exists():
        raise ValueError(
            f"{path}: not found; a model is the directory of a trained run, or a file that `multifid export` made"
        )
    if path.suffix == ".pt2":
        raise ValueError(f"{path}: compiled code, without a model that this can use: give the run or its .mfid file")
    return read_model_file(path)


def export_model(
    run: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    weights: str = "best",
    card: str | None = None,
    uncertainty: tuple[dict[str, Tensor], str] | None = None,
) -> Description:
    """Write a run's model, or some tasks of it, as one file; returns its description.

    weights: best (by validation) or last. card: text that travels in the header too. ValueError for unknown tasks,
    FileExistsError where `out` exists: a model file is written once, by rename.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} must be one of {', '.join(WEIGHTS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or choose another name")
    potential, description = load_potential(run, WEIGHTS[weights])
    return write_model_file(potential, {**with_tasks(description, tasks), "weights": weights}, out, card, uncertainty)


def write_model_file(
    potential: Potential,
    description: Description,
    out: Path,
    card: str | None = None,
    uncertainty: tuple[dict[str, Tensor], str] | None = None,
) -> Description:
    """Write those branches of a potential that a description names, as one file; returns it with its checksum.

    uncertainty: tensors and header text of `rigidity_file.packed`.
    """
    kept = ("encoder.", *(f"branches.{branch}." for branch in description["branches"]))
    tensors = {n: t.contiguous() for n, t in potential.state_dict().items() if n.startswith(kept)}
    more, about = uncertainty or ({}, None)
    tensors |= {
        n: t for n, t in more.items() if n.removeprefix(UNCERTAINTY).rpartition(".")[0] in set(description["branches"])
    }
    description = {**description, "checksum": checksum(tensors)}
    header = {"format": FORMAT, "description": json.dumps(description, allow_nan=False)}
    header |= {} if about is None else {"uncertainty": about}
    part = out.with_name(f".{out.name}.part")
    save_file(tensors, part, metadata=header | ({} if card is None else {"card": card}))
    os.replace(part, out)
    return description


def read_model_file(path: Path) -> tuple[Potential, Description]:
    """What `export_model` wrote. ValueError names what is damaged, of a newer schema, or no model file at all."""
    try:
        with safe_open(path, "pt", backend="pread") as held:
            header = held.metadata() or {}
            names = list(held.keys())
            tensors = {name: held.get_tensor(name) for name in names}
    except Exception as error:  # safetensors raises its own class, OSError or ValueError, by kind of damage
        raise ValueError(f"{path}: cannot be read as a model file ({error})") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a safetensors file, but no model file of multifid; make one with `multifid export RUN`"
        )
    description = json.loads(header["description"])
    if description["schema"] != SCHEMA:
        raise ValueError(
            f"{path}: schema {description['schema']}, written by multifid {description['multifid']}; this version "
            f"reads {SCHEMA}: install the version that wrote it, or export the run again"
        )
    if checksum(tensors) != description["checksum"]:
        raise ValueError(f"{path}: damaged: the checksum of its tensors is not the one in its header; copy it again")
    branch_of = {t: about["branch"] for t, about in description["tasks"].items()}
    potential = Potential(
        ModelConfig.model_validate(description["architecture"]), description["branches"], branch_of, 0
    )
    try:
        potential.load_state_dict({n: t for n, t in tensors.items() if not n.startswith(UNCERTAINTY)})
    except RuntimeError as error:
        raise ValueError(f"{path}: its tensors do not fit its description ({error})") from error
    return potential.eval(), description


def with_tasks(description: Description, tasks: Sequence[str] | None) -> Description:
    """The description of some of the tasks, and of the branches that they use."""
    if tasks is None:
        return description
    unknown = [task for task in tasks if task not in description["tasks"]]
    if unknown or not tasks:
        raise ValueError(
            f"no task {', '.join(unknown) or '(none given)'}; the model has {', '.join(description['tasks'])}"
        )
    kept = {task: about for task, about in description["tasks"].items() if task in set(tasks)}
    return {**description, "tasks": kept, "branches": sorted({about["branch"] for about in kept.values()})}


def fingerprint(potential: Potential, description: Description, task: str) -> str:
    """A hash of all that answers for a task: encoder, branch, reference energies, scale. A file has that of its run."""
    about = description["tasks"][task]
    rooms = ("encoder.", f"branches.{about['branch']}.")
    weights = checksum({n: t.float() for n, t in potential.state_dict().items() if n.startswith(rooms)})
    rest = json.dumps([sorted(about["references"].items()), about["scale"]])
    return xxhash.xxh3_64_hexdigest(f"{weights} {rest}".encode())


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """xxh3 of the names, shapes and bytes of tensors, in the order of their names."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
