"""Units of work to ranks: sub-groups, packing, and the search for the shortest step.

A rank's step costs what it processes, which can be divided among the holders of a branch, plus what it holds, which
cannot: every holder updates and reduces the whole branch. This is scheduling of splittable jobs with setup times
(Chen, Ye, Zhang, "Lot-sizing scheduling with batch setup times", J. Sched. 9, 2006), which is NP-hard; here several
constructions are made, their exact costs compared, and the best one is improved for as long as one more holder helps.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from multifid.parallel.balance import least_level, network

Held = list[list[int]]  # of each unit, the ranks that hold it, ascending

GRAIN = 1 << 40  # costs are rounded to this part of the largest: exact arithmetic has no ties that depend on rounding
SLIVER = 0.02  # of a step: less than this is not worth another holder
GOOD_ENOUGH = Fraction(51, 50)  # a simpler placement is taken if its step is at most this much longer
HELPERS = 4  # ranks that are tried as one more holder of a unit
HALVINGS = 30  # of a level at most: costs may be so small that no number lies between two levels
STEPS = 16  # that stand for all, where costs differ between steps; a power of two
EVEN = 0.15  # spreads below this are none: estimates of single structures are no better
NODES = 2_000  # of the search for a packing, before it gives up


@dataclass(frozen=True)
class Unit:
    """Tasks that cannot be parted, with their costs and bytes added up. See `layout.Load`."""

    tasks: tuple[str, ...]
    cost: float
    holding: float
    bytes: int
    spread: float = 0.0


def even_groups(units: Sequence[Unit], ranks: int) -> Held:
    """Consecutive sub-groups of equal size; `ranks` is a multiple of the number of units."""
    size = ranks // len(units)
    return [list(range(i * size, (i + 1) * size)) for i in range(len(units))]


def sized_groups(units: Sequence[Unit], ranks: int) -> Held:
    """Consecutive sub-groups with sizes that make the longest of their steps shortest; no more units than ranks.

    Rank after rank goes to the unit whose ranks have most to do. That is optimal: no unit ever gets a rank that it
    could give to the one with the longest step.
    """
    sizes = [1] * len(units)
    queue = [(-unit.cost - unit.holding, i) for i, unit in enumerate(units)]
    heapq.heapify(queue)
    for _ in range(ranks - len(units)):
        _, i = queue[0]
        sizes[i] += 1
        heapq.heapreplace(queue, (-units[i].cost / sizes[i] - units[i].holding, i))
    starts = [sum(sizes[:i]) for i in range(len(units))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def pack(units: Sequence[Unit], ranks: int, free: int | None) -> Held | None:
    """Each unit on one rank, no rank idle, as even as it goes; no fewer units than ranks.

    free: bytes that a rank has for branches. None where nothing fits, or where it would take too long to find out.
    """
    options = [_pack_by_cost(units, ranks, free), _pack_by_bytes(units, ranks, free)]
    found = [held for held in options if held is not None]
    return min(found, key=lambda held: step_time(units, held), default=None)


def _pack_by_cost(units: Sequence[Unit], ranks: int, free: int | None) -> Held | None:
    """The most costly unit first, to the rank with least to do that has room (idle ranks before all others)."""
    load, room = [(0, 0.0)] * ranks, [free if free is not None else 0] * ranks
    held: Held = [[] for _ in units]
    for i in sorted(range(len(units)), key=lambda i: -units[i].cost - units[i].holding):
        fits = [r for r in range(ranks) if free is None or room[r] >= units[i].bytes]
        if not fits:
            return None
        rank = min(fits, key=lambda r: (load[r][0] > 0, load[r][1], load[r][0], r))
        held[i] = [rank]
        load[rank] = (load[rank][0] + 1, load[rank][1] + units[i].cost + units[i].holding)
        room[rank] -= units[i].bytes
    return held


def _pack_by_bytes(units: Sequence[Unit], ranks: int, free: int | None) -> Held | None:
    """A packing that respects the memory, found by search: the largest unit first, to every rank with room in turn."""
    if free is None or sum(unit.bytes for unit in units) > free * ranks:
        return None
    order = sorted(range(len(units)), key=lambda i: -units[i].bytes)
    room, rank_of, nodes = [free] * ranks, [0] * len(units), 0

    def search(depth: int) -> bool:
        nonlocal nodes
        if depth == len(order):
            return True
        tried: set[int] = set()
        need = units[order[depth]].bytes
        for rank in sorted(range(ranks), key=lambda r: (room[r], r)):
            if room[rank] < need or room[rank] in tried or nodes >= NODES:
                continue
            nodes += 1
            tried.add(room[rank])
            room[rank] -= need
            rank_of[order[depth]] = rank
            if search(depth + 1):
                return True
            room[rank] += need
        return False

    if not search(0):
        return None
    loads = [sum(u.cost + u.holding for i, u in enumerate(units) if rank_of[i] == r) for r in range(ranks)]
    for idle in sorted(set(range(ranks)) - set(rank_of)):  # takes a unit of the most loaded rank that has two
        crowded = max((r for r in range(ranks) if rank_of.count(r) > 1), key=lambda r: (loads[r], -r))
        moved = min((i for i, r in enumerate(rank_of) if r == crowded), key=lambda i: (-units[i].cost, i))
        loads[crowded] -= units[moved].cost + units[moved].holding
        loads[idle] += units[moved].cost + units[moved].holding
        rank_of[moved] = idle
    return [[rank] for rank in rank_of]


def can_pack(units: Sequence[Unit], ranks: int, free: int) -> bool:
    """Whether `pack`, or a rank for each unit, keeps to `free` bytes of branches on a rank."""
    if len(units) <= ranks:
        return max(unit.bytes for unit in units) <= free
    return _pack_by_bytes(units, ranks, free) is not None or _pack_by_cost(units, ranks, free) is not None


def fewest_bytes(units: Sequence[Unit], ranks: int) -> int:
    """Bytes of branches that must have room on a rank so that all units can be packed, to a thousandth."""
    sizes = [unit.bytes for unit in units]
    low, high = max(max(sizes), -(-sum(sizes) // ranks)), sum(sizes)
    if can_pack(units, ranks, low):
        return low
    while high - low > high // 1000:
        middle = (low + high) // 2
        if can_pack(units, ranks, middle):
            high = middle
        else:
            low = middle + 1
    return high


def cheapest(units: Sequence[Unit], ranks: int, free: int | None) -> Held | None:
    """The placement with the shortest predicted step among those that fit; None where none was found.

    Constructions, from simple to not: every unit on ranks of its own (or packed, where units outnumber ranks), units
    laid end to end over the ranks so that neighbours share one, every unit everywhere. The simplest that is within 2 %
    of the best is taken. Best is the mean over steps that differ by the spread of the costs: ranks that hold few units
    in common cannot even out a step in which one of them is large.
    """
    options = [sized_groups(units, ranks) if len(units) <= ranks else pack(units, ranks, free)]
    by_cost = sorted(range(len(units)), key=lambda i: -units[i].cost)
    options += [_end_to_end(units, ranks, free, list(range(len(units)))), _end_to_end(units, ranks, free, by_cost)]
    options.append([list(range(ranks)) for _ in units])
    fitting = [held for held in options if held is not None and _fits(units, held, ranks, free)]
    times = [(mean_time(units, held), held) for held in fitting]
    if not times:
        return None
    best = min(time for time, _ in times)
    simplest = next(held for time, held in times if time <= best * GOOD_ENOUGH)
    improved = _improve(units, ranks, free, simplest)
    return min((simplest, improved), key=lambda held: mean_time(units, held))


def _fits(units: Sequence[Unit], held: Held, ranks: int, free: int | None) -> bool:
    used = [0] * ranks
    for unit, where in zip(units, held, strict=True):
        for rank in where:
            used[rank] += unit.bytes
    return free is None or max(used) <= free


def _end_to_end(units: Sequence[Unit], ranks: int, free: int | None, order: list[int]) -> Held | None:
    """Units laid one after the other over the ranks, each rank filled to the least level at which all of it fits.

    McNaughton's wrap-around rule (Management Sci. 6, 1959), with the cost of holding a branch on every rank it touches.
    """
    low = max([(sum(u.cost + u.holding for u in units)) / ranks, *(u.cost / ranks + u.holding for u in units)])
    high = sum(u.cost + u.holding for u in units)
    best = _fill(units, ranks, free, order, high)
    for _ in range(HALVINGS):
        if high - low <= 1e-3 * high:
            break
        middle = (low + high) / 2
        held = _fill(units, ranks, free, order, middle)
        if held is None:
            low = middle
        else:
            best, high = held, middle
    everyone = best is not None and len({rank for where in best for rank in where}) == ranks
    return best if everyone else None


def _fill(units: Sequence[Unit], ranks: int, free: int | None, order: list[int], level: float) -> Held | None:
    held: Held = [[] for _ in units]
    rank, time, room = 0, level, free
    for i in order:
        unit, left = units[i], units[i].cost
        while left > 0 or not held[i]:
            enough = time - unit.holding >= min(left, SLIVER * level) and (room is None or room >= unit.bytes)
            if not enough and time == level:
                return None  # not even on a rank of its own
            if enough:
                done = min(left, time - unit.holding)
                left -= done
                time -= done + unit.holding
                room = None if room is None else room - unit.bytes
                held[i].append(rank)
            if not enough or left > 0:
                rank, time, room = rank + 1, level, free
                if rank == ranks:
                    return None
    return held


def _improve(units: Sequence[Unit], ranks: int, free: int | None, held: Held) -> Held:
    """One more holder for a unit that forces the longest step, for as long as it shortens the step by 2 %."""
    time, forcing = _evaluate(units, held)
    for _ in range(len(units)):
        holding = [0.0] * ranks
        for unit, where in zip(units, held, strict=True):
            for rank in where:
                holding[rank] += unit.holding
        options = []
        for i in forcing:
            others = set(range(ranks)) - set(held[i])
            for rank in heapq.nsmallest(HELPERS, others, key=lambda r: (holding[r], r)):
                option = [sorted([*where, rank]) if j == i else where for j, where in enumerate(held)]
                if _fits(units, option, ranks, free):
                    options.append((*_evaluate(units, option), option))
        if not options:
            break
        better = min(options, key=lambda option: option[0])
        if better[0] * GOOD_ENOUGH > time:
            break
        time, forcing, held = better
    return held


def step_time(units: Sequence[Unit], held: Held) -> Fraction:
    """The cost of the most loaded rank in a step, in the unit of the costs."""
    return _evaluate(units, held)[0]


def mean_time(units: Sequence[Unit], held: Held) -> Fraction:
    """`step_time` in the mean over steps in which every unit costs more or less than its mean by its spread.

    Units go up and down by the columns of a Hadamard matrix: each as often up as down, and no two together (but every
    15th), so that as few steps as these have the means and variances of many.
    """
    if max(unit.spread for unit in units) < EVEN:
        return step_time(units, held)
    times = []
    for step in range(STEPS):
        signs = [1 - 2 * ((step & (1 + i % (STEPS - 1))).bit_count() % 2) for i in range(len(units))]
        changed = [
            replace(u, cost=u.cost * (1 + sign * min(u.spread, 1.0))) for u, sign in zip(units, signs, strict=True)
        ]
        times.append(step_time(changed, held))
    return sum(times, Fraction(0)) / STEPS


def _evaluate(units: Sequence[Unit], held: Held) -> tuple[Fraction, list[int]]:
    """The cost of the most loaded rank, and the units that force it."""
    largest = max(max(unit.cost, unit.holding) for unit in units) or 1.0
    grain = Fraction(largest) / GRAIN
    work = [max(1, int(Fraction(unit.cost) / grain)) for unit in units]
    net, _ = network(work, held)
    base = [0] * len(net.ranks)
    for unit, classes in zip(units, net.reach, strict=True):
        for k in classes:
            base[k] += int(Fraction(unit.holding) / grain)
    level, forcing = least_level(net, base)
    return level * grain, forcing
