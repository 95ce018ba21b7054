"""What autograd is told of a function in C++: values, gradients, and gradients of gradients.

    values                outputs; differentiable
      backward            gradients; by `gradients`, where they are differentiated in turn (forces, while training)
    gradients             differentiable, once
      backward            hands its direction on to the backward pass of `values`, which then takes both at once

Energies and forces need the backward pass through the same products: gradients of the loss with respect to energies
and to forces meet before every product, so that a training step with forces that are a gradient has six products of
matrices where a step with direct ones has three. `values` therefore has one more output, that says nothing, so that
the backward pass of `gradients` comes before its own.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, get_unwrapped, is_batchedtensor, maybe_get_bdim, maybe_get_level
from torch._utils import _unflatten_dense_tensors

from multifid.model.kernels.engine import goes_on_with
from multifid.model.kernels.native.build import library

FORWARD, BACKWARD, TANGENT, AGAIN = range(4)
TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
}  # of products of matrices, as native/kernels.cpp has them

Tensors = Mapping[str, Tensor | None]


class Layout:
    """A structure in C: so many whole numbers, other numbers, and addresses of arrays, 0 for absent ones."""

    def __init__(self, whole: int, other: int, arrays: Sequence[str]) -> None:
        self._numbers = Struct("q" * whole + "d" * other)
        self._places = {name: place for place, name in enumerate(arrays)}
        self._nothing = array("Q", bytes(8 * len(arrays)))

    def pack(self, numbers: Sequence[int | float], arrays: Tensors) -> bytes:
        addresses = self._nothing[:]
        for name, x in arrays.items():
            if x is not None:
                addresses[self._places[name]] = x.data_ptr()
        return self._numbers.pack(*numbers) + addresses.tobytes()


@dataclass
class Layer(ABC):
    """One call of a function: what it is about beside its differentiable inputs, and the arrays that it needs.

    Names are those of the C structure: `x` of an input; `g_x` of its gradient, `d_x` of its direction; of an output `y`
    `sum_y`, its gradient `G_y`, its change `d_sum_y`, and `N_y`, the gradient in the second backward pass.
    """

    function: ClassVar[str]  # in the library
    written: ClassVar[tuple[str, ...]] = ()  # inputs whose gradients it writes, where it adds to others
    layout: ClassVar["Layout"]  # of what C is given
    outputs: tuple[str, ...]
    names: tuple[str, ...]  # of the inputs, in order
    weights: tuple[str, ...]  # those of them that gradients of all or of none are made of
    always: tuple[str, ...]  # those whose gradients and directions are never missing
    type: int
    # What `gradients` left for the backward pass of `values`, and in which backward pass.
    left: dict[str, Tensor | None] = field(default_factory=dict, init=False)
    left_in: int = field(default=-1, init=False)

    @abstractmethod
    def numbers(self, tensors: Tensors) -> Sequence[int | float]:
        """Whole numbers that C is given, then others."""

    @abstractmethod
    def sums(self, tensors: Tensors) -> list[Tensor]:
        """Arrays of zeros for the outputs."""

    def kept(self, tensors: Tensors) -> dict[str, Tensor]:
        """Arrays for what is kept for the backward pass; none, unless a layer says so."""
        return {}

    def back(self, known: Tensors) -> dict[str, Tensor]:
        """Arrays for what the backward pass keeps for the second one, or none; known: inputs, and what is kept."""
        return {}

    def changes(self, kept: Tensors) -> dict[str, Tensor]:
        """Arrays for the changes of what is kept, under the names that C has for them."""
        return {}

    @abstractmethod
    def plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs, in torch."""

    @property
    def kept_type(self) -> torch.dtype | None:
        """The type of wide arrays that are kept; None: that of the inputs."""
        return torch.bfloat16 if self.type >= TYPES[torch.bfloat16] else None

    def named(self, inputs: Sequence[Tensor | None]) -> Tensors:
        return dict(zip(self.names, inputs, strict=True))

    def of_outputs(self, prefix: str, tensors: Sequence[Tensor | None]) -> Tensors:
        return {prefix + name: x for name, x in zip(self.outputs, tensors, strict=True)}

    def gradients(self, tensors: Tensors, wanted: Sequence[str], many: int | None = None) -> dict[str, Tensor]:
        """Zeros for the gradients of inputs, anything where C writes them; many: for so many of each, (many, ...)."""
        weights = self.weights if any(name in wanted for name in self.weights) else ()
        names = [x for x in self.names if x in weights or x in self.always or (x in wanted and x not in self.weights)]
        found: dict[str, Tensor] = {}
        for written in (False, True):
            like = {name: x for name in names if (name in self.written) == written and (x := tensors[name]) is not None}
            shapes = [x if many is None else x.expand(many, *x.shape) for x in like.values()]
            if shapes:
                size, make = sum(x.numel() for x in shapes), shapes[0].new_empty if written else shapes[0].new_zeros
                parts = _unflatten_dense_tensors(make(size), shapes)
                found |= {f"g_{name}": part for name, part in zip(like, parts, strict=True)}
        return found

    def call(self, what: int, arrays: Tensors, each: Sequence[Tensors] = ({},)) -> None:
        """Run one of the four functions over arrays; over those without memory, nothing.

        each: of many backward passes, the arrays that they do not have in common.
        """
        first = arrays[self.names[0]]
        if first is not None and first.is_meta:
            return
        made = library()
        assert made is not None
        numbers = self.numbers(arrays)
        calls = [self.layout.pack(numbers, {**arrays, **more}) for more in each]
        getattr(made, self.function)(b"".join(calls), what, len(calls))


