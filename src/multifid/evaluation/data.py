"""A dataset to ask a model about, and what one of several processes does of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from multifid.store.store import Store

AT_ONCE = 1 << 16  # structures whose costs are looked at together


def _as_it_is(sums: Tensor) -> Tensor:
    return sums


def _no_progress(structures: int) -> None:
    """The no-op callback for progress."""


@dataclass(frozen=True)
class Share:
    """What one process does of an evaluation, and how the sums of all are added."""

    rank: int = 0
    size: int = 1
    sum_: Callable[[Tensor], Tensor] = _as_it_is  # of a float64 tensor on the host, over all processes
    workers: int = 1  # threads that prepare batches ahead
    max_edges: int | None = None  # of a batch; None: by the width of the model and the memory of the device
    advance: Callable[[int], None] = _no_progress  # called with the number of structures just done, over all processes


@dataclass(frozen=True)
class Data:
    """A dataset to ask about: one label set of a store, and what it is called in tables."""

    name: str
    store: Store
    label_set: str
    source: Path | None = None  # the file that the store was made of, where one was asked about

    @property
    def path(self) -> Path:
        """What the user named."""
        return self.source or self.store.path


def label_sets(store: Store, name: str | None) -> list[Data]:
    """The label set of a store that is called `name`, or its only one under that name; without a name all of them."""
    if name is None:
        return [Data(n, store, n) for n in store.tasks]
    if name not in store.tasks and len(store.tasks) > 1:
        sets = ", ".join(store.tasks)
        raise ValueError(f"--data {name}={store.path}: it has the label sets {sets}; none is called {name!r}")
    return [Data(name, store, name if name in store.tasks else store.tasks[0])]


def size_of(data: Data, split: str) -> int:
    """Structures of a split, or of `all`."""
    return data.store.structures if split == "all" else data.store.size(split)
