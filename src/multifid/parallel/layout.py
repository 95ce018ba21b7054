"""Which ranks hold which branches. Pure arithmetic: integers and names in, integers and names out.

    replicated           split               split                  auto, where one task outweighs the others
    rank 0  a b c        rank 0  a           rank 0  a c            rank 0  a
    rank 1  a b c        rank 1  a           rank 1  b              rank 1  a
    rank 2  a b c        rank 2  b                                  rank 2  a b c
                         rank 3  b
    every rank holds     sub-groups: more    more tasks than        groups overlap:
    every branch         ranks than tasks    ranks                  a rank may serve several

Tasks of one store are one *unit*: they are drawn together and have the same ranks. Every unit has a rank and every rank
a unit. Ranks that serve one unit have consecutive numbers, so that a group lies on as few hosts as it can. The same
placement results on every rank and for every order of the tasks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from multifid.parallel.assign import Unit, can_pack, cheapest, even_groups, fewest_bytes, pack, sized_groups

Placement = Literal["auto", "replicated", "split"] | dict[str, list[int]]

GIB = 2**30


class ParallelConfig(BaseModel):
    """Where the branches live."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    placement: Placement = Field("auto", description="which ranks hold which branches; a map: task to ranks")
    allow_idle: bool = Field(False, description="accept a map that leaves ranks without a branch, and so without work")
    memory: float | None = Field(
        None,
        gt=0.0,
        description="GiB that a rank may hold: encoder, branches, their moments and averages; null: no limit",
    )
    ranks: int | None = Field(
        None, gt=0, description="for how many ranks `auto` was written out as this map; for others it is chosen anew"
    )
    costs: Literal["estimated", "measured"] = Field(
        "estimated",
        description="what `auto` and `split` weigh tasks by: edges, atoms and sizes of layers, or seconds of a few "
        "trial steps before the run",
    )
    silence: float = Field(
        25.0,
        gt=0.0,
        description="seconds without a sign of life after which a rank counts as dead; twice that, and all others "
        "have left",
    )
    shard_encoder: bool = Field(
        False,
        description="cut the encoder, its gradients, moments and averages into a piece for each rank (one rank: one "
        "piece, the whole)",
    )


@dataclass(frozen=True)
class Load:
    """What one task asks of its ranks in a step. Costs in any one unit of time, the same for all tasks."""

    cost: float = 1.0  # processing its structures of a step, divided among its ranks: estimated or measured
    holding: float = 0.0  # on every rank that holds the branch: updating and reducing its parameters
    bytes: int = 0  # on every rank that holds the branch: parameters, gradients, moments, averages
    spread: float = 0.0  # standard deviation of `cost` between steps, by its mean


@dataclass(frozen=True)
class Memory:
    """What a rank can hold, in bytes."""

    limit: int  # of a rank, for everything
    encoder: int = 0  # what every rank holds besides branches: the encoder's state, activations


def place(
    tasks: Sequence[str],
    placement: Placement,
    ranks: int,
    *,
    together: Sequence[Sequence[str]] = (),
    loads: Mapping[str, Load] | None = None,
    memory: Memory | None = None,
    allow_idle: bool = False,
) -> dict[str, list[int]]:
    """The ranks of every task, ascending, in the order of `tasks`.

    together: lists of tasks that share a store; other tasks are alone.  loads: of every task; all alike by default.
    allow_idle: accept a map that leaves ranks without a branch (they work for nobody).

    * `replicated`: all tasks on all ranks.
    * `split`: as few branches on a rank as possible. No more units than ranks: every unit has a sub-group of its own,
      equal ones where that divides, else sized by cost. More units than ranks: each on one rank, packed by cost.
    * a map: as given, checked.
    * `auto`: the shortest steps that the loads predict within the memory limit (see `assign.cheapest`).

    ValueError, saying what would fit, for what is impossible: a map that leaves out a task or names an unknown one, a
    rank that is not there, an idle rank, a store torn apart, more bytes on a rank than the limit.
    """
    units = _units(tasks, together, loads or {}, ranks)
    free = None if memory is None else memory.limit - memory.encoder
    if isinstance(placement, dict):
        out = _checked(tasks, placement, ranks, together, allow_idle)
        _check_memory(_by_unit(units, out), units, ranks, memory)
        return out
    held: list[list[int]] | None
    if placement == "replicated":
        held = [list(range(ranks)) for _ in units]
        _check_memory(held, units, ranks, memory)
    elif placement == "split":
        held = _split(units, ranks, free)
    else:
        held = cheapest(units, ranks, free)
    if held is None:
        assert memory is not None  # without a limit something always fits
        raise ValueError(
            f"{len(units)} stores' branches do not fit on {ranks} ranks of {_gib(memory.limit)} GiB (parallel.memory) "
            f"beside {_gib(memory.encoder)} GiB of encoder; {_what_fits(units, ranks, memory)}"
        )
    _check_memory(held, units, ranks, memory)
    ranks_of = {task: where for unit, where in zip(units, held, strict=True) for task in unit.tasks}
    return {task: list(ranks_of[task]) for task in tasks}


