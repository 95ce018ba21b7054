"""Reference energies fitted anew, without a gradient: all of `--references`, and the end of every fine-tuning.

A model whose forces are right may be wrong by a constant for each element. The best weights were found for references
that were fitted before any of them moved, so what then remains is fitted to the train split once more.
"""

import os
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from multifid.config import Config
from multifid.evaluation.nearest import Agreement, agreement
from multifid.feed.loader import Source
from multifid.model.model_file import load_model
from multifid.model.predictor import Predictor
from multifid.model.saved import load_potential, save_description
from multifid.store.references import References
from multifid.store.store import Store
from multifid.training.about import about_task
from multifid.training.finetune import FinetuneConfig, with_references
from multifid.workflows.finetune.asked import Target
from multifid.workflows.finetune.begin import SCRATCH, nearest, refuse, shaped_like


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
    architecture = shaped_like(old["architecture"], {target.name: found.branch})
    changed = {"architecture": architecture, "tasks": dict(sorted(tasks.items())), "branches": branches}
    save_description(out / "model.json", {**old, **changed})
    console.print(
        f"{out}: branch {target.name!r} is {found.branch!r} with reference energies fitted to {found.structures} "
        "structures",
        markup=False,
    )
    return out


def refit_at_the_end(run: Path, config: Config, tasks: list[str], console: Console) -> None:
    """Fit the references of a trained run's tasks to what its model lacks of their train splits, in RUN/model.json.

    Twice changes nothing: they are fitted from those that the run was trained with. Tasks without energies keep theirs.
    """
    model = Predictor(*load_potential(run)).in_precision("fp64")
    description = model.description
    for task in tasks:
        store = Store(config.tasks[task].store)
        label_set = config.tasks[task].labels or (task if task in store.tasks else store.tasks[0])
        about = description["tasks"][task]
        if not store.manifest["tasks"][label_set]["labels"].get("energy"):
            continue
        about["references"] = _trained_with(config, task, store, label_set)
        found = agreement(model, task, store, label_set)
        about["references"] |= {str(z): energy for z, energy in found.energies.items()}
        console.print(_said(task, found), soft_wrap=True, highlight=False, markup=False)
    save_description(run / "model.json", description)


def _trained_with(config: Config, task: str, store: Store, label_set: str) -> dict[str, float]:
    prepared = References.from_manifest(store.manifest["tasks"][label_set])
    [source] = with_references([Source(store, {task: label_set}, {task: prepared})], config.finetune)
    return {str(z): energy for z, energy in source.references[task].energies.items()}


def _said(task: str, found: Agreement) -> str:
    error = "" if found.energy_mae is None else f": {1000 * found.energy_mae:.3g} meV/atom on average remain"
    return f"reference energies of {task} fitted again to {found.structures} structures of the train split{error}"
