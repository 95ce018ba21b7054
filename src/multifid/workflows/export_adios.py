"""`multifid export STORE --format adios`: a store as an ADIOS2 file that HydraGNN reads.

Keys, types and attributes are those of files by its own writer (see `readers/adios`). What a store has not is made:
neighbours within a cutoff (`edge_index` from sender to receiver, `edge_attr` their distance, `edge_shifts` so that
position of the receiver - that of the sender + shift is the vector between them; periodic images are there),
`chemical_composition`, and the histogram of neighbours `pna_deg`. `energy_per_atom` and `y` are the total divided by
the atoms: the reference's alignment has not been done. The types of the format make everything float32, energies too.

Structures without an energy or with a missing force cannot be said there and are left out, as are those in no split;
stress has no key. Two passes over the store, the first to count: memory does not grow with it.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from multifid.graphs.neighbors import neighbor_list
from multifid.readers.adios import DUMMY
from multifid.readers.adios_process import LABELS
from multifid.store.store import Store
from multifid.structures.structure import SPLITS, Packed

BATCH = 512  # structures at a time
ELEMENTS = 118
AXES = {"edge_index": 1}  # along which structures lie; all others along the first
KEYS = (
    "atomic_numbers", "cell", "chemical_composition", "edge_attr", "edge_index", "edge_shifts", "energy",
    "energy_per_atom", "forces", "graph_attr", "natoms", "pbc", "pos", "x", "y",
)  # fmt: skip


@dataclass
class Count:
    """What a split takes up: its structures, their atoms and edges (structures,), how many atoms have d neighbours."""

    chosen: np.ndarray
    natoms: np.ndarray
    edges: np.ndarray
    degrees: np.ndarray

    def rows(self, key: str) -> np.ndarray:
        """(structures,) rows of a key."""
        fixed = {"cell": 3, "pbc": 3, "graph_attr": 2, "chemical_composition": ELEMENTS}
        if key.startswith("edge_"):
            return self.edges
        if key in ("atomic_numbers", "forces", "pos", "x"):
            return self.natoms
        return np.full(len(self.chosen), fixed.get(key, 1))


def export_adios(path: Path, out: Path, task: str | None = None, cutoff: float = 5.0) -> Path:
    """Write OUT, which appears whole or not at all; returns it. task: whose labels, where the store has several.

    ValueError for a task that is not there, and where no structure has an energy and all forces.
    """
    store, console = Store(path), Console(stderr=True)
    label_set = _label_set(store, task)
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or choose another name")
    if not cutoff > 0:
        raise ValueError(f"--cutoff {cutoff:g} must be a positive number of angstrom")
    counts = {label: _count(store, split, label_set, cutoff) for label, split in zip(LABELS, SPLITS, strict=False)}
    counts = {label: count for label, count in counts.items() if len(count.chosen)}
    if not counts:
        raise ValueError(f"{path}: no structure has an energy and a force on every atom, which the format needs")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(store, label_set, counts, partial, out.name.removesuffix(".bp"), cutoff)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    total = sum(len(count.chosen) for count in counts.values())
    left = f"; {n:,} left out (no split, no energy, or a missing force)" if (n := store.structures - total) else ""
    console.print(f"{out}: {total:,} structures of {label_set} in {', '.join(counts)}{left}", soft_wrap=True)
    if store.manifest["tasks"][label_set]["labels"].get("stress", 0):
        console.print("stress is left out: the format has no key for it", soft_wrap=True)
    return out


def _label_set(store: Store, task: str | None) -> str:
    if task is None and len(store.tasks) == 1:
        return store.tasks[0]
    if task not in store.tasks:
        asked = "say whose labels, --task NAME" if task is None else f"there is no task {task!r}"
        raise ValueError(f"{store.path}: {asked}; it has {', '.join(store.tasks)}")
    return task


def _count(store: Store, split: str, task: str, cutoff: float) -> Count:
    """First pass: which structures of a split are written, and what they take up."""
    natoms, edges, chosen = [], [], []
    degrees = np.zeros(1, np.int64)
    index = store.index(split)
    for start in range(0, len(index), BATCH):
        picked = np.asarray(index[start : start + BATCH], np.int64)
        picked = picked[_labelled(store, picked, task)]
        if not len(picked):
            continue
        packed = store.read(picked, [task])
        of_atoms = np.bincount(neighbor_list(packed, cutoff)[0][0], minlength=len(packed.numbers))
        found = np.bincount(of_atoms)
        degrees = np.pad(degrees, (0, max(0, len(found) - len(degrees))))
        degrees[: len(found)] += found
        chosen.append(picked)
        natoms.append(packed.natoms)
        edges.append(np.add.reduceat(of_atoms, packed.offsets[:-1]))
    none = [np.zeros(0, np.int64)]
    joined = [np.concatenate(x or none) for x in (chosen, natoms, edges)]
    return Count(joined[0], joined[1], joined[2], degrees)


def _labelled(store: Store, picked: np.ndarray, task: str) -> np.ndarray:
    """Which structures (n,) have an energy and all forces."""
    packed = store.read(picked, [task])
    labels = packed.labels[task]
    if labels.forces is None:
        return np.zeros(len(picked), bool)
    whole = np.logical_and.reduceat(np.isfinite(labels.forces).all(axis=1), packed.offsets[:-1])
    return whole & np.isfinite(labels.energy)


def _write(store: Store, task: str, counts: dict[str, Count], out: Path, name: str, cutoff: float) -> None:
    """Second pass: all keys of all splits, batch after batch."""
    try:
        import adios2.bindings as adios2
    except ImportError:
        raise ValueError('writing ADIOS2 files needs the package adios2: pip install "multifid[adios]"') from None
    adios = adios2.ADIOS()
    io = adios.DeclareIO("multifid")
    io.SetParameter("StatsLevel", "0")
    engine = io.Open(str(out), adios2.Mode.Write)
    engine.BeginStep()

    def put(variable: str, values: np.ndarray, shape: list[int], start: list[int], known: dict[str, Any]) -> None:
        values = np.ascontiguousarray(values)
        if variable not in known:
            known[variable] = io.DefineVariable(variable, values, shape, start, list(values.shape), False)
        known[variable].SetSelection([start, list(values.shape)])
        engine.Put(known[variable], values, adios2.Mode.Sync)

    known: dict[str, Any] = {}
    for label, count in counts.items():
        done = dict.fromkeys(KEYS, 0)
        for columns in _batches(store, task, count.chosen, cutoff):
            for key, values in columns.items():
                axis = AXES.get(key, 0)
                shape, start = list(values.shape), [0] * values.ndim
                shape[axis], start[axis] = int(count.rows(key).sum()), done[key]
                done[key] += values.shape[axis]
                if values.size:
                    put(f"{label}/{key}", values, shape, start, known)
            engine.PerformDataWrite()
        for key in KEYS:
            rows = count.rows(key).astype(np.int64)
            put(f"{label}/{key}/variable_count", rows, [len(rows)], [0], known)
            put(f"{label}/{key}/variable_offset", np.cumsum(rows) - rows, [len(rows)], [0], known)
            io.DefineAttribute(f"{label}/{key}/variable_dim", np.array(AXES.get(key, 0)))
        io.DefineAttribute(f"{label}/ndata", np.array(len(count.chosen)))
        io.DefineAttribute(f"{label}/keys", list(KEYS))
    io.DefineAttribute("total_ndata", np.array(sum(len(count.chosen) for count in counts.values())))
    io.DefineAttribute("dataset_name", name)
    io.DefineAttribute("pna_deg", next(iter(counts.values())).degrees)
    engine.EndStep()
    engine.Close()


def _batches(store: Store, task: str, chosen: np.ndarray, cutoff: float) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(chosen), BATCH):
        yield columns_of(store.read(chosen[start : start + BATCH], [task]), task, cutoff)


def columns_of(packed: Packed, task: str, cutoff: float) -> dict[str, np.ndarray]:
    """Structures, all labelled, as the keys of the format, end to end."""
    n, labels = len(packed.natoms), packed.labels[task]
    assert labels.forces is not None
    numbers = packed.numbers.astype(np.float32)[:, None]
    structure = np.repeat(np.arange(n), packed.natoms)
    edges, shifts = neighbor_list(packed, cutoff)
    receivers, senders = edges
    moved = -np.einsum("ei,eij->ej", shifts.astype(np.float64), packed.cell[structure[receivers]])
    places = packed.positions.astype(np.float64)
    vectors = places[receivers] - places[senders] + moved
    composition = np.zeros((n, ELEMENTS), np.float32)
    np.add.at(composition, (structure, packed.numbers.astype(np.int64) - 1), 1.0)
    energy = labels.energy.astype(np.float32)[:, None]
    per_atom = (labels.energy / packed.natoms).astype(np.float32)[:, None]
    said = np.logical_or(packed.pbc.any(axis=1), packed.cell.any(axis=(1, 2)))
    cell = np.where(np.reshape(said, (-1, 1, 1)), packed.cell, DUMMY)
    return {
        "atomic_numbers": numbers,
        "cell": cell.reshape(-1, 3).astype(np.float32),
        "chemical_composition": composition.reshape(-1, 1),
        "edge_attr": np.sqrt((vectors**2).sum(axis=1)).astype(np.float32)[:, None],
        "edge_index": np.stack([senders, receivers]) - packed.offsets[structure[receivers]],
        "edge_shifts": moved.astype(np.float32),
        "energy": energy,
        "energy_per_atom": per_atom,
        "forces": labels.forces.astype(np.float32),
        "graph_attr": np.stack([packed.charge, packed.spin], axis=1).astype(np.float32).reshape(-1),
        "natoms": packed.natoms.astype(np.int32),
        "pbc": packed.pbc.astype(np.int32).reshape(-1),
        "pos": packed.positions.astype(np.float32),
        "x": np.concatenate([numbers, packed.positions, labels.forces], axis=1).astype(np.float32),
        "y": per_atom,
    }
