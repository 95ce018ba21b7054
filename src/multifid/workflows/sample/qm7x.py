"""`qm7x.hdf5`: several molecules, each at its minimum and displaced, in the layout of QM7-X, labelled with IPEA1-xTB.

As in QM7-X, the geometry called `opt` is the minimum of a cheaper level (there DFTB3+MBD, here GFN2-xTB), and the total
comes with and without dispersion: here D3, under the names of the published file.
"""

from collections import Counter
from functools import cache
from pathlib import Path

import h5py
import numpy as np

from multifid.workflows.sample.molecules import distorted, library, relaxed, storable
from multifid.workflows.sample.plan import choose, new_rng, portions
from multifid.workflows.sample.xtb import JobResult, Point, Unusable, singlepoint

TASK = FORMAT = "qm7x"
METHOD = LEVEL_OF_THEORY = "IPEA1-xTB"
GEOMETRIES = "GFN2-xTB"
FILES = ("qm7x.hdf5",)
PER_MOLECULE = 5  # the minimum and four displacements
THERMAL = 0.06  # eV, about 700 K
UNPAIRED = {1: 1, 6: 2, 7: 3, 8: 2}  # electrons of the free atoms


def jobs(structures: int, seed: int) -> list[tuple]:
    chosen = choose(list(library()), structures // PER_MOLECULE, new_rng(seed, TASK))
    return [(name, n, seed) for name, n in zip(chosen, portions(structures, len(chosen)), strict=True)]


def compute(name: str, count: int, seed: int) -> JobResult:
    """Records: (idmol, idconf, with dispersion, without dispersion, atomization energy in eV)."""
    outcome = JobResult()
    try:
        molecule = relaxed(name, GEOMETRIES)
    except Unusable as reason:
        return JobResult(skipped=Counter({str(reason): count}))
    serial = list(library()).index(name) + 1
    atoms = sum(_free_atom(int(z)) for z in molecule.numbers)
    for k in range(count):
        rng = new_rng(seed, TASK, name, k)
        positions = storable(distorted(molecule, rng, THERMAL)) if k else molecule.positions
        try:
            total = singlepoint(METHOD, molecule.numbers, positions)
            without = singlepoint(METHOD, molecule.numbers, positions, dispersion=False)
        except Unusable as reason:
            outcome.skipped[str(reason)] += 1
            continue
        conformation = f"Geom-m{serial}-i1-c1-{k or 'opt'}"
        outcome.records.append((str(serial), conformation, total, without, total.energy - atoms))
    return outcome


@cache
def _free_atom(z: int) -> float:
    return singlepoint(METHOD, np.array([z]), np.zeros((1, 3)), unpaired=UNPAIRED[z]).energy


def write(paths: tuple[Path, ...], records: list[tuple[str, str, Point, Point, float]], seed: int) -> list[int]:
    with h5py.File(paths[0], "w") as file:
        file.attrs["level_of_theory"] = LEVEL_OF_THEORY
        for molecule, conformation, total, without, atomization in records:
            group = file.create_group(f"{molecule}/{conformation}")
            data = {
                "atNUM": total.numbers.astype(np.int64),
                "atXYZ": total.positions,
                "ePBE0+MBD": np.array([total.energy]),
                "ePBE0": np.array([without.energy]),
                "eMBD": np.array([total.energy - without.energy]),
                "eAT": np.array([atomization]),
                "totFOR": total.forces,
                "pbe0FOR": without.forces,
                "vdwFOR": total.forces - without.forces,
            }
            for key, values in data.items():
                group.create_dataset(key, data=values, track_times=False)
    return [len(records)]
