"""Whether declared units are believed: measurements of `evidence` against what the mistakes people make would give.

A doubt is raised where a measurement is far from 1 and close to what one of these mistakes makes of it, or so far away
that nothing else can be right. Where nothing can be measured (relaxed crystals without a trajectory say little of the
unit of their forces) there is no doubt: silence is no proof.
"""

import math
from dataclasses import dataclass

import numpy as np

from multifid.data.evidence import Measured, lengths, neighbors, steps, stretch, totals
from multifid.structures.structure import Packed, PackedLabels

STEPS = 600  # pairs of frames that are compared, at most
BOHR = 0.529177210903
HARTREE, RYDBERG, KCAL, KJ = 27.211386245988, 13.605693122994, 96485.33212331 / 4184.0, 96485.33212331 / 1000.0

# What a mistake multiplies true numbers by -> what it looks like.
LENGTHS = {
    1 / BOHR: "bohr taken for angstrom",
    BOHR: "angstrom taken for bohr",
    0.1: "nanometres taken for angstrom",
    10.0: "angstrom taken for nanometres",
    100.0: "picometres taken for angstrom",
}
ENERGIES = {
    1 / HARTREE: "hartree taken for eV",
    1 / RYDBERG: "rydberg taken for eV",
    KCAL: "kcal/mol taken for eV",
    KJ: "kJ/mol taken for eV",
    1000.0: "meV taken for eV",
    HARTREE: "eV taken for hartree",
    RYDBERG: "eV taken for rydberg",
    1 / KCAL: "eV taken for kcal/mol",
    1 / KJ: "eV taken for kJ/mol",
    KCAL * HARTREE: "kcal/mol taken for hartree",
}
FORCES = {
    -1.0: "the gradient taken for the forces (the sign is wrong)",
    1 / HARTREE: "hartree/angstrom taken for eV/angstrom",
    BOHR / HARTREE: "hartree/bohr taken for eV/angstrom",
    BOHR: "hartree/bohr taken for hartree/angstrom",
    1 / BOHR: "hartree/angstrom taken for hartree/bohr",
    KCAL: "kcal/mol/angstrom taken for eV/angstrom",
    KJ: "kJ/mol/angstrom taken for eV/angstrom",
    1000.0: "meV/angstrom taken for eV/angstrom",
    HARTREE: "eV/angstrom taken for hartree/angstrom",
    HARTREE / BOHR: "eV/angstrom taken for hartree/bohr",
    1 / KCAL: "eV/angstrom taken for kcal/mol/angstrom",
}
# What a mistake makes of the change of energy, in units of the work of the forces.
WORK = {
    -1.0: "the gradient taken for the forces (the sign is wrong)",
    1 / HARTREE: "energies in hartree beside forces in eV/angstrom",
    KCAL: "energies in kcal/mol beside forces in eV/angstrom",
    KJ: "energies in kJ/mol beside forces in eV/angstrom",
    HARTREE: "forces in hartree/angstrom beside energies in eV",
    HARTREE / BOHR: "forces in hartree/bohr beside energies in eV",
    1 / KCAL: "forces in kcal/mol/angstrom beside energies in eV",
    1 / KJ: "forces in kJ/mol/angstrom beside energies in eV",
    1 / BOHR: "forces per bohr taken for forces per angstrom",
    BOHR: "forces per angstrom taken for forces per bohr",
}
STRESSES = {
    -1.0: "a stress that is positive under compression (the sign is wrong)",
    1602.1766208: "kbar taken for eV/angstrom^3",
    -1602.1766208: "VASP's kbar, positive under compression, taken for eV/angstrom^3",
    160.21766208: "GPa taken for eV/angstrom^3",
    -160.21766208: "GPa, positive under compression, taken for eV/angstrom^3",
    1 / 1602.1766208: "eV/angstrom^3 taken for kbar",
    -1 / 1602.1766208: "eV/angstrom^3 taken for VASP's kbar",
}


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why the units of something are not believed: what (`positions`, or a task's labels), what it looks like, why."""

    what: str
    looks_like: str
    because: str

    def __str__(self) -> str:
        return f"{self.what}: looks like {self.looks_like}; {self.because}"


def doubts(sample: Packed, geometry: Packed) -> list[Doubt]:
    """What is doubtful of a sample of a store.

    sample: consecutive structures, or runs of them. geometry: fewer, whose neighbours are looked at.
    """
    near = neighbors(geometry)
    of_positions = _of_lengths(lengths(geometry, near))
    found = [of_positions]
    for task, labels in sample.labels.items():
        found.append(_of_totals(task, totals(sample, labels.energy)))
        own = geometry.labels[task].forces
        if of_positions is not None or labels.forces is None or own is None:
            continue  # forces are judged by displacements
        between = steps(sample, labels.energy, labels.forces, labels.stress, STEPS)
        of_forces = _of_stretch(task, stretch(geometry, near, own)) or _of_steps(task, between.forces())
        found += [of_forces or _of_magnitude(task, labels.forces), _of_stress(task, labels, between.stress())]
    return [doubt for doubt in found if doubt is not None]


def doubt_of_crystals(task: str, level: str, sample: Packed, energy: np.ndarray) -> Doubt | None:
    """VASP's totals refer to its own atoms: a compound has -10 to -1 eV per atom, in whatever set of many compounds."""
    known = np.isfinite(energy) & sample.pbc.all(axis=1)
    if "VASP" not in level or known.sum() < 20:
        return None
    typical = float(np.median((energy / sample.natoms)[known]))
    if 0.6 < -typical < 40:
        return None
    looks = "kcal/mol or kJ/mol" if typical < -40 else "hartree or rydberg, or formation energies"
    because = f"half of the structures have less than {typical:.3g} eV/atom, where VASP gives -10 to -1"
    return Doubt(f"energies of {task}", f"{looks} taken for VASP's totals in eV", because)


def _of_lengths(found: Measured) -> Doubt | None:
    if found.spread > 0.25 or 0.65 < found.ratio < 1.5:
        return None
    because = f"neighbours are {found.ratio:.3g} covalent bonds apart (median of {found.count:,} atoms)"
    return _doubt("positions", found.ratio, LENGTHS, 1.25, because)


def _of_totals(task: str, found: Measured) -> Doubt | None:
    if found.spread > 0.05 or not found.ratio > 0:
        return None
    because = f"totals are {found.ratio:.3g} times those of free atoms in eV (median of {found.count:,})"
    return _doubt(f"energies of {task}", found.ratio / 1.01, ENERGIES, 1.025, because)  # bonds add about 1 %


def _of_magnitude(task: str, forces: np.ndarray) -> Doubt | None:
    size = np.linalg.norm(forces[np.isfinite(forces).all(axis=1)].astype(np.float64), axis=1)
    if len(size) < 20 or np.median(size) < 20:
        return None
    because = f"half of the atoms feel more than {np.median(size):.3g} eV/angstrom"
    return Doubt(f"forces of {task}", "a much smaller unit taken for eV/angstrom, as kcal/mol/angstrom", because)


def _of_stretch(task: str, found: Measured) -> Doubt | None:
    if not math.isfinite(found.ratio) or 0.63 < found.ratio < 1.6:
        return None
    because = f"X-H bonds are {found.ratio:.3g} times as stiff as they are known to be ({found.count:,} bonds)"
    return _doubt(f"forces of {task}", found.ratio, FORCES, 1.4, because)


def _of_steps(task: str, found: Measured) -> Doubt | None:
    if found.spread > 0.8 or 0.7 < found.ratio < 1.45:
        return None
    because = (
        f"between neighbouring frames the energy changes by {found.ratio:.3g} times the work of the forces "
        f"(median of {found.count:,} pairs)"
    )
    return _doubt(f"energies or forces of {task}", found.ratio, WORK, 1.35, because)


def _of_stress(task: str, labels: PackedLabels, found: Measured) -> Doubt | None:
    if labels.stress is None:
        return None
    known = labels.stress[np.isfinite(labels.stress).all(axis=(1, 2))]
    size = np.abs(known).max(axis=(1, 2), initial=0.0)
    if len(size) >= 20 and np.median(size) > 3:
        because = f"half of the structures have a component above {np.median(size):.3g} eV/angstrom^3 (480 GPa are 3)"
        return Doubt(f"stress of {task}", "kbar or GPa taken for eV/angstrom^3", because)
    if found.spread > 0.8 or 0.7 < found.ratio < 1.45:
        return None
    because = (
        f"between neighbouring frames the energy changes by {found.ratio:.3g} times the work of the stress "
        f"(median of {found.count:,} pairs)"
    )
    return _doubt(f"stress of {task}", 1 / found.ratio, STRESSES, 1.35, because)


def _doubt(what: str, ratio: float, mistakes: dict[float, str], within: float, because: str) -> Doubt | None:
    """The mistakes that a ratio looks like, the nearest first: those within a factor. None if there is none."""

    def distance(factor: float) -> float:
        return abs(math.log(ratio / factor)) if ratio * factor > 0 else math.inf

    near = [factor for factor in sorted(mistakes, key=distance) if distance(factor) < math.log(within)]
    if not near:
        return None
    return Doubt(what, " or ".join(mistakes[factor] for factor in near[:2]), because)
