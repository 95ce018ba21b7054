"""Units by name, as people write them in files and options, in eV and angstrom; and the options that say them.

`kcal/mol/A`, `hartree/bohr`, `eV/Å^3`, `kJ mol-1 nm-1`, `GPa`: products of base units. `a.u.` is an atomic unit of
whatever it is said of. CODATA 2018.
"""

import re
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

JOULE = 1.0 / 1.602176634e-19  # eV
PASCAL = JOULE * 1e-30  # eV/angstrom^3
HARTREE, BOHR = 27.211386245988, 0.529177210903

ENERGY, LENGTH, FORCE, STRESS = (1, 0), (0, 1), (1, -1), (1, -3)  # powers of energy and of length
KINDS = {"energy": ENERGY, "length": LENGTH, "force": FORCE, "stress": STRESS, "virial": ENERGY}
KNOWN = {
    ENERGY: "eV, meV, hartree (Ha), rydberg (Ry), kcal/mol, kJ/mol, J",
    LENGTH: "angstrom (A), bohr, nm, pm",
    FORCE: "eV/angstrom, hartree/bohr, kcal/mol/angstrom and other units of energy by units of length",
    STRESS: "eV/angstrom^3, GPa, MPa, kPa, Pa, kbar, bar, atm, hartree/bohr^3 and other units of energy by volume",
}
_BASE: dict[str, tuple[float, tuple[int, int]]] = {
    "ev": (1.0, ENERGY),
    "mev": (1e-3, ENERGY),
    "hartree": (HARTREE, ENERGY),
    "rydberg": (HARTREE / 2, ENERGY),
    "kcal": (4184.0 * JOULE, ENERGY),
    "kj": (1000.0 * JOULE, ENERGY),
    "j": (JOULE, ENERGY),
    "mol": (6.02214076e23, (0, 0)),
    "angstrom": (1.0, LENGTH),
    "bohr": (BOHR, LENGTH),
    "nm": (10.0, LENGTH),
    "pm": (0.01, LENGTH),
    "gpa": (1e9 * PASCAL, STRESS),
    "mpa": (1e6 * PASCAL, STRESS),
    "kpa": (1e3 * PASCAL, STRESS),
    "pa": (PASCAL, STRESS),
    "kbar": (1e8 * PASCAL, STRESS),
    "bar": (1e5 * PASCAL, STRESS),
    "atm": (101325.0 * PASCAL, STRESS),
}
_ALIASES = {
    "electronvolt": "ev", "ha": "hartree", "eh": "hartree", "har": "hartree", "ry": "rydberg", "ryd": "rydberg",
    "joule": "j", "mole": "mol", "a": "angstrom", "å": "angstrom", "ang": "angstrom", "ångström": "angstrom",
    "ångstrom": "angstrom", "angstroem": "angstrom", "aa": "angstrom", "a0": "bohr", "nanometer": "nm", "kb": "kbar",
    "kilobar": "kbar", "gigapascal": "gpa", "pascal": "pa", "atmosphere": "atm",
}  # fmt: skip
_ATOMIC = {ENERGY: HARTREE, LENGTH: BOHR, FORCE: HARTREE / BOHR, STRESS: HARTREE / BOHR**3}
_SYSTEMS = {  # what `units` may say of all quantities at once; the last three as LAMMPS has them
    "ase": {},
    "atomic": {"energy": "hartree", "length": "bohr", "force": "hartree/bohr", "stress": "hartree/bohr^3"},
    "metal": {"stress": "bar"},
    "real": {"energy": "kcal/mol", "force": "kcal/mol/angstrom", "stress": "atm"},
    "electron": {"energy": "hartree", "length": "bohr", "force": "hartree/bohr", "stress": "Pa"},
}
_FACTOR = re.compile(r"([./*]?)([^\W\d_]+0?)\^?\(?(-?\d+)?\)?")


def factor(text: str, dimension: tuple[int, int], what: str = "unit") -> float:
    """How many of our units one of these is. ValueError names those that are known where it is none of the dimension.

    dimension: powers of energy and length. what: what the text is, for the message.
    """
    value, powers = _parsed(text)
    if value is None and text.strip().lower() in ("a.u.", "au", "a.u", "atomic", "atomic units"):
        return _ATOMIC[dimension]
    if value is None or powers != dimension:
        named = {kind_dimension: kind for kind, kind_dimension in reversed(KINDS.items())}[dimension]
        raise ValueError(f"{what} {text!r} is not a unit of {named} that is known: {KNOWN[dimension]}")
    return value


@lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[float | None, tuple[int, int]]:
    """(value, powers) of a product of base units; None where it is none."""
    flat = re.sub(r"/\(([^()]*)\)", lambda m: "/" + re.sub(r"[\s.*·]+", "/", m[1].strip()), text.strip())
    flat = re.sub(r"[\s·]+", "*", flat.replace("**", "^").replace("⁻¹", "-1").replace("³", "3").replace("Å", "Å"))
    flat = re.sub(r"\*?([/*^])\*?", r"\1", flat)
    value, energy, length, place = 1.0, 0, 0, 0
    while place < len(flat):
        match = _FACTOR.match(flat, place)
        if match is None or (place > 0) != bool(match[1]):
            return None, (0, 0)
        base = _base(match[2])
        if base is None:
            return None, (0, 0)
        power = int(match[3] or 1) * (-1 if match[1] == "/" else 1)
        if abs(power) > 3:
            return None, (0, 0)
        value *= base[0] ** power
        energy, length, place = energy + base[1][0] * power, length + base[1][1] * power, match.end()
    return (value if place else None), (energy, length)


def _base(name: str) -> tuple[float, tuple[int, int]] | None:
    lower = name.lower()
    if name in ("MeV", "mPa", "mbar", "PM", "Nm"):  # another prefix than those that are meant without regard to case
        return None
    for known in (lower, lower.removesuffix("s")):
        if (base := _BASE.get(_ALIASES.get(known, known))) is not None:
            return base
    return (1e11 * PASCAL, STRESS) if name == "Mbar" else None


