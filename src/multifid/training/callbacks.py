"""Functions of the caller that hear what a run says, and may stop it."""

from collections.abc import Callable, Sequence

import numpy as np

from multifid.training.record import Row

Callback = Callable[[list[Row]], object]


class Callbacks:
    """A recorder that hands the rows of every log step and validation to callbacks. Lives on rank 0.

    A callback that returns True, or a text that says why, stops the run: the reason joins `stop`, travels to all ranks
    with the next step, and that step is the last. Whatever else is returned means nothing.
    """

    def __init__(self, callbacks: Sequence[Callback], stop: list[str]) -> None:
        self._callbacks, self._stop = callbacks, stop

    def write(self, rows: list[Row]) -> None:
        for callback in self._callbacks:
            answer = callback([dict(row) for row in rows])
            if isinstance(answer, str) and answer:
                self._stop.append(f"a callback ({answer})")
            elif isinstance(answer, bool | np.bool_) and answer:
                self._stop.append("a callback")

    def close(self) -> None:
        """Callbacks keep nothing open."""
