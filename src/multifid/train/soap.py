"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321).

The gradient G (m, n) of a matrix W is turned by the eigenvectors of running averages of G G^T and G^T G. There its
components hardly depend on each other, and Adam's division by their sizes is close to a division by a curvature:

    L <- b2 L + (1 - b2) G G^T,    R <- b2 R + (1 - b2) G^T G            left and right
    L = Q_L diag Q_L^T,            R = Q_R diag Q_R^T                     by one orthogonal iteration every few updates
    M <- b1 M + (1 - b1) G,        V <- b2 V + (1 - b2) (Q_L^T G Q_R)^2   exp_avg, exp_avg_sq
    W <- W - lr Q_L [ Q_L^T M Q_R / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps) ] Q_R^T

Vectors, and matrices that are no maps between hidden units (embeddings, rows for single outputs), take plain AdamW. An
update costs some products of matrices as large as W for each, whatever the batch. Matrices of equal shape are turned
together, since for small models calls cost more than arithmetic.

An update of a matrix depends on nothing but that matrix and its gradients: any placement of branches gives the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

EVERY = 10  # updates between two turns of the bases
EPSILON = 1e-8
LARGEST = 4096  # a side beyond this would hold a basis of more than 16 million numbers: such a matrix takes AdamW
TOGETHER = 1 << 20  # numbers of the matrices of one shape that are turned together
TURNED = ("left", "right", "left_basis", "right_basis")  # what a matrix keeps besides its two moments


def is_turned(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of this name is a matrix whose gradient is turned."""
    return (
        "embedding" not in name and parameter.dim() == 2 and 1 < min(parameter.shape) <= max(parameter.shape) <= LARGEST
    )


def bases_of(parameters: Mapping[str, nn.Parameter]) -> int:
    """Numbers that are kept of these parameters besides their two moments: two for each entry of a basis."""
    return sum(2 * side**2 for name, p in parameters.items() if is_turned(name, p) for side in p.shape)


class SOAP(torch.optim.Optimizer):
    """Decay is decoupled and acts on matrices only, as in `adamw`.

    As torch's fused optimizers it divides gradients by `grad_scale` and does nothing where `found_inf` is not zero, if
    they are set; it waits for the device to look at the latter.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> None:
        turned = {name: p for name, p in parameters.items() if is_turned(name, p)}
        other = [p for name, p in parameters.items() if name not in turned]
        groups = [
            {"params": list(turned.values()), "weight_decay": weight_decay, "turned": True},
            {"params": [p for p in other if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in other if p.dim() < 2], "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "betas": (0.95, 0.95), "turned": False})

    def turns(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient of this parameter is turned."""
        return any(parameter is p for group in self.param_groups if group["turned"] for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are computed before"
        if self.found_inf is not None and self.found_inf.item() != 0:
            return
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= begin(p, group["turned"])
                state["step"] += 1
                alike.setdefault((float(state["step"]), p.shape if group["turned"] else None), []).append(p)
            move = self._turned if group["turned"] else self._plain
            for (updates, shape), members in alike.items():
                most = len(members) if shape is None else max(1, TOGETHER // shape.numel())
                for k in range(0, len(members), most):
                    some = members[k : k + most]
                    moved = move(some, self._gradients(some), updates, *group["betas"])
                    weights = [p.detach() for p in some]
                    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(weights, moved, alpha=-group["lr"])

    def _gradients(self, members: list[nn.Parameter]) -> list[Tensor]:
        grads = [p.grad for p in members if p.grad is not None]
        assert len(grads) == len(members), "every parameter has a gradient in every step"
        return grads if self.grad_scale is None else list(torch._foreach_div(grads, self.grad_scale))

    def _plain(self, members: list[nn.Parameter], grads: list[Tensor], updates: float, b1: float, b2: float) -> Any:
        first = [self.state[p]["exp_avg"] for p in members]
        second = [self.state[p]["exp_avg_sq"] for p in members]
        torch._foreach_lerp_(first, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, 1 - b2)
        size = torch._foreach_sqrt(second)
        torch._foreach_mul_(size, (1 - b2**updates) ** -0.5)
        torch._foreach_add_(size, EPSILON)
        moved = torch._foreach_div(first, size)
        torch._foreach_div_(moved, 1 - b1**updates)
        return moved

    def _turned(self, members: list[nn.Parameter], grads: list[Tensor], updates: float, b1: float, b2: float) -> Any:
        """What to subtract from matrices of one shape (m, n), together: B of them."""
        g = torch.stack(grads)
        first, second, left, right, q_l, q_r = (
            torch.stack([self.state[p][key] for p in members]) for key in ("exp_avg", "exp_avg_sq", *TURNED)
        )
        first.lerp_(g, 1 - b1)
        mean = 1.0 if updates == 1 else 1 - b2
        left.lerp_(g @ g.mT, mean)
        right.lerp_(g.mT @ g, mean)
        if updates == 1:
            q_l, q_r = eigenbasis(left), eigenbasis(right)
        second.mul_(b2).add_((q_l.mT @ g @ q_r).square_(), alpha=1 - b2)
        size = (second / (1 - b2**updates)).sqrt_().add_(EPSILON)
        moved = q_l @ ((q_l.mT @ first @ q_r) / size) @ q_r.mT / (1 - b1**updates)
        if updates % EVERY == 0:
            q_l, order = turned(left, q_l)
            second = torch.take_along_dim(second, order[:, :, None], dim=1)
            q_r, order = turned(right, q_r)
            second = torch.take_along_dim(second, order[:, None, :], dim=2)
        for k, p in enumerate(members):
            for key, all_of_them in zip(
                ("exp_avg", "exp_avg_sq", *TURNED), (first, second, left, right, q_l, q_r), strict=True
            ):
                self.state[p][key].copy_(all_of_them[k])
        return moved.unbind()


def begin(p: nn.Parameter, turned: bool) -> dict[str, Tensor]:
    """The state of a parameter before its first update."""
    state = {
        "step": torch.tensor(0.0, dtype=torch.float32),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }
    if turned:
        rows, columns = p.shape
        sides = {"left": rows, "right": columns, "left_basis": rows, "right_basis": columns}
        state |= {key: p.new_zeros(side, side) for key, side in sides.items()}
    return state


def eigenbasis(symmetric: Tensor) -> Tensor:
    """Eigenvectors (B, n, n) in columns, those of the largest eigenvalues first."""
    return torch.linalg.eigh(symmetric)[1].flip(-1)


def turned(symmetric: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """A basis turned towards the eigenvectors by one orthogonal iteration, and the order (B, n) in which it was taken.

    The iteration finds the eigenvectors of large eigenvalues first, so the columns are first put in that order.
    """
    sizes = (basis * (symmetric @ basis)).sum(dim=1)
    order = sizes.argsort(dim=1, descending=True, stable=True)
    ordered = torch.take_along_dim(basis, order[:, None, :], dim=2)
    return torch.linalg.qr(symmetric @ ordered)[0], order
