"""Which rank processes which structure of a step. Pure arithmetic; every rank computes the same from the same numbers.

All draws are cut jointly. First as if structures could be divided: the exact balance says how much of each draw a rank
should get. Then structure by structure, the largest first, each to the rank that is furthest below its due (the
longest-processing-time rule of Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969).
Whole numbers throughout: processors that add floats in different orders would disagree about ties.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from multifid.parallel.balance import network, spread

BITS = 30  # of the largest cost; the sum over millions of structures stays well within 63
LEAST = 32  # a structure costs at least the mean by this


def shares(costs: Mapping[str, np.ndarray], placement: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The rank of every structure of a step, (m,) int64 for each draw, such that the most loaded rank is least loaded.

    costs: of each draw (the tasks of one store, under any name) the estimated costs (m,) of its structures in this
    step, in one unit, finite and not negative; m may be 0.  placement: of each draw the ranks that hold its branches.
    What a rank processes, in the order of the step: `np.flatnonzero(shares(...)[draw] == rank)`.

    With P draws the most loaded rank carries at most the divisible optimum plus, for each set of ranks that draws have
    in common, the cost of one structure. ValueError for costs that are no costs, and for a draw without ranks.
    """
    whole = _whole(costs, placement)
    holders = {rank for draw in costs for rank in placement[draw]}
    if len(holders) == 1:
        return {draw: np.full(len(values), min(holders), np.int64) for draw, values in whole.items()}
    pools: dict[tuple[int, ...], list[str]] = {}  # draws on the same ranks are one pool: all their structures compete
    for draw in sorted(whole):
        if len(whole[draw]):
            pools.setdefault(tuple(sorted(set(placement[draw]))), []).append(draw)
    joined = [np.concatenate([whole[draw] for draw in draws]) for draws in pools.values()]
    due = _due(joined, list(pools))
    ahead = np.zeros(1 + max((ranks[-1] for ranks in pools), default=0), np.int64)  # load beyond what is due so far
    owners: list[np.ndarray] = [np.zeros(0, np.int64)] * len(pools)
    # Pools of large structures first: the small ones of the later pools fill the gaps that the large ones leave.
    for p in sorted(range(len(joined)), key=lambda p: (-int(joined[p].max()), list(pools)[p])):
        ranks = np.array(list(pools)[p])
        owners[p], ahead[ranks] = _deal(joined[p], ranks, ahead[ranks] - due[p])
    out = {draw: np.zeros(0, np.int64) for draw in costs}
    for draws, owner in zip(pools.values(), owners, strict=True):
        ends = np.cumsum([len(whole[draw]) for draw in draws])
        out |= dict(zip(draws, np.split(owner, ends[:-1]), strict=True))
    return out


def _due(joined: list[np.ndarray], holders: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Of each pool, what each of its ranks would get if structures could be divided."""
    if not joined:
        return []
    net, class_of = network([int(costs.sum()) for costs in joined], holders)
    amounts = {key: int(amount) for key, amount in spread(net).items()}
    return [np.array([amounts.get((p, class_of[r]), 0) for r in ranks], np.int64) for p, ranks in enumerate(holders)]


def _deal(costs: np.ndarray, ranks: np.ndarray, loads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each structure, and the loads afterwards: the largest goes to the least loaded rank, and so on.

    Many at once: in order of load, ranks take one structure each for as long as none that was served would be served
    again before the next, which is exactly what one at a time gives.
    """
    owner = np.empty(len(costs), np.int64)
    keys = np.sort((-costs << 32) + np.arange(len(costs)))  # cost and place in one number: faster than a stable argsort
    queue = keys & 0xFFFFFFFF
    loads, start = loads.copy(), 0
    while start < len(queue):
        order = np.argsort(loads, kind="stable")[: len(queue) - start]
        chosen = queue[start : start + len(order)]
        after = loads[order] + costs[chosen]
        again = np.minimum.accumulate(after)[:-1] < loads[order[1:]]
        count = int(np.argmax(again)) + 1 if again.any() else len(order)
        owner[chosen[:count]] = ranks[order[:count]]
        loads[order[:count]] = after[:count]
        start += count
    return owner, loads


def _whole(costs: Mapping[str, np.ndarray], placement: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Costs as whole numbers, none below a small part of the mean: a structure without edges still has atoms."""
    arrays = {draw: np.asarray(values, np.float64) for draw, values in costs.items()}
    for draw, values in arrays.items():
        if values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"the costs of {draw!r} must be a list of finite numbers of at least 0, got {values}")
        if not placement.get(draw):
            raise ValueError(f"no rank holds the branches of {draw!r}: the placement has {dict(placement)}")
    largest = max((float(values.max()) for values in arrays.values() if len(values)), default=0.0)
    shift = BITS - int(np.frexp(largest)[1])  # a power of two: exact
    whole = {draw: np.rint(np.ldexp(values, shift)).astype(np.int64) for draw, values in arrays.items()}
    total, count = sum(int(values.sum()) for values in whole.values()), sum(map(len, whole.values()))
    floor = max(1, total // (LEAST * max(count, 1)))
    return {draw: np.maximum(values, floor) for draw, values in whole.items()}
