"""What the ranks of a placement get of a step: in the mean, and from one step to the next."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from multifid.forecast.subject import Subject
from multifid.forecast.waiting import Kind, sampled_steps, unevenness
from multifid.model.footprint import BatchSize
from multifid.parallel.balance import Network, network, spread
from multifid.training.build import holders

GRAIN = 1 << 30  # costs as whole numbers, for the exact balance
STEPS = 32  # that are sampled: what their structures cost differs, and groups cannot help each other


@dataclass(frozen=True)
class Member:
    """A rank of one class: all of them hold the same branches."""

    count: int  # ranks of this class
    groups: list[tuple[str, int]]  # branches held, and the ranks of their groups
    structures: dict[tuple[str, ...], float]  # of each unit
    size: BatchSize
    pieces: int  # micro-batches
    even: float  # most / mean within the class
    deviation: float  # of a rank's time, as a part of it


def members_of(subject: Subject, placement: Mapping[str, Sequence[int]], balanced: bool) -> list[Member]:
    """One rank of every class, with its share of a mean step."""
    units = subject.together
    cost = [subject.tasks[u[0]].structures * subject.tasks[u[0]].edges for u in units]
    work = [max(1, int(c / max(max(cost), 1e-9) * GRAIN)) for c in cost]
    net, class_of = network(work, [placement[u[0]] for u in units])
    amounts = {key: float(amount) for key, amount in spread(net).items()} if balanced else {}
    branches = {b: set(where) for b, where in holders(subject.branch_of, placement).items()}
    out = []
    for number, count in enumerate(net.ranks):
        first = next(rank for rank, k in class_of.items() if k == number)
        share = {
            u: amounts.get((p, number), 0.0) / work[p] if balanced else 1.0 / len(placement[u[0]])
            for p, u in enumerate(units)
            if number in net.reach[p]
        }
        structures = {u: part * subject.tasks[u[0]].structures for u, part in share.items() if part > 0}
        groups = [(b, len(where)) for b, where in branches.items() if first in where]
        out.append(_member(subject, count, groups, structures, balanced))
    return out


def steps_of(subject: Subject, placement: Mapping[str, Sequence[int]], balanced: bool) -> np.ndarray:
    """Edges of a rank of each class in sampled steps, as a part of those in a mean step: (steps, classes).

    A step holds few of the costliest structures or many. Ranks of one class share that, and classes that hold the same
    branches help each other as far as the exact balance allows; groups without a rank in common cannot.
    """
    units = subject.together
    loads = [subject.tasks[u[0]] for u in units]
    work = np.array([load.structures * load.edges for load in loads])
    work = np.maximum(work / max(work.max(), 1e-9) * GRAIN, 1.0)
    net, _ = network([int(w) for w in work], [placement[u[0]] for u in units])
    if len(net.ranks) == 1 or not balanced:
        return np.ones((1, len(net.ranks)))
    steps = work * sampled_steps([load.structures for load in loads], [load.spread for load in loads], STEPS)
    mean = _levels(net, work)
    return np.stack([_levels(net, step) for step in steps]) / np.maximum(mean, 1e-9)


def _levels(net: Network, work: np.ndarray) -> np.ndarray:
    """What a rank of each class does, (classes,), if work of each draw is laid as evenly as the network allows."""
    levels = np.zeros(len(net.ranks))
    if all(len(classes) == 1 for classes in net.reach):
        for amount, (k,) in zip(work, net.reach, strict=True):
            levels[k] += amount / net.ranks[k]
        return levels
    whole = [max(1, int(amount)) for amount in work]
    for (_, k), amount in spread(Network(whole, net.reach, net.ranks)).items():
        levels[k] += float(amount)
    return levels


def _member(
    subject: Subject,
    count: int,
    groups: list[tuple[str, int]],
    structures: dict[tuple[str, ...], float],
    balanced: bool,
) -> Member:
    loads = {u: subject.tasks[u[0]] for u in structures}
    atoms = sum(n * loads[u].atoms for u, n in structures.items())
    edges = sum(n * loads[u].edges for u, n in structures.items())
    triplets = sum(n * loads[u].triplets for u, n in structures.items())
    labelled = sum(n * loads[u].atoms * len(u) for u, n in structures.items())
    seen = sum(-math.expm1(-n) * len(u) for u, n in structures.items())  # tasks of which a step holds a structure
    pieces = 1 if subject.max_edges is None else max(1, math.ceil(edges / subject.max_edges))
    kinds = [Kind(n, loads[u].edges, loads[u].spread, loads[u].error) for u, n in structures.items()]
    even, deviation = unevenness(kinds, count, balanced)
    size = BatchSize(max(seen, 1.0), atoms, labelled, edges, triplets)
    return Member(count, groups, structures, size, pieces, even, deviation)
