"""What all sources share before anything is computed: random numbers of their own, and fair portions."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def new_rng(seed: int, *names: object) -> np.random.Generator:
    """Random numbers that depend on the seed and on what they are for, and not on which process asks."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def portions(total: int, parts: int) -> list[int]:
    """`total` cut into `parts` whole numbers that differ by at most one."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def choose(pool: Sequence[T], wanted: int, rng: np.random.Generator) -> list[T]:
    """`wanted` members of the pool, at least one and at most all, in the order of the pool."""
    places = rng.permutation(len(pool))[: max(1, wanted)]
    return [pool[i] for i in sorted(places)]
