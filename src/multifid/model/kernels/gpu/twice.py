"""Functions of edges whose two derivatives are written out: what autograd is told of them.

Forces that are minus the gradient of the energy are, while training, differentiated once more: for a backward pass
B(x, G), with inputs x and a gradient G of the outputs, the derivative along V of its results is wanted. Seen as numbers
with tangents, x + t V and G + t g:

    gradient for G      the tangent of the forward pass, with the seed V                           `Rules.tangents`
    gradient for x      the tangent of the backward pass, with the seeds V and g                   `Rules.dual`

where g is the gradient that reaches the outputs themselves. One dual backward pass takes both: V waits (`Waiting`)
until g is complete. So a conservative training step has no more matrix products than autograd makes, three quarters of
what two passes would make.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multifid.model.kernels.engine import goes_on_with

Tensors = tuple[Tensor, ...]
Found = tuple[Tensor | None, ...]  # None: of no use to anyone
INSTEAD = "set train.kernels: eager, or use_kernels(False)"


class Pass(NamedTuple):
    """What a pass is of."""

    kind: torch.dtype  # of products
    i: Tensor  # (E,) receivers, ascending
    j: Tensor  # (E,) senders
    tensors: Tensors  # values of atoms and edges, then weights


class Waiting(NamedTuple):
    """A backward pass whose results were differentiated, until the forward pass is."""

    slopes: Tensors  # gradients of the outputs
    between: Tensors  # gradients of numbers on the way
    along: Tensors  # V
    tangents: Tensors  # of what is kept, along V


class Rules(NamedTuple):
    """A function of edges and its derivatives."""

    name: str
    values: int  # so many tensors are no weights
    # -> outputs, and what is kept
    forward: Callable[[Pass], tuple[Tensors, Tensors]]
    # (pass, kept, slopes, whether gradients of weights are wanted) -> gradients of all tensors, `between`
    backward: Callable[[Pass, Tensors, Tensors, bool], tuple[Found, Tensors]]
    # (pass, kept, along) -> tangents of the outputs and of what is kept
    tangents: Callable[[Pass, Tensors, Tensors], tuple[Tensors, Tensors]]
    # (pass, kept, waiting, tangents of the slopes) -> tangents of the gradients of all tensors
    dual: Callable[[Pass, Tensors, Waiting, Tensors], Found]


def run(rules: Rules, kind: torch.dtype, i: Tensor, j: Tensor, tensors: Sequence[Tensor]) -> Tensors:
    """The outputs, differentiable twice, but for second derivatives that go through gradients of weights."""
    return _Forward.apply(rules, kind, i, j, *(x.contiguous() for x in tensors))[:-1]


class _Forward(torch.autograd.Function):
    """The outputs and a number without meaning, through which a differentiated backward pass is heard of."""

    @staticmethod
    def forward(ctx, rules, kind, i, j, *tensors):  # type: ignore[no-untyped-def]
        with _types_as_written(i):
            outputs, kept = rules.forward(Pass(kind, i, j, tensors))
        token = torch.zeros(())
        ctx.save_for_backward(i, j, *tensors, *kept, token)
        ctx.rules, ctx.kind, ctx.count, ctx.waiting = rules, kind, len(tensors), []
        ctx.like = [(x.shape, x.dtype) for x in outputs]
        ctx.set_materialize_grads(False)
        return *outputs, token

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        i, j, *saved, token = ctx.saved_tensors
        detached = tuple(x.detach() for x in saved)
        of, kept, heard = Pass(ctx.kind, i, j, detached[: ctx.count]), detached[ctx.count :], gradients[-1]
        slopes = tuple(
            torch.zeros(shape, dtype=dtype, device=i.device) if g is None else g.contiguous()
            for g, (shape, dtype) in zip(gradients[:-1], ctx.like, strict=True)
        )
        nothing = None, None, None, None
        if torch.is_grad_enabled():
            if heard is not None:
                raise RuntimeError(f"fused edges of {ctx.rules.name} have no third derivative; {INSTEAD}")
            weights = _weights_wanted(ctx, 2 + ctx.rules.values)
            return *nothing, *_Backward.apply(ctx.rules, of, kept, ctx.waiting, weights, token, *slopes)
        waiting, ctx.waiting[:] = list(ctx.waiting), []
        if len(waiting) != (0 if heard is None else int(heard)):
            raise RuntimeError(f"a derivative of fused edges of {ctx.rules.name} was left half done; {INSTEAD}")
        if not waiting:
            with _types_as_written(i):
                found, _ = ctx.rules.backward(of, kept, slopes, _weights_wanted(ctx, 2 + ctx.rules.values))
            return *nothing, *found
        # The outputs' own gradients go with the first of several backward passes.
        with _types_as_written(i):
            each = [ctx.rules.dual(of, kept, waiting[0], slopes)]
            each += [ctx.rules.dual(of, kept, more, tuple(map(torch.zeros_like, slopes))) for more in waiting[1:]]
        return *nothing, *(
            torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0] for parts in zip(*each, strict=True)
        )


class _Backward(torch.autograd.Function):
    """The gradients that `_Forward` has, differentiable."""

    @staticmethod
    def forward(ctx, rules, of, kept, waiting, weights, token, *slopes):  # type: ignore[no-untyped-def]
        with _types_as_written(of.i):
            found, between = rules.backward(of, kept, slopes, weights)
        ctx.save_for_backward(of.i, of.j, *of.tensors, *kept, *slopes, *between)
        ctx.rules, ctx.kind, ctx.waiting = rules, of.kind, waiting
        ctx.counts = len(of.tensors), len(kept), len(slopes), len(between)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *along):  # type: ignore[no-untyped-def]
        rules = ctx.rules
        if any(v is not None for v in along[rules.values :]):
            raise RuntimeError(f"fused edges of {rules.name} have no derivative of gradients of weights; {INSTEAD}")
        i, j, *rest = ctx.saved_tensors
        tensors, kept, slopes, between = (tuple(rest[sum(ctx.counts[:n]) : sum(ctx.counts[: n + 1])]) for n in range(4))
        of = Pass(ctx.kind, i, j, tensors)
        seeds = tuple(
            torch.zeros_like(x) if v is None else v.contiguous()
            for v, x in zip(along[: rules.values], tensors[: rules.values], strict=True)
        )
        with _types_as_written(i):
            outputs, tangents = rules.tangents(of, kept, seeds)
        ctx.waiting.append(Waiting(slopes, between, seeds, tangents))
        return *[None] * 5, torch.ones(()), *outputs


def _types_as_written(x: Tensor) -> torch.autocast:
    """Autocast, which a backward pass may be in too, changes no product."""
    return torch.autocast(x.device.type, enabled=False)


def _weights_wanted(ctx: Any, first: int) -> bool:
    """Whether this backward pass goes to weights: not where only forces are asked for."""
    return any(goes_on_with(node) for node, _ in ctx.next_functions[first:])
