"""`alexandria.json.bz2` and `alex_go.json.bz2`: relaxed cells and the trajectories that led there, in the layout of
Alexandria, labelled with periodic GFN1-xTB.

The trajectory leaves out its last step, which is the relaxed entry of the other file: the two make one store, and a
structure must not count twice. The material identifiers are made up.
"""

import bz2
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from multifid.workflows.sample.crystals import MATERIALS, Material, distorted, structure_dict, vasp_stress
from multifid.workflows.sample.plan import choose, new_rng
from multifid.workflows.sample.xtb import XTB, JobResult, Point, Unusable

TASK = FORMAT = "alexandria"
METHOD = "GFN1-xTB"
LEVEL_OF_THEORY = "GFN1-xTB, periodic, Gamma point only"
FILES = ("alexandria.json.bz2", "alex_go.json.bz2")
PER_MATERIAL = 4.7  # about: the relaxed cell and the steps that it takes
LONGEST = 5  # trajectory steps that are kept, from the first
STIFFNESS = 10.0  # eV/angstrom^2, of the first step
STRAIN, RATTLE = 0.012, 0.05  # relative, and angstrom: where the relaxation starts
LARGEST_FORCE = 0.1  # eV/angstrom, on atoms and on the cell
STEPS = 12


def jobs(structures: int, seed: int) -> list[tuple]:
    pool = [material for material in MATERIALS if material.relaxes]
    return [(material, seed) for material in choose(pool, round(structures / PER_MATERIAL), new_rng(seed, TASK))]


def compute(material: Material, seed: int) -> JobResult:
    """One record: (material id, points of the trajectory, relaxed point)."""
    cell, positions = distorted(material, new_rng(seed, TASK, material.serial), STRAIN, RATTLE)
    atoms = Atoms(material.numbers, positions, cell=cell, pbc=True)
    atoms.calc = XTB(METHOD)
    filtered: Any = FrechetCellFilter(atoms)
    try:
        if not BFGS(filtered, logfile=None, alpha=STIFFNESS).run(fmax=LARGEST_FORCE, steps=STEPS):
            raise Unusable(f"relaxation did not end in {STEPS} steps")
    except Unusable as reason:
        return JobResult(skipped=Counter({str(reason): 1}))
    points = atoms.calc.points
    return JobResult([(f"agm{990_000_000 + material.serial}", points[:-1][:LONGEST], points[-1])])


def write(paths: tuple[Path, ...], records: list[tuple[str, list[Point], Point]], seed: int) -> list[int]:
    entries = [_entry(identifier, relaxed) for identifier, _, relaxed in records]
    trajectories = {
        identifier: [{"run": 0, "steps": [_step(p, k) for k, p in enumerate(points)]}]
        for identifier, points, _ in records
    }
    for path, content in zip(paths, ({"entries": entries}, trajectories), strict=True):
        path.write_bytes(bz2.compress(orjson.dumps(content)))
    return [len(entries), sum(len(points) for _, points, _ in records)]


def _entry(identifier: str, point: Point) -> dict:
    assert point.cell is not None and point.stress is not None
    forces = [{"forces": force} for force in point.forces.tolist()]
    return {
        "@module": "pymatgen.entries.computed_entries",
        "@class": "ComputedStructureEntry",
        "energy": point.energy,
        "correction": 0.0,
        "parameters": {},
        "energy_adjustments": [],
        "structure": structure_dict(point.numbers, point.positions, point.cell, forces),
        "data": {
            "mat_id": identifier,
            "energy_total": point.energy,
            "energy_corrected": point.energy,
            "stress": vasp_stress(point.stress),
        },
    }


def _step(point: Point, number: int) -> dict:
    assert point.cell is not None and point.stress is not None
    return {
        "structure": structure_dict(point.numbers, point.positions, point.cell),
        "energy": point.energy,
        "forces": point.forces.tolist(),
        "stress": vasp_stress(point.stress),
        "step": number,
    }
