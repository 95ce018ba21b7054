"""Which branch of a model answers for a dataset, with which reference energies; never one of several in silence."""

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from multifid.evaluation.data import Data
from multifid.evaluation.properties import refuse_other
from multifid.graphs.batch import Batch
from multifid.model.predictor import Predictor
from multifid.model.saved import Description
from multifid.store.references import References
from multifid.structures.properties import Property

MOST_WAYS = 12  # that an error offers


def who_answers_property(model: Predictor, data: Data, asked: Property, branch: str | None) -> str:
    """The task of a model whose branch answers for a property: of the data's name, or named, or the only one."""
    tasks = model.description["tasks"]
    named = [t for t in tasks if branch in (t, tasks[t]["branch"])] if branch is not None else []
    if branch is not None and not named:
        raise ValueError(f"--branch {branch}: the model has the branches {model.description['branches']}")
    if not named:
        alike = [t for t in tasks if (held := model.property_of(t)) is not None and held.kind == asked.kind]
        named = [data.name] if data.name in tasks else alike if len(alike) == 1 else []
    if not named:
        raise ValueError(
            f"{data.path} holds the property {data.name!r} ({asked.kind}), none of the tasks of the model "
            f"({', '.join(tasks)}): TASK={data.path} or --branch TASK says which one answers"
        )
    refuse_other(asked, model.property_of(named[0]), named[0], data.path)
    return named[0]


def as_trained_on(run: Path, data: Data) -> Data:
    """Under the name of the task that the run trained on this very label set, where it is the only such task."""
    config = run / "config.yaml"
    about = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    tasks = about.get("tasks", {}) if isinstance(about, dict) else {}
    same = [
        name
        for name, task in tasks.items()
        if Path(task["store"]).resolve() == data.store.path.resolve()
        and (task.get("labels") or (name if name in data.store.tasks else data.store.tasks[0])) == data.label_set
    ]
    return replace(data, name=same[0]) if len(same) == 1 else data


def references_of_data(data: Data) -> str:
    """How rows call the data's own reference energies, which a store without a train split has from what is asked."""
    fitted_on = data.store.fitted_on
    return "data" if fitted_on == "train" else f"data, fitted to its {fitted_on} split"


def who_answers(description: Description, data: Data, branch: str | None, model: str) -> tuple[str, References, str]:
    """The task of the model whose branch answers, the references that labels are aligned by, and whose they are.

    Never one of several branches that was not named: the answer of another head looks like any other.
    """
    tasks = description["tasks"]
    about = data.store.manifest["tasks"][data.label_set]
    store = References.from_manifest(about)
    if (about_task := tasks.get(data.name)) is not None and "property" in about_task and branch is None:
        raise ValueError(f"task {data.name!r} of {model} predicts a property, but {data.path} holds none")
    if data.name in tasks and branch in (None, data.name, tasks[data.name]["branch"]):
        own = {int(z): e for z, e in tasks[data.name]["references"].items()}
        return data.name, References({**store.energies, **own}, store.undetermined, store.rank, store.residual), "model"
    named = (
        [t for t in tasks if branch in (t, tasks[t]["branch"])]
        if branch is not None
        else [t for t in tasks if "property" not in tasks[t]]
    )
    if branch is None and not named:
        raise ValueError(f"{model} predicts only properties ({', '.join(tasks)}), but {data.path} holds none of them")
    if branch is not None and not named:
        raise ValueError(f"--branch {branch}: the model has the branches {description['branches']}")
    if len({tasks[t]["branch"] for t in named}) > 1:
        path, branches = data.path, description["branches"]
        ways = [
            *(f"  --data {task}={path}     if it is data of {task}: total energies are compared" for task in tasks),
            *(f"  --data {path} --branch {name}     else: energies without references" for name in branches),
        ]
        listed = "\n".join(ways[:MOST_WAYS] + ["  ..."] * (len(ways) > MOST_WAYS))
        raise ValueError(
            f"{model} has not been trained on {data.name!r} and has several branches: say which one answers:\n{listed}"
        )
    return named[0], store, references_of_data(data)


def seen_elements(description: Description, task: str) -> Tensor:
    """Which elements the branch of a task has seen in training, under any of its tasks: (119,) bool."""
    tasks = description["tasks"]
    seen = torch.zeros(119, dtype=torch.bool)
    for about in tasks.values():
        if about["branch"] == tasks[task]["branch"]:
            seen[torch.tensor(about["elements"], dtype=torch.int64)] = True
    return seen


def unseen_structures(batch: Batch, elements: Tensor) -> Tensor:
    """Which structures have an element that was never seen: (S,) bool."""
    strange = (~elements[batch.numbers]).to(torch.int64)
    return torch.zeros(batch.structures, dtype=torch.int64).index_add_(0, batch.structure, strange) > 0
