"""What labels and geometries say of their own units: numbers that physics knows, measured on a sample of a store.

Each measurement is a ratio of what is found to what would be found in eV and angstrom, near 1 where the units are
right, with its spread and the number of observations:

    lengths   distance of an atom to its nearest neighbour / sum of the covalent radii
    totals    total energy / that of the free atoms with all their electrons (only all-electron energies come near 1)
    stretch   stiffness of X-H bonds (X = C, N, O), from the force on the hydrogen against the length of its bond
    steps     change of energy between neighbouring frames / work of the forces, and of the stress, on the way

Covalent radii: Cordero et al., Dalton Trans. 2832 (2008), as ase has them. Energies of free atoms: Hartree-Fock limit,
Clementi and Roetti, At. Data Nucl. Data Tables 14, 177 (1974). Force constants of X-H bonds: about 5 to 7.6
mdyn/angstrom, Wilson, Decius and Cross, "Molecular Vibrations" (1955).
"""

from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii

from multifid.graphs.neighbors import neighbor_list
from multifid.structures.structure import Packed

HARTREE = 27.211386245988  # eV
# hartree, Z = 1 .. 36
_FREE = (
    -0.5, -2.8617, -7.4327, -14.5730, -24.5291, -37.6886, -54.4009, -74.8094, -99.4093, -128.5471,
    -161.8589, -199.6146, -241.8767, -288.8544, -340.7188, -397.5049, -459.4821, -526.8175, -599.1648, -676.7582,
    -759.7357, -848.4060, -942.8843, -1043.3564, -1149.8663, -1262.4437, -1381.4146, -1506.8709, -1638.9637, -1777.8481,
    -1923.2610, -2075.3597, -2234.2387, -2399.8676, -2572.4413, -2752.0550,
)  # fmt: skip
FREE_ATOMS = np.full(119, np.nan)
FREE_ATOMS[1 : len(_FREE) + 1] = HARTREE * np.array(_FREE)
NOBLE = np.isin(np.arange(119), (2, 10, 18, 36, 54, 86))
STRETCH = {6: 31.0, 7: 40.0, 8: 47.0}  # eV/angstrom^2: of C-H, N-H and O-H
CUTOFF = 7.0  # angstrom: nearest neighbours lie within it, in bohr too
CROWD = 10  # atoms in the cube of the cutoff, at most: in nanometres it would hold thousands
BONDED = 1.3  # times the shortest bonds of a kind: longer ones are breaking, and soft
LAGS = (1, 2, 3)  # frames that come so soon after another are compared with it
NEAR = 1.2  # angstrom: no atom has moved further between two frames that are compared (0.6, taken for bohr)
STILL = 1e-3  # angstrom: an atom has moved further, or the cell was strained by a hundredth of it: less is rounding
STRAIN = 0.1  # nor has the cell been strained more
ENOUGH = 20  # observations that make a measurement


@dataclass(frozen=True, slots=True)
class Measured:
    """A ratio to what eV and angstrom would give: median, interquartile range of its logarithm, observations."""

    ratio: float = np.nan
    spread: float = np.inf
    count: int = 0


def median(values: np.ndarray) -> Measured:
    """The median of ratios; nothing measured where they are few or do not share a sign for the most part."""
    values = values[np.isfinite(values) & (values != 0)]
    if len(values) < ENOUGH:
        return Measured(count=len(values))
    sign = 1.0 if (values > 0).mean() >= 0.5 else -1.0
    alike = values * sign > 0
    if alike.mean() < 0.75:
        return Measured(count=len(values))
    low, middle, high = np.percentile(np.log(values[alike] * sign), (25, 50, 75))
    return Measured(float(sign * np.exp(middle)), float(high - low), int(alike.sum()))


@dataclass(frozen=True, slots=True)
class Neighbors:
    """Pairs of near atoms: receiver i, sender j, vector (pairs, 3) from i to j, distance, distance / covalent radii."""

    i: np.ndarray
    j: np.ndarray
    vector: np.ndarray
    distance: np.ndarray
    relative: np.ndarray


