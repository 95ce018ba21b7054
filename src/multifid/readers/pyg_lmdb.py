"""Pickled graphs of PyTorch Geometric in LMDB (`*.lmdb`): OC20, OC22 and ODAC23 as they were first published.

Keys are ascii integers from 0 (and `length`, which is none), each value is a pickle of a `Data` object with `pos`
(N, 3), `atomic_numbers`, `cell` (1, 3, 3), `sid` and, by task,

    y, force                      a frame and its energy and forces in eV and eV/angstrom (S2EF)
    y_init, y_relaxed, pos_relaxed   the two ends of a relaxation, without forces (IS2RE): two structures
    neither                       frames of the test splits: skipped

Pickles are programs; nothing in these is executed, see `pickled`. Energies and forces are float32 in the files.

`y` of OC20 is an adsorption energy, relative to a slab and gases of their own, unless whoever made the files kept total
energies; that of OC22 (which marks its rows by `oc22`) is a total. All frames of one `sid` are of one relaxation and
are relatives. Where `pbc` is missing, as usual, all three directions are periodic.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, cut
from multifid.readers.holdings import listed
from multifid.readers.lmdb_file import opened_lmdb
from multifid.readers.pickled import values_of
from multifid.readers.records import BadRecord, array, atomic_numbers, number, periodicity, vectors
from multifid.structures.elements import formula
from multifid.structures.structure import Labels, Structure

TASKS = {
    "pyg_lmdb": LabelSet("not stated in the file", "as in the file, float32"),
    "oc20": LabelSet("RPBE (VASP)", "adsorption energy, float32 in the file"),
    "oc20_total": LabelSet("RPBE (VASP)", "total, uncorrected (VASP), float32 in the file"),
    "oc22": LabelSet("PBE+U (VASP)", "total, uncorrected (VASP), float32 in the file"),
    "odac23": LabelSet("PBE+D3 (VASP)", "as in the file (adsorption energies in `y`), float32"),
}
RELATIVE = "relaxation (sid), or formula"
ENDINGS = (".lmdb",)
PART = 20_000  # keys of a part
LARGEST_ROW = 1 << 27  # bytes of a pickle; with edges a slab takes some 2^20


class Options(BaseModel):
    """What to read of such a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Literal["pyg_lmdb", "oc20", "oc20_total", "oc22", "odac23"] = Field(
        "pyg_lmdb",
        description="the data set the file is part of, and with it level of theory and kind of energy in the manifest;"
        " oc20_total: files of OC20 that were made with total energies",
    )
    energy_key: str = Field("y", description="where the energy of a frame stands")
    forces_key: str = Field("force", description="where its forces stand")


def parts(path: Path, options: Options) -> list[Part]:
    """Keys in the order of the file, PART at a time."""
    with opened_lmdb(path) as (_, entries):
        return cut([1] * entries, PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Every frame, or why it is skipped; part: which of the keys. Memory holds one.

    `source_id`: the key, and `/initial` or `/relaxed` for the ends of a relaxation. ValueError if the file is
    damaged or not LMDB, or of OC22 where the option `dataset` says OC20.
    """
    with opened_lmdb(path) as (transaction, entries):
        start, stop = part or (0, entries)
        cursor = transaction.cursor()
        for place, key in enumerate(islice(cursor.iternext(values=False), start, stop)):
            if key.isdigit():
                yield from _frames(path, key.decode("ascii"), cursor.value(), options)
            if place % 100 == 0:
                progress(place / max(stop - start, 1))
    progress(1.0)


def holds(path: Path) -> list[str]:
    """What the first row has."""
    with opened_lmdb(path) as (transaction, _):
        for key in transaction.cursor().iternext(values=False):
            if key.isdigit():
                row = _row(transaction.get(key))
                return listed({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()})
    return []


def _row(value: bytes) -> dict[str, Any]:
    if len(value) > LARGEST_ROW:
        raise BadRecord("row is implausibly large")
    row = values_of(value)
    if not isinstance(row, dict) or row.get("pos") is None or row.get("atomic_numbers") is None:
        raise BadRecord("row without pos and atomic_numbers")
    return row


def _frames(path: Path, where: str, value: bytes, options: Options) -> Iterator[Record]:
    try:
        row = _row(value)
        if options.dataset.startswith("oc20") and _single(row.get("oc22")):
            raise ValueError(f"{path}: row {where} is of OC22, and not of OC20: --option dataset=oc22")
        numbers, task = atomic_numbers(row["atomic_numbers"]), options.dataset
        if row.get(options.energy_key) is not None:
            yield _structure(
                row, numbers, row["pos"], row[options.energy_key], row.get(options.forces_key), where, task
            )
            return
        ends = [("initial", "pos", "y_init"), ("relaxed", "pos_relaxed", "y_relaxed")]
        found = [end for end in ends if row.get(end[1]) is not None and row.get(end[2]) is not None]
        for name, positions, energy in found:
            yield _structure(row, numbers, row[positions], row[energy], None, f"{where}/{name}", task)
        if not found:
            yield Skip(f"no energy: neither {options.energy_key} nor y_relaxed", where)
    except BadRecord as bad:
        yield Skip(str(bad), where)


def _structure(
    row: dict[str, Any], numbers: np.ndarray, positions: Any, energy: Any, forces: Any, where: str, task: str
) -> Structure:
    matrix = array(row.get("cell"), "cell")
    pbc = row.get("pbc")
    flags = np.ones(3) if pbc is None else array(pbc, "pbc").reshape(-1)
    cell, periodic = periodicity(matrix.reshape(3, 3) if matrix.size == 9 else matrix, flags)
    labels = Labels(
        energy=number(energy, "energy"),
        forces=None if forces is None else vectors(forces, len(numbers), "forces"),
    )
    sid = _single(row.get("sid"))
    return Structure(
        numbers=numbers,
        positions=vectors(positions, len(numbers), "positions"),
        labels={task: labels},
        relative=formula(numbers) if sid is None else str(sid),
        source_id=where,
        cell=cell,
        pbc=periodic,
    )


def _single(value: Any) -> Any:
    """The value of an array of one, or what is none."""
    return value.reshape(-1)[0].item() if isinstance(value, np.ndarray) and value.size == 1 else value
