"""Stores to batches: reads the structures of a step, finds their edges, aligns their labels, and does so ahead of time.

The only file of this room that knows torch.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from multifid.graphs.batch import Batch, Targets
from multifid.graphs.neighbors import neighbor_list
from multifid.store.passes import sampled
from multifid.store.references import References
from multifid.store.store import Store
from multifid.structures.cells import spans_volume
from multifid.structures.properties import aligned as without_known
from multifid.structures.reproducible import cube_root, determinant
from multifid.structures.structure import Packed, PackedLabels

T = TypeVar("T")
LossName = Literal["l1", "mse", "huber", "l2norm"]
Lists = Callable[[Packed, float], tuple[torch.Tensor, torch.Tensor]]  # cutoff -> edges (2, E), shifts (E, 3)

AT_ONCE = 1 << 20  # structures whose charges are looked at together
MOLECULAR_DENSITY = 0.09  # atoms per cubic angstrom in a molecule, hydrogen included; calibrated by each store


class TaskConfig(BaseModel):
    """One task: a store, its weight in the objective, and which labels of the store it learns."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    store: str = Field(description="directory of the prepared store, or (train) [FORMAT:]FILE, prepared once")
    weight: float = Field(1.0, gt=0.0, description="w_t of the objective, used as given")
    labels: str | None = Field(None, description="label set of the store; may be left out where it has only one")
    per_step: float | None = Field(None, ge=1.0, description="structures of this task per step, in place of its share")
    scale: float | None = Field(
        None,
        gt=0.0,
        description="eV/angstrom, in whose units the task's residuals and predictions are, in place of the RMS of its "
        "training forces, which one structure with large forces can set",
    )
    loss: LossName | None = Field(None, description="of this task's scaled residuals, in place of objective.loss")


@dataclass(frozen=True)
class Source:
    """A store as a run uses it: which of its label sets are which tasks, and their reference energies."""

    store: Store
    tasks: dict[str, str]  # task -> label set of the store
    references: dict[str, References]  # task -> reference energies
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)  # task -> what a run that goes on has of the manifest

    @property
    def label_sets(self) -> list[str]:
        return list(dict.fromkeys(self.tasks.values()))

    def about(self, task: str) -> dict[str, Any]:
        """What the manifest says of a task's labels (scale, level of theory, ...), or said when the run began."""
        return dict(self.kept.get(task) or self.store.manifest["tasks"][self.tasks[task]])

    def elements(self, task: str) -> list[int]:
        """What a branch of the task sees in training: the elements of its energies; where it has none, of the split."""
        unseen = self.store.manifest["splits"].get("unseen_elements", [])
        return sorted(self.references[task].energies or set(self.store.elements) - set(unseen))


@lru_cache
def trained_values(store: Store, field: str) -> list[int]:
    """The charges ("charge") or multiplicities ("spin") of a store's train split, ascending; [0] or [1] without any."""
    if not store.has(field):
        return [{"charge": 0, "spin": 1}[field]]
    found: set[int] = set()
    for start in range(0, store.size("train"), AT_ONCE):
        found |= set(np.unique(store.rows(field, store.pick("train", slice(start, start + AT_ONCE)))).tolist())
    return sorted(found)


Piece = list[tuple[Source, np.ndarray]]  # structures of several sources, by their indices in the stores


def open_sources(tasks: dict[str, TaskConfig], verify: str = "touch") -> list[Source]:
    """The stores of a config, each opened once. Tasks of one store share a `Source`, in the order of their names."""
    stores: dict[str, Store] = {}
    members: dict[str, dict[str, str]] = {}
    for task in sorted(tasks):
        store = Store(tasks[task].store, verify=verify)
        _refuse_without_split(task, store)
        path = str(store.path.resolve())
        stores.setdefault(path, store)
        members.setdefault(path, {})[task] = _label_set(task, tasks[task], store)
    return [
        Source(
            stores[p], chosen, {t: References.from_manifest(stores[p].manifest["tasks"][n]) for t, n in chosen.items()}
        )
        for p, chosen in members.items()
    ]


def _refuse_without_split(task: str, store: Store) -> None:
    for split in ("train", "validation"):
        if not store.size(split):
            sizes = ", ".join(f"{name} {store.size(name)}" for name in ("train", "validation", "test"))
            raise ValueError(
                f"tasks.{task}.store: {store.path} has no {split} structure ({sizes}), so nothing can be trained on "
                "it, only evaluated; prepare a store whose --fractions are not 0"
            )


