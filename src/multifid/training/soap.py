"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321), made well-posed.

The gradient G (m, n) of a matrix W is rotated by the eigenvectors of running averages of G G^T and G^T G. There its
components hardly depend on each other, and Adam's division by their sizes is close to a division by a curvature:

    L <- b2 L + (1 - b2) G G^T,    R <- b2 R + (1 - b2) G^T G            left and right
    Q_L <- orthogonal factor of (L / mean(diag L) + d) Q_L, and Q_R alike      by one iteration every few updates
    M <- b1 M + (1 - b1) G,        V <- b2 V + (1 - b2) (Q_L^T G Q_R)^2   exp_avg, exp_avg_sq
    W <- W - lr Q_L [ Q_L^T M Q_R / (1 - b1^t) / (S + f sqrt(mean S^2) + eps) ] Q_R^T,    S = sqrt(V / (1 - b2^t))

The paper takes the first bases from an eigendecomposition, and there is no function that gives eigenvectors of equal
or vanishing eigenvalues: gradients that differ by a rounding error (another number of ranks or micro-batches, another
processor) got other bases, and then Adam divides what has the size of rounding errors by its own size. Three changes
make an update a smooth function of the gradients, whatever their rank:

    d       a part of the mean eigenvalue is added, so that nothing smaller rotates a basis
    Q(0)    bases begin as rotations that are fixed and point nowhere in particular. Beginning with the identity, a
            column that happens to be an eigenvector (of an input that is always zero) would be moved by nothing but
            rounding errors, which grow in every iteration
    f       a component much smaller than the others is not brought to their size

Columns are never sorted: the iteration puts large eigenvalues first by itself, without jumps.

Vectors, and matrices that are no maps between hidden units (embeddings, rows for single outputs), take plain AdamW. An
update costs some products of matrices as large as W for each, whatever the batch. Matrices of equal shape are rotated
together, since for small models calls cost more than arithmetic; on CPUs narrow ones in C++ (`soap_native.py`).

An update of a matrix depends on nothing but that matrix and its gradients: any placement of branches gives the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from multifid.training import soap_native
from multifid.training.adamw import ADD_PARAM_GROUP

EVERY = 5  # updates between two iterations of the bases
FIRST = 10  # iterations in the first update
DAMPING = 1e-2  # d, of the mean eigenvalue
FLOOR = 1e-3  # f, of the mean size of the components
EPSILON = 1e-8
LARGEST = 4096  # a side beyond this would hold a basis of more than 16 million numbers: such a matrix takes AdamW
TOGETHER = 1 << 20  # numbers of the matrices of one shape that are rotated together
ROTATION = ("left", "right", "left_basis", "right_basis")  # what a matrix keeps besides its two moments


