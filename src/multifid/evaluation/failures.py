"""Predictions that are not finite: counted, named, and left out of the means.

One of them would make a mean NaN, which says neither how many there are nor how good the others are. A structure fails
as a whole, whichever of its predictions is not finite; a stress counts where the structure has such a label, so a
missing volume is no failure. Nothing here waits for the device before somebody asks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.batch import Targets
from multifid.model.potential import Prediction
from multifid.store.store import Store

NAMED = 5  # structures, those that come first in the store
_NONE = torch.iinfo(torch.int64).max


def failed(predicted: Prediction, targets: Targets, structure: Tensor) -> Tensor:
    """Which structures have a prediction that is not finite: (S,) bool. structure (N,): of each atom."""
    bad = ~torch.isfinite(predicted.energy)
    atoms = (~torch.isfinite(predicted.forces)).any(dim=1)
    bad |= torch.zeros_like(bad, dtype=torch.int64).index_add_(0, structure, atoms.to(torch.int64)) > 0
    if predicted.stress is not None and targets.stress is not None:
        bad |= (~torch.isfinite(predicted.stress) & ~torch.isnan(targets.stress)).any(dim=2).any(dim=1)
    return bad


class Failures:
    """Counts over batches, and the first structures that failed."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)
        self._first = torch.full((NAMED,), _NONE, dtype=torch.int64, device=device)

    def add(self, bad: Tensor, left_out: Tensor, index: np.ndarray) -> None:
        """bad (S,): which structures failed; left_out (S,): which are in no mean anyway; index (S,): in the store."""
        self._counts += torch.stack([bad.sum(), (bad & ~left_out).sum()])
        places = torch.from_numpy(index.astype(np.int64)).to(bad.device, non_blocking=True)
        both = torch.cat([self._first, torch.where(bad, places, _NONE)])
        self._first = both.sort().values[:NAMED]

    def row(self, store: Store, rank: int, size: int, sum_: Callable[[Tensor], Tensor]) -> tuple[dict[str, Any], int]:
        """What a row says of all processes' failures, and how many structures are for that reason in no mean.

        Called on all processes. `nonfinite_structures`: how many; `nonfinite`: index in the store and source of the
        first of them.
        """
        table = torch.zeros(size, NAMED, dtype=torch.float64)
        table[rank] = self._first.cpu().to(torch.float64)
        count, lost = (round(x) for x in sum_(self._counts.cpu()).tolist())
        first = sorted(int(x) for x in sum_(table).flatten().tolist() if x < store.structures)[:NAMED]
        named = [{"index": i, "source": f"{store.source_file(i)}: {store.source_id(i)}"} for i in first]
        return {"nonfinite_structures": count, "nonfinite": named}, lost
