"""What a model answers for structures: `Output` for the user, `Answer` and `Doubts` for each structure on the way."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from multifid.structures.structure import Packed

Answer = tuple[float, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]
# Standard deviations: of the energy, of atoms' energies, of forces, of the stress.
Doubts = tuple[float, np.ndarray, np.ndarray, float]


@dataclass
class Output:
    """Predictions for S structures, in their order; numpy arrays in float64.

    For a single structure forces, stress, energies and features are its arrays; for a list they are lists of arrays.

    Attributes:
        energy: (S,) eV, totals: reference energies included.
        forces: (N, 3) eV/angstrom.
        stress: (3, 3) eV/angstrom^3, positive under tension; None for direct forces or unasked, NaN without a volume.
        energies: (N,) eV, what each atom adds to the total.
        features: (N, H), the encoder's scalars, where they were asked for.
        task: which one answered.
        undetermined: (S,) bool, the training data do not determine the total energy of this composition.
        energy_uncertainty: (S,) eV, standard deviation of the total, where uncertainties were asked for.
        energies_uncertainty: (N,) eV, of what each atom adds.
        forces_uncertainty: (N,) eV/angstrom, of a component of the force on each atom, averaged over directions.
        stress_uncertainty: (S,) eV/angstrom^3, of a component of the stress, averaged over the nine; NaN where there
            is no stress.
        energy_disagreement, energies_disagreement, forces_disagreement, stress_disagreement: of the shapes of
            uncertainties, standard deviations over branches, where they were asked for (see `Disagreement`).
        branches: (S,) int, how many branches had a say.
        value: of a task of a property, which has no energy, forces, stress and energies (None): (S,) or (S, 3), of a
            class its name; of atoms (N,) or (N, 3) as forces are. In the unit of the training data.
        probabilities: (S, classes), of a class, in the order of the model's `property_of(task).classes`.
    """

    energy: Any
    forces: Any
    stress: Any
    energies: Any
    features: Any = None
    task: str = ""
    undetermined: Any = None
    energy_uncertainty: Any = None
    energies_uncertainty: Any = None
    forces_uncertainty: Any = None
    stress_uncertainty: Any = None
    energy_disagreement: Any = None
    energies_disagreement: Any = None
    forces_disagreement: Any = None
    stress_disagreement: Any = None
    branches: Any = None
    value: Any = None
    probabilities: Any = None


def doubts_of_each(doubts: list[Doubts], alone: bool) -> tuple[Any, Any, Any, Any]:
    """Standard deviations of energies, of atoms' energies, of forces and of stresses, as `Output` holds them."""
    energy, stress = (np.array([d[k] for d in doubts], np.float64) for k in (0, 3))
    energies, forces = ([d[k] for d in doubts] for k in (1, 2))
    return energy, energies[0] if alone else energies, forces[0] if alone else forces, stress


def sums_of(values: np.ndarray, packed: Packed) -> np.ndarray:
    """(N,) -> (S,): the sum over each structure's atoms."""
    return np.array([values[a:b].sum() for a, b in pairwise(packed.offsets.tolist())])


def each_of(
    packed: Packed,
    energy: np.ndarray,
    forces: np.ndarray,
    stress: np.ndarray | None,
    energies: np.ndarray,
    features: np.ndarray | None,
) -> Iterator[Answer]:
    """Results of a batch, (S,), (N, 3), (S, 3, 3), (N,), (N, H), structure by structure."""
    for k, (a, b) in enumerate(pairwise(packed.offsets.tolist())):
        yield (
            float(energy[k]),
            forces[a:b],
            None if stress is None else stress[k],
            energies[a:b],
            None if features is None else features[a:b],
        )
