"""Errors as sums that add up: over batches, over ranks, in any order.

A mean of batch means is not the mean where batches differ in size or lack labels. So only counts and sums are kept, in
float64 on the device of the predictions, and nothing waits for the device until somebody asks for a number:

    errors = Errors(device)
    for batch in loader:                       # no synchronisation in here
        errors.add(energy, forces, stress, batch.targets[task], natoms)
    total = all_reduce_sum(errors.as_tensor())  # many ranks: the caller's reduction, one tensor
    row = Errors.from_tensor(total).row("GFM-MTL-All", "ani1x", "test")

Metrics are always physical: eV/atom, eV/angstrom and eV/angstrom^3, whatever scale and loss the training used.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from multifid.evaluation.matrix import Row
from multifid.graphs.batch import BatchLabels, Targets, components
from multifid.structures.properties import KINDS

QUANTITIES = ("energy", "forces", "stress", "property")
_COUNTERS = 3  # structures, structures with an unseen element, atoms
SIZE = _COUNTERS + 3 * len(QUANTITIES)  # then (count, sum |e|, sum e^2) of each quantity


class Errors:
    """Counts and sums of the errors of one model on one dataset. Labels that are NaN (or None) drop out.

    The energy is per atom and counts once per structure; forces and stress count by component. A prediction that is not
    finite is *not* dropped: it makes the error NaN; `failures` leaves such structures out, and counts them.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(SIZE, dtype=torch.float64, device=device)

    def add(
        self,
        energy: Tensor,
        forces: Tensor | None,
        stress: Tensor | None,
        targets: Targets,
        natoms: Tensor,
        unseen: Tensor | None = None,
    ) -> None:
        """Add a batch of predictions and its labels, both in the same (total or aligned) energy space.

        energy (S,) eV; forces (N, 3) eV/angstrom; stress (S, 3, 3) eV/angstrom^3; natoms (S,); unseen (S,) bool: the
        structure has an element that the model has not seen in training. Raises ValueError where shapes differ.
        """
        atoms = natoms.to(torch.float64)
        nothing = self._sums.new_zeros(())
        self._sums[:_COUNTERS] += torch.stack(
            [
                nothing + len(natoms),
                nothing if unseen is None else unseen.sum().to(torch.float64),
                atoms.sum(),
            ]
        )
        self._add("energy", energy, targets.energy, divisor=atoms)
        self._add("forces", forces, targets.forces)
        self._add("stress", stress, targets.stress)

    def _add(
        self, quantity: str, predicted: Tensor | None, label: Tensor | None, divisor: Tensor | None = None
    ) -> None:
        if predicted is None or label is None:
            return
        if predicted.shape != label.shape:
            shapes = f"{tuple(predicted.shape)} and {tuple(label.shape)}"
            raise ValueError(f"prediction and label of the {quantity} must have one shape, but have {shapes}")
        self._sums[_place(quantity)] += errors_of_rows(predicted, label, divisor).sum(dim=0)

    def as_tensor(self) -> Tensor:
        """All sums as one float64 tensor (15,), a copy: add those of all ranks, element by element."""
        return self._sums.clone()

    @classmethod
    def from_tensor(cls, sums: Tensor) -> "Errors":
        """The inverse of `as_tensor`. Raises ValueError for another shape or type."""
        if sums.shape != (SIZE,) or sums.dtype != torch.float64:
            raise ValueError(f"sums of errors are float64 ({SIZE},), got {sums.dtype} {tuple(sums.shape)}")
        errors = cls(sums.device)
        errors._sums = sums.clone()
        return errors

    def __iadd__(self, other: "Errors") -> "Errors":
        self._sums += other._sums.to(self._sums.device)
        return self

    def values(self) -> dict[str, float | None]:
        """`energy_mae`, `energy_rmse`, ..., `stress_rmse`; None without a label. Waits for the device."""
        return _means(self._sums.tolist())

    def row(self, model: str, data: str, split: str) -> Row:
        """A row of `evaluation.json`: who was asked about what, how much, and the errors. Waits for the device."""
        return {"model": model, "data": data, "split": split, **counts_and_means(self._sums.tolist())}


def counts_and_means(sums: list[float]) -> Row:
    """`structures`, ..., `energy_mae`, ... of the sums of an `Errors` (15,); None without a label."""
    structures, unseen, atoms = (round(x) for x in sums[:_COUNTERS])
    return {"structures": structures, "unseen_structures": unseen, "atoms": atoms, **_means(sums)}


def errors_of_rows(predicted: Tensor, label: Tensor, divisor: Tensor | None = None) -> Tensor:
    """(count, sum |e|, sum e^2) over the components of each row that have a label: (n, 3) float64.

    predicted, label (n, ...); divisor (n,): of the energies, the number of atoms.
    """
    error = components(predicted.detach().to(torch.float64) - label.to(torch.float64))
    if divisor is not None:
        error = error / divisor[:, None]
    known = ~torch.isnan(components(label))
    error = torch.where(known, error, 0.0)
    return torch.stack([known.sum(dim=1).to(torch.float64), error.abs().sum(dim=1), error.square().sum(dim=1)], dim=1)


def error_sums(predicted: Mapping[str, Tensor], labels: BatchLabels, tasks: int) -> Tensor:
    """The sums of `Errors` for each of several tasks at once: (tasks, 15) float64.

    predicted: by kind, a row for each row of the labels, in physical units. Structures of no atoms are padding.
    Properties: in their own units, extensive ones of whole structures; of classes the error is 0 or 1.
    """
    natoms = labels.natoms.to(torch.float64)
    counters = torch.stack([(natoms > 0).to(torch.float64), torch.zeros_like(natoms), natoms], dim=1)
    sums = natoms.new_zeros((tasks, SIZE))
    sums[:, :_COUNTERS].index_add_(0, labels.energy.owner, counters)
    for kind, prediction in predicted.items():
        rows = labels.rows(kind)
        assert rows is not None
        quantity = "property" if kind in KINDS else kind
        if kind == "class":
            errors = wrong_classes(prediction, rows.label)
        else:
            errors = errors_of_rows(prediction, rows.label, natoms.clamp(min=1) if quantity == "energy" else None)
        sums[:, _place(quantity)].index_add_(0, rows.owner, errors)
    return sums


def wrong_classes(logits: Tensor, label: Tensor) -> Tensor:
    """As `errors_of_rows`, the error of a class being 1 where another is the likeliest: (n, 3) float64."""
    known = torch.isfinite(label)
    wrong = (known & (logits.argmax(dim=1) != label)).to(torch.float64)
    return torch.stack([known.to(torch.float64), wrong, wrong], dim=1)


def _place(quantity: str) -> slice:
    start = _COUNTERS + 3 * QUANTITIES.index(quantity)
    return slice(start, start + 3)


def _means(sums: list[float]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for quantity in QUANTITIES:
        count, absolute, squared = sums[_place(quantity)]
        if quantity == "property" and not count:
            continue
        means[f"{quantity}_mae"] = absolute / count if count else None
        means[f"{quantity}_rmse"] = math.sqrt(squared / count) if count else None
    return means
