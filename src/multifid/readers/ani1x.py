"""ANI-1x (HDF5): one group per formula, several fidelities of one geometry, NaN = missing, per conformer and per key.

Units in the file: hartree, angstrom, hartree/angstrom; forces are forces. The release has 4,956,005 conformers of
H, C, N, O and no split (Smith et al., Scientific Data 7, 134 (2020), doi 10.1038/s41597-020-0473-z).
"""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, cut
from multifid.readers.molecule_hdf5 import HARTREE, dataset, datasets_of, first_record, groups, opened
from multifid.readers.records import BadRecord
from multifid.store.block import Block, relative_hash
from multifid.store.fields import NO_SPLIT
from multifid.structures.elements import MAX_Z, formula

CHUNK = 4096  # conformers read at once
PART = 1 << 15  # conformers of a part

# fidelity -> (keys whose sum is the total energy, key of the forces, level of theory). All methods but DFT come
# without forces; the file stores their correlation energies apart from the Hartree-Fock energy.
FIDELITIES: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "wb97x_dz": (("wb97x_dz.energy",), "wb97x_dz.forces", "wB97X/6-31G(d)"),
    "wb97x_tz": (("wb97x_tz.energy",), "wb97x_tz.forces", "wB97X/def2-TZVPP"),
    "ccsd_t_cbs": (("ccsd(t)_cbs.energy",), None, "CCSD(T)*/CBS"),
    "hf_dz": (("hf_dz.energy",), None, "HF/cc-pVDZ"),
    "hf_tz": (("hf_tz.energy",), None, "HF/cc-pVTZ"),
    "hf_qz": (("hf_qz.energy",), None, "HF/cc-pVQZ"),
    "mp2_dz": (("hf_dz.energy", "mp2_dz.corr_energy"), None, "MP2/cc-pVDZ"),
    "mp2_tz": (("hf_tz.energy", "mp2_tz.corr_energy"), None, "MP2/cc-pVTZ"),
    "mp2_qz": (("hf_qz.energy", "mp2_qz.corr_energy"), None, "MP2/cc-pVQZ"),
    "npno_ccsd_t_dz": (("hf_dz.energy", "npno_ccsd(t)_dz.corr_energy"), None, "NPNO-CCSD(T)/cc-pVDZ"),
    "npno_ccsd_t_tz": (("hf_tz.energy", "npno_ccsd(t)_tz.corr_energy"), None, "NPNO-CCSD(T)/cc-pVTZ"),
    "tpno_ccsd_t_dz": (("hf_dz.energy", "tpno_ccsd(t)_dz.corr_energy"), None, "TightPNO-CCSD(T)/cc-pVDZ"),
}
DEFAULT = "wb97x_dz"

# Alone, the fidelity that everybody trains on is called by the name of the dataset.
TASKS = {
    "ani1x": LabelSet(FIDELITIES[DEFAULT][2], "total"),
    **{name: LabelSet(level, "total") for name, (_, _, level) in FIDELITIES.items()},
}
RELATIVE = "formula"
ENDINGS = (".h5", ".hdf5")


class Options(BaseModel):
    """What to read from an ANI-1x file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fidelities: tuple[str, ...] = Field(
        (DEFAULT,), description=f"the label sets to read, of {', '.join(FIDELITIES)}; each becomes a task of the store"
    )

    @field_validator("fidelities", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """On the command line a list is written with commas."""
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("fidelities")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in value if name not in FIDELITIES]:
            raise ValueError(f"unknown fidelity {', '.join(unknown)}: known are {', '.join(FIDELITIES)}")
        if not value or len(set(value)) != len(value):
            raise ValueError("fidelities must be a list of different names, at least one")
        return value


holds = first_record


def parts(path: Path, options: Options) -> list[Part]:
    """Groups in the order of their names, about PART conformers together."""
    with opened(path) as file:
        return cut([_conformers(file[name]) for name in groups(file)], PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the conformers of one file in blocks; part: which groups."""
    asked = {("ani1x" if options.fidelities == (DEFAULT,) else name): FIDELITIES[name] for name in options.fidelities}
    with opened(path) as file:
        names = groups(file)
        start, stop = part or (0, len(names))
        if start == 0:
            _check(path, file, names, asked)
        for i, name in enumerate(names[start:stop]):
            yield from _group(path, file[name], name, asked)
            progress((i + 1) / (stop - start))


