"""Ask trained models about stores: one row of errors for each model and dataset."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multifid.data.loader import Source, collate, cut, edge_costs
from multifid.data.references import References
from multifid.data.store import Store
from multifid.evaluate.metrics import Errors, Row
from multifid.model.potential import Potential, Prediction
from multifid.model.saved import Description, load_potential
from multifid.structures.batch import Batch

EDGES = 20_000  # of a batch: small enough for any machine, large enough to keep it busy
AT_ONCE = 1 << 16  # structures whose costs are looked at together
Collector = Callable[[Prediction, Batch, str], None]  # hears (prediction in eV, batch, data) of every batch


@dataclass(frozen=True)
class Data:
    """A dataset to ask about: one label set of a store, and what it is called in tables."""

    name: str
    store: Store
    label_set: str


def data_of(text: str, verify: str = "touch") -> list[Data]:
    """`[TASK=]STORE`: the label set TASK (or the only one) under the name TASK; without TASK all label sets."""
    name, equals, path = text.rpartition("=")
    store = Store(Path(path), verify=verify)
    if not equals:
        return [Data(n, store, n) for n in store.tasks]
    if name not in store.tasks and len(store.tasks) > 1:
        raise ValueError(f"--data {text}: {store.path} has the label sets {list(store.tasks)}, none is called {name!r}")
    return [Data(name, store, name if name in store.tasks else store.tasks[0])]


def evaluate_run(
    run: Path, data: list[Data], split: str = "test", branch: str | None = None, weights: str = "model.safetensors"
) -> list[Row]:
    """Rows of one trained run on several datasets, also written to RUN/evaluation.json."""
    potential, description = load_potential(run, weights)
    rows = [evaluate(potential, description, run.name, d, split, branch) for d in data]
    write_rows(run, rows)
    return rows


def write_rows(directory: Path, rows: Sequence[Row]) -> None:
    """DIRECTORY/evaluation.json, by rename."""
    part = directory / "evaluation.json.part"
    part.write_text(json.dumps({"rows": list(rows)}, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(part, directory / "evaluation.json")


def evaluate(
    potential: Potential,
    description: Description,
    model: str,
    data: Data,
    split: str = "test",
    branch: str | None = None,
    collect: Collector | None = None,
) -> Row:
    """The errors of one model on one split of one dataset, in eV/atom and eV/angstrom.

    A model that was trained on the task answers with its branch and its reference energies, and total energies are
    compared. Another answers with its only branch (or the one named), and its aligned energies are compared with the
    store's aligned labels: its zero of energy says nothing about another source. Elements that the branch has never
    seen are predicted anyway and counted.
    """
    answers, references = _who_answers(description, data, branch)
    source = Source(data.store, {answers: data.label_set}, {answers: references})
    elements, scale = _elements(description, answers), description["tasks"][answers]["scale"]
    stress = description["architecture"]["branch"]["forces"] == "conservative"
    errors = Errors()
    for index in _batches(data.store, split, lambda i: edge_costs(source, i, description["cutoff"])):
        whole = collate([(source, index)], description["cutoff"])
        with torch.no_grad():
            scaled = potential(whole.to(dtype=next(potential.parameters()).dtype), stress=stress)[answers]
        sigma = None if scaled.stress is None else scaled.stress.double() * scale
        p = Prediction(scaled.energy.double() * scale, scaled.forces.double() * scale, sigma)
        errors.add(p.energy, p.forces, p.stress, whole.targets[answers], whole.natoms, _unseen(whole, elements))
        if collect is not None:
            collect(p, whole, answers)
    return errors.row(model, data.name, split)


def references_row(data: Data, split: str = "test") -> Row:
    """The row of a model that knows the reference energies and nothing else: aligned energy zero, forces zero."""
    about = data.store.manifest["tasks"][data.label_set]
    source = Source(data.store, {data.name: data.label_set}, {data.name: References.from_manifest(about)})
    errors = Errors()
    for index in _batches(data.store, split, lambda i: data.store.rows("natoms", i).astype(float)):
        packed = collate([(source, index)], 0.1)
        targets = packed.targets[data.name]
        zero = torch.zeros_like
        errors.add(zero(targets.energy), zero(packed.positions), zero(packed.cell), targets, packed.natoms)
    return errors.row("References", data.name, split)


def _batches(store: Store, split: str, costs: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """The structures of a split (or "all"), in batches of about EDGES; memory does not grow with the split."""
    size = store.structures if split == "all" else store.size(split)
    for start in range(0, size, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, size))
        index = np.arange(part.start, part.stop) if split == "all" else store.pick(split, part)
        yield from (index[piece] for piece in cut(costs(index), EDGES))


def _who_answers(description: Description, data: Data, branch: str | None) -> tuple[str, References]:
    """The task of the model whose branch answers, and the reference energies that are subtracted from the labels."""
    tasks = description["tasks"]
    store = References.from_manifest(data.store.manifest["tasks"][data.label_set])
    if branch is None and data.name in tasks:
        own = {int(z): e for z, e in tasks[data.name]["references"].items()}
        return data.name, References({**store.energies, **own}, store.undetermined, store.rank, store.residual)
    named = [t for t in tasks if branch in (t, tasks[t]["branch"])] if branch is not None else list(tasks)
    if branch is not None and not named:
        raise ValueError(f"--branch {branch}: the model has the branches {description['branches']}")
    if len({tasks[t]["branch"] for t in named}) > 1:
        raise ValueError(
            f"the model has not been trained on {data.name!r} and has several branches: choose one with --branch "
            f"({', '.join(description['branches'])})"
        )
    return named[0], store


def _elements(description: Description, task: str) -> Tensor:
    """Which elements the branch of a task has seen in training, under any of its tasks: (119,) bool."""
    tasks = description["tasks"]
    seen = torch.zeros(119, dtype=torch.bool)
    for about in tasks.values():
        if about["branch"] == tasks[task]["branch"]:
            seen[torch.tensor(about["elements"], dtype=torch.int64)] = True
    return seen


def _unseen(batch: Batch, elements: Tensor) -> Tensor:
    """Which structures have an element that was never seen: (S,) bool."""
    strange = (~elements[batch.numbers]).to(torch.int64)
    return torch.zeros(batch.structures, dtype=torch.int64).index_add_(0, batch.structure, strange) > 0
