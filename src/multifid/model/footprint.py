"""What a training step of the model asks of a device: bytes, arithmetic, memory traffic, kernels. Counted, not run.

The real modules run on tensors without memory (torch's `meta` tensors), forward and backward, and every operation that
autograd and the modules issue is looked at: what it computes, what it reads and writes, which storages live while it
runs. Nothing here knows what an encoder is made of, so what it says stays right when an encoder changes.

All of it is linear in the size of a batch: so much for the step, for every branch, every atom, every atom that a branch
sees, and every edge. Five batches give five coefficients.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multifid.graphs.batch import Batch, Targets
from multifid.graphs.edges import edges_of_tile, in_tiles
from multifid.graphs.graph import GraphNeeds
from multifid.model.encoders import build_encoder
from multifid.model.potential import ModelConfig, Potential

PER_STRUCTURE = 16  # atoms of a structure while counting: what structures cost by themselves is next to nothing
# Tiles of edges in a batch that is counted: from some on, one more is like the one before. What a tile needs for itself
# matters for bytes only where its derivative is written out; autograd keeps everything.
TILES, TILES_OF_AUTOGRAD, TILES_OF_SUMS = 12, 1, 1
# Of decompositions (QR, eigenvectors), for n^3: a few, which take the time of ten times as many in a product. Assumed.
LAPACK = 30.0
DENSE = 10.0  # operations per byte from which a matrix product waits for arithmetic and not for memory

_PHASES = ("forward", "backward")
_QUANTITIES = ("activations", "flops", "traffic", "kernels")


@dataclass(frozen=True)
class Size:
    """A batch on a rank."""

    tasks: float = 1.0  # that have structures in it
    atoms: float = 0.0
    labelled: float | None = None  # atoms x the tasks that they are labelled for; None: one task each
    edges: float = 0.0

    def vector(self) -> np.ndarray:
        labelled = self.atoms if self.labelled is None else self.labelled
        return np.array([1.0, self.tasks, self.atoms, labelled, self.edges])

    def times(self, factor: float) -> "Size":
        labelled = None if self.labelled is None else self.labelled * factor
        return Size(self.tasks, self.atoms * factor, labelled, self.edges * factor)


@dataclass(frozen=True)
class Work:
    """What one pass does."""

    flops: float  # floating-point operations of large matrix products
    traffic: float  # bytes that all other operations read and write
    kernels: float  # operations, each of which is launched


@dataclass(frozen=True)
class Footprint:
    """Coefficients of everything, in the order of `Size.vector`: constant, task, atom, labelled atom, edge."""

    coefficients: dict[str, np.ndarray]  # activations; forward.flops ... backward.kernels

    def activations(self, size: Size) -> float:
        """Bytes beside parameters and gradients at the fullest moment of the step, the batch included."""
        return float(self.coefficients["activations"] @ size.vector())

    def forward(self, size: Size) -> Work:
        return self._work("forward", size)

    def backward(self, size: Size) -> Work:
        return self._work("backward", size)

    def of_branches(self, size: Size) -> float:
        """The part of the backward pass that is over when the branches' gradients have arrived, by arithmetic."""
        row, at = self.coefficients["backward.flops"], size.vector()
        branches = float(row[1] * at[1] + row[3] * at[3])
        return branches / max(float(row @ at), 1.0)

    def _work(self, phase: str, size: Size) -> Work:
        at = size.vector()
        flops, traffic, kernels = (max(float(self.coefficients[f"{phase}.{q}"] @ at), 0.0) for q in _QUANTITIES[1:])
        return Work(flops, traffic, kernels)


