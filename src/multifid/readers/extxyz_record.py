"""One frame of extended XYZ to a structure in our units, and what the user may say of how that is done.

Nine numbers of a `stress` or `virial` are in Fortran order, as ASE writes them, those under other keys in the order of
rows; six are xx yy zz yz xz xy. A virial is taken as stress = -virial / volume. A value that is none costs its label.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from multifid.readers.charges import (
    CHARGE,
    MULTIPLICITY,
    SPIN,
    UNPAIRED,
    ChargeOptions,
    charge_of,
    of_atoms,
    spin_of,
    spin_of_moments,
)
from multifid.readers.contract import IsolatedAtom
from multifid.readers.extxyz_frames import Frame, elements, numbers_in, table
from multifid.readers.label_keys import STEMS, Keys, looks_like
from multifid.readers.properties import PropertyOptions, Seeker
from multifid.readers.records import VOIGT, BadRecord
from multifid.readers.units import LENGTH, Factors, UnitOptions, factor
from multifid.structures.cells import spans_volume
from multifid.structures.elements import formula
from multifid.structures.reproducible import determinant
from multifid.structures.structure import Labels, Structure

TASK = "extxyz"
FORTRAN_ORDER = ("stress", "virial")  # keys whose nine numbers ASE writes so
_ALTERNATIVES = "; several, separated by commas: the first that a frame has"


class Options(ChargeOptions, UnitOptions, PropertyOptions):
    """Which keys and units an extended XYZ file uses."""

    energy_key: str | None = Field(None, description=f"key of the total energy{_ALTERNATIVES}")
    forces_key: str | None = Field(None, description=f"column (or key) of the forces{_ALTERNATIVES}")
    stress_key: str | None = Field(None, description=f"key of the stress{_ALTERNATIVES}")
    virial_key: str | None = Field(None, description=f"key of the virial{_ALTERNATIVES}")
    charge_key: str | None = Field(
        None, description="key of the charge in e; default charge, total_charge and the like"
    )
    spin_key: str | None = Field(None, description="key of the spin; default multiplicity, spin, total_spin")
    energy_per_atom: bool = Field(False, description="energies are per atom, not totals")
    forces_are_gradient: bool = Field(False, description="the forces column holds the gradient: minus the forces")
    force_length_unit: str | None = Field(
        None, description="unit of the length in forces, where it differs from length_unit (hartree/bohr is common)"
    )

    @model_validator(mode="after")
    def _one_unit_of_forces(self) -> "Options":
        if self.force_length_unit is not None:
            factor(self.force_length_unit, LENGTH)
            if self.force_unit is not None:
                raise ValueError("force_unit and force_length_unit say the same thing: give one of them")
        return self

    @model_validator(mode="after")
    def _properties_alone(self) -> "Options":
        if self.properties and (named := self.label_keys()):
            raise ValueError(
                "with properties no energies, forces or stresses are read: leave out "
                + ", ".join(f"{kind}_key" for kind in named)
            )
        return self

    def label_keys(self) -> dict[str, tuple[str, ...]]:
        """Kind of label -> keys, where the user names some."""
        named = {kind: getattr(self, f"{kind}_key") for kind in STEMS}
        return {kind: tuple(key.strip() for key in keys.split(",")) for kind, keys in named.items() if keys}

    def charge_keys(self) -> tuple[str, ...]:
        return (self.charge_key,) if self.charge_key else CHARGE

    def spin_keys(self) -> tuple[str, ...]:
        return (self.spin_key,) if self.spin_key else SPIN


class LabelReader:
    """Takes the labels of one frame, converted. found: kinds that have one; lost: why others have not."""

    def __init__(self, frame: Frame, keys: Keys, options: Options, factors: Factors) -> None:
        self.frame, self.keys, self.options, self.factors = frame, keys, options, factors
        self.found: list[str] = []
        self.lost: list[str] = []
        self.told: list[tuple[str, str]] = []

    def energy(self) -> float:
        """eV; NaN where there is none."""
        value = self._take("energy", self._energy)
        return float("nan") if value is None else value

    def forces(self) -> np.ndarray | None:
        """(atoms, 3) eV/angstrom."""
        return self._take("forces", self._forces)

    def stress(self, cell: np.ndarray | None) -> np.ndarray | None:
        """(3, 3) eV/angstrom^3, tension-positive, from a stress or a virial."""
        stress = self._take("stress", lambda key: self._tensor(key) * self.factors.stress)
        if stress is None:
            stress = self._take("virial", lambda key: self._of_virial(key, cell))
        return stress

    def _take(self, kind: str, read: Callable):
        """The label of a kind, under the first of its keys that the frame has; None where it has none."""
        for key in self.keys.get(kind, ()):
            if key in self.frame.info or key in self.frame.columns:
                try:
                    value = read(key)
                except _Missing:
                    continue
                except BadRecord as bad:
                    self.lost.append(str(bad))
                    return None
                self.found.append(kind)
                self.told.append(("labels read from", f"{kind}: {key}"))
                return value
        return None

    def _energy(self, key: str) -> float:
        value = _value(self.frame, key)
        if value.size != 1:
            raise BadRecord(f"{key} is not one number")
        energy = float(value.reshape(())) * self.factors.energy
        if np.isnan(energy):
            raise _Missing
        return energy * self.frame.natoms if self.options.energy_per_atom else energy

    def _forces(self, key: str) -> np.ndarray:
        rows = self.frame.columns.get(key)
        if rows is None:
            values = _value(self.frame, key)
        else:
            values, sound = table(rows)
            if not sound:  # those of other atoms stay
                self.lost.append(f"{key} are not numbers")
        if values.shape != (self.frame.natoms, 3):
            raise BadRecord(f"{key} have a wrong shape")
        return values * self.factors.force

    def _tensor(self, key: str) -> np.ndarray:
        value = _value(self.frame, key)
        if value.shape == (9,):
            value = value.reshape((3, 3), order="F" if key in FORTRAN_ORDER else "C")
        elif value.shape in ((6,), (1, 6), (6, 1)):
            value = value.ravel()[VOIGT]
        if value.shape != (3, 3):
            raise BadRecord(f"{key} has a wrong shape")
        return value

    def _of_virial(self, key: str, cell: np.ndarray | None) -> np.ndarray:
        virial = self._tensor(key)
        volume = 1.0  # without one `prepare` sets the label aside, and counts it
        if cell is not None and spans_volume(cell):
            volume = abs(float(determinant(cell)))
        return self.factors.stress_of_virial(virial, volume)


class _Missing(Exception):
    """A key whose value says that there is none."""


def _value(frame: Frame, key: str) -> np.ndarray:
    if key not in frame.info:
        raise BadRecord(f"{key} is a column of atoms")
    try:
        value = numbers_in(frame.info[key])
    except BadRecord as bad:
        raise BadRecord(f"{key}: {bad}") from None
    if value is None:
        raise _Missing
    return value


def record_of(frame: Frame, labels: LabelReader, where: str, options: Options) -> Structure | IsolatedAtom:
    numbers, energy = elements(frame.columns), labels.energy()
    if frame.natoms == 1 and frame.info.get("config_type", "").replace("_", "").lower() == "isolatedatom":
        if not np.isfinite(energy):
            own = labels.keys.get("energy", ())
            others = [k for k in frame.info if (name := looks_like(k)) and name.kind == "energy" and k not in own]
            keys = ",".join([*own, *others[:1]])
            more = f" (it has another key: --option energy_key={keys})" if others else ""
            raise BadRecord(f"isolated atom without an energy{more}")
        return IsolatedAtom(TASK, int(numbers[0]), energy)
    structure = geometry_of(frame, numbers, labels.factors.length, where, options)
    structure.labels = {TASK: Labels(energy, labels.forces(), labels.stress(structure.cell))}
    return structure


def with_properties(frame: Frame, seeker: Seeker, length: float, where: str, options: Options) -> Structure:
    """A frame with properties, from its keys and columns, as its labels."""
    structure = geometry_of(frame, elements(frame.columns), length, where, options)

    def value_of(key: str) -> Any:
        if (rows := frame.columns.get(key)) is not None:
            return table(rows)[0]
        if (text := frame.info.get(key)) is None or any(
            one.key == key and one.kind == "class" for one in seeker.wanted
        ):
            return text
        try:
            return numbers_in(text)
        except BadRecord:
            raise BadRecord(f"{key} is not a number") from None

    def names() -> list[str]:
        return [key for key in (*frame.columns.places, *frame.info) if key.lower() not in ("properties", "lattice")]

    structure.labels = seeker.labels(value_of, names, frame.natoms, f"frame {where}")
    return structure


def geometry_of(frame: Frame, numbers: np.ndarray, length: float, where: str, options: Options) -> Structure:
    """A frame without labels. length: unit of its positions, angstrom."""
    cell, pbc = _cell(frame, length)
    periodic = bool(pbc.any())
    charge, spin = _charge_and_spin(frame, numbers, not periodic, options)
    return Structure(
        numbers=numbers,
        positions=_positions(frame) * length,
        labels={},
        relative=formula(numbers),
        source_id=where,
        cell=cell,
        pbc=pbc if periodic else None,
        charge=charge,
        spin=spin,
    )


def _charge_and_spin(
    frame: Frame, numbers: np.ndarray, molecule: bool, options: Options
) -> tuple[int | None, int | None]:
    """Under their keys, else, of a molecule, the sums of ASE's columns of its atoms; None where nothing is stated."""
    info, charge, spin = frame.info, options.charge, options.spin
    of_charge, of_spin = options.charge_keys(), options.spin_keys()
    if not info.keys().isdisjoint(of_charge):
        charge = charge_of(info, options, of_charge)
    if not info.keys().isdisjoint((*of_spin, *MULTIPLICITY, *UNPAIRED)):
        spin = spin_of(info, options, of_spin)
    if molecule and charge is None:
        charge = of_atoms(frame.columns.get("initial_charges"))
    if molecule and spin is None:
        spin = spin_of_moments(None, frame.columns.get("initial_magmoms"), numbers, charge)
    return charge, spin


