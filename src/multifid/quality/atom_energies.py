"""What energies say of themselves, element by element: whether totals grow with their atoms, and whether the energies
that were given for free atoms belong to them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from multifid.quality.evidence import FREE_ATOMS
from multifid.store.references import count_elements
from multifid.structures.structure import Packed

ENOUGH = 20  # structures
VARIED = 0.1  # standard deviation of the logarithm of the numbers of atoms, at least
DESCRIBED = 0.2  # of the energies: what a good description leaves at most
BINDING, SPREAD = 5.0, 10.0  # eV: what an atom gains where it is bound, about; the prior of the fit below
NOISE = 1.0  # eV/atom: what is not a sum over elements
ABSURD = 25.0  # eV from BINDING: no bond is so strong
ALL_ELECTRONS = 0.03  # relative difference to the free atoms with all electrons


def extensive(packed: Packed, energy: np.ndarray) -> float:
    """How much worse energies (structures,) are described as totals than as energies per atom.

    Both are fitted by energies of the elements: E = sum_Z n_Z e_Z, and E = sum_Z n_Z/N e_Z. The ratio of what is left,
    each in eV per structure of the mean size: far below 1 for totals, far above for energies per atom. NaN where the
    structures are few or all of about one size, or where a mean over atoms does not describe them either.
    """
    known = np.isfinite(energy)
    natoms = packed.natoms[known].astype(np.float64)
    elements = np.unique(packed.numbers)
    if known.sum() < max(ENOUGH, 3 * len(elements)) or np.log(natoms).std() < VARIED:
        return np.nan
    fractions = count_elements(packed.numbers, packed.natoms, elements)[known] / natoms[:, None]

    def left(values: np.ndarray) -> float:
        solution = np.linalg.lstsq(fractions, values, rcond=1e-10)[0]
        return float(np.sqrt(np.mean((values - fractions @ solution) ** 2)))

    per_atom, size = left(energy[known]), float(np.sqrt(np.mean(energy[known] ** 2)))
    if not per_atom > 0:
        return np.nan
    ratio = left(energy[known] / natoms) * float(natoms.mean()) / per_atom
    return ratio if ratio < 1 or per_atom < DESCRIBED * size else np.nan


@dataclass(frozen=True, slots=True)
class FreeAtoms:
    """Given energies of free atoms against structures: Z -> eV that an atom gains in them, by the fit.

    The fit is Bayesian, so that elements that hardly occur, or only together, are not accused: the gain of each
    element is BINDING +- SPREAD before structures are looked at. Elements without a given energy are free.
    """

    given: dict[int, float]
    gains: dict[int, float]

    def absurd(self) -> list[int]:
        """The elements whose given energies cannot belong to the totals."""
        return [z for z, gain in self.gains.items() if abs(gain - BINDING) > ABSURD]

    def strain(self) -> float:
        """The largest deviation of a gain from BINDING, eV."""
        return max(abs(gain - BINDING) for gain in self.gains.values())

    def all_electrons(self, fitted: bool) -> bool:
        """Whether the given (or fitted) energies of the absurd elements are those of atoms with all their electrons."""
        values = {z: self.given[z] - (self.gains[z] if fitted else 0.0) for z in self.absurd()}
        return all(abs(e / FREE_ATOMS[z] - 1) < ALL_ELECTRONS for z, e in values.items())


def free_atoms(packed: Packed, energy: np.ndarray, given: Mapping[int, float]) -> FreeAtoms:
    """How energies of free atoms (Z -> eV) go with totals (structures,); no gains where nothing can be compared."""
    known = np.isfinite(energy)
    elements = np.unique(packed.numbers).astype(int)
    fixed = np.array([int(z) in given for z in elements], bool)
    if known.sum() < 1 or not fixed.any():
        return FreeAtoms(dict(given), {})
    natoms = packed.natoms[known]
    fractions = count_elements(packed.numbers, packed.natoms, elements)[known] / natoms[:, None]
    atoms = fractions[:, fixed] @ np.array([given[int(z)] for z in elements[fixed]])
    gain = atoms - energy[known] / natoms
    design = np.where(fixed, fractions, -fractions)
    prior = np.where(fixed, BINDING, 0.0)
    weight = np.where(fixed, 1 / SPREAD**2, 1e-12)
    normal = design.T @ design / NOISE**2 + np.diag(weight)
    solution = prior + np.linalg.solve(normal, design.T @ (gain - design @ prior) / NOISE**2)
    return FreeAtoms(dict(given), {int(z): float(solution[k]) for k, z in enumerate(elements) if fixed[k]})
