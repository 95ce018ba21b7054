"""What all ranks must know of a step before its backward pass: the counts that its sums are divided by, and its rounds.

Most of it is arithmetic. Every rank knows which structures a step holds and who processes them, so it knows how many
micro-batches each rank makes; and where the store says that every structure of the train split has a label, it knows
how many labels there are. Then nothing is sent.

Other counts are summed over the ranks, a step ahead: when a batch has been prepared its counts leave, and the step
before it is made while they travel.

    step k - 1  | forward | backward and gradients | report |
    step k             counts on their way                    | forward | ...

A sum that a step has to wait for would cost it 2 (N - 1) messages one after the other (Gloo sums in a ring), which at
a thousand ranks is as long as the step itself.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from multifid.parallel.groups import Group

T = TypeVar("T")


@dataclass(frozen=True)
class Known:
    """What every rank knows of a step without being told; the same on all."""

    counts: np.ndarray  # (tasks, 3) float64: S_t, A_t and V_t of the whole step; NaN where it is not known
    rounds: int | None  # the most micro-batches of a rank; None: not known

    @staticmethod
    def nothing(tasks: int) -> "Known":
        return Known(np.full((tasks, 3), np.nan), None)


class Counts:
    """The counts of a step over all ranks; what is not known of them is on its way from when this is made.

    Made on all ranks, for step after step. own: () -> (tasks, 3) of this rank's batches, asked for where it is needed;
    batches: how many this rank has. ValueError where they are more than all ranks know of.
    """

    def __init__(self, own: Callable[[], np.ndarray], batches: int, known: Known, world: Group) -> None:
        self._known, self._missing = known, np.isnan(known.counts)
        if known.rounds is not None and batches > known.rounds:
            raise ValueError(
                f"{batches} micro-batches on rank {world.rank}, where at most {known.rounds} were expected"
            )
        labels = own()[self._missing] if self._missing.any() else np.zeros(0)
        places = np.zeros(world.size if known.rounds is None else 0)  # one for each rank: the largest of a sum
        places[world.index : world.index + 1] = batches
        self._message = torch.from_numpy(np.concatenate([labels, places]))
        self._work = world.sum_later(self._message) if len(self._message) else None

    @property
    def on_the_way(self) -> bool:
        """Whether other ranks have yet to be heard."""
        return self._work is not None

    def wait(self) -> tuple[torch.Tensor, int]:
        """S_t, A_t, V_t of the whole step (tasks, 3) float64, on the host, and the most micro-batches of a rank."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        told, table = self._message.numpy(), self._known.counts.copy()
        number = int(self._missing.sum())
        table[self._missing] = told[:number]
        rounds = int(told[number:].max()) if self._known.rounds is None else self._known.rounds
        return torch.from_numpy(table), rounds


def announced(steps: Iterable[T], counts_of: Callable[[T], Counts]) -> Iterator[tuple[T, Counts]]:
    """Each step with its counts. Where they have to travel, those of the next step leave before a step is given out.

    For that the next step must have been prepared; where nothing travels, none is waited for.
    """
    waiting: tuple[T, Counts] | None = None
    for step in steps:
        following = (step, counts_of(step))
        if waiting is not None:
            yield waiting
        waiting = following
        if not following[1].on_the_way:
            yield following
            waiting = None
    if waiting is not None:
        yield waiting
