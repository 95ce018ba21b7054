"""What forces alone say of energies and stresses: a pair potential is fitted to them, and asked for both.

Its energy and its virial have the unit of the forces times a length, whatever the labels say, so that energies and
stresses can be measured against it without neighbouring frames: shuffled conformers, or molecular dynamics in a fixed
cell. Published samples where it can be measured give ratios of 0.75 to 1.6. A pair potential knows little of chemistry,
but errors of its forces are random to the labels; where it explains nothing, ratios do not share a sign.

    E = 1/2 sum_ij phi(r_ij)
    F_i = sum_j phi'(r_ij) r_ij / |r_ij|
    sigma = 1/2V sum_ij phi'(r_ij) r_ij r_ij / |r_ij|

with r_ij from i to j. phi is linear in Gaussians of the distance in covalent bonds, for each pair of elements, or of
kinds of elements where there are many. Only the deviator of the stress is compared: forces at one volume determine
phi up to a part that changes the pressure alone.
"""

from dataclasses import dataclass

import numpy as np

from multifid.quality.evidence import Measured, Neighbors, median
from multifid.store.references import KEYS
from multifid.structures.structure import Packed

CENTRES = np.linspace(0.6, 1.9, 10)  # of the Gaussians, in covalent bonds
REACH = 2.0  # covalent bonds: longer pairs do not count
PAIRS = 20  # of elements that have a potential of their own, at most; of kinds there are 6
ATOMS = 5000  # that are fitted to, at most (about)
STRAY = 20.0  # times the median: longer forces are left out
RIDGE = 1e-4  # of the diagonal of the normal equations
EXACT = 1e-5  # of the largest: positions are rounded to float32
SAME = 0.01  # relative difference of the volumes of two structures whose energies are compared

_KIND = np.full(119, 2)  # a metal
_KIND[[5, 6, 7, 8, 9, 10, 2, 14, 15, 16, 17, 18, 33, 34, 35, 36, 52, 53, 54]] = 1
_KIND[1] = 0


@dataclass(frozen=True, slots=True)
class Pairwise:
    """Energies (structures,) eV and stresses (structures, 3, 3) eV/angstrom^3 (NaN without a volume) of the fit.

    chosen: which of the packed structures these are.
    """

    chosen: np.ndarray
    energy: np.ndarray
    stress: np.ndarray


