"""Compositions whose total energy the training data of a task say nothing about.

Reference energies are fitted to totals. Where elements occur only together (all data are water), the data determine
combinations of their energies and not each: the total of any other composition is the fit's choice, not the data's.
Forces, stress and differences of energy at one composition do not depend on that choice.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from multifid.structures.elements import MAX_Z, SYMBOLS
from multifid.structures.structure import Packed

TOLERANCE = 1e-6  # of a composition as fractions: what a direction may have of it by rounding


class UndeterminedEnergy(UserWarning):
    """The training data do not determine the total energy of this composition."""


class StaleBranch(UserWarning):
    """The encoder was fine-tuned without the data of this branch."""


class NoForces(UserWarning):
    """The forces of this branch are zero everywhere."""


def stale(task: str, about: Mapping[str, object]) -> str | None:
    """What to say of a task whose branch is stale, `about` the task in the model's description; None of others."""
    if not about.get("stale"):
        return None
    return (
        f"the branch of task {task!r} is stale: the encoder was fine-tuned without its data, and its errors are larger "
        "than they were; take the model that it came from, or fine-tune with --replay or --distil"
    )


def without_forces(task: str, about: Mapping[str, object]) -> str | None:
    """What to say of a task whose direct forces `train.shrink` has made zero; None of others."""
    if about.get("forces_factor") != 0.0:
        return None
    return (
        f"the forces of task {task!r} are zero everywhere: what its branch had learnt of forces was no better on "
        "validation structures; its energies are not concerned"
    )


def undetermined(null_space: Sequence[Mapping[str, float]] | None, packed: Packed) -> np.ndarray:
    """Which structures have such a composition: (S,) bool. Nothing is said where the null space is not known (None).

    null_space: orthonormal directions, Z -> coefficient, as the description of a task has them.
    """
    if not null_space:
        return np.zeros(len(packed.natoms), bool)
    table = np.zeros((MAX_Z + 1, len(null_space)))
    for k, direction in enumerate(null_space):
        table[[int(z) for z in direction], k] = list(direction.values())
    structure = np.repeat(np.arange(len(packed.natoms)), packed.natoms)
    counts = np.zeros((len(packed.natoms), MAX_Z + 1))
    np.add.at(counts, (structure, packed.numbers), 1.0)
    fractions = counts / np.maximum(packed.natoms, 1)[:, None]
    return np.asarray(np.linalg.norm(fractions @ table, axis=1) > TOLERANCE)


def warning(which: np.ndarray, groups: Sequence[Sequence[int]], packed: Packed, task: str) -> str:
    """What to say of structures, (S,) bool: the first one, and the elements whose energies are not told apart."""
    first = int(np.flatnonzero(which)[0])
    own = set(packed.numbers[packed.offsets[first] : packed.offsets[first + 1]].tolist())
    names = "; ".join(", ".join(SYMBOLS[z] for z in group) for group in groups if own & set(group))
    more = f" and {int(which.sum()) - 1} more" if which.sum() > 1 else ""
    return (
        f"structure {first}{more}: the training data of task {task!r} do not determine the total energy of this "
        f"composition (they have only combinations of {names}); its total is the choice of a fit, while forces, stress "
        "and differences of energy at one composition are not touched"
    )
