"""The errors of trained models on stores: one row for each model and dataset.

On any device, and on any number of processes: each takes every so-manieth batch, and only the sums of `Errors` are
added over them, by the function that is handed down. The batches are the same however many processes there are.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from multifid.evaluation.failures import Failures, failed
from multifid.evaluation.metrics import Errors, Row
from multifid.evaluation.properties import Measured, known_of, physical_values, refuse_other
from multifid.evaluation.rows import add_rows
from multifid.feed.loader import Source, ahead, collate, cut, edge_costs
from multifid.graphs.batch import Batch, Targets
from multifid.model.model_file import load_model
from multifid.model.potential import Prediction
from multifid.model.predictor import Predictor
from multifid.model.saved import Description, load_potential
from multifid.model.undetermined import StaleBranch, stale
from multifid.store.references import References
from multifid.store.store import Store
from multifid.structures.properties import OF_ATOMS, VECTORS, Property

CPU = torch.device("cpu")
EDGES = 20_000  # of a batch on a processor: large enough to keep it busy
MEMORY = 1 << 30  # bytes of a batch's features on a processor
PART = 0.25  # of an accelerator's free memory
KEPT = 16  # numbers for each edge, hidden unit and layer that a pass keeps if autograd needs them, at most
MOST_WAYS = 12  # that an error offers
AT_ONCE = 1 << 16  # structures whose costs are looked at together
Collector = Callable[
    [Prediction, Batch, str], None
]  # called with (prediction in eV, batch, data) of this process's batches


def _as_it_is(sums: Tensor) -> Tensor:
    return sums


def _no_progress(structures: int) -> None:
    """The no-op callback for progress."""


@dataclass(frozen=True)
class Share:
    """What one process does of an evaluation, and how the sums of all are added."""

    rank: int = 0
    size: int = 1
    sum_: Callable[[Tensor], Tensor] = _as_it_is  # of a float64 tensor on the host, over all processes
    workers: int = 1  # threads that prepare batches ahead
    max_edges: int | None = None  # of a batch; None: by the width of the model and the memory of the device
    advance: Callable[[int], None] = _no_progress  # called with the number of structures just done, over all processes


@dataclass(frozen=True)
class Data:
    """A dataset to ask about: one label set of a store, and what it is called in tables."""

    name: str
    store: Store
    label_set: str
    source: Path | None = None  # the file that the store was made of, where one was asked about

    @property
    def path(self) -> Path:
        """What the user named."""
        return self.source or self.store.path


def label_sets(store: Store, name: str | None) -> list[Data]:
    """The label set of a store that is called `name`, or its only one under that name; without a name all of them."""
    if name is None:
        return [Data(n, store, n) for n in store.tasks]
    if name not in store.tasks and len(store.tasks) > 1:
        sets = ", ".join(store.tasks)
        raise ValueError(f"--data {name}={store.path}: it has the label sets {sets}; none is called {name!r}")
    return [Data(name, store, name if name in store.tasks else store.tasks[0])]


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
    asked = [d if branch or d.name in description["tasks"] else _as_trained_on(run, d) for d in data]
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
    answers, references, whose = _who_answers(model.description, data, branch, name)
    if share.rank == 0 and (said := stale(answers, model.description["tasks"][answers])) is not None:
        warnings.warn(f"{name}: {said}", StaleBranch, stacklevel=2)
    source = Source(data.store, {answers: data.label_set}, {answers: references})
    known, device = _elements(model.description, answers), model.device
    errors, zeros, failures = Errors(device), Errors(device), Failures(device)
    for index, whole in _batches(source, split, model.cutoff, edge_budget(model, share), share):
        for part, batch, p in _predictions(model, source, index, whole):
            strange = _unseen(batch, known).to(device)
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
    answers = _who_answers_property(model, data, asked, branch)
    own = {int(z): e for z, e in model.description["tasks"][answers]["references"].items()}
    references = References(own, [], 0, 0.0)
    source = Source(data.store, {answers: data.label_set}, {answers: references})
    known, held = _elements(model.description, answers), model.property_of(answers)
    width = len(held.classes) if held is not None and asked.kind == "class" else 3 if asked.kind in VECTORS else 1
    size = size_of(data, split)
    order = np.arange(size) if split == "all" else data.store.index(split)
    found, counts = Measured(asked.kind, size, width), np.zeros(4)
    for index, whole in _batches(source, split, model.cutoff, edge_budget(model, share), share):
        for part, batch, p in _predictions(model, source, index, whole):
            targets, strange = batch.targets[answers], _unseen(batch, known)
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


def _who_answers_property(model: Predictor, data: Data, asked: Property, branch: str | None) -> str:
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


def _as_trained_on(run: Path, data: Data) -> Data:
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


def references_row(data: Data, split: str = "test") -> Row:
    """The row of a model that knows the reference energies and nothing else: aligned energy zero, forces zero."""
    about = data.store.manifest["tasks"][data.label_set]
    source = Source(data.store, {data.name: data.label_set}, {data.name: References.from_manifest(about)})
    errors = Errors()
    for pieces in _pieces(data.store, split, lambda i: data.store.rows("natoms", i).astype(float), EDGES):
        for index in pieces:
            packed = collate([(source, index)], 0.1)
            targets = packed.targets[data.name]
            zero = torch.zeros_like
            errors.add(zero(targets.energy), zero(packed.positions), zero(packed.cell), targets, packed.natoms)
    row = errors.row("References", data.name, split)
    return row | _about(row["structures"], True, data, None, _of_data(data))


def _of_data(data: Data) -> str:
    """How rows call the data's own reference energies, which a store without a train split has from what is asked."""
    fitted_on = data.store.fitted_on
    return "data" if fitted_on == "train" else f"data, fitted to its {fitted_on} split"