def apply(layer: Layer, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a layer for contiguous inputs; differentiable, twice by C++ and further by torch."""
    *outputs, _ = _Values.apply(layer, *inputs)
    return outputs


def _executed(ctx: Any, names: Sequence[str]) -> list[str]:
    """Those of the inputs whose gradients this backward pass goes on with."""
    return [name for name, (node, _) in zip(names, ctx.next_functions, strict=True) if goes_on_with(node)]


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = layer.named(inputs)
        kept = layer.kept(tensors) if any(ctx.needs_input_grad) else {}
        sums = layer.sums(tensors)
        layer.call(FORWARD, {**tensors, **kept, **layer.of_outputs("sum_", sums)})
        order = inputs[0].new_zeros(())
        ctx.layer, ctx.given, ctx.kept = layer, len(inputs), tuple(kept)
        ctx.save_for_backward(*inputs, order, *kept.values())
        return (*sums, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given: Sequence[Tensor] = gradients[:-1]
        layer, saved = ctx.layer, ctx.saved_tensors  # asked for once, as recomputation wants it
        inputs, token, kept = saved[: ctx.given], saved[ctx.given], saved[ctx.given + 1 :]
        tensors = layer.named(inputs)
        wanted = _executed(ctx, layer.names)
        if torch.is_grad_enabled():
            if any(name in layer.weights for name in wanted):
                return (None, *_by_torch(layer, inputs, given, wanted))
            found = _Gradients.apply(layer, tuple(wanted), ctx.kept, token, *given, *kept, *inputs)
            return (None, *(dict(zip(wanted, found, strict=True)).get(name) for name in layer.names))
        known = {**tensors, **dict(zip(ctx.kept, kept, strict=True))}
        if any(map(is_batchedtensor, given)):
            return (None, *_of_many(layer, wanted, known, given))
        g = layer.gradients(tensors, wanted)
        arrays = {**known, **g}
        given = [x.contiguous() for x in given]
        if layer.left and layer.left_in == torch._C._current_graph_task_id():
            layer.call(AGAIN, {**arrays, **layer.left, **layer.of_outputs("N_", given)})
        else:
            layer.call(BACKWARD, {**arrays, **layer.of_outputs("G_", given)})
        layer.left = {}
        return (None, *(g.get(f"g_{name}") if name in wanted else None for name in layer.names))


def _of_many(layer: Layer, wanted: Sequence[str], known: Tensors, given: Sequence[Tensor]) -> list[Tensor | None]:
    """The backward pass of `_Values` for the many gradients of its outputs that `torch.vmap` has, in one call.

    They are taken out of its wrappings here: telling it how a function is batched costs half a millisecond a call.
    """
    rows = [get_unwrapped(x).movedim(maybe_get_bdim(x), 0) if is_batchedtensor(x) else x[None] for x in given]
    if any(map(is_batchedtensor, rows)):
        raise RuntimeError("one batch of gradients, not batches of batches")
    many, level = max(x.shape[0] for x in rows), max(map(maybe_get_level, given))
    g = layer.gradients(known, wanted, many)
    each = {**layer.of_outputs("G_", [x.contiguous().expand(many, *x.shape[1:]) for x in rows]), **g}
    of_each = zip(*(x.unbind() for x in each.values() if x is not None), strict=True)
    layer.call(BACKWARD, known, [dict(zip(each, parts, strict=True)) for parts in of_each])
    return [_add_batch_dim(g[f"g_{name}"], 0, level) if name in wanted else None for name in layer.names]


class _Gradients(torch.autograd.Function):
    """The backward pass of `_Values` for gradients of inputs that are differentiated in turn."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, wanted: tuple[str, ...], names: tuple[str, ...], token: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, ends = len(layer.outputs), len(layer.outputs) + len(names)
        given, inputs = [x.contiguous() for x in rest[:outputs]], rest[ends:]
        kept = dict(zip(names, rest[outputs:ends], strict=True))
        tensors = layer.named(inputs)
        g, back = layer.gradients(tensors, wanted), layer.back({**tensors, **kept})
        layer.call(BACKWARD, {**tensors, **kept, **layer.of_outputs("G_", given), **g, **back})
        ctx.layer, ctx.wanted, ctx.kept, ctx.back = layer, wanted, names, tuple(back)
        ctx.save_for_backward(*given, *kept.values(), *inputs, *back.values())
        return tuple(g[f"g_{name}"] for name in wanted)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        layer, saved, outputs = ctx.layer, ctx.saved_tensors, len(ctx.layer.outputs)
        ends = outputs + len(ctx.kept), outputs + len(ctx.kept) + len(layer.names)
        given, inputs = saved[:outputs], saved[ends[0] : ends[1]]
        kept = dict(zip(ctx.kept, saved[outputs : ends[0]], strict=True))
        tensors = layer.named(inputs)
        if torch.is_grad_enabled():  # third derivatives
            found = _twice_by_torch(layer, ctx.wanted, given, inputs, directions)
            return (None, None, None, None, *found[:outputs], *[None] * len(kept), *found[outputs:])
        direction = {f"d_{name}": x.contiguous() for name, x in zip(ctx.wanted, directions, strict=True)}
        missing = [name for name in layer.always if name not in ctx.wanted]
        direction |= {f"d_{name}": torch.zeros_like(tensors[name]) for name in missing}  # type: ignore[arg-type]
        direction |= layer.changes(kept)
        sums = layer.sums(tensors)
        arrays = {**tensors, **kept, **direction}
        layer.call(TANGENT, {**arrays, **layer.of_outputs("d_sum_", sums)})
        back = dict(zip(ctx.back, saved[ends[1] :], strict=True))
        given = [x.detach() for x in given]  # what waits must not hold the graph that holds it
        left = {**direction, **layer.of_outputs("G_", given), **back}
        none: list[Tensor | None] = [None] * len(inputs)
        task = torch._C._current_graph_task_id()
        if not goes_on_with(ctx.next_functions[0][0]):  # `values` is not asked: only gradients behind it are
            pass
        elif not (layer.left and layer.left_in == task):
            layer.left, layer.left_in = left, task
        else:  # two gradients of the same values: only one of them can wait
            g, zeros = layer.gradients(tensors, layer.names), [torch.zeros_like(x) for x in sums]
            layer.call(AGAIN, {**arrays, **left, **g, **layer.of_outputs("N_", zeros)})
            none = [g[f"g_{name}"] for name in layer.names]
        return (None, None, None, inputs[0].new_zeros(()), *sums, *[None] * len(kept), *none)


def _differentiable(outputs: Any, inputs: Any, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, given, create_graph=True, materialize_grads=True, allow_unused=True)


def _by_torch(
    layer: Layer, inputs: Sequence[Tensor], given: Sequence[Tensor], wanted: Sequence[str]
) -> list[Tensor | None]:
    """Gradients that are differentiable in everything."""
    tensors = layer.named(inputs)
    found = _differentiable(layer.plain(inputs), [tensors[n] for n in wanted], given)
    by_name = dict(zip(wanted, found, strict=True))
    return [by_name.get(name) for name in layer.names]


def _twice_by_torch(
    layer: Layer,
    wanted: Sequence[str],
    given: Sequence[Tensor],
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of gradients, with respect to those of the outputs and to inputs, differentiable in everything."""
    first = dict(zip(layer.names, _by_torch(layer, inputs, given, wanted), strict=True))
    of = [*given, *inputs]
    reached = [x for x in of if x.requires_grad]
    found = _differentiable([first[name] for name in wanted], reached, directions)
    by_id = {id(x): g for x, g in zip(reached, found, strict=True)}
    return [by_id.get(id(x)) for x in of]
