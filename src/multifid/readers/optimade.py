"""OPTIMADE: responses of `/structures` (JSON) and exports line by line (JSON Lines), of NOMAD, Alexandria and others.

    {"data": [{"id": ..., "type": "structures", "attributes": {...}}, ...], "meta": ...}      one page of a response
    {"x-optimade": ...} first, then {"id": ..., "type": "structures", "attributes": {...}}    an export, a line each

https://specification.optimade.org, structures: `cartesian_site_positions` (angstrom), `species_at_sites` (names of
`species`, which need not be symbols), `lattice_vectors` (null where a direction is not periodic), `dimension_types`.
The standard has no energy. Providers have fields of their own, `_PROVIDER_...`, and say elsewhere what is in them: the
options name the field, and units that are not eV and angstrom. Sites with several species, vacancies, attached atoms or
unknown positions are a skip: such a structure is not one that was calculated.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from multifid.readers.contract import LabelSet, Part, Progress, Record, one_part
from multifid.readers.holdings import listed
from multifid.readers.json_array import array_under
from multifid.readers.packed import endings, unpacked_name
from multifid.readers.records import (
    BadRecord,
    array,
    number,
    numbers_of,
    periodicity,
    stress_tensor,
    structure_or_skip,
    vectors,
)
from multifid.readers.table_files import LINES, json_lines
from multifid.readers.units import UnitOptions
from multifid.structures.elements import formula
from multifid.structures.structure import Labels, Structure

TASK = "optimade"
TASKS = {TASK: LabelSet("not stated in the file", "as the provider's field has it")}
RELATIVE = "formula"
ENDINGS = endings(".json", *LINES)
WHOLE = 1e-6
UNUSABLE = ("disorder", "implicit_atoms", "unknown_positions", "assemblies", "site_attachments")
parts = one_part


class Options(UnitOptions):
    """Which of the provider's fields are labels."""

    energy: str | None = Field(None, description="the provider's field that is the total energy, as _alexandria_energy")
    forces: str | None = Field(None, description="the field of the forces, (atoms, 3), if there is one")
    stress: str | None = Field(None, description="the field of the stress, if there is one")
    energy_per_atom: bool = Field(False, description="the energy is divided by the number of atoms")


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the structures of a response or an export. `source_id`: their id.

    ValueError names the file where it is damaged or neither, and the fields that there are where none is named.
    """
    for place, entry in enumerate(_entries(path, progress)):
        if place == 0 and options.energy is None and options.forces is None:
            found = ", ".join(_fields(entry)) or "none"
            raise ValueError(
                f"{path}: OPTIMADE has no energies of its own: --option energy=FIELD names the provider's; the first"
                f" structure has {found}"
            )
        where = str(entry.get("id", place))
        yield structure_or_skip(where, _structure, entry.get("attributes"), where, options)
    progress(1.0)


def holds(path: Path) -> list[str]:
    """The attributes of the first structure."""
    for entry in _entries(path, lambda far: None):
        return listed(entry.get("attributes") or {})
    return []


def looks_like(path: Path) -> bool:
    """Whether a file is of OPTIMADE, though which energies it has only an option can say."""
    attributes = next((entry.get("attributes") for entry in _entries(path, lambda far: None)), None)
    return isinstance(attributes, dict) and "cartesian_site_positions" in attributes


def _entries(path: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    if unpacked_name(path).name.lower().endswith(LINES):
        entries: Iterator[Any] = json_lines(path, progress)
    else:
        entries = array_under(path, "data", progress)
    for entry in entries:
        if isinstance(entry, dict) and entry.get("type", "structures") == "structures" and "attributes" in entry:
            yield entry


def _fields(entry: dict[str, Any]) -> list[str]:
    """The provider's fields of an entry, those with energies first."""
    names = [name for name in entry.get("attributes") or {} if name.startswith("_")]
    return sorted(names, key=lambda name: "energy" not in name)


def _structure(attributes: Any, where: str, options: Options) -> Structure:
    if not isinstance(attributes, dict) or attributes.get("cartesian_site_positions") is None:
        raise BadRecord("no positions")
    if unusable := [name for name in attributes.get("structure_features") or [] if name in UNUSABLE]:
        raise BadRecord(f"structure with {unusable[0]}")
    numbers, factors = numbers_of(_symbols(attributes)), options.factors()
    lattice = attributes.get("lattice_vectors")
    cell, pbc = periodicity(
        np.zeros((3, 3)) if lattice is None else np.nan_to_num(array(lattice, "cell"), nan=0.0),
        attributes.get("dimension_types") or [0, 0, 0],
    )
    forces = attributes.get(options.forces) if options.forces else None
    stress = stress_tensor(attributes.get(options.stress)) if options.stress else None
    energy = attributes.get(options.energy) if options.energy else None
    if energy is None and forces is None:
        raise BadRecord(f"no {options.energy or options.forces}")
    times = factors.energy * (len(numbers) if options.energy_per_atom else 1)
    labels = Labels(
        energy=float("nan") if energy is None else number(energy, "energy") * times,
        forces=None if forces is None else vectors(forces, len(numbers), "forces") * factors.force,
        stress=None if stress is None else stress * factors.stress,
    )
    return Structure(
        numbers=numbers,
        positions=vectors(attributes["cartesian_site_positions"], len(numbers), "positions") * factors.length,
        labels={TASK: labels},
        relative=formula(numbers),
        source_id=where,
        cell=None if cell is None else cell * factors.length,
        pbc=pbc,
    )


def _symbols(attributes: dict[str, Any]) -> list[str]:
    """The element of each site. BadRecord where a site has not exactly one atom."""
    names, species = attributes.get("species_at_sites"), attributes.get("species")
    if not isinstance(names, list):
        raise BadRecord("no species at the sites")
    if not isinstance(species, list):
        return names
    symbols: dict[Any, Any] = {}
    for one in species:
        kinds, shares = one.get("chemical_symbols") or [], one.get("concentration") or [1.0]
        alone = len(kinds) == 1 and abs(shares[0] - 1) < WHOLE and not one.get("attached")
        symbols[one.get("name")] = kinds[0] if alone else None
    if any(symbols.get(name) is None for name in names):
        raise BadRecord("structure with partially occupied sites")
    return [symbols[name] for name in names]
