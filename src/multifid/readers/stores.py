"""Prepared stores as sources of another: several merged into one, or the structures of some that satisfy conditions.

Of a split, so many structures can be taken at random: the first ones of an order that the seed decides, so that those
of a smaller number are among those of a larger one.

Labels, cells, charges, splits and relatives are taken over as they are; what is fitted (references, scale) is fitted
again. `source_id` stays that of the original file, and the manifest names the parents with the hashes of their content.
A condition is KEY OPERATOR VALUE, several are joined by `;` and must all hold:

    atoms, charge, spin, energy (eV), energy_per_atom (eV), forces (eV/angstrom, the longest)    < <= > >= =
    elements in H,C,N,O    no other elements;    elements has Fe,Co    at least one atom of each

energy, energy_per_atom and forces are those of the only label set, or of each that a structure has where there are
several; a structure without the label does not satisfy a condition on it.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from multifid.readers.contract import IsolatedAtom, LabelSet, Part, Progress, Record, cut
from multifid.store.block import Block
from multifid.store.store import Store
from multifid.structures.elements import NUMBERS
from multifid.structures.properties import Property
from multifid.structures.structure import SPLITS

TASKS: dict[str, LabelSet] = {}  # see `label_sets`
RELATIVE = "relatives of the parents"
ENDINGS = (".store",)
FOLDER = ("manifest.json",)

PART = 1 << 15  # structures of a part
CHUNK = 4096  # structures read at once
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip
VALUES = ("atoms", "charge", "spin", "energy", "energy_per_atom", "forces")
CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|<|>|=|\bin\b|\bhas\b)\s*(.+?)\s*")


class Options(BaseModel):
    """Which structures are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    where: str = Field("", description="conditions joined by ';', as `atoms <= 50; elements in H,C,N,O; forces < 20`")
    train: int | None = Field(None, ge=0, description="at most so many structures of the train split, at random")
    validation: int | None = Field(None, ge=0, description="the same of validation")
    test: int | None = Field(None, ge=0, description="the same of test")
    seed: int = Field(0, ge=0, description="decides which ones; those of fewer are among those of more")

    @field_validator("where")
    @classmethod
    def _read(cls, value: str) -> str:
        for text in filter(str.strip, value.split(";")):
            _condition(text)
        return value

    def chosen(self, store: Store) -> np.ndarray:
        """(structures,) bool: those that the numbers of the splits leave."""
        left = np.ones(store.structures, bool)
        for split in ("train", "validation", "test"):
            most, size = getattr(self, split), store.size(split)
            if most is not None and most < size:
                order = np.random.default_rng([self.seed, SPLITS.index(split)]).permutation(size)
                left[store.pick(split, np.sort(order[most:]))] = False
        return left

    def conditions(self) -> list[tuple[str, str, Any]]:
        return [_condition(text) for text in filter(str.strip, self.where.split(";"))]


def _condition(text: str) -> tuple[str, str, Any]:
    """(key, operator, value) of a condition. ValueError says what there is."""
    found = CONDITION.fullmatch(text)
    key, sign, value = found.groups() if found else ("", "", "")
    if key == "elements" and sign in ("in", "has"):
        symbols = [symbol.strip() for symbol in value.split(",")]
        if unknown := [symbol for symbol in symbols if symbol not in NUMBERS]:
            raise ValueError(f"condition {text.strip()!r}: {unknown[0]!r} is no element")
        return key, sign, [NUMBERS[symbol] for symbol in symbols]
    if key in VALUES and sign in COMPARE:
        try:
            return key, sign, float(value)
        except ValueError:
            raise ValueError(f"condition {text.strip()!r}: {value!r} is not a number") from None
    known = f"{', '.join(VALUES)} with < <= > >= =, or elements with in or has"
    raise ValueError(f"condition {text.strip()!r} is not understood: there are {known}")


def label_sets(paths: Sequence[Path], options: "Options") -> dict[str, LabelSet]:
    """The label sets of all parents. ValueError where one name is two levels of theory."""
    found: dict[str, LabelSet] = {}
    for path in paths:
        for name, about in Store(path).manifest["tasks"].items():
            held = about.get("property")
            held = None if held is None else Property.from_manifest(name, held)
            own = LabelSet(about["level_of_theory"], about["energy_kind"], held)
            if found.setdefault(name, own) != own:
                raise ValueError(f"{path}: task {name} is {own}, in another parent {found[name]}: they cannot be one")
    return found


