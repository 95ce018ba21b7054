"""Shampoo with factors fitted by their Kullback-Leibler divergence (Lin et al. 2025, arXiv 2509.03378, KL-Shampoo).

The gradients G (m, n) of a matrix W are seen as random with the covariance v (L x R): L (m, m) says how rows vary
together, R (n, n) how columns do. An update divides by its square root, as Adam does by the size of every entry:

    L <- b2 L + (1 - b2) G R^-1 G^T / n,    R <- b2 R + (1 - b2) G^T L^-1 G / m          left, right
    v <- b2 v + (1 - b2) mean (L^-1/2 G R^-1/2)^2                                          size
    M <- b1 M + (1 - b1) G                                                              exp_avg
    W <- W - lr [ L^-1/2 M R^-1/2 / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) ]

On the right side stand L^-1/2 and R^-1/2 as they were found at the last of every ten updates, of

    X / mean(diag X) + d_t,    d_t = d + b2^t / (1 - b2^t)                   left_root, right_root

that is, shrunk towards the identity, the more the fewer gradients were seen. So an update is a smooth function of the
gradients, whatever their rank: rounding errors (another number of ranks, of micro-batches, another processor) stay as
small as with AdamW. An optimizer that works in an eigenbasis, as SOAP (arXiv 2409.11321), is none: eigenvectors
of eigenvalues that are equal or zero are arbitrary, and what has the size of rounding errors there is divided by its
own size. The scale v is not in the paper. It is renewed in every update, so that none is longer than about lr for each
entry, however large gradients become between two roots.

Vectors, and matrices that are no maps between hidden units (embeddings, rows for single outputs), take plain AdamW. An
update costs some products of matrices as large as W for each, whatever the batch. Matrices of equal shape are updated
together, since for small models calls cost more than arithmetic. An update of a matrix depends on nothing but that
matrix and its gradients: any placement of branches gives the same.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

EVERY = 10  # updates between two computations of the roots
EPSILON = 1e-8
DAMPING = 1e-3  # d: of the mean eigenvalue of a factor
LARGEST = 4096  # a side beyond this would hold a factor of more than 16 million numbers: such a matrix takes AdamW
TOGETHER = 1 << 20  # numbers of the matrices of one shape that are updated together
KEPT = ("exp_avg", "size", "left", "right", "left_root", "right_root")  # of a matrix


def is_map(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of this name is a map between hidden units."""
    return (
        "embedding" not in name and parameter.dim() == 2 and 1 < min(parameter.shape) <= max(parameter.shape) <= LARGEST
    )


class Shampoo(torch.optim.Optimizer):
    """Decay is decoupled and acts on matrices only, as in `adamw`.

    As torch's fused optimizers it divides gradients by `grad_scale` and does nothing where `found_inf` is not zero, if
    they are set; it waits for the device to look at the latter, and for nothing else: counts of updates stay on the
    host.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> None:
        maps = {name: p for name, p in parameters.items() if is_map(name, p)}
        other = [p for name, p in parameters.items() if name not in maps]
        groups = [
            {"params": list(maps.values()), "weight_decay": weight_decay, "maps": True},
            {"params": [p for p in other if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in other if p.dim() < 2], "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "betas": (0.95, 0.95), "maps": False})

    def first_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept of a parameter before its first update."""
        state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
        if not any(parameter is p for group in self.param_groups if group["maps"] for p in group["params"]):
            return state | {"exp_avg_sq": torch.zeros_like(parameter)}
        state["size"] = parameter.new_zeros(())
        for side, n in zip(("left", "right"), parameter.shape, strict=True):
            state[side] = parameter.new_zeros(n, n)
            state[f"{side}_root"] = torch.eye(n, dtype=parameter.dtype, device=parameter.device)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are computed before"
        if self.found_inf is not None and self.found_inf.item() != 0:
            return
        for group in self.param_groups:
            alike: dict[Any, list[nn.Parameter]] = {}
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = self.first_state(p)
                self.state[p]["step"] += 1
                alike.setdefault((int(self.state[p]["step"]), p.shape if group["maps"] else None), []).append(p)
            move = self._whitened if group["maps"] else self._plain
            for (updates, shape), members in alike.items():
                most = len(members) if shape is None else max(1, TOGETHER // shape.numel())
                for k in range(0, len(members), most):
                    some = members[k : k + most]
                    with exact_products():
                        moved = move(some, self._gradients(some), updates, *group["betas"])
                    weights = [p.detach() for p in some]
                    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(weights, moved, alpha=-group["lr"])

    def _gradients(self, members: list[nn.Parameter]) -> list[Tensor]:
        grads = [p.grad for p in members if p.grad is not None]
        assert len(grads) == len(members), "every parameter has a gradient in every step"
        return grads if self.grad_scale is None else list(torch._foreach_div(grads, self.grad_scale))

    def _plain(self, members: list[nn.Parameter], grads: list[Tensor], updates: int, b1: float, b2: float) -> Any:
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

    def _whitened(self, members: list[nn.Parameter], grads: list[Tensor], updates: int, b1: float, b2: float) -> Any:
        """What to subtract from matrices of one shape (m, n), together: B of them."""
        g = torch.stack(grads)
        kept = {key: torch.stack([self.state[p][key] for p in members]) for key in KEPT}
        m, n = g.shape[1:]
        rows, columns = kept["left_root"] @ g, g @ kept["right_root"]
        kept["left"].lerp_(columns @ columns.mT / n, 1 - b2)
        kept["right"].lerp_(rows.mT @ rows / m, 1 - b2)
        kept["size"].lerp_((rows @ kept["right_root"]).square_().mean(dim=(1, 2)), 1 - b2)
        kept["exp_avg"].lerp_(g, 1 - b1)
        size = (kept["size"] / (1 - b2**updates)).sqrt_().add_(EPSILON) * (1 - b1**updates)
        moved = kept["left_root"] @ kept["exp_avg"] @ kept["right_root"] / size[:, None, None]
        if updates % EVERY == 0:
            unseen = b2**updates / (1 - b2**updates)
            for side in ("left", "right"):
                kept[f"{side}_root"] = inverse_root(shrunk(kept[side], DAMPING + unseen))
        for k, p in enumerate(members):
            for key, of_all in kept.items():
                self.state[p][key].copy_(of_all[k])
        return moved.unbind()


def shrunk(factor: Tensor, damping: float) -> Tensor:
    """X / mean(diag X) + damping: (B, n, n) -> (B, n, n). Where X is zero, the identity takes its place."""
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    mean = factor.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    tiny = torch.finfo(factor.dtype).tiny
    return (factor + tiny * identity) / (mean + tiny) + damping * identity


def inverse_root(x: Tensor) -> Tensor:
    """X^(-1/2) of symmetric (B, n, n) whose eigenvalues are DAMPING at least and 1 + damping in the mean.

    By the coupled iteration of Newton and Schulz (Higham 2008, eq. 6.35): products of matrices only, the same number of
    them in every case, so that a device need not be waited for. Eigenvalues of X / |X| grow by 9 / 4 in an iteration
    until they are near 1, and then converge quadratically.
    """
    n = x.shape[1]
    identity = torch.eye(n, dtype=x.dtype, device=x.device)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    y, z = x / norm, identity.expand_as(x)
    for _ in range(math.ceil(math.log(n / DAMPING) / math.log(9 / 4)) + 5):
        t = 1.5 * identity - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return z / norm.sqrt()


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, also in a run whose model takes them in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
