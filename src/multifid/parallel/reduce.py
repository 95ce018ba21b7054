"""Small sums over a group: many little tensors travel as one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from multifid.parallel.groups import Group


def sum_together(group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of several tensors over a group, in one all-reduce: float64, the shapes and names that were given.

    All ranks give the same names and shapes, and get the same bits: what they decide from them, they decide alike. A
    NaN or infinity of any rank reaches all.
    """
    flat = group.sum_(torch.cat([value.double().reshape(-1) for value in values.values()]))
    pieces = flat.split([value.numel() for value in values.values()])
    return {name: piece.view(value.shape) for (name, value), piece in zip(values.items(), pieces, strict=True)}
