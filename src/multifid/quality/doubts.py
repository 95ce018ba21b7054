"""Whether declared units are believed: measurements of `evidence` against what the mistakes people make would give.

A doubt is raised where a measurement is far from 1 and close to what one of these mistakes makes of it, or so far away
that nothing else can be right: a factor without a name is a mistake too. Where nothing can be measured (relaxed
crystals without a trajectory say little of the unit of their forces) there is no doubt: silence is no proof.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from multifid.quality.atom_energies import FreeAtoms, free_atoms
from multifid.quality.evidence import Measured
from multifid.quality.measure import Measurements, measure
from multifid.structures.elements import SYMBOLS
from multifid.structures.structure import Packed, PackedLabels

BOHR = 0.529177210903
HARTREE, RYDBERG, KCAL, KJ = 27.211386245988, 13.605693122994, 96485.33212331 / 4184.0, 96485.33212331 / 1000.0
UNEXPLAINED = 2.0  # a ratio beyond this factor is a mistake, whatever it is called
CRUDE = 3.0  # the same, for ratios to what a pair potential gives
BELIEVED = 0.8  # the largest spread of a ratio that says something
NOT_TOTALS = 2.0  # of `extensive`: totals give below 0.2, energies per atom above 4, aligned energies 1
NAMED = 12.0  # eV: the largest strain (`FreeAtoms`) with which a unit gets the blame
LARGE_STRESS = 5.0  # of `stress_size`: published samples give below 0.4, GPa 160 times that

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
PER_ATOM = "energies per atom taken for totals"


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
    return doubts_of(sample, measure(sample, geometry))


def doubts_of(sample: Packed, measured: Mapping[str, Measurements]) -> list[Doubt]:
    """What is doubtful of a sample that was measured."""
    of_positions = _of_lengths(_get(measured["geometry"], "lengths"))
    found = [of_positions]
    for task in sample.labels:
        found += _of_task(task, sample, measured[task], believed=of_positions is None)
    return [doubt for doubt in found if doubt is not None]


def _of_task(task: str, sample: Packed, own: Measurements, believed: bool) -> list[Doubt | None]:
    """believed: the positions are, so that forces can be judged by displacements."""
    labels = sample.labels[task]
    if not believed or labels.forces is None:
        return [_of_totals(task, own) or _of_extensive(task, own)]
    between = _of_steps(task, own) or _of_fit(task, own)
    of_forces = _of_stretch(task, _get(own, "stretch")) or between or _of_magnitude(task, labels.forces)
    # A stress is measured against energies and forces: where they are doubtful, it cannot be judged.
    of_stress = _of_components(task, labels) or (None if of_forces else _of_stress(task, sample, own))
    return [_of_totals(task, own) or (None if between else _of_extensive(task, own)), of_forces, of_stress]


def doubt_of_free_atoms(task: str, sample: Packed, energy: np.ndarray, given: Mapping[int, float]) -> Doubt | None:
    """Whether energies of free atoms that were given belong to the totals: compared with what a fit makes of them."""
    found = free_atoms(sample, energy, given)
    absurd = found.absurd()
    if not absurd:
        return None
    looks = _of_unit(sample, energy, given) or _of_cores(found) or "energies of another method or zero"
    told = ", ".join(
        f"{SYMBOLS[z]} {found.given[z]:.2f} where the totals give about {found.given[z] - found.gains[z]:.2f}"
        for z in absurd[:4]
    )
    more = f" and {len(absurd) - 4} elements more" if len(absurd) > 4 else ""
    because = f"{told}{more} eV, but atoms gain a few eV where they are bound"
    return Doubt(f"energies of free atoms of {task}", looks, because)


def _of_cores(found: FreeAtoms) -> str | None:
    if found.all_electrons(fitted=False):
        return "atoms with all their electrons beside totals of valence electrons (pseudopotentials)"
    if found.all_electrons(fitted=True) and not found.all_electrons(fitted=False):
        return "atoms with valence electrons alone beside totals of all electrons"
    return None


def _of_unit(sample: Packed, energy: np.ndarray, given: Mapping[int, float]) -> str | None:
    """The unit in which the given energies would go best with the totals, if they then gain what bonds give."""
    strain = {f: free_atoms(sample, energy, {z: e / f for z, e in given.items()}).strain() for f in ENERGIES}
    best = min(strain, key=lambda factor: strain[factor])
    return ENERGIES[best] if strain[best] < NAMED else None


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


def _of_totals(task: str, own: Measurements) -> Doubt | None:
    found, per_atom = _get(own, "totals"), _get(own, "totals_per_atom")
    if per_atom.spread < 0.05 and abs(per_atom.ratio / 1.01 - 1) < 0.025:
        because = f"they are {per_atom.ratio:.3g} times those of free atoms in eV, divided by the number of atoms"
        return Doubt(f"energies of {task}", PER_ATOM, f"{because} (median of {per_atom.count:,})")
    if found.spread > 0.05 or not found.ratio > 0:
        return None
    because = f"totals are {found.ratio:.3g} times those of free atoms in eV (median of {found.count:,})"
    return _doubt(f"energies of {task}", found.ratio / 1.01, ENERGIES, 1.025, because)  # bonds add about 1 %


def _of_extensive(task: str, own: Measurements) -> Doubt | None:
    found = _get(own, "extensive")
    if not found.ratio > NOT_TOTALS:
        return None
    because = (
        f"a sum over atoms describes them {found.ratio:.3g} times worse than a mean over atoms "
        f"({found.count:,} structures of various sizes)"
    )
    return Doubt(f"energies of {task}", PER_ATOM, because)


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
    return _doubt(f"forces of {task}", found.ratio, FORCES, 1.4, because, beyond=UNEXPLAINED)


def _of_steps(task: str, own: Measurements) -> Doubt | None:
    found = _get(own, "work")
    if found.spread > BELIEVED or 0.7 < found.ratio < 1.45:
        found = _get(own, "work_per_atom") if found.spread > BELIEVED else Measured()
        return _per_atom(task, found, 1.2)  # molecules of many sizes
    because = (
        f"between neighbouring frames the energy changes by {found.ratio:.3g} times the work of the forces "
        f"(median of {found.count:,} pairs, spread {found.spread:.2f})"
    )
    also = [PER_ATOM] if _near_one(_get(own, "work_per_atom"), 1.2) else []
    return _doubt(f"energies or forces of {task}", found.ratio, WORK, 1.35, because, also, UNEXPLAINED)


def _of_fit(task: str, own: Measurements) -> Doubt | None:
    found = _get(own, "fit_energy")
    if "work" in own or found.spread > BELIEVED or 1 / CRUDE < found.ratio < CRUDE:
        return None
    because = (
        f"energies differ by {found.ratio:.3g} times what a pair potential fitted to the forces gives "
        f"(median of {found.count:,} pairs of structures, spread {found.spread:.2f})"
    )
    also = [PER_ATOM] if _near_one(_get(own, "fit_energy_per_atom"), 1.5) else []
    return _doubt(f"energies or forces of {task}", found.ratio, WORK, 1.6, because, also, CRUDE)


def _per_atom(task: str, found: Measured, within: float) -> Doubt | None:
    if not _near_one(found, within):
        return None
    because = f"times the number of atoms, they change by {found.ratio:.3g} times the work of the forces"
    return Doubt(f"energies of {task}", PER_ATOM, f"{because} (median of {found.count:,} pairs)")


def _near_one(found: Measured, within: float) -> bool:
    return found.spread < BELIEVED and 1 / within < found.ratio < within


def _of_components(task: str, labels: PackedLabels) -> Doubt | None:
    if labels.stress is None:
        return None
    known = labels.stress[np.isfinite(labels.stress).all(axis=(1, 2))]
    size = np.abs(known).max(axis=(1, 2), initial=0.0)
    if len(size) < 20 or np.median(size) < 3:
        return None
    because = f"half of the structures have a component above {np.median(size):.3g} eV/angstrom^3 (480 GPa are 3)"
    return Doubt(f"stress of {task}", "kbar or GPa taken for eV/angstrom^3", because)


def _of_stress(task: str, sample: Packed, own: Measurements) -> Doubt | None:
    """By its work, or by what a pair potential says, whichever is spread less; else by its size."""
    what, work, fit = f"stress of {task}", _get(own, "stress_work"), _get(own, "fit_stress")
    volume = float(np.median(np.abs(np.linalg.det(sample.cell))))
    virial = "a virial (eV) taken for a stress (eV/angstrom^3)"
    mistakes = STRESSES | ({volume: virial, -volume: virial} if volume > 2 * UNEXPLAINED else {})
    if work.spread <= min(BELIEVED, fit.spread):
        if 0.7 < work.ratio < 1.45:
            return None
        because = (
            f"between neighbouring frames the energy changes by {work.ratio:.3g} times the work of the stress "
            f"(median of {work.count:,} pairs, spread {work.spread:.2f})"
        )
        return _doubt(what, 1 / work.ratio, mistakes, 1.35, because, beyond=UNEXPLAINED)
    if fit.spread <= BELIEVED:
        if 1 / CRUDE < fit.ratio < CRUDE:
            return None
        because = (
            f"it is {fit.ratio:.3g} times what a pair potential fitted to the forces gives "
            f"(median of {fit.count:,} components, spread {fit.spread:.2f})"
        )
        return _doubt(what, fit.ratio, mistakes, 1.6, because, beyond=CRUDE)
    size = _get(own, "stress_size")
    if not size.ratio > LARGE_STRESS:
        return None
    because = (
        f"times the volume it is {size.ratio:.3g} times the forces x distances, where about 0.3 is known "
        f"(median of {size.count:,} structures)"
    )
    return Doubt(what, "kbar or GPa taken for eV/angstrom^3, or a virial in eV for a stress", because)


def _get(own: Measurements, name: str) -> Measured:
    return own.get(name, Measured())


def _doubt(
    what: str,
    ratio: float,
    mistakes: Mapping[float, str],
    within: float,
    because: str,
    also: Sequence[str] = (),
    beyond: float = math.inf,
) -> Doubt | None:
    """The mistakes that a ratio looks like, the nearest first: those within a factor. None if there is none.

    also: what it looks like for other reasons. beyond: without a mistake that has a name, a ratio so far from 1 is one.
    """

    def distance(factor: float) -> float:
        return abs(math.log(ratio / factor)) if ratio * factor > 0 else math.inf

    near = [factor for factor in sorted(mistakes, key=distance) if distance(factor) < math.log(within)]
    looks = [*also, *(mistakes[factor] for factor in near)][:2]
    if not looks and not 1 / beyond < ratio < beyond:
        looks = [f"a factor of {ratio:.3g} that no usual unit explains"]
    return Doubt(what, " or ".join(looks), because) if looks else None
