"""Forward and backward passes that are recorded once for each size of batch, and then replayed.

    first time      eager
    second time     eager; and recorded, replayed, compared with the eager gradient
    from then on    the batch is copied to where the recorded one lies, and all kernels are launched at once

On a GPU a pass of a small model is some thousand kernels of microseconds, and launching them takes longer than they
do. Batches are padded to few sizes (`graphs/padding.py`), so that what was recorded comes again. A recording repeats
addresses: weights, gradients and recorded batches stay where they are. It also repeats what the host decided while it
was made, and so belongs to everything of a batch that is no tensor. Where a recording fails or its gradient is not that
of the eager pass, a warning says so and all passes are eager from then on: the step under way has the eager gradient.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multifid.graphs.batch import Batch
from multifid.parallel.gradients import Gradients

MOST = 64  # recordings; other sizes are eager
# Of a replayed gradient, relative to its norm: sums over neighbours have no order on a GPU.
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}

# (batch, counts, sums to add to): makes both passes, adds to the gradients
Pass = Callable[[Batch, Tensor, Tensor], None]
Record = Callable[[Callable[[], None]], Callable[[], None]]  # what is done -> what does it again


@dataclass
class Recording:
    """One size of batch."""

    tensors: list[Tensor]  # the recorded batch and counts
    sums: Tensor  # what the pass adds
    replay: Callable[[], None]


class Recordings:
    """Passes of one trainer on one process, by size."""

    def __init__(self, record: Record, gradients: Gradients, precision: str, reads_edges: bool) -> None:
        """reads_edges: whether a branch does; then a recording belongs to the places of edges too."""
        self.record, self.flats = record, [bucket.flat for bucket in gradients.buckets]
        self.tolerance, self.reads_edges = TOLERANCES[precision], reads_edges
        self.held: dict[Hashable, Recording] = {}
        self.seen: Counter[Hashable] = Counter()
        self.off = False

    def run(self, batch: Batch, counts: Tensor, sums: Tensor, both: Pass) -> None:
        """Both passes of a batch that is ready, on its device; what they add to the gradients and to `sums`."""
        key = self._key(batch)
        found = self.held.get(key)
        if found is not None:
            for into, x in zip(found.tensors, [*tensors_of(batch), counts], strict=True):
                into.copy_(x)
            found.replay()
            sums += found.sums
            return
        self.seen[key] += 1
        if self.off or self.seen[key] < 2 or len(self.held) >= MOST:
            both(batch, counts, sums)
            return
        before = [flat.clone() for flat in self.flats]
        both(batch, counts, sums)
        eager = [flat.clone() for flat in self.flats]
        if not all(bool(torch.isfinite(flat).all()) for flat in eager):
            self.seen[key] -= 1  # nothing to compare with: the next one
            return
        trouble = None
        try:
            made = self._recorded(batch, counts, sums, both)
            trouble = self._compared(made, before, eager)
        except Exception as error:
            trouble = f"{type(error).__name__}: {str(error)[:500]}"
        for flat, x in zip(self.flats, eager, strict=True):
            flat.copy_(x)
        if trouble is None:
            self.held[key] = made
            return
        self.off = True
        self.held.clear()
        warnings.warn(f"passes are not recorded any more, as with train.capture: false: {trouble}", stacklevel=2)

    def _recorded(self, batch: Batch, counts: Tensor, sums: Tensor, both: Pass) -> Recording:
        static, own, of_step = batch.moved(torch.clone), counts.clone(), torch.zeros_like(sums)

        def again() -> None:
            of_step.zero_()
            both(static, own, of_step)

        return Recording([*tensors_of(static), own], of_step, self.record(again))

    def _compared(self, made: Recording, before: list[Tensor], eager: list[Tensor]) -> str | None:
        """How a replay differs from the eager pass, if it does."""
        for flat, x in zip(self.flats, before, strict=True):
            flat.copy_(x)
        made.replay()
        off = torch.stack([(x - y).double().norm() for x, y in zip(self.flats, eager, strict=True)]).norm()
        whole = torch.stack([(x - y).double().norm() for x, y in zip(before, eager, strict=True)]).norm()
        if float(off) <= self.tolerance * float(whole):
            return None
        return f"a replayed gradient is off by {float(off):.1e} of {float(whole):.1e}"

    def _key(self, batch: Batch) -> Hashable:
        """Shapes of all tensors, and everything that is no tensor."""
        labels = batch.labels
        assert labels is not None
        rows = [labels.energy, labels.forces, labels.stress, *labels.properties.values()]
        places: list[Any] = [(task, _ends(s), _ends(a)) for task, (s, a) in batch.slices.items()]
        if self.reads_edges and batch.edge_slices is not None:
            places += [(task, _ends(place)) for task, place in batch.edge_slices.items()]
        shapes = [(tuple(x.shape), x.dtype) for x in tensors_of(batch)]
        return tuple(places), tuple(labels.properties), tuple(tuple(r.tasks) for r in rows), tuple(shapes)


def _ends(place: slice) -> tuple[int, int]:
    return place.start, place.stop


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, in one order."""
    found: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        found.append(x)
        return x

    batch.moved(seen)
    return found


class CudaGraphs:
    """Records what a GPU is asked to do, all recordings in one pool of memory: one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            run()  # what libraries make at first use is made now
        torch.cuda.current_stream(self.device).wait_stream(aside)
        # Other threads prepare batches meanwhile, and may ask the device for memory.
        with torch.cuda.graph(graph, pool=self.pool, stream=aside, capture_error_mode="thread_local"):
            run()
        return graph.replay
