"""What a training step of a model asks of a device: bytes, arithmetic, memory traffic, kernels. Counted, not run.

The real modules make trial passes, forward and backward, on tensors without memory, and `counting.py` looks at every
operation. Nothing here knows what an encoder is made of; one whose operations need values (numbers that are read from
tensors) makes its passes over a small batch that has some.

All of it is linear in the size of a batch: so much for the step, for every branch, every atom, every atom that a branch
sees, every edge and every triplet. A batch for each gives the coefficients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.batch import Batch, Targets
from multifid.graphs.edges import edges_of_tile, in_tiles
from multifid.graphs.graph import GraphNeeds
from multifid.model.counting import Count, Work
from multifid.model.encoders import build_encoder
from multifid.model.potential import ModelConfig, Potential

PER_STRUCTURE = 16  # atoms of a structure while counting: what structures cost by themselves is next to nothing
# Tiles of edges in a batch that is counted: from some on, one more is like the one before. What a tile needs for itself
# matters for bytes only where its derivative is not autograd's, which keeps everything.
TILES, TILES_OF_AUTOGRAD = 12, 1
REAL_ATOMS = 256  # in a trial pass over tensors with memory
MOST_TASKS = 4  # in a batch that is counted

QUANTITIES = ("activations", *(f"{p}.{q}" for p in ("forward", "backward") for q in ("flops", "traffic", "kernels")))


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
    """Coefficients of everything, in the order of `BatchSize.vector`."""

    coefficients: dict[str, np.ndarray]  # of `QUANTITIES`

    def activations(self, size: BatchSize) -> float:
        """Bytes beside parameters and gradients at the fullest moment of the step, the batch included."""
        return float(self.coefficients["activations"] @ size.vector())

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
    """The footprint of a model with weights of `dtype`, near batches of `atoms` with so many edges each.

    triplets_per_edge: None as of atoms that all have as many edges.  processor: of the code that runs on a CPU, where
    edges are taken in tiles; else of that for accelerators.  tasks: in a batch with all of them.

    Bytes at the fullest moment are the largest of several linear functions (the moment shifts with the edges per atom),
    so edges and triplets should be those of the data. Everything else is linear everywhere. Of a large batch in tiles a
    smaller one is counted, which says too little for some encoders whose derivatives are autograd's: of 80 tiles 64 to
    99 % of the bytes were told (`pna` least, `schnet` 70 %), of a dozen all.
    """
    with torch.device("meta"):
        encoder = build_encoder(config.encoder, config.cutoff)
    device = "meta" if _needs_no_values(config, dtype) else "cpu"
    atoms = atoms if device == "meta" else min(atoms, REAL_ATOMS)
    tile, several = edges_of_tile(encoder.degrees[0]), min(max(tasks, 2), MOST_TASKS)

    def coefficients(e: int, more: int) -> np.ndarray:
        """Of all quantities, (6, 7), from batches near one of so many edges, and of some more."""
        # As many atoms as have so many edges, and no more than were asked for, however few edges there are.
        n = max(1, min(atoms, round(e / max(edges_per_atom, 1 / atoms))))
        each = max(e / n - 1.0, 0.0) if triplets_per_edge is None else triplets_per_edge
        base = BatchSize(1, n, n, e, round(e * each) if encoder.needs.triplets else 0)
        larger = n + max(n // 16, 1)
        sizes = [
            base,
            replace(base, tasks=several),
            replace(base, tasks=several, labelled=several * n),
            replace(base, atoms=larger, labelled=larger),
            replace(base, edges=e + more),
        ]
        if encoder.needs.triplets:
            sizes.append(replace(base, triplets=base.triplets + max(base.triplets // 16, 1)))
        rows = [count(config, size, dtype, processor, device) for size in sizes]
        solved = np.linalg.solve(
            np.stack([size.vector()[: len(sizes)] for size in sizes]), [[row[q] for q in QUANTITIES] for row in rows]
        )
        return np.vstack([solved, np.zeros((6 - len(sizes), len(QUANTITIES)))])

    edges = int(atoms * edges_per_atom)
    if processor:
        edges = min(edges, tile * (TILES_OF_AUTOGRAD if config.branch.forces == "conservative" else TILES))
    near = coefficients(edges, max(edges // 16, 1))
    if processor:  # a few more edges may be no further operation: sums need whole tiles
        near[:, 1:] = coefficients(tile, tile)[:, 1:]
    return Footprint(dict(zip(QUANTITIES, near.T, strict=True)))


def count(
    config: ModelConfig, size: BatchSize, dtype: torch.dtype, processor: bool, device: str = "meta"
) -> dict[str, float]:
    """All quantities of one forward and one backward pass through a batch of this size."""
    tasks = [f"t{k}" for k in range(int(size.tasks))]
    shared = len(tasks) > 1 and size.labelled != size.atoms
    with torch.device(device), _default(dtype), in_tiles(processor):
        potential = Potential(config, tasks, {t: t for t in tasks}, seed=0).train()
        for p in potential.parameters():
            p.grad = torch.zeros_like(p)
        held = [t for p in potential.parameters() for t in (p, p.grad) if t is not None] + list(potential.buffers())
        batch = blank_batch(tasks, size, dtype, shared, potential.encoder.needs)
        with Count(held) as counted:
            batch = batch.moved(torch.clone)  # counted as bytes, and not as work
            with counted.apart() as forward:
                predictions = potential(batch)
                loss = sum(p.energy.abs().sum() + p.forces.abs().sum() for p in predictions.values())
            assert isinstance(loss, Tensor)
            with counted.apart() as backward:
                loss.backward()
    works = (forward.flops, forward.traffic, forward.kernels, backward.flops, backward.traffic, backward.kernels)
    return dict(zip(QUANTITIES, (float(counted.most), *works), strict=True))


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
