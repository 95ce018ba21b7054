"""What ASE reads and writes: trajectories (`.traj`), its SQLite databases (`.db`), VASP's `vasprun.xml` and `OUTCAR`.

ASE's units are ours, stress included (Voigt xx yy zz yz xz xy, tension-positive). The energy is the one that forces are
the gradient of: `free_energy` where a calculation has both (VASP's free energy of smeared electrons), else `energy`;
`--option energy=energy` takes the other. Forces are those of the calculation: constraints do not make them zero. Frames
of one file are neighbours of one another: the relatives are their formula.

Databases may keep `energy` and `forces` in the `data` of a row, in place of a calculation, as those of nabla2DFT do:
they are read from there where there is no calculation, in the units that the options say.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from pydantic import Field

from multifid.readers.charges import ChargeOptions, charge_of, of_atoms, spin_of, spin_of_moments
from multifid.readers.contract import LabelSet, Part, Progress, Record, one_part
from multifid.readers.holdings import listed
from multifid.readers.properties import PropertyOptions, Seeker
from multifid.readers.records import (
    BadRecord,
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

TASK = "ase"
TASKS = {TASK: LabelSet("not stated in the file", "total")}
RELATIVE = "formula"
ENDINGS = (".traj", ".db", "vasprun.xml", "outcar")
FORMATS = dict(zip(ENDINGS, ("traj", "db", "vasp-xml", "vasp-out"), strict=True))  # nothing in them is executed
parts = one_part


class Options(ChargeOptions, UnitOptions, PropertyOptions):
    """Which labels are read."""

    energy: Literal["free_energy", "energy"] = Field(
        "free_energy", description="the energy that belongs to the forces, or the one without the electrons' entropy"
    )


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the frames of one file. `source_id`: their number. ValueError if ASE cannot read it."""
    frames, seeker = _frames(path), Seeker(path, options)
    for i, atoms in enumerate(frames):
        yield structure_or_skip(str(i), _structure, atoms, str(i), options, seeker)
    seeker.check()
    progress(1.0)


def holds(path: Path) -> list[str]:
    """What the first frame has."""
    for atoms in _frames(path):
        return listed({**atoms.info, **(atoms.calc.results if atoms.calc else {})})
    return []


def _frames(path: Path) -> Iterator[Atoms]:
    path.stat()
    kind = next((kind for ending, kind in FORMATS.items() if path.name.lower().endswith(ending)), None)
    if kind is None:
        raise ValueError(f"{path}: names of files of this format end in {', '.join(FORMATS)}")
    try:
        if kind == "db":  # read by `iread`, a row comes without its `data`
            with ase.db.connect(str(path), type="db") as database:
                yield from (row.toatoms(add_additional_information=True) for row in database.select())
        else:
            yield from ase.io.iread(str(path), ":", format=kind)
    except GeneratorExit:
        raise
    except Exception as error:  # ASE's readers raise whatever they meet
        raise ValueError(f"{path}: truncated, damaged or no {kind} file: {type(error).__name__}: {error}") from error


def _structure(atoms: Atoms, where: str, options: Options, seeker: Seeker) -> Structure:
    results: dict[str, Any] = {} if atoms.calc is None else atoms.calc.results
    numbers = atomic_numbers(atoms.numbers)
    if seeker.wanted:
        return plain_structure(atoms, properties_of(atoms, seeker, where), where, options)
    data = atoms.info.get("data")
    if results.get("energy") is None and results.get("forces") is None and isinstance(data, dict):
        results = data
    energy, factors = results.get(options.energy), options.factors()
    energy = results.get("energy") if energy is None else energy
    forces, stress = results.get("forces"), stress_tensor(results.get("stress"))
    if energy is None and forces is None:
        raise BadRecord("no energy and no forces")
    labels = Labels(
        energy=float("nan") if energy is None else number(energy, "energy") * factors.energy,
        forces=None if forces is None else vectors(forces, len(numbers), "forces") * factors.force,
        stress=None if stress is None else stress * factors.stress,
    )
    return plain_structure(atoms, {TASK: labels}, where, options)


def properties_of(atoms: Atoms, seeker: Seeker, where: str) -> dict[str, Labels]:
    """Properties of a frame: from its info (and the `data` of a database's row), its arrays, or its calculation."""
    results: dict[str, Any] = {} if atoms.calc is None else atoms.calc.results
    data = atoms.info.get("data")
    places = [atoms.info, *([data] if isinstance(data, dict) else []), results, atoms.arrays]
    pairs = atoms.info.get("key_value_pairs")
    places += [pairs] if isinstance(pairs, dict) else []

    def value_of(key: str) -> Any:
        return next((place[key] for place in places if place.get(key) is not None), None)

    def names() -> list[str]:
        return [key for place in places for key in place if key not in ("numbers", "positions")]

    return seeker.labels(value_of, names, len(atoms), f"structure {where}")


def plain_structure(atoms: Atoms, labels: dict[str, Labels], where: str, options: ChargeOptions) -> Structure:
    """A structure of ASE with labels. BadRecord where it is none."""
    numbers = atomic_numbers(atoms.numbers)
    results: dict[str, Any] = {} if atoms.calc is None else atoms.calc.results
    length = options.factors().length if isinstance(options, UnitOptions) else 1.0
    cell, pbc = periodicity(np.asarray(atoms.cell) * length, atoms.pbc)
    charge, spin = charge_of(atoms.info, options), spin_of(atoms.info, options)
    if pbc is None:
        charge = of_atoms(atoms.arrays.get("initial_charges")) if charge is None else charge
        moments = atoms.arrays.get("initial_magmoms")
        spin = spin_of_moments(results.get("magmom"), moments, numbers, charge) if spin is None else spin
    return Structure(
        numbers=numbers,
        positions=vectors(atoms.positions, len(numbers), "positions") * length,
        labels=labels,
        relative=formula(numbers),
        source_id=where,
        cell=cell,
        pbc=pbc,
        charge=charge,
        spin=spin,
    )
