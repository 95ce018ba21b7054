"""Alexandria: relaxed entries (`alexandria_NNN.json.bz2`) and trajectories (`alex_go_*`, `pbe_NNNN.json.bz2`).

    entries        {"entries": [ComputedStructureEntry, ...]}                          told apart by the first key
    trajectories   {mat_id: [{"steps": [{"structure", "energy", "forces", "stress"}, ...]}, ...]}

Schmidt et al., Materials Today Physics 48, 101560 (2024). Energies in eV: `energy_total` is the uncorrected total of
the cell (`e_form` beside it is per atom and is not read). Forces in eV/angstrom; those of an entry lie in the
properties of its sites. Entries are relaxed minima: their forces are near zero, the trajectories carry the signal.

Stress comes in two conventions, and the file does not always say which. As VASP writes it (a 3 x 3 tensor in kbar,
compression positive) in the published files; as ASE writes it (six Voigt numbers in eV/angstrom^3, tension positive)
in files that went through an ASE database. `stress: auto` decides for each record: a `stress_unit` beside the stress
if there is one, else its form.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip
from multifid.readers.crystal_json import crystal
from multifid.readers.holdings import listed
from multifid.readers.json_file import elements, first_key, json_parts, pairs
from multifid.readers.packed import endings
from multifid.readers.records import (
    KBAR,
    BadRecord,
    number,
    stress_tensor,
    structure_or_skip,
    vectors,
)
from multifid.readers.units import STRESS, StressOptions, factor
from multifid.structures.structure import Labels, Structure

TASK = "alexandria"
TASKS = {TASK: LabelSet("PBE / PBE+U (VASP, Alexandria)", "total, uncorrected (VASP)")}
RELATIVE = "material"
ENDINGS = endings(".json")


class Options(StressOptions):
    """What to read of Alexandria."""

    stress: Literal["auto", "vasp", "ase", "none"] = Field(
        "auto",
        description="convention of the file's stress: vasp (kbar, compression positive), ase (eV/angstrom^3, tension"
        " positive), auto (by unit or form of each record), none (stress is not read); stress_unit and stress_sign"
        " override it",
    )

    @model_validator(mode="after")
    def _no_stress_has_no_unit(self) -> "Options":
        if self.stress == "none" and (self.stress_unit or self.stress_sign):
            raise ValueError("stress=none leaves stress_unit and stress_sign without effect: give one or the other")
        return self


def parts(path: Path, options: Options) -> list[Part]:
    """Byte ranges between materials; a packed file is one part."""
    return json_parts(path, 2 if first_key(path)[0] == "entries" else 1)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Every entry or trajectory step of the file, or why it is skipped. Memory holds one material.

    Null, NaN or malformed forces are a skip; a null stress is a missing label. Entries and trajectories of one
    material are relatives. `source_id`: `mat_id`, or `mat_id/calculation/step`. ValueError if the file is truncated
    or neither entries nor trajectories.
    """
    key, opening = first_key(path)
    if key and opening != b"[":
        raise ValueError(
            f'{path}: {{"entries": [...]}} or {{mat_id: [...]}} is expected, but {key!r} does not hold an array'
        )
    if key == "entries":
        for place, entry in elements(path, progress, part):
            yield _entry(entry, place, options)
    else:
        for mat_id, calculations in pairs(path, progress, part):
            yield from _trajectories(mat_id, calculations, options)
    progress(1.0)


def holds(path: Path) -> list[str]:
    """Keys of the first entry or step."""
    if first_key(path)[0] == "entries":
        return next((listed(entry) for _, entry in elements(path, lambda f: None) if isinstance(entry, dict)), [])
    for _, calculations in pairs(path, lambda fraction: None):
        for calculation in calculations if isinstance(calculations, list) else ():
            steps = calculation.get("steps") if isinstance(calculation, dict) else None
            if isinstance(steps, list) and steps and isinstance(steps[0], dict):
                return listed(steps[0])
            return listed(calculation) if isinstance(calculation, dict) else []
    return []


