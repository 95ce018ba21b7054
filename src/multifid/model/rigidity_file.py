"""Uncertainty on disk: beside a run's weights, in RUN/uncertainty.safetensors, and inside model files.

Tensors are `uncertainty.<branch>.<name>`; the constants are JSON in the header. A branch's uncertainty belongs to its
weights and those of the encoder: where these are others, it is refused, and nothing is computed from it.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from multifid.model.model_file import UNCERTAINTY as PREFIX
from multifid.model.model_file import checksum
from multifid.model.potential import Potential
from multifid.model.rigidity import BranchRigidity, Rigidity, TaskConstants

NAME = "uncertainty.safetensors"
SCHEMA = 2  # 1, which knew no stress, is read too


def weights_of(potential: Potential, branch: str) -> str:
    """The checksum of what the features and the last layer of a branch are made of."""
    kept = ("encoder.", f"branches.{branch}.")
    return checksum({n: t.float() for n, t in potential.state_dict().items() if n.startswith(kept)})


def save_rigidity(run: Path, rigidity: Rigidity) -> Path:
    """Write RUN/uncertainty.safetensors, by rename; returns its path."""
    part = run / f".{NAME}.part"
    tensors, about = packed(rigidity)
    save_file(tensors, part, metadata={"uncertainty": about})
    os.replace(part, run / NAME)
    return run / NAME


def packed(rigidity: Rigidity) -> tuple[dict[str, Tensor], str]:
    """Tensors and header text of all branches."""
    tensors = {f"{PREFIX}{b}.{n}": t for b, one in rigidity.branches.items() for n, t in one.tensors().items()}
    tasks = {task: asdict(constants) for task, constants in rigidity.tasks.items()}
    return tensors, json.dumps({"schema": SCHEMA, "weights": rigidity.weights, "tasks": tasks}, allow_nan=False)


def load_rigidity(path: Path) -> Rigidity | None:
    """That of a run or of a model file; None where it was not calibrated. ValueError names what is damaged."""
    file = path / NAME if path.is_dir() else path
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt", backend="pread") as held:
            about = (held.metadata() or {}).get("uncertainty")
            tensors = {n.removeprefix(PREFIX): held.get_tensor(n) for n in held.keys() if n.startswith(PREFIX)}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own class, OSError or ValueError, by kind of damage
        raise ValueError(f"{file}: cannot be read as safetensors ({error}); calibrate again") from error
    if about is None:
        return None
    said = json.loads(about)
    if said["schema"] not in (1, SCHEMA):
        raise ValueError(
            f"{file}: uncertainty of schema {said['schema']}; this version reads {SCHEMA}: calibrate again"
        )
    of_branch: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        branch, _, what = name.rpartition(".")
        of_branch.setdefault(branch, {})[what] = tensor
    branches = {branch: BranchRigidity.from_tensors(some) for branch, some in of_branch.items()}
    return Rigidity(said["weights"], branches, {t: TaskConstants(**c) for t, c in said["tasks"].items()})


def fitting(rigidity: Rigidity | None, potential: Potential) -> Rigidity | None:
    """What of it was calibrated for these very weights: a run that was trained on has to be calibrated again."""
    if rigidity is None:
        return None
    there = [
        b for b in rigidity.branches if b in potential.branches and rigidity.weights[b] == weights_of(potential, b)
    ]
    tasks = {t: c for t, c in rigidity.tasks.items() if potential.branch_of.get(t) in there}
    return Rigidity(rigidity.weights, {b: rigidity.branches[b] for b in there}, tasks)
