"""The edges of a layer of EGNN as operations of compiled code (`egnn.cpp`)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from multifid.model.kernels.egnn import EdgeWeights
from multifid.model.kernels.egnn_native import INPUTS, OUTPUTS, Channels, Edges
from multifid.model.kernels.native.twice import BACKWARD, FORWARD, TYPES

KEPT = ("first", "second", "third", "gates", "phi")
TAKEN = ("i", "j", *INPUTS, *EdgeWeights._fields)


def edges(i: Tensor, j: Tensor, per_area: float, angles: bool, inputs: Sequence[Tensor], weights: EdgeWeights) -> Any:
    """What `egnn_native.edges` gives, of the same arguments."""
    declare()
    vectors = inputs[2].shape[1]
    channels = Channels(vectors, weights.weight.shape[0] - vectors, inputs[4].shape[1], angles)
    given = channels.given(inputs, weights)
    if len(inputs) < len(INPUTS):
        given.insert(len(inputs), inputs[3].new_zeros((0, 5)))  # no tensors, no harmonics
    sums = _Edges.apply(per_area, int(angles), i.contiguous(), j.contiguous(), *given)
    return channels.outputs(sums[: len(inputs) - 4])


@cache
def declare() -> None:
    """Make the operations known to torch: names, arguments, shapes of what they give, and the library's functions."""
    taken = ", ".join(f"Tensor {name}" for name in TAKEN)
    backward = ", ".join(f"Tensor {name}" for name in (*KEPT, *(f"G_{name}" for name in OUTPUTS)))
    numbers = "float per_area, int angles"
    torch.library.define("multifid::multifid_egnn", f"({taken}, {numbers}) -> ({_tensors(len(OUTPUTS) + len(KEPT))})")
    torch.library.define(
        "multifid::multifid_egnn_slopes", f"({taken}, {backward}, {numbers}) -> ({_tensors(len(INPUTS))})"
    )
    torch.library.register_fake("multifid::multifid_egnn", _shapes)
    torch.library.register_fake("multifid::multifid_egnn_slopes", _shapes_of_slopes)
    torch.library.impl("multifid::multifid_egnn", "cpu", _values)
    torch.library.impl("multifid::multifid_egnn_slopes", "cpu", _slopes)


def declarations() -> dict[Any, list[str]]:
    """The functions in C of the operations."""
    declare()
    taken, made = (", ".join(f"AtenTensorHandle {name}" for name in x) for x in (TAKEN, KEPT))
    given = ", ".join(f"AtenTensorHandle G_{name}" for name in OUTPUTS)
    values = ", ".join(f"AtenTensorHandle* made_{name}" for name in (*OUTPUTS, *KEPT))
    slopes = ", ".join(f"AtenTensorHandle* g_{name}" for name in INPUTS)
    numbers, result = "double per_area, int64_t angles", "AOTITorchError aoti_torch_cpu_multifid"
    return {
        torch.ops.multifid.multifid_egnn.default: [f"{result}_egnn({taken}, {numbers}, {values})"],
        torch.ops.multifid.multifid_egnn_slopes.default: [
            f"{result}_egnn_slopes({taken}, {made}, {given}, {numbers}, {slopes})"
        ],
    }


def _tensors(number: int) -> str:
    return ", ".join(["Tensor"] * number)


def _shapes(i: Tensor, j: Tensor, a: Tensor, c: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    edges, (atoms, width), (_, _, vectors), outputs = i.shape[0], a.shape, v.shape, rest[-4].shape[0]
    wide = [a.new_empty(edges, width) for _ in range(3)]
    sums = a.new_empty(atoms, width), a.new_empty(atoms, 3, vectors), a.new_empty(atoms, 5, outputs - vectors)
    return (*sums, *wide, a.new_empty(edges), a.new_empty(edges, outputs))


def _shapes_of_slopes(i: Tensor, j: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in rest[: len(INPUTS)])


def _layer(i: Tensor, j: Tensor, given: Sequence[Tensor], per_area: float, angles: int) -> tuple[Edges, list[Tensor]]:
    """The library's function of the arguments of an operation, and the tensors that it takes."""
    inputs, weights = given[: len(INPUTS)], EdgeWeights(*given[len(INPUTS) :])
    vectors = inputs[2].shape[2]
    channels = Channels(vectors, weights.weight.shape[0] - vectors, inputs[4].shape[1], bool(angles))
    several = len(INPUTS) if channels.tensors else len(INPUTS) - 1
    names, kind = (*INPUTS[:several], *weights._fields), TYPES[inputs[5].dtype]
    layer = Edges(OUTPUTS[: several - 4], names, weights._fields, ("a", "c"), kind, i, j, per_area, channels, None)
    return layer, [*inputs[:several], *weights]


def _values(i: Tensor, j: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    layer, given = _layer(i, j, rest[:-2], *rest[-2:])
    tensors = layer.named(given)
    kept, sums = layer.kept(tensors), layer.sums(tensors)
    layer.call(FORWARD, {**tensors, **kept, **layer.of_outputs("sum_", sums)})
    none = [] if len(sums) == len(OUTPUTS) else [sums[0].new_zeros(sums[0].shape[0], 5, 0)]
    return (*sums, *none, *(kept[name] for name in KEPT))


def _slopes(i: Tensor, j: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    taken = len(TAKEN) - 2
    layer, given = _layer(i, j, rest[:taken], *rest[-2:])
    tensors, kept = layer.named(given), dict(zip(KEPT, rest[taken:], strict=False))
    g = layer.gradients(tensors, [name for name in layer.names if name in INPUTS])
    gradients = rest[taken + len(KEPT) : taken + len(KEPT) + len(layer.outputs)]
    layer.call(BACKWARD, {**tensors, **kept, **layer.of_outputs("G_", gradients), **g})
    return tuple(g.get(f"g_{name}", torch.zeros_like(x)) for name, x in zip(INPUTS, rest, strict=False))


class _Edges(torch.autograd.Function):
    """The operation with its derivative with respect to everything but weights."""

    @staticmethod
    def forward(ctx: Any, per_area: float, angles: int, *given: Tensor) -> tuple[Tensor, ...]:
        made = torch.ops.multifid.multifid_egnn(*given, per_area, angles)
        ctx.numbers = per_area, angles
        ctx.save_for_backward(*given, *made[len(OUTPUTS) :])
        return made[: len(OUTPUTS)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_sums = [x.contiguous() for x in gradients]
        slopes = torch.ops.multifid.multifid_egnn_slopes(*ctx.saved_tensors, *of_sums, *ctx.numbers)
        return (None, None, None, None, *slopes, *[None] * len(EdgeWeights._fields))
