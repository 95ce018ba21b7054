"""What one update of an optimizer asks of a device, and what the optimizer keeps, whichever it is. Counted, not run.

The real optimizer makes a few updates of parameters without memory (torch's `meta` tensors), and every operation that
it issues is looked at (`model/counting.py`). Nothing here knows what an optimizer is made of.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from multifid.model.counting import Count, Work
from multifid.training.optimizer import OPTIMIZERS, moments, set_moments, update

# Updates that are counted, of which the mean is taken: some optimizers do part of their work every few updates only.
UPDATES = 10

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of every parameter


@dataclass(frozen=True)
class UpdateWork:
    """One update of some parameters."""

    work: Work  # in the mean; clipping is part of it, the norm and the moving average are not
    kept: int  # bytes of the optimizer's state


@lru_cache(maxsize=256)
def count_update(optimizer: str, shapes: Shapes, dtype: torch.dtype) -> UpdateWork:
    """An update by the optimizer of that name in `OPTIMIZERS` of parameters with these names and shapes.

    Counted from the second update on: the first may be dearer than all others.
    """
    parameters = {name: nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for name, shape in shapes}
    made = OPTIMIZERS[optimizer](parameters, 1e-3, 1e-2)
    for p in parameters.values():
        p.grad = torch.empty_like(p)
        set_moments(made, p, moments(made, p), 1)

    with Count() as counted:
        for _ in range(UPDATES):
            update(made, 1e-3, torch.tensor(1.0), 1.0)
    kept = sum(t.nbytes for state in made.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return UpdateWork(counted.work.times(1 / UPDATES), kept)
