"""The objective, written once: sums over labels divided by the counts of the whole step.

    L = sum_t w_t [ lambda_E / S_t    sum_s     loss(dE_s / (N_s scale_t))
                  + lambda_F / (3 A_t) sum_i,xyz loss(dF_i / scale_t)
                  + lambda_S / (9 V_t) sum_s,kl  loss(dsigma_s / scale_t)
                  + lambda_P / P_t     sum       loss(dp / scale_t) ]

The last term is the only one of a task of a property p: the sum runs over the P_t structures or atoms that have it. An
extensive number counts per atom, as the energy does, a vector by component; of a class it is the cross-entropy.
S_t, A_t, V_t count the structures with an energy, atoms with forces and structures with stress of task t in the whole
step, over all ranks and micro-batches. So each part back-propagates sums over global counts, and gradients are summed:
no factor depends on how many parts there are. Terms with a zero count are zero; a NaN label reaches no gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from multifid.feed.loader import LossName
from multifid.graphs.batch import BatchLabels, LabelRows, components
from multifid.model.potential import Prediction
from multifid.structures.properties import KINDS as PROPERTIES


class ObjectiveConfig(BaseModel):
    """What is minimised."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    loss: LossName = Field(
        "l1",
        description="of the scaled residuals: l1, mse and huber (quadratic below 1) by component, l2norm by the length "
        "of each force",
    )
    energy: float = Field(1.0, ge=0.0, description="lambda_E, weight of the energy per atom")
    forces: float = Field(1.0, ge=0.0, description="lambda_F, weight of the force components")
    stress: float = Field(0.0, ge=0.0, description="lambda_S, weight of the stress (needs branch.forces: conservative)")
    property: float = Field(1.0, ge=0.0, description="lambda_P, weight of the property in tasks that have one")
    scale: Literal["task", "none"] = Field("task", description="task: residuals in units of each task's force RMS")

    @model_validator(mode="after")
    def _something(self) -> "ObjectiveConfig":
        if not self.energy + self.forces + self.stress + self.property:
            raise ValueError(
                "energy, forces, stress and property are all 0, so there is nothing to learn: give one of them weight"
            )
        return self


Loss = Callable[[Tensor], Tensor]  # residuals (n, components) -> the loss of each row (n,)


def l1(residual: Tensor) -> Tensor:
    return residual.abs().mean(dim=1)


def mse(residual: Tensor) -> Tensor:
    return residual.square().mean(dim=1)


def huber(residual: Tensor) -> Tensor:
    """Quadratic below 1 (one `scale` of the task), linear above; by component."""
    return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="none").mean(dim=1)


def l2norm(residual: Tensor) -> Tensor:
    """The length of each row: rotation-invariant for forces. Rows of zeros have gradient zero."""
    return torch.linalg.vector_norm(residual, dim=1)


LOSSES: dict[str, Loss] = {"l1": l1, "mse": mse, "huber": huber, "l2norm": l2norm}


@dataclass(frozen=True)
class TaskTerms:
    """How the residuals of every task become losses, by the task's number."""

    scales: Tensor  # (tasks,) float64, eV/angstrom, divide the residuals
    units: Tensor  # (tasks,) float64, eV/angstrom, of what the tasks' branches predict
    by_loss: dict[str, Tensor]  # name of a loss -> (tasks,) bool, whose it is; each task has one

    @classmethod
    def of(cls, scales: Sequence[float], units: Sequence[float], losses: Sequence[str], device: torch.device) -> Self:
        by_loss = {name: torch.tensor([x == name for x in losses], device=device) for name in dict.fromkeys(losses)}
        values = torch.tensor([scales, units], dtype=torch.float64).to(device)
        return cls(values[0], values[1], by_loss)

    def losses(self, residual: Tensor, owner: Tensor) -> Tensor:
        """(n,) of residuals (n, components), each row by the loss of its owner."""
        (first, _), *others = self.by_loss.items()
        out = LOSSES[first](residual)
        for name, whose in others:
            out = torch.where(whose.index_select(0, owner), LOSSES[name](residual), out)
        return out


KINDS = ("energy", "forces", "stress", *PROPERTIES)  # of labels
COLUMNS = ("energy", "forces", "stress", "property")  # of counts and sums: a task has one kind of property at most
NEVER = -1e4  # logit of a class that a task does not have


def column_of(kind: str) -> str:
    """The name of the column, and of the weight, of a kind of label."""
    return "property" if kind in PROPERTIES else kind


def label_counts(labels: BatchLabels, tasks: int) -> Tensor:
    """(S, A, V, P) of each task: structures with an energy, atoms with forces, structures with stress, and structures
    or atoms with its property: (tasks, 4) int64.
    """
    counts = labels.natoms.new_zeros((tasks, len(COLUMNS)))
    for kind in KINDS:
        if (rows := labels.rows(kind)) is not None:
            column = counts[:, COLUMNS.index(column_of(kind))]
            column.index_add_(0, rows.owner, _labelled(rows.label).to(counts.dtype))
    return counts