def is_rotated(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of this name is a matrix whose gradient is rotated."""
    return (
        "embedding" not in name and parameter.dim() == 2 and 1 < min(parameter.shape) <= max(parameter.shape) <= LARGEST
    )


@dataclass
class Together:
    """Parameters of one group that have seen equally many updates; matrices of one shape, with what is kept of them."""

    group: dict[str, Any]  # with the learning rate, which changes
    members: list[nn.Parameter]
    count: Tensor  # of updates, float32, no dimension, on the host; `updates` is the same number
    updates: int
    kept: dict[str, Tensor]  # (B, ...) of matrices that are rotated, (n,) of all numbers of the others


class SOAP(torch.optim.Optimizer):
    """Decay is decoupled and acts on matrices only, as in `adamw`.

    As torch's fused optimizers it divides gradients by `grad_scale` and does nothing where `found_inf` is not zero, if
    they are set; it waits for the device to look at the latter, and for nothing else: updates are counted on the host.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    add_param_group = ADD_PARAM_GROUP

    def __init__(self, parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> None:
        rotated = {name: p for name, p in parameters.items() if is_rotated(name, p)}
        other = [p for name, p in parameters.items() if name not in rotated]
        groups = [
            {"params": list(rotated.values()), "weight_decay": weight_decay, "rotated": True},
            {"params": [p for p in other if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in other if p.dim() < 2], "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "betas": (0.95, 0.95), "rotated": False})
        self._together: list[Together] | None = None

    def first_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept of a parameter before its first update."""
        state = {"step": torch.tensor(0.0)} | {
            key: parameter.new_zeros(parameter.shape) for key in ("exp_avg", "exp_avg_sq")
        }
        if any(parameter is p for group in self.param_groups if group["rotated"] for p in group["params"]):
            for side, n in zip(("left", "right"), parameter.shape, strict=True):
                state[side] = parameter.new_zeros(n, n)
                state[f"{side}_basis"] = first_basis(n).to(device=parameter.device, dtype=parameter.dtype, copy=True)
        return state

    def forget(self) -> None:
        """Look again at groups and state before the next update: somebody has changed them."""
        self._together = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are computed before"
        if self.found_inf is not None and self.found_inf.item() != 0:
            return
        if self._together is None:
            self._together = [run for group in self.param_groups for run in self._collected(group)]
        for run in self._together:
            run.count += 1
            run.updates += 1
            with exact_products():
                gradients = self._gradients(run.members)
                if gradients and soap_native.usable(run.members, gradients):
                    self._in_library(run, gradients)
                    continue
                move = self._rotated if run.group["rotated"] else self._plain
                moved = move(run, gradients, *run.group["betas"])
            weights = [p.detach() for p in run.members]
            if run.group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - run.group["lr"] * run.group["weight_decay"])
            torch._foreach_add_(weights, moved, alpha=-run.group["lr"])

    def _collected(self, group: dict[str, Any]) -> list[Together]:
        """The parameters of a group by their counts, matrices also by their shapes; all of them have a state then."""
        alike: dict[Any, list[nn.Parameter]] = {}
        for p in group["params"]:
            if not self.state[p]:
                self.state[p] = self.first_state(p)
            alike.setdefault((int(self.state[p]["step"]), p.shape if group["rotated"] else None), []).append(p)
        out = []
        for (updates, shape), members in alike.items():
            most = len(members) if shape is None else max(1, TOGETHER // shape.numel())
            for k in range(0, len(members), most):
                some, count = members[k : k + most], torch.tensor(float(updates))
                out.append(Together(group, some, count, updates, self._stacked(some, shape is not None)))
                for p in some:
                    self.state[p]["step"] = count
        return out

    def _stacked(self, members: list[nn.Parameter], rotated: bool) -> dict[str, Tensor]:
        """What is kept of some parameters, together; their states become parts of it."""
        kept = {}
        for key in ("exp_avg", "exp_avg_sq", *(ROTATION if rotated else ())):
            each = [self.state[p][key] for p in members]
            kept[key] = torch.stack(each) if rotated else torch.cat([x.flatten() for x in each])
            for p, own in zip(members, kept[key].unbind() if rotated else parts_of(kept[key], members), strict=True):
                self.state[p][key] = own
        return kept

    def _gradients(self, members: list[nn.Parameter]) -> list[Tensor]:
        grads = [p.grad for p in members if p.grad is not None]
        assert len(grads) == len(members), "every parameter has a gradient in every step"
        return grads

    def _in_library(self, run: Together, gradients: list[Tensor]) -> None:
        b1, b2 = run.group["betas"]
        numbers = {
            "before": FIRST if run.updates == 1 else 0,
            "after": int(run.updates % EVERY == 0),
            "lr": run.group["lr"],
            "decay": run.group["weight_decay"],
            "b1": b1,
            "b2": b2,
            "c1": 1 - b1**run.updates,
            "c2": 1 - b2**run.updates,
            "scale": 1.0 if self.grad_scale is None else float(self.grad_scale),
            "damping": DAMPING,
            "floor": FLOOR,
            "epsilon": EPSILON,
        }
        soap_native.update(run.members, gradients, run.kept, run.group["rotated"], numbers)

    def _scaled(self, g: Tensor) -> Tensor:
        return g if self.grad_scale is None else g.div_(self.grad_scale.to(g.device))

    def _plain(self, run: Together, grads: list[Tensor], b1: float, b2: float) -> Any:
        g = self._scaled(torch.cat([x.flatten() for x in grads]))
        first, second = run.kept["exp_avg"], run.kept["exp_avg_sq"]
        first.lerp_(g, 1 - b1)
        second.mul_(b2).addcmul_(g, g, value=1 - b2)
        size = second.sqrt().mul_((1 - b2**run.updates) ** -0.5).add_(EPSILON)
        return parts_of((first / size).div_(1 - b1**run.updates), run.members)

    def _rotated(self, run: Together, grads: list[Tensor], b1: float, b2: float) -> Any:
        """What to subtract from matrices of one shape (m, n), together: B of them."""
        g = self._scaled(torch.stack(grads))
        first, second, left, right, q_l, q_r = (run.kept[key] for key in ("exp_avg", "exp_avg_sq", *ROTATION))
        first.lerp_(g, 1 - b1)
        left.lerp_(g @ g.mT, 1 - b2)
        right.lerp_(g.mT @ g, 1 - b2)
        if run.updates == 1:
            q_l.copy_(iterated(left, q_l, FIRST)), q_r.copy_(iterated(right, q_r, FIRST))
        second.mul_(b2).add_((q_l.mT @ g @ q_r).square_(), alpha=1 - b2)
        squared = second / (1 - b2**run.updates)
        size = squared.sqrt() + FLOOR * squared.mean(dim=(1, 2), keepdim=True).sqrt() + EPSILON
        moved = q_l @ ((q_l.mT @ first @ q_r) / size) @ q_r.mT / (1 - b1**run.updates)
        if run.updates % EVERY == 0:
            q_l.copy_(iterated(left, q_l)), q_r.copy_(iterated(right, q_r))
        return moved.unbind()


def parts_of(flat: Tensor, members: list[nn.Parameter]) -> list[Tensor]:
    """What of numbers (n,) belongs to each of some parameters, in its shape."""
    parts = flat.split([p.numel() for p in members])
    return [part.view(p.shape) for p, part in zip(members, parts, strict=True)]


@lru_cache(maxsize=64)
def first_basis(n: int) -> Tensor:
    """An orthogonal matrix (n, n) that is the same on every machine and singles out no axis, float64."""
    random = torch.Generator().manual_seed(n)
    return orthogonal_factor(torch.rand(n, n, generator=random, dtype=torch.float64) - 0.5)


def iterated(symmetric: Tensor, basis: Tensor, times: int = 1) -> Tensor:
    """A basis (B, n, n) rotated towards the eigenvectors, those of the largest eigenvalues first.

    Gradients below epsilon, as of a branch that has seen no label, leave it where it is.
    """
    mean = symmetric.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    relative = symmetric / (mean + EPSILON**2)
    for _ in range(times):
        basis = orthogonal_factor(relative @ basis + DAMPING * basis)
    return basis


def orthogonal_factor(x: Tensor) -> Tensor:
    """Q of X = Q R with a positive diagonal of R, which is unique, where X (..., n, n) is not singular."""
    q, r = torch.linalg.qr(x)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, also in a run whose model takes them in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
