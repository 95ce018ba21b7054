"""The second pass of `prepare`: reference energies, scale and edges per atom, from a store's own field files.

Works in pieces of the fields, so that memory does not grow with the number of structures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from multifid.graphs.neighbors import edges_per_atom
from multifid.preparation.split import fitted
from multifid.store.fields import LABELS
from multifid.store.passes import Each, Fields, one_by_one, sampled
from multifid.store.references import Folded, Pass, References, count_elements, fit_by
from multifid.structures.structure import Packed

CUTOFFS = (4.0, 5.0, 6.0)  # angstrom: for these the manifest says how many edges an atom has
PIECE = 4096, 1 << 18  # structures and atoms looked at together, at most
STRETCH = 1 << 16  # structures that one process looks at


@dataclass(frozen=True)
class Stretch:
    """Consecutive structures of a store and one of its tasks: what one process looks at. Can be sent to it."""

    fields: Fields
    start: int
    train: np.ndarray  # (structures,) bool: which of them are of the train split
    task: str
    kind: str = "energy"  # of the labels that references are fitted to

    def __iter__(self) -> Iterator[tuple["StoreSlice", np.ndarray]]:
        """Its pieces, and which of their structures are of the train split."""
        for piece in pieces(self.fields, self.start, self.start + len(self.train)):
            yield piece, self.train[piece.structures.start - self.start : piece.structures.stop - self.start]

    def energies(self, elements: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Compositions and energies of its train structures, in chunks."""
        energies = self.fields[f"labels/{self.task}/{self.kind}"]
        for (part, _, numbers, natoms), train in self:
            energy = energies[part]
            used = train & np.isfinite(energy)
            yield count_elements(numbers, natoms, elements)[used], energy[used]


def stretches(task: str, fields: Fields, split: np.ndarray) -> list[Stretch]:
    """A whole store, of which the train split counts (see `fitted`); where it is cut depends on the size alone."""
    _, chosen = fitted(split)
    kinds = ("natoms", "offsets", "numbers", f"labels/{task}/energy", f"labels/{task}/forces")
    used = {name: fields[name] for name in kinds if name in fields}
    starts = range(0, len(split), STRETCH)
    return [Stretch(used, start, chosen[start : start + STRETCH], task) for start in starts]


def folded(stretch: Stretch, elements: list[int], once: Pass) -> Folded:
    """What a pass of the fit makes of a stretch."""
    return once.fold(stretch.energies(elements))


def squares(stretch: Stretch) -> "MeanSquare":
    """The squares of the force components of the train structures of a stretch."""
    forces, found = stretch.fields[f"labels/{stretch.task}/forces"], MeanSquare()
    for (_, atoms, _, natoms), train in stretch:
        found.add(forces[atoms][np.repeat(train, natoms)].astype(np.float64))
    return found


def has_energies(stretch: Stretch) -> bool:
    """Whether a train structure of a stretch has an energy."""
    energies = stretch.fields[f"labels/{stretch.task}/energy"]
    return any((train & np.isfinite(energies[piece.structures])).any() for piece, train in stretch)


class StoreSlice(NamedTuple):
    """Consecutive structures of a store: which structures and atoms, numbers (atoms,), natoms (structures,) int64."""

    structures: slice
    atoms: slice
    numbers: np.ndarray
    natoms: np.ndarray


def pieces(fields: Fields, start: int = 0, stop: int | None = None) -> Iterator[StoreSlice]:
    """The structures start .. stop-1 of a store (the whole of it by default), piece by piece."""
    structures, atoms = PIECE
    stop = len(fields["natoms"]) if stop is None else stop
    first = int(fields["offsets"][start : start + 1][0])
    while start < stop:
        natoms = fields["natoms"][start : min(start + structures, stop)].astype(np.int64)
        natoms = natoms[: max(1, int(np.searchsorted(np.cumsum(natoms), atoms, side="right")))]
        last = first + int(natoms.sum())
        yield StoreSlice(slice(start, start + len(natoms)), slice(first, last), fields["numbers"][first:last], natoms)
        start, first = start + len(natoms), last


