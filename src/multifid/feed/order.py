"""The order of data: which structure a task sees at which place, and how many places a step takes.

Every task has its own endless order: pass after pass over its training split, each pass a permutation. The structure
at place `i` is a pure function of (seed, content of the store, task name, i), where content is numbers, positions,
cells, labels and splits (`content`). Neither ranks, workers, placement, epochs nor the other tasks enter, so resuming
is exact anywhere and adding a task leaves the order of the others alone; and neither does what a processor or a version
of the package may round otherwise, so that the same files are drawn in the same order everywhere.

The permutation is computed, not stored: a keyed bijection on 0..n-1 (an alternating Feistel network with cycle
walking: Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). A stored permutation would be simpler
and costs 8 bytes per structure, task and rank: 2.9 GB for 359 million structures.

A store that does not fit into memory is drawn in blocks, which a disk reads as fast as it can:

    split's index      | b0 | b1 | b2 | b3 | b4 | b5 | b6 | b7 |r|     turned by a number of structures, cut into blocks
    order of blocks    | b5   b2   b7   b0 | b3   b6   b1   b4  r|     permuted, in windows; the rest r comes last
    order of a pass    | mixed structures  | mixed structures    |     each window's structures permuted

Every structure still comes once in a pass, anywhere in it; but what comes near it is from the blocks of its window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

STRETCH = 4096  # places of a pass that are computed together and kept for the steps to come
_ROUNDS = 8  # even, so that the two halves end where they began


class SamplingConfig(BaseModel):
    """How the structures of a step are divided among the tasks, and in which order they come."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    exponent: float = Field(0.0, ge=0.0, description="share of a task ~ size^exponent; 0: equal shares, 1: by size")
    order: Literal["random", "blocks"] = Field(
        "random", description="of a pass; blocks: for stores that exceed the memory, read in long pieces ahead of time"
    )
    block: int = Field(16384, gt=0, description="order blocks: neighbouring structures that are read together")
    window: int = Field(32, gt=0, description="order blocks: so many blocks from anywhere are mixed with each other")

    def blocks(self) -> "Blocks | None":
        return Blocks(self.block, self.window) if self.order == "blocks" else None


@dataclass(frozen=True)
class Blocks:
    """An order in blocks of `block` structures, `window` of which are mixed."""

    block: int
    window: int


