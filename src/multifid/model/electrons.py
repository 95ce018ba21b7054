"""Charge and multiplicity of structures as the branch of a task knows them.

One encoder serves all tasks, and what it makes of a charge it may have learnt from another task: a branch whose
training showed one charge only would answer with a number that means nothing. So a structure gets the charge and the
multiplicity that its task was trained with where there was only one, with a warning where it says another, and is
refused where its task knows several and not this one. Where the description of a model does not say what its tasks were
trained with (older files), structures keep what they say.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.batch import Batch
from multifid.structures.structure import Packed

UNSAID = {"charge": 0, "spin": 1}  # what a structure has that says nothing


def as_trained(packed: Packed, about: Mapping[str, Any], task: str) -> Packed:
    """Structures with the charge and spin that a task answers for; `about` the task in the model's description.

    ValueError names the first structure whose charge or multiplicity is not among the several that the task knows.
    """
    charge = _known(packed.charge, about.get("charges"), "charge", task)
    spin = _known(packed.spin, about.get("spins"), "spin", task)
    if len(about.get("spins") or ()) > 1:
        _odd_singlets(packed, charge, spin)
    return replace(packed, charge=charge, spin=spin)


def batch_as_trained(batch: Batch, about: Mapping[str, Any]) -> Batch:
    """A batch with the charge and spin that a task was trained with where there was only one; else as it is.

    For errors on labelled data, where what a task does not know is to be measured and not refused.
    """

    def said(values: Tensor, trained: Sequence[int] | None) -> Tensor:
        return torch.full_like(values, trained[0]) if trained is not None and len(trained) == 1 else values

    return replace(batch, charge=said(batch.charge, about.get("charges")), spin=said(batch.spin, about.get("spins")))


def _known(values: np.ndarray, trained: Sequence[int] | None, key: str, task: str) -> np.ndarray:
    if not trained:
        return values
    if len(trained) == 1:
        said = np.unique(values[(values != trained[0]) & (values != UNSAID[key])])
        if len(said):
            warnings.warn(
                f"info[{key!r}] = {', '.join(map(str, said.tolist()))} is not used: task {task!r} was trained with "
                f"{key} {trained[0]} only, and answers for that",
                stacklevel=4,
            )
        return np.full_like(values, trained[0])
    strange = np.flatnonzero(~np.isin(values, trained))
    if len(strange):
        raise ValueError(
            f"structure {strange[0]}: info[{key!r}] is {values[strange[0]]}"
            f"{' (or not given)' if values[strange[0]] == UNSAID[key] else ''}, but task {task!r} was trained with "
            f"{', '.join(map(str, trained))} only"
        )
    return values


def _odd_singlets(packed: Packed, charge: np.ndarray, spin: np.ndarray) -> None:
    """Warn of molecules with an odd number of electrons that say nothing of their multiplicity."""
    first = packed.offsets[:-1][packed.natoms > 0]
    electrons = -charge.astype(np.int64)
    electrons[packed.natoms > 0] += np.add.reduceat(packed.numbers.astype(np.int64), first) if len(first) else 0
    odd = np.flatnonzero((electrons % 2 == 1) & (spin == 1) & ~np.asarray(packed.pbc, bool).any(axis=1))
    if len(odd):
        warnings.warn(
            f"structure {odd[0]} has an odd number of electrons and is taken as a singlet: say its multiplicity in "
            f"info['spin'], as 2" + (f" ({len(odd)} structures)" if len(odd) > 1 else ""),
            stacklevel=4,
        )
