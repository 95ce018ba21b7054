"""The second pass of `prepare`: reference energies, scale and edges per atom, from a store's own field files.

Works in pieces of the memory-mapped fields, so that memory does not grow with the number of structures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from multifid.data.references import References, count_elements, fit
from multifid.data.split import TRAIN
from multifid.structures.neighbors import edges_per_atom
from multifid.structures.structure import Packed

CUTOFFS = (4.0, 5.0, 6.0)  # angstrom: for these the manifest says how many edges an atom has
SAMPLE = 200  # structures on which they are counted
CHUNK = 16_384  # structures looked at together

Fields = dict[str, np.ndarray]


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
        for part, numbers, natoms in pieces(self.fields):
            energy = np.asarray(energies[part])
            used = (self.split[part] == TRAIN) & np.isfinite(energy)
            yield count_elements(numbers, natoms, self.elements)[used], energy[used]


def pieces(fields: Fields) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(structures, numbers (atoms,), natoms (structures,) int64) of consecutive pieces of a store."""
    offsets = fields["offsets"]
    for start in range(0, len(offsets) - 1, CHUNK):
        part = slice(start, min(start + CHUNK, len(offsets) - 1))
        numbers = np.asarray(fields["numbers"][int(offsets[part.start]) : int(offsets[part.stop])])
        yield part, numbers, fields["natoms"][part].astype(np.int64)


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
    by_forces, by_energy = _Mean(), _Mean()
    forces = fields.get(f"labels/{task}/forces")
    energies = fields.get(f"labels/{task}/energy")
    offsets = fields["offsets"]
    for part, numbers, natoms in pieces(fields):
        train = split[part] == TRAIN
        if forces is not None:
            mine = np.asarray(forces[int(offsets[part.start]) : int(offsets[part.stop])], np.float64)
            by_forces.add(mine[np.repeat(train, natoms)])
        if energies is not None:
            by_energy.add((references.align(energies[part], numbers, natoms) / natoms)[train])
    return by_forces.rms() or by_energy.rms() or 1.0


def elements_of(fields: Fields) -> np.ndarray:
    """(256,) bool: the atomic numbers that occur."""
    present = np.zeros(256, bool)
    for _, numbers, _ in pieces(fields):
        present[numbers] = True
    return present


def sample_edges(fields: Fields, split: np.ndarray) -> dict[str, float]:
    """Mean number of neighbours of an atom at a few cutoffs, on structures spread evenly over the train split."""
    train = np.flatnonzero(split == TRAIN)
    chosen = train[np.unique(np.linspace(0, len(train) - 1, SAMPLE).astype(np.int64))]
    bounds = [(int(fields["offsets"][i]), int(fields["offsets"][i + 1])) for i in chosen]
    n = len(chosen)
    packed = Packed(
        numbers=np.concatenate([fields["numbers"][a:b] for a, b in bounds]),
        positions=np.concatenate([fields["positions"][a:b] for a, b in bounds]),
        natoms=np.array([b - a for a, b in bounds]),
        cell=np.asarray(fields["cell"][chosen]) if "cell" in fields else np.zeros((n, 3, 3)),
        pbc=np.asarray(fields["pbc"][chosen]) if "pbc" in fields else np.zeros((n, 3), bool),
        charge=np.zeros(n, np.int8),
        spin=np.ones(n, np.uint8),
    )
    return {f"{cutoff:g}": float(edges_per_atom(packed, cutoff)) for cutoff in CUTOFFS}


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
