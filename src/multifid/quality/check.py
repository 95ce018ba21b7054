"""Whether the units of a store can be right, judged on a sample of it.

The sample is of consecutive structures taken in runs all over the store, so that the cost does not grow with it;
`prepare` does this before a store appears. Single labels far from all others are found by `outliers`, what occurs more
than once by `leakage`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from multifid.quality.doubts import Doubt, doubt_of_crystals, doubt_of_free_atoms, doubts_of
from multifid.quality.measure import Measurements, measure
from multifid.store.passes import Fields
from multifid.store.store import Store
from multifid.structures.structure import Packed, PackedLabels

RUNS, RUN = 64, 24  # runs of consecutive structures in a sample, and structures of each
GEOMETRIES = 200  # structures whose neighbours are looked at
ATOMS = 20_000  # of a sample, at most (about)
CHUNK = 4096  # structures read at once

OF_ATOMS = ("numbers", "positions")
GEOMETRY = (*OF_ATOMS, "natoms", "cell", "pbc", "charge", "spin")

Read = Callable[[int, int], Packed]  # structures start..stop


@dataclass(frozen=True, slots=True)
class Checked:
    """What is doubtful of a store, and what was measured: "geometry" or task -> name (`measure`) -> ratio."""

    doubts: list[Doubt]
    measured: dict[str, Measurements]

    def to_manifest(self) -> dict[str, dict[str, dict[str, float]]]:
        """What was measured, rounded: the last digits say nothing."""
        return {
            what: {name: {k: _rounded(getattr(m, k)) for k in ("ratio", "spread", "count")} for name, m in own.items()}
            for what, own in self.measured.items()
            if own
        }


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.3g}")


def check_fields(fields: Fields, levels: dict[str, str], isolated: dict[str, dict[int, float]]) -> Checked:
    """A store that is being written. levels: task -> level of theory. isolated: task -> energies of free atoms, eV."""
    tasks = list(levels)
    return _checked(
        lambda start, stop: read_fields(fields, start, stop, tasks), len(fields["natoms"]), levels, isolated
    )


def check_store(store: Store) -> Checked:
    """The units of a store."""
    tasks = store.manifest["tasks"]
    levels = {task: about["level_of_theory"] for task, about in tasks.items() if "property" not in about}
    isolated = {task: {int(z): e for z, e in about.get("isolated", {}).items()} for task, about in tasks.items()}
    return _checked(lambda start, stop: store.read(np.arange(start, stop)), store.structures, levels, isolated)


def runs(count: int) -> list[tuple[int, int]]:
    """(first, end) of runs of consecutive structures: all of a small store, else RUNS of them spread evenly."""
    if count <= RUNS * RUN:
        return [(start, min(start + RUN, count)) for start in range(0, count, RUN)]
    starts = np.unique(np.linspace(0, count - RUN, RUNS).astype(np.int64))
    return [(start, start + RUN) for start in starts.tolist()]


def sampled(read: Read, count: int) -> Packed:
    """A sample of a store of `count` structures: runs of consecutive ones, about ATOMS atoms together at most."""
    parts = []
    for start, stop in runs(count):
        part = read(start, stop)
        kept = max(1, int(np.searchsorted(np.cumsum(part.natoms), 2 * ATOMS // RUNS, side="right")))
        parts.append(take(part, np.arange(min(kept, len(part.natoms)))))
    return join(parts)


def _checked(read: Read, count: int, levels: dict[str, str], isolated: dict[str, dict[int, float]]) -> Checked:
    sample = sampled(read, count)
    chosen = np.unique(np.linspace(0, len(sample.natoms) - 1, GEOMETRIES).astype(np.int64))
    measured = measure(sample, take(sample, chosen))
    found = doubts_of(sample, measured)
    for task, level in levels.items():
        energy = sample.labels[task].energy
        of_atoms = doubt_of_free_atoms(task, sample, energy, isolated.get(task, {}))
        found += [d for d in (doubt_of_crystals(task, level, sample, energy), of_atoms) if d is not None]
    return Checked(found, measured)


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
