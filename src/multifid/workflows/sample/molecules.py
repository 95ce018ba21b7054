"""The molecules of the molecular sources: H, C, N, O; closed shells; up to 12 atoms, or 9 to 26; how to distort them.

Half of them are ASE's copy of the G2 set (Curtiss et al., J. Chem. Phys. 106, 1063 (1997)), the rest are made by
joining two molecules, each less one hydrogen, and relaxing. No network, no file.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.data import covalent_radii
from ase.optimize import BFGS

from multifid.structures.elements import formula
from multifid.workflows.sample.xtb import XTB, Unusable

# fmt: off
G2 = (
    "H2O", "NH3", "CH4", "H2O2", "N2H4", "HCN", "CO2", "C2H2", "C2H4", "C2H6", "H2CO", "CH3OH", "H3CNH2", "HCOOH",
    "H2CCO", "NCCN", "OCHCHO", "CH3CHO", "CH2OCH2", "CH3CN", "CH3ONO", "CH3NO2", "CH3CH2OH", "CH3OCH3", "CH3COOH",
    "HCOOCH3", "CH3CONH2", "CH2NHCH2", "C2H6NH", "CH3CH2NH2", "C3H4_D2d", "C3H4_C3v", "C3H4_C2v", "C3H6_D3h", "C3H6_Cs",
    "C3H8", "H2CCHCN", "CH3COCH3", "CH3CH2OCH3", "C2H6CHOH", "C4H4O", "C4H4NH", "C5H5N", "C6H6", "butadiene",
    "2-butyne", "cyclobutene", "bicyclobutane", "methylenecyclopropane", "isobutene", "cyclobutane",
)
# name: (molecule, atom that loses a hydrogen, other molecule, its atom that loses a hydrogen); a molecule may be a
# name from above or from an earlier line; an atom is a symbol: the first of this element that carries a hydrogen
JOINED = {
    "ethenol": ("C2H4", "C", "H2O", "O"),                   "ethenamine": ("C2H4", "C", "NH3", "N"),
    "hydroxylamine": ("NH3", "N", "H2O", "O"),              "N-methylhydroxylamine": ("hydroxylamine", "N", "CH4", "C"),
    "methoxyamine": ("CH3OH", "O", "NH3", "N"),             "aminomethanol": ("CH3OH", "C", "NH3", "N"),
    "formamide": ("H2CO", "C", "NH3", "N"),                 "N-methylformamide": ("formamide", "N", "CH4", "C"),
    "urea": ("formamide", "C", "NH3", "N"),                 "carbamic acid": ("HCOOH", "C", "NH3", "N"),
    "carbonic acid": ("HCOOH", "C", "H2O", "O"),            "methanediol": ("CH3OH", "C", "H2O", "O"),
    "methyl peroxide": ("H2O2", "O", "CH4", "C"),           "dimethyl peroxide": ("methyl peroxide", "O", "CH4", "C"),
    "1,2-ethanediol": ("CH3OH", "C", "CH3OH", "C"),         "glycolaldehyde": ("H2CO", "C", "CH3OH", "C"),
    "cyanamide": ("HCN", "C", "NH3", "N"),                  "glycolonitrile": ("HCN", "C", "CH3OH", "C"),
    "glycine": ("HCOOH", "C", "H3CNH2", "C"),               "glycolic acid": ("HCOOH", "C", "CH3OH", "C"),
    "propanal": ("H2CO", "C", "C2H6", "C"),                 "propenal": ("H2CO", "C", "C2H4", "C"),
    "methoxyethene": ("ethenol", "O", "CH4", "C"),          "2-propenol": ("C2H4", "C", "CH3OH", "C"),
    "methylketene": ("H2CCO", "C", "CH4", "C"),             "propynal": ("H2CO", "C", "C2H2", "C"),
    "propanenitrile": ("HCN", "C", "C2H6", "C"),            "propynenitrile": ("HCN", "C", "C2H2", "C"),
    "methylhydrazine": ("N2H4", "N", "CH4", "C"),           "ethane-1,2-diamine": ("H3CNH2", "C", "H3CNH2", "C"),
    "methylglyoxal": ("OCHCHO", "C", "CH4", "C"),           "propenoic acid": ("HCOOH", "C", "C2H4", "C"),
    "butadiyne": ("C2H2", "C", "C2H2", "C"),                "butenyne": ("C2H2", "C", "C2H4", "C"),
    "propargyl alcohol": ("C2H2", "C", "CH3OH", "C"),       "cyclopropanol": ("C3H6_D3h", "C", "H2O", "O"),
    "aminoacetonitrile": ("HCN", "C", "H3CNH2", "C"),       "methyloxirane": ("CH2OCH2", "C", "CH4", "C"),
}
# fmt: on
# joined in pairs and in threes, each by its first carbon
PARTS = ("C6H6", "C5H5N", "C4H4O", "C3H8", "C2H6CHOH", "CH3CONH2", "CH3OH", "CH3CH2NH2", "HCOOCH3", "glycine")
SMALLEST, LARGEST, OF_A_SIZE = 9, 26, 2  # atoms of the larger molecules, and how many molecules there are of each size
LARGEST_FORCE, STEPS = 0.05, 200  # eV/angstrom: where a relaxation ends; steps: where it is given up


@dataclass(frozen=True, slots=True)
class Molecule:
    """A relaxed molecule; atoms sorted by atomic number, so that isomers list the same elements in the same order."""

    name: str
    numbers: np.ndarray  # (atoms,)
    positions: np.ndarray  # (atoms, 3) angstrom

    @property
    def formula(self) -> str:
        return formula(self.numbers)


@cache
def library() -> dict[str, Molecule]:
    """All molecules by name, before relaxation."""
    found = {}
    for name in (*G2, *JOINED):
        atoms = _built(name)
        order = np.argsort(atoms.numbers, kind="stable")
        found[name] = Molecule(name, atoms.numbers[order], atoms.positions[order])
    return found


@cache
def larger() -> dict[str, Molecule]:
    """Molecules as large as those of published data, as many of each size, by the names of their parts; unrelaxed."""
    made = {(name,): _built(name) for name in PARTS}
    for one, other in [*itertools.product(PARTS, PARTS), *itertools.product(itertools.product(PARTS, PARTS), PARTS)]:
        parts = one if isinstance(one, tuple) else (one,)
        if list(parts) == sorted(parts) and parts[-1] <= other and len(made[parts]) + len(made[other,]) - 2 <= LARGEST:
            made[*parts, other] = _join(made[parts], "C", made[other,], "C")
    found: dict[str, Molecule] = {}
    for parts, atoms in made.items():
        alike = sum(len(m.numbers) == len(atoms) for m in found.values())
        if len(atoms) >= SMALLEST and alike < OF_A_SIZE:
            order = np.argsort(atoms.numbers, kind="stable")
            name = " + ".join(parts)
            found[name] = Molecule(name, atoms.numbers[order], atoms.positions[order])
    return found


@cache
def relaxed(name: str, method: str) -> Molecule:
    """The molecule at its minimum. Raises Unusable where the relaxation fails or breaks a bond.

    Kept per process: sources share molecules, and reactions share end points.
    """
    start = library().get(name) or larger()[name]
    atoms = Atoms(start.numbers, start.positions)
    atoms.calc = XTB(method)
    if not BFGS(atoms, logfile=None).run(fmax=LARGEST_FORCE, steps=STEPS):
        raise Unusable(f"relaxation did not end in {STEPS} steps")
    if not np.array_equal(bonds(start.numbers, start.positions), bonds(start.numbers, atoms.positions)):
        raise Unusable("relaxation changed the bonds")
    return Molecule(name, start.numbers, storable(atoms.positions))


def _built(name: str) -> Atoms:
    if name in JOINED:
        one, symbol, other, other_symbol = JOINED[name]
        return _join(_built(one), symbol, _built(other), other_symbol)
    return Atoms(molecule(name).numbers, molecule(name).positions)


def bonds(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(atoms, atoms) bool: closer than 1.25 times the sum of the covalent radii."""
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bonded = distances < 1.25 * (covalent_radii[numbers][:, None] + covalent_radii[numbers][None])
    np.fill_diagonal(bonded, False)
    return bonded


