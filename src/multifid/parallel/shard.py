"""The encoder in pieces: a rank holds 1/N of every parameter, with its gradient, its moments and its average.

For an encoder that outweighs its branches, or that does not fit beside its own moments. FSDP2 (`fully_shard`) gathers
the weights of a layer when a pass comes to it, and sums and scatters its gradients when the backward pass has left it;
branches live and are reduced as without it (`gradients.py`). Parameters are cut by rows, ceil(rows / N) for each rank,
so the last pieces are smaller or empty.

    forward     gather layer 1 | layer 2 | ... | layer L
    backward                                     branches' buckets, by name | layer L: gather, sum and scatter | L-1 ...

**One order of collectives on all ranks**, by construction. The encoder's own are issued in the order of its code: all
ranks make the same number of rounds, and a rank without structures runs the encoder over no atoms. Every backward pass
goes through all layers, because the zero of `touch` is in its loss. Buckets of branches leave after the forward pass of
the last round and at the latest when the gradient reaches the encoder (`before_encoder`); what has not arrived by then
never will. So on each rank they lie between the encoder's last gather in the forward pass and its first collective in
the backward pass. The encoder's collectives have a process group of their own and never queue behind the buckets.

**Sums.** FSDP2 divides by the number of ranks unless told otherwise (`set_gradient_divide_factor(1.0)`). As everywhere
here, gradients are reduced once, in the last round; before it they stay whole, so that with several micro-batches a
rank holds a whole gradient of the encoder for the length of a step.

**Conservative forces** differentiate the energy within the forward pass and need the layers' weights again in the
backward pass of that: layers stay gathered from the forward pass to the end of the backward pass, and `inner_gradient`
keeps the first derivative from scattering weights or reducing gradients. Then a rank holds the whole weights during a
step, and whole gradients towards its end; moments, average and what is held between steps are pieces all the same.

One rank is a group of one: its piece is the whole, and nothing is done.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from multifid.parallel.groups import Group, World


def shard(encoder: nn.Module, prefix: str, world: World, keep_gathered: bool) -> "Shards | None":
    """Cut a whole encoder into pieces, in place, layer by layer, and move its piece to the device of the rank.

    prefix: of the names of its parameters.  keep_gathered: layers, from the forward pass to the end of the backward
    pass, for conservative forces. None in a world of one rank. Called on all ranks with the same weights.
    """
    if world.size == 1:
        return None
    from torch.distributed.fsdp import fully_shard  # a second to import, which only those pay who need it

    mesh = world.mesh_apart()
    layers = layers_of(encoder)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not keep_gathered)
    fully_shard(encoder, mesh=mesh, reshard_after_forward=False)  # embeddings and norms, needed at both ends of a pass
    return Shards(encoder, [*layers, encoder], prefix, world.group)


class Shards:
    """The pieces of a sharded encoder on this rank."""

    def __init__(self, encoder: Any, modules: list[Any], prefix: str, group: Group) -> None:
        """modules: what `fully_shard` has been applied to, the layers in their order and the encoder."""
        self.encoder, self.group = encoder, group
        self.before_encoder: Callable[[], None] = lambda: None  # called when a gradient is about to enter the encoder
        self._modules = modules
        self._whole = dict(encoder.named_parameters(prefix=prefix))  # as FSDP2 knows them: DTensors
        # Plain tensors in the same memory: what optimizer, averages and norms see of the encoder.
        self.pieces = {name: nn.Parameter(p.detach().to_local()) for name, p in self._whole.items()}
        self._reducing = False
        self._zero: Tensor | None = None
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # plain sums: not every backend has others
        encoder.set_reduce_scatter_unused_params(True)  # what nothing reached counts as zero, as everywhere
        encoder.set_requires_gradient_sync(False)
        encoder.register_forward_hook(self._left)  # after FSDP2's: what that does at a gradient is behind the gate

    def _left(self, encoder: nn.Module, arguments: tuple, output: Any) -> Any:
        """Around the features: a gate for the gradient that comes back, and the zero that carries one."""
        if not (encoder.training and torch.is_grad_enabled()):
            return output
        gated = Gate.apply(lambda: self.before_encoder() if self._reducing else None, *output.tensors())
        self._zero = sum((0.0 * tensor.sum() for tensor in gated), gated[0].new_zeros(()))
        return output.with_tensors(gated)

    def touch(self) -> Tensor:
        """Zero, made of all features of the last forward pass: its gradient goes through all layers."""
        assert self._zero is not None, "no forward pass in training mode since the last call"
        zero, self._zero = self._zero, None
        return zero

    @contextmanager
    def inner_gradient(self) -> Iterator[None]:
        """While forces are taken as a gradient: weights stay gathered, nothing is reduced."""
        self.encoder.set_reshard_after_backward(False)
        self.encoder.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.encoder.set_reshard_after_backward(True)
            self.encoder.set_requires_gradient_sync(self._reducing)

    def start(self) -> None:
        """Reduce: the next backward pass is the last one of the step."""
        self._reducing = True
        self.encoder.set_requires_gradient_sync(True)

    def finish(self) -> None:
        """Hand out the sums: every piece has its gradient."""
        self._reducing = False
        self.encoder.set_requires_gradient_sync(False)
        for name, whole in self._whole.items():
            assert whole.grad is not None, f"{name}: no gradient was reduced"
            self.pieces[name].grad, whole.grad = whole.grad.to_local(), None

    def zero(self) -> None:
        """Forget the gradients of the step before."""
        for piece in self.pieces.values():
            piece.grad = None

    def gradients(self) -> list[Tensor]:
        return [piece.grad for piece in self.pieces.values() if piece.grad is not None]

    def scatter(self) -> None:
        """Give back what a pass without a backward pass has left gathered."""
        for module in self._modules:
            module.reshard()

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's piece of a tensor that has the shape of the whole parameter."""
        rows = rows_of_piece(len(whole), self.group.size)
        return whole[rows * self.group.index : rows * (self.group.index + 1)].clone()

    def whole(self, name: str, piece: Tensor) -> Tensor | None:
        """Pieces of all ranks put together, in host memory of the first rank; None on the others. For all ranks."""
        shape = self._whole[name].shape
        rows = rows_of_piece(shape[0], self.group.size)
        padded = torch.zeros(rows, *shape[1:], dtype=piece.dtype)
        padded[: len(piece)] = piece.detach()
        gathered = self.group.gather(padded)
        return None if gathered is None else gathered.flatten(0, 1)[: shape[0]]


class Gate(torch.autograd.Function):
    """The identity. Its backward pass begins when the gradients of all outputs are there, and calls a function first.

    FSDP2 begins to gather for the backward pass at the first gradient of a feature that it sees, when the branches may
    not yet have all of theirs.
    """

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.then()
        return None, *gradients


def layers_of(encoder: nn.Module) -> list[nn.Module]:
    """The layers of an encoder: what stands in its `ModuleList`s. They take and return tensors, one after the other."""
    return [layer for child in encoder.children() if isinstance(child, nn.ModuleList) for layer in child]


def rows_of_piece(rows: int, ranks: int) -> int:
    """Rows of a parameter on a rank; on the last ranks there are fewer, or none."""
    return -(-rows // ranks)


def elements(shape: Sequence[int], ranks: int) -> int:
    """Numbers in the piece of a parameter on a rank; what the last ranks have less is kept free for them."""
    return rows_of_piece(shape[0], ranks) * math.prod(shape[1:])
