"""Single points with extended tight binding (the `tblite` wheel), in our units.

    GFN1-xTB   Grimme, Bannwarth, Shushkov, J. Chem. Theory Comput. 13, 1989 (2017)
    GFN2-xTB   Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019)
    IPEA1-xTB  Asgeirsson, Bauer, Grimme, Chem. Sci. 8, 4879 (2017)

Closed shells only. Periodic calculations sample the Gamma point only and are therefore not size-consistent.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.units import Bohr, Hartree

from multifid.structures.elements import SYMBOLS

LARGEST_FORCE = 30.0  # eV/angstrom: above it, atoms overlap and tight binding means nothing
# tblite's threshold factor for crystals: 0.04 meV/atom and 1e-3 eV/angstrom from its default 1.0, 40 % faster
ACCURACY = 30.0


class Unusable(Exception):
    """A structure without labels; its message is the short constant reason that is counted."""


@dataclass(frozen=True, slots=True)
class Point:
    """A structure and what one level of theory says of it."""

    numbers: np.ndarray  # (atoms,)
    positions: np.ndarray  # (atoms, 3) angstrom
    energy: float  # eV, total
    forces: np.ndarray  # (atoms, 3) eV/angstrom
    gap: float  # eV, from the highest occupied to the lowest empty orbital
    cell: np.ndarray | None = None  # (3, 3) angstrom, rows = vectors
    stress: np.ndarray | None = None  # (3, 3) eV/angstrom^3, tension-positive


@dataclass(slots=True)
class JobResult:
    """What a job hands back: its records, and how many it had to skip for which reason."""

    records: list = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)


def interface() -> Any:
    """tblite's Python interface, imported only when something is to be computed."""
    try:
        import tblite.interface
    except ImportError as error:
        raise ValueError("multifid sample computes its labels with tblite: pip install 'multifid[demo]'") from error
    return tblite.interface


def singlepoint(
    method: str,
    numbers: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray | None = None,
    *,
    dispersion: bool = True,
    unpaired: int = 0,
) -> Point:
    """Energy, forces and stress of one structure.

    `positions` (atoms, 3) and `cell` (3, 3) in angstrom; without a cell, a molecule. `dispersion=False` leaves out the
    D3 term of GFN1-xTB or IPEA1-xTB, which depends on the geometry alone, so that the difference is that term.
    `unpaired` electrons are for free atoms. Raises Unusable where the self-consistent field fails or a force is absurd.
    """
    tblite = interface()
    lattice = {} if cell is None else {"lattice": cell / Bohr, "periodic": np.ones(3, bool)}
    parameters = method if dispersion else _without_dispersion(method, frozenset(SYMBOLS[int(z)] for z in numbers))
    try:
        calculator = tblite.Calculator(parameters, np.asarray(numbers), positions / Bohr, uhf=unpaired, **lattice)
        calculator.set("verbosity", 0)
        calculator.set("accuracy", ACCURACY if cell is not None else 1.0)
        result = calculator.singlepoint()
    except tblite.TBLiteRuntimeError as error:
        converged = "not converged" not in str(error)
        raise Unusable("eigenvalue problem failed" if converged else "SCF did not converge") from error

    energy = float(result.get("energy") * Hartree)
    forces = -result.get("gradient") * Hartree / Bohr
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise Unusable("energy or forces are not finite")
    if np.linalg.norm(forces, axis=1).max(initial=0.0) > LARGEST_FORCE:
        raise Unusable(f"a force above {LARGEST_FORCE:.0f} eV/angstrom")
    stress = None
    if cell is not None:  # the virial is dE/d(strain): positive where the cell wants to contract, i.e. under tension
        virial = result.get("virial") * Hartree
        stress = (virial + virial.T) / 2 / abs(np.linalg.det(cell))
    return Point(np.asarray(numbers), positions, energy, forces, _gap(result), cell, stress)


def _gap(result) -> float:
    energies, occupied = result.get("orbital-energies") * Hartree, result.get("orbital-occupations") > 1.0
    if occupied.all() or not occupied.any():
        return float("nan")
    return float(energies[~occupied].min() - energies[occupied].max())


@cache
def _without_dispersion(method: str, elements: frozenset[str]) -> dict:
    """The method's parameters less dispersion, cut down to these elements: tblite reads 86 of them in 90 ms."""
    from tblite import library

    export = {"GFN1-xTB": library.export_gfn1_param, "IPEA1-xTB": library.export_ipea1_param}[method]
    parameters, table = library.new_param(), library.new_table()
    export(parameters)
    library.dump_param(parameters, table)
    kept = {key: value for key, value in library.table_to_dict(table).items() if key != "dispersion"}
    kept["element"] = {symbol: own for symbol, own in kept["element"].items() if symbol in elements}
    pairs = kept["hamiltonian"]["xtb"]["kpair"]
    kept["hamiltonian"]["xtb"]["kpair"] = {p: k for p, k in pairs.items() if set(p.split("-")) <= elements}
    return kept


class XTB(Calculator):
    """The same single points as an ASE calculator, for ASE's optimisers; keeps every point it has computed."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012  (ASE declares a list)

    def __init__(self, method: str):
        super().__init__()
        self.method = method
        self.points: list[Point] = []

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        cell = atoms.cell.array.copy() if atoms.pbc.any() else None
        point = singlepoint(self.method, atoms.numbers, atoms.positions.copy(), cell)
        self.points.append(point)
        self.results = {"energy": point.energy, "forces": point.forces}
        if point.stress is not None:
            self.results["stress"] = point.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