def _open_at(atoms: Atoms, symbol: str) -> tuple[Atoms, int, np.ndarray]:
    """Without a hydrogen of the first `symbol` atom that has one; that atom; the unit vector of the bond cut."""
    bonded = bonds(atoms.numbers, atoms.positions)
    for i in np.flatnonzero(np.array(atoms.get_chemical_symbols()) == symbol):
        hydrogens = np.flatnonzero(bonded[i] & (atoms.numbers == 1))
        if len(hydrogens):
            h = int(hydrogens[0])
            direction = atoms.positions[h] - atoms.positions[i]
            kept = [k for k in range(len(atoms)) if k != h]
            return atoms[kept], kept.index(int(i)), direction / np.linalg.norm(direction)
    raise ValueError(f"no hydrogen on any {symbol} of {atoms.get_chemical_formula()}")


def _join(one: Atoms, symbol: str, other: Atoms, other_symbol: str) -> Atoms:
    """One bond where two hydrogens were, in the rotation about it that keeps the two halves farthest apart."""
    one, i, u = _open_at(one, symbol)
    other, j, v = _open_at(other, other_symbol)
    one.translate(-one.positions[i])
    other.translate(-other.positions[j])
    other.rotate(v, -u)
    length = covalent_radii[one.numbers[i]] + covalent_radii[other.numbers[j]]
    best, clearance = Atoms(), -1.0
    for angle in range(0, 360, 30):
        turned = other.copy()
        turned.rotate(angle, u)
        turned.translate(length * u)
        apart = np.linalg.norm(one.positions[:, None] - turned.positions[None], axis=-1)
        apart[i, j] = np.inf
        if apart.min() > clearance + 1e-6:
            best, clearance = one + turned, apart.min()
    return best


