"""`init`: a potential that starts from the weights of another run, and what of it keeps fresh weights.

encoder     must be the other run's: architecture and cutoff
branch      taken where the other run has one of this name, head by head where heads have the same shape, so that
            a run with direct forces can start one with conservative forces, or the other way round

Fine-tuning may name another branch to begin with, which is rescaled so that it predicts the same in eV, and elements
that the other run did not know begin with the mean of their chemical neighbours (`structures/elements.py`).
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from multifid.model.branch import Branch
from multifid.model.encoders import build_encoder
from multifid.model.layers import Embedding
from multifid.model.potential import ModelConfig, Potential, build_branch
from multifid.model.property import PropertyBranch
from multifid.model.saved import load_description, why_no_model
from multifid.structures.elements import MAX_Z, SYMBOLS, chemical_neighbours

Begun = Mapping[str, str | None]
NOTHING: Mapping[str, Any] = {}
Shapes = dict[str, tuple[int, ...]]
WEIGHTS = "model.safetensors"


def start_from(
    potential: Potential,
    run: Path,
    begun: Begun = NOTHING,
    scales: Mapping[str, float] = NOTHING,
    elements: Collection[int] = (),
) -> None:
    """Copy the weights of another run into a potential: the encoder, and what its branches have in common by name.

    run: a run's directory or a model file.  begun: branch -> branch of the other run that it begins with, None: fresh
    weights.  scales: of the branches here; where one is given, what is taken is rescaled to it.  elements: that the
    new run learns; those that are new begin with the embedding of their chemical neighbours.
    Only what lives here is read. ValueError where the run has no weights, or its encoder is another.
    """
    shapes = _shapes(run)
    _same_encoder(potential.config, run)
    with torch.no_grad(), safe_open(_weights(run), "pt", backend="pread") as given:
        for name, parameter in potential.state_dict().items():
            there = _there(name, begun)
            if there is not None and shapes.get(there) == parameter.shape:
                parameter.copy_(given.get_tensor(there))
            elif name.startswith("encoder."):
                held = shapes.get(name, "missing")
                raise ValueError(f"init: the encoder of {run} does not fit: {name} is {held}, not {parameter.shape}")
    about = load_description(run)["tasks"].values()
    own = {one["branch"]: one["scale"] for one in about}
    for name, branch in potential.branches.items():
        assert isinstance(branch, Branch | PropertyBranch)
        there = begun.get(name, name)
        if name not in scales or there is None or there not in own:
            continue
        if not _fresh_heads(shapes, there, _shapes_of(branch)):
            branch.rescale(own[there] / scales[name])
    if elements:
        _extend_embedding(potential, {z for one in about for z in one["elements"]}, elements)


def _there(name: str, begun: Begun) -> str | None:
    """The name of a tensor in the other run; None where fresh weights are wanted."""
    room, branch, *rest = name.split(".")
    if room != "branches" or branch not in begun:
        return name
    there = begun[branch]
    return None if there is None else ".".join(["branches", there, *rest])


def _extend_embedding(potential: Potential, known: Collection[int], elements: Collection[int]) -> None:
    """The rows of elements that the other run did not know: means of those of their chemical neighbours."""
    for module in potential.encoder.modules():
        if isinstance(module, Embedding) and module.num_embeddings == MAX_Z + 1:
            for z in sorted(set(elements) - set(known)):
                with torch.no_grad():
                    module.weight[z] = module.weight[chemical_neighbours(z, known)].mean(dim=0)


def inherited(
    run: Path, config: ModelConfig, branches: Collection[str], elements: Iterable[int], begun: Begun = NOTHING
) -> list[str]:
    """What `start_from` does for all branches of a run, wherever they live, in lines for people.

    elements: atomic numbers that the new run trains on. ValueError as for `start_from`.
    """
    shapes = _shapes(run)
    _same_encoder(config, run)
    there = sorted({name.split(".")[1] for name in shapes if name.startswith("branches.")})
    whole, lines = [], []
    for branch in sorted(branches):
        source = begun.get(branch, branch)
        if source is None:
            lines.append(f"branch {branch!r} begins with fresh weights")
        elif source not in there:
            near = difflib.get_close_matches(branch, there, n=1)
            meant = f"; is {near[0]!r} meant?" if near else ""
            lines.append(f"branch {branch!r} begins with fresh weights: {run} has {', '.join(there)}{meant}")
        elif fresh := _fresh_heads(shapes, source, _branch_shapes(config, branch)):
            lines.append(
                f"branch {branch!r} begins with a fresh {' and '.join(fresh)} head: none of this shape in {run}"
            )
        else:
            whole.append(branch if source == branch else f"{branch} (from {source})")
    described = load_description(run)["tasks"].values()
    if new := sorted(set(elements) - {z for about in described for z in about["elements"]}):
        lines.append(f"elements that {run} was not trained on: {' '.join(SYMBOLS[z] for z in new)}")
    branches_too = f" and branches {', '.join(whole)}" if whole else ""
    return [f"init: {line}" for line in (f"weights of {run} for the encoder{branches_too}", *lines)]


def _shapes(run: Path) -> Shapes:
    """The shapes of a run's tensors by name, from the head of the file. ValueError where it cannot be read."""
    path = _weights(run)
    if not path.exists():
        raise ValueError(f"init: {path} not found; {why_no_model(run)}")
    try:
        with safe_open(path, "pt", backend="pread") as given:
            return {name: tuple(given.get_slice(name).get_shape()) for name in given.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"init: {path} cannot be read as safetensors ({error})") from error


def _weights(run: Path) -> Path:
    return run if run.is_file() else run / WEIGHTS


def _same_encoder(config: ModelConfig, run: Path) -> None:
    try:
        held = ModelConfig.model_validate(load_description(run)["architecture"])
    except ValidationError as error:
        raise ValueError(f"init: the model of {run} is none of this version's: {error}") from None
    mine, theirs = (
        {"cutoff": c.cutoff, **{f"encoder.{k}": v for k, v in c.encoder.model_dump().items()}} for c in (config, held)
    )
    keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
    if different := [f"model.{key}: {mine.get(key)!r} here, {theirs.get(key)!r} there" for key in keys]:
        raise ValueError(
            f"init: {run} has another encoder, whose weights mean nothing in this one:\n  " + "\n  ".join(different)
        )


def _branch_shapes(config: ModelConfig, name: str) -> Mapping[str, Any]:
    """The shapes of a branch, without making one."""
    with torch.device("meta"):
        branch = build_branch(build_encoder(config.encoder, config.cutoff), config, name)
    return _shapes_of(branch)


def _shapes_of(branch: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in branch.state_dict().items()}


def _fresh_heads(given: Shapes, branch: str, wanted: Mapping[str, Any]) -> list[str]:
    """The heads of a branch, "energy" or "forces", that do not find all their weights."""
    fresh = [name.split(".")[0] for name, shape in wanted.items() if given.get(f"branches.{branch}.{name}") != shape]
    return list(dict.fromkeys(fresh))
