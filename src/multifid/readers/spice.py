"""SPICE (`SPICE-2.0.1.hdf5` and its kin): conformations of drug-like molecules, peptides, dimers, ions and water.

    f[molecule]   smiles, subset, atomic_numbers, conformations, dft_total_energy, dft_total_gradient, ...

Eastman et al., Scientific Data 10, 11 (2023), doi 10.1038/s41597-022-01882-6. Everything is in atomic units: positions
in bohr, energies in hartree, and a **gradient** in hartree/bohr, which is minus the force. `formation_energy`, beside
the total, subtracts free ions that are chosen for each molecule; reference energies by element come from the totals.

Charge is what the group states (`charge`), else the sum of the formal charges in its SMILES, else that of the atomic
charges of the density (`mbis_charges`). A group that has none of these, or whose SMILES cannot be read or has other
atoms than the group, is skipped: the option `charge` states it. The calculations are of the lowest multiplicity. Two
groups may hold one molecule (as monomer of a dimer and by itself), and mirror images have the same energies: relatives
are those whose SMILES differ at most in the numbers of atoms and in marks of stereochemistry.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from multifid.readers.charges import CHARGE, ChargeOptions, charge_of
from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, cut
from multifid.readers.molecule_hdf5 import BOHR, HARTREE, dataset, datasets_of, first_record, groups, opened
from multifid.readers.records import BadRecord, array, atomic_numbers
from multifid.readers.smiles import read_smiles
from multifid.store.block import Block, relative_hash
from multifid.store.fields import NO_SPLIT
from multifid.structures.elements import formula

TASK = "spice"
TASKS = {TASK: LabelSet("wB97M-D3(BJ)/def2-TZVPPD (Psi4)", "total")}
RELATIVE = "molecule"
ENDINGS = (".hdf5", ".h5")

POSITIONS, ENERGY, GRADIENT = "conformations", "dft_total_energy", "dft_total_gradient"
UNITS = {POSITIONS: "bohr", ENERGY: "hartree", GRADIENT: "hartree/bohr"}  # the attribute `units`, where there is one
CHUNK = 4096  # conformations read at once
PART = 1 << 14  # conformations of a part
ATOMIC_CHARGES = "mbis_charges"  # (conformations, atoms, 1) e
WHOLE = 0.05  # e: their sums are whole within this, in all conformations
MARKS = re.compile(r":\d+(?=\])|[@/\\]")


class Options(BaseModel):
    """What the user says of molecules that do not say it themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    charge: int | None = Field(None, ge=-128, le=127, description="charge in e of molecules that do not state one")


holds = first_record


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
            yield from _molecule(path, file[name], name, options)
            progress(i / (stop - start))


def _count(group: h5py.Group) -> int:
    positions = group.get(POSITIONS)
    return positions.shape[0] if isinstance(positions, h5py.Dataset) and positions.ndim else 0


def _molecule(path: Path, group: h5py.Group, name: str, options: Options) -> Iterator[Record]:
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
        charge = _charge(group, smiles, numbers, count, options)
    except BadRecord as bad:
        yield Skip(str(bad), name)
        return
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        yield _block(found, name, numbers, smiles, charge, rows)


def _smiles(group: h5py.Group) -> str | None:
    """The SMILES string, None where the group has none."""
    if "smiles" not in group:
        return None
    text = np.asarray(dataset(group, "smiles")).reshape(-1)
    if len(text) != 1 or not isinstance(text[0], bytes | str):
        raise BadRecord("smiles is not one text")
    return text[0].decode("utf-8", "replace") if isinstance(text[0], bytes) else text[0]


def _charge(group: h5py.Group, smiles: str | None, numbers: np.ndarray, count: int, options: Options) -> int:
    """The charge of a molecule; BadRecord where nothing says it, or what does cannot be believed."""
    stated = {key: values[0] for key in CHARGE if len(values := _values(group, key)) == 1}
    stated |= {key: value for key, value in group.attrs.items() if key in CHARGE}
    if (charge := charge_of(stated, ChargeOptions())) is not None:
        return charge
    unknown = "neither SMILES nor atomic charges"
    if smiles is not None and smiles.strip():
        read = read_smiles(smiles)
        if read is not None and read.fits(numbers.tolist()):
            return read.charge
        unknown = f"its SMILES {'cannot be read' if read is None else 'has other atoms than the molecule'}"
    elif (charge := _of_density(group, count, len(numbers))) is not None:
        return charge
    if options.charge is None:
        raise BadRecord(f"no charge is known: {unknown} (--option charge=0 states it)")
    return options.charge


def _of_density(group: h5py.Group, count: int, atoms: int) -> int | None:
    """What the atomic charges of all conformations add up to; None where there are none, or their sum is not whole."""
    values = _values(group, ATOMIC_CHARGES)
    if not values.size or values.size != count * atoms:
        return None
    sums = values.reshape(count, atoms).sum(axis=1)
    charge = np.round(np.median(sums))
    return int(charge) if (np.abs(sums - charge) < WHOLE).all() else None


def _values(group: h5py.Group, key: str) -> np.ndarray:
    """The values of a dataset in a row; none where there is no such dataset."""
    return array(dataset(group, key), key).reshape(-1) if key in group else np.zeros(0)


def _block(
    found: dict[str, h5py.Dataset], name: str, numbers: np.ndarray, smiles: str | None, charge: int, rows: slice
) -> Block:
    """Conformations of one molecule in our units, also those without a label."""
    count, atoms = rows.stop - rows.start, len(numbers)
    relative = formula(numbers) if smiles is None or not smiles.strip() else MARKS.sub("", smiles)
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
