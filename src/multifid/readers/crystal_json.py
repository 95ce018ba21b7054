"""What MPtrj and Alexandria share: pymatgen structure dictionaries."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from multifid.readers.records import BadRecord, array, numbers_of, periodicity, vectors, whole
from multifid.structures.reproducible import times


@dataclass(slots=True)
class Crystal:
    """Geometry of one pymatgen structure dictionary."""

    numbers: np.ndarray  # (atoms,)
    positions: np.ndarray  # (atoms, 3) angstrom
    cell: np.ndarray | None  # (3, 3) angstrom
    pbc: np.ndarray | None  # (3,) bool
    charge: int  # e


def crystal(structure: Any) -> Crystal:
    """Geometry from a pymatgen `Structure.as_dict()`; BadRecord where sites are disordered, unknown or missing."""
    try:
        lattice, sites = structure["lattice"], structure["sites"]
        species = [site["species"] for site in sites]
        kinds = [names[0] for names in species]
        ordered = sum(map(len, species)) == len(species) == [kind["occu"] for kind in kinds].count(1)
        symbols = [kind["element"] for kind in kinds]
        matrix = lattice["matrix"]
        positions: Any = [site.get("xyz") for site in sites]
        if None in positions:  # as_dict(verbosity=0) writes fractional coordinates only
            fractional = vectors([site["abc"] for site in sites], len(sites), "positions")
            positions = times(fractional, array(matrix, "cell"))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise BadRecord("structure is not a pymatgen structure") from None
    if not ordered:
        raise BadRecord("structure with partially occupied sites")
    numbers = numbers_of(symbols)
    cell, pbc = periodicity(matrix, lattice.get("pbc") or [True] * 3)
    charge = whole(structure.get("charge") or 0, "charge")
    return Crystal(numbers, vectors(positions, len(numbers), "positions"), cell, pbc, charge)
