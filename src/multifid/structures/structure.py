"""What a sample is: one labelled structure, and many of them laid end to end. Plain numpy, no torch.

Units everywhere: eV, angstrom, eV/angstrom, eV/angstrom^3 (stress tension-positive), e, multiplicity.
"""

from dataclasses import dataclass, field

import numpy as np

SPLITS = ("train", "validation", "test", "unused")  # the code of a split is its place in this tuple
TRAIN, VALIDATION, TEST, UNUSED = range(4)


@dataclass(slots=True)
class Labels:
    """What one task says of one structure. NaN (or None) = no label."""

    energy: float = float("nan")  # eV, total
    forces: np.ndarray | None = None  # (atoms, 3) eV/angstrom, minus the gradient of the energy
    stress: np.ndarray | None = None  # (3, 3) eV/angstrom^3, tension-positive
    kind: str | None = None  # of a property (`properties.KINDS`) in place of them
    value: float | np.ndarray | None = None  # of the property: (), (3,), (atoms,) or (atoms, 3); a class by its number


@dataclass(slots=True)
class Structure:
    """One labelled atomistic sample, as a reader yields it (already converted to our units)."""

    numbers: np.ndarray  # (atoms,) atomic numbers 1..118
    positions: np.ndarray  # (atoms, 3) angstrom
    labels: dict[str, Labels]  # task -> labels
    relative: str  # structures with the same relative always fall into the same split
    source_id: str  # enough to find the structure again in the source file
    cell: np.ndarray | None = None  # (3, 3) angstrom, rows = vectors, periodic or not; zero where the source has none
    pbc: np.ndarray | None = None  # (3,) bool
    charge: int | None = None  # e; None: not stated, and stored as 0
    spin: int | None = None  # multiplicity; None: not stated, and stored as the lowest, or 1 where no charge is known
    split: str | None = None  # a split published with the data, else None
    told: tuple[tuple[str, str], ...] = ()  # how it was read, as (topic, text): counted for the manifest


@dataclass(slots=True)
class PackedLabels:
    """The labels of one task for packed structures. None = no such label at all; NaN = this structure lacks it."""

    energy: np.ndarray  # (structures,) float64 eV, total
    forces: np.ndarray | None = None  # (atoms, 3) float32 eV/angstrom
    stress: np.ndarray | None = None  # (structures, 3, 3) float64 eV/angstrom^3
    kind: str | None = None  # of a property in place of them
    value: np.ndarray | None = None  # of the property: (structures, ...) float64 or (atoms, ...) float32


@dataclass(slots=True)
class Packed:
    """Many structures laid end to end, as a store reads them."""

    numbers: np.ndarray  # (atoms,) uint8
    positions: np.ndarray  # (atoms, 3) float32 angstrom
    natoms: np.ndarray  # (structures,) int64
    cell: np.ndarray  # (structures, 3, 3) float64 angstrom
    pbc: np.ndarray  # (structures, 3) bool
    charge: np.ndarray  # (structures,) int8
    spin: np.ndarray  # (structures,) uint8
    labels: dict[str, PackedLabels] = field(default_factory=dict)

    @property
    def offsets(self) -> np.ndarray:
        """(structures + 1,) int64: first atom of each structure."""
        offsets = np.zeros(len(self.natoms) + 1, np.int64)
        np.cumsum(self.natoms, out=offsets[1:])
        return offsets