def _conformers(group: h5py.Group) -> int:
    coordinates = group.get("coordinates")
    return coordinates.shape[0] if isinstance(coordinates, h5py.Dataset) and coordinates.ndim else 0


def _check(path: Path, file: h5py.File, names: list[str], asked: dict) -> None:
    """The file as a whole must be ANI-1x's: groups with coordinates, and the keys that were asked for, somewhere."""
    if not any("coordinates" in file[name] and "atomic_numbers" in file[name] for name in names):
        raise ValueError(f"{path} is not an ANI-1x file: no group has `atomic_numbers` and `coordinates`")
    for task, (energies, _, _) in asked.items():
        if not any(all(key in file[name] for key in energies) for name in names):
            raise ValueError(f"{path} has no labels {task}: no group has {' and '.join(map(repr, energies))}")


def _group(path: Path, group: h5py.Group, name: str, asked: dict) -> Iterator[Record]:
    if "coordinates" not in group or "atomic_numbers" not in group:
        yield Skip("group without atomic_numbers or coordinates", name)
        return
    try:
        keys = [key for energies, forces, _ in asked.values() for key in (*energies, forces) if key is not None]
        datasets_of(group, ("coordinates",), [key for key in keys if key in group])
        numbers = dataset(group, "atomic_numbers")
        count = group["coordinates"].shape[0]
        shapes = {"coordinates": (count, len(numbers), 3)}
        for energies, forces, _ in asked.values():
            shapes |= {key: (count,) for key in energies if key in group}
            if forces is not None and forces in group:
                shapes[forces] = (count, len(numbers), 3)
        wrong = [f"{key} of another shape than the atoms" for key, shape in shapes.items() if group[key].shape != shape]
        if not numbers.size:
            wrong.append("no atoms")
        elif not 1 <= numbers.min() <= numbers.max() <= MAX_Z:
            wrong.append("unknown atomic number")
        if wrong:
            yield from (Skip(wrong[0], f"{name}/{i}") for i in range(count))
            return
        for start in range(0, count, CHUNK):
            yield _block(group, name, numbers, slice(start, min(start + CHUNK, count)), asked)
    except BadRecord as bad:
        yield Skip(str(bad), name)
    except (OSError, RuntimeError) as error:  # a damaged chunk: HDF5 cannot go on behind it
        raise ValueError(f"{path}: group {name} cannot be read: {error}") from error


def _block(group: h5py.Group, name: str, numbers: np.ndarray, rows: slice, asked: dict) -> Block:
    """Conformers of one group, also those without a label."""
    count, atoms = rows.stop - rows.start, len(numbers)
    columns = {
        "natoms": np.full(count, atoms),
        "numbers": np.tile(numbers.astype(np.uint8), count),
        "positions": group["coordinates"][rows].reshape(-1, 3),
        "relative": np.full(count, relative_hash(formula(numbers)), np.uint64),
        "split": np.full(count, NO_SPLIT, np.uint8),
    }
    for task, (keys, of_forces, _) in asked.items():
        energy, forces = _labels(group, rows, keys, of_forces)
        columns[f"labels/{task}/energy"] = energy
        if forces is not None:
            columns[f"labels/{task}/forces"] = forces.reshape(-1, 3)
    return Block(columns, [f"{name}/{i}" for i in range(rows.start, rows.stop)])


def _labels(
    group: h5py.Group, rows: slice, energies: tuple[str, ...], forces: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Energies (conformers,) in eV, NaN where any part is missing, and forces (conformers, atoms, 3) in eV/angstrom."""
    energy = np.zeros(rows.stop - rows.start)
    for key in energies:
        energy += group[key][rows].astype(np.float64) if key in group else np.nan
    if forces is None or forces not in group:
        return energy * HARTREE, None
    return energy * HARTREE, group[forces][rows].astype(np.float64) * HARTREE