@dataclass(frozen=True)
class Order:
    """The endless order of one task."""

    seed: int
    content: str  # of the store: `Content.key`
    task: str
    size: int  # structures of the training split
    blocks: Blocks | None = None  # None: in any order

    def __call__(self, start: int, count: int) -> np.ndarray:
        """Where the places start .. start+count-1 lie in the split's index: (count,) int64 in 0..size-1."""
        out, place, stop = [np.zeros(0, np.int64)], start, start + count
        while place < stop:
            number, within = divmod(place, self.size)
            stretch = within // STRETCH * STRETCH
            part = _stretch(self, number, stretch)[within - stretch : within - stretch + stop - place]
            out.append(part)
            place += len(part)
        return np.concatenate(out)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Of an order in blocks: the parts [first, last) of the split's index that some places need.

        They are those of the windows of the places start .. stop-1, as far as their blocks stand at these places: so
        the pieces of consecutive ranges of places are read once, and all of a window's are there when it begins if
        places are asked for `ahead` of time.
        """
        if self.blocks is None:
            return
        for number in range(start // self.size, -(-stop // self.size)):
            base = number * self.size
            yield from self._cut(number, self.blocks).pieces(max(start - base, 0), min(stop - base, self.size))

    @property
    def ahead(self) -> int:
        """Of an order in blocks: the most structures of a window, so far ahead its blocks must be read."""
        return 0 if self.blocks is None else min(self.size, (self.blocks.window + 1) * self.blocks.block)

    def _cut(self, number: int, blocks: Blocks) -> "_Cut":
        turn = int(self._keys(number, "turn")[0]) % self.size
        return _Cut(self.size, blocks, turn, lambda name: self._keys(number, name))

    def _keys(self, number: int, name: str = "") -> np.ndarray:
        text = f"{self.seed}\0{self.content}\0{self.task}\0{number}" + (f"\0{name}" if name else "")
        return np.frombuffer(blake2b(text.encode(), digest_size=8 * _ROUNDS).digest(), dtype="<u8")


@lru_cache(maxsize=256)
def _stretch(order: Order, number: int, start: int) -> np.ndarray:
    """Some places of a pass from `start`, computed together: for the few of one step it takes ten times as long."""
    places = np.arange(start, min(start + STRETCH, order.size), dtype=np.int64)
    if order.blocks is None:
        return permute(places, order.size, order._keys(number))
    return order._cut(number, order.blocks).permuted(places)


@dataclass(frozen=True)
class _Cut:
    """One pass in blocks. Places, and what lies behind them, are counted within the pass."""

    size: int
    blocks: Blocks
    turn: int  # the first block begins at this place of the split's index
    keys: Callable[[str], np.ndarray]

    @property
    def full(self) -> int:
        """Blocks, without the rest."""
        return self.size // self.blocks.block

    @property
    def windows(self) -> int:
        return max(1, -(-self.full // self.blocks.window))

    def start(self, window: int) -> int:
        """The first place of a window; windows differ by one block at most, and the last one takes the rest."""
        return self.size if window == self.windows else window * self.full // self.windows * self.blocks.block

    def permuted(self, places: np.ndarray) -> np.ndarray:
        """Where the structures at these places of the pass lie in the split's index."""
        position = np.minimum(places // self.blocks.block, max(self.full - 1, 0))
        windows = ((position + 1) * self.windows - 1) // max(self.full, 1)
        mixed = np.empty_like(places)
        for window in np.unique(windows).tolist():
            chosen, first = windows == window, self.start(window)
            size = self.start(window + 1) - first
            mixed[chosen] = first + permute(places[chosen] - first, size, self.keys(f"window {window}"))
        return self._behind(mixed)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of the split's index at the places start .. stop-1 before structures are mixed, block by block."""
        borders = [start, *range((start // self.blocks.block + 1) * self.blocks.block, stop, self.blocks.block), stop]
        for a, b in pairwise(borders):
            first = int(self._behind(np.array([a]))[0])
            yield first, min(first + b - a, self.size)
            if first + b - a > self.size:  # a block that begins at the end of the index and ends at its beginning
                yield 0, first + b - a - self.size

    def _behind(self, places: np.ndarray) -> np.ndarray:
        """Places of the order of blocks to places of the split's index."""
        out = places.copy()
        number, within = np.divmod(places, self.blocks.block)
        whole = number < self.full
        moved = permute(number[whole], self.full, self.keys("blocks")) if whole.any() else number[whole]
        out[whole] = moved * self.blocks.block + within[whole]
        return (out + self.turn) % self.size


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection on 0..size-1, element by element: (n,) int64 -> (n,) int64.

    The network permutes 0..2^bits-1, the smallest power of two (from 256) that holds `size`; values that fall outside
    walk on until they fall inside.
    """
    bits = max(8, int(size - 1).bit_length())  # in narrower networks some permutations are much rarer than others
    if bits == 8:  # most values fall outside: they walk on a list of all
        network = _feistel(np.arange(256, dtype=np.uint64), bits, keys).astype(np.int64)
        return _walk(network[values], size, lambda out: network[out])
    return _walk(_feistel(values.astype(np.uint64), bits, keys), size, lambda out: _feistel(out, bits, keys))


def _walk(out: np.ndarray, size: int, network: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    outside = np.flatnonzero(out >= size)
    while len(outside):
        out[outside] = network(out[outside])
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    low, high = bits // 2, bits - bits // 2  # widths of the right and the left half; they swap every round
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for key in keys:
        mask = np.uint64((1 << high) - 1)
        left, right = right, (left ^ _mix(right + key)) & mask
        low, high = high, low
    return (left << np.uint64(low)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 (Appleby): every input bit reaches every output bit."""
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


@dataclass(frozen=True)
class Draw:
    """Tasks that are drawn together because they live in one store, and how fast."""

    name: str
    tasks: tuple[str, ...]
    order: Order
    rate: Fraction  # structures per step
    base: int = 0  # places drawn before `since`
    since: int = 0  # the step at which this task set and these rates began

    def places(self, step: int) -> tuple[int, int]:
        """First place and number of places of a step. The exact rational rate makes the counts add up for ever."""
        j = step - self.since
        first, last = j * self.rate // 1, (j + 1) * self.rate // 1
        return self.base + int(first), int(last - first)

    @property
    def pass_steps(self) -> int:
        """Steps that complete one pass."""
        return -int(-self.order.size // self.rate)


def rates(
    sizes: dict[str, int], batch: Fraction, sampling: SamplingConfig, per_step: dict[str, float | None]
) -> dict[str, Fraction]:
    """Structures per step of each task: r_t = B size_t^x / sum_u size_u^x with B = batch x number of tasks.

    `per_step` fixes a task's share; the others then divide among them what their number x batch amounts to.
    ValueError if a rate is below one: the task's weight would silently become weight x rate.
    """
    free = [t for t in sizes if per_step.get(t) is None]
    powers = {t: _power(sizes[t], sampling.exponent) for t in free}
    total, budget = sum(powers.values(), Fraction(0)), batch * len(free)
    out = {t: budget * powers[t] / total if t in powers else Fraction(str(per_step[t])) for t in sizes}
    for task, rate in out.items():
        if rate < 1:
            least = f"train.batch of at least {-int(-batch / rate // 1)}, a smaller sampling.exponent"
            raise ValueError(
                f"task {task!r} would get {float(rate):.3g} structures per step, and a step must hold at least one: "
                f"choose {least} or tasks.{task}.per_step"
            )
    return out


def _power(size: int, exponent: float) -> Fraction:
    """size^exponent, rounded to a float: by decimals, since the last bit of a library's power is the processor's."""
    return Fraction(float(Context(prec=40).power(Decimal(size), Decimal(exponent))))