def _about(counted: int, unseen: bool, data: Data, branch: str | None, references: str) -> Row:
    """What a row says of its numbers: what the means cover, who answered, in which energies, and where the data lie."""
    return {
        "counted_structures": counted,
        "unseen": "included" if unseen else "excluded",
        "branch": branch,
        "references": references,
        "source": str(data.path),
    }


def edge_budget(model: Predictor, share: Share) -> int:
    """Edges of a batch, so that what a pass keeps of them stays within the memory."""
    if share.max_edges is not None:
        return share.max_edges
    encoder = model.potential.encoder
    of_edge = KEPT * encoder.degrees[0] * max(encoder.depth, 1) * model.dtype.itemsize
    if model.device.type == "cpu":
        return max(1, min(EDGES, MEMORY // of_edge))
    free, _ = torch.accelerator.get_memory_info(model.device)
    return max(EDGES // 10, min(100 * EDGES, int(PART * free) // of_edge))


def size_of(data: Data, split: str) -> int:
    """Structures of a split, or of `all`."""
    return data.store.structures if split == "all" else data.store.size(split)


def _batches(source: Source, split: str, cutoff: float, edges: int, share: Share) -> Iterator[tuple[np.ndarray, Batch]]:
    """This process's batches of a split (or "all"), prepared ahead; memory does not grow with the split."""
    first = 0
    for pieces in _pieces(source.store, split, lambda i: edge_costs(source, i, cutoff), edges):
        mine = pieces[(share.rank - first) % share.size :: share.size]
        first += len(pieces)  # goes on where the part before has ended, so that all have nearly as many

        def prepared(k: int, mine: list[np.ndarray] = mine) -> tuple[np.ndarray, Batch]:
            return mine[k], collate([(source, mine[k])], cutoff)

        yield from ahead(prepared, 0, len(mine), share.workers)


def _pieces(
    store: Store, split: str, costs: Callable[[np.ndarray], np.ndarray], most: int
) -> Iterator[list[np.ndarray]]:
    """The structures of a split (or "all") part by part, each cut into batches of about so much cost."""
    size = store.structures if split == "all" else store.size(split)
    for start in range(0, size, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, size))
        index = np.arange(part.start, part.stop) if split == "all" else store.pick(split, part)
        yield [index[piece] for piece in cut(costs(index), most)]


def _predictions(
    model: Predictor, source: Source, index: np.ndarray, batch: Batch
) -> Iterator[tuple[np.ndarray, Batch, Prediction]]:
    """A batch and what the model says of it, in eV; in halves where the device has no memory for the whole.

    index: of its structures in the source's store; comes back with the batch, or with each half.
    """
    task, label_set = next(iter(source.tasks.items()))
    stress = model.conservative and source.store.manifest["tasks"][label_set]["labels"]["stress"] > 0
    prediction = None
    try:
        prediction = model.aligned(replace(batch, targets={}), task, stress=stress)
    except torch.OutOfMemoryError as error:
        if len(index) == 1:
            where = f"structure {index[0]} of {source.store.path} ({int(batch.natoms[0])} atoms)"
            raise ValueError(f"{model.device} has not enough memory for {where}: try --device cpu") from error
    if prediction is not None:
        yield index, batch, prediction
        return
    for half in (index[: len(index) // 2], index[len(index) // 2 :]):
        yield from _predictions(model, source, half, collate([(source, half)], model.cutoff))


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


def _who_answers(description: Description, data: Data, branch: str | None, model: str) -> tuple[str, References, str]:
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
    return named[0], store, _of_data(data)


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
