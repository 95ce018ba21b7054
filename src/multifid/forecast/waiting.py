"""How long a step waits: for reductions that the backward pass does not hide, and for the slowest rank. Arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaincinv, log_ndtr

from multifid.forecast.machines import Machine, all_reduce
from multifid.parallel.shares import shares

PIECES = 400  # structures at most that a sampled cut of a step holds for each kind of rank
RANKS = 32  # ranks at most in a sampled cut: evenness depends on what each gets, hardly on how many they are
GRID = 150  # points of a numerical integral
SAMPLED = 16_000  # structures in all cuts that are made to see how uneven they are ...
CUTS = 64  # ... and most cuts: of few structures, one in a hundred may cost more than a rank's part


@dataclass(frozen=True)
class Kind:
    """Structures of one task as a rank gets them in a step."""

    count: float  # structures, in the mean
    cost: float  # of a structure, in the mean
    spread: float  # standard deviation of a structure's cost, as a part of the mean
    error: float  # standard deviation of its estimate, as a part of the cost


def exposed(
    machine: Machine,
    backward: float,
    branch_part: float,
    branches: Sequence[tuple[int, float]],
    encoder: tuple[int, float],
    bucket: float,
) -> float:
    """Seconds between the end of the backward pass and the last sum.

    branches: (ranks, bytes) of the groups of one rank, in their order; encoder: the same of the world.  branch_part: of
    the backward pass, until the branches' gradients are there.  bucket: bytes that travel together. Buckets arrive
    evenly in the backward pass and are sent one after the other, each when it is ready and the one before it is done.
    The backward pass goes on while ranks wait for each other; of what moving bytes takes, it hides the part
    `machine.overlap`.
    """
    ready: list[float] = []
    takes: list[float] = []
    moving = 0.0  # of all that, bytes
    early = backward * branch_part
    total = sum(size for _, size in branches)
    done = 0.0
    for ranks, size in branches:
        pieces = max(1, math.ceil(size / bucket))
        for _ in range(pieces):
            done += size / pieces
            ready.append(early * done / total)
            takes.append(all_reduce(machine, ranks, size / pieces))
            moving += takes[-1] - all_reduce(machine, ranks, 0.0)
    pieces = max(1, math.ceil(encoder[1] / bucket))
    for k in range(pieces):
        ready.append(early + (backward - early) * (k + 1) / pieces)
        takes.append(all_reduce(machine, encoder[0], encoder[1] / pieces))
        moving += takes[-1] - all_reduce(machine, encoder[0], 0.0)
    end = 0.0
    for at, duration in zip(ready, takes, strict=True):
        end = max(end, at) + duration
    late = max(end - backward, 0.0)
    hidden = 1 - late / max(sum(takes), 1e-300)
    return late + (1 - machine.overlap) * hidden * moving


def expected_slowest(means: ArrayLike, deviations: ArrayLike, counts: Sequence[int]) -> float:
    """The mean of the largest of independent normal times: `counts[k]` ranks with mean and deviation k each.

    means, deviations: (classes,), or (steps, classes) of several steps, over which the result is averaged.
    """
    mean = np.atleast_2d(np.asarray(means, float))
    deviation = np.broadcast_to(np.asarray(deviations, float), mean.shape)
    if deviation.max() <= 1e-12 * mean.max():
        return float(mean.max(axis=1).mean())
    deviation = np.maximum(deviation, 1e-9 * mean.max())
    low, high = (mean - 6 * deviation).max(axis=1), (mean + 7 * deviation).max(axis=1)
    x = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, GRID)  # (steps, points)
    z = (x[:, :, None] - mean[:, None, :]) / deviation[:, None, :]
    all_below = np.exp(log_ndtr(z) @ np.array(counts, float))
    return float((high - np.trapezoid(all_below, x, axis=1)).mean())


def sampled_steps(structures: Sequence[float], spreads: Sequence[float], steps: int) -> np.ndarray:
    """What the structures of each draw cost together in some steps, as a part of the mean: (steps, draws).

    spreads: standard deviation of a structure's cost, as a part of the mean. Costs are taken to be of gamma
    distributions, whose sums are of gamma distributions again. Every draw takes each of `steps` equal parts of its
    distribution once, in an order of its own (a Latin hypercube): few steps then have the right mean and spread.
    """
    generator = np.random.default_rng(0)
    parts = (np.arange(steps) + 0.5) / steps
    columns = []
    for count, spread in zip(structures, spreads, strict=True):
        shape = count / max(spread, 1e-3) ** 2
        values = gammaincinv(shape, parts)
        columns.append(generator.permutation(values / values.mean()))
    return np.stack(columns, axis=1)


def taking_turns(works: Sequence[float], counts: Sequence[int], cores: int) -> float:
    """When the last of some ranks is done that share `cores`: `counts[k]` ranks with work k, in seconds of a core.

    All that still work get the same part of the cores, at most one each: who has most to do is faster towards the end.
    """
    active, at, done = sum(counts), 0.0, 0.0
    for work, count in sorted(zip(works, counts, strict=True)):
        at += (work - done) * max(1.0, active / cores)
        done, active = work, active - count
    return at


def unevenness(kinds: Sequence[Kind], ranks: int, balanced: bool) -> tuple[float, float]:
    """(most / mean of what ranks of one class are given, standard deviation / mean of what they really have).

    Balanced: the step is cut by `shares` from estimates; what is left is the grain of whole structures, and the error
    of the estimates. Not balanced: every rank gets its number of structures, whatever they cost.
    """
    rounded = tuple((round(k.count, 3), round(k.cost, 6), round(k.spread, 3), round(k.error, 3)) for k in kinds)
    return _unevenness(rounded, min(ranks, RANKS), balanced)


@lru_cache(maxsize=4096)
def _unevenness(kinds: tuple[tuple[float, ...], ...], ranks: int, balanced: bool) -> tuple[float, float]:
    mean = sum(count * cost for count, cost, _, _ in kinds)
    if mean <= 0:
        return 1.0, 0.0
    if not balanced:
        # a count between two whole numbers is one of them on each rank
        variance = sum(cost**2 * (n * spread**2 + (n % 1) * (1 - n % 1)) for n, cost, spread, _ in kinds)
        return 1.0, math.sqrt(variance) / mean
    error = math.sqrt(sum(count * (cost * e) ** 2 * (1 + s * s) for count, cost, s, e in kinds)) / mean
    if sum(count for count, *_ in kinds) > PIECES:
        return 1.0, error  # so many structures fill every gap
    if ranks == 1:
        return 1.0, error
    total = sum(count for count, *_ in kinds) * ranks
    cuts = max(4, min(CUTS, int(SAMPLED / max(total, 1.0))))
    generator, most, even = np.random.default_rng(0), 0.0, 0.0
    for _ in range(cuts):
        costs = {
            str(i): _sample(generator, round(count * ranks), cost, spread)
            for i, (count, cost, spread, _) in enumerate(kinds)
        }
        owner = shares(costs, {key: list(range(ranks)) for key in costs})
        load = np.stack([np.bincount(owner[i], weights=costs[i], minlength=ranks) for i in costs]).sum(axis=0)
        most, even = most + float(load.max()), even + float(load.mean())
    return most / max(even, 1e-300), error


def _sample(generator: np.random.Generator, count: int, cost: float, spread: float) -> np.ndarray:
    """Costs of a gamma distribution: positive, with the given mean and deviation."""
    if spread < 1e-3:
        return np.full(count, cost)
    return generator.gamma(1 / spread**2, cost * spread**2, count)
