"""What a training step of a model asks of a device: bytes, arithmetic, memory traffic, kernels. Counted, not run.

The real modules make trial passes, forward and backward, on tensors without memory, and `counting.py` looks at every
operation. Nothing here knows what an encoder is made of; one whose operations need values (numbers that are read from
tensors) makes its passes over a small batch that has some.

Work is linear in the size of a batch: so much for the step, for every branch, every atom, every atom that a branch
sees, every edge and every triplet. A batch for each gives the coefficients. Bytes are linear moment by moment
(`moments.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.batch import Batch, Targets
from multifid.graphs.edges import CUT, edges_of_tile, in_pieces, in_tiles
from multifid.graphs.graph import GraphNeeds
from multifid.model.counting import Count, Moment, Tiles, Work
from multifid.model.encoders import build_encoder
from multifid.model.kernels.native.build import counted as counting_library
from multifid.model.kernels.native.build import library
from multifid.model.moments import Moments, Trial, solved
from multifid.model.potential import ModelConfig, Potential

PER_STRUCTURE = 16  # atoms of a structure while counting: what structures cost by themselves is next to nothing
COUNTED_ATOMS = 16 * PER_STRUCTURE  # where edges are taken in tiles; else as many as a batch has
REAL_ATOMS = 256  # in a trial pass over tensors with memory
MOST_TASKS = 4  # in a batch that is counted
MORE_EDGES = 4  # the place of the trial batch with more edges

QUANTITIES = tuple(f"{p}.{q}" for p in ("forward", "backward") for q in ("flops", "traffic", "kernels"))


@dataclass(frozen=True)
class BatchSize:
    """A batch on a rank."""

    tasks: float = 1.0  # that have structures in it
    atoms: float = 0.0
    labelled: float | None = None  # atoms x the tasks that they are labelled for; None: one task each
    edges: float = 0.0
    triplets: float = 0.0  # pairs of edges that meet; of no matter to encoders that do not read them

    def vector(self) -> np.ndarray:
        labelled = self.atoms if self.labelled is None else self.labelled
        return np.array([1.0, self.tasks, self.atoms, labelled, self.edges, self.triplets])

    def times(self, factor: float) -> "BatchSize":
        labelled = None if self.labelled is None else self.labelled * factor
        return BatchSize(self.tasks, self.atoms * factor, labelled, self.edges * factor, self.triplets * factor)


@dataclass(frozen=True)
class Footprint:
    """What a step asks of a device, of batches of every size."""

    moments: Moments
    coefficients: dict[str, np.ndarray]  # of `QUANTITIES`, in the order of `BatchSize.vector`

    def activations(self, size: BatchSize) -> float:
        """Bytes beside parameters and gradients at the fullest moment of the step, the batch included."""
        return self.moments.fullest(size.vector())

    def forward(self, size: BatchSize) -> Work:
        return self._work("forward", size)

    def backward(self, size: BatchSize) -> Work:
        return self._work("backward", size)

    def of_branches(self, size: BatchSize) -> float:
        """The part of the backward pass that is over when the branches' gradients have arrived, by arithmetic."""
        row, at = self.coefficients["backward.flops"], size.vector()
        branches = float(row[1] * at[1] + row[3] * at[3])
        return branches / max(float(row @ at), 1.0)

    def _work(self, phase: str, size: BatchSize) -> Work:
        at = size.vector()
        return Work(*(max(float(self.coefficients[f"{phase}.{q}"] @ at), 0.0) for q in ("flops", "traffic", "kernels")))


