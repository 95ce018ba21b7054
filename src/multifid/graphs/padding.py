"""Batches of few sizes: padded so that compiled code, and graphs of kernels, meet the same shapes again and again.

    structures   | s0 s1 s2 . . | s3 s4 . . . | . . . |        . is padding: a structure without labels
    tasks        |    ani1x     |    mptrj    |                branches and encoder see few sizes

Padding atoms belong to padding structures, are of no element (atomic number 0) and have no labels; `natoms` of their
structures is 0. Padding edges join a padding atom to its own image, at twice the cutoff, where every envelope is
exactly zero. So nothing that is summed, counted or trained depends on how much padding there is.
"""

from dataclasses import replace

import torch
from torch import Tensor

from multifid.graphs.batch import Batch, Targets
from multifid.structures.properties import OF_ATOMS

SMALLEST = 8
PER_DOUBLING = 4  # sizes between n and 2 n: padding is a tenth on average, a quarter at most


def size_for(n: int) -> int:
    """The smallest of the sizes 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ... that is at least n."""
    if n <= SMALLEST:
        return SMALLEST
    step = (1 << (n - 1).bit_length()) // (2 * PER_DOUBLING)
    return -(-n // step) * step


def pad(batch: Batch, cutoff: float) -> Batch:
    """The batch with the structures and atoms of every task, and then of all, and the edges filled up to `size_for`.

    Every task has at least one padding atom, in its last padding structure. An empty batch stays empty.
    """
    if not batch.structures:
        return batch
    structures, atoms = torch.arange(batch.structures), torch.arange(len(batch.numbers))  # where each one goes
    owner = batch.structure.new_zeros(0)  # the structure of each atom, padding included
    more_structures = more_atoms = 0
    slices: dict[Place, tuple[slice, slice]] = {}
    for s0, s1, a0, a1 in sorted({_place(x) for x in batch.slices.values()}):
        structures[s0:s1] += more_structures
        atoms[a0:a1] += more_atoms
        s2, a2 = (first + size_for(last - first + 1) for first, last in ((s0, s1), (a0, a1)))
        slices[s0, s1, a0, a1] = (
            slice(s0 + more_structures, s2 + more_structures),
            slice(a0 + more_atoms, a2 + more_atoms),
        )
        fill = owner.new_full((a2 - a1,), s2 + more_structures - 1)
        owner = torch.cat([owner, batch.structure[a0:a1] + more_structures, fill])
        more_structures, more_atoms = more_structures + s2 - s1, more_atoms + a2 - a1
    size, size_of_atoms = size_for(len(structures) + more_structures), size_for(len(owner))
    owner = torch.cat([owner, owner.new_full((size_of_atoms - len(owner),), size - 1)])
    edges, shifts = _edges(batch, atoms, size_of_atoms)
    reverse, triplets = _reverse_and_triplets(batch, edges.shape[1])
    return replace(
        batch,
        numbers=_filled(batch.numbers, atoms, size_of_atoms, 0),
        positions=_filled(batch.positions, atoms, size_of_atoms, 0.0),
        cell=_filled(batch.cell, structures, size, 2.0 * cutoff * torch.eye(3, dtype=batch.cell.dtype)),
        charge=_filled(batch.charge, structures, size, 0),
        spin=_filled(batch.spin, structures, size, 1),
        natoms=_filled(batch.natoms, structures, size, 0),
        structure=owner,
        edges=edges,
        shifts=shifts,
        reverse=reverse,
        triplets=triplets,
        slices={task: slices[_place(x)] for task, x in batch.slices.items()},
        targets={task: _without_labels(y, slices[_place(batch.slices[task])]) for task, y in batch.targets.items()},
    )


Place = tuple[int, int, int, int]  # first and last structure, first and last atom of a slice


def _place(x: tuple[slice, slice]) -> Place:
    return x[0].start, x[0].stop, x[1].start, x[1].stop


def _filled(x: Tensor, kept: Tensor, size: int, value: Tensor | float) -> Tensor:
    """(size, ...) with the rows of x at the places `kept` and the value in all others."""
    out = x.new_empty((size, *x.shape[1:]))
    out[:] = value
    out[kept] = x
    return out


def _edges(batch: Batch, atoms: Tensor, size_of_atoms: int) -> tuple[Tensor, Tensor]:
    """Edges and shifts; those that are filled in are spread over the padding atoms at the end."""
    missing = size_for(batch.edges.shape[1] + (batch.triplets is not None)) - batch.edges.shape[1]
    last = int(atoms[-1]) + 1
    device = batch.edges.device  # they may have been made where the batch will be processed
    own = last + torch.arange(missing, device=device) * (size_of_atoms - last) // max(missing, 1)
    image = batch.shifts.new_tensor([1.0, 0.0, 0.0]).expand(missing, 3)
    edges = torch.cat([atoms.to(device)[batch.edges], torch.stack([own, own])], dim=1)
    return edges, torch.cat([batch.shifts, image])


def _reverse_and_triplets(batch: Batch, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Those of a batch, where it has them, for so many edges: a padding edge is its own reverse, and joins itself."""
    reverse, triplets = batch.reverse, batch.triplets
    if reverse is not None:
        reverse = torch.cat([reverse, torch.arange(len(reverse), size, device=reverse.device)])
    if triplets is not None:
        missing = size_for(triplets.shape[1]) - triplets.shape[1]
        triplets = torch.cat([triplets, triplets.new_full((2, missing), size - 1)], dim=1)
    return reverse, triplets


def _without_labels(targets: Targets, place: tuple[slice, slice]) -> Targets:
    """The targets of a task that fills its slice only in part: padding has none."""

    def filled(x: Tensor, where: slice) -> Tensor:
        return torch.cat([x, x.new_full((where.stop - where.start - len(x), *x.shape[1:]), torch.nan)])

    def maybe(x: Tensor | None, where: slice) -> Tensor | None:
        return None if x is None else filled(x, where)

    structures, atoms = place
    return Targets(
        filled(targets.energy, structures),
        maybe(targets.forces, atoms),
        maybe(targets.stress, structures),
        targets.kind,
        maybe(targets.value, atoms if targets.kind in OF_ATOMS else structures),
    )
