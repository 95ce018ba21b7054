"""`multifid finetune --references`: a model with one more branch, a copy with reference energies of its own."""

import os
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from multifid.feed.loader import Source
from multifid.model.model_file import load_model
from multifid.model.predictor import Predictor
from multifid.model.saved import save_description
from multifid.store.references import References
from multifid.training.finetune import FinetuneConfig, with_references
from multifid.training.run import about_task
from multifid.workflows.finetune.asked import Target
from multifid.workflows.finetune.begin import SCRATCH, nearest, refuse


def refit_only(path: Path, asked: list[Target], out: Path, start: str | None, console: Console) -> Path:
    """Write OUT/model.safetensors and OUT/model.json. FileExistsError where OUT holds anything."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty: choose another directory")
    if start == SCRATCH or len(asked) != 1:
        raise ValueError("--references fits those of one branch of the model to one dataset")
    target, model = asked[0], Predictor(*load_model(path))
    refuse(model.description, target, new_elements=False)
    found = nearest(model.in_precision("fp64"), target, start, console)
    assert found is not None
    tensors = dict(model.potential.state_dict())
    own = f"branches.{found.branch}."
    copied = {n.removeprefix(own): x.clone() for n, x in tensors.items() if n.startswith(own)}
    tensors |= {f"branches.{target.name}.{name}": tensor for name, tensor in copied.items()}
    prepared = References.from_manifest(target.store.manifest["tasks"][target.label_set])
    [source] = with_references(
        [Source(target.store, {target.name: target.label_set}, {target.name: prepared})],
        FinetuneConfig(references={target.name: found.energies}),
    )
    old = model.description
    about = about_task(source, target.name, old["tasks"][found.task]["scale"])
    tasks = old["tasks"] | {target.name: {"branch": target.name, **about}}
    out.mkdir(parents=True, exist_ok=True)
    part = out / "model.part"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, out / "model.safetensors")
    branches = sorted([*old["branches"], target.name])
    save_description(out / "model.json", {**old, "tasks": dict(sorted(tasks.items())), "branches": branches})
    console.print(
        f"{out}: branch {target.name!r} is {found.branch!r} with reference energies fitted to {found.structures} "
        "structures",
        markup=False,
    )
    return out