def footprint(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    edges_per_atom: float = 12.0,
    atoms: int = 2048,
    processor: bool = False,
) -> Footprint:
    """The footprint of a model with weights of `dtype`, near batches of `atoms` with so many edges each.

    processor: of the code that runs on a CPU, where edges are taken in tiles; else of that for accelerators. Bytes at
    the fullest moment are the largest of several linear functions (the moment shifts with the edges per atom), so
    `edges_per_atom` should be that of the data. Everything else is linear everywhere. Of a large batch in tiles a
    smaller one is counted.
    """

    def atoms_with(edges: int) -> int:
        """As many as have so many edges, and no more than were asked for, however few edges there are."""
        return max(1, min(atoms, round(edges / max(edges_per_atom, 1 / atoms))))

    n, e = atoms, int(atoms * edges_per_atom)
    with torch.device("meta"):
        tile = edges_of_tile(build_encoder(config.encoder, config.cutoff).degrees[0])
    if processor:
        e = min(e, tile * (TILES_OF_AUTOGRAD if config.branch.forces == "conservative" else TILES))
        n = atoms_with(e)

    def solve(sizes: list[Size], rows: list[dict[str, float]], key: str) -> np.ndarray:
        return np.linalg.solve(np.stack([s.vector() for s in sizes]), np.array([row[key] for row in rows]))

    more = n + max(n // 16, 1)
    sizes = [
        Size(1, n, n, e),
        Size(2, n, n, e),
        Size(2, n, 2 * n, e),
        Size(1, more, more, e),
        Size(1, n, n, e + max(e // 16, 1)),
    ]
    rows = [count(config, s, dtype, processor) for s in sizes]
    activations = solve(sizes, rows, "activations")
    if processor:  # a few more edges may be no further operation: sums need whole tiles
        e = TILES_OF_SUMS * tile
        n = atoms_with(e)
        sizes = [
            Size(1, n, n, e),
            Size(2, n, n, e),
            Size(2, n, 2 * n, e),
            Size(1, 2 * n, 2 * n, e),
            Size(1, n, n, 2 * e),
        ]
        rows = [count(config, s, dtype, processor) for s in sizes]
    return Footprint({"activations": activations, **{key: solve(sizes, rows, key) for key in rows[0] if "." in key}})


def count(config: ModelConfig, size: Size, dtype: torch.dtype, processor: bool) -> dict[str, float]:
    """All quantities of one forward and one backward pass through a batch of this size."""
    tasks = [f"t{k}" for k in range(int(size.tasks))]
    shared = len(tasks) > 1 and size.labelled != size.atoms
    with torch.device("meta"), _default(dtype), in_tiles(processor):
        potential = Potential(config, tasks, {t: t for t in tasks}, seed=0).train()
        for p in potential.parameters():
            p.grad = torch.zeros_like(p)
        with _counting(potential) as counts:
            batch = blank_batch(tasks, int(size.atoms), int(size.edges), dtype, shared, potential.encoder.needs)
            predictions = potential(batch)
            loss = sum(p.energy.abs().sum() + p.forces.abs().sum() for p in predictions.values())
            counts.phase = "backward"
            assert isinstance(loss, Tensor)
            loss.backward()
    return {"activations": float(counts.most), **counts.sums}


def count_work(run: Callable[[], None]) -> Work:
    """What a function does to tensors, some of which have no memory."""
    counts = _Counts("run", sums=dict.fromkeys((f"run.{q}" for q in _QUANTITIES), 0.0))
    with _Watch(counts, []):
        run()
    return Work(*(counts.sums[f"run.{q}"] for q in _QUANTITIES[1:]))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Modules that are built inside have weights of `dtype`; those without memory cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def blank_batch(tasks: list[str], atoms: int, edges: int, dtype: torch.dtype, shared: bool, needs: GraphNeeds) -> Batch:
    """A batch of structures of equal size; `shared`: every task labels all of them, else each labels its part."""
    s = -(-atoms // PER_STRUCTURE)
    cuts = [0, s] if shared else [s * k // len(tasks) for k in range(len(tasks) + 1)]
    slices = {}
    for k, task in enumerate(tasks):
        first, last = (0, s) if shared else (cuts[k], cuts[k + 1])
        slices[task] = (slice(first, last), slice(first * PER_STRUCTURE, min(last * PER_STRUCTURE, atoms)))
    targets = {
        task: Targets(
            torch.zeros(where.stop - where.start, dtype=dtype), torch.zeros(at.stop - at.start, 3, dtype=dtype), None
        )
        for task, (where, at) in slices.items()
    }

    triplets = round(edges * max(edges / max(atoms, 1) - 1.0, 0.0))  # every edge meets all others of its sender but one

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    return Batch(
        numbers=integers(atoms),
        positions=torch.zeros(atoms, 3, dtype=dtype),
        cell=torch.zeros(s, 3, 3, dtype=dtype),
        charge=integers(s),
        spin=integers(s),
        natoms=integers(s),
        structure=integers(atoms),
        edges=integers(2, edges),
        shifts=torch.zeros(edges, 3, dtype=dtype),
        slices=slices,
        targets=targets,
        reverse=integers(edges) if needs.reverse else None,
        triplets=integers(2, triplets) if needs.triplets else None,
        edge_slices={
            t: slice(edges * a.start // max(atoms, 1), edges * a.stop // max(atoms, 1)) for t, (_, a) in slices.items()
        },
    )


@dataclass
class _Counts:
    """What has been seen so far."""

    phase: str = "forward"
    live: int = 0  # bytes of the storages that were made meanwhile and are still there
    most: int = 0
    sums: dict[str, float] = field(default_factory=lambda: {f"{p}.{q}": 0.0 for p in _PHASES for q in _QUANTITIES[1:]})


@contextmanager
def _counting(potential: nn.Module) -> Iterator[_Counts]:
    """Counts of every operation inside; what the module holds already is not counted as bytes."""
    counts = _Counts()
    held = [t for p in potential.parameters() for t in (p, p.grad) if t is not None] + list(potential.buffers())
    with _Watch(counts, held):
        yield counts


class _Watch(TorchDispatchMode):
    """Looks at every operation, below autograd, in the backward pass too."""

    def __init__(self, counts: _Counts, held: list[Tensor]) -> None:
        super().__init__()
        self.counts = counts
        self.known = weakref.WeakSet(t.untyped_storage() for t in held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        fresh = [t for t in made if self._is_new(t)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        mutates = func._schema.is_mutable
        if fresh or mutates:  # views launch nothing
            self._add(func, args, given, made)
        return out

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return False
        self.known.add(storage)
        counts, size = self.counts, storage.nbytes()
        counts.live += size
        counts.most = max(counts.most, counts.live)

        def gone() -> None:
            counts.live -= size

        weakref.finalize(storage, gone)
        return True

    def _add(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> None:
        counts, name = self.counts, func.overloadpacket.__name__
        moved = _moved(name, given, made) + (0 if made else _written(func, args))
        flops = _product(name, given, made)
        dense = flops >= DENSE * moved
        counts.sums[f"{counts.phase}.flops"] += flops if dense else 0.0
        counts.sums[f"{counts.phase}.traffic"] += 0.0 if dense else moved
        counts.sums[f"{counts.phase}.kernels"] += 1.0


def _moved(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes read and written. Of a table that is read or added to by an index, as many rows as the index has."""
    sizes = [t.numel() * t.element_size() for t in given]
    out = sum(t.numel() * t.element_size() for t in made)
    if "empty" in name:
        return 0
    if name.startswith("new_") or name.endswith("_like"):
        return out
    if name in ("index_select", "index", "gather", "embedding"):
        return sum(sizes[1:]) + 2 * out
    if name in ("index_add_", "index_add"):
        return sum(sizes[1:]) + 2 * sizes[-1]
    return sum(sizes) + out


def _written(func: Any, args: Any) -> int:
    """Bytes of the arguments that an operation writes."""
    own = [value for argument, value in zip(func._schema.arguments, args, strict=False) if argument.is_write]
    return sum(t.numel() * t.element_size() for t in tree_leaves(own) if isinstance(t, Tensor))


def _product(name: str, given: list[Tensor], made: list[Tensor]) -> float:
    """Operations of a matrix product, a multiplication and an addition each; 0 for what moves more than it computes."""
    if "linalg" in name:
        *batch, rows, columns = given[0].shape
        return LAPACK * math.prod(batch) * rows * columns * min(rows, columns)
    if name not in ("mm", "addmm", "bmm", "baddbmm"):
        return 0.0
    inner = given[-2].shape[-1]
    return 2.0 * made[0].numel() * inner