def neighbors(packed: Packed) -> Neighbors:
    """All pairs within a few angstrom, fewer where a crystal is denser than matter is."""
    bulk = packed.pbc.all(axis=1)
    volume = np.abs(np.linalg.det(packed.cell[bulk])) / packed.natoms[bulk]
    cutoff = min(CUTOFF, (CROWD * float(np.median(volume))) ** (1 / 3)) if len(volume) else CUTOFF
    (i, j), shifts = neighbor_list(packed, cutoff)
    structure = np.repeat(np.arange(len(packed.natoms)), packed.natoms)
    position = packed.positions.astype(np.float64)
    vector = position[j] - position[i] + np.einsum("ek,ekl->el", shifts, packed.cell[structure[i]])
    distance = np.linalg.norm(vector, axis=1)
    radii = covalent_radii[packed.numbers]
    return Neighbors(i, j, vector, distance, distance / (radii[i] + radii[j]))


def lengths(packed: Packed, near: Neighbors) -> Measured:
    """Nearest neighbours in units of covalent bonds. Noble gases have none; an atom all alone counts as far."""
    shortest = np.full(len(packed.numbers), 10.0)
    np.minimum.at(shortest, near.i, near.relative)
    alone = np.repeat((packed.natoms == 1) & ~packed.pbc.any(axis=1), packed.natoms)
    return median(shortest[~NOBLE[packed.numbers] & ~alone])


def totals(packed: Packed, energy: np.ndarray) -> Measured:
    """Energies (structures,) eV of structures with an atom heavier than helium and none heavier than krypton."""
    first = packed.offsets[:-1]
    heavy = np.maximum.reduceat(packed.numbers, first) > 2
    return median((energy / np.add.reduceat(FREE_ATOMS[packed.numbers], first))[heavy])