def distorted(mol: Molecule, rng: np.random.Generator, thermal: float) -> np.ndarray:
    """Positions displaced along the normal modes of a model Hessian, each mode with the mean energy `thermal`/2 (eV).

    Stiff bonds move little and soft torsions much, as at a temperature, without the cost of a real Hessian: springs
    between all pairs, 45 eV/angstrom^2 for a bond and falling off as in Lindh et al., Chem. Phys. Lett. 241, 423
    (1995), and a weak spring to each atom's place, which bounds the softest modes.
    """
    x, n = mol.positions, len(mol.positions)
    r = x[:, None] - x[None]
    d2 = (r**2).sum(-1) + np.eye(n)
    d0 = covalent_radii[mol.numbers][:, None] + covalent_radii[mol.numbers][None]
    k = 45.0 * np.exp(2.0 * (1.0 - d2 / d0**2)) * (1.0 - np.eye(n))
    blocks = -k[..., None, None] * r[..., :, None] * r[..., None, :] / d2[..., None, None]  # (i, j, 3, 3)
    blocks[np.arange(n), np.arange(n)] = -blocks.sum(1)
    hessian = blocks.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n) + 4.0 * np.eye(3 * n)
    stiffness, modes = np.linalg.eigh(hessian)
    displacement = modes @ (np.sqrt(thermal / stiffness) * rng.standard_normal(3 * n))
    return x + displacement.reshape(n, 3)


def storable(positions: np.ndarray) -> np.ndarray:
    """Positions as float32 keeps them: labels belong to the geometry in the file, not to one 1e-7 angstrom off."""
    return positions.astype(np.float32).astype(np.float64)