def _positions(frame: Frame) -> np.ndarray:
    name = frame.columns.named("pos", "positions")
    if name is None or frame.columns.width(name) != 3:
        raise BadRecord("no positions")
    values, sound = table(frame.columns.get(name) or [])
    if not sound:
        raise BadRecord("positions are not numbers")
    return values


def _cell(frame: Frame, length: float) -> tuple[np.ndarray | None, np.ndarray]:
    """Rows = vectors, in angstrom, as nine numbers or three lists give them; and pbc."""
    text = frame.structural("lattice")
    try:
        cell = None if text is None else numbers_in(text)
    except BadRecord:
        raise BadRecord("Lattice is not nine numbers") from None
    if cell is not None:
        if cell.size != 9:
            raise BadRecord("Lattice is not nine numbers")
        cell = cell.reshape(3, 3) * length
    flags = frame.structural("pbc")
    words = ("T" if cell is not None else "F") * 3 if flags is None else flags.strip("[]").replace(",", " ").split()
    pbc = [_FLAGS.get(word.lower()) for word in words]
    if len(pbc) != 3 or None in pbc:
        raise BadRecord("pbc is not three flags")
    return cell, np.array(pbc, bool)


_FLAGS = {**dict.fromkeys(("t", "true", "1", ".true."), True), **dict.fromkeys(("f", "false", "0", ".false."), False)}
