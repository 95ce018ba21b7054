"""How far the branches of a model disagree about a structure: an uncertainty that needs no calibration.

Branches were trained on different data, so that they agree where the data of several hold the encoder and themselves,
and part where some of them extrapolate. Totals of different levels of theory cannot be compared: each branch's energy
counts from the reference energies of its own task, composition by composition. Forces and stresses have no such zero.

A branch has a say on a structure where one of its tasks knows the elements and was trained with its charge and
multiplicity. Branches that predict properties, and those that fine-tuning left stale, have none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from multifid.graphs.batch import Batch
from multifid.model.electrons import UNSAID
from multifid.model.output import Output
from multifid.model.pieces import EDGES, batch_of, between, cut_structures
from multifid.structures.structure import Packed

if TYPE_CHECKING:
    from multifid.model.predictor import Predictor


@dataclass
class Disagreement:
    """Standard deviations over branches (n - 1) of S structures with N atoms; NaN where fewer than two have a say.

    Attributes:
        energy: (S,) eV, of the total energy beyond the reference energies.
        energies: (N,) eV, of what each atom adds to it.
        forces: (N,) eV/angstrom, of a component of the force on each atom, averaged over the three.
        stress: (S,) eV/angstrom^3, of a component of the stress, averaged over the nine; NaN where there is none.
        branches: (S,) int, how many have a say.
    """

    energy: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    stress: np.ndarray
    branches: np.ndarray

    def into(self, out: Output, offsets: np.ndarray, alone: bool) -> None:
        """Written to the answer for the same structures; `offsets`: (S + 1,) of their atoms."""
        out.energy_disagreement, out.stress_disagreement, out.branches = self.energy, self.stress, self.branches
        each = [slice(a, b) for a, b in pairwise(offsets)]
        for name in ("energies", "forces"):
            parts = [getattr(self, name)[atoms] for atoms in each]
            setattr(out, f"{name}_disagreement", parts[0] if alone else parts)


def voices(model: "Predictor") -> dict[str, list[str]]:
    """The branches whose energies can be compared, with their tasks. ValueError where there are fewer than two."""
    found: dict[str, list[str]] = {}
    for task, about in model.description["tasks"].items():
        if model.property_of(task) is None and not about.get("stale"):
            found.setdefault(model.potential.branch_of[task], []).append(task)
    if len(found) < 2:
        raise ValueError(
            f"the disagreement of branches needs two or more with energies that fine-tuning did not leave stale, and "
            f"this model has {', '.join(found) or 'none'}: `multifid calibrate RUN` gives one branch uncertainties"
        )
    return found


def disagreement(model: "Predictor", packed: Packed, *, stress: bool, max_edges: int = EDGES) -> Disagreement:
    """The disagreement about structures, with the charge and multiplicity that they say.

    One pass of the model for each branch that has a say. stress: its too, where all of them have conservative forces.
    """
    tasks = voices(model)
    pieces = [between(packed, *piece) for piece in cut_structures(packed, model.cutoff, max_edges)]
    stress = stress and all(model.is_conservative(task) for of_branch in tasks.values() for task in of_branch)
    found = [_of_piece(model, tasks, piece, stress=stress) for piece in pieces]
    zeros = np.zeros(0)
    nothing = Disagreement(zeros, zeros, zeros, zeros, zeros.astype(np.int64))
    return Disagreement(*(np.concatenate([getattr(x, f.name) for x in [nothing, *found]]) for f in fields(nothing)))


def _of_piece(model: "Predictor", tasks: Mapping[str, Sequence[str]], packed: Packed, *, stress: bool) -> Disagreement:
    batch = batch_of(packed, model.cutoff, next(iter(tasks.values()))[0])
    each = [_of_branch(model, of_branch, packed, batch, stress=stress) for of_branch in tasks.values()]
    says = np.array([one[0] for one in each])  # (B, S)
    of_atoms = np.repeat(says, packed.natoms, axis=1)
    return Disagreement(
        np.sqrt(_variance([one[1] for one in each], says)),
        np.sqrt(_variance([one[2] for one in each], of_atoms)),
        np.sqrt(_variance([one[3] for one in each], of_atoms).mean(axis=1)),
        np.sqrt(_variance([one[4] for one in each], says).mean(axis=(1, 2))),
        says.sum(axis=0),
    )


def _of_branch(
    model: "Predictor", tasks: Sequence[str], packed: Packed, batch: Batch, *, stress: bool
) -> tuple[np.ndarray, ...]:
    """Whether a branch has a say (S,), and its energies (S,) and (N,), forces (N, 3) and stresses (S, 3, 3).

    Each structure is asked of the first of its tasks that knows it.
    """
    structures, atoms = len(packed.natoms), len(packed.numbers)
    says = np.zeros(structures, bool)
    found = [np.zeros(structures), np.zeros(atoms), np.zeros((atoms, 3)), np.full((structures, 3, 3), np.nan)]
    for task in tasks:
        mine = _known(model.description["tasks"][task], packed) & ~says
        if not mine.any():
            continue
        says |= mine
        own = np.repeat(mine, packed.natoms)
        if not own.any():  # no atoms at all
            continue
        asked = replace(batch, slices={task: next(iter(batch.slices.values()))})
        p = model.aligned(asked, task, stress=stress)
        answers = (p.energy, p.energies, p.forces, p.stress)
        for array, value, where in zip(found, answers, (mine, own, own, mine), strict=True):
            if value is not None:
                array[where] = value.cpu().numpy()[where]
    return says, *found


def _known(about: Mapping[str, Any], packed: Packed) -> np.ndarray:
    """Which structures a task knows: all elements, charge and multiplicity. (S,) bool"""
    strange = ~np.isin(packed.numbers, [int(z) for z in about["references"]])
    structure = np.repeat(np.arange(len(packed.natoms)), packed.natoms)
    known = np.bincount(structure[strange], minlength=len(packed.natoms)) == 0
    for key, values, trained in _electrons(about, packed):
        one = [UNSAID[key]] if len(trained) == 1 else []  # what says nothing is what the task was trained with
        known &= np.isin(values, [*trained, *one])
    return known


def _electrons(about: Mapping[str, Any], packed: Packed) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    for key, values in (("charge", packed.charge), ("spin", packed.spin)):
        if trained := about.get(f"{key}s"):
            yield key, values, list(trained)


def _variance(values: Sequence[np.ndarray], says: np.ndarray) -> np.ndarray:
    """Over branches, with n - 1: B arrays of (n, ...) and which of them count, (B, n); NaN where fewer than two do."""
    stacked = np.stack(values)
    counts = says.reshape(*says.shape, *[1] * (stacked.ndim - 2))
    number = counts.sum(axis=0)
    mean = np.where(counts, stacked, 0.0).sum(axis=0) / np.maximum(number, 1)
    squares = np.where(counts, (stacked - mean) ** 2, 0.0).sum(axis=0)
    return np.where(number > 1, squares / np.maximum(number - 1, 1), np.nan)
