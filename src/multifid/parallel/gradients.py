"""Sums of gradients: the encoder's over the world, each branch's over its group, while the backward pass still runs.

Gradients live in flat buckets that are reduced in place; `parameter.grad` is a view. A bucket is launched when its last
gradient has arrived, but never before the buckets ahead of it: all ranks launch in one order (branches by name, then
the encoder, buckets in reverse order of construction), because the order of arrival differs between ranks, and two
ranks that swap two reductions of equal shape get wrong sums without any error. A bucket that is ready early waits.

    backward of rank 0      force head of a | energy head of a | layer 2 | layer 1 | ...
    reductions of rank 0                     a, bucket 0, 1 ...            encoder, bucket 0, 1 ...
    reductions of rank 1                     b, bucket 0, 1 ...            encoder, bucket 0, 1 ...

The hooks are post-accumulate hooks of the leaves. In a backward pass each fires at most once, also through a double
backward (forces that are minus the gradient of the energy). What it will not reach is read from the graph before it
begins, and launched at once with its zeros: branches without a structure here, a force head where no structure has
forces, what conservative forces leave unused in the last layer of an encoder. Nothing behind them waits for the end.
An encoder in pieces has no buckets: see `shard.py`, also for when those of branches leave then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from multifid.parallel.groups import Group
from multifid.parallel.shard import Shards

BUCKET_BYTES = 25 << 20  # large enough for the bandwidth of a network, small enough to start early


@dataclass(frozen=True)
class ModelPart:
    """Parameters that are reduced over one group: the encoder or a branch, in order of construction."""

    name: str
    parameters: list[nn.Parameter]
    group: Group
    shards: Shards | None = None  # the parameters are pieces, which have a way of their own to be summed


@dataclass
class Bucket:
    """Gradients that travel together."""

    part: str
    group: Group
    flat: Tensor
    members: list[nn.Parameter]
    missing: int = 0  # gradients that have not yet arrived in this backward pass
    work: dist.Work | None = None


class Gradients:
    """The gradients of the parts that live on this rank, given in the global order."""

    def __init__(self, parts: Sequence[ModelPart], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.parts = list(parts)
        self.buckets = [b for part in parts if part.shards is None for b in self._fill(part, bucket_bytes)]
        # Sums over a group of one are there already: nobody has to hear when its gradients arrive.
        self.travelling = [bucket for bucket in self.buckets if bucket.group.travels]
        self.shards = next((part.shards for part in parts if part.shards is not None), None)
        if self.shards is not None:
            self.shards.before_encoder = self._launch_all
        self._next: int | None = None  # the bucket to launch next; None: not reducing

    def _fill(self, part: ModelPart, bucket_bytes: int) -> list[Bucket]:
        """Buckets of at most `bucket_bytes` (or one larger parameter), the last constructed parameters first."""
        buckets: list[Bucket] = []
        members: list[nn.Parameter] = []
        for i, parameter in enumerate(reversed(part.parameters)):
            members.append(parameter)
            following = part.parameters[-2 - i] if i + 1 < len(part.parameters) else None
            if following is None or sum(p.nbytes for p in members) + following.nbytes > bucket_bytes:
                buckets.append(self._bucket(part, members))
                members = []
        return buckets

    def _bucket(self, part: ModelPart, members: list[nn.Parameter]) -> Bucket:
        flat = members[0].new_zeros(sum(p.numel() for p in members)).detach()
        bucket = Bucket(part.name, part.group, flat, list(members))
        arrived = _weakly(self, bucket)
        for parameter, piece in zip(members, flat.split([p.numel() for p in members]), strict=True):
            parameter.grad = piece.view_as(parameter)  # zero, not None: every placement decays and moves alike
            if part.group.travels:
                parameter.register_post_accumulate_grad_hook(arrived)
        return bucket

    def zero(self) -> None:
        """Forget the gradients of the step before."""
        if self.buckets:
            torch._foreach_zero_([bucket.flat for bucket in self.buckets])
        if self.shards is not None:
            self.shards.zero()

    def start(self, loss: Tensor | None) -> None:
        """Begin to reduce: the next backward pass, from `loss`, is the last one of the step; None: there is none here.

        What it cannot reach is not waited for. Ranks differ in that; the order of launches is the same on all.
        """
        expected = reached_from(loss) if self.travelling else set()
        for bucket in self.travelling:
            bucket.missing = sum(id(p) in expected for p in bucket.members)
        self._next = 0
        if self.shards is not None:
            self.shards.start()
        self._launch_ready()

    def _arrived(self, bucket: Bucket) -> None:
        if self._next is None:
            return  # a micro-batch before the last: more is to come
        assert bucket.missing > 0, f"a gradient of {bucket.part} arrived twice, or was not expected"
        bucket.missing -= 1
        self._launch_ready()

    def _launch_ready(self) -> None:
        assert self._next is not None
        while self._next < len(self.travelling) and self.travelling[self._next].missing == 0:
            bucket = self.travelling[self._next]
            bucket.work = bucket.group.sum_later(bucket.flat)
            self._next += 1

    def _launch_all(self) -> None:
        """Launch what is left: whatever of it has not arrived never will."""
        for bucket in self.travelling:
            bucket.missing = 0
        self._launch_ready()

    def finish(self) -> None:
        """Launch what is left and wait until all sums are there."""
        self._launch_all()
        if self.shards is not None:
            self.shards.finish()
        for bucket in self.travelling:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
        self._next = None

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared norm over all parts, wherever they live: float64, no dimension.

        Every part counts once, on the first rank of its group; pieces count where they lie. Summed over the world it is
        the squared norm.
        """
        flats = self._flats()
        mine = [flat for flat, counts in flats if counts]
        norms = torch._foreach_norm(mine) if mine else []
        device = flats[0][0].device if flats else None  # none where nothing that lives here moves
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack([zero, *(norm.double().square() for norm in norms)]).sum()

    def _flats(self) -> list[tuple[Tensor, bool]]:
        """All gradients of this rank, and whether they count for their groups."""
        pieces = [] if self.shards is None else self.shards.gradients()
        return [(bucket.flat, bucket.group.first) for bucket in self.buckets] + [(piece, True) for piece in pieces]


def _weakly(gradients: Gradients, bucket: Bucket) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive.

    Python's garbage collector does not see what hooks of parameters hold: through a cycle with the parameters, models
    and process groups, with their threads, would stay until the process ends.
    """
    all_of, one = ref(gradients), ref(bucket)

    def arrived(_: Tensor) -> None:
        if (found := all_of()) is not None and (full := one()) is not None:
            found._arrived(full)

    return arrived


def reached_from(loss: Tensor | None) -> set[int]:
    """The leaves, by `id`, that a backward pass from `loss` gives a gradient (or may: some functions give none)."""
    todo = [] if loss is None or loss.grad_fn is None else [loss.grad_fn]
    seen = set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                todo.append(node)
    return {id(node.variable) for node in seen if not node.next_functions and hasattr(node, "variable")}
