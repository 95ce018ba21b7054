"""What uncertainties are made of, from data: covariances of the train split, constants of the validation split.

Each process takes every so-manieth batch; sums are added over them. The batches are the same on any number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from multifid.evaluation.batches import edge_budget
from multifid.evaluation.data import AT_ONCE, Data, Share
from multifid.feed.loader import Source, ahead, collate, cut, edge_costs
from multifid.graphs.batch import Batch
from multifid.graphs.graph import completed
from multifid.model.predictor import Predictor
from multifid.model.rigid import held, inputs_of
from multifid.model.rigidity import BranchRigidity, Rigidity, TaskConstants
from multifid.model.rigidity_file import weights_of
from multifid.store.references import References

MOST = 2_000  # structures of a validation or test split that are looked at, spread evenly
FLOOR = 1e-3  # of the mean variance of a force: see `TaskConstants`
PART = 0.25  # of the edges of a batch of `evaluate`: the graph of autograd is kept


@dataclass
class Points:
    """Standard deviations and absolute errors of one task on one split; of all processes, in the order of the split."""

    energy: np.ndarray  # (S, 2) eV/atom
    forces: np.ndarray  # (N, 2) eV/angstrom: of a component; the root mean square of the three errors of an atom
    stress: np.ndarray  # (S, 2) eV/angstrom^3: of a component; the root mean square of the nine errors
    split: str = "test"


@dataclass
class Calibrated:
    """What came out: for a file, and how it does on the test split."""

    rigidity: Rigidity
    test: dict[str, Points] = field(default_factory=dict)


def calibrate(model: Predictor, data: Sequence[Data], samples: int, share: Share) -> Calibrated:
    """The uncertainties of all branches that the tasks of `data` use; the same on all processes.

    ValueError where a task has no validation structure with a label.
    """
    of_task = {d.name: _source(model, d) for d in data}
    branch_of = model.potential.branch_of
    branches = {}
    for branch in sorted({branch_of[task] for task in of_task}):
        sums: dict[str, Tensor] = {}
        for task, source in of_task.items():
            if branch_of[task] == branch:
                _add_covariances(model, source, task, sums, share)
        whole = {name: share.sum_(sums[name]) for name in sorted(sums)}
        one = BranchRigidity.from_tensors(whole)
        branches[branch] = replace(one, samples=one.energy.draws(samples))
    constants = {t: _constants(model, s, t, branches[branch_of[t]], share) for t, s in of_task.items()}
    rigidity = Rigidity({b: weights_of(model.potential, b) for b in branches}, branches, constants)
    test = {t: points(model, s, t, rigidity, "test", share) for t, s in of_task.items() if s.store.size("test")}
    return Calibrated(rigidity, test)


def points(model: Predictor, source: Source, task: str, rigidity: Rigidity, split: str, share: Share) -> Points:
    """Deviations and errors of one task on (a sample of) one split."""
    constants = rigidity.tasks[task]
    raw = _raw(model, source, task, rigidity.branches[model.potential.branch_of[task]], split, share)
    energy, forces, stress = (_gathered(x, share) for x in raw)
    energy[:, 0] = np.sqrt(energy[:, 0]) * (constants.energy or np.nan)
    forces[:, 0] = np.sqrt(np.maximum(forces[:, 0], constants.floor)) * (constants.forces or np.nan)
    stress[:, 0] = np.sqrt(stress[:, 0]) * (constants.stress or np.nan)
    energy, forces, stress = (_whole(x) for x in (energy, forces, stress))
    return Points(energy, forces, stress, split)


def _whole(pairs: np.ndarray) -> np.ndarray:
    """Those of (n, 2) that have both numbers."""
    return pairs[np.isfinite(pairs).all(axis=1)]


def _source(model: Predictor, data: Data) -> Source:
    """A store with the reference energies that the model was trained with."""
    about = data.store.manifest["tasks"][data.label_set]
    store = References.from_manifest(about)
    own = {int(z): e for z, e in model.description["tasks"][data.name]["references"].items()}
    references = References({**store.energies, **own}, store.undetermined, store.rank, store.residual)
    return Source(data.store, {data.name: data.label_set}, {data.name: references})


def _add_covariances(model: Predictor, source: Source, task: str, sums: dict[str, Tensor], share: Share) -> None:
    """Outer products of what the last layers see of the train split, added to `sums`; float64, on the host."""
    size = source.store.size("train")

    def add(batch: Batch, times: float) -> None:
        found = inputs_of(model.potential, batch, task)
        for name in ("energy", "scalars", "vectors"):
            if (rows := getattr(found, name)) is not None:
                sums[name] = sums.get(name, 0) + times * (rows.T @ rows).cpu()

    first = source.store.pick("train", slice(0, 1))
    add(_on_device(model, collate([(source, first)], model.cutoff)), 0.0)  # a process without any batch has zeros
    for start in range(0, size, AT_ONCE):
        index = source.store.pick("train", slice(start, min(start + AT_ONCE, size)))
        for batch in _batches(model, source, index, share):
            add(batch, 1.0)


def _constants(model: Predictor, source: Source, task: str, rigidity: BranchRigidity, share: Share) -> TaskConstants:
    """Those that make the root mean square of error / deviation one on the validation split."""
    raw = [_gathered(x, share) for x in _raw(model, source, task, rigidity, "validation", share)]
    structures = len(raw[0])
    energy, forces, stress = (_whole(x) for x in raw)
    if not len(energy) + len(forces):
        raise ValueError(
            f"task {task}: {source.store.path} has no validation structure with an energy or forces, so that nothing "
            "says how large its errors are"
        )
    floor = FLOOR * float(forces[:, 0].mean()) if len(forces) else 0.0
    forces[:, 0] = np.maximum(forces[:, 0], floor)
    return TaskConstants(_constant(energy), _constant(forces), floor, structures, _constant(stress))


def _constant(pairs: np.ndarray) -> float | None:
    """alpha, from (n, 2) variances and errors; variances that are zero say nothing."""
    pairs = pairs[pairs[:, 0] > 0]
    return float(np.sqrt((pairs[:, 1] ** 2 / pairs[:, 0]).mean())) if len(pairs) else None


def _raw(
    model: Predictor, source: Source, task: str, rigidity: BranchRigidity, split: str, share: Share
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Variances before their constant and absolute errors of this process's batches: (S, 2), (N, 2) and (S, 2) each.

    Of energies, forces and stresses; NaN where there is no label or no stress.
    """
    size = source.store.size(split)
    places = np.linspace(0, max(size - 1, 0), min(size, MOST)).astype(np.int64)
    index = source.store.pick(split, places)
    energies, forces, stresses = [], [], []
    for batch in _batches(model, source, index, share):
        targets = batch.targets[task]
        labelled = model.is_conservative(task) and targets.stress is not None and bool(targets.stress.isfinite().any())
        found = held(model.potential, replace(batch, targets={}), task, rigidity, stress=labelled)
        p = model.physical(found.prediction, task)
        error = (p.energy - targets.energy).abs() / batch.natoms
        energies.append(torch.stack([found.energy, error.double()], dim=1).cpu().numpy())
        nothing = torch.full_like(p.forces, torch.nan)
        label = nothing if targets.forces is None else targets.forces
        error = (p.forces - label).double().square().mean(dim=1).sqrt()
        forces.append(torch.stack([found.forces, error], dim=1).cpu().numpy())
        error = torch.full_like(found.stress, torch.nan)
        if labelled and p.stress is not None and targets.stress is not None:
            error = (p.stress - targets.stress).double().square().mean(dim=(1, 2)).sqrt()
        stresses.append(torch.stack([found.stress, error], dim=1).cpu().numpy())
    return energies, forces, stresses