def survey_task(
    task: str,
    fields: Fields,
    split: np.ndarray,
    elements: list[int],
    isolated: dict[int, float],
    each: Each = one_by_one,
) -> dict[str, Any]:
    """What the manifest says of a task's numbers: references, undetermined, rank, residual, scale, complete.

    elements: the atomic numbers that occur in the store.
    """
    parts = stretches(task, fields, split)
    of_forces = MeanSquare()
    if f"labels/{task}/forces" in fields:
        for part in each(squares, [(part,) for part in parts]):
            of_forces.join(part)
    if f"labels/{task}/energy" in fields and any(map(has_energies, parts)):

        def fold(once: Pass) -> Sequence[Folded]:
            return each(folded, [(part, elements, once) for part in parts])

        references = fit_by(fold, elements, isolated)
    else:  # forces alone: nothing to subtract
        references = References({}, [], 0, 0.0)
    return {
        **references.to_manifest(),
        "scale": scale(fields, split, task, references, of_forces),
        "complete": complete(fields, split, task, of_forces.count),
    }


def complete(fields: Fields, split: np.ndarray, task: str, components: int) -> list[str]:
    """The kinds of labels that every structure, and every atom, of the train split has: then nobody need count them.

    components: of forces that are numbers, in the train split.
    """
    _, train = fitted(split)
    parts = [slice(start, min(start + STRETCH, len(split))) for start in range(0, len(split), STRETCH)]

    def whole(kind: str) -> bool:
        values = fields.get(f"labels/{task}/{kind}")
        if values is None:
            return False
        if kind == "forces":
            return components == 3 * sum(int(fields["natoms"][part][train[part]].sum(dtype=np.int64)) for part in parts)
        return all(np.isfinite(values[part][train[part]]).all() for part in parts)

    return [kind for kind in LABELS if whole(kind)]


def scale(fields: Fields, split: np.ndarray, task: str, references: References, of_forces: "MeanSquare") -> float:
    """RMS of the train split's force components, eV/angstrom; of the aligned energy per atom, eV, without forces.

    1.0 where both are zero: a residual is divided by it.
    """
    energies = fields.get(f"labels/{task}/energy")
    if rms := of_forces.rms():
        return rms
    of_energy = MeanSquare()
    if energies is not None:
        _, chosen = fitted(split)
        for part, _, numbers, natoms in pieces(fields):
            of_energy.add((references.align(energies[part], numbers, natoms) / natoms)[chosen[part]])
    return of_energy.rms() or 1.0


def sample_edges(fields: Fields, split: np.ndarray) -> dict[str, float]:
    """Mean number of neighbours of an atom at a few cutoffs, on structures spread evenly over the train split."""
    train = np.flatnonzero(fitted(split)[1])
    chosen = train[sampled(len(train))]
    structures = [slice(i, i + 1) for i in chosen.tolist()]
    ends = fields["offsets"].parts([slice(i, i + 2) for i in chosen.tolist()]).reshape(-1, 2)
    atoms = [slice(first, last) for first, last in ends.tolist()]
    n = len(chosen)

    packed = Packed(
        numbers=fields["numbers"].parts(atoms),
        positions=fields["positions"].parts(atoms),
        natoms=fields["natoms"].parts(structures).astype(np.int64),
        cell=fields["cell"].parts(structures) if "cell" in fields else np.zeros((n, 3, 3)),
        pbc=fields["pbc"].parts(structures) if "pbc" in fields else np.zeros((n, 3), bool),
        charge=np.zeros(n, np.int8),
        spin=np.ones(n, np.uint8),
    )
    return {f"{cutoff:g}": float(edges_per_atom(packed, cutoff)) for cutoff in CUTOFFS}


class MeanSquare:
    """Mean square of all finite values that come along."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)]
        self.sum += float(np.square(finite).sum())
        self.count += finite.size

    def join(self, other: "MeanSquare") -> None:
        self.sum += other.sum
        self.count += other.count

    def rms(self) -> float:
        return float(np.sqrt(self.sum / self.count)) if self.count else 0.0