def _label_set(task: str, config: TaskConfig, store: Store) -> str:
    present = list(store.tasks)
    if config.labels is not None:
        if config.labels not in present:
            raise ValueError(f"tasks.{task}.labels: {config.labels!r} is not in {store.path}, which has {present}")
        return config.labels
    if task in present:
        return task
    if len(present) == 1:
        return present[0]
    raise ValueError(f"tasks.{task}.labels must name one of the label sets of {store.path}: {present}")


def host_lists(packed: Packed, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges (2, E) int64 and shifts (E, 3) float64 of `neighbor_list`, as tensors."""
    edges, shifts = neighbor_list(packed, cutoff)
    return torch.from_numpy(edges.astype(np.int64)), torch.from_numpy(shifts.astype(np.float64))


def collate(parts: Piece, cutoff: float, lists: Lists = host_lists) -> Batch:
    """Structures of several sources, laid end to end, with their edges and aligned labels, as one batch.

    parts: (source, indices into its store), in the order in which they are laid. Labels: float64 tensors in eV,
    reference energies subtracted. An empty list of parts gives an empty batch. lists: makes the edges, on the host or
    on the device on which the batch will be processed; all else is on the host.
    """
    packs = [source.store.read(indices, source.label_sets) for source, indices in parts]
    slices: dict[str, tuple[slice, slice]] = {}
    targets: dict[str, Targets] = {}
    structures = atoms = 0
    for (source, _), pack in zip(parts, packs, strict=True):
        here = (slice(structures, structures + len(pack.natoms)), slice(atoms, atoms + len(pack.numbers)))
        structures, atoms = here[0].stop, here[1].stop
        for task, name in source.tasks.items():
            slices[task] = here
            targets[task] = _targets(pack, pack.labels[name], source.references[task])
    whole = _concatenate(packs)
    edges, shifts = lists(whole, cutoff)
    return Batch.from_packed(whole, edges, shifts, slices, targets)


def _targets(pack: Packed, labels: PackedLabels, references: References) -> Targets:
    def tensor(x: np.ndarray | None) -> torch.Tensor | None:
        return None if x is None else torch.from_numpy(x.astype(np.float64))

    if labels.kind is not None:
        value = labels.value
        if value is not None:
            value = without_known(labels.kind, value, references.table, pack.numbers, pack.natoms)
        return Targets(torch.full((len(pack.natoms),), torch.nan, dtype=torch.float64), None, None, labels.kind,
                       tensor(value))  # fmt: skip
    aligned, stress = references.align(labels.energy, pack.numbers, pack.natoms), labels.stress
    if stress is not None:  # stores of the first version kept no vectors that are not periodic, but their stress
        stress = np.where(spans_volume(pack.cell)[:, None, None], stress, np.nan)
    return Targets(torch.from_numpy(aligned), tensor(labels.forces), tensor(stress))


def _concatenate(packs: list[Packed]) -> Packed:
    def join(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(shape, dtype), *(getattr(p, name) for p in packs)])

    return Packed(
        numbers=join("numbers", (0,), np.uint8),
        positions=join("positions", (0, 3), np.float32),
        natoms=join("natoms", (0,), np.int64),
        cell=join("cell", (0, 3, 3), np.float64),
        pbc=join("pbc", (0, 3), np.bool_),
        charge=join("charge", (0,), np.int8),
        spin=join("spin", (0,), np.uint8),
    )


def edge_costs(source: Source, indices: np.ndarray, cutoff: float) -> np.ndarray:
    """Estimated edges of structures, from their numbers of atoms and cells only: (n,) float64, whole numbers.

    Nobody builds the neighbour lists of structures that it will not process. The estimate is calibrated by
    `edges_per_atom` of the manifest: on the structures on which that was counted it is right on average. On published
    data single crystals then deviate by about 5 %, molecules by 10 to 15 %.
    """
    return np.rint(_even_edges(source.store, indices, cutoff, _calibration(source.store, cutoff)))


@lru_cache(maxsize=256)
def _calibration(store: Store, cutoff: float) -> float:
    """Edges as the manifest counted them on its sample of the train split, by the estimate for the same structures.

    Comparing the same structures, and not means over the split, keeps the sample's luck out of the factor.
    """
    measured = store.manifest["edges_per_atom"]
    nearest = min(measured, key=lambda c: abs(float(c) - cutoff))
    sample = store.pick(store.fitted_on, sampled(store.size(store.fitted_on)))
    estimate = float(_even_edges(store, sample, float(nearest), 1.0).sum())
    counted = float(measured[nearest]) * float(store.rows("natoms", sample).sum())
    return counted / estimate if estimate else 1.0


def _even_edges(store: Store, indices: np.ndarray, cutoff: float, factor: float) -> np.ndarray:
    """`factor` x the edges of structures whose atoms were spread evenly over a crystal's cell, else over a ball.

    In a crystal an atom sees density x volume of the cutoff sphere. In a ball of radius R the fraction of pairs closer
    than s R (s <= 2) is s^3 - 9/16 s^4 + 1/32 s^6 (Hammersley, "The distribution of distance in a hypersphere", Ann.
    Math. Stat. 21, 1950). No molecule has more edges than pairs. Ranks cut a step by these numbers, each for itself, so
    all of them must find the same ones, whatever processors they run on (`structures.reproducible`).
    """
    natoms = store.rows("natoms", indices).astype(np.float64)
    pairs = natoms * (natoms - 1)
    s = np.minimum(cutoff / cube_root(3 * natoms / (4 * np.pi * MOLECULAR_DENSITY)), 2.0)
    cube = s * s * s
    edges = np.minimum(factor * pairs * (cube - 9 / 16 * cube * s + cube * cube / 32), pairs)
    if store.has("cell"):
        volume = np.abs(determinant(store.rows("cell", indices)))
        crystal = store.rows("pbc", indices).all(axis=1) & (volume > 0)
        edges[crystal] = factor * natoms[crystal] ** 2 / volume[crystal] * (4 / 3 * np.pi * cutoff**3)
    return edges


def cut(costs: np.ndarray, most: float | None) -> list[slice]:
    """Consecutive pieces of a list whose costs add up to at most `most` each (single larger items stand alone)."""
    if most is None or not len(costs):
        return [slice(0, len(costs))]
    starts, total = [0], 0.0
    for i, cost in enumerate(costs):
        if total + cost > most and i > starts[-1]:
            starts.append(i)
            total = 0.0
        total += float(cost)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(costs)], strict=True)]


def most_pieces(costs: np.ndarray, owners: np.ndarray, most: float | None) -> int:
    """The largest number of pieces into which `cut` cuts what any one owner has of a list; at least one.

    costs (n,), whole numbers; owners (n,). All owners at once: every round takes a piece from each that has some left.
    """
    if most is None:
        return 1
    order = np.argsort(owners, kind="stable")
    total = np.concatenate([[0.0], np.cumsum(costs[order])])
    at = np.flatnonzero(np.diff(owners[order], prepend=-1))
    stop, pieces = np.append(at[1:], len(order))[: len(at)], 0
    while len(at):
        fitting = np.searchsorted(total, total[at] + most, side="right") - 1
        at, pieces = np.minimum(np.maximum(fitting, at + 1), stop), pieces + 1
        left = at < stop
        at, stop = at[left], stop[left]
    return max(pieces, 1)


def cut_evenly(costs: np.ndarray, most: int | None) -> list[slice]:
    """As few consecutive pieces as `cut` makes, the dearest of them as cheap as can be; costs are whole numbers.

    Where a single item is dearer than `most`, the rest is not made dearer for it: that is `cut`.
    """
    if most is None or not len(costs) or costs.max() > most:
        return cut(costs, most)
    owners = np.zeros(len(costs), np.int64)
    count = most_pieces(costs, owners, most)
    low, high = int(max(costs.max(), -(-costs.sum() // count))), most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if most_pieces(costs, owners, middle) <= count else (middle + 1, high)
    return cut(costs, high)


def pieces(parts: Piece, cutoff: float, max_edges: int | None) -> list[Piece]:
    """The structures of a step as one piece, or as few even ones of at most about `max_edges` edges, in their order."""
    if max_edges is None:
        return [parts]
    costs = np.concatenate([np.zeros(0), *(edge_costs(s, i, cutoff) for s, i in parts)])
    ends = np.cumsum([len(i) for _, i in parts])
    out = []
    for piece in cut_evenly(costs, max_edges):
        inside = []
        for (source, indices), end in zip(parts, ends, strict=True):
            begin = end - len(indices)
            chosen = indices[max(piece.start - begin, 0) : max(piece.stop - begin, 0)]
            if len(chosen):
                inside.append((source, chosen))
        out.append(inside)
    return out


def ahead(
    work: Callable[[int], T], start: int, stop: int, workers: int, begin: Callable[[], None] = lambda: None
) -> Iterator[T]:
    """work(start), work(start + 1), ... work(stop - 1), in order, prepared by `workers` threads ahead of the caller.

    Threads and not processes: numpy releases the interpreter in what costs time, and batches need no copying. What is
    made is a function of the step alone, so their number changes nothing. 0 prepares each batch when it is asked for.
    begin: what each thread does first.
    """
    if workers == 0:
        yield from (work(step) for step in range(start, stop))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="loader", initializer=begin) as pool:
        pending: list[Future[T]] = []
        try:
            for step in range(start, stop):
                while len(pending) <= workers and step + len(pending) < stop:
                    pending.append(pool.submit(work, step + len(pending)))
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
