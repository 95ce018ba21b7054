"""A rank that is dead or cut off is noticed by its silence, and all others leave.

Every rank writes a growing number into the shared store, a dozen times in what counts as silence. Rank 0 reads all of
them and writes its verdict; the others read only that, so the load on the store grows with the number of ranks and not
with its square. A rank that is silent for so long (`parallel.silence`) is dead, rank 0 and the store included: calls to
the store may hang where the network is cut, so a second thread watches the first. At most twice that passes until
all ranks know.

A short timeout of collectives would be simpler, but compiling and validating last longer than a dead rank should.
"""

import os
import sys
import threading
import time
from collections.abc import Callable

from torch.distributed import Store

SILENCE = 25.0  # seconds
BEATS = 12  # in that time
EXIT_CODE = 75  # EX_TEMPFAIL: start again, the run resumes


def leave(message: str) -> None:
    """End this process at once: its main thread may wait for a dead rank for ever."""
    print(f"multifid: {message}; leaving, start the run again to go on", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


class Heartbeat:
    """Beats for this rank and listens to the others. `store` must be a connection that nobody else uses."""

    def __init__(self, store: Store, rank: int, size: int, fault: str, silence: float = SILENCE) -> None:
        self.store, self.rank, self.size, self.fault, self.silence = store, rank, size, fault, silence
        self.leave: Callable[[str], None] = leave
        self._stopped = threading.Event()
        self._heard = {r: ("", time.monotonic()) for r in (range(size) if rank == 0 else [0])}  # last beat, and when
        self._round = time.monotonic()  # of the last round of this rank's own
        self._trouble = ""
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._beat, self._watch)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Fall silent in good order: the others are through too, or have been told why not."""
        self._stopped.set()

    def _beat(self) -> None:
        beats = 0
        while not self._stopped.wait(self.silence / BEATS if beats else 0.0):
            beats += 1
            try:
                self._one(beats)
            except Exception as error:  # the store is gone or slow: silence, which the watch hears
                self._trouble = f" ({error})"
                continue
            self._round = time.monotonic()

    def _one(self, beats: int) -> None:
        self.store.set(f"beat/{self.rank}", str(beats))
        if self.store.check([self.fault]):
            self._end(f"rank {self.rank} heard of a fault: {self.store.get(self.fault).decode()}")
        present = [r for r, (beat, _) in self._heard.items() if beat or self.store.check([f"beat/{r}"])]
        for r, beat in zip(present, self.store.multi_get([f"beat/{r}" for r in present]), strict=True):
            if beat.decode() != self._heard[r][0]:
                self._heard[r] = (beat.decode(), time.monotonic())
        for r, (_, when) in self._heard.items():
            if time.monotonic() - when > self.silence:
                message = f"rank {r} is silent for {self.silence:.0f} s"
                self.store.compare_set(self.fault, "", message)
                self._end(message)

    def _watch(self) -> None:
        while not self._stopped.wait(self.silence / BEATS / 4):
            if time.monotonic() - self._round > self.silence:
                lasting = f"{self.silence:.0f} s{self._trouble}"
                self._end(f"rank {self.rank} cannot reach the rendezvous store for {lasting}")

    def _end(self, message: str) -> None:
        if not self._stopped.is_set():
            self.leave(message)
            self._stopped.set()
