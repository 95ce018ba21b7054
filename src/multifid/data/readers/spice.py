"""SPICE (`SPICE-2.0.1.hdf5` and its kin): conformations of drug-like molecules, peptides, dimers, ions and water.

    f[molecule]   smiles, subset, atomic_numbers, conformations, dft_total_energy, dft_total_gradient, ...

Eastman et al., Scientific Data 10, 11 (2023), doi 10.1038/s41597-022-01882-6. Everything is in atomic units: positions
in bohr, energies in hartree, and a **gradient** in hartree/bohr, which is minus the force. `formation_energy`, beside
the total, subtracts free ions that are chosen for each molecule; reference energies by element come from the totals.

Charge is the sum of the formal charges in the SMILES; the calculations are of the lowest multiplicity. Two groups may
hold one molecule (as monomer of a dimer and by itself), and mirror images have the same energies: relatives are those
whose SMILES differ at most in the numbers of atoms and in marks of stereochemistry.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict

from multifid.data.block import Block, relative_hash
from multifid.data.fields import NO_SPLIT
from multifid.data.readers import LabelSet, Part, Progress, Record, Skip, cut
from multifid.data.readers.molecule_hdf5 import BOHR, HARTREE, dataset, datasets_of, groups, opened
from multifid.data.readers.records import BadRecord, atomic_numbers
from multifid.structures.elements import formula

TASK = "spice"
TASKS = {TASK: LabelSet("wB97M-D3(BJ)/def2-TZVPPD (Psi4)", "total")}
RELATIVE = "molecule"
ENDINGS = (".hdf5", ".h5")

POSITIONS, ENERGY, GRADIENT = "conformations", "dft_total_energy", "dft_total_gradient"
UNITS = {POSITIONS: "bohr", ENERGY: "hartree", GRADIENT: "hartree/bohr"}  # the attribute `units`, where there is one
CHUNK = 4096  # conformations read at once
PART = 1 << 14  # conformations of a part
BRACKET = re.compile(r"\[([^\]]*)\]")  # an atom with its charge: [O-:3], [NH3+], [Ca+2:1]
CHARGE = re.compile(r"(\++|-+)(\d*)(?::\d+)?$")
MARKS = re.compile(r":\d+(?=\])|[@/\\]")


class Options(BaseModel):
    """SPICE leaves nothing to choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parts(path: Path, options: Options) -> list[Part]:
    """Molecules in the order of their names, about PART conformations together."""
    with opened(path) as file:
        return cut([_count(file[name]) for name in groups(file)], PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the conformations of one file in blocks; part: which molecules.

    `source_id`: `molecule/conformation`. ValueError if the file is damaged, of another layout or of other units.
    """
    with opened(path) as file:
        names = groups(file)
        start, stop = part or (0, len(names))
        if start == 0 and not any(POSITIONS in file[name] and ENERGY in file[name] for name in names):
            raise ValueError(f"{path} is not a SPICE file: no group has `{POSITIONS}` and `{ENERGY}`")
        for i, name in enumerate(names[start:stop], start=1):
            yield from _molecule(path, file[name], name)
            progress(i / (stop - start))


def charge_of(smiles: str) -> int:
    """The sum of the formal charges of a SMILES string."""
    total = 0
    for atom in BRACKET.findall(smiles):
        if match := CHARGE.search(atom):
            signs, count = match.groups()
            total += int(count or len(signs)) * (1 if signs[0] == "+" else -1)
    return total


def _count(group: h5py.Group) -> int:
    positions = group.get(POSITIONS)
    return positions.shape[0] if isinstance(positions, h5py.Dataset) and positions.ndim else 0


def _molecule(path: Path, group: h5py.Group, name: str) -> Iterator[Record]:
    try:
        found = datasets_of(group, (POSITIONS, ENERGY), (GRADIENT,))
        for key, values in found.items():
            unit = values.attrs.get("units", UNITS[key])
            if (unit := unit.decode() if isinstance(unit, bytes) else unit) != UNITS[key]:
                raise ValueError(f"{path}: {name}/{key} is in {unit!r}, where SPICE has {UNITS[key]}")
        numbers, count = atomic_numbers(dataset(group, "atomic_numbers")), _count(group)
        shapes = {POSITIONS: (count, len(numbers), 3), ENERGY: (count,), GRADIENT: (count, len(numbers), 3)}
        for key, values in found.items():
            if values.shape != shapes[key]:
                raise BadRecord(f"{key} of another shape than the atoms")
        smiles = _smiles(group)
    except BadRecord as bad:
        yield Skip(str(bad), name)
        return
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        yield _block(found, name, numbers, smiles, rows)


def _smiles(group: h5py.Group) -> str | None:
    """The SMILES string, None where the group has none."""
    if "smiles" not in group:
        return None
    text = np.asarray(dataset(group, "smiles")).reshape(-1)
    if len(text) != 1 or not isinstance(text[0], bytes | str):
        raise BadRecord("smiles is not one text")
    return text[0].decode("utf-8", "replace") if isinstance(text[0], bytes) else text[0]


def _block(found: dict[str, h5py.Dataset], name: str, numbers: np.ndarray, smiles: str | None, rows: slice) -> Block:
    """Conformations of one molecule in our units, also those without a label."""
    count, atoms = rows.stop - rows.start, len(numbers)
    charge = charge_of(smiles or "")
    relative = formula(numbers) if smiles is None else MARKS.sub("", smiles)
    columns = {
        "natoms": np.full(count, atoms),
        "numbers": np.tile(numbers.astype(np.uint8), count),
        "positions": found[POSITIONS][rows].astype(np.float64).reshape(-1, 3) * BOHR,
        "charge": np.full(count, charge),
        "spin": np.full(count, 1 + (int(numbers.sum()) - charge) % 2),
        "relative": np.full(count, relative_hash(relative), np.uint64),
        "split": np.full(count, NO_SPLIT, np.uint8),
        f"labels/{TASK}/energy": found[ENERGY][rows].astype(np.float64) * HARTREE,
    }
    if GRADIENT in found:
        gradient = found[GRADIENT][rows].astype(np.float64).reshape(-1, 3)
        columns[f"labels/{TASK}/forces"] = gradient * (-HARTREE / BOHR)
    return Block(columns, [f"{name}/{i}" for i in range(rows.start, rows.stop)])
