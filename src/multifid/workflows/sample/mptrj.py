"""`mptrj.json`: snapshots of crystals of many elements in the layout of MPtrj, labelled with periodic GFN1-xTB.

The material identifiers are made up and far above the Materials Project's own. There are no corrections here, so
everything derived from the corrected energy is null.
"""

from dataclasses import replace
from pathlib import Path

import orjson

from multifid.workflows.sample import alexandria
from multifid.workflows.sample.crystals import MATERIALS, Material, distorted, structure_dict, vasp_stress
from multifid.workflows.sample.plan import choose, new_rng, portions
from multifid.workflows.sample.xtb import JobResult, Point, Unusable, singlepoint

TASK = FORMAT = "mptrj"
METHOD = "GFN1-xTB"
LEVEL_OF_THEORY = "GFN1-xTB, periodic, Gamma point only"
FILES = ("mptrj.json",)
SHARE = 2 / 3  # of the structures asked for: a single point here costs fifty times one of a molecule
PER_MATERIAL = 3
STRAIN, RATTLE = 0.015, 0.06  # relative, and angstrom


def jobs(structures: int, seed: int) -> list[tuple]:
    taken = {material.serial for material, _ in alexandria.jobs(structures, seed)}  # no material is in both
    pool = [material for material in MATERIALS if material.serial not in taken]
    frames = max(1, round(SHARE * structures))
    chosen = choose(pool, frames // PER_MATERIAL, new_rng(seed, TASK))
    return [(material, n, seed) for material, n in zip(chosen, portions(frames, len(chosen)), strict=True)]


def larger_jobs(structures: int, seed: int) -> list[tuple]:
    """The same in cells of 16 and 24 atoms."""
    frames = max(1, round(SHARE * structures))
    chosen = choose(MATERIALS, frames // PER_MATERIAL, new_rng(seed, TASK, "larger"))
    counts = portions(frames, len(chosen))
    return [(replace(m, cells=2 + i % 2), n, seed) for i, (m, n) in enumerate(zip(chosen, counts, strict=True))]


def compute(material: Material, count: int, seed: int) -> JobResult:
    """Records: (material id, frame id, point)."""
    outcome = JobResult()
    identifier = f"mp-{99_000_000 + material.serial}"
    for k in range(count):
        cell, positions = distorted(material, new_rng(seed, TASK, material.serial, k), STRAIN, RATTLE)
        try:
            point = singlepoint(METHOD, material.numbers, positions, cell)
        except Unusable as reason:
            outcome.skipped[str(reason)] += 1
            continue
        outcome.records.append((identifier, f"{identifier}-0-{k}", point))
    return outcome


def write(paths: tuple[Path, ...], records: list[tuple[str, str, Point]], seed: int) -> list[int]:
    materials: dict[str, dict] = {}
    for identifier, frame, point in records:
        materials.setdefault(identifier, {})[frame] = _frame(identifier, point)
    paths[0].write_bytes(orjson.dumps(materials))
    return [len(records)]


def _frame(identifier: str, point: Point) -> dict:
    assert point.cell is not None and point.stress is not None
    return {
        "structure": structure_dict(point.numbers, point.positions, point.cell),
        "uncorrected_total_energy": point.energy,
        "corrected_total_energy": None,
        "energy_per_atom": None,
        "ef_per_atom": None,
        "force": point.forces.tolist(),
        "stress": vasp_stress(point.stress),
        "magmom": None,
        "bandgap": point.gap,
        "mp_id": identifier,
    }