def footprint(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    edges_per_atom: float = 12.0,
    triplets_per_edge: float | None = None,
    atoms: int = 2048,
    processor: bool = False,
    tasks: int = 2,
) -> Footprint:
    """The footprint of a model with weights of `dtype`, from trial batches of `atoms` with so many edges each.

    triplets_per_edge: None as of atoms that all have as many edges.  processor: of the code that runs on a CPU, where
    edges are taken in tiles; else of that for accelerators.  tasks: in a batch with all of them.
    """
    with torch.device("meta"):
        encoder = build_encoder(config.encoder, config.cutoff)
    device = "meta" if _needs_no_values(config, dtype) else "cpu"
    atoms = atoms if device == "meta" else min(atoms, REAL_ATOMS)
    edges = int(atoms * edges_per_atom)
    if processor:  # one tile; the operations of a batch are those of its tiles
        atoms, edges = COUNTED_ATOMS, edges_of_tile(encoder.degrees[0])
    each = max(edges_per_atom - 1.0, 0.0) if triplets_per_edge is None else triplets_per_edge
    triplets = round(edges * each) + 1 if encoder.needs.triplets else None  # one, so that there are some
    sizes = _sizes(atoms, edges, triplets, min(max(tasks, 2), MOST_TASKS))
    base = sizes[0]

    def counted(size: BatchSize, pieces: int | None, of_library: bool = False) -> Counted:
        return passes(config, size, dtype, processor, device, pieces, of_library)

    compiled = compiled_for(processor)
    trials = [counted(size, 1) for size in sizes]
    live = [counted(size, 1, True) for size in sizes] if compiled else trials
    seen = [Trial(size.vector(), 1, trial.moments) for size, trial in zip(sizes, live, strict=True)]
    # Where a derivative is autograd's, it keeps the values of all tiles: what one needs for itself is of no matter.
    if processor and not config.conservative:
        more = replace(base, edges=2 * base.edges, triplets=2 * base.triplets)
        several = ((base, 2), (base, 3), (more, 2))
        seen += [Trial(size.vector(), pieces, counted(size, pieces, compiled).moments) for size, pieces in several]
    moments = solved(seen)
    if processor:  # a few more edges may be no further operation: sums need whole tiles
        trials[MORE_EDGES] = counted(sizes[MORE_EDGES], None)
    vectors = np.stack([size.vector()[: len(sizes)] for size in sizes])
    rows = np.linalg.solve(vectors, [[trial.work[q] for q in QUANTITIES] for trial in trials])
    rows = np.vstack([rows, np.zeros((6 - len(sizes), len(QUANTITIES)))])
    return Footprint(moments, dict(zip(QUANTITIES, rows.T, strict=True)))


