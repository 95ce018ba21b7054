"""Properties beside energy, forces and stress: what kinds there are, how one is named, and what is subtracted of it.

    intensive    a number of a structure that two far copies share: a band gap, a density
    extensive    a number of a structure that two far copies have twice: a number of electrons, a polarisability
    class        one of several classes of a structure: metal or not
    vector       a vector of a structure, the sum of those of its atoms: a dipole of a neutral molecule
    atom         a number of each atom: charges, magnetic moments
    atom_vector  a vector of each atom

A property is a task of its own: a label set of a store with one kind of label, and a branch that predicts it in place
of energies. Values are in the units of the source. NaN = no label.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("intensive", "extensive", "class", "vector", "atom", "atom_vector")
OF_ATOMS = ("atom", "atom_vector")
VECTORS = ("vector", "atom_vector")
MOST_CLASSES = 1_000
NAME = re.compile(r"[A-Za-z0-9_-]+")
FORM = "NAME[=KEY]:KIND, with KIND one of " + ", ".join(KINDS) + " (class:A,B,... names the classes)"


@dataclass(frozen=True)
class Property:
    """One property of a source: its name (that of its task), its kind, where it stands, and the names of classes."""

    name: str
    kind: str
    key: str
    classes: tuple[str, ...] = ()  # named; else classes are whole numbers from 0

    @classmethod
    def parse(cls, text: str) -> "Property":
        """`gap:intensive`, `gap=homo_lumo_gap:intensive`, `metal:class`, `metal:class:no,yes`. ValueError otherwise."""
        named, _, rest = text.strip().partition(":")
        kind, colon, listed = rest.partition(":")
        name, equals, key = named.partition("=")
        kind = kind.strip().replace("-", "_")
        if not NAME.fullmatch(name) or kind not in KINDS or (equals and not key):
            raise ValueError(f"property {text!r} must be {FORM}")
        classes = tuple(one.strip() for one in listed.split(",")) if colon else ()
        if colon and kind != "class":
            raise ValueError(f"property {text!r}: only a class has names behind its kind")
        if colon and (len(classes) < 2 or len(set(classes)) < len(classes) or "" in classes):
            raise ValueError(f"property {text!r}: classes are at least two different names, as metal:class:no,yes")
        return cls(name, kind, key or name, classes)

    def __str__(self) -> str:
        named = self.name if self.key == self.name else f"{self.name}={self.key}"
        return f"{named}:{self.kind}" + (f":{','.join(self.classes)}" if self.classes else "")

    def to_manifest(self) -> dict[str, Any]:
        """What a manifest and a model's description say of it."""
        return {"kind": self.kind, "key": self.key, "classes": list(self.classes)}

    @classmethod
    def from_manifest(cls, name: str, about: Mapping[str, Any]) -> "Property":
        return cls(name, about["kind"], about["key"], tuple(about["classes"]))


def shape_of(kind: str) -> tuple[int, ...]:
    """Of the value of one structure or atom."""
    return (3,) if kind in VECTORS else ()


def subtracted(kind: str, table: np.ndarray, numbers: np.ndarray, natoms: np.ndarray) -> np.ndarray:
    """What is known of a property from composition alone, which a branch need not learn.

    Sums over atoms for extensive numbers, means for intensive ones, the element's for numbers of atoms, zero for the
    others; (structures,) or (atoms,). table: (119,) by atomic number, NaN where an element is unknown.
    """
    if kind == "atom":
        return table[numbers]
    if kind not in ("extensive", "intensive"):
        return np.zeros(len(numbers) if kind == "atom_vector" else len(natoms))
    sums = np.zeros(len(natoms))
    np.add.at(sums, np.repeat(np.arange(len(natoms)), natoms), table[numbers])
    return sums if kind == "extensive" else sums / natoms


def aligned(kind: str, values: np.ndarray, table: np.ndarray, numbers: np.ndarray, natoms: np.ndarray) -> np.ndarray:
    """Values (n, ...) without what `subtracted` gives."""
    known = subtracted(kind, table, numbers, natoms)
    return np.asarray(values, np.float64) - known.reshape(-1, *[1] * (values.ndim - 1))
