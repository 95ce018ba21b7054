"""Extended XYZ: what most people bring. Frames of `natoms`, a line of key=value, and one line per atom.

Labels are read from `energy, forces, stress`, or from `REF_energy, REF_forces, REF_stress | REF_virial` where a frame
has one of these (never mixed: a file with both families holds labels and somebody's predictions). Units cannot be told
from the file: eV and angstrom unless the options say otherwise. A virial is taken as stress = -virial / volume. A frame
with `config_type=IsolatedAtom` and one atom is the energy of a free atom, not a structure.

The parser is our own: ase's gives up the place of an error and accepts labels of the wrong shape.
"""

import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
from pydantic import Field

from multifid.data.readers import IsolatedAtom, LabelSet, Part, Progress, Record, Skip, one_part
from multifid.data.readers.charges import CHARGE, SPIN, ChargeOptions, charge_of, of_atoms, spin_of, spin_of_moments
from multifid.data.readers.packed import LONGEST, endings, opened_text, packing_of
from multifid.data.readers.records import BadRecord
from multifid.structures.cells import spans_volume
from multifid.structures.elements import MAX_Z, NUMBERS, formula, no_element
from multifid.structures.reproducible import determinant
from multifid.structures.structure import Labels, Structure

TASKS = {"extxyz": LabelSet("unknown", "total")}
RELATIVE = "formula"
ENDINGS = endings(".xyz", ".extxyz")

# CODATA 2018
ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "hartree": 27.211386245988,
    "rydberg": 13.605693122994,
    "kcal/mol": 4184.0 / 96485.33212331,
    "kJ/mol": 1000.0 / 96485.33212331,
}
LENGTH_UNITS = {"angstrom": 1.0, "bohr": 0.529177210903, "nm": 10.0}
EnergyUnit = Literal["eV", "meV", "hartree", "rydberg", "kcal/mol", "kJ/mol"]
LengthUnit = Literal["angstrom", "bohr", "nm"]

_PAIR = re.compile(r"""("[^"]*"|[^\s="']+)\s*(?:=\s*("(?:[^"\\]|\\.)*"|'[^']*'|\{[^}]*\}|\[[^\]]*\]|[^\s"']+))?""")


class Options(ChargeOptions):
    """Which keys and units an extended XYZ file uses."""

    energy_key: str | None = Field(None, description="key of the total energy; default REF_energy, else energy")
    forces_key: str | None = Field(None, description="column of the forces; default REF_forces, else forces")
    stress_key: str | None = Field(None, description="key of the stress; default REF_stress, else stress")
    virial_key: str | None = Field(None, description="key of the virial; default REF_virial, else virial")
    charge_key: str | None = Field(
        None, description="key of the charge in e; default charge, total_charge and the like"
    )
    spin_key: str | None = Field(None, description="key of the spin; default multiplicity, spin, total_spin")
    energy_unit: EnergyUnit = Field("eV", description="unit of energies, and of the energy in forces and stress")
    length_unit: LengthUnit = Field("angstrom", description="unit of positions and cell")
    force_length_unit: LengthUnit | None = Field(
        None, description="unit of the length in forces, where it differs from length_unit (hartree/bohr is common)"
    )
    forces_are_gradient: bool = Field(False, description="the forces column holds the gradient: minus the forces")


class _Bad(Exception):
    """A frame that cannot be used; the message is a short constant phrase."""