def _sizes(atoms: int, edges: int, triplets: int | None, several: int) -> list[BatchSize]:
    """One, and others with more of one thing each; as many as there are things."""
    base = BatchSize(1, atoms, atoms, edges, triplets or 0)
    more = atoms + max(atoms // 16, 1)
    sizes = [
        base,
        replace(base, tasks=several),
        replace(base, tasks=several, labelled=several * atoms),
        replace(base, atoms=more, labelled=more),
        replace(base, edges=max(2 * edges, 1)),
    ]
    if triplets is not None:
        sizes.append(replace(base, triplets=2 * triplets))
    return sizes


@dataclass(frozen=True)
class Counted:
    """Of one forward and one backward pass."""

    moments: list[Moment]  # bytes beside parameters and gradients
    work: dict[str, float]  # of `QUANTITIES`

    @property
    def bytes(self) -> int:
        """At the fullest moment, the batch included."""
        return max(m.live for m in self.moments)


def count(
    config: ModelConfig,
    size: BatchSize,
    dtype: torch.dtype,
    processor: bool,
    device: str = "meta",
    pieces: int | None = None,
) -> Counted:
    """One forward and one backward pass through a batch of this size. pieces: tiles of all loops; None: as they run.

    Bytes are those of the functions in C++ where a run would take them; work is counted of the operations of torch.
    """
    counted = passes(config, size, dtype, processor, device, pieces, False)
    if not compiled_for(processor):
        return counted
    return replace(counted, moments=passes(config, size, dtype, processor, device, pieces, True).moments)


def compiled_for(processor: bool) -> bool:
    """Whether a run on this machine would take functions in C++ (`kernels/native/`)."""
    return processor and library() is not None


def passes(
    config: ModelConfig,
    size: BatchSize,
    dtype: torch.dtype,
    processor: bool,
    device: str,
    pieces: int | None,
    compiled: bool,
) -> Counted:
    """As `count`, with functions in C++ or without."""
    tasks = [f"t{k}" for k in range(int(size.tasks))]
    shared = len(tasks) > 1 and size.labelled != size.atoms
    with torch.device(device), _default(dtype), in_tiles(processor), counting_library(compiled):
        potential = Potential(config, tasks, {t: t for t in tasks}, seed=0).train()
        for p in potential.parameters():
            p.grad = torch.zeros_like(p)
        held = [t for p in potential.parameters() for t in (p, p.grad) if t is not None] + list(potential.buffers())
        batch = blank_batch(tasks, size, dtype, shared, potential.encoder.needs)
        with Count(held) as counted, _tiles_of(counted, pieces, processor):
            batch = batch.moved(torch.clone)  # counted as bytes, and not as work
            counted.moments.clear()  # which are of the passes alone; a batch of more tasks has more tensors
            with counted.apart() as forward:
                predictions = potential(batch)
                loss = sum(p.energy.abs().sum() + p.forces.abs().sum() for p in predictions.values())
            assert isinstance(loss, Tensor)
            with counted.apart() as backward:
                loss.backward()
    works = (forward.flops, forward.traffic, forward.kernels, backward.flops, backward.traffic, backward.kernels)
    return Counted(counted.moments, dict(zip(QUANTITIES, works, strict=True)))


@contextmanager
def _tiles_of(counted: Count, pieces: int | None, processor: bool) -> Iterator[None]:
    """Inside, loops over tiles are seen by who counts, and run over so many."""

    def cut(edges: int, width: int) -> list[slice]:
        most = edges_of_tile(width) if processor else max(edges, 1)
        return Tiles(in_pieces(edges, pieces or max(1, -(-edges // most))), most, counted)

    token = CUT.set(cut if processor else None)
    try:
        yield
    finally:
        CUT.reset(token)


def _needs_no_values(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether a model makes its passes on tensors without memory."""
    try:
        count(config, BatchSize(1, 4, 4, 8, 8), dtype, processor=False)
    except (NotImplementedError, RuntimeError):
        return False
    return True


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Modules that are built inside have weights of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def blank_batch(tasks: list[str], size: BatchSize, dtype: torch.dtype, shared: bool, needs: GraphNeeds) -> Batch:
    """A batch of structures of equal size on the default device; atoms and edges are somewhere, none twice.

    shared: every task labels all of them, else each labels its part.
    """
    atoms, edges, triplets = int(size.atoms), int(size.edges), int(size.triplets)
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
    number, edge, triplet = torch.arange(atoms), torch.arange(edges), torch.arange(triplets)
    receivers = edge * atoms // max(edges, 1)
    first_atom = receivers // PER_STRUCTURE * PER_STRUCTURE
    senders = first_atom + (receivers - first_atom + 1 + edge % PER_STRUCTURE) % (atoms - first_atom).clamp(
        max=PER_STRUCTURE
    )
    met = torch.stack([triplet % max(edges, 1), triplet * edges // max(triplets, 1)])
    return Batch(
        numbers=1 + number % 8,
        positions=torch.sin(number[:, None] * torch.tensor([1.0, 1.7, 2.9])).to(dtype),
        cell=torch.zeros(s, 3, 3, dtype=dtype),
        charge=torch.zeros(s, dtype=torch.int64),
        spin=torch.ones(s, dtype=torch.int64),
        natoms=torch.full((s,), PER_STRUCTURE),
        structure=number // PER_STRUCTURE,
        edges=torch.stack([receivers, senders]),
        shifts=torch.zeros(edges, 3, dtype=dtype),
        slices=slices,
        targets=targets,
        reverse=edge if needs.reverse else None,
        triplets=met if needs.triplets else None,
        edge_slices={
            t: slice(*(-(-edges * atom // max(atoms, 1)) for atom in (a.start, a.stop))) for t, (_, a) in slices.items()
        },
    )
