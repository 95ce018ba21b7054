"""Single labels far from all others: one energy, the longest force or the largest stress of a structure.

How far is told by the median and a robust standard deviation of a sample; then all structures are looked at, chunk by
chunk, so that memory does not grow with the store.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from multifid.quality.check import read_fields, sampled
from multifid.store.passes import Each, Fields, one_by_one
from multifid.store.references import References
from multifid.store.store import Store
from multifid.structures.structure import Packed, PackedLabels

CHUNK = 4096, 1 << 18  # structures and atoms read at once, at most
STRETCH = 1 << 16  # structures that one process looks at
FAR = 20.0  # robust standard deviations from the median: an outlier
SMALLEST = {"energy": 0.05, "forces": 10.0, "stress": 1.0}  # eV/atom, eV/angstrom, eV/angstrom^3: below it, none at all
LISTED = 10  # outliers that are named, of each kind

Read = Callable[[int, int], Packed]  # structures start..stop


@dataclass(frozen=True, slots=True, order=True)
class Outlier:
    """A structure far from the others: how far, its index, and its value (see `values_of`)."""

    deviations: float
    structure: int
    value: float


@dataclass(slots=True)
class Outliers:
    """Of one task and kind of label: how many there are, median and robust standard deviation, and the worst."""

    task: str
    kind: str
    median: float
    deviation: float
    count: int = 0
    worst: list[Outlier] = field(default_factory=list)  # a heap, the least bad first

    def look(self, first: int, values: np.ndarray) -> None:
        """values: (structures,) of consecutive structures from `first` on; NaN = no label."""
        away = np.abs(values - self.median)
        far = np.flatnonzero(away > max(FAR * self.deviation, SMALLEST[self.kind]))
        self.count += len(far)
        for s in far[np.argsort(-away[far], kind="stable")][:LISTED]:
            self._add(Outlier(float(away[s] / self.deviation), first + int(s), float(values[s])))

    def join(self, others: Iterable["Outliers"]) -> None:
        """Add what was found among other structures."""
        for other in others:
            self.count += other.count
            for one in other.worst:
                self._add(one)

    def to_manifest(self, place: Callable[[int], str]) -> dict[str, Any]:
        """Count, median and the worst. place: where the structure of an index came from."""
        worst = [{"source": place(one.structure), "value": one.value} for one in sorted(self.worst, reverse=True)]
        return {"count": self.count, "median": self.median, "deviation": self.deviation, "worst": worst}

    def _add(self, one: Outlier) -> None:
        heapq.heappush(self.worst, one)
        if len(self.worst) > LISTED:
            heapq.heappop(self.worst)


def outliers(store: Store) -> list[Outliers]:
    """Structures whose labels are far from the rest, by task and kind; only kinds that have any."""
    references = {task: References.from_manifest(store.manifest["tasks"][task]) for task in store.tasks}

    def read(start: int, stop: int) -> Packed:
        return store.read(np.arange(start, stop))

    natoms = store.field("natoms")
    found = _look(read, natoms, 0, references, _typical(read, store.structures, references))
    return [one for one in found if one.count]


def outliers_of_fields(fields: Fields, references: Mapping[str, References], each: Each = one_by_one) -> list[Outliers]:
    """The same of a store that is being written."""
    count = len(fields["natoms"])
    tasks = list(references)
    typical = _typical(lambda start, stop: read_fields(fields, start, stop, tasks), count, references)
    starts = range(0, count, STRETCH)
    parts = each(_look_at, [(fields, s, min(s + STRETCH, count), dict(references), typical) for s in starts])
    for one, of_parts in zip(typical, zip(*parts, strict=True), strict=True):
        one.join(of_parts)
    return [one for one in typical if one.count]


def values_of(kind: str, packed: Packed, labels: PackedLabels, references: References) -> np.ndarray:
    """(structures,) aligned energy per atom, longest force, largest component of the stress; NaN = no label."""
    first = packed.offsets[:-1]
    if kind == "energy":
        return (labels.energy - np.add.reduceat(references.table[packed.numbers], first)) / packed.natoms
    if kind == "stress":
        return np.full(len(first), np.nan) if labels.stress is None else np.abs(labels.stress).max(axis=(1, 2))
    if labels.forces is None:
        return np.full(len(first), np.nan)
    squared = np.einsum("ak,ak->a", labels.forces, labels.forces, dtype=np.float64)
    return np.sqrt(np.fmax.reduceat(squared, first))


def _typical(read: Read, count: int, references: Mapping[str, References]) -> list[Outliers]:
    """For each task and kind of label that a sample has: what is usual, and no outlier yet."""
    sample = sampled(read, count)
    found = []
    for task, own in references.items():
        for kind in SMALLEST:
            values = values_of(kind, sample, sample.labels[task], own)
            values = values[np.isfinite(values)]
            if len(values):
                middle = float(np.median(values))
                spread = 1.4826 * float(np.median(np.abs(values - middle)))
                found.append(Outliers(task, kind, middle, max(spread, 1e-6)))
    return found


def _look(
    read: Read, natoms: np.ndarray, first: int, references: Mapping[str, References], typical: Sequence[Outliers]
) -> list[Outliers]:
    """natoms: of the structures that are looked at, from `first` on."""
    found = [Outliers(one.task, one.kind, one.median, one.deviation) for one in typical]
    ends, start = np.cumsum(natoms, dtype=np.int64), 0
    while start < len(natoms):
        before = int(ends[start - 1]) if start else 0
        most = int(np.searchsorted(ends, before + CHUNK[1], side="right"))
        stop = max(start + 1, min(start + CHUNK[0], most))
        packed = read(first + start, first + stop)
        for one in found:
            one.look(first + start, values_of(one.kind, packed, packed.labels[one.task], references[one.task]))
        start = stop
    return found


def _look_at(
    fields: Fields, start: int, stop: int, references: dict[str, References], typical: list[Outliers]
) -> list[Outliers]:
    tasks = list(references)
    natoms = fields["natoms"][start:stop]
    return _look(lambda a, b: read_fields(fields, a, b, tasks), natoms, start, references, typical)
