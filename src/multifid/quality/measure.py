"""All that can be measured of a sample's units: `evidence`, `pair_fit` and `atom_energies` asked in turn, by name.

Names, for the geometry:

    lengths            distance of nearest neighbours / covalent bonds

and for each task:

    totals             energies / those of free atoms with all electrons
    extensive          how much worse energies are described as totals than as energies per atom (far below 1: totals)
    stretch            stiffness of X-H bonds / what it is known to be
    work               change of energy between neighbouring frames / work of the forces
    stress_work        change of energy between neighbouring frames / work of the stress
    fit_energy         differences of energies / those of a pair potential that is fitted to the forces
    fit_stress         deviators of stresses / those of the same pair potential
    stress_size        deviator of the stress x volume / (force x distance x root of the number of atoms)

`..._per_atom`: the same, if energies are taken for energies per atom.
"""

import numpy as np

from multifid.quality.atom_energies import extensive
from multifid.quality.evidence import ENOUGH, Measured, Neighbors, lengths, neighbors, steps, stretch, totals
from multifid.quality.pair_fit import deviator_size, energy_ratio, pairwise, stress_ratio
from multifid.structures.structure import Packed, PackedLabels

PAIRS = 600  # of frames that are compared, at most
FELT = 0.05  # eV/angstrom: RMS forces below this say nothing of the size of a stress

Measurements = dict[str, Measured]


def measure(sample: Packed, geometry: Packed) -> dict[str, Measurements]:
    """ "geometry" or task -> name -> what was measured; names of what cannot be measured are missing.

    sample: consecutive structures, or runs of them. geometry: fewer, whose neighbours are looked at.
    """
    near = neighbors(geometry)
    found = {"geometry": {"lengths": lengths(geometry, near)}}
    for task, labels in sample.labels.items():
        found[task] = _of_task(sample, geometry, near, labels, geometry.labels[task])
    return {what: {name: m for name, m in own.items() if np.isfinite(m.ratio)} for what, own in found.items()}


def _of_task(
    sample: Packed, geometry: Packed, near: Neighbors, labels: PackedLabels, few: PackedLabels
) -> Measurements:
    """labels: of the sample. few: of the geometry."""
    found = {
        "totals": totals(sample, labels.energy),
        "totals_per_atom": totals(sample, labels.energy * sample.natoms),
        "extensive": Measured(extensive(sample, labels.energy), 0.0, len(sample.natoms)),
    }
    if labels.stress is not None and labels.forces is not None:
        found["stress_size"] = _stress_size(sample, labels.forces, labels.stress)
    if labels.forces is None or few.forces is None:
        return found
    between = steps(sample, labels.energy, labels.forces, labels.stress, PAIRS)
    found |= {
        "stretch": stretch(geometry, near, few.forces),
        "work": between.forces(),
        "work_per_atom": between.per_atom().forces(),
        "stress_work": between.stress(),
    }
    if (fit := pairwise(geometry, near, few.forces)) is not None:
        found["fit_energy"] = energy_ratio(geometry, few.energy, fit)
        found["fit_energy_per_atom"] = energy_ratio(geometry, few.energy * geometry.natoms, fit)
        if few.stress is not None:
            found["fit_stress"] = stress_ratio(few.stress, fit)
    return found


def _stress_size(packed: Packed, forces: np.ndarray, stress: np.ndarray) -> Measured:
    """Median over crystals; about 0.05 to 0.4 in published samples."""
    squares = np.einsum("ak,ak->a", forces, forces, dtype=np.float64)
    felt = np.sqrt(np.add.reduceat(squares, packed.offsets[:-1]) / packed.natoms)
    volume = np.abs(np.linalg.det(packed.cell))
    used = packed.pbc.all(axis=1) & (felt > FELT) & np.isfinite(stress).all(axis=(1, 2)) & (volume > 0)
    if used.sum() < ENOUGH:
        return Measured(count=int(used.sum()))
    volume, natoms = volume[used], packed.natoms[used]
    size = deviator_size(stress[used]) * volume / (np.cbrt(volume / natoms) * np.sqrt(natoms) * felt[used])
    return Measured(float(np.median(size)), 0.0, int(used.sum()))
