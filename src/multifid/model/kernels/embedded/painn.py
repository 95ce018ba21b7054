"""The edges of a layer of PaiNN as operations of compiled code (`painn.cpp`)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from multifid.model.kernels.native.twice import BACKWARD, FORWARD, TYPES
from multifid.model.kernels.painn_native import INPUTS, Edges, padded

SLOPES = INPUTS[:5]
TAKEN = ("i", "j", *INPUTS)


def edges(i: Tensor, j: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """What `painn_native.edges` gives, of the same arguments."""
    declare()
    channels = inputs[0].shape[2]
    return _Edges.apply(i.contiguous(), j.contiguous(), *padded(inputs))[:, :, :channels]


@cache
def declare() -> None:
    """Make the operations known to torch: names, arguments, shapes of what they give, and the library's functions."""
    taken = ", ".join(f"Tensor {name}" for name in TAKEN)
    torch.library.define("multifid::multifid_painn", f"({taken}) -> Tensor")
    slopes = ", ".join(["Tensor"] * len(SLOPES))
    torch.library.define("multifid::multifid_painn_slopes", f"({taken}, Tensor G_m) -> ({slopes})")
    torch.library.register_fake("multifid::multifid_painn", _shapes)
    torch.library.register_fake("multifid::multifid_painn_slopes", _shapes_of_slopes)
    torch.library.impl("multifid::multifid_painn", "cpu", _values)
    torch.library.impl("multifid::multifid_painn_slopes", "cpu", _slopes)


def declarations() -> dict[Any, list[str]]:
    """The functions in C of the operations."""
    declare()
    taken = ", ".join(f"AtenTensorHandle {name}" for name in TAKEN)
    slopes = ", ".join(f"AtenTensorHandle* g_{name}" for name in SLOPES)
    result = "AOTITorchError aoti_torch_cpu_multifid_painn"
    return {
        torch.ops.multifid.multifid_painn.default: [f"{result}({taken}, AtenTensorHandle* sum_m)"],
        torch.ops.multifid.multifid_painn_slopes.default: [f"{result}_slopes({taken}, AtenTensorHandle G_m, {slopes})"],
    }


def _shapes(i: Tensor, j: Tensor, phi: Tensor, *rest: Tensor) -> Tensor:
    return phi.new_empty(phi.shape[0], 4, phi.shape[2])


def _shapes_of_slopes(i: Tensor, j: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in rest[: len(SLOPES)])


def _layer(i: Tensor, j: Tensor, given: Sequence[Tensor]) -> Edges:
    kind, weights = TYPES[given[0].dtype], INPUTS[5:]
    return Edges(("m",), INPUTS, weights, ("phi", "v"), kind, i, j, given[0].shape[2], None)


def _values(i: Tensor, j: Tensor, *given: Tensor) -> Tensor:
    layer = _layer(i, j, given)
    tensors = layer.named(given)
    (sums,) = layer.sums(tensors)
    layer.call(FORWARD, {**tensors, "sum_m": sums})
    return sums


def _slopes(i: Tensor, j: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    layer = _layer(i, j, given)
    tensors = layer.named(given[:-1])
    g = layer.gradients(tensors, SLOPES)
    layer.call(BACKWARD, {**tensors, "G_m": given[-1], **g})
    return tuple(g[f"g_{name}"] for name in SLOPES)


class _Edges(torch.autograd.Function):
    """The operation with its derivative with respect to everything but the filters' weights."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        return torch.ops.multifid.multifid_painn(*given)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes = torch.ops.multifid.multifid_painn_slopes(*ctx.saved_tensors, gradient.contiguous())
        return (None, None, *slopes, None, None)
