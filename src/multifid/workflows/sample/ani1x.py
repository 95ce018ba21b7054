"""`ani1x.h5`: distorted small molecules in the layout of ANI-1x, labelled with GFN2-xTB.

One group per formula, isomers of one formula in one group. The labels stand under `wb97x_dz.*`, where readers of ANI-1x
look for them; every other level of the published file is there too and missing (NaN), as for most of its conformers.
"""

import itertools
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
from ase.units import Hartree

from multifid.workflows.sample.molecules import distorted, larger, library, relaxed, storable
from multifid.workflows.sample.plan import choose, new_rng, portions
from multifid.workflows.sample.xtb import JobResult, Point, Unusable, singlepoint

TASK = FORMAT = "ani1x"
METHOD = LEVEL_OF_THEORY = "GFN2-xTB"
FILES = ("ani1x.h5",)
PER_MOLECULE = 4  # of the larger ones, whose relaxation costs most
COLDEST, HOTTEST = 0.02, 0.12  # eV: between room temperature and 1400 K

# levels of the published file that are missing here: key -> shape per conformer, "atoms" where it depends
SCALARS = (
    *("wb97x_tz.energy", "ccsd(t)_cbs.energy", "hf_dz.energy", "hf_tz.energy", "hf_qz.energy"),
    *("mp2_dz.corr_energy", "mp2_tz.corr_energy", "mp2_qz.corr_energy"),
    *("npno_ccsd(t)_dz.corr_energy", "npno_ccsd(t)_tz.corr_energy", "tpno_ccsd(t)_dz.corr_energy"),
)
PER_ATOM = (
    *("wb97x_dz.cm5_charges", "wb97x_dz.hirshfeld_charges", "wb97x_tz.mbis_charges", "wb97x_tz.mbis_dipoles"),
    *("wb97x_tz.mbis_quadrupoles", "wb97x_tz.mbis_octupoles", "wb97x_tz.mbis_volumes"),
)
VECTORS = {"wb97x_dz.dipole": 3, "wb97x_tz.dipole": 3, "wb97x_dz.quadrupole": 6}


def jobs(structures: int, seed: int) -> list[tuple]:
    chosen = choose(list(library()), structures, new_rng(seed, TASK))
    return [(name, n, seed) for name, n in zip(chosen, portions(structures, len(chosen)), strict=True)]


def larger_jobs(structures: int, seed: int) -> list[tuple]:
    """The same of molecules as large as published ones."""
    chosen = choose(list(larger()), structures // PER_MOLECULE, new_rng(seed, TASK, "larger"))
    return [(name, n, seed) for name, n in zip(chosen, portions(structures, len(chosen)), strict=True)]


def compute(name: str, count: int, seed: int) -> JobResult:
    """`count` distorted conformers, each with a temperature of its own. Records: (formula, point)."""
    outcome = JobResult()
    try:
        molecule = relaxed(name, METHOD)
    except Unusable as reason:
        return JobResult(skipped=Counter({str(reason): count}))
    for k in range(count):
        rng = new_rng(seed, TASK, name, k)
        thermal = COLDEST * (HOTTEST / COLDEST) ** rng.random()
        positions = storable(distorted(molecule, rng, thermal))
        try:
            outcome.records.append((molecule.formula, singlepoint(METHOD, molecule.numbers, positions)))
        except Unusable as reason:
            outcome.skipped[str(reason)] += 1
    return outcome


def write(paths: tuple[Path, ...], records: list[tuple[str, Point]], seed: int) -> list[int]:
    with h5py.File(paths[0], "w") as file:
        file.attrs["level_of_theory"] = LEVEL_OF_THEORY
        records = sorted(records, key=lambda record: record[0])  # stable: conformers stay in the order of the jobs
        for formula, members in itertools.groupby(records, key=lambda record: record[0]):
            _write_formula(file.create_group(formula), [point for _, point in members])
    return [len(records)]


def _write_formula(group: h5py.Group, points: list[Point]) -> None:
    conformers, atoms = len(points), len(points[0].numbers)
    data = {
        "atomic_numbers": points[0].numbers.astype(np.uint8),
        "coordinates": np.array([p.positions for p in points], np.float32),
        "wb97x_dz.energy": np.array([p.energy for p in points]) / Hartree,
        "wb97x_dz.forces": np.array([p.forces for p in points], np.float32) / np.float32(Hartree),
        "wb97x_tz.forces": np.full((conformers, atoms, 3), np.nan, np.float32),
    }
    data |= {key: np.full(conformers, np.nan) for key in SCALARS}
    data |= {key: np.full((conformers, atoms), np.nan, np.float32) for key in PER_ATOM}
    data |= {key: np.full((conformers, size), np.nan, np.float32) for key, size in VECTORS.items()}
    for key, values in data.items():
        group.create_dataset(key, data=values, track_times=False)