def pairwise(packed: Packed, near: Neighbors, forces: np.ndarray) -> Pairwise | None:
    """The pair potential that fits the forces (atoms, 3) best; None where there are no pairs or no forces."""
    chosen = np.arange(0, len(packed.natoms), max(1, -(-len(packed.numbers) // ATOMS)))
    row = np.full(len(packed.natoms), -1)
    row[chosen] = np.arange(len(chosen))
    structure = np.repeat(row, packed.natoms)
    radii = near.distance / near.relative
    reach = np.minimum(REACH * radii, near.distance.max(initial=0.0))
    used = np.flatnonzero((structure[near.i] >= 0) & (near.distance < reach))
    size = np.linalg.norm(forces.astype(np.float64), axis=1)
    known = np.flatnonzero((structure >= 0) & np.isfinite(size))
    if not len(used) or not len(known):
        return None
    known = known[size[known] <= STRAY * np.median(size[known])]
    kind, kinds = _kinds(packed.numbers, near.i[used], near.j[used])
    slope, value = _basis(near.distance[used], radii[used], reach[used])
    atom, vector = near.i[used], near.vector[used] / near.distance[used, None]
    volume = np.abs(np.linalg.det(packed.cell[chosen]))
    volume = np.where(packed.pbc[chosen].all(axis=1) & (volume > 0), volume, np.nan)

    def summed(place: np.ndarray, rows: int, values: np.ndarray) -> np.ndarray:
        """Sums by place and kind, (rows, kinds * centres), of (pairs, centres)."""
        index = place * kinds + kind
        return np.stack([np.bincount(index, column, rows * kinds) for column in values.T], 1).reshape(rows, -1)

    def column(place: np.ndarray, rows: int, factor: np.ndarray) -> np.ndarray:
        return summed(place, rows, slope * factor[:, None])

    atoms = len(packed.numbers)
    design = np.concatenate([column(atom, atoms, vector[:, a])[known] for a in range(3)])
    normal = design.T @ design
    right = design.T @ np.concatenate([forces[known, a].astype(np.float64) for a in range(3)])
    ridge = RIDGE * np.diag(normal) + 1e-12 * np.trace(normal)
    solution = np.linalg.solve(normal + np.diag(ridge + (ridge == 0)), right)
    place = structure[atom]
    stress = [
        column(place, len(chosen), vector[:, a] * near.vector[used, b]) @ solution / (2 * volume)
        for a in range(3)
        for b in range(3)
    ]
    energy = summed(place, len(chosen), value) @ solution / 2
    return Pairwise(chosen, energy, np.stack(stress, 1).reshape(-1, 3, 3))


def energy_ratio(packed: Packed, energy: np.ndarray, fit: Pairwise) -> Measured:
    """Differences of energies between structures of one composition and volume / those of the fit."""
    pairs, here, fitted = _alike(packed, fit.chosen), energy[fit.chosen], fit.energy
    least = EXACT * float(np.abs(fitted).max(initial=0.0))
    return _ratio(np.diff(here[pairs], axis=1).ravel(), np.diff(fitted[pairs], axis=1).ravel(), least)


def stress_ratio(stress: np.ndarray, fit: Pairwise) -> Measured:
    """Deviators of stresses (structures, 3, 3) / those of the fit."""
    least = EXACT * float(np.nanmax(np.abs(fit.stress), initial=0.0))
    return _ratio(_deviator(stress[fit.chosen]).ravel(), _deviator(fit.stress).ravel(), least)


def deviator_size(stress: np.ndarray) -> np.ndarray:
    """(structures,) eV/angstrom^3: the largest part of a stress that is no pressure."""
    return np.abs(_deviator(stress)).max(axis=1)


def _alike(packed: Packed, chosen: np.ndarray) -> np.ndarray:
    """(pairs, 2) places in `chosen` of structures with one composition, and one volume where they are periodic."""
    key = np.add.reduceat(KEYS[packed.numbers], packed.offsets[:-1])[chosen]
    order = np.argsort(key, kind="stable")
    a, b = order[:-1], order[1:]
    periodic = packed.pbc[chosen].any(axis=1)
    volume = np.where(periodic, np.abs(np.linalg.det(packed.cell[chosen])), 0.0)
    same = (key[a] == key[b]) & (periodic[a] == periodic[b])
    same &= np.abs(volume[a] - volume[b]) <= SAME * np.maximum(volume[a], volume[b])
    return np.stack([a[same], b[same]], 1)


def _ratio(label: np.ndarray, fitted: np.ndarray, least: float) -> Measured:
    """Of the larger half: small values drown in what the fit does not know, and those below `least` in rounding."""
    known = np.isfinite(label) & np.isfinite(fitted)
    known[known] = np.abs(fitted[known]) > least
    label, fitted = label[known], fitted[known]
    if not len(label):
        return Measured()
    large = np.abs(fitted) > np.median(np.abs(fitted))
    return median(label[large] / fitted[large])


def _deviator(s: np.ndarray) -> np.ndarray:
    """(structures, 5) of (structures, 3, 3)."""
    shear = [s[:, 0, 1], s[:, 0, 2], s[:, 1, 2]]
    return np.stack([*shear, (s[:, 0, 0] - s[:, 1, 1]) / 2, (s[:, 1, 1] - s[:, 2, 2]) / 2], axis=1)


def _kinds(numbers: np.ndarray, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, int]:
    """(pairs,) which potential a pair has, and how many there are."""
    for of_atoms in (numbers.astype(np.int64), _KIND[numbers]):
        a, b = of_atoms[i], of_atoms[j]
        names, kind = np.unique(np.minimum(a, b) * 119 + np.maximum(a, b), return_inverse=True)
        if len(names) <= PAIRS:
            break
    return kind, len(names)


def _basis(distance: np.ndarray, radii: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, centres): derivative by the distance, and value, of the Gaussians with a smooth end at `reach`."""
    width = CENTRES[1] - CENTRES[0]
    u = ((distance / radii)[:, None] - CENTRES) / width
    gauss, x = np.exp(-u * u / 2), distance / reach
    end, end_slope = (1 - x**2) ** 2, -4 * x * (1 - x**2) / reach
    slope = -u * gauss * (end / (width * radii))[:, None] + gauss * end_slope[:, None]
    return slope, gauss * end[:, None]
