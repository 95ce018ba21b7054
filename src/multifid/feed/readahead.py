"""Reads a store ahead of an order in blocks: the kernel is asked for a window's blocks while the one before is used.

Nothing is held here: the pages lie in the page cache of the node, which all its ranks share, and which drops those of
past windows when it needs room.
"""

import threading

import numpy as np

from multifid.feed.order import Order
from multifid.store.store import Store

GAP = 4096  # structures of other splits between two of a block: fewer are read along with it


class ReadAhead:
    """Follows a task's places; may be called by the threads of a loader."""

    def __init__(self, store: Store, order: Order, labels: list[str]) -> None:
        self.store, self.order, self.labels = store, order, labels
        self._lock = threading.Lock()
        self._reached: int | None = None  # all places before this one have been asked for

    def __call__(self, place: int) -> None:
        """The structure at this place is about to be read, and those after it."""
        if self.order.blocks is None:
            return
        block = self.order.blocks.block
        with self._lock:
            start = max(0, place - self.order.ahead) if self._reached is None else self._reached
            stop = (place + self.order.ahead) // block * block  # long pieces, not one with every step
            if self._reached is not None and stop <= start:
                return
            self._reached = max(start, stop)
        for first, last in self.order.pieces(start, max(start, stop)):
            chosen = self.store.pick("train", np.arange(first, last))
            for run in np.split(chosen, np.flatnonzero(np.diff(chosen) > GAP) + 1):
                self.store.read_ahead(int(run[0]), int(run[-1]) + 1, self.labels)
