"""The order of data: which structure a task sees at which place, and how many places a step takes.

Every task has its own endless order: pass after pass over its training split, each pass a permutation. The structure
at place `i` is a pure function of (seed, store checksum, task name, i). Neither ranks, workers, placement, epochs nor
the other tasks enter, so resuming is exact anywhere and adding a task leaves the order of the others alone.

The permutation is computed, not stored: a keyed bijection on 0..n-1 (an alternating Feistel network with cycle
walking: Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). A stored permutation would be simpler
and costs 8 bytes per structure, task and rank: 2.9 GB for 359 million structures.
"""

from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

_ROUNDS = 8  # even, so that the two halves end where they began


class SamplingConfig(BaseModel):
    """How the structures of a step are divided among the tasks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exponent: float = Field(0.0, ge=0.0, description="share of a task ~ size^exponent; 0: equal shares, 1: by size")


@dataclass(frozen=True)
class Order:
    """The endless order of one task."""

    seed: int
    checksum: str  # of the store
    task: str
    size: int  # structures of the training split

    def __call__(self, start: int, count: int) -> np.ndarray:
        """Where the places start .. start+count-1 lie in the split's index: (count,) int64 in 0..size-1."""
        places = np.arange(start, start + count, dtype=np.int64)
        passes, within = np.divmod(places, self.size)
        out = np.empty(count, dtype=np.int64)
        for number in np.unique(passes):
            chosen = passes == number
            out[chosen] = permute(within[chosen], self.size, self._keys(int(number)))
        return out

    def _keys(self, number: int) -> np.ndarray:
        text = f"{self.seed}\0{self.checksum}\0{self.task}\0{number}".encode()
        return np.frombuffer(blake2b(text, digest_size=8 * _ROUNDS).digest(), dtype="<u8")


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection on 0..size-1, element by element: (n,) int64 -> (n,) int64.

    The network permutes 0..2^bits-1, the smallest power of two (from 256) that holds `size`; values that fall outside
    walk on until they fall inside.
    """
    bits = max(8, int(size - 1).bit_length())  # in narrower networks some permutations are much rarer than others
    out = _feistel(values.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(out >= size)
    while len(outside):
        out[outside] = _feistel(out[outside], bits, keys)
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
    powers = {t: Fraction(float(sizes[t]) ** sampling.exponent) for t in free}
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