parts = one_part


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the frames of one file. ValueError where the file is no extended XYZ or ends within a frame."""
    size, plain = max(path.stat().st_size, 1), packing_of(path) is None
    with opened_text(path, lambda place: progress(place / size)) as file:
        frame = done = 0
        asked = _Asked(options)
        for natoms, comment, lines in _frames(path, file):
            done += len(comment) + sum(map(len, lines))
            asked.look(comment, natoms)
            try:
                yield _record(natoms, comment, lines, str(frame), options)
            except (_Bad, BadRecord) as bad:
                yield Skip(str(bad), str(frame))
            frame += 1
            if plain and frame % 100 == 0:
                progress(min(done / size, 1.0))
    if frame == 0:
        raise ValueError(f"{path} holds no frame")
    asked.check(path)
    progress(1.0)


class _Asked:
    """The keys that the options name, until a frame has them: a key that no frame has is mistyped, not missing.

    Files of isolated atoms need none, files without another column of vectors no forces, molecules no stress.
    """

    def __init__(self, options: Options) -> None:
        given = {name: key for name, key in options.model_dump().items() if name.endswith("_key") and key is not None}
        self.missing = {
            name: re.compile(rf"(?<![\w-])\"?{re.escape(key)}\"?(?=[=:\s]|$)") for name, key in given.items()
        }
        self.given, self.first = given, ""
        self.needed = {"energy_key": False, "forces_key": False, "stress_key": False}

    def look(self, comment: str, natoms: int) -> None:
        if not self.missing or (natoms == 1 and "isolated" in comment.lower()):
            return
        self.first = self.first or comment
        self.needed["energy_key"] = True
        self.needed["forces_key"] |= comment.count(":R:3") > 1
        self.needed["stress_key"] |= "Lattice" in comment
        self.missing = {name: key for name, key in self.missing.items() if not key.search(comment)}

    def check(self, path: Path) -> None:
        like = {"virial_key": "stress_key", "charge_key": "energy_key", "spin_key": "energy_key"}
        for name in self.missing:
            if self.needed[like.get(name, name)]:
                there = [key.strip('"') for key, _ in _PAIR.findall(self.first)]
                columns = re.findall(r"(?:=|:)\"?([^:\s=\"]+):[A-Z]:\d", self.first)
                listed = ", ".join(dict.fromkeys([*columns, *there]))
                raise ValueError(f"{path}: no frame has {self.given[name]!r} ({name}); its first has {listed}")


def _frames(path: Path, file: TextIO) -> Iterator[tuple[int, str, list[str]]]:
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if not line.strip():  # blank lines after a frame
            continue
        try:
            natoms = int(line)
        except ValueError:
            shown = line.strip()[:40]
            raise ValueError(
                f"{path}, line {number}: a frame must begin with its number of atoms, not {shown!r}"
            ) from None
        comment = file.readline(LONGEST)
        if len(comment) == LONGEST:
            raise ValueError(f"{path}, line {number + 1}: a line of more than {LONGEST:,} characters")
        lines = list(islice(file, min(max(natoms, 0), sys.maxsize)))
        if not comment or len(lines) != natoms:
            raise ValueError(f"{path}, line {number}: the file ends within this frame of {natoms} atoms")
        number += 1 + natoms
        yield natoms, comment, lines


def _record(natoms: int, comment: str, lines: list[str], where: str, options: Options) -> Record:
    info = {key.strip('"'): value.strip("\"'{}[]") for key, value in _PAIR.findall(comment)}
    columns = _columns(info.get("Properties", "species:S:1:pos:R:3"), natoms, lines)
    numbers = _numbers(columns)
    energy_unit, length_unit = ENERGY_UNITS[options.energy_unit], LENGTH_UNITS[options.length_unit]
    family = "REF_" if any(key.startswith("REF_") for key in (*info, *columns)) else ""
    total = _floats(info, options.energy_key or f"{family}energy", 1)
    energy = float("nan") if total is None else float(total[0]) * energy_unit
    kind = info.get("config_type", "").replace("_", "").lower()
    if natoms == 1 and kind == "isolatedatom":
        if not np.isfinite(energy):
            raise _Bad("isolated atom without an energy")
        return IsolatedAtom("extxyz", int(numbers[0]), energy)
    cell, pbc = _cell(info, length_unit)
    forces = columns.get(options.forces_key or f"{family}forces")
    if forces is not None:
        per_length = LENGTH_UNITS[options.force_length_unit or options.length_unit]
        forces = _numeric(forces) * (energy_unit / per_length * (-1.0 if options.forces_are_gradient else 1.0))
    stress = _stress(info, options, family, cell, energy_unit, length_unit)
    charge, spin = _charge_and_spin(info, columns, numbers, not pbc.any(), options)
    return Structure(
        numbers=numbers,
        positions=_numeric(columns["pos"]) * length_unit,
        labels={"extxyz": Labels(energy, forces, stress)},
        relative=formula(numbers),
        source_id=where,
        cell=cell,
        pbc=pbc if pbc.any() else None,
        charge=charge,
        spin=spin,
    )


def _charge_and_spin(
    info: dict[str, str], columns: dict[str, np.ndarray], numbers: np.ndarray, molecule: bool, options: Options
) -> tuple[int | None, int | None]:
    """Under their keys, else, of a molecule, the sums of ASE's columns of its atoms; None where nothing is stated."""
    charge = charge_of(info, options, (options.charge_key,) if options.charge_key else CHARGE)
    spin = spin_of(info, options, (options.spin_key,) if options.spin_key else SPIN)
    if molecule and charge is None:
        charge = of_atoms(columns.get("initial_charges"))
    if molecule and spin is None:
        spin = spin_of_moments(None, columns.get("initial_magmoms"), numbers, charge)
    return charge, spin