def _units(
    tasks: Sequence[str], together: Sequence[Sequence[str]], loads: Mapping[str, Load], ranks: int
) -> list[Unit]:
    """Tasks that cannot be parted, in the order of their names."""
    if ranks < 1:
        raise ValueError(f"a run needs at least one rank, got {ranks}")
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks must be at least one name, each once, got {list(tasks)}")
    joined = [task for store in together for task in store]
    if len(set(joined)) != len(joined) or not set(joined) <= set(tasks):
        raise ValueError(f"tasks of one store must be among {list(tasks)} and in one store only, got {together}")
    if loads and (missing := sorted(set(tasks) - set(loads))):
        raise ValueError(f"loads must be known of every task or of none: missing {missing}")
    for task, load in loads.items():
        numbers = (load.cost, load.holding, load.bytes, load.spread)
        if not all(0 <= number < float("inf") for number in numbers):
            raise ValueError(f"the load of {task!r} must be finite and at least 0, got {load}")
    members = [tuple(sorted(store)) for store in together if store] + [(t,) for t in tasks if t not in set(joined)]
    of = {task: loads.get(task, Load()) for task in tasks}
    return [
        Unit(
            tasks=names,
            cost=sum(of[t].cost for t in names),
            holding=sum(of[t].holding for t in names),
            bytes=sum(of[t].bytes for t in names),
            spread=max(of[t].spread for t in names),  # of one store, so of the same structures
        )
        for names in sorted(members)
    ]


def _split(units: list[Unit], ranks: int, free: int | None) -> list[list[int]] | None:
    if len(units) > ranks:
        return pack(units, ranks, free)
    return even_groups(units, ranks) if ranks % len(units) == 0 else sized_groups(units, ranks)


def _checked(
    tasks: Sequence[str],
    given: Mapping[str, Sequence[int]],
    ranks: int,
    together: Sequence[Sequence[str]],
    allow_idle: bool,
) -> dict[str, list[int]]:
    """A map from the config, if it is a placement: task -> its ranks, ascending."""
    if missing := sorted(set(tasks) - set(given)):
        raise ValueError(f"parallel.placement leaves out {missing}: every task needs ranks; tasks are {list(tasks)}")
    if unknown := sorted(set(given) - set(tasks)):
        raise ValueError(f"parallel.placement names {unknown}, which are not tasks: tasks are {list(tasks)}")
    for task, where in given.items():
        if not where or len(set(where)) != len(where):
            raise ValueError(f"parallel.placement.{task}: at least one rank, each once, must be given, got {where}")
        if not set(where) <= set(range(ranks)):
            raise ValueError(
                f"parallel.placement.{task}: ranks {where}, but the run has the ranks 0..{ranks - 1}; launch "
                f"{1 + max(max(w) for w in given.values())} ranks or let parallel.placement be auto"
            )
    for store in together:
        if len({tuple(sorted(given[task])) for task in store}) > 1:
            raise ValueError(
                "parallel.placement must give tasks of one store the same ranks (they are drawn together), got "
                + ", ".join(f"{task}: {given[task]}" for task in store)
            )
    idle = sorted(set(range(ranks)) - {rank for where in given.values() for rank in where})
    if idle and not allow_idle:
        raise ValueError(
            f"parallel.placement leaves the ranks {idle} without a task: give them one, launch {ranks - len(idle)} "
            "ranks, or set parallel.allow_idle=true"
        )
    return {task: sorted(given[task]) for task in tasks}


def _by_unit(units: list[Unit], placement: Mapping[str, Sequence[int]]) -> list[list[int]]:
    return [sorted(placement[unit.tasks[0]]) for unit in units]


def _check_memory(held: list[list[int]], units: list[Unit], ranks: int, memory: Memory | None) -> None:
    if memory is None:
        return
    used = [memory.encoder] * ranks
    for unit, where in zip(units, held, strict=True):
        for rank in where:
            used[rank] += unit.bytes
    if (worst := max(used)) > memory.limit:
        rank = used.index(worst)
        branches = [task for unit, where in zip(units, held, strict=True) if rank in where for task in unit.tasks]
        raise ValueError(
            f"rank {rank} would hold {_gib(worst)} GiB (the branches {branches} and {_gib(memory.encoder)} GiB of "
            f"encoder), but parallel.memory is {_gib(memory.limit)} GiB; {_what_fits(units, ranks, memory)}"
        )


def _what_fits(units: list[Unit], ranks: int, memory: Memory) -> str:
    free = memory.limit - memory.encoder
    if can_pack(units, ranks, free):
        return f"parallel.placement=auto fits on {ranks} ranks"
    alone = memory.encoder + max(unit.bytes for unit in units)
    if alone > memory.limit:
        return f"with a rank for each store, {_gib(alone)} GiB would do"
    least = memory.encoder + fewest_bytes(units, ranks)
    more = next(n for n in range(ranks + 1, len(units) + 1) if can_pack(units, n, free))
    return f"{_gib(least)} GiB would do on {ranks} ranks, and {_gib(memory.limit)} GiB on {more} ranks"


def _gib(count: int) -> str:
    """Rounded up: what a message says would do must do."""
    return f"{math.ceil(count / GIB * 1000) / 1000:g}"


def ranges(ranks: Sequence[int]) -> str:
    """0-3, 8, 10-11."""
    out: list[list[int]] = []
    for rank in sorted(ranks):
        if out and rank == out[-1][1] + 1:
            out[-1][1] = rank
        else:
            out.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)
