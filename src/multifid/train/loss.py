"""The objective, written once: sums over labels divided by the counts of the whole step.

    L = sum_t w_t [ lambda_E / S_t    sum_s     loss(dE_s / (N_s scale_t))
                  + lambda_F / (3 A_t) sum_i,xyz loss(dF_i / scale_t)
                  + lambda_S / (9 V_t) sum_s,kl  loss(dsigma_s / scale_t) ]

S_t, A_t, V_t count the structures with an energy, atoms with forces and structures with stress of task t in the whole
step, over all ranks and micro-batches. So each part back-propagates sums over global counts, and gradients are summed:
no factor depends on how many parts there are. Terms with a zero count are zero; a NaN label reaches no gradient.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from multifid.model.potential import Prediction
from multifid.structures.batch import Batch, Targets


class ObjectiveConfig(BaseModel):
    """What is minimised."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: Literal["l1", "mse", "huber", "l2norm"] = Field("l1", description="of the scaled residuals")
    energy: float = Field(1.0, ge=0.0, description="lambda_E, weight of the energy per atom")
    forces: float = Field(1.0, ge=0.0, description="lambda_F, weight of the force components")
    stress: float = Field(0.0, ge=0.0, description="lambda_S, weight of the stress (needs branch.forces: conservative)")
    scale: Literal["task", "none"] = Field("task", description="task: residuals in units of each task's force RMS")


# A loss takes residuals (n, components) and returns (sum, what one row counts for).
Loss = Callable[[Tensor], tuple[Tensor, int]]


def l1(residual: Tensor) -> tuple[Tensor, int]:
    return residual.abs().sum(), residual.shape[1]


def mse(residual: Tensor) -> tuple[Tensor, int]:
    return residual.square().sum(), residual.shape[1]


def huber(residual: Tensor) -> tuple[Tensor, int]:
    """Quadratic below 1 (one `scale` of the task), linear above; by component."""
    return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="sum"), residual.shape[1]


def l2norm(residual: Tensor) -> tuple[Tensor, int]:
    """The length of each row: rotation-invariant for forces. Rows of zeros have gradient zero."""
    return torch.linalg.vector_norm(residual, dim=1).sum(), 1


LOSSES: dict[str, Loss] = {"l1": l1, "mse": mse, "huber": huber, "l2norm": l2norm}
KINDS = ("energy", "forces", "stress")


def label_counts(targets: Targets) -> Tensor:
    """(S, A, V): structures with an energy, atoms with forces, structures with stress, as (3,) float64."""
    labels = (targets.energy, targets.forces, targets.stress)
    rows = [0 if y is None else _labelled(y).sum() for y in labels]
    return torch.tensor(rows, dtype=torch.float64)


def _labelled(target: Tensor) -> Tensor:
    """Which rows carry a label: (n,) bool; a row with one NaN carries none."""
    return torch.isfinite(target.reshape(len(target), -1)).all(dim=1)


def loss_sums(config: ObjectiveConfig, batch: Batch, task: str, predicted: Prediction, scale: float) -> Tensor:
    """Sums of the loss over a task's labels in this batch, one for each kind, each in its mean's unit: (3,).

    Divided by the global (S, A, V) of the task and weighted, they are the task's part of the objective.
    """
    loss, targets = LOSSES[config.loss], batch.targets[task]
    natoms = batch.natoms[batch.slices[task][0]]
    weights = {kind: getattr(config, kind) for kind in KINDS}
    pairs = {
        "energy": (predicted.energy, targets.energy, natoms),
        "forces": (predicted.forces, targets.forces, None),
        "stress": (predicted.stress, targets.stress, None),
    }
    sums = []
    for kind, (prediction, target, divisor) in pairs.items():
        if weights[kind] == 0.0 or prediction is None or target is None:
            sums.append(predicted.energy.new_zeros(()))
            continue
        total, counts_for = loss(_residual(prediction, target / scale, divisor))
        sums.append(weights[kind] * total / counts_for)
    return torch.stack(sums)


def _residual(prediction: Tensor, target: Tensor, divisor: Tensor | None) -> Tensor:
    """Residuals of the labelled rows, zero (with zero gradient) elsewhere: (n, components)."""
    labelled = _labelled(target)
    residual = (prediction - torch.where(_expand(labelled, target), target, 0.0)).reshape(len(target), -1)
    if divisor is not None:
        residual = residual / divisor[:, None]
    return torch.where(labelled[:, None], residual, 0.0)


def _expand(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (like.dim() - 1)).expand_as(like)


def objective(sums: Tensor, counts: Tensor, weight: float) -> Tensor:
    """A task's part of the objective: weight x sum over kinds of sums / counts, zero where the count is zero."""
    return weight * torch.where(counts > 0, sums / counts.clamp(min=1).to(sums.dtype), 0.0).sum()
