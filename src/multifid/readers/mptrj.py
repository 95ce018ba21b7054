"""MPtrj (`MPtrj_2022.9_full.json`): relaxation frames of the Materials Project, one JSON object of 11-12 GB.

    {mp_id: {frame_id: {"structure", "uncorrected_total_energy", "corrected_total_energy", "force", "stress", ...}}}

Deng et al., Nature Machine Intelligence 5, 1031 (2023). Energies in eV; forces in eV/angstrom; stress in kbar with
VASP's sign, so that ours is -value / 1602.1766208. Magnetic moments are not read.

The forces are derivatives of the uncorrected energy: the corrections of MP2020 depend on composition only, but differ
between frames treated with PBE and with PBE+U by up to 0.4 eV/atom. The default is therefore the uncorrected energy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip
from multifid.readers.crystal_json import crystal
from multifid.readers.holdings import listed
from multifid.readers.json_file import first_key, json_parts, pairs
from multifid.readers.packed import endings
from multifid.readers.records import KBAR, number, stress_tensor, structure_or_skip, vectors
from multifid.readers.units import StressOptions
from multifid.structures.structure import Labels, Structure

LEVEL = "PBE / PBE+U (VASP, Materials Project)"
NAMES = {"uncorrected": "mptrj", "corrected": "mptrj_corrected"}
TASKS = {
    "mptrj": LabelSet(LEVEL, "total, uncorrected (VASP)"),
    "mptrj_corrected": LabelSet(LEVEL, "total, with MP2020 corrections (the forces are without)"),
}
RELATIVE = "material"
ENDINGS = endings(".json")


class Options(StressOptions):
    """What to read of MPtrj."""

    energy: Literal["uncorrected", "corrected"] = Field(
        "uncorrected",
        description="uncorrected: VASP's total energy, which the forces belong to; corrected: after MP2020 corrections",
    )


def parts(path: Path, options: Options) -> list[Part]:
    """Byte ranges between materials."""
    return json_parts(path, 1)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Every frame of the file, or why it is skipped. Memory holds one material.

    A null force or stress is a missing label; an array of the wrong shape or with NaN in the forces is a skip.
    `source_id` is `mp_id/frame_id`. ValueError if the file is truncated or not MPtrj.
    """
    key, opening = first_key(path)
    if key and opening != b"{":
        raise ValueError(f"{path}: an object of materials is expected, but the value of {key!r} is not an object")
    for mp_id, frames in pairs(path, progress, part):
        if not isinstance(frames, dict):
            yield Skip("material is not an object of frames", mp_id)
            continue
        for frame_id, frame in frames.items():
            where = f"{mp_id}/{frame_id}"
            if isinstance(frame, dict):
                yield structure_or_skip(where, _structure, frame, mp_id, where, options)
            else:
                yield Skip("frame is not an object", where)
    progress(1.0)


def _stress(values: Any, options: Options) -> np.ndarray | None:
    """(3, 3) eV/angstrom^3, tension-positive; kbar with compression positive in the published file."""
    tensor = stress_tensor(values)
    return None if tensor is None else tensor * options.stress_factor(KBAR, tension=False)


def holds(path: Path) -> list[str]:
    """Keys of the first frame."""
    for mp_id, frames in pairs(path, lambda fraction: None):
        for frame_id, frame in frames.items() if isinstance(frames, dict) else ():
            return listed({f"{mp_id}/{frame_id}": frame}) if isinstance(frame, dict) else []
    return []


def _structure(frame: dict[str, Any], mp_id: str, where: str, options: Options) -> Structure:
    geometry = crystal(frame.get("structure"))
    forces = frame.get("force")
    labels = Labels(
        energy=number(frame.get(f"{options.energy}_total_energy"), f"{options.energy} energy"),
        forces=None if forces is None else vectors(forces, len(geometry.numbers), "forces"),
        stress=_stress(frame.get("stress"), options),
    )
    return Structure(
        numbers=geometry.numbers,
        positions=geometry.positions,
        labels={NAMES[options.energy]: labels},
        relative=mp_id,
        source_id=where,
        cell=geometry.cell,
        pbc=geometry.pbc,
        charge=geometry.charge,
    )
