"""Which branch of a model is nearest to new labels, and the reference energies with which it fits them.

Codes and functionals differ most in their zeros of energy. So every branch is asked for the structures of the train
split, and what its energies lack is fitted element by element, as reference energies are: min-norm least squares of
energy per atom on composition. What then remains says how near its level of theory is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from multifid.evaluation.batches import EDGES
from multifid.evaluation.fitted import FittedTable
from multifid.feed.loader import Source, collate, cut, edge_costs
from multifid.model.predictor import Predictor
from multifid.store.references import References, count_elements, fit
from multifid.store.store import Store

MOST = 2_000  # structures that are asked about, spread evenly over the split


@dataclass(frozen=True)
class Agreement:
    """How well a branch's predictions agree with new labels, its reference energies fitted anew to them."""

    branch: str
    task: str  # of the model, whose branch it is
    energies: dict[int, float]  # Z -> eV: with them the branch's total energies fit the labels best
    energy_mae: float | None  # eV/atom; None: there are no energies
    energy_rmse: float | None
    forces_mae: float | None  # eV/angstrom
    structures: int

    @property
    def error(self) -> float:
        """What branches are ranked by: that of forces, which no zero of energy enters; of energies where none are."""
        return next((e for e in (self.forces_mae, self.energy_mae) if e is not None), np.inf)


def ranking(model: Predictor, store: Store, label_set: str) -> list[Agreement]:
    """Every branch of a model against the labels of a store's train split, the nearest first."""
    tasks = model.description["tasks"]
    one_of = {about["branch"]: task for task, about in reversed(tasks.items()) if "property" not in about}
    found = [agreement(model, task, store, label_set) for task in one_of.values()]
    return sorted(found, key=lambda a: (a.error, a.branch))


def agreement(model: Predictor, task: str, store: Store, label_set: str, split: str = "train") -> Agreement:
    """One task of a model against the labels of a split of a store, or of "all"."""
    absent = [] if split == "all" else store.manifest["splits"].get("unseen_elements", [])  # from the train split
    elements = [z for z in store.elements if z not in absent]
    own = {int(z): e for z, e in model.description["tasks"][task]["references"].items()}
    prepared = References.from_manifest(store.manifest["tasks"][label_set]).energies
    begin = {z: own.get(z, prepared.get(z, 0.0)) for z in elements}
    counts, left, natoms, forces, components = [], [], [], 0.0, 0
    for c, energy, force_errors in _differences(model, task, store, label_set, split, begin):
        counts.append(c)
        left.append(energy)
        natoms.append(c.sum(axis=1))
        forces += float(np.nansum(np.abs(force_errors)))
        components += int(np.isfinite(force_errors).sum())
    all_counts, all_left, n = np.concatenate(counts), np.concatenate(left), np.concatenate(natoms)
    known = np.isfinite(all_left)
    energies, mae, rmse = begin, None, None
    if known.any():
        moved = fit([(all_counts[known], all_left[known])], elements)
        shift = np.array([moved.energies.get(z, 0.0) for z in elements])
        energies = {z: begin[z] + float(s) for z, s in zip(elements, shift, strict=True)}
        errors = (all_left[known] - all_counts[known] @ shift) / n[known]
        mae, rmse = float(np.abs(errors).mean()), float(np.sqrt((errors**2).mean()))
    of_forces = forces / components if components else None
    return Agreement(model.description["tasks"][task]["branch"], task, energies, mae, rmse, of_forces, len(all_left))


def _differences(
    model: Predictor, task: str, store: Store, label_set: str, split: str, begin: dict[int, float]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batch by batch: counts of elements (S, K), labels minus predictions in eV (S,), and of forces (N, 3)."""
    source = Source(store, {task: label_set}, {task: References(begin, [], 0, 0.0)})
    size = store.structures if split == "all" else store.size(split)
    places = np.unique(np.linspace(0, size - 1, MOST).astype(np.int64))
    index = places if split == "all" else store.pick(split, places)
    for piece in cut(edge_costs(source, index, model.cutoff), EDGES):
        batch = collate([(source, index[piece])], model.cutoff)
        targets = batch.targets[task]
        batch.targets.clear()
        predicted = model.aligned(batch, task, stress=False)
        counts = count_elements(batch.numbers.numpy(), batch.natoms.numpy(), np.array(list(begin)))
        wanted = np.full((len(batch.numbers), 3), np.nan) if targets.forces is None else targets.forces.numpy()
        yield counts, targets.energy.numpy() - predicted.energy.cpu().numpy(), wanted - predicted.forces.cpu().numpy()


def table(name: str, found: list[Agreement]) -> FittedTable:
    """The ranking for people."""

    def milli(value: float | None) -> str:
        return "" if value is None else f"{1000 * value:.1f}"

    rows = [[a.branch, milli(a.forces_mae), milli(a.energy_mae), str(a.structures)] for a in found]
    return FittedTable(
        f"branches by their agreement with {name}, reference energies fitted anew",
        ["branch"],
        ["forces MAE (meV/angstrom)", "energy MAE (meV/atom)", "structures"],
        rows,
    )
