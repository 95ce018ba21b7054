"""A batch: a few tasks' structures laid end to end, with their edges, as tensors.

    structures   | s0 s1 s2 | s3 s4 | s5 s6 s7 |        one encoder pass over all of them
    tasks        |  ani1x   | mptrj |  omol25  |        each branch sees a contiguous slice

Tasks that live in one store share a slice.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(slots=True)
class Targets:
    """The labels of one task in a batch, reference energies subtracted. NaN = no label, None = none at all."""

    energy: Tensor  # (S_t,) eV
    forces: Tensor | None  # (N_t, 3) eV/angstrom
    stress: Tensor | None  # (S_t, 3, 3) eV/angstrom^3


@dataclass(slots=True)
class Batch:
    numbers: Tensor  # (N,) int64 atomic numbers
    positions: Tensor  # (N, 3) angstrom
    cell: Tensor  # (S, 3, 3) angstrom, rows = vectors, zero where not periodic
    charge: Tensor  # (S,) int64 e
    spin: Tensor  # (S,) int64 multiplicity
    natoms: Tensor  # (S,) int64
    structure: Tensor  # (N,) int64: the structure of each atom, ascending
    edges: Tensor  # (2, E) int64: row 0 the receiver i, row 1 the sender j; sorted by receiver
    shifts: Tensor  # (E, 3) float: r_ij = positions[j] - positions[i] + shifts @ cell[structure[i]]
    slices: dict[str, tuple[slice, slice]] = field(default_factory=dict)  # task -> (structures, atoms)
    targets: dict[str, Targets] = field(default_factory=dict)

    @property
    def structures(self) -> int:
        return len(self.natoms)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Batch":
        """The same batch on another device; floating-point fields in `dtype`."""

        def move(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None, non_blocking=True)

        moved = {name: move(getattr(self, name)) for name in _TENSORS}
        targets = {t: Targets(move(y.energy), move(y.forces), move(y.stress)) for t, y in self.targets.items()}  # type: ignore[arg-type]
        return replace(self, targets=targets, **moved)  # type: ignore[arg-type]


_TENSORS = ("numbers", "positions", "cell", "charge", "spin", "natoms", "structure", "edges", "shifts")


def edge_vectors(batch: Batch) -> Tensor:
    """r_ij from receiver i to sender j, periodic shifts included: (E, 3) angstrom."""
    i, j = batch.edges
    cells = batch.cell[batch.structure[i]]  # (E, 3, 3)
    return batch.positions[j] - batch.positions[i] + torch.einsum("ek,ekl->el", batch.shifts, cells)
