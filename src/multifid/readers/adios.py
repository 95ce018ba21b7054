"""ADIOS2 files of HydraGNN (`NAME-v3.bp`): one variable for each key, all structures end to end, splits as given.

    trainset/KEY                      the rows of all structures, along the axis trainset/KEY/variable_dim
    trainset/KEY/variable_count       (structures,) how many rows each has; .../variable_offset: where they begin
    trainset/ndata, trainset/keys     attributes; valset and testset likewise

Labels are in eV and eV/angstrom. `energy` is the total energy of a structure; `energy_per_atom` has been aligned in
`-v3` files, by elements, where `energy` has not: `--option energy=energy_per_atom` reads it, times the atoms, as a
label set of its own. Both are float32 in files of the reference's writer: the manifest says so, and how coarse.

Molecules carry a dummy cell (identity times 1,000): it is recognised and left out, whatever `pbc` says. `graph_attr` is
(charge, multiplicity); the writer's default of (0, 1) says nothing of a molecule with an odd number of electrons. Older
files may keep numbers, positions and forces in `x` (Z, position, force) alone. Nothing of a file is executed, and its
bytes are touched by a process of their own only (`adios_process`). Damage that changes numbers and no structure is
not noticed by the library, whose files have no checksums.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from multifid.readers.adios_file import ALL, NOTHING, Piece, opened
from multifid.readers.adios_process import LABELS
from multifid.readers.charges import ChargeOptions
from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, cut
from multifid.store.block import NO_CHARGE, NO_SPIN, Block, relative_hash
from multifid.structures.cells import kept_vectors
from multifid.structures.elements import formula

TASK = "adios"
ALIGNED = "aligned"
TASKS = {
    TASK: LabelSet("not stated in the file", "total"),
    ALIGNED: LabelSet("not stated in the file", "aligned by elements (energy_per_atom times atoms)"),
}
RELATIVE = "formula"
ENDINGS = (".bp",)
FOLDER = ("md.idx",)

PART = 1 << 15  # structures of a part
DUMMY = 1000.0 * np.eye(3)  # angstrom: the cell of what has none
SHAPES = {"pos": [3], "forces": [3], "cell": [3], "x": [7]}  # of a row, where it matters


class Options(ChargeOptions):
    """What to read of an ADIOS2 file."""

    energy: Literal["energy", "energy_per_atom"] = Field(
        "energy", description="the key that is read: total energies, or (times atoms) what an alignment left of them"
    )
    time_limit: float = Field(8.0, gt=0, description="seconds that the library may take for one piece of a file")


def parts(path: Path, options: Options) -> list[Part]:
    """Structures in the order of the file: trainset, valset, testset."""
    with opened(path, NOTHING, options.time_limit) as (found, _):
        return cut([1] * _total(found), PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the structures in blocks; part: which of them. `source_id`: `trainset/12`.

    ValueError if the file is damaged, of another layout, or the package adios2 is missing.
    """
    with opened(path, part or ALL, options.time_limit) as (found, pieces):
        _check(path, found, options)
        total, done = part[1] - part[0] if part else _total(found), 0
        for piece in pieces:
            yield from _records(piece, options)
            done += piece.structures
            progress(done / total)


def holds(path: Path) -> list[str]:
    """Keys of the first label, with types and shapes."""
    with opened(path, NOTHING, Options().time_limit) as (found, _):
        for label, about in found["labels"].items():
            known = [f"{label}/{key} {own['type']} {tuple(own['shape'])}" for key, own in about["keys"].items()]
            return [*known, *(f"{label}/{key}" for key in about["listed"] if key not in about["keys"])]
    return []


def _total(found: dict[str, Any]) -> int:
    return sum(about["count"] for about in found["labels"].values())


def _check(path: Path, found: dict[str, Any], options: Options) -> None:
    """The file as a whole must be of the layout."""
    if not found["labels"]:
        raise ValueError(f"{path} is not a file of HydraGNN: it has no {' or '.join(f'{x}/ndata' for x in LABELS)}")
    for label, about in found["labels"].items():
        keys = about["keys"]
        if not ({"pos", "atomic_numbers"} <= keys.keys() or keys.get("x", {}).get("shape", [])[1:] == [7]):
            raise ValueError(f"{path}: {label} has neither pos and atomic_numbers nor x with 7 columns")
        for key, row in SHAPES.items():
            if key in keys and key != "x" and keys[key]["shape"][1:] != row:
                raise ValueError(f"{path}: {label}/{key} has rows of {keys[key]['shape'][1:]}, where {row} is expected")
        if options.energy not in keys and "forces" not in keys:
            raise ValueError(
                f"{path}: {label} has no {options.energy} and no forces: its keys are {', '.join(about['listed'])}"
            )


def _records(piece: Piece, options: Options) -> Iterator[Record]:
    """The structures of a piece whose keys fit together as a block; the others as skips."""
    columns, sources = piece.columns, [f"{piece.label}/{piece.first + i}" for i in range(piece.structures)]
    geometry = "pos" if "pos" in columns else "x"
    natoms = columns[f"{geometry}/count"]
    expected = {
        "atomic_numbers": natoms, "forces": natoms, "x": natoms, "cell": 3, "pbc": 3, "stress": None, "natoms": 1,
        options.energy: 1, "graph_attr": 2,
    }  # fmt: skip
    reasons: list[str | None] = [None if n else "no atoms" for n in natoms]
    for key, count in expected.items():
        if key in columns and count is not None:
            for i in np.flatnonzero(columns[f"{key}/count"] != count):
                reasons[i] = reasons[i] or f"{key} of another length than the atoms"
    good = np.array([reason is None for reason in reasons])
    yield from (Skip(reason, where) for reason, where in zip(reasons, sources, strict=True) if reason is not None)
    if good.any():
        kept = {key: _kept(columns, key, good) for key in expected if key in columns}
        if "pos" in columns:
            kept["pos"] = _kept(columns, "pos", good)
        own = [where for where, taken in zip(sources, good, strict=True) if taken]
        yield _block(kept, natoms[good], own, LABELS.index(piece.label), options)


