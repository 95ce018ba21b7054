"""A pass over the fields of a store: their type, a sample that stands for all, and a function applied to parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

SAMPLE = 200  # structures on which edges are counted

Fields = Mapping[str, "Sliced"]
Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Sequence[Any]]  # function of arguments, of each


class Sliced(Protocol):
    """The rows of a field, read by slices: of a file (`Rows`) or of several parts (`Joined`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...

    def parts(self, chosen: Sequence[slice], /) -> np.ndarray: ...


def one_by_one(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What the function makes of each of the arguments, in their order; `Workers.each` does the same in processes."""
    return [function(*own) for own in arguments]


def sampled(count: int) -> np.ndarray:
    """Which of the structures of the train split the edges are counted on: at most SAMPLE, spread evenly."""
    return np.unique(np.linspace(0, count - 1, SAMPLE).astype(np.int64))