def _entry(entry: Any, place: int, options: Options) -> Record:
    data = entry.get("data") if isinstance(entry, dict) else None
    mat_id = data.get("mat_id") if isinstance(data, dict) else None
    if not isinstance(mat_id, str) or not mat_id:
        return Skip("entry without data.mat_id", f"entry at byte {place}")

    return structure_or_skip(mat_id, _relaxed, entry.get("structure"), data, mat_id, options)


def _relaxed(structure: Any, data: dict[str, Any], mat_id: str, options: Options) -> Structure:
    stress = _stress(data.get("stress"), data.get("stress_unit"), options)
    return _structure(structure, data.get("energy_total"), _site_forces(structure), stress, mat_id, mat_id)


def _trajectories(mat_id: str, calculations: Any, options: Options) -> Iterator[Record]:
    if not isinstance(calculations, list):
        yield Skip("material is not a list of calculations", mat_id)
        return
    for c, calculation in enumerate(calculations):
        steps = calculation.get("steps") if isinstance(calculation, dict) else None
        if not isinstance(steps, list):
            yield Skip("calculation without a list of steps", f"{mat_id}/{c}")
            continue
        for s, step in enumerate(steps):
            where = f"{mat_id}/{c}/{s}"
            if isinstance(step, dict):
                yield structure_or_skip(where, _step, step, mat_id, where, options)
            else:
                yield Skip("step is not an object", where)


def _step(step: dict[str, Any], mat_id: str, where: str, options: Options) -> Structure:
    forces, stress = step.get("forces"), _stress(step.get("stress"), step.get("stress_unit"), options)
    if forces is None:
        raise BadRecord("forces are null")
    return _structure(step.get("structure"), step.get("energy"), forces, stress, mat_id, where)


def _structure(structure: Any, energy: Any, forces: Any, stress: Any, mat_id: str, where: str) -> Structure:
    geometry = crystal(structure)
    labels = Labels(
        energy=number(energy, "energy"),
        forces=None if forces is None else vectors(forces, len(geometry.numbers), "forces"),
        stress=stress,
    )
    return Structure(
        numbers=geometry.numbers,
        positions=geometry.positions,
        labels={TASK: labels},
        relative=mat_id,
        source_id=where,
        cell=geometry.cell,
        pbc=geometry.pbc,
        charge=geometry.charge,
    )


def _site_forces(structure: Any) -> list | None:
    """Forces from the sites' properties; None (no label) if no site has any. One site without them is malformed."""
    try:
        properties = [site.get("properties") or {} for site in structure["sites"]]
    except (KeyError, TypeError, AttributeError):
        raise BadRecord("structure is not a pymatgen structure") from None
    if not any("forces" in own for own in properties):
        return None
    return [own.get("forces") for own in properties]


def _stress(values: Any, unit: Any, options: Options) -> np.ndarray | None:
    """(3, 3) eV/angstrom^3, tension-positive, from either convention (see the module)."""
    if options.stress == "none" or (tensor := stress_tensor(values)) is None:
        return None
    size, tension = KBAR, False  # as VASP writes it
    if options.stress == "ase" or (options.stress == "auto" and unit is None and len(values) == 6):
        size, tension = 1.0, True
    elif options.stress == "auto" and unit is not None:
        size, tension = _declared(str(unit), options)
    return tensor * options.stress_factor(size, tension)


def _declared(unit: str, options: Options) -> tuple[float, bool]:
    """What the `stress_unit` beside a stress says: how many eV/angstrom^3 one is, and whether tension is positive.

    Units other than VASP's and ASE's say nothing of the sign: it must be told by `stress_sign`.
    """
    text = unit.split("(")[0].strip()
    if text.lower().startswith("ev/a"):
        return 1.0, True
    if text.lower() in ("kb", "kbar"):
        return KBAR, False
    if options.stress_sign is None:
        raise BadRecord("stress in an unknown unit")
    if options.stress_unit is not None:
        return 1.0, True
    try:
        return factor(text, STRESS), True
    except ValueError:
        raise BadRecord("stress in an unknown unit") from None
