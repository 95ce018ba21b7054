"""Structures of ASE as packed structures: what a user hands over, checked before anything is computed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from multifid.structures.elements import MAX_Z, no_element
from multifid.structures.structure import Packed

SINGULAR = 1e-6  # volume of a cell, per product of the lengths of its vectors, below which it spans no volume


def pack_atoms(structures: Sequence[Any]) -> Packed:
    """Objects with `numbers`, `positions`, `cell`, `pbc` and `info` as `ase.Atoms` has them, laid end to end.

    Charge and multiplicity are `info["charge"]` and `info["spin"]`; a neutral singlet where they are not given.
    ValueError names the structure and what is wrong: positions that are not finite, a cell that is periodic but spans
    no volume, an unknown element, a charge or spin that is no whole number.
    """
    for k, atoms in enumerate(structures):
        _check(k, atoms)
    cells = [np.asarray(atoms.cell, np.float64).reshape(3, 3) for atoms in structures]
    return Packed(
        numbers=np.concatenate([np.zeros(0, np.int64), *(atoms.numbers for atoms in structures)]).astype(np.uint8),
        positions=np.concatenate([np.zeros((0, 3)), *(atoms.positions for atoms in structures)]),
        natoms=np.array([len(atoms.numbers) for atoms in structures], np.int64),
        cell=np.array(cells, np.float64).reshape(-1, 3, 3),
        pbc=np.array([atoms.pbc for atoms in structures], np.bool_).reshape(-1, 3),
        charge=np.array([_whole(k, a.info, "charge", 0, -128, 127) for k, a in enumerate(structures)], np.int8),
        spin=np.array([_whole(k, a.info, "spin", 1, 0, 255) for k, a in enumerate(structures)], np.uint8),
    )


def _check(k: int, atoms: Any) -> None:
    numbers, positions = np.asarray(atoms.numbers), np.asarray(atoms.positions)
    wrong = numbers[(numbers < 1) | (numbers > MAX_Z)]
    if len(wrong):
        raise ValueError(f"structure {k}: {no_element(int(wrong[0]))}")
    if not np.isfinite(positions).all():
        first = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise ValueError(
            f"structure {k}: the position of atom {first} is {positions[first].tolist()}, it must be finite"
        )
    refuse_flat(k, np.asarray(atoms.cell, np.float64).reshape(3, 3), np.asarray(atoms.pbc, bool))


def refuse_flat(k: int, cell: np.ndarray, pbc: np.ndarray) -> None:
    """ValueError where the cell (3, 3) of structure k is not finite, or spans nothing in its periodic directions."""
    if _spans(*cell.tolist()):
        return
    if not np.isfinite(cell).all():
        raise ValueError(f"structure {k}: the cell {cell.tolist()} must be finite")
    vectors = cell[pbc]
    lengths = np.linalg.norm(vectors, axis=1)
    spanned = np.sqrt(max(np.linalg.det(vectors @ vectors.T), 0.0)) if len(vectors) else 1.0
    if pbc.any() and spanned <= SINGULAR * lengths.prod():
        raise ValueError(
            f"structure {k}: periodic along {''.join(c for c, p in zip('abc', pbc, strict=True) if p)}, "
            f"but the cell vectors there span nothing: {vectors.tolist()}"
        )


def _spans(a: list[float], b: list[float], c: list[float]) -> bool:
    """Whether three vectors span a volume, so that any of them span what they should; of numbers, for each step."""
    normal = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
    volume = abs(normal[0] * c[0] + normal[1] * c[1] + normal[2] * c[2])
    return 2 * SINGULAR * math.hypot(*a) * math.hypot(*b) * math.hypot(*c) < volume < math.inf


def _whole(k: int, info: Mapping[str, Any], key: str, default: int, least: int, most: int) -> int:
    value = info.get(key, default)
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or number != round(number):
        raise ValueError(f"structure {k}: info[{key!r}] is {value!r}, it must be a whole number")
    if not least <= number <= most:
        raise ValueError(f"structure {k}: info[{key!r}] is {value!r}, it must be within {least}..{most}")
    return round(number)
