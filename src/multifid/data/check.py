"""What is doubtful in the data: units that cannot be right, and labels far from all others.

Units are judged on a sample of consecutive structures taken in runs all over the store, so that the cost does not grow
with it; `prepare` does this before a store appears. Outliers are looked for among all structures, chunk by chunk. What
occurs more than once is counted in `leakage`.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from multifid.data.doubts import Doubt, doubt_of_crystals, doubts
from multifid.data.references import References
from multifid.data.store import Store
from multifid.data.survey import Fields
from multifid.structures.structure import Packed, PackedLabels

RUNS, RUN = 64, 24  # runs of consecutive structures in a sample, and structures of each
GEOMETRIES = 200  # structures whose neighbours are looked at
ATOMS = 20_000  # of a sample, at most (about)
CHUNK = 4096  # structures read at once
FAR = 20.0  # robust standard deviations from the median: an outlier
SMALLEST = {"energy": 0.05, "forces": 10.0}  # eV/atom, eV/angstrom: deviations below this are no outliers at all
LISTED = 10  # outliers that are named, of each kind

OF_ATOMS = ("numbers", "positions")
GEOMETRY = (*OF_ATOMS, "natoms", "cell", "pbc", "charge", "spin")

Read = Callable[[int, int], Packed]  # structures start..stop


@dataclass(frozen=True, slots=True, order=True)
class Outlier:
    """A structure far from the others: how far, its index, and its value (eV/atom aligned, or the longest force)."""

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
            heapq.heappush(self.worst, Outlier(float(away[s] / self.deviation), first + int(s), float(values[s])))
            if len(self.worst) > LISTED:
                heapq.heappop(self.worst)


def doubts_of_fields(fields: Fields, levels: dict[str, str]) -> list[Doubt]:
    """The doubts about a store that is being written. levels: task -> level of theory."""
    return _doubts(lambda start, stop: read_fields(fields, start, stop, list(levels)), len(fields["natoms"]), levels)


def doubts_of_store(store: Store) -> list[Doubt]:
    """The doubts about the units of a store."""
    levels = {task: about["level_of_theory"] for task, about in store.manifest["tasks"].items()}
    return _doubts(lambda start, stop: store.read(np.arange(start, stop)), store.structures, levels)


def outliers(store: Store) -> list[Outliers]:
    """Structures whose labels are far from the rest, by task and kind; only kinds that have any."""
    sample = join([store.read(np.arange(*run)) for run in runs(store.structures)])
    found = []
    for task in store.tasks:
        references = References.from_manifest(store.manifest["tasks"][task])
        for kind in SMALLEST:
            values = _values(kind, sample, sample.labels[task], references)
            values = values[np.isfinite(values)]
            if len(values):
                middle = float(np.median(values))
                spread = 1.4826 * float(np.median(np.abs(values - middle)))
                found.append((Outliers(task, kind, middle, max(spread, 1e-6)), references))
    for start in range(0, store.structures, CHUNK):
        packed = store.read(np.arange(start, min(start + CHUNK, store.structures)))
        for one, references in found:
            one.look(start, _values(one.kind, packed, packed.labels[one.task], references))
    return [one for one, _ in found if one.count]


def _values(kind: str, packed: Packed, labels: PackedLabels, references: References) -> np.ndarray:
    """(structures,) aligned energy per atom, or length of the longest force; NaN where there is no label."""
    first = packed.offsets[:-1]
    if kind == "energy":
        return (labels.energy - np.add.reduceat(references.table[packed.numbers], first)) / packed.natoms
    if labels.forces is None:
        return np.full(len(first), np.nan)
    squared = np.einsum("ak,ak->a", labels.forces, labels.forces, dtype=np.float64)
    return np.sqrt(np.fmax.reduceat(squared, first))


def runs(count: int) -> list[tuple[int, int]]:
    """(first, end) of runs of consecutive structures: all of a small store, else RUNS of them spread evenly."""
    if count <= RUNS * RUN:
        return [(start, min(start + RUN, count)) for start in range(0, count, RUN)]
    starts = np.unique(np.linspace(0, count - RUN, RUNS).astype(np.int64))
    return [(start, start + RUN) for start in starts.tolist()]


def _doubts(read: Read, count: int, levels: dict[str, str]) -> list[Doubt]:
    parts = []
    for start, stop in runs(count):
        part = read(start, stop)
        kept = max(1, int(np.searchsorted(np.cumsum(part.natoms), 2 * ATOMS // RUNS, side="right")))
        parts.append(take(part, np.arange(min(kept, len(part.natoms)))))
    sample = join(parts)
    chosen = np.unique(np.linspace(0, len(sample.natoms) - 1, GEOMETRIES).astype(np.int64))
    found = doubts(sample, take(sample, chosen))
    for task, level in levels.items():
        if (doubt := doubt_of_crystals(task, level, sample, sample.labels[task].energy)) is not None:
            found.append(doubt)
    return found


def read_fields(fields: Fields, start: int, stop: int, tasks: Sequence[str]) -> Packed:
    """Consecutive structures of a store that is being written."""
    offsets = fields["offsets"][start : stop + 1].astype(np.int64)
    atoms, n = slice(int(offsets[0]), int(offsets[-1])), stop - start

    def rows(name: str, default: np.ndarray) -> np.ndarray:
        return fields[name][start:stop] if name in fields else default

    def labels(task: str) -> PackedLabels:
        energy, forces, stress = (f"labels/{task}/{kind}" for kind in ("energy", "forces", "stress"))
        return PackedLabels(
            energy=rows(energy, np.full(n, np.nan)),
            forces=fields[forces][atoms] if forces in fields else None,
            stress=fields[stress][start:stop] if stress in fields else None,
        )

    return Packed(
        numbers=fields["numbers"][atoms],
        positions=fields["positions"][atoms],
        natoms=np.diff(offsets),
        cell=rows("cell", np.zeros((n, 3, 3))),
        pbc=rows("pbc", np.zeros((n, 3), bool)),
        charge=rows("charge", np.zeros(n, np.int8)),
        spin=rows("spin", np.ones(n, np.uint8)),
        labels={task: labels(task) for task in tasks},
    )


def geometries(fields: Fields) -> Iterator[Packed]:
    """All structures of a store that is being written, without labels, chunk by chunk."""
    count = len(fields["natoms"])
    for start in range(0, count, CHUNK):
        yield read_fields(fields, start, min(start + CHUNK, count), ())


def take(packed: Packed, chosen: np.ndarray) -> Packed:
    """Some structures of many: (structures,) indices, ascending."""
    keep = np.zeros(len(packed.natoms), bool)
    keep[chosen] = True
    atoms = np.repeat(keep, packed.natoms)
    fields = {name: getattr(packed, name)[atoms if name in OF_ATOMS else keep] for name in GEOMETRY}
    labels = {}
    for task, own in packed.labels.items():
        forces = None if own.forces is None else own.forces[atoms]
        labels[task] = PackedLabels(own.energy[keep], forces, None if own.stress is None else own.stress[keep])
    return Packed(**fields, labels=labels)


def join(parts: Sequence[Packed]) -> Packed:
    """Parts of one store laid end to end."""

    def joined(task: str, kind: str) -> np.ndarray | None:
        values = [getattr(part.labels[task], kind) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    fields = {name: np.concatenate([getattr(part, name) for part in parts]) for name in GEOMETRY}
    labels = {}
    for task in parts[0].labels:
        energy = np.concatenate([part.labels[task].energy for part in parts])
        labels[task] = PackedLabels(energy, joined(task, "forces"), joined(task, "stress"))
    return Packed(**fields, labels=labels)
