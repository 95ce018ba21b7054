"""The errors of trained models on stores: one row for each model and dataset.

On any device, and on any number of processes: each takes every so-manieth batch, and only the sums of `Errors` are
added over them, by the function that is handed down. The batches are the same however many processes there are.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multifid.evaluation.answers import (
    as_trained_on,
    references_of_data,
    seen_elements,
    unseen_structures,
    who_answers,
    who_answers_property,
)
from multifid.evaluation.batches import EDGES, batches_of, cut_split, edge_budget, predictions
from multifid.evaluation.data import Data, Share, size_of
from multifid.evaluation.failures import Failures, failed
from multifid.evaluation.metrics import Errors, Row
from multifid.evaluation.properties import Measured, known_of, physical_values
from multifid.evaluation.rows import add_rows
from multifid.feed.loader import Source, collate
from multifid.graphs.batch import Batch, Targets
from multifid.model.model_file import load_model
from multifid.model.potential import Prediction
from multifid.model.predictor import Predictor
from multifid.model.saved import load_potential
from multifid.model.undetermined import StaleBranch, stale
from multifid.store.references import References
from multifid.structures.properties import OF_ATOMS, VECTORS, Property

CPU = torch.device("cpu")
# Called with (prediction in eV, batch, data) of this process's batches.
Collector = Callable[[Prediction, Batch, str], None]


def evaluate_run(
    run: Path,
    data: list[Data],
    split: str = "test",
    branch: str | None = None,
    weights: str = "model.safetensors",
    unseen: bool = False,
    share: Share = Share(),
    device: torch.device = CPU,
    name: str | None = None,
) -> list[Row]:
    """Rows of one trained run, or of a model file, on several datasets.

    Those of a run are also added to RUN/evaluation.json by the first process. name: of the model in the rows.
    """
    potential, description = load_potential(run, weights) if run.is_dir() else load_model(run)
    asked = [d if branch or d.name in description["tasks"] else as_trained_on(run, d) for d in data]
    model = Predictor(potential, description, device)
    rows = evaluate_model(model, name or run.name, asked, split, branch, unseen=unseen, share=share)
    if share.rank == 0 and run.is_dir():
        add_rows(run, rows)
    return rows


def evaluate_model(
    model: Predictor,
    name: str,
    data: list[Data],
    split: str = "test",
    branch: str | None = None,
    unseen: bool = False,
    share: Share = Share(),
) -> list[Row]:
    """Rows of one model on several datasets."""
    return [evaluate(model, name, d, split, branch, unseen=unseen, share=share) for d in data]


def evaluate(
    model: Predictor,
    name: str,
    data: Data,
    split: str = "test",
    branch: str | None = None,
    collect: Collector | None = None,
    unseen: bool = False,
    share: Share = Share(),
) -> Row:
    """The errors of one model, called `name`, on one split of one dataset: eV/atom, eV/angstrom and eV/angstrom^3.

    A model that was trained on the task answers with its branch and its reference energies, and total energies are
    compared. Another answers with its only branch (or the one named), and its aligned energies are compared with the
    store's aligned labels: its zero of energy says nothing about another source. Structures with elements that the
    branch has never seen are predicted and counted; `unseen`: they enter the means too. The row says whether they do.
    Structures whose prediction is not finite are counted and named, and enter no mean. `zero_energy_mae` and so on are
    the errors of reference energies and zero forces on the labels that the means are over.
    Called on all processes of a `share`, with the same on each; all get the same row.
    """
    if data.store.property_kind(data.label_set) is not None:
        return _evaluate_property(model, name, data, split, branch, unseen, share)
    answers, references, whose = who_answers(model.description, data, branch, name)
    if share.rank == 0 and (said := stale(answers, model.description["tasks"][answers])) is not None:
        warnings.warn(f"{name}: {said}", StaleBranch, stacklevel=2)
    source = Source(data.store, {answers: data.label_set}, {answers: references})
    known, device = seen_elements(model.description, answers), model.device
    errors, zeros, failures = Errors(device), Errors(device), Failures(device)
    for index, whole in batches_of(source, split, model.cutoff, edge_budget(model, share), share):
        for part, batch, p in predictions(model, source, index, whole):
            strange = unseen_structures(batch, known).to(device)
            targets, structure = _moved(batch.targets[answers], device), batch.structure.to(device)
            bad = failed(p, targets, structure)
            left_out = torch.zeros_like(bad) if unseen else strange
            failures.add(bad, left_out, part)
            targets = _without(targets, bad | left_out, structure)
            natoms = batch.natoms.to(device)
            errors.add(p.energy, p.forces, p.stress, targets, natoms, strange)
            stress = None if p.stress is None else torch.zeros_like(p.stress)
            zeros.add(torch.zeros_like(p.energy), torch.zeros_like(p.forces), stress, targets, natoms)
            if collect is not None:
                collect(_at(p, CPU), batch, answers)
        share.advance(len(index) * share.size)
    row = Errors.from_tensor(share.sum_(errors.as_tensor().cpu())).row(name, data.name, split)
    row |= {f"zero_{key}": e for key, e in Errors.from_tensor(share.sum_(zeros.as_tensor().cpu())).values().items()}
    nonfinite, lost = failures.row(data.store, share.rank, share.size, share.sum_)
    counted = row["structures"] - lost - (0 if unseen else row["unseen_structures"])
    return row | nonfinite | _about(counted, unseen, data, model.description["tasks"][answers]["branch"], whose)


def _evaluate_property(
    model: Predictor, name: str, data: Data, split: str, branch: str | None, unseen: bool, share: Share
) -> Row:
    """The same of a property, in its own unit; see `evaluation.properties`."""
    about = data.store.manifest["tasks"][data.label_set]
    asked = Property.from_manifest(data.name, about["property"])
    answers = who_answers_property(model, data, asked, branch)
    own = {int(z): e for z, e in model.description["tasks"][answers]["references"].items()}
    references = References(own, [], 0, 0.0)
    source = Source(data.store, {answers: data.label_set}, {answers: references})
    known, held = seen_elements(model.description, answers), model.property_of(answers)
    width = len(held.classes) if held is not None and asked.kind == "class" else 3 if asked.kind in VECTORS else 1
    size = size_of(data, split)
    order = np.arange(size) if split == "all" else data.store.index(split)
    found, counts = Measured(asked.kind, size, width), np.zeros(4)
    for index, whole in batches_of(source, split, model.cutoff, edge_budget(model, share), share):
        for part, batch, p in predictions(model, source, index, whole):
            targets, strange = batch.targets[answers], unseen_structures(batch, known)
            assert p.value is not None and targets.value is not None
            predicted = physical_values(model, answers, p.value)
            label = targets.value.reshape(len(predicted), -1).numpy().copy()
            of_rows = batch.structure.numpy() if asked.kind in OF_ATOMS else np.arange(batch.structures)
            bad = np.zeros(batch.structures, bool)
            np.logical_or.at(bad, of_rows, ~np.isfinite(predicted).all(axis=1))
            left_out = bad | (strange.numpy() & (not unseen))
            label[left_out[of_rows]] = np.nan
            certain = known_of(asked.kind, references.table, batch.numbers.numpy(), batch.natoms.numpy(), width)
            if asked.kind != "class":
                predicted, label = predicted + np.nan_to_num(certain), label + np.nan_to_num(certain)
            found.add(np.searchsorted(order, part), predicted, label, np.nan_to_num(certain))
            counts += [batch.structures, int(strange.sum()), len(batch.numbers), int(bad.sum())]
        share.advance(len(index) * share.size)
    found.table, found.sums, counts = (
        share.sum_(torch.from_numpy(x)).numpy() for x in (found.table, found.sums, counts)
    )
    structures, unseen_ones, atoms, lost = (int(x) for x in counts)
    row = {"model": name, "data": data.name, "split": split, "structures": structures}
    row |= {"unseen_structures": unseen_ones, "atoms": atoms, "nonfinite_structures": lost}
    row |= {f"{q}_{e}": None for q in ("energy", "forces") for e in ("mae", "rmse")}
    row |= {"property": asked.kind, **found.values()}
    counted = structures - lost - (0 if unseen else unseen_ones)
    return row | _about(counted, unseen, data, model.description["tasks"][answers]["branch"], "model")


def references_row(data: Data, split: str = "test") -> Row:
    """The row of a model that knows the reference energies and nothing else: aligned energy zero, forces zero."""
    about = data.store.manifest["tasks"][data.label_set]
    source = Source(data.store, {data.name: data.label_set}, {data.name: References.from_manifest(about)})
    errors = Errors()
    for pieces in cut_split(data.store, split, lambda i: data.store.rows("natoms", i).astype(float), EDGES):
        for index in pieces:
            packed = collate([(source, index)], 0.1)
            targets = packed.targets[data.name]
            zero = torch.zeros_like
            errors.add(zero(targets.energy), zero(packed.positions), zero(packed.cell), targets, packed.natoms)
    row = errors.row("References", data.name, split)
    return row | _about(row["structures"], True, data, None, references_of_data(data))


def _about(counted: int, unseen: bool, data: Data, branch: str | None, references: str) -> Row:
    """What a row says of its numbers: what the means cover, who answered, in which energies, and where the data lie."""
    return {
        "counted_structures": counted,
        "unseen": "included" if unseen else "excluded",
        "branch": branch,
        "references": references,
        "source": str(data.path),
    }


def _at(p: Prediction, device: torch.device) -> Prediction:
    return Prediction(p.energy.to(device), p.forces.to(device), None if p.stress is None else p.stress.to(device))


def _moved(targets: Targets, device: torch.device) -> Targets:
    forces, stress = (None if x is None else x.to(device) for x in (targets.forces, targets.stress))
    return Targets(targets.energy.to(device), forces, stress)


def _without(targets: Targets, left_out: Tensor, structure: Tensor) -> Targets:
    """The labels without those of some structures, (S,) bool. structure (N,): of each atom."""

    def blank(labels: Tensor | None, rows: Tensor) -> Tensor | None:
        return None if labels is None else labels.masked_fill(rows.reshape(-1, *[1] * (labels.dim() - 1)), torch.nan)

    energy = targets.energy.masked_fill(left_out, torch.nan)
    return Targets(energy, blank(targets.forces, left_out[structure]), blank(targets.stress, left_out))
