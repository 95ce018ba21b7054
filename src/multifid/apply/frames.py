"""Files of structures, one after the other: whatever ASE reads, stores, and ASE databases in LMDB.

Memory does not grow with extended XYZ, ASE trajectories, stores and databases; other formats are as ASE reads them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from multifid.readers import aselmdb
from multifid.readers.contract import Skip
from multifid.store.fields import MANIFEST
from multifid.store.store import Store

AT_ONCE = 256  # structures of a store that are read together
INTERNAL = ("\n", "\r", '"')  # what a value of extended XYZ cannot hold


@dataclass(slots=True)
class Given:
    """One structure that a file gives, where it was found, for people, and its number among all of all files."""

    atoms: Atoms
    where: str
    number: int = 0


@dataclass(slots=True)
class Unread:
    """A record of a file that holds no structure, and why."""

    where: str
    why: str


def refuse_missing(paths: Sequence[Path]) -> None:
    """ValueError names a path that is not there."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: not found; structures come from files that ASE reads, stores, and .aselmdb")


def frames(paths: Sequence[Path]) -> Iterator[Given | Unread]:
    """The structures of files and stores, in their order, without labels.

    ValueError names a path that is not there, cannot be read, or holds no structure.
    """
    refuse_missing(paths)
    number = 0
    for path in paths:
        found = None
        for found in _of(path):
            if isinstance(found, Given):
                found.number = number
            number += 1
            yield found
        if found is None:
            raise ValueError(f"{path}: it holds no structure")


def _of(path: Path) -> Iterator[Given | Unread]:
    if (path / MANIFEST).exists():
        return _of_store(path)
    if path.is_dir():
        raise ValueError(f"{path}: a directory, but no store (it has no {MANIFEST}): name the files in it")
    return _of_database(path) if path.name.lower().endswith(aselmdb.ENDINGS) else _of_ase(path)


def _of_store(path: Path) -> Iterator[Given]:
    store = Store(path)
    for start in range(0, store.structures, AT_ONCE):
        index = np.arange(start, min(start + AT_ONCE, store.structures))
        packed = store.read(index, [])
        ends = packed.offsets
        for k, i in enumerate(index.tolist()):
            atoms = slice(ends[k], ends[k + 1])
            info: dict[str, Any] = {"source": f"{store.source_file(i)}: {store.source_id(i)}"}
            info |= _electrons(int(packed.charge[k]), int(packed.spin[k]))
            made = Atoms(packed.numbers[atoms], packed.positions[atoms], cell=packed.cell[k], pbc=packed.pbc[k])
            made.info = info
            yield Given(made, f"{path}, structure {i}")


def _of_database(path: Path) -> Iterator[Given | Unread]:
    for found in aselmdb.geometries(path):
        if isinstance(found, Skip):
            yield Unread(f"{path}, row {found.where}", found.reason)
            continue
        cell = np.zeros((3, 3)) if found.cell is None else found.cell
        atoms = Atoms(found.numbers, found.positions, cell=cell, pbc=False if found.pbc is None else found.pbc)
        atoms.info = {"source": found.source_id, **_electrons(found.charge or 0, found.spin or 1)}
        yield Given(atoms, f"{path}, row {found.source_id}")


def _electrons(charge: int, spin: int) -> dict[str, int]:
    """Charge and multiplicity where they are not those of a neutral singlet."""
    return ({"charge": charge} if charge else {}) | ({"spin": spin} if spin != 1 else {})


def _of_ase(path: Path) -> Iterator[Given]:
    number = 0
    try:
        for atoms in ase.io.iread(path, index=":", do_not_split_by_at_sign=True):
            atoms.calc = None
            atoms.info = {key: value for key, value in atoms.info.items() if _fits(value)}
            yield Given(atoms, f"{path}, structure {number}")
            number += 1
    except GeneratorExit:
        raise
    except Exception as error:  # whatever ASE makes of a damaged file: ValueError, KeyError, IndexError, its own
        why = str(error) or type(error).__name__
        raise ValueError(f"{path}: ASE cannot read structure {number} ({type(error).__name__}: {why})") from error


def _fits(value: Any) -> bool:
    """Whether extended XYZ can hold a value of `info`."""
    if isinstance(value, str):
        return not any(sign in value for sign in INTERNAL)
    return isinstance(value, int | float | np.number | np.bool_) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "ifb" and value.ndim <= 2
    )
