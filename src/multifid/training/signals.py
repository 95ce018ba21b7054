"""SIGTERM and Ctrl-C as reasons to stop: what goes on is finished first, and everything is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signals(stop: list[str], reason: str) -> Iterator[None]:
    """Within, the two signals append a reason to a list that a loop looks at. In the main thread only."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, lambda number, frame: stop.append(reason)) for s in signals}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
