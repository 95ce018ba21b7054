"""The graph of a batch as an encoder sees it: atoms, and edges with their vectors. No positions.

    edge e     j_e -> i_e : the receiver i sees its neighbour j along r_e, from i to j, periodic shift included
    reverse    i_e -> j_e : the number of the edge that runs the other way, -r_e
    triplet    k -> j -> i : a pair of edges (f, e) with receiver(f) = sender(e), f not the reverse of e

An encoder that never sees positions cannot depend on where a structure lies, and one that reads `vectors` has every
periodic image right. Reverse edges and triplets are made where an encoder says that it needs them.

A graph may be one domain of a larger system that lies on many ranks: its own atoms, and ghosts, which are copies of
other domains' atoms (or of images of its own) that send and never receive. What a ghost has seen, its owner knows:
`exchanged` fetches it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.batch import Batch, edge_vectors


@dataclass(frozen=True)
class GraphNeeds:
    """What an encoder reads besides edges."""

    reverse: bool = False
    triplets: bool = False


EDGES_ONLY = GraphNeeds()


@dataclass(slots=True)
class Graph:
    """All tensors of one pass; N atoms, S structures, E edges, T triplets."""

    numbers: Tensor  # (N,) int64 atomic numbers
    structure: Tensor  # (N,) int64: the structure of each atom, ascending
    charge: Tensor  # (S,) int64 e
    spin: Tensor  # (S,) int64 multiplicity
    receivers: Tensor  # (E,) int64, ascending
    senders: Tensor  # (E,) int64
    vectors: Tensor  # (E, 3) angstrom, from receiver to sender
    distances: Tensor  # (E,) angstrom
    reverse: Tensor | None = None  # (E,) int64
    triplets: Tensor | None = None  # (2, T) int64: edges (f, e)
    # Between layers: tensors of atoms -> the same ones. Of a domain (`own`): N and tensors of own or all atoms ->
    # tensors (N, ...) with the rows of ghosts as their owners have them.
    exchange: Callable[..., tuple[Tensor, ...]] | None = field(default=None, kw_only=True)
    own: int | None = field(default=None, kw_only=True)  # of a domain: so many atoms, the first ones, are no ghosts

    @property
    def atoms(self) -> int:
        return self.numbers.shape[0]

    def exchanged(self, *of_atoms: Tensor) -> tuple[Tensor, ...]:
        """Tensors (N, ...) of atoms as they are where a system is whole; in a domain, ghosts' rows are their owners'.

        Tensors of own atoms alone, `of_own`, come back with rows of ghosts behind theirs. The gradients of ghosts' rows
        go to their owners. All ranks must come here equally often, in one order.
        """
        if self.exchange is None:
            return of_atoms
        return self.exchange(*of_atoms) if self.own is None else self.exchange(self.atoms, *of_atoms)

    def of_own(self, of_atoms: Tensor) -> Tensor:
        """The rows that this domain computes; all of them where a system is whole."""
        return of_atoms if self.own is None else of_atoms[: self.own]

    def tensors(self) -> tuple[Tensor, ...]:
        """Without reverse edges and triplets, in the order of the fields."""
        edges = (self.receivers, self.senders, self.vectors, self.distances)
        return self.numbers, self.structure, self.charge, self.spin, *edges

    def part(self, structures: slice, atoms: slice, edges: slice) -> "Graph":
        """The graph of consecutive structures, counted from their own first one, without reverse edges and triplets."""
        return Graph(
            self.numbers[atoms],
            self.structure[atoms] - structures.start,
            self.charge[structures],
            self.spin[structures],
            self.receivers[edges] - atoms.start,
            self.senders[edges] - atoms.start,
            self.vectors[edges],
            self.distances[edges],
        )


def completed(batch: Batch, needs: GraphNeeds) -> Batch:
    """The batch with the reverse edges and triplets that an encoder needs, and the place of each task's edges.

    Where it has them already they stay. Reads numbers from the device of the edges, so it is best done ahead of a step.
    """
    reverse, triplets = batch.reverse, batch.triplets
    if reverse is None and (needs.reverse or (needs.triplets and triplets is None)):
        reverse = reverse_edges(batch.edges, batch.shifts)
    if triplets is None and needs.triplets:
        triplets = find_triplets(batch.edges, reverse, len(batch.numbers))
    slices = batch.edge_slices
    if slices is None:
        bounds = batch.edges.new_tensor([(atoms.start, atoms.stop) for _, atoms in batch.slices.values()]).view(-1, 2)
        places = torch.searchsorted(batch.edges[0].contiguous(), bounds).tolist()  # edges are sorted by receiver
        slices = {task: slice(*place) for task, place in zip(batch.slices, places, strict=True)}
    return replace(batch, reverse=reverse, triplets=triplets, edge_slices=slices)


def only(batch: Batch, tasks: Collection[str]) -> Batch:
    """The structures of some tasks of a batch that is `completed`, in their order; without targets and labels."""
    assert batch.edge_slices is not None
    places = {task: (*batch.slices[task], batch.edge_slices[task]) for task in tasks}
    blocks: list[list[slice]] = []  # structures, atoms, edges; tasks of one store share theirs
    for place in sorted(places.values(), key=lambda p: (p[0].start, p[0].stop)):
        if blocks and place[0].start < blocks[-1][0].stop:
            blocks[-1] = [slice(a.start, max(a.stop, b.stop)) for a, b in zip(blocks[-1], place, strict=True)]
        else:
            blocks.append(list(place))
    sizes = np.array([[part.stop - part.start for part in block] for block in blocks]).reshape(-1, 3)
    begins = np.cumsum(sizes, axis=0) - sizes
    moved = begins - np.array([[part.start for part in block] for block in blocks]).reshape(-1, 3)

    def joined(x: Tensor, kind: int, shift: int | None = None, dim: int = 0) -> Tensor:
        """The blocks' parts of a tensor; numbers of structures (0), atoms (1) or edges (2) in it counted anew."""
        parts = [x.narrow(dim, b[kind].start, b[kind].stop - b[kind].start) for b in blocks]
        if shift is not None:
            parts = [part + int(m[shift]) for part, m in zip(parts, moved, strict=True)]
        return torch.cat([x.narrow(dim, 0, 0), *parts], dim=dim)

    triplets = batch.triplets
    if triplets is not None:
        ends = [
            torch.searchsorted(triplets[1].contiguous(), triplets.new_tensor([b[2].start, b[2].stop])) for b in blocks
        ]
        parts = [triplets[:, first:last] + int(m[2]) for (first, last), m in zip(ends, moved, strict=True)]
        triplets = torch.cat([triplets[:, :0], *parts], dim=1)
    which = {
        task: next(k for k, b in enumerate(blocks) if p[0].start >= b[0].start and p[0].stop <= b[0].stop)
        for task, p in places.items()
    }
    slices = {
        task: [
            slice(part.start + int(m), part.stop + int(m)) for part, m in zip(place, moved[which[task]], strict=True)
        ]
        for task, place in places.items()
    }
    return Batch(
        numbers=joined(batch.numbers, 1),
        positions=joined(batch.positions, 1),
        cell=joined(batch.cell, 0),
        charge=joined(batch.charge, 0),
        spin=joined(batch.spin, 0),
        natoms=joined(batch.natoms, 0),
        structure=joined(batch.structure, 1, shift=0),
        edges=joined(batch.edges, 2, shift=1, dim=1),
        shifts=joined(batch.shifts, 2),
        slices={task: (place[0], place[1]) for task, place in slices.items()},
        reverse=None if batch.reverse is None else joined(batch.reverse, 2, shift=2),
        triplets=triplets,
        edge_slices={task: place[2] for task, place in slices.items()},
    )


