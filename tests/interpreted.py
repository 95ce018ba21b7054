"""Kernels for GPUs, by Triton's interpreter on the CPU, against the functions of edges that they are a form of.

`test_gpu_kernels.py` runs these in a process of their own: whether triton interprets is decided when it is imported.
"""

import copy
import importlib
from dataclasses import replace

import pytest
import torch

from multifid.graphs.edges import FASTER
from multifid.model.encoders import egnn, painn
from multifid.model.kernels.gpu import chosen, twice
from multifid.model.suite.samples import (
    TIGHT,
    assert_alike,
    assert_close,
    batch_of,
    loss,
    potential_with,
    skewed,
    system,
)
from test_model import small

FUNCTIONS = {"egnn": egnn.edge_message, "painn": painn.edge_message}
FIRST = ["egnn", pytest.param("painn", marks=pytest.mark.full)]  # one stands for both in the ordinary suite
SUMMED = {"egnn": (True, False), "painn": (True,)}
ATOMS, EDGES, HIDDEN = 4, 8, 18


@pytest.fixture
def on_cpu(monkeypatch):
    """Edges of every type are computed by kernels here."""
    for function in FUNCTIONS.values():
        form, *others = FASTER[function]
        here = replace(form, devices=frozenset({"cpu"}), usable=lambda _: not chosen._ASIDE.get())
        monkeypatch.setitem(FASTER, function, [here, *others])
    monkeypatch.setattr(chosen, "_RIGHT", {})


def edges_of(name: str, dtype: torch.dtype, edges: int = EDGES, atoms: int = ATOMS):
    """Receivers, none of which is atom 1, senders, and random tensors."""
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).mul(0.5).to(dtype)

    i = torch.randint(0, max(atoms - 1, 1), (edges,), generator=random)
    i, j = (i + (i > 0)).sort().values, torch.randint(0, max(atoms, 1), (edges,), generator=random)
    h, p, c = HIDDEN, 2, 2
    if name == "painn":
        values = [some(edges, 1), some(edges, 3), some(edges, p)]
        return i, j, [[], [some(atoms, 3, h), some(atoms, 3, h)], values, [some(3 * h, p), some(3 * h)]]
    weights = [some(*s) for s in [(h, p), (h, h), (h,), (1, h), (1,), (h, h), (h,), (c, h), (c,)]]
    return i, j, [[some(atoms, h)], [some(atoms, h)], [some(edges, 1), some(edges, p)], weights]


def forms(name: str):
    """Kernels and function, as `chosen.compare` takes them."""
    messages, summed = importlib.import_module(f"multifid.model.kernels.gpu.{name}").messages, SUMMED[name]
    return (
        lambda *x: messages([slice(0, len(x[0]))], *x),
        lambda i, j, *x: chosen._by_torch(FUNCTIONS[name], summed, i, j, x),
    )


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_two_derivatives_are_the_functions(name, dtype):
    """Units that are no power of two, an atom that receives nothing, tiles that are not full."""
    i, j, tensors = edges_of(name, dtype)
    kernels, function = (chosen._derivatives(form, i, j, tensors, None) for form in forms(name))
    for what, ours in kernels.items():
        for one, other in zip(ours, function[what], strict=True):
            assert other.any() and one.dtype == other.dtype
            limit = 1e-10 if dtype == torch.float64 else 3e-6
            torch.testing.assert_close(one, other, rtol=limit, atol=limit * float(other.abs().max()))


