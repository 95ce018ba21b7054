"""The second pass of `prepare`: reference energies, scale and edges per atom, from a store's own field files.

Works in pieces of the fields, so that memory does not grow with the number of structures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from multifid.data.array_file import Rows
from multifid.data.references import References, count_elements, fit
from multifid.data.split import TRAIN
from multifid.structures.neighbors import edges_per_atom
from multifid.structures.structure import Packed

CUTOFFS = (4.0, 5.0, 6.0)  # angstrom: for these the manifest says how many edges an atom has
SAMPLE = 200  # structures on which they are counted
PIECE = 4096, 1 << 18  # structures and atoms looked at together, at most

Fields = dict[str, Rows]


@dataclass(frozen=True)
class TrainEnergies:
    """Compositions and energies of the train split of one task, in chunks; can be iterated again and again."""

    fields: Fields
    split: np.ndarray
    task: str
    elements: list[int]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        energies = self.fields.get(f"labels/{self.task}/energy")
        if energies is None:
            return
        for part, _, numbers, natoms in pieces(self.fields):
            energy = energies[part]
            used = (self.split[part] == TRAIN) & np.isfinite(energy)
            yield count_elements(numbers, natoms, self.elements)[used], energy[used]


class Piece(NamedTuple):
    """Consecutive structures of a store: which structures and atoms, numbers (atoms,), natoms (structures,) int64."""

    structures: slice
    atoms: slice
    numbers: np.ndarray
    natoms: np.ndarray


def pieces(fields: Fields) -> Iterator[Piece]:
    """The whole store, piece by piece."""
    structures, atoms = PIECE
    start, first = 0, 0
    while start < len(fields["natoms"]):
        natoms = fields["natoms"][start : start + structures].astype(np.int64)
        natoms = natoms[: max(1, int(np.searchsorted(np.cumsum(natoms), atoms, side="right")))]
        last = first + int(natoms.sum())
        yield Piece(slice(start, start + len(natoms)), slice(first, last), fields["numbers"][first:last], natoms)
        start, first = start + len(natoms), last


def survey_task(task: str, fields: Fields, split: np.ndarray, isolated: dict[int, float]) -> dict[str, Any]:
    """What the manifest says of a task's numbers: references, undetermined, rank, residual, scale."""
    elements = [int(z) for z in np.flatnonzero(elements_of(fields))]
    energies = TrainEnergies(fields, split, task, elements)
    if any(len(energy) for _, energy in energies):
        references = fit(energies, elements, isolated)
    else:  # forces alone: nothing to subtract
        references = References({}, [], 0, 0.0)
    return {**references.to_manifest(), "scale": scale(fields, split, task, references)}


def scale(fields: Fields, split: np.ndarray, task: str, references: References) -> float:
    """RMS of the train split's force components, eV/angstrom; of the aligned energy per atom, eV, without forces.

    1.0 where both are zero: a residual is divided by it.
    """
    forces, energies = fields.get(f"labels/{task}/forces"), fields.get(f"labels/{task}/energy")
    if forces is not None:
        of_forces = _Mean()
        for part, atoms, _, natoms in pieces(fields):
            of_forces.add(forces[atoms][np.repeat(split[part] == TRAIN, natoms)].astype(np.float64))
        if rms := of_forces.rms():
            return rms
    of_energy = _Mean()
    if energies is not None:
        for part, _, numbers, natoms in pieces(fields):
            of_energy.add((references.align(energies[part], numbers, natoms) / natoms)[split[part] == TRAIN])
    return of_energy.rms() or 1.0


def elements_of(fields: Fields) -> np.ndarray:
    """(256,) bool: the atomic numbers that occur."""
    present = np.zeros(256, bool)
    for piece in pieces(fields):
        present[piece.numbers] = True
    return present


def sample_edges(fields: Fields, split: np.ndarray) -> dict[str, float]:
    """Mean number of neighbours of an atom at a few cutoffs, on structures spread evenly over the train split."""
    train = np.flatnonzero(split == TRAIN)
    chosen = train[sampled(len(train))]
    structures = [slice(i, i + 1) for i in chosen.tolist()]
    atoms = [slice(*fields["offsets"][i : i + 2].tolist()) for i in chosen.tolist()]
    n = len(chosen)

    def joined(name: str, parts: list[slice]) -> np.ndarray:
        return np.concatenate([fields[name][part] for part in parts])

    packed = Packed(
        numbers=joined("numbers", atoms),
        positions=joined("positions", atoms),
        natoms=joined("natoms", structures).astype(np.int64),
        cell=joined("cell", structures) if "cell" in fields else np.zeros((n, 3, 3)),
        pbc=joined("pbc", structures) if "pbc" in fields else np.zeros((n, 3), bool),
        charge=np.zeros(n, np.int8),
        spin=np.ones(n, np.uint8),
    )
    return {f"{cutoff:g}": float(edges_per_atom(packed, cutoff)) for cutoff in CUTOFFS}


def sampled(count: int) -> np.ndarray:
    """Which of the structures of the train split the edges are counted on: at most SAMPLE, spread evenly."""
    return np.unique(np.linspace(0, count - 1, SAMPLE).astype(np.int64))


class _Mean:
    """Mean square of all finite values that come along."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)]
        self.sum += float(np.square(finite).sum())
        self.count += finite.size

    def rms(self) -> float:
        return float(np.sqrt(self.sum / self.count)) if self.count else 0.0