def graph_of(batch: Batch) -> Graph:
    """The graph of a batch; vectors and distances are differentiable with respect to positions and cell."""
    vectors = edge_vectors(batch)
    return Graph(
        batch.numbers,
        batch.structure,
        batch.charge,
        batch.spin,
        batch.edges[0],
        batch.edges[1],
        vectors,
        torch.linalg.vector_norm(vectors, dim=1),
        batch.reverse,
        batch.triplets,
    )


def reverse_edges(edges: Tensor, shifts: Tensor) -> Tensor:
    """The number of the edge j, i, -s for every edge i, j, s: edges (2, E), shifts (E, 3) -> (E,)."""
    steps = shifts.round().to(torch.int64)
    there = _sorted_by(edges[0], edges[1], *steps.unbind(1))
    back = _sorted_by(edges[1], edges[0], *(-steps).unbind(1))
    return torch.empty_like(there).index_copy_(0, back, there)


def _sorted_by(*keys: Tensor) -> Tensor:
    """The order that sorts rows by the first key, then the second, ..."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def find_triplets(edges: Tensor, reverse: Tensor | None, atoms: int) -> Tensor:
    """All pairs of edges (f, e) with receiver(f) = sender(e), f not the reverse of e: (2, T), sorted by e.

    edges (2, E), sorted by receiver.
    """
    assert reverse is not None
    receivers, senders = edges
    ends = torch.searchsorted(receivers, torch.arange(atoms, device=edges.device), right=True)
    counts = torch.bincount(receivers, minlength=atoms)
    of_edge = counts[senders]  # edges that end where the edge begins
    e = torch.repeat_interleave(torch.arange(len(receivers), device=edges.device), of_edge)
    first = ends[senders] - of_edge
    within = torch.arange(len(e), device=edges.device) - torch.repeat_interleave(of_edge.cumsum(0) - of_edge, of_edge)
    f = first[e] + within
    keep = f != reverse[e]
    return torch.stack([f[keep], e[keep]])
