"""What operations ask of a device: arithmetic, memory traffic, kernels, bytes. Counted as they are issued.

Every operation that modules, autograd or an optimizer issue is looked at, in the backward pass too: what it computes
(torch's own formulas of matrix products, convolutions and attention), what it reads and writes, and which storages live
while it runs. The tensors may have no memory (torch's `meta` tensors): nothing needs to be run.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Of decompositions (QR, eigenvectors), for n^3: a few, which take the time of ten times as many in a product. Assumed.
LAPACK = 30.0
DENSE = 10.0  # operations per byte from which a matrix product waits for arithmetic and not for memory


@dataclass
class Work:
    """What was done."""

    flops: float = 0.0  # floating-point operations of large matrix products
    traffic: float = 0.0  # bytes that all other operations read and write
    kernels: float = 0.0  # operations, each of which is launched

    def times(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.traffic * factor, self.kernels * factor)


@dataclass
class Moment:
    """An operation that makes storages, or all of a loop over tiles."""

    name: str  # of the operation; of a loop "tiles of" and the rows that one may have
    live: int  # bytes that live then, at most
    tile: float = math.inf  # rows of a tile, at most: edges, or triplets
    rows: int = 0  # that the loop runs over


class Count(TorchDispatchMode):
    """Counts the operations inside `with`; `work` may be exchanged meanwhile. held: not counted as bytes.

    `moments` are the same for every size of a batch, however many tiles a loop runs over, if it runs over `Tiles`.
    """

    def __init__(self, held: list[Tensor] | None = None) -> None:
        super().__init__()
        self.work = Work()
        self.live = 0  # bytes of the storages that were made meanwhile and are still there
        self.moments: list[Moment] = []
        self.loops: list[Moment] = []  # that are under way, one within the other
        self.known = weakref.WeakSet(t.untyped_storage() for t in held or [])

    @contextmanager
    def apart(self) -> Iterator[Work]:
        """Inside, operations are counted as other work."""
        before, self.work = self.work, Work()
        yield self.work
        self.work = before

    @property
    def most(self) -> int:
        """Bytes that live at the fullest moment."""
        return max((m.live for m in self.moments), default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        fresh = [t for t in made if self._is_new(t)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if fresh or func._schema.is_mutable:  # views launch nothing
            moved = _moved(func.overloadpacket.__name__, given, made) + (0 if made else _written(func, args))
            flops = _flops(func, args, kwargs or {}, out)
            dense = flops >= DENSE * moved
            self.work.flops += flops if dense else 0.0
            self.work.traffic += 0.0 if dense else moved
            self.work.kernels += 1.0
        if fresh:
            self._note(func.overloadpacket.__name__)
        return out

    def _note(self, name: str) -> None:
        if self.loops:
            self.loops[0].live = max(self.loops[0].live, self.live)
        else:
            self.moments.append(Moment(name, self.live))

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return False
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size

        def gone() -> None:
            self.live -= size

        weakref.finalize(storage, gone)
        return True


class Tiles(list[slice]):
    """Pieces of edges or triplets; a loop over them is one moment of a count. most: rows that a piece may have."""

    def __init__(self, pieces: list[slice], most: int, counter: Count):
        super().__init__(pieces)
        self.most, self.counter = most, counter

    def __iter__(self) -> Iterator[slice]:
        loops = self.counter.loops
        if not loops:
            rows = self[-1].stop if self else 0
            self.counter.moments.append(Moment(f"tiles of {self.most}", self.counter.live, self.most, rows))
        loops.append(self.counter.moments[-1])
        try:
            yield from super().__iter__()
        finally:
            loops.pop()


def _moved(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes read and written. Of a table that is read or added to by an index, as many rows as the index has."""
    sizes = [t.numel() * t.element_size() for t in given]
    out = sum(t.numel() * t.element_size() for t in made)
    if "empty" in name:
        return 0
    if name.startswith("new_") or name.endswith("_like"):
        return out
    if name in ("index_select", "index", "gather", "embedding"):
        return sum(sizes[1:]) + 2 * out
    if name in ("index_add_", "index_add"):
        return sum(sizes[1:]) + 2 * sizes[-1]
    return sum(sizes) + out


def _written(func: Any, args: Any) -> int:
    """Bytes of the arguments that an operation writes."""
    own = [value for argument, value in zip(func._schema.arguments, args, strict=False) if argument.is_write]
    return sum(t.numel() * t.element_size() for t in tree_leaves(own) if isinstance(t, Tensor))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Operations, a multiplication and an addition each; 0 for what moves more than it computes."""
    if "linalg" in func.overloadpacket.__name__:
        *batch, rows, columns = args[0].shape
        return LAPACK * math.prod(batch) * rows * columns * min(rows, columns)
    formula = flop_registry.get(func.overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))
