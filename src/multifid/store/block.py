"""Structures as columns: what readers hand over in bulk, and what lies on disk between reading and the store.

One structure at a time costs some ten microseconds of Python for each field; in columns a block of thousands costs as
much as one structure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from multifid.store.fields import LABELS, NO_SPLIT, PROPERTIES, field
from multifid.structures.cells import kept_vectors
from multifid.structures.properties import OF_ATOMS, shape_of
from multifid.structures.structure import SPLITS, Labels, Structure

NO_CHARGE, NO_SPIN = 1, 2  # what a source does not say of a structure
IMPOSSIBLE = 1 << 31  # as a charge or a multiplicity


@dataclass(slots=True)
class Block:
    """Structures laid end to end. Columns have the names, rows and units of a store's fields; dtypes may be wider.

    natoms, numbers, positions, relative and split are always there; cell and pbc, charge, spin, labels/<task>/<kind>
    where a structure has them. Every structure has at least one atom. sources: the source id of each structure.
    unstated: (structures,) uint8, a sum of NO_CHARGE and NO_SPIN: what the source does not say of a structure; None
    where the format says it of all. told: how they were read, as (topic, text), of all of them: for the manifest.
    """

    columns: dict[str, np.ndarray]
    sources: list[str]
    unstated: np.ndarray | None = None
    told: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def natoms(self) -> np.ndarray:
        return self.columns["natoms"]

    def first_atoms(self) -> np.ndarray:
        """(structures,) int64."""
        natoms = self.natoms.astype(np.int64)
        return np.cumsum(natoms) - natoms

    def take(self, chosen: np.ndarray) -> "Block":
        """The structures where `chosen` (structures,) bool is true."""
        if chosen.all():
            return self
        rows = {"structures": chosen, "atoms": np.repeat(chosen, self.natoms)}
        columns = {name: values[rows[field(name).rows]] for name, values in self.columns.items()}
        unstated = None if self.unstated is None else self.unstated[chosen]
        return Block(columns, [self.sources[i] for i in np.flatnonzero(chosen)], unstated, self.told)

    def electrons(self) -> np.ndarray:
        """(structures,) int64: how many a structure has with the charge that is stored."""
        protons = np.add.reduceat(self.columns["numbers"].astype(np.int64), self.first_atoms())
        return protons - self.columns.get("charge", np.zeros(len(self), np.int64)).astype(np.int64)

    def molecules(self) -> np.ndarray:
        """(structures,) bool: which are periodic in no direction."""
        pbc = self.columns.get("pbc", np.zeros((len(self), 3), bool))
        return np.logical_not(pbc.any(axis=1))


def relative_hash(relative: str) -> int:
    """What a store keeps of the name of a structure's relatives."""
    return xxhash.xxh3_64_intdigest(relative.encode())


def pack(structures: Sequence[Structure]) -> Block:
    """Well-formed structures (`validate.malformed`), at least one, as columns."""
    natoms = np.array([len(s.numbers) for s in structures])
    columns = {
        "natoms": natoms,
        "numbers": np.concatenate([s.numbers for s in structures]).astype(np.int64),
        "positions": np.concatenate([np.asarray(s.positions, np.float64) for s in structures]),
        "relative": np.array([relative_hash(s.relative) for s in structures], np.uint64),
        "split": np.array([NO_SPLIT if s.split is None else SPLITS.index(s.split) for s in structures], np.uint8),
    }
    if any(s.cell is not None for s in structures):
        pbc = np.array([np.zeros(3, bool) if s.pbc is None else np.asarray(s.pbc, bool) for s in structures])
        cells = np.array([np.zeros((3, 3)) if s.cell is None else s.cell for s in structures], np.float64)
        cells = kept_vectors(cells, pbc)
        if cells.any() or pbc.any():
            columns |= {"pbc": pbc, "cell": cells}
    columns |= _charges(structures)
    for task in dict.fromkeys(task for s in structures for task in s.labels):
        columns |= _label_columns(task, structures, natoms)
    unstated = [NO_CHARGE * (s.charge is None) + NO_SPIN * (s.spin is None) for s in structures]
    return Block(columns, [s.source_id for s in structures], np.array(unstated, np.uint8))


