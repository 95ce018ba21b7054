"""AdamW by torch's fused kernel, without what torch does for every parameter around it.

In each update torch asks every parameter for its gradient and state, sorts them by device, and counts updates for each
by itself: for a narrow model that takes as long as the kernel. Here every parameter has a gradient in every update
(`parallel/gradients.py`), so the lists of weights and moments are made once, and parameters that have seen equally many
updates share a count. Numbers and the state of a parameter (`step`, `exp_avg`, `exp_avg_sq`) are torch's.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Without the decorator of torch, which imports its compiler, a second, to say that this is not to be compiled.
ADD_PARAM_GROUP = inspect.unwrap(torch.optim.Optimizer.add_param_group)


@dataclass(frozen=True)
class Together:
    """Parameters of one group that have seen equally many updates."""

    group: dict[str, Any]  # with the learning rate, which changes
    parameters: list[nn.Parameter]
    first: list[Tensor]
    second: list[Tensor]
    count: Tensor  # of updates, float32, no dimension


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019); `grad_scale` and `found_inf` are read as by torch's fused form."""

    add_param_group = ADD_PARAM_GROUP

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr=lr, fused=True)
        self._together: list[Together] | None = None
        self._counts: dict[tuple[int, torch.device], Tensor] = {}

    def forget(self) -> None:
        """Look again at groups and state before the next update: somebody has changed them."""
        self._together = None

    def count_of(self, updates: int, device: torch.device) -> Tensor:
        """A count that begins with so many updates, one for all parameters that are put back before the next one."""
        return self._counts.setdefault((updates, device), torch.tensor(float(updates), device=device))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are there"
        if self._together is None:
            self._together = [run for group in self.param_groups for run in self._collected(group)]
            self._counts.clear()
        scale, infinite = vars(self).get("grad_scale"), vars(self).get("found_inf")
        for run in self._together:
            gradients = [p.grad for p in run.parameters if p.grad is not None]
            assert len(gradients) == len(run.parameters), "a parameter has no gradient: use torch's own AdamW"
            beta1, beta2 = run.group["betas"]
            device = run.parameters[0].device
            run.count.add_(1)
            torch._fused_adamw_(
                list[Tensor](run.parameters),
                gradients,
                run.first,
                run.second,
                [],
                [run.count] * len(run.parameters),
                lr=run.group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=run.group["weight_decay"],
                eps=run.group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None if scale is None else scale.to(device, non_blocking=True),
                found_inf=None if infinite is None else infinite.to(device, non_blocking=True),
            )
            if infinite is not None:
                run.count.sub_(infinite)

    def _collected(self, group: dict[str, Any]) -> list[Together]:
        """The parameters of a group by their counts; those without state get one, and a count of zero."""
        fresh = torch.zeros((), dtype=torch.float32, device=group["params"][0].device) if group["params"] else None
        by_count: dict[int, list[nn.Parameter]] = {}  # counts are told apart by `id`: nothing is read from a device
        for p in group["params"]:
            if not self.state[p]:
                self.state[p].update(step=fresh, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            by_count.setdefault(id(self.state[p]["step"]), []).append(p)
        out = []
        for members in by_count.values():
            count = self.state[members[0]]["step"].clone()  # of this group alone
            for p in members:
                self.state[p]["step"] = count
            first, second = ([self.state[p][kind] for p in members] for kind in ("exp_avg", "exp_avg_sq"))
            out.append(Together(group, members, first, second, count))
        return out
