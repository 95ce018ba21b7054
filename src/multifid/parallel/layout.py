"""Which ranks hold which branches. Pure arithmetic: integers and names in, integers and names out."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Placement = Literal["auto", "replicated", "split"] | dict[str, list[int]]


class ParallelConfig(BaseModel):
    """Where the branches live."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    placement: Placement = Field("auto", description="which ranks hold which branches; a map: task to ranks")
    shard_encoder: Literal[False] = Field(False, description="sharding needs several ranks, which this version lacks")


def place(tasks: list[str], placement: Placement, ranks: int) -> dict[str, list[int]]:
    """The ranks of every task, written out.

    One process is the definition of the mathematics and holds every branch under every placement; several ranks are a
    ValueError, as is a map that leaves out a task, names one that is not there, or names a rank that is not there.
    """
    if ranks != 1:
        raise ValueError(f"placements on {ranks} ranks are not part of this version: run one process")
    if isinstance(placement, dict):
        if set(placement) != set(tasks):
            raise ValueError(
                f"parallel.placement must name every task once: has {sorted(placement)}, tasks are {tasks}"
            )
        for task, where in placement.items():
            if where != [0]:
                raise ValueError(f"parallel.placement.{task}: ranks {where}, but the run has only rank 0")
    return {task: [0] for task in tasks}