class SignOptions(BaseModel):
    """What the user says of the sign of a stress or virial."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stress_sign: Literal["tension", "compression"] | None = Field(
        None,
        description="what is positive in the stress: tension (as in ASE; virial = -stress x volume) or compression (as"
        " in VASP, and as a pressure; both signs reversed)",
    )


class StressOptions(SignOptions):
    """What the user says of the stress in a file."""

    stress_unit: str | None = Field(
        None,
        description="unit of the stress: GPa, kbar, eV/angstrom^3, ...; default: what is declared, else the format's",
    )

    @field_validator("stress_unit")
    @classmethod
    def _stress(cls, text: str | None) -> str | None:
        return _checked(text, STRESS)

    def stress_factor(self, unit: float, tension: bool) -> float:
        """eV/angstrom^3, tension-positive, for one of the file. unit, tension: what the options leave open."""
        size = unit if self.stress_unit is None else factor(self.stress_unit, STRESS)
        positive = tension if self.stress_sign is None else self.stress_sign == "tension"
        return size if positive else -size


class VirialUnitOptions(SignOptions):
    """What the user says of the units of a file whose only stress is a virial, in its unit of energy."""

    energy_unit: str | None = Field(
        None, description="unit of energies: hartree, kcal/mol, ...; default: what the file declares, else eV"
    )
    length_unit: str | None = Field(
        None, description="unit of positions and cell: bohr, nm, ...; default: what the file declares, else angstrom"
    )
    force_unit: str | None = Field(
        None,
        description="unit of forces: hartree/bohr, ...; default: what the file declares, else energy_unit/length_unit",
    )

    @field_validator("energy_unit")
    @classmethod
    def _energy(cls, text: str | None) -> str | None:
        return _checked(text, ENERGY)

    @field_validator("length_unit")
    @classmethod
    def _length(cls, text: str | None) -> str | None:
        return _checked(text, LENGTH)

    @field_validator("force_unit")
    @classmethod
    def _force(cls, text: str | None) -> str | None:
        return _checked(text, FORCE)

    def factors(self, declared: dict[str, str] | None = None) -> "Factors":
        """From a file's units to ours: as the options say, else as the file declares (quantity -> unit), else ASE's.

        Units of forces and stress follow from those of energy and length where nobody says them.
        """
        told = {**(declared or {}), **{kind: unit for kind in KINDS if (unit := getattr(self, f"{kind}_unit", None))}}

        def of(kind: str, default: float) -> float:
            return factor(told[kind], KINDS[kind]) if kind in told else default

        energy, length = of("energy", 1.0), of("length", 1.0)
        stress = of("stress", energy / length**3)
        sign = -1.0 if self.stress_sign == "compression" else 1.0
        return Factors(energy, length, of("force", energy / length), sign * stress, -sign * of("virial", energy))


class UnitOptions(VirialUnitOptions, StressOptions):
    """What the user says of all units of a file."""


class Factors(NamedTuple):
    """What values of a file are multiplied by; a virial, also divided by the volume in cubic angstrom, is a stress."""

    energy: float
    length: float
    force: float
    stress: float
    virial: float

    def stress_of_virial(self, virial: np.ndarray, volume: float) -> np.ndarray:
        """(3, 3) eV/angstrom^3, tension-positive."""
        return virial * (self.virial / volume)


def _checked(text: str | None, dimension: tuple[int, int]) -> str | None:
    if text is not None:
        factor(text, dimension)
    return text


_OF = {
    "energy": "energy", "energies": "energy", "free_energy": "energy", "total_energy": "energy",
    "force": "force", "forces": "force", "stress": "stress", "stresses": "stress", "virial": "virial",
    "virials": "virial", "length": "length", "distance": "length", "position": "length", "positions": "length",
    "pos": "length", "coordinates": "length", "coords": "length", "cell": "length", "lattice": "length",
}  # fmt: skip
_OPTION = {"virial": "energy"}  # quantity -> the option of its unit, where that has another name
_UNIT_OF = re.compile(rf"(?:\w+_)??({'|'.join(_OF)})_units?|units?_(?:of_)?({'|'.join(_OF)})")


def declares_unit(key: str) -> bool:
    """Whether a key of a file is one that declares units of what we read."""
    name = key.lower().replace("-", "_")
    return name in ("unit", "units") or _UNIT_OF.fullmatch(name) is not None


def declared_units(info: dict[str, str], options: UnitOptions) -> dict[str, str]:
    """Quantity -> unit, from keys as `energy-unit=hartree`, `stress_units=GPa`, `units="eV, angstrom"`, `units=metal`.

    ValueError for one that is not known, unless the options say what it is.
    """
    general: dict[str, str] = {}
    special: dict[str, tuple[str, str]] = {}  # quantity -> key, unit
    for key, text in info.items():
        name = key.lower().replace("-", "_")
        if name in ("unit", "units"):
            if not (options.energy_unit and options.length_unit):
                general |= _general(key, text)
        elif match := _UNIT_OF.fullmatch(name):
            kind = _OF[match[1] or match[2]]
            if getattr(options, f"{_OPTION.get(kind, kind)}_unit") is None:
                if kind in special and factor(special[kind][1], KINDS[kind]) != factor(text, KINDS[kind], key):
                    raise ValueError(f"{special[kind][0]} and {key} are different units of {kind}")
                _known(key, text, kind)
                special[kind] = key, text
    return {**general, **{kind: text for kind, (_, text) in special.items()}}


def _known(key: str, text: str, kind: str) -> None:
    try:
        factor(text, KINDS[kind], f"{key}:")
    except ValueError as error:
        raise ValueError(f"{error} (--option {_OPTION.get(kind, kind)}_unit=UNIT says what it is)") from None


def _general(key: str, text: str) -> dict[str, str]:
    """What `units` says: a system of units, or some units, each told by what it is a unit of."""
    word = text.strip().lower()
    if word in _SYSTEMS or word in ("a.u.", "au", "a.u"):
        return dict(_SYSTEMS["atomic" if word.startswith("a.") or word == "au" else word])
    found: dict[str, str] = {}
    for part in filter(None, re.split(r"[,;\s]+", text)):
        name, _, unit = part.rpartition("=" if "=" in part else ":")
        powers = _parsed(unit)[1] if _parsed(unit)[0] is not None else None
        kind = _OF.get(name.lower()) or next((k for k, d in KINDS.items() if d == powers), None)
        if kind is None or (powers != KINDS[kind]):
            raise ValueError(
                f"{key}: {text!r} are not units that are known: {', '.join(_SYSTEMS)}, or of energy"
                f" ({KNOWN[ENERGY]}), length ({KNOWN[LENGTH]}), force and stress, one after the other"
                " (--option energy_unit=UNIT --option length_unit=UNIT say what they are)"
            )
        found[kind] = unit
    return found