def lineage(path: Path) -> dict[str, Any]:
    """What the manifest says of a parent: hashes of its content and of all its bytes, and its own sources."""
    store = Store(path)
    return {"content": store.content.key, "checksum": store.checksum, "source": store.manifest["source"]}


def parts(path: Path, options: Options) -> list[Part]:
    """Structures in their order."""
    return cut([1] * Store(path).structures, PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the structures of a store that satisfy the conditions, in blocks; what does not satisfy them is no skip.

    ValueError if the store is damaged.
    """
    store = Store(path)
    start, stop = part or (0, store.structures)
    if start == 0:
        for task, about in store.manifest["tasks"].items():
            yield from (IsolatedAtom(task, int(z), energy) for z, energy in about.get("isolated", {}).items())
    of_splits = options.chosen(store)
    for first in range(start, stop, CHUNK):
        block = block_of(store, np.arange(first, min(first + CHUNK, stop)))
        chosen = of_splits[first : first + len(block)].copy()
        for condition in options.conditions():
            chosen &= _satisfies(block, store.tasks, *condition)
        if chosen.any():
            yield block.take(chosen)
        progress((min(first + CHUNK, stop) - start) / (stop - start))


def holds(path: Path) -> list[str]:
    """The label sets."""
    return [f"{task}: {about['labels']}" for task, about in Store(path).manifest["tasks"].items()]


def block_of(store: Store, indices: np.ndarray) -> Block:
    """Structures of a store with everything that it says of them."""
    packed = store.read(indices)
    columns = {
        "natoms": packed.natoms,
        "numbers": packed.numbers,
        "positions": packed.positions,
        "relative": store.rows("relative", indices),
        "split": store.rows("split", indices),
    }
    for name in ("cell", "pbc", "charge", "spin"):
        if store.has(name):
            columns[name] = getattr(packed, name)
    for task, labels in packed.labels.items():
        if labels.kind is not None:
            if labels.value is not None:
                columns[f"labels/{task}/{labels.kind}"] = labels.value
            continue
        columns[f"labels/{task}/energy"] = labels.energy
        if labels.forces is not None:
            columns[f"labels/{task}/forces"] = labels.forces
        if labels.stress is not None:
            columns[f"labels/{task}/stress"] = labels.stress
    return Block(columns, [store.source_id(int(i)) for i in indices])


def _satisfies(block: Block, tasks: list[str], key: str, sign: str, value: Any) -> np.ndarray:
    """(structures,) bool."""
    first = block.first_atoms()
    if key == "elements":
        numbers = block.columns["numbers"]
        if sign == "in":
            return np.asarray(np.logical_and.reduceat(np.isin(numbers, value), first))
        return np.all([np.logical_or.reduceat(numbers == z, first) for z in value], axis=0)
    if key in ("atoms", "charge", "spin"):
        plain = {"charge": np.zeros(len(block)), "spin": np.ones(len(block)), "atoms": block.natoms}
        return np.asarray(COMPARE[sign](block.columns.get(key, plain[key]), value))
    of_tasks = np.array([_labels(block, task, key, first) for task in tasks])
    missing = np.isnan(of_tasks)
    with np.errstate(invalid="ignore"):
        return np.asarray((COMPARE[sign](of_tasks, value) | missing).all(axis=0) & ~missing.all(axis=0))


def _labels(block: Block, task: str, key: str, first: np.ndarray) -> np.ndarray:
    """(structures,) the value of one task that a condition is about; NaN without one."""
    if key == "forces":
        forces = block.columns.get(f"labels/{task}/forces")
        if forces is None:
            return np.full(len(block), np.nan)
        lengths = np.sqrt((forces.astype(np.float64) ** 2).sum(axis=1))
        return np.asarray(np.fmax.reduceat(lengths, first))
    if f"labels/{task}/energy" not in block.columns:
        return np.full(len(block), np.nan)
    energy = np.asarray(block.columns[f"labels/{task}/energy"], np.float64)
    return energy / block.natoms if key == "energy_per_atom" else energy
