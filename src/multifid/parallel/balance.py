"""How evenly divisible work can lie on ranks that may each take only some of it. Exact, in whole numbers.

A *pool* is work that the same ranks may do; a *class* is a set of ranks that may do work of the same pools, so that all
of them can carry the same. There are few classes even on thousands of ranks: the network is small.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Network:
    """Which classes of ranks reach which pools."""

    work: list[int]  # of each pool, positive
    reach: list[list[int]]  # of each pool: the classes whose ranks may do it
    ranks: list[int]  # of each class: how many ranks


def network(work: Sequence[int], holders: Sequence[Sequence[int]]) -> tuple[Network, dict[int, int]]:
    """The network of pools that the ranks `holders[pool]` may do, and the class of every rank that holds any.

    Classes are numbered by their first rank, so that the network does not depend on the order of the ranks in a list.
    """
    held: dict[int, list[int]] = {}
    for pool, ranks in enumerate(holders):
        for rank in ranks:
            held.setdefault(rank, []).append(pool)
    numbers: dict[tuple[int, ...], int] = {}
    class_of = {rank: numbers.setdefault(tuple(held[rank]), len(numbers)) for rank in sorted(held)}
    sizes = [0] * len(numbers)
    for number in class_of.values():
        sizes[number] += 1
    reach: list[list[int]] = [[] for _ in work]
    for pools, number in numbers.items():
        for pool in pools:
            reach[pool].append(number)
    return Network(list(work), reach, sizes), class_of


def spread(net: Network) -> dict[tuple[int, int], Fraction]:
    """Work of each pool on each *rank* of each class, {(pool, class): amount}, the sorted loads of the ranks least.

    Not only the most loaded rank is least loaded, but of the others the most loaded too, and so on: the decomposition
    of Fujishige, "Lexicographically optimal base of a polymatroid" (Math. Oper. Res. 5, 1980). If all work can be laid
    evenly on all ranks, that is best. If not, a minimum cut shows pools that ask more than the mean of their ranks:
    these pools need these ranks for themselves, and the others make do with the rest.
    """
    amounts: dict[tuple[int, int], Fraction] = {}
    parts = [(list(range(len(net.work))), list(range(len(net.ranks))))]
    while parts:
        pools, classes = parts.pop()
        count, total = sum(net.ranks[k] for k in classes), sum(net.work[p] for p in pools)
        inside = set(classes)
        reach = [[k for k in net.reach[p] if k in inside] for p in pools]
        room = {k: net.ranks[k] * total for k in classes}
        sent, short = _flow([net.work[p] * count for p in pools], room, reach)
        if not short:
            amounts |= {
                (p, k): Fraction(units, count * net.ranks[k])
                for p, out in zip(pools, sent, strict=True)
                for k, units in out.items()
                if units
            }
            continue
        asking = {pools[i] for i in short}
        theirs = {k for i in short for k in reach[i]}
        parts.append(([p for p in pools if p in asking], sorted(theirs)))
        if len(asking) < len(pools):
            parts.append(([p for p in pools if p not in asking], [k for k in classes if k not in theirs]))
    return amounts


def least_level(net: Network, base: Sequence[int]) -> tuple[Fraction, list[int]]:
    """The least load of the most loaded rank, where every rank of class k carries `base[k]` already.

    Also the pools that force this load upon their ranks; none, where the largest base alone does. Newton's method on
    the level: each minimum cut gives pools that ask for more, and thereby the next level (Dinkelbach, 1967).
    """
    level, forcing = Fraction(max(base)), list[int]()
    short = list(range(len(net.work)))
    while True:
        theirs = {k for p in short for k in net.reach[p]}
        asked = sum(net.work[p] for p in short) + sum(net.ranks[k] * base[k] for k in theirs)
        needed = Fraction(asked, sum(net.ranks[k] for k in theirs)) if theirs else level
        if needed > level:
            level, forcing = needed, short
        p, q = level.numerator, level.denominator
        room = {k: n * (p - q * base[k]) for k, n in enumerate(net.ranks)}
        _, short = _flow([q * w for w in net.work], room, net.reach)
        if not short:
            return level, forcing


def _flow(
    supply: Sequence[int], room: Mapping[int, int], reach: Sequence[Sequence[int]]
) -> tuple[list[dict[int, int]], list[int]]:
    """A maximum flow from pools to classes, {class: amount} of each pool, and the pools of a minimum cut that cannot
    be emptied because their classes are full; none where everything is placed. Augmenting paths, shortest first."""
    free, left = dict(room), list(supply)
    sent: list[dict[int, int]] = [dict.fromkeys(classes, 0) for classes in reach]
    feeders: dict[int, list[int]] = {k: [] for k in room}
    for p in sorted(range(len(supply)), key=lambda p: len(reach[p])):  # those with least choice choose first
        for k in reach[p]:
            feeders[k].append(p)
            amount = min(left[p], free[k])
            sent[p][k] += amount
            left[p] -= amount
            free[k] -= amount
    while True:
        came_from: dict[int, tuple[int, int] | None] = {p: None for p in range(len(supply)) if left[p]}
        end = _search(came_from, sent, feeders, free, reach)
        if end is None:
            return sent, sorted(came_from)
        pool, last = end
        path: list[tuple[int, int, int]] = []  # (pool, class that it sends more to, class that it sends less to)
        while (step := came_from[pool]) is not None:
            path.append((pool, last, step[1]))
            pool, last = step[0], step[1]
        amount = min([left[pool], free[end[1]], *(sent[p][less] for p, _, less in path)])
        left[pool] -= amount
        free[end[1]] -= amount
        sent[pool][last] += amount
        for p, more, less in path:
            sent[p][more] += amount
            sent[p][less] -= amount


def _search(
    came_from: dict[int, tuple[int, int] | None],
    sent: list[dict[int, int]],
    feeders: dict[int, list[int]],
    free: dict[int, int],
    reach: Sequence[Sequence[int]],
) -> tuple[int, int] | None:
    """The nearest class with room that the pools in `came_from` reach, and the pool that sends to it.

    Fills `came_from` with every pool on the way: the pool before it, and the class that it gives up work of. A pool
    that is reached through a class already carries work there, which it can send elsewhere.
    """
    queue, seen = deque(came_from), set()
    while queue:
        pool = queue.popleft()
        for k in reach[pool]:
            if k in seen:
                continue
            if free[k]:
                return pool, k
            seen.add(k)
            for other in feeders[k]:
                if other not in came_from and sent[other][k]:
                    came_from[other] = (pool, k)
                    queue.append(other)
    return None
