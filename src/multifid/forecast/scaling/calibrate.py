"""A machine's description from measured steps, and how well it then tells the steps that it has not seen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls

from multifid.forecast.estimate import Forecast, Mean, forecast, mean_rank, update_bytes
from multifid.forecast.machines import Link, Machine
from multifid.forecast.scaling.measure import MeasuredPoint, ScalingPoint
from multifid.forecast.subject import Subject

Placement = Mapping[str, Sequence[int]]
UNUSED = 1e30  # of a rate: what takes no time


@dataclass(frozen=True)
class MeasuredCase:
    """A measured point with what a forecast needs to know of it."""

    measured: MeasuredPoint
    subject: Subject
    placement: Placement

    @property
    def point(self) -> ScalingPoint:
        return self.measured.point

    def on(self, machine: Machine) -> Forecast:
        return forecast(self.subject, self.placement, machine)


def used(point: ScalingPoint) -> bool:
    """Whether the machine is fitted to a point; what it says of the others is a test of it."""
    return point.ranks == 1 or (point.mode == "weak" and point.placement == "replicated")


def calibrate(machine: Machine, cases: Sequence[MeasuredCase]) -> Machine:
    """The machine with the rates, links and noise that the cases show.

    In this order, since each takes the ones before it as given: passes of one rank (arithmetic, traffic, launches),
    its optimizer, how much slower passes are where all cores are busy, reductions, and noise.
    """
    fitted = [case for case in cases if used(case.point)]
    single = [case for case in fitted if case.point.ranks == 1] or fitted
    many = [case for case in fitted if case.point.ranks > 1]
    machine = _passes(machine, single)
    machine = replace(
        machine, name="measured", update=_update(machine, single), bookkeeping=_bookkeeping(fitted), data=_data(single)
    )
    if machine.cores is not None and many:
        machine = replace(machine, contention=_contention(machine, many))
    if many:
        machine = _links(machine, many)
        machine = replace(machine, noise=_noise(machine, many))
    return machine


def _passes(machine: Machine, cases: Sequence[MeasuredCase]) -> Machine:
    """Non-negative least squares of relative errors: seconds = flops / rate + traffic / rate + kernels x launch."""
    rows, seconds = [], []
    for case in cases:
        mean = mean_rank(case.subject, case.placement)
        for which, work in (("forward", mean.forward), ("backward", mean.backward)):
            rows.append([work.flops, work.traffic, work.kernels])
            seconds.append(case.measured.phases[which])
    a, b = np.array(rows), np.array(seconds)
    scale = a.max(axis=0)
    scale[scale == 0] = 1.0
    x = nnls(a / scale / b[:, None], np.ones(len(b)))[0] / scale
    flops, traffic, launch = x.tolist()
    return replace(machine, flops=1 / (flops or 1 / UNUSED), traffic=1 / (traffic or 1 / UNUSED), launch=launch)


def _update(machine: Machine, cases: Sequence[MeasuredCase]) -> float:
    moved = sum(update_bytes(machine, _mean(case).update) for case in cases)
    return moved / sum(case.measured.phases["optimizer"] for case in cases)


def _bookkeeping(cases: Sequence[MeasuredCase]) -> float:
    return float(np.mean([case.measured.phases["bookkeeping"] for case in cases]))


def _data(cases: Sequence[MeasuredCase]) -> float:
    return min(case.measured.edge for case in cases)


def _mean(case: MeasuredCase) -> Mean:
    return mean_rank(case.subject, case.placement)


def _contention(machine: Machine, cases: Sequence[MeasuredCase]) -> float:
    plain = replace(machine, contention=1.0)
    ratios = []
    for case in cases:
        told, seen = case.on(plain).phases, case.measured.phases
        if case.point.ranks >= (machine.cores or 0):
            ratios.append((seen["forward"] + seen["backward"]) / (told["forward"] + told["backward"]))
    return max(1.0, float(np.mean(ratios))) if ratios else 1.0


def _links(machine: Machine, cases: Sequence[MeasuredCase]) -> Machine:
    """Latency and bandwidth inside the node from what reductions took; those between nodes stay as described.

    Least squares of relative errors, the best from several starts: what the backward pass hides makes kinks.
    """
    seen = np.array([max(case.measured.phases["communication"], 1e-9) for case in cases])

    def told(latency: float, inverse: float) -> np.ndarray:
        there = replace(machine, inside=Link(latency, 1 / max(inverse, 1 / UNUSED)))
        return np.array([case.on(there).phases["communication"] for case in cases])

    scale = seen.max() / np.maximum([told(1.0, 0.0).max(), told(0.0, 1.0).max()], 1e-12)  # either alone, nothing hidden
    fits = [
        least_squares(lambda x: told(*(x * scale).tolist()) / seen - 1, start, bounds=(0, np.inf))
        for start in ([1.0, 0.01], [0.01, 1.0], [0.5, 0.5])
    ]
    latency, inverse = (min(fits, key=lambda fit: fit.cost).x * scale).tolist()
    return replace(machine, inside=Link(latency, 1 / max(inverse, 1 / UNUSED)))


def _noise(machine: Machine, cases: Sequence[MeasuredCase]) -> float:
    """What the ranks' times scatter by beyond what their waiting is forecast from without noise."""

    def excess(noise: float) -> float:
        told = [case.on(replace(machine, noise=noise)).phases["waiting"] for case in cases]
        return sum(told) - sum(case.measured.phases["waiting"] for case in cases)

    return _root(excess, 0.0, 1.0)


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is zero, or the end of the interval that is nearer to it."""
    if f(low) >= 0:
        return low
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return high


def like_here(machine: Machine, measured: Machine, here: Machine) -> Machine:
    """A described machine with the part of its rates that the measured kernels reach of this machine's, and our host.

    here: matrix products and additions of this machine by themselves.
    """
    return replace(
        machine,
        flops=machine.flops * min(1.0, measured.flops / here.flops),
        traffic=machine.traffic * min(1.0, measured.traffic / here.traffic),
        data=measured.data,
        bookkeeping=measured.bookkeeping,
    )