@pytest.mark.full
@pytest.mark.parametrize("name", FUNCTIONS)
def test_several_gradients_of_one_pass_may_be_differentiated(name):
    """As those of several tasks that share structures are; and none that the outputs' own gradient does not reach."""
    found = []
    for form in forms(name):
        i, j, tensors = edges_of(name, torch.float64, 6, 3)
        inputs = [x.requires_grad_() for part in tensors for x in part]
        outputs = form(i, j, *tensors)
        slopes = [torch.autograd.grad(x.sum() ** 2, inputs[:2], create_graph=True) for x in outputs]
        total = sum(x.square().sum() for parts in slopes for x in parts)
        found.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("atoms", [0, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_edges_and_no_atoms(name, atoms):
    i, j, tensors = edges_of(name, torch.float64, 0, atoms)
    with torch.inference_mode():
        assert len(forms(name)[0](i.clone(), j.clone(), *tensors)[0]) == atoms
    kernels, function = (chosen._derivatives(form, i, j, tensors, None) for form in forms(name))
    for what, ours in kernels.items():
        for one, other in zip(ours, function[what], strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("name", FIRST)
def test_products_in_bf16_are_no_farther_off_than_torchs(name):
    i, j, tensors = edges_of(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen.compare(*forms(name), i, j, tensors) is None


@pytest.mark.full
@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_has_the_same_predictions_and_gradients(name, forces, on_cpu, monkeypatch):
    """A molecule, a crystal whose atoms see themselves, an atom alone; stresses; layers that are computed again."""
    called = []
    monkeypatch.setitem(FASTER, FUNCTIONS[name], [counted(FASTER[FUNCTIONS[name]][0], called)])
    model = potential_with(small(name), forces).train()
    batch, other = batch_of(system(4), system(2, skewed(3.5)), system(1)), copy.deepcopy(model)
    model.encoder.recompute = True
    ours = model(batch, stress=True)["a"]
    assert called, "no edge was computed by a kernel"
    loss(ours, batch).backward()
    monkeypatch.setitem(FASTER, FUNCTIONS[name], [])
    theirs = other(batch, stress=True)["a"]
    loss(theirs, batch).backward()
    assert_alike(ours, theirs)
    gradients = dict(other.named_parameters())
    for parameter, p in model.named_parameters():
        if gradients[parameter].grad is not None:
            assert_close(p.grad, gradients[parameter].grad, TIGHT)


def counted(form, called):
    def run(*arguments):
        called.append(1)
        return form.run(*arguments)

    return replace(form, run=run)


@pytest.mark.parametrize("name", FIRST)
def test_kernels_that_are_wrong_are_not_used(name, on_cpu, monkeypatch):
    """By a percent in one output: a warning, and torch's numbers."""
    module = importlib.import_module(f"multifid.model.kernels.gpu.{name}")
    right = module.messages
    monkeypatch.setattr(module, "messages", lambda *x: (*right(*x)[:-1], 1.01 * right(*x)[-1]))
    i, j, tensors = edges_of(name, torch.float32)
    with pytest.warns(UserWarning, match="their values are off by"), torch.inference_mode():
        inside = [[x.clone() for x in part] for part in tensors]
        found = FASTER[FUNCTIONS[name]][0].run([slice(0, EDGES)], i.clone(), j.clone(), *inside)
    expected = forms(name)[1](i, j, *tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_weights_are_made_where_they_are_asked_for(name, monkeypatch):
    """Not in the backward pass that gives forces."""
    wanted, asked = twice._weights_wanted, []
    monkeypatch.setattr(twice, "_weights_wanted", lambda *x: asked.append(wanted(*x)) or asked[-1])
    i, j, (receivers, senders, edges, weights) = edges_of(name, torch.float64)
    inputs = [x.requires_grad_() for part in (receivers, senders, edges, weights) for x in part]
    energy = sum(x.square().sum() for x in forms(name)[0](i, j, receivers, senders, edges, [w * 1.0 for w in weights]))
    torch.autograd.grad(energy, inputs[:2], create_graph=True)
    energy.backward()
    assert asked == [False, True] and all(x.grad is not None for x in inputs)


def test_derivatives_that_kernels_have_not_are_errors():
    i, j, tensors = edges_of("egnn", torch.float64)
    inputs = [x.requires_grad_() for part in tensors for x in part]
    kernels, _ = forms("egnn")

    def energy():
        return sum(x.square().sum() for x in kernels(i, j, *tensors))

    (slope,) = torch.autograd.grad(energy(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad(slope.sum(), inputs[1:2], create_graph=True)
    with pytest.raises(RuntimeError, match="BatchedTensor"):
        (outputs, _), each = kernels(i, j, *tensors), torch.ones(2, ATOMS, HIDDEN, dtype=torch.float64)
        torch.autograd.grad(outputs, inputs[:1], each, is_grads_batched=True)
    with pytest.raises(RuntimeError, match="must ascend"):
        kernels(i.flip(0), j, *tensors)
    (slope,) = torch.autograd.grad(energy(), inputs[-2:-1], create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of gradients of weights"):
        slope.sum().backward()