def _columns(properties: str, natoms: int, lines: list[str]) -> dict[str, np.ndarray]:
    """Per-atom columns as text, (atoms, width), by name."""
    parts = properties.split(":")
    if len(parts) % 3 or not all(width.isdigit() for width in parts[2::3]):
        raise _Bad("Properties are not name:type:width")
    table = [line.split() for line in lines]
    widths = [int(width) for width in parts[2::3]]
    if natoms < 1 or any(len(row) != sum(widths) for row in table):
        raise _Bad("lines of atoms do not have the columns that Properties say" if natoms else "no atoms")
    cells = np.array(table, dtype=str).reshape(natoms, sum(widths))
    ends = np.cumsum(widths)
    return {name: cells[:, e - w : e] for name, w, e in zip(parts[::3], widths, ends, strict=True)}


def _numbers(columns: dict[str, np.ndarray]) -> np.ndarray:
    if "pos" not in columns or columns["pos"].shape[1] != 3:
        raise _Bad("no positions")
    try:
        if "species" in columns:
            return np.array([NUMBERS[s] for s in columns["species"][:, 0].tolist()])
        for key in ("Z", "numbers"):
            if key in columns:
                numbers = columns[key][:, 0].astype(np.int64)
                strange = numbers[(numbers < 1) | (numbers > MAX_Z)]
                if len(strange):
                    raise _Bad(no_element(int(strange[0])))
                return numbers
    except KeyError as unknown:
        raise _Bad(no_element(unknown.args[0])) from None
    except (ValueError, OverflowError):
        raise _Bad("atomic numbers are not whole numbers") from None
    raise _Bad("no species")


def _numeric(text: np.ndarray) -> np.ndarray:
    try:
        return text.astype(np.float64)
    except ValueError:
        raise _Bad("a column that must hold numbers does not") from None


def _floats(info: dict[str, str], key: str, *lengths: int) -> np.ndarray | None:
    """The numbers under a key; None where there is none."""
    if key not in info:
        return None
    values = _numeric(np.array(re.split(r"[\s,\[\]]+", info[key].strip("[] "))))
    if len(values) not in lengths:
        raise _Bad(f"{key} has a wrong shape")
    return values


def _cell(info: dict[str, str], length_unit: float) -> tuple[np.ndarray | None, np.ndarray]:
    lattice = _floats(info, "Lattice", 9)
    cell = None if lattice is None else lattice.reshape(3, 3) * length_unit
    flags = re.findall(r"[TtFf01]\w*", info.get("pbc", "T T T" if cell is not None else "F F F"))
    if len(flags) != 3:
        raise _Bad("pbc is not three flags")
    return cell, np.array([flag[0] in "Tt1" for flag in flags])


def _stress(
    info: dict[str, str], options: Options, family: str, cell: np.ndarray | None, energy_unit: float, length_unit: float
) -> np.ndarray | None:
    """(3, 3) eV/angstrom^3, tension-positive, from a stress (3 x 3, or Voigt xx yy zz yz xz xy) or a virial."""
    stress = _floats(info, options.stress_key or f"{family}stress", 6, 9)
    if stress is not None:
        return _tensor(stress) * energy_unit / length_unit**3
    virial = _floats(info, options.virial_key or f"{family}virial", 6, 9)
    if virial is None:
        return None
    volume = 1.0  # without one `prepare` sets the label aside, and counts it
    if cell is not None and spans_volume(cell):
        volume = abs(float(determinant(cell)))
    return -_tensor(virial) * energy_unit / volume


def _tensor(values: np.ndarray) -> np.ndarray:
    return values.reshape(3, 3) if len(values) == 9 else values[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
