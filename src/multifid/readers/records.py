"""Raw values of one record to checked arrays in our units; what cannot be used is a `BadRecord` with the reason.

A reader builds a structure from these, catches `BadRecord` around one record, and yields a `Skip` with its reason: one
bad record never costs the file, and the reasons of all readers read alike in the manifest. What every structure must
be, whatever it was read from, is checked once for all by prepare.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np

from multifid.readers.contract import Skip
from multifid.structures.elements import MAX_Z, NUMBERS, no_element
from multifid.structures.structure import Structure

KBAR = 1.0 / 1602.1766208  # eV/angstrom^3 (CODATA 2014, as VASP and the datasets made with it)

PERIODIC = np.ones(3, bool)
PERIODIC.flags.writeable = False  # many structures share it
ZEROS = np.zeros(4096)
VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])  # where the entries of a tensor are in xx yy zz yz xz xy


class BadRecord(Exception):
    """One record cannot be used; the message is a short constant phrase, the `reason` of a `Skip`."""


def structure_or_skip(where: str, build: Callable[..., Structure], *arguments: Any) -> Structure | Skip:
    """`build(*arguments)`, or why the record cannot be used."""
    try:
        return build(*arguments)
    except BadRecord as bad:
        return Skip(str(bad), where)


def array(values: object, what: str) -> np.ndarray:
    """float64 array of nested lists (None inside counts as NaN); BadRecord where they are ragged or not numbers."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise BadRecord(f"{what} are not an array of numbers") from None


def finite(values: np.ndarray) -> bool:
    """Whether all of some float64 numbers are numbers: zero times others is none. Faster than asking, for few."""
    flat = values.ravel()
    return isfinite(flat.dot(ZEROS[: flat.size])) if flat.size <= ZEROS.size else bool(np.isfinite(flat).all())


def atomic_numbers(values: object) -> np.ndarray:
    """(atoms,) int64; every number an element, at least one atom."""
    numbers = array(values, "atomic numbers")
    if numbers.ndim != 1 or not len(numbers):
        raise BadRecord("no atoms")
    if not (np.isfinite(numbers).all() and (numbers == np.round(numbers)).all()):
        raise BadRecord("atomic numbers are not whole numbers")
    if numbers.min() < 1 or numbers.max() > MAX_Z:
        raise BadRecord(no_element(int(numbers[(numbers < 1) | (numbers > MAX_Z)][0])))
    return numbers.astype(np.int64)


def numbers_of(symbols: list) -> np.ndarray:
    """(atoms,) int64 from element symbols."""
    try:
        numbers = np.array([NUMBERS[symbol] for symbol in symbols], np.int64)
    except KeyError as unknown:
        raise BadRecord(no_element(str(unknown.args[0]))) from None
    except TypeError:
        raise BadRecord("an element that is no text") from None
    if not len(numbers):
        raise BadRecord("no atoms")
    return numbers


def vectors(values: object, atoms: int, what: str) -> np.ndarray:
    """(atoms, 3) float64, finite: positions or forces."""
    result = array(values, what)
    if result.shape != (atoms, 3):
        raise BadRecord(f"{what} of another length than the atoms")
    if not finite(result):
        raise BadRecord(f"{what} are not finite")
    return result


def number(value: object, what: str) -> float:
    """One finite number, given as a scalar or as an array of one."""
    if type(value) is float and isfinite(value):  # nearly always: the parser's own
        return value
    result = array(value, what)
    if result.size != 1:
        raise BadRecord(f"{what} is not one number")
    if not np.isfinite(result).all():
        raise BadRecord(f"{what} is not finite")
    return float(result.reshape(()))


def whole(value: object, what: str) -> int:
    """A whole number: charge or multiplicity."""
    if type(value) is int:
        return value
    result = number(value, what)
    if result != round(result):
        raise BadRecord(f"{what} is not a whole number")
    return int(result)


def stress_tensor(values: object) -> np.ndarray | None:
    """(3, 3) from a full tensor or Voigt xx yy zz yz xz xy, unit and sign kept; None (no label) where null or NaN."""
    if values is None:
        return None
    raw = array(values, "stress")
    if raw.size == 9:
        full = raw.reshape(3, 3)
    elif raw.shape == (6,):
        full = raw[VOIGT]
    else:
        raise BadRecord("stress has a wrong shape")
    return full if finite(full) else None


def periodicity(matrix: object, flags: object) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Cell (3, 3) angstrom, None where there is none, and pbc (3,) bool, None where nothing is periodic.

    The cell is kept whole: also vectors of directions that are not periodic, and those may be anything.
    """
    if isinstance(flags, list) and flags == [True, True, True]:
        return _cell(matrix), PERIODIC
    pbc = array(flags, "pbc")
    if pbc.shape != (3,) or not all(flag in (0.0, 1.0) for flag in pbc.tolist()):
        raise BadRecord("pbc is not three flags")
    periodic = pbc.astype(bool)
    if periodic.any():
        return _cell(matrix, periodic), periodic
    try:
        cell = _cell(matrix, periodic)
    except BadRecord:  # which does not matter to a molecule
        return None, None
    return (cell if cell.any() else None), None


def _cell(matrix: object, periodic: np.ndarray = PERIODIC) -> np.ndarray:
    cell = array(matrix, "cell")
    if cell.shape != (3, 3) or not finite(cell[periodic]):
        raise BadRecord("cell is not (3, 3) finite numbers")
    return cell
