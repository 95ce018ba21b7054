"""ASE databases in LMDB (`*.aselmdb`): OMat24, sAlex, OMol25, OPoly26, OMC25, OC25, ODAC25, newer OC20.

One LMDB file; keys are ascii integers from 1, each value is zlib(JSON) of a database row. Other keys (`nextid`,
`metadata`, `deleted_ids`) are not rows. Arrays come in two encodings, as plain nested lists and as
`{"__ndarray__": [shape, dtype, flat values]}`. Energies in eV, forces in eV/angstrom, stress (Voigt xx yy zz yz xz xy)
in eV/angstrom^3, tension-positive: the units of ASE and ours. Charge and multiplicity are in `data` (OMol25), or in
`key_value_pairs`, see `charges`; an OMol25 row without a charge is skipped.

The file does not say which data set it is part of, and their levels of theory differ: the option `dataset` says it to
the manifest. Rows whose `data.sid` starts with the name of a material (`agm011722394_0_0`: material, run, step) have
that material as relative; others, as OMol25's molecules, have their formula, which is what OMol25 splits by itself.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from multifid.readers.charges import ChargeOptions, charge_of, of_atoms, spin_of, spin_of_moments
from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, cut
from multifid.readers.holdings import listed
from multifid.readers.lmdb_file import opened_lmdb
from multifid.readers.properties import PropertyOptions, Seeker
from multifid.readers.records import (
    BadRecord,
    array,
    atomic_numbers,
    number,
    periodicity,
    stress_tensor,
    structure_or_skip,
    vectors,
)
from multifid.readers.units import UnitOptions
from multifid.structures.elements import formula
from multifid.structures.structure import Labels, Structure

TASKS = {
    "aselmdb": LabelSet("not stated in the file", "total"),
    "omat24": LabelSet("PBE / PBE+U (VASP, PBE_54 potentials)", "total, uncorrected (VASP)"),
    "salex": LabelSet("PBE / PBE+U (VASP, Alexandria)", "total, uncorrected (VASP)"),
    "omol25": LabelSet("wB97M-V/def2-TZVPD (ORCA 6)", "total"),
    "opoly26": LabelSet("wB97M-V/def2-TZVPD (ORCA 6)", "total"),
    "omc25": LabelSet("PBE+D3 (VASP)", "total, uncorrected (VASP)"),
    "oc20": LabelSet("RPBE (VASP)", "total, uncorrected (VASP)"),
    "oc22": LabelSet("PBE+U (VASP)", "total, uncorrected (VASP)"),
    "oc25": LabelSet("RPBE+D3 (VASP)", "total, uncorrected (VASP)"),
    "odac23": LabelSet("PBE+D3 (VASP)", "total, uncorrected (VASP)"),
    "odac25": LabelSet("PBE+D3 (VASP)", "total, uncorrected (VASP)"),
}
CHARGED = ("omol25", "opoly26")  # data sets whose rows must state a charge
RELATIVE = "material or formula"
ENDINGS = (".aselmdb",)

PART = 20_000  # keys of a part
LARGEST_ROW = 1 << 25  # bytes of JSON; the largest published rows are below 2^22
MATERIAL = re.compile(r"(agm\d+|mp-\d+|mvc-\d+|wbm-\d+-\d+)(?:_|$)")


class Options(ChargeOptions, UnitOptions, PropertyOptions):
    """What to read of an ASE database."""

    dataset: Literal[
        "aselmdb", "omat24", "salex", "omol25", "opoly26", "omc25", "oc20", "oc22", "oc25", "odac23", "odac25"
    ] = Field(
        "aselmdb", description="the data set the file is part of, and with it the level of theory in the manifest"
    )


def parts(path: Path, options: Options) -> list[Part]:
    """Keys in the order of the file, PART at a time."""
    with _rows(path) as (_, entries, _):
        return cut([1] * entries, PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Every row of the database, or why it is skipped; part: which of its keys. Memory holds one row.

    A row without energy is a skip; without forces or stress, a missing label. `source_id` is the row's key. ValueError
    if the file is truncated or not LMDB.
    """
    if not options.properties:
        yield from _records(path, options, progress, part, _structure)
        return
    seeker = Seeker(path, options)
    yield from _records(path, options, progress, part, partial(_with_properties, seeker))
    if part is None or part[0] == 0:
        seeker.check()


def geometries(path: Path) -> Iterator[Structure | Skip]:
    """Every row of the database without its labels, which it need not have, or why it is skipped."""
    return _records(path, Options(), lambda far: None, None, _geometry)


def _records(
    path: Path, options: Options, progress: Progress, part: Part, structure: Callable[..., Structure]
) -> Iterator[Any]:
    with _rows(path) as (cursor, entries, deleted):
        start, stop = part or (0, entries)
        keys = 0
        for place, key in enumerate(islice(cursor.iternext(values=False), stop)):
            if place < start:
                keys += key.isdigit()
                continue
            if place % 100 == 0:
                progress((place - start) / (stop - start))
            if not key.isdigit():
                continue
            keys += 1
            where = key.decode("ascii")
            if int(where) in deleted:
                yield Skip("row is deleted", where)
            else:
                yield structure_or_skip(where, structure, cursor.value(), where, options)
        if not keys and stop == entries:
            raise ValueError(f"{path}: not an ASE database: no key is the number of a row")
    progress(1.0)


def holds(path: Path) -> list[str]:
    """Keys of the first row."""
    with _rows(path) as (cursor, _, _):
        for key in cursor.iternext(values=False):
            if key.isdigit():
                row = _json(cursor.value())
                return listed(row) if isinstance(row, dict) else []
    return []


