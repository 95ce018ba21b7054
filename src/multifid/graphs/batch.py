"""A batch: a few tasks' structures laid end to end, with their edges, as tensors.

    structures   | s0 s1 s2 | s3 s4 | s5 s6 s7 |        one encoder pass over all of them
    tasks        |  ani1x   | mptrj |  omol25  |        each branch sees a contiguous slice

Tasks that live in one store share a slice.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from multifid.structures.properties import KINDS, shape_of
from multifid.structures.structure import Packed


@dataclass(slots=True)
class Targets:
    """The labels of one task in a batch, reference energies subtracted. NaN = no label, None = none at all."""

    energy: Tensor  # (S_t,) eV
    forces: Tensor | None  # (N_t, 3) eV/angstrom
    stress: Tensor | None  # (S_t, 3, 3) eV/angstrom^3
    kind: str | None = None  # of a property in place of them (`structures.properties`)
    value: Tensor | None = None  # of the property, without what is subtracted: (S_t, ...) or (N_t, ...)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Targets":
        forces, stress, value = (None if x is None else move(x) for x in (self.forces, self.stress, self.value))
        return Targets(move(self.energy), forces, stress, self.kind, value)


@dataclass(slots=True)
class LabelRows:
    """One kind of label of those tasks of a batch that have it, task after task: what sums over labels run over."""

    tasks: list[str]
    owner: Tensor  # (n,) int64: the number of each row's task
    label: Tensor  # (n, ...) as in `Targets`

    def moved(self, move: Callable[[Tensor], Tensor]) -> "LabelRows":
        return LabelRows(self.tasks, move(self.owner), move(self.label))


@dataclass(slots=True)
class BatchLabels:
    """The labels of all tasks of a batch, one kind after the other: a sum for each task is one operation for all."""

    energy: LabelRows  # of every task; a row for each structure
    forces: LabelRows  # a row for each atom
    stress: LabelRows
    natoms: Tensor  # (n,) int64, of the structures of `energy`
    properties: dict[str, LabelRows] = field(default_factory=dict)  # by their kind, those that there are
    natoms_extensive: Tensor | None = None  # of the structures of extensive properties
    counts: Tensor | None = None  # (tasks, 4) int64: labels of each task, by `training.loss.label_counts`

    def rows(self, kind: str) -> LabelRows | None:
        """Those of energy, forces, stress or a kind of property; None where there are none of a property."""
        return self.properties.get(kind) if kind in KINDS else getattr(self, kind)

    def natoms_of(self, kind: str) -> Tensor | None:
        """(n,) for labels whose residuals count per atom."""
        return self.natoms if kind == "energy" else self.natoms_extensive if kind == "extensive" else None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "BatchLabels":
        return BatchLabels(
            self.energy.moved(move),
            self.forces.moved(move),
            self.stress.moved(move),
            move(self.natoms),
            {kind: rows.moved(move) for kind, rows in self.properties.items()},
            None if self.natoms_extensive is None else move(self.natoms_extensive),
            None if self.counts is None else move(self.counts),
        )


@dataclass(slots=True)
class Batch:
    numbers: Tensor  # (N,) int64 atomic numbers
    positions: Tensor  # (N, 3) angstrom
    cell: Tensor  # (S, 3, 3) angstrom, rows = vectors, periodic or not; zero where there is none
    charge: Tensor  # (S,) int64 e
    spin: Tensor  # (S,) int64 multiplicity
    natoms: Tensor  # (S,) int64
    structure: Tensor  # (N,) int64: the structure of each atom, ascending
    edges: Tensor  # (2, E) int64: row 0 the receiver i, row 1 the sender j; sorted by receiver
    shifts: Tensor  # (E, 3) float: r_ij = positions[j] - positions[i] + shifts @ cell[structure[i]]
    slices: dict[str, tuple[slice, slice]] = field(default_factory=dict)  # task -> (structures, atoms)
    targets: dict[str, Targets] = field(default_factory=dict)
    labels: BatchLabels | None = None  # the targets once more, as sums over them want them: see `laid_out`
    reverse: Tensor | None = None  # (E,) int64, where an encoder needs it: see `graphs/graph.py`
    triplets: Tensor | None = None  # (2, T) int64, likewise
    edge_slices: dict[str, slice] | None = None  # of each task, for heads that read edges: see `completed`

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        edges: Tensor,
        shifts: Tensor,
        slices: dict[str, tuple[slice, slice]],
        targets: dict[str, Targets] | None = None,
    ) -> "Batch":
        """Packed structures as tensors, floats in float64, with edges (2, E) int64 and shifts (E, 3) of their lists."""

        def tensor(x: np.ndarray, dtype: type) -> Tensor:
            return torch.from_numpy(x.astype(dtype))

        natoms = tensor(packed.natoms, np.int64)
        return cls(
            numbers=tensor(packed.numbers, np.int64),
            positions=tensor(packed.positions, np.float64),
            cell=tensor(packed.cell, np.float64),
            charge=tensor(packed.charge, np.int64),
            spin=tensor(packed.spin, np.int64),
            natoms=natoms,
            structure=tensor(np.repeat(np.arange(len(packed.natoms)), packed.natoms), np.int64),
            edges=edges,
            shifts=shifts,
            slices=slices,
            targets=targets or {},
        )

    @property
    def structures(self) -> int:
        return len(self.natoms)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Batch":
        """The same batch on another device; floating-point fields in `dtype`."""
        return self.moved(
            lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None, non_blocking=True)
        )

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor replaced by what `move` makes of it."""

        def maybe(x: Tensor | None) -> Tensor | None:
            return None if x is None else move(x)

        tensors = {name: move(getattr(self, name)) for name in TENSORS}
        targets = {t: y.moved(move) for t, y in self.targets.items()}
        labels = None if self.labels is None else self.labels.moved(move)
        more = {"reverse": maybe(self.reverse), "triplets": maybe(self.triplets)}
        return replace(self, targets=targets, labels=labels, **more, **tensors)  # type: ignore[arg-type]