def _batches(model: Predictor, source: Source, index: np.ndarray, share: Share) -> Iterator[Batch]:
    """This process's batches of some structures, on the model's device and in its type; labels stay in float64."""
    pieces = cut(edge_costs(source, index, model.cutoff), max(1, int(PART * edge_budget(model, share))))
    mine = pieces[share.rank :: share.size]

    def prepared(k: int) -> Batch:
        return collate([(source, index[mine[k]])], model.cutoff)

    for k, batch in enumerate(ahead(prepared, 0, len(mine), share.workers)):
        yield _on_device(model, batch)
        share.advance((mine[k].stop - mine[k].start) * share.size)


def _on_device(model: Predictor, batch: Batch) -> Batch:
    whole = completed(batch, model.potential.encoder.needs)
    kept = whole.to(model.device).targets
    return replace(whole.to(model.device, model.dtype), targets=kept)


def _gathered(mine: list[np.ndarray], share: Share) -> np.ndarray:
    """The rows of all processes, batch after batch; each adds its own to zeros. (n, 2)"""
    lengths = torch.zeros(share.size, dtype=torch.int64)
    own = np.concatenate([np.zeros((0, 2)), *mine])
    lengths[share.rank] = len(own)
    lengths = share.sum_(lengths)
    start = int(lengths[: share.rank].sum())
    whole = torch.zeros(int(lengths.sum()), 2, dtype=torch.float64)
    whole[start : start + len(own)] = torch.from_numpy(own)
    return share.sum_(whole).numpy()


def quality(pairs: np.ndarray) -> dict[str, float]:
    """How well (n, 2) deviations tell of errors: rms of error / deviation, fractions within 1 and 2, rank correlation.

    nan where there is too little to say.
    """
    from scipy.stats import spearmanr

    if len(pairs) < 3:
        return dict.fromkeys(("z", "within_1", "within_2", "rank"), float("nan"))
    z = pairs[:, 1] / pairs[:, 0]
    rank = float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)
    return {
        "z": float(np.sqrt((z**2).mean())),
        "within_1": float((z < 1).mean()),
        "within_2": float((z < 2).mean()),
        "rank": rank,
    }
