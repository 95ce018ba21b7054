"""Edges by kernels for GPUs are torch's, to the rounding of each precision, and have the same bits each time."""

import warnings

import pytest
import torch

from interpreted import FUNCTIONS, edges_of, forms
from multifid.model.kernels.gpu import chosen
from multifid.model.suite.samples import batch_of, loss, mixed, potential_with


@pytest.fixture
def where(device) -> torch.device:
    pytest.importorskip("triton", reason="needs triton: pip install 'multifid[gpu]'")
    if device.type != "cuda":
        pytest.skip("kernels of Triton are for GPUs; tests/test_gpu_kernels.py interprets them on the CPU")
    return device


def gradients(where, name, hidden, forces, precision) -> dict[str, torch.Tensor]:
    encoder = {"name": name, "layers": 2, "hidden": hidden}
    model = potential_with(encoder, forces, dtype=torch.float32).to(where).train()
    batch = batch_of(*mixed(), dtype=torch.float32).to(where)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
        value = loss(model(batch)["a"], batch)
    value.backward()
    torch.set_float32_matmul_precision("highest")
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("hidden", [12, 128, 866])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_are_torchs_to_the_rounding_of_each_precision(where, name, hidden, forces, precision, monkeypatch):
    """The comparison before their first use says so: a warning of it is an error here."""
    monkeypatch.setattr(chosen, "_RIGHT", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(where, name, hidden, forces, precision)
    assert chosen._RIGHT and all(chosen._RIGHT.values())
    assert all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_have_one_order(where, name):
    i, j, tensors = edges_of(name, torch.float32, edges=3000, atoms=200)
    i, j, tensors = i.to(where), j.to(where), [[x.to(where) for x in part] for part in tensors]
    one, other = (chosen._derivatives(forms(name)[0], i, j, tensors, None) for _ in range(2))
    for what in one:
        assert all(torch.equal(x, y) for x, y in zip(one[what], other[what], strict=True)), what
