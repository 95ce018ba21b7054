"""Who I am among the ranks, and sums over groups of them. The environment is read here and nowhere else.

A group of one is a group: its sums are what was put in, and no code asks whether it runs alone.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A set of ranks that reduce together. `ranks` in ascending order; the first one writes and counts for all."""

    ranks: tuple[int, ...]
    rank: int  # of this process, in the world

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, counts and talks for the group."""
        return self.rank == self.ranks[0]


def world() -> Group:
    """The group of all ranks, from the environment that torchrun or srun sets.

    ValueError where more than one rank was launched: training on several ranks is not part of this version.
    """
    size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if size > 1 and ("RANK" in os.environ or "SLURM_PROCID" in os.environ):
        raise ValueError(
            f"launched with {size} ranks, but this version trains in one process: run `multifid train` without "
            "torchrun, or with --nproc-per-node 1"
        )
    return Group(ranks=(0,), rank=0)


def device(name: str | None) -> torch.device:
    """The device to compute on: as named, else an accelerator if there is one, else the CPU."""
    if name is not None:
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def sum_(tensor: Tensor, group: Group) -> Tensor:
    """The sum of `tensor` over the group, in place."""
    if group.size == 1:
        return tensor
    raise ValueError(f"a group of {group.size} ranks cannot be formed in one process")
