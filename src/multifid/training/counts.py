"""What all ranks must know of a step before its backward pass: the counts that its sums are divided by, and its rounds.

Most of it is arithmetic. Every rank knows which structures a step holds and who processes them, so it knows how many
micro-batches each rank makes; and where the store says that every structure of the train split has a label, it knows
how many labels there are. Then nothing is sent.

Other counts are summed over the ranks, a step ahead: when a batch has been prepared its counts leave, and the step
before it is made while they travel.

    step k - 1  | forward | backward and gradients | report |
    step k             counts on their way                    | forward | ...

A sum that a step has to wait for would cost it 2 (N - 1) messages one after the other on processors (Gloo sums in a
ring), which at a thousand ranks is as long as the step itself. Accelerators sum in trees, and on a stream of their own.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from multifid.parallel.groups import Group

T = TypeVar("T")


@dataclass(frozen=True)
class Known:
    """What every rank knows of a step without being told; the same on all."""

    counts: np.ndarray  # (tasks, 4) float64: S_t, A_t, V_t and P_t of the whole step; NaN where it is not known
    rounds: int | None  # the most micro-batches of a rank; None: not known

    @staticmethod
    def nothing(tasks: int) -> "Known":
        return Known(np.full((tasks, 4), np.nan), None)


def labelled_parts(about: Mapping[str, Any]) -> dict[str, float]:
    """The part of the train split that has a label, by kind: 1, 0, or NaN where the store does not say.

    about: a label set, as the manifest has it.
    """
    complete = about.get("complete", [])  # stores of older versions say nothing
    return {k: 1.0 if k in complete else 0.0 if not n else math.nan for k, n in about["labels"].items()}


class Counts:
    """The counts of a step over all ranks; what is not known of them is on its way from when this is made.

    Made on all ranks, for step after step. own: () -> (tasks, 4) of this rank's batches, asked for where it is needed;
    batches: how many this rank has; device: where the sums will be divided. There the counts are summed too, so that on
    an accelerator the host waits for nothing. ValueError where the batches are more than all ranks know of.
    """

    def __init__(
        self, own: Callable[[], np.ndarray], batches: int, known: Known, world: Group, device: torch.device
    ) -> None:
        if known.rounds is not None and batches > known.rounds:
            raise ValueError(
                f"{batches} micro-batches on rank {world.rank}, where at most {known.rounds} were expected"
            )
        missing = np.isnan(known.counts)
        labels = own()[missing] if missing.any() else np.zeros(0)
        each = np.zeros(world.size if known.rounds is None else 0)  # a place for each rank: the largest of a sum
        each[world.index : world.index + 1] = batches
        self._rounds = known.rounds
        self._table = _moved(np.nan_to_num(known.counts), device)
        self._places = _moved(np.flatnonzero(missing), device)
        self._message = _moved(np.concatenate([labels, each]), device)
        self._work = world.sum_later(self._message) if len(self._message) else None

    @property
    def on_the_way(self) -> bool:
        """Whether the sum over ranks is still under way."""
        return self._work is not None

    def wait(self) -> tuple[Tensor, int]:
        """S_t, A_t, V_t, P_t of the whole step (tasks, 4) float64, on the device, and the most micro-batches of a rank.

        The host waits on a CPU, and where the micro-batches were not known.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        number = len(self._places)
        table = self._table.flatten().index_copy(0, self._places, self._message[:number]).view_as(self._table)
        return table, int(self._message[number:].cpu().numpy().max()) if self._rounds is None else self._rounds


def _moved(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device, to which an accelerator fetches it by itself."""
    here = torch.from_numpy(values)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


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