@contextmanager
def _rows(path: Path) -> Iterator[tuple[Any, int, set[int]]]:
    """(cursor, number of keys, deleted rows)."""
    with opened_lmdb(path) as (transaction, entries):
        deleted = transaction.get(b"deleted_ids")
        yield transaction.cursor(), entries, _ids(deleted, path) if deleted else set()


def _ids(value: bytes, path: Path) -> set[int]:
    try:
        return {int(i) for i in _json(value)}
    except (BadRecord, TypeError, ValueError):
        raise ValueError(f"{path}: deleted_ids is not a list of row numbers") from None


def _json(value: bytes) -> Any:
    """The JSON inside a compressed value (Python's dialect: ASE writes NaN as a bare token)."""
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(value, LARGEST_ROW)
        if decoder.unconsumed_tail:
            raise BadRecord("row is implausibly large")
        if not decoder.eof:
            raise BadRecord("row is truncated")
        return json.loads(text)
    except (zlib.error, ValueError, RecursionError):
        raise BadRecord("row is not compressed JSON") from None


def _array(value: Any, what: str) -> np.ndarray:
    """float64 array from either encoding."""
    if not isinstance(value, dict):
        return array(value, what)
    match value.get("__ndarray__"):
        case [list(shape), str(), flat] if all(isinstance(n, int) and n >= 0 for n in shape):
            values = array(flat, what)
            if values.size == int(np.prod(shape)):
                return values.reshape(shape)
    raise BadRecord(f"{what} are not an array of numbers")


def _structure(value: bytes, where: str, options: Options) -> Structure:
    row = _row(value)
    structure = _geometry_of(row, where, options)
    forces, stress = row.get("forces"), row.get("stress")
    tensor = None if stress is None else stress_tensor(_array(stress, "stress"))
    factors, atoms = options.factors(), len(structure.numbers)
    structure.labels[options.dataset] = Labels(
        energy=number(row.get("energy"), "energy") * factors.energy,
        forces=None if forces is None else vectors(_array(forces, "forces"), atoms, "forces") * factors.force,
        stress=None if tensor is None else tensor * factors.stress,
    )
    return structure


def _with_properties(seeker: Seeker, value: bytes, where: str, options: Options) -> Structure:
    """A row with properties as its labels, from its own keys, `data`, `key_value_pairs` or `info`."""
    row = _row(value)
    structure = _geometry_of(row, where, options)
    places = [row, *(p for name in ("data", "key_value_pairs", "info") if isinstance(p := row.get(name), dict))]

    def value_of(key: str) -> Any:
        raw = next((place[key] for place in places if place.get(key) is not None), None)
        return _array(raw, key) if isinstance(raw, dict) else raw

    def names() -> list[str]:
        return list(dict.fromkeys(key for place in places for key in place))

    structure.labels |= seeker.labels(value_of, names, len(structure.numbers), f"row {where}")
    return structure


def _geometry(value: bytes, where: str, options: Options) -> Structure:
    return _geometry_of(_row(value), where, options)


def _row(value: bytes) -> dict[str, Any]:
    row = _json(value)
    if not isinstance(row, dict) or "numbers" not in row or "positions" not in row:
        raise BadRecord("row without numbers and positions")
    return row


def _geometry_of(row: dict[str, Any], where: str, options: Options) -> Structure:
    data = row.get("data")
    data = data if isinstance(data, dict) else {}
    numbers = atomic_numbers(_array(row["numbers"], "atomic numbers"))
    cell, pbc = periodicity(_array(row.get("cell"), "cell"), _array(row.get("pbc", [False] * 3), "pbc"))
    length = options.factors().length
    charge, spin = _charge_and_spin(row, data, numbers, pbc is None, options)
    return Structure(
        numbers=numbers,
        positions=vectors(_array(row["positions"], "positions"), len(numbers), "positions") * length,
        labels={},
        relative=_relative(data.get("sid"), numbers),
        source_id=where,
        cell=None if cell is None else cell * length,
        pbc=pbc,
        charge=charge,
        spin=spin,
    )


def _charge_and_spin(
    row: dict[str, Any], data: dict[str, Any], numbers: np.ndarray, molecule: bool, options: Options
) -> tuple[int | None, int | None]:
    """What `data`, `key_value_pairs` or `info` state; else, of a molecule, what ASE's values of its atoms add up to."""
    places = (data, row.get("key_value_pairs"), row.get("info"), data.get("info"))
    stated: dict[str, Any] = {}
    for place in places:
        if isinstance(place, dict):
            stated |= {key: value for key, value in place.items() if stated.get(key) is None}
    charge, spin = charge_of(stated, options), spin_of(stated, options)
    if molecule and charge is None:
        charge = of_atoms(_optional(row.get("initial_charges")))
    if molecule and spin is None:
        spin = spin_of_moments(row.get("magmom"), _optional(row.get("initial_magmoms")), numbers, charge)
    if charge is None and options.dataset in CHARGED:
        raise BadRecord("no charge is stated (--option charge=0 states it)")
    return charge, spin


def _optional(value: Any) -> np.ndarray | None:
    """An array in either encoding, or None where there is none that can be read."""
    try:
        return None if value is None else _array(value, "charges")
    except BadRecord:
        return None


def _relative(sid: Any, numbers: np.ndarray) -> str:
    material = MATERIAL.match(sid) if isinstance(sid, str) else None
    return material[1] if material else formula(numbers)