def _labelled(label: Tensor) -> Tensor:
    """Which rows carry a label: (n,) bool; a row with one NaN carries none."""
    return torch.isfinite(components(label)).all(dim=1)


def in_rows(predictions: Mapping[str, Prediction], labels: BatchLabels) -> dict[str, Tensor]:
    """Predictions by kind, laid out like the labels; no kind that has no labels or is not predicted."""
    out = {}
    for kind in KINDS:
        rows, name = labels.rows(kind), "value" if kind in PROPERTIES else kind
        parts = [] if rows is None else [getattr(predictions[task], name) for task in rows.tasks]
        if parts and parts[0] is not None:
            out[kind] = torch.cat(_as_wide(parts) if kind == "class" else parts)
    return out


def _as_wide(logits: list[Tensor]) -> list[Tensor]:
    """(n, classes) of several tasks, filled up to the most classes."""
    widest = max(x.shape[1] for x in logits)
    return [torch.nn.functional.pad(x, (0, widest - x.shape[1]), value=NEVER) for x in logits]


def loss_sums(
    config: ObjectiveConfig, predicted: Mapping[str, Tensor], labels: BatchLabels, terms: TaskTerms
) -> Tensor:
    """Sums of the loss over each task's labels in this batch, by column, each in its mean's unit: (tasks, 4) float64.

    Divided by the global (S, A, V, P) and weighted, they are the batch's part of the objective.
    predicted: as by `in_rows`, in the units of each task's branch.
    """
    out = {name: torch.zeros_like(terms.scales) for name in COLUMNS}
    for kind, losses in loss_rows(config, predicted, labels, terms).items():
        rows, name = labels.rows(kind), column_of(kind)
        if losses is not None and rows is not None:
            out[name] = out[name].index_add(0, rows.owner, getattr(config, name) * losses.to(torch.float64))
    return torch.stack(list(out.values()), dim=1)


def loss_rows(
    config: ObjectiveConfig, predicted: Mapping[str, Tensor], labels: BatchLabels, terms: TaskTerms
) -> dict[str, Tensor | None]:
    """The loss of each row of labels (n,), by kind, before its weight; None where it has none, or is not predicted."""
    out: dict[str, Tensor | None] = {}
    for kind in KINDS:
        out[kind] = None
        rows = labels.rows(kind)
        if kind not in predicted or rows is None or not getattr(config, column_of(kind)) > 0.0:
            continue
        if kind == "class":
            out[kind] = _cross_entropy(predicted[kind], rows.label)
        else:
            out[kind] = terms.losses(_residual(predicted[kind], rows, terms, labels.natoms_of(kind)), rows.owner)
    return out


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """(n,) of logits (n, classes); zero (with zero gradient) where there is no label."""
    labelled = torch.isfinite(label)
    number = torch.where(labelled, label, 0.0).to(torch.int64)
    losses = torch.nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, number,
                                               reduction="none")  # fmt: skip
    return torch.where(labelled, losses, 0.0)


def _residual(predicted: Tensor, rows: LabelRows, terms: TaskTerms, natoms: Tensor | None) -> Tensor:
    """Residuals of the labelled rows, zero (with zero gradient) elsewhere: (n, components)."""
    labelled = _labelled(rows.label)[:, None]
    unit = terms.units.to(predicted.dtype).index_select(0, rows.owner)[:, None]
    residual = components(predicted) - torch.where(labelled, components(rows.label), 0.0) / unit
    residual = residual * (terms.units / terms.scales).to(predicted.dtype).index_select(0, rows.owner)[:, None]
    if natoms is not None:
        residual = residual / natoms.clamp(min=1)[:, None]
    return torch.where(labelled, residual, 0.0)


def task_objectives(sums: Tensor, counts: Tensor) -> Tensor:
    """Of each task, the sum over kinds of sums / counts, zero where the count is zero: (tasks,)."""
    return torch.where(counts > 0, sums / counts.clamp(min=1), 0.0).sum(dim=1)


def validation_value(weights: Mapping[str, float], losses: Mapping[str, float], best_by: str) -> float:
    """What models of one run are compared by, of the tasks' parts of the objective before their weights.

    `objective`: the weighted sum. `geometric`: the weighted geometric mean, so that tasks with small losses count too.
    """
    if best_by == "objective":
        return sum(weight * losses[task] for task, weight in weights.items())
    counted = {task: weight for task, weight in weights.items() if losses[task] != 0}  # the others have no labels
    if not counted:
        return 0.0
    logarithms = sum(weight * math.log(losses[task]) for task, weight in counted.items())
    return math.exp(logarithms / sum(counted.values()))