def stretch(packed: Packed, near: Neighbors, forces: np.ndarray) -> Measured:
    """How stiff X-H bonds of molecules are, in units of what they are known to be.

    Minus the slope of the force on H along its bond against the length of the bond, over all bonds to X together.
    """
    numbers = packed.numbers
    molecule = np.repeat(~packed.pbc.any(axis=1), packed.natoms)
    hydrogen = (numbers[near.i] == 1) & molecule[near.i]
    found = []
    for z, constant in STRETCH.items():
        pairs = np.flatnonzero(hydrogen & (numbers[near.j] == z))
        length = near.distance[pairs]
        if len(pairs) == 0:
            continue
        bonded = length < BONDED * np.percentile(length, 1)  # whatever the unit
        pairs, length = pairs[bonded], length[bonded]
        along = -np.einsum("ek,ek->e", forces[near.i[pairs]], near.vector[pairs]) / length
        known = np.isfinite(along)
        if known.sum() < ENOUGH:
            continue
        slope, explained = _line(length[known], along[known])
        if explained > 0.5:
            found += [-slope / constant] * int(known.sum())
    return median(np.array(found))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of y on x and the part of the variance it explains, without the outer twentieths of x."""
    low, high = np.percentile(x, (5, 95))
    inside = (x >= low) & (x <= high)
    x, y = x[inside] - x[inside].mean(), y[inside] - y[inside].mean()
    xx, yy, xy = float(x @ x), float(y @ y), float(x @ y)
    return (xy / xx, xy * xy / (xx * yy)) if xx > 0 and yy > 0 else (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Steps:
    """Pairs of neighbouring frames: change of energy, work of the forces, work of the stress, eV; numbers of atoms.

    All (pairs,).
    """

    change: np.ndarray
    by_forces: np.ndarray
    by_stress: np.ndarray
    natoms: np.ndarray

    def per_atom(self) -> "Steps":
        """As they are if what is called the energy is that of an atom."""
        return Steps(self.change * self.natoms, self.by_forces, self.by_stress, self.natoms)

    def forces(self) -> Measured:
        """Change of energy over work of the forces, where the stress does little."""
        return self._ratio(self.by_forces, self.by_stress)

    def stress(self) -> Measured:
        """Change of energy over work of the stress, where the forces do little."""
        return self._ratio(self.by_stress, self.by_forces)

    def _ratio(self, this: np.ndarray, other: np.ndarray) -> Measured:
        # Little, against what the energy does as well as against this work: one of the two may have a wrong unit.
        chosen = (np.maximum(np.abs(this), np.abs(self.change)) > 3 * np.abs(other)) & (this != 0)
        if chosen.any():  # small steps drown in the rounding of energies and positions
            chosen &= np.abs(this) > 0.3 * np.median(np.abs(this[chosen]))
        change, this, other = self.change[chosen], this[chosen], other[chosen]
        # The other work has the unit of the energy, or that of this work: whichever agrees better with itself.
        both = median((change - other) / this), median(change / np.where(this + other == 0, np.nan, this + other))
        return min(both, key=lambda measured: measured.spread)


def steps(packed: Packed, energy: np.ndarray, forces: np.ndarray, stress: np.ndarray | None, most: int) -> Steps:
    """Frames of the same atoms in the same order that come soon after each other; at most `most` pairs of them.

    The work is that of the mean of both forces (and stresses): exact to second order in the displacement.
    """
    pairs = _pairs(packed, energy)
    if len(pairs) > most:
        pairs = pairs[np.linspace(0, len(pairs) - 1, most).astype(int)]
    found = [_step(packed, energy, forces, stress, a, b) for a, b in pairs.tolist()]
    kept = np.array([step for step in found if step is not None]).reshape(-1, 3)
    natoms = packed.natoms[[a for (a, _), step in zip(pairs.tolist(), found, strict=True) if step is not None]]
    return Steps(kept[:, 0], kept[:, 1], kept[:, 2], natoms)


def _pairs(packed: Packed, energy: np.ndarray) -> np.ndarray:
    """(pairs, 2) structures with the same atoms, the same periodicity, and energies."""
    natoms, offsets, known = packed.natoms, packed.offsets, np.isfinite(energy)
    out = []
    for lag in LAGS:
        a = np.arange(max(len(natoms) - lag, 0))
        a = a[(natoms[a] == natoms[a + lag]) & known[a] & known[a + lag]]
        a = a[(packed.pbc[a] == packed.pbc[a + lag]).all(axis=1)]
        for i in a.tolist():
            one, two = (packed.numbers[offsets[s] : offsets[s + 1]] for s in (i, i + lag))
            if (one == two).all():
                out.append((i, i + lag))
    return np.array(sorted(out), np.int64).reshape(-1, 2)


def _step(
    packed: Packed, energy: np.ndarray, forces: np.ndarray, stress: np.ndarray | None, a: int, b: int
) -> tuple[float, float, float] | None:
    """Change, work of the forces, work of the stress from structure a to b; None where they are not neighbours."""
    atoms = [slice(packed.offsets[s], packed.offsets[s + 1]) for s in (a, b)]
    x, y = (packed.positions[part].astype(np.float64) for part in atoms)
    f, g = (forces[part].astype(np.float64) for part in atoms)
    by_stress = strained = 0.0
    if not packed.pbc[a].any():
        x, y, turn = _superposed(x, y)
        moved, g = y - x, g @ turn
    elif packed.pbc[a].all():
        moved, strain, volume = _deformed(x, y, packed.cell[a], packed.cell[b])
        strained = float(np.abs(strain).max())
        if strained > STRAIN or (strained > 1e-6 and stress is None):
            return None
        if stress is not None:
            by_stress = float(volume * np.sum((stress[a] + stress[b]) / 2 * strain))
    else:
        return None
    by_forces = float(-np.sum((f + g) / 2 * moved))
    furthest = float(np.abs(moved).max())
    if furthest > NEAR or max(furthest, 100 * strained) < STILL or not np.isfinite(by_forces + by_stress):
        return None
    return float(energy[b] - energy[a]), by_forces, by_stress


def _superposed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y about their centres, y turned onto x (Kabsch), and the turn."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    u, _, v = np.linalg.svd(y.T @ x)
    turn = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ v))]) @ v
    return x, y @ turn, turn


def _deformed(x: np.ndarray, y: np.ndarray, h: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """How atoms moved beside the deformation of the cell h to k, its strain (3, 3), and the mean volume."""
    mean = (h + k) / 2
    fractional = y @ np.linalg.inv(k) - x @ np.linalg.inv(h)
    moved = (fractional - np.round(fractional)) @ mean
    strain = np.linalg.solve(mean, k - h)
    return moved - moved.mean(axis=0), (strain + strain.T) / 2, float(abs(np.linalg.det(mean)))