def _charges(structures: Sequence[Structure]) -> dict[str, np.ndarray]:
    """The columns charge and spin, where some structure is no neutral singlet."""
    charge = np.array([_storable(s.charge or 0) for s in structures], np.int64)
    spin = np.array([_lowest(s) if s.spin is None else _storable(s.spin) for s in structures], np.int64)
    columns = {"charge": charge, "spin": spin}
    return {name: values for name, values in columns.items() if (values != field(name).absent).any()}


def _storable(value: int) -> int:
    """The value, or where no integer of a column can hold it one that is as impossible."""
    return max(-IMPOSSIBLE, min(value, IMPOSSIBLE))


def _lowest(structure: Structure) -> int:
    """The lowest multiplicity of a molecule whose charge is known; 1 otherwise, which says nothing to a model."""
    if structure.charge is None or (structure.pbc is not None and np.any(structure.pbc)):
        return 1
    return 1 + (int(np.sum(structure.numbers)) - structure.charge) % 2


def _label_columns(task: str, structures: Sequence[Structure], natoms: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of one task, NaN where a structure has no such label."""
    labels = [s.labels.get(task) for s in structures]
    if (kind := next((x.kind for x in labels if x is not None), None)) is not None:
        return {f"labels/{task}/{kind}": _property_column(kind, labels, natoms)}
    columns = {f"labels/{task}/energy": np.array([np.nan if x is None else x.energy for x in labels], np.float64)}
    for kind in ("forces", "stress"):
        values = [None if x is None else getattr(x, kind) for x in labels]
        if all(v is None for v in values):
            continue
        if kind == "forces":
            parts = [np.full((n, 3), np.nan) if v is None else v for v, n in zip(values, natoms, strict=True)]
            columns[f"labels/{task}/forces"] = np.concatenate(parts, dtype=np.float64)
        else:
            parts = [np.full((3, 3), np.nan) if v is None else v for v in values]
            columns[f"labels/{task}/stress"] = np.array(parts, np.float64)
    return columns


def _property_column(kind: str, labels: Sequence[Labels | None], natoms: np.ndarray) -> np.ndarray:
    """One property, NaN where a structure has no label."""
    shape = shape_of(kind)
    rows = [(n, *shape) if kind in OF_ATOMS else (1, *shape) for n in natoms.tolist()]
    parts = [
        np.full(row, np.nan) if x is None or x.value is None else np.asarray(x.value, np.float64).reshape(row)
        for x, row in zip(labels, rows, strict=True)
    ]
    return np.concatenate(parts)


def join(blocks: Sequence[Block]) -> Block:
    """Blocks laid end to end in the store's dtypes; a column that only some have says nothing for the others."""
    if not blocks:
        return Block({}, [])
    names = list(dict.fromkeys(name for block in blocks for name in block.columns))
    columns = {}
    for name in names:
        what = field(name)
        parts = []
        for block in blocks:
            rows = len(block) if what.rows == "structures" else int(block.natoms.sum())
            values = block.columns.get(name)
            if values is None:
                values = np.full((rows, *what.row), what.absent, what.dtype)
            parts.append(np.asarray(values, what.dtype))
        columns[name] = np.concatenate(parts)
    return Block(columns, [source for block in blocks for source in block.sources])


def tasks_of(columns: Iterable[str]) -> list[str]:
    """The label sets among the names of columns, in order."""
    return list(dict.fromkeys(name.split("/")[1] for name in columns if name.startswith("labels/")))


def label_columns(block: Block, kind: str) -> list[str]:
    """The names of the columns of one kind of label, of all tasks."""
    assert kind in LABELS or kind in PROPERTIES
    return [name for name in block.columns if name.startswith("labels/") and name.endswith(f"/{kind}")]