def laid_out(batch: Batch, number: Mapping[str, int]) -> Batch:
    """The batch with its targets as `labels` in their place; `number` of each task. Once laid out it stays as it is."""
    if batch.labels is not None:
        return batch
    energy = _rows({t: y.energy for t, y in batch.targets.items()}, number, ())
    forces = _rows({t: y.forces for t, y in batch.targets.items()}, number, (3,))
    stress = _rows({t: y.stress for t, y in batch.targets.items()}, number, (3, 3))
    properties = {
        kind: _rows({t: y.value for t, y in batch.targets.items() if y.kind == kind}, number, shape_of(kind))
        for kind in KINDS
        if any(y.kind == kind and y.value is not None for y in batch.targets.values())
    }

    def natoms(rows: LabelRows) -> Tensor:
        return torch.cat([batch.natoms[:0], *(batch.natoms[batch.slices[task][0]] for task in rows.tasks)])

    extensive = natoms(properties["extensive"]) if "extensive" in properties else None
    labels = BatchLabels(energy, forces, stress, natoms(energy), properties, extensive)
    return replace(batch, targets={}, labels=labels)


def _rows(labels: Mapping[str, Tensor | None], number: Mapping[str, int], shape: tuple[int, ...]) -> LabelRows:
    present = {task: label for task, label in labels.items() if label is not None}
    lengths = torch.tensor([len(label) for label in present.values()], dtype=torch.int64)
    owner = torch.tensor([number[task] for task in present], dtype=torch.int64).repeat_interleave(lengths)
    label = torch.cat([*present.values()]) if present else torch.zeros((0, *shape))
    return LabelRows(list(present), owner, label)


def components(x: Tensor) -> Tensor:
    """(n, ...) -> (n, components), also where n is zero."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


TENSORS = ("numbers", "positions", "cell", "charge", "spin", "natoms", "structure", "edges", "shifts")


def rows_times_matrices(rows: Tensor, matrices: Tensor) -> Tensor:
    """Each row times its own matrix: (n, 3), (n, 3, 3) -> (n, 3), exact in the type of the operands.

    Not `@` or `einsum`: autocast takes products of matrices in bfloat16, and a GPU may take them in TF32, which moves
    the atoms of a crystal by hundredths of an angstrom.
    """
    return (rows[:, :, None] * matrices).sum(dim=1)


def edge_vectors(batch: Batch) -> Tensor:
    """r_ij from receiver i to sender j, periodic shifts included: (E, 3) angstrom."""
    i, j = batch.edges
    cells = batch.cell[batch.structure[i]]  # (E, 3, 3)
    return batch.positions[j] - batch.positions[i] + rows_times_matrices(batch.shifts, cells)