def _kept(columns: dict[str, np.ndarray], key: str, good: np.ndarray) -> np.ndarray:
    return columns[key] if good.all() else columns[key][np.repeat(good, columns[f"{key}/count"])]


def _block(found: dict[str, np.ndarray], natoms: np.ndarray, sources: list[str], split: int, options: Options) -> Block:
    """Structures in columns of the store."""
    count, x = len(natoms), found.get("x")
    z = found["atomic_numbers"].reshape(-1) if "atomic_numbers" in found else x[:, 0]  # type: ignore[index]
    whole = np.isfinite(z) & (z == np.round(z)) & (np.abs(z) < 1000)
    numbers = np.where(whole, z, 0).astype(np.int64)
    forces = found.get("forces")
    task = TASK if options.energy == "energy" else ALIGNED
    first = np.cumsum(natoms) - natoms
    relative = [
        relative_hash(formula(numbers[a : a + n])) for a, n in zip(first.tolist(), natoms.tolist(), strict=True)
    ]
    columns = {
        "natoms": natoms,
        "numbers": numbers,
        "positions": np.asarray(found["pos"] if "pos" in found else x[:, 1:4], np.float64),  # type: ignore[index]
        "relative": np.array(relative, np.uint64),
        "split": np.full(count, split, np.uint8),
    }
    cell, pbc, told = _cells(found, count)
    if pbc.any() or cell.any():
        columns |= {"cell": cell, "pbc": pbc}
    charge, spin, unstated = _charges(found, numbers, first, pbc, options)
    columns |= {"charge": charge, "spin": spin}
    if options.energy in found:
        energy = found[options.energy].reshape(-1).astype(np.float64)
        columns[f"labels/{task}/energy"] = energy if options.energy == "energy" else energy * natoms
        told += _precision(found[options.energy])
    if forces is not None:
        columns[f"labels/{task}/forces"] = forces.astype(np.float64)
    elif x is not None and x.shape[1:] == (7,):
        columns[f"labels/{task}/forces"] = x[:, 4:7].astype(np.float64)
    stress = found.get("stress")
    if stress is not None and stress.size == 9 * count:
        columns[f"labels/{task}/stress"] = stress.reshape(count, 3, 3).astype(np.float64)
    return Block(columns, sources, unstated, tuple(told))


def _cells(found: dict[str, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Cells (S, 3, 3), pbc (S, 3), and what is told of them; dummies are zero and not periodic."""
    cell = found["cell"].reshape(count, 3, 3).astype(np.float64) if "cell" in found else np.zeros((count, 3, 3))
    dummy = (cell == DUMMY).all(axis=(1, 2))
    cell[dummy] = 0.0
    if "pbc" in found:
        pbc = found["pbc"].reshape(count, 3) != 0
        told = []
    else:
        pbc = np.repeat(np.reshape(cell.any(axis=(1, 2)), (-1, 1)), 3, axis=1)
        told = [("periodic", "pbc is not in the file: what has a cell is taken as periodic in all directions")]
    pbc[dummy] = False
    return kept_vectors(cell, pbc), pbc, told


def _charges(
    found: dict[str, np.ndarray], numbers: np.ndarray, first: np.ndarray, pbc: np.ndarray, options: Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Charge, multiplicity and what is not stated of each, (S,); see `Block.unstated`."""
    count = len(first)
    pairs = found["graph_attr"].reshape(count, 2).astype(np.float64) if "graph_attr" in found else None
    protons = np.add.reduceat(numbers, first)
    if pairs is None or not (np.isfinite(pairs).all() and (pairs == np.round(pairs)).all()):
        charge = np.full(count, options.charge or 0)
        lowest = np.where(pbc.any(axis=1), 1, 1 + (protons - charge) % 2)
        spin = lowest if options.spin is None else np.full(count, options.spin)
        said = NO_CHARGE * (options.charge is None) + NO_SPIN * (options.spin is None)
        return charge, spin, np.full(count, said, np.uint8)
    charge, spin = pairs.astype(np.int64).T
    if options.spin_counts == "unpaired":
        spin = spin + 1
    default = (charge == 0) & (spin == 1) & (protons % 2 == 1) & ~pbc.any(axis=1)
    unstated = default | (spin == 0)
    spin = np.where(unstated, 1 + (protons - charge) % 2, spin)
    return charge, spin, np.where(unstated, NO_SPIN, 0).astype(np.uint8)


def _precision(energy: np.ndarray) -> list[tuple[str, str]]:
    """A word about energies that are not float64: what is below a step is lost. It is the same for all of a file."""
    if energy.dtype == np.float64:
        return []
    return [
        ("precision", f"energies are {energy.dtype} in the file: steps of 0.24 meV at -4,000 eV, 3.9 meV at -45,000")
    ]
