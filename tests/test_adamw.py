"""Our AdamW is torch's, bit for bit, whatever has joined late, was skipped or put back."""

import copy

import pytest
import torch

from multifid.training.optimizer import adamw, moments, set_moments, update, updates_of, with_factors

SHAPES = {"a": (7, 5), "b": (7,), "c": (3, 33), "d": (1,)}


def made(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(s, generator=random, dtype=dtype)) for n, s in SHAPES.items()}


def of_torch(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    groups = [[p for p in parameters.values() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    decays = zip(groups, (0.1, 0.0), strict=True)
    return torch.optim.AdamW([{"params": g, "weight_decay": d} for g, d in decays], lr=1e-2, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_those_of_torch(dtype):
    """With clipping, a skipped update, rates of their own, and a parameter whose moments are put back half way."""
    theirs, ours = made(dtype), made(dtype)
    reference, optimizer = of_torch(theirs), adamw(ours, 1e-2, 0.1)
    for each, parameters in ((reference, theirs), (optimizer, ours)):
        with_factors(each, parameters, {"c": 0.5})
    random, held = torch.Generator().manual_seed(1), {}
    for k in range(6):
        for one, other in zip(theirs.values(), ours.values(), strict=True):
            one.grad = torch.randn(one.shape, generator=random, dtype=dtype)
            other.grad = one.grad.clone()
        norm = torch.tensor(torch.inf if k == 2 else 3.0)
        for each in (reference, optimizer):
            update(each, 1e-2 / (1 + k), norm, 2.0)
        if k == 1:
            held = copy.deepcopy(moments(optimizer, ours["a"]))
        if k == 3:
            for each, parameters in ((reference, theirs), (optimizer, ours)):
                set_moments(each, parameters["a"], {kind: x.clone() for kind, x in held.items()}, 2)
    for name in SHAPES:
        assert torch.equal(theirs[name], ours[name]), name
        assert updates_of(optimizer, ours[name]) == updates_of(reference, theirs[name]) == (4 if name == "a" else 5)
        for kind, kept in moments(reference, theirs[name]).items():
            assert torch.equal(kept, moments(optimizer, ours[name])[kind]), (name, kind)
