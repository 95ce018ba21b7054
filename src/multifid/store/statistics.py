"""What a store holds: counts, elements, label coverage, ranges, and how well the reference energies fit.

One pass over the store in chunks of whole structures, so memory does not grow with it; every block that is read is
verified. Sums and extremes are over all splits; the reference energies come from the manifest (fitted on train only).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from multifid.store.fields import MAX_ATOMS
from multifid.store.references import References, count_elements
from multifid.store.store import Store
from multifid.structures.elements import MAX_Z
from multifid.structures.properties import OF_ATOMS
from multifid.structures.structure import SPLITS, Packed, PackedLabels

CHUNK = 500_000  # atoms read at once: about 40 MB with two tasks


@dataclass(slots=True)
class Range:
    """Count, extremes, mean and standard deviation of numbers that arrive in chunks; NaN is left out.

    Chunks are merged by Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), eq. 2.1: sums of
    squares would lose all digits of the spread where the mean is large.
    """

    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    mean: float = 0.0
    _squares: float = 0.0  # sum of squared deviations from the mean

    def add(self, values: np.ndarray) -> None:
        known = values[~np.isnan(values)].astype(np.float64)
        n = known.size
        if n == 0:
            return
        mean = float(known.mean())
        squares = float(np.square(known - mean).sum())
        total, gap = self.count + n, mean - self.mean
        self._squares += squares + gap * gap * self.count * n / total
        self.mean += gap * n / total
        self.count = total
        self.minimum, self.maximum = min(self.minimum, float(known.min())), max(self.maximum, float(known.max()))

    @property
    def deviation(self) -> float:
        """Standard deviation of the population; 0 where there is nothing."""
        return math.sqrt(self._squares / self.count) if self.count else 0.0

    @property
    def rms(self) -> float:
        return math.hypot(self.deviation, self.mean)


@dataclass(slots=True)
class TaskStatistics:
    """What the store holds of one task. Label counts are structures; forces count where any component is known."""

    level_of_theory: str
    references: References  # fitted on the train split
    labels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("energy", "forces", "stress"), 0))
    energy: Range = field(default_factory=Range)  # eV/atom, aligned: reference energies subtracted
    forces: Range = field(default_factory=Range)  # eV/angstrom, by component
    force: Range = field(default_factory=Range)  # eV/angstrom, length of the vector on an atom
    stress: Range = field(default_factory=Range)  # eV/angstrom^3, by component
    property: str | None = None  # its kind, where the labels are one
    value: Range = field(default_factory=Range)  # of the property, by component
    scale: float = 1.0
    unreferenced: int = 0  # structures with an energy and with an element that has no reference energy


@dataclass(slots=True)
class StoreStatistics:
    """What one store holds."""

    name: str
    structures: int
    atoms: int
    splits: dict[str, int]
    tasks: dict[str, TaskStatistics]
    natoms: tuple[int, float, int] = (0, 0.0, 0)  # atoms of a structure: minimum, median, maximum
    elements: dict[int, int] = field(default_factory=dict)  # Z -> atoms
    holders: dict[int, int] = field(default_factory=dict)  # Z -> structures that hold the element
    periodic: int = 0  # structures with at least one periodic direction
    charged: int = 0  # structures with a charge
    open_shell: int = 0  # structures with a multiplicity other than 1
    volume: Range = field(default_factory=Range)  # angstrom^3 per atom, structures periodic in all three directions

    def coverage(self, task: str, kind: str) -> float:
        """The fraction of structures that have a label."""
        return self.tasks[task].labels[kind] / self.structures if self.structures else 0.0


def statistics(store: Store, chunk: int = CHUNK) -> StoreStatistics:
    """Read the whole store once, at most about `chunk` atoms (but at least one structure) at a time."""
    about = store.manifest["tasks"]
    out = StoreStatistics(
        name=store.path.name,
        structures=store.structures,
        atoms=store.atoms,
        splits={split: len(store.index(split)) for split in SPLITS},
        tasks={
            task: TaskStatistics(
                about[task]["level_of_theory"],
                References.from_manifest(about[task]),
                property=store.property_kind(task),
                scale=about[task]["scale"],
            )
            for task in about
        },
    )
    atoms, holders = np.zeros(MAX_Z + 1, np.int64), np.zeros(MAX_Z + 1, np.int64)
    sizes = np.zeros(MAX_ATOMS + 1, np.int64)  # sizes[n]: structures of n atoms
    for indices in _chunks(store, chunk):
        packed = store.read(indices)
        sizes += np.bincount(packed.natoms, minlength=len(sizes))
        composition = count_elements(packed.numbers, packed.natoms, range(MAX_Z + 1))
        atoms += composition.sum(axis=0).astype(np.int64)
        holders += (composition > 0).sum(axis=0)
        _add_geometry(out, packed)
        for task, labels in packed.labels.items():
            _add_labels(out.tasks[task], labels, packed)
    out.natoms = _natoms(sizes)
    out.elements = {int(z): int(atoms[z]) for z in np.flatnonzero(atoms)}
    out.holders = {int(z): int(holders[z]) for z in np.flatnonzero(holders)}
    return out


def _natoms(sizes: np.ndarray) -> tuple[int, float, int]:
    """Minimum, exact median and maximum from how many structures have 0, 1, 2, ... atoms."""
    below, structures = np.cumsum(sizes), int(sizes.sum())
    if not structures:
        return 0, 0.0, 0
    middle = [int(np.searchsorted(below, k, side="right")) for k in ((structures - 1) // 2, structures // 2)]
    present = np.flatnonzero(sizes)
    return int(present[0]), sum(middle) / 2, int(present[-1])


def _chunks(store: Store, atoms: int) -> Iterator[np.ndarray]:
    offsets = store.field("offsets")
    start = 0
    while start < store.structures:
        limit = np.uint64(int(offsets[start]) + atoms)
        stop = max(start + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        yield np.arange(start, stop)
        start = stop


def _add_geometry(out: StoreStatistics, packed: Packed) -> None:
    out.periodic += int(packed.pbc.any(axis=1).sum())
    out.charged += int((packed.charge != 0).sum())
    out.open_shell += int((packed.spin != 1).sum())
    bulk = packed.pbc.all(axis=1)
    out.volume.add(np.abs(np.linalg.det(packed.cell[bulk])) / packed.natoms[bulk])


def _add_labels(out: TaskStatistics, labels: PackedLabels, packed: Packed) -> None:
    if labels.kind is not None:
        if labels.value is not None:
            known = ~np.isnan(labels.value.reshape(len(labels.value), -1)).all(axis=1)
            known = np.logical_or.reduceat(known, packed.offsets[:-1]) if labels.kind in OF_ATOMS else known
            out.labels[labels.kind] = out.labels.get(labels.kind, 0) + int(known.sum())
            out.value.add(labels.value)
        return
    aligned = out.references.align(labels.energy, packed.numbers, packed.natoms)
    has_energy = ~np.isnan(labels.energy)
    out.labels["energy"] += int(has_energy.sum())
    out.unreferenced += int((has_energy & np.isnan(aligned)).sum())
    out.energy.add(aligned / packed.natoms)
    if labels.forces is not None:
        labelled = ~np.isnan(labels.forces).all(axis=1)
        out.labels["forces"] += int(np.logical_or.reduceat(labelled, packed.offsets[:-1]).sum())
        out.forces.add(labels.forces)
        out.force.add(np.linalg.norm(labels.forces.astype(np.float64), axis=1))
    if labels.stress is not None:
        out.labels["stress"] += int((~np.isnan(labels.stress).all(axis=(1, 2))).sum())
        out.stress.add(labels.stress)
