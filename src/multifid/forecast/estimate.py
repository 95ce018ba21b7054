"""What a run would take of a machine, from numbers alone: bytes of a rank, bytes on the network, seconds of a step.

A description of the machine (`forecast/machines.py`) says how long the work of a run (`subject.py`) takes where its
placement lays it (`members.py`). A step is

    data | forward | backward | reductions that the backward pass does not hide | waiting for the slowest | optimizer
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from multifid.forecast.machines import Machine, collective, sent, slowed
from multifid.forecast.members import Member, members_of, steps_of
from multifid.forecast.subject import Parameters, Subject
from multifid.forecast.waiting import expected_slowest, exposed, taking_turns
from multifid.model.counting import Work
from multifid.parallel.gradients import BUCKET_BYTES

# Bytes that are moved for a byte of parameters beside the optimizer: gradients are zeroed and their norm is taken (2);
# the average is read with the weight and written (3).
GRADIENTS, AVERAGE = 2.0, 3.0


@dataclass(frozen=True)
class Forecast:
    """What one placement takes."""

    ranks_of: dict[str, list[int]]
    bytes_per_rank: dict[str, int]  # of the rank that holds most
    largest_local_batch: int  # structures on a rank, in the mean, so that no rank needs more than its memory
    bytes_per_step: int  # that the busiest rank sends
    phases: dict[str, float]  # seconds

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def bytes(self) -> int:
        return sum(self.bytes_per_rank.values())


def forecast(
    subject: Subject,
    placement: Mapping[str, Sequence[int]],
    machine: Machine,
    *,
    balanced: bool = True,
    sharded: bool = False,
    memory: float | None = None,
) -> Forecast:
    """What a placement (task -> ranks) takes of a machine.

    balanced: steps are cut by costs, as the program does; else every rank of a group gets as many structures as the
    others.  sharded: the encoder is.  memory: bytes that a rank may use.
    """
    ranks = 1 + max(max(where) for where in placement.values())
    members = members_of(subject, placement, balanced)
    held = [_bytes(subject, rank, ranks, sharded) for rank in members]
    most = max(held, key=lambda b: sum(b.values()))
    limit = machine.memory if memory is None else memory
    room = min(_largest(subject, r, b, limit, sharded) for r, b in zip(members, held, strict=True))
    return Forecast(
        ranks_of={task: list(where) for task, where in placement.items()},
        bytes_per_rank=most,
        largest_local_batch=int(room * subject.structures / ranks),
        bytes_per_step=int(max(_sent(subject, rank, ranks, sharded) for rank in members)),
        phases=_phases(subject, members, steps_of(subject, placement, balanced), machine, ranks, sharded),
    )


@dataclass(frozen=True)
class Mean:
    """What a rank does in a step, in the mean over ranks."""

    forward: Work
    backward: Work
    update: Work  # of the optimizer, with norm and average


def mean_rank(subject: Subject, placement: Mapping[str, Sequence[int]]) -> Mean:
    """The work behind a forecast, for fitting a machine's rates to measured times."""
    members = members_of(subject, placement, balanced=True)
    counts = [r.count for r in members]

    def mean(which: str) -> Work:
        if which == "update":
            works = [update_work(subject, subject.encoder, len(r.groups)) for r in members]
        else:
            works = [_work(subject, r, which) for r in members]
        return Work(*np.average([(w.flops, w.traffic, w.kernels) for w in works], axis=0, weights=counts).tolist())

    return Mean(mean("forward"), mean("backward"), mean("update"))


def _bytes(subject: Subject, rank: Member, ranks: int, sharded: bool) -> dict[str, int]:
    """What a rank holds, by kind."""
    encoder = subject.encoder.sharded(ranks) if sharded else subject.encoder
    number = encoder.count + len(rank.groups) * subject.branch.count
    moving = encoder.moving_count + len(rank.groups) * subject.branch.moving_count
    kept = subject.update(encoder).kept + len(rank.groups) * subject.update(subject.branch).kept
    activations = subject.footprint.activations(rank.size.times(1 / rank.pieces))
    if sharded:
        activations += subject.encoder.gathered * subject.width
    return {
        "parameters": number * subject.width,
        "gradients": moving * subject.width,
        "optimizer": kept,
        "averages": number * subject.width * subject.averaged,
        "activations": int(max(activations, 0)),
    }


def _largest(subject: Subject, rank: Member, held: dict[str, int], limit: float, sharded: bool) -> float:
    """How many times this rank's batch, in one piece, its memory would hold."""
    own = subject.footprint
    state = sum(held.values()) - held["activations"]
    state += subject.encoder.gathered * subject.width * sharded

    def fits(times: float) -> bool:
        return state + own.activations(rank.size.times(times)) <= limit

    # The fullest moment of a large batch may be another one than that of a small one: no straight line leads there.
    if not fits(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while fits(high) and high < 1e12:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _sent(subject: Subject, rank: Member, ranks: int, sharded: bool) -> float:
    encoder, branch = subject.encoder.moving_count * subject.width, subject.branch.moving_count * subject.width
    if sharded:  # weights travel, also those that are not trained
        encoder = subject.encoder.count * subject.width
    rounds = _rounds(subject) if sharded else 2
    return sent(ranks, encoder, rounds) + sum(sent(size, branch) for _, size in rank.groups)


def _rounds(subject: Subject) -> int:
    """A sharded encoder is gathered forward (and again backward, if it was dropped), and its gradients scattered."""
    return 2 if subject.model.conservative else 3


def _phases(
    subject: Subject, members: list[Member], steps: np.ndarray, machine: Machine, ranks: int, sharded: bool
) -> dict[str, float]:
    """Seconds of the parts of a step; passes are those of a mean rank, what the slowest takes longer is `waiting`.

    steps: (steps, classes), what a rank of each class has to do in some steps, as a part of the mean.
    """
    turns = slowed(machine, ranks)
    forward = [turns * _pass(subject, r, machine, "forward") for r in members]
    backward = [turns * _pass(subject, r, machine, "backward") for r in members]
    counts = [r.count for r in members]
    compute = np.stack([turns * _both(subject, r, machine, r.even * f) for r, f in zip(members, steps.T, strict=True)])
    more = np.stack(
        [
            turns * _both(subject, r, machine, r.even * (1 + r.deviation) * f)
            for r, f in zip(members, steps.T, strict=True)
        ]
    )
    deviation = np.hypot(more - compute, compute * machine.noise)
    mean_forward, mean_backward = np.average(forward, weights=counts), np.average(backward, weights=counts)
    longest = expected_slowest(compute.T, deviation.T, counts)
    if machine.cores is not None and ranks > machine.cores:
        alone = compute.T / turns * machine.contention
        ends = [taking_turns(step, counts, machine.cores) for step in alone.tolist()]
        longest += float(np.mean(ends) - compute.max(axis=0).mean())
    data = max(machine.data * r.size.edges for r in members)
    updates = [_update(subject, r, machine, ranks, sharded) for r in members]
    phases = {
        "data": 0.0,
        "forward": float(mean_forward),
        "backward": float(mean_backward),
        "communication": max(
            _waits(subject, r, machine, ranks, sharded, forward[i], backward[i]) for i, r in enumerate(members)
        ),
        "waiting": max(longest - float(mean_forward + mean_backward), 0.0),
        "optimizer": turns * max(updates),
        "bookkeeping": machine.bookkeeping,
    }
    # Prepared on the host ahead of the step; where cores are shared, their contention holds what it costs.
    phases["data"] = max(0.0, data - sum(v for k, v in phases.items() if k != "data"))
    return phases


def _both(subject: Subject, rank: Member, machine: Machine, factors: np.ndarray) -> np.ndarray:
    """Seconds of both passes with so many times the structures; what does not grow with them stays."""
    total = np.zeros(len(factors))
    for which in ("forward", "backward"):
        nothing, one = (_work(subject, replace(rank, size=rank.size.times(x)), which) for x in (0.0, 1.0))
        device, host = (
            a + factors * (b - a) for a, b in zip(_seconds(nothing, machine), _seconds(one, machine), strict=True)
        )
        total += np.maximum(device, host) if machine.queued else device + host
    return total


def _pass(subject: Subject, rank: Member, machine: Machine, which: str) -> float:
    return pass_seconds(_work(subject, rank, which), machine)


def pass_seconds(work: Work, machine: Machine, width: int = 4) -> float:
    """Seconds of a pass. width: bytes of a number; an operation in double precision counts as two."""
    device, host = _seconds(replace(work, flops=work.flops * width / 4), machine)
    return max(device, host) if machine.queued else device + host


def _seconds(work: Work, machine: Machine) -> tuple[float, float]:
    """Of the device, and of the host that issues the operations."""
    return work.flops / machine.flops + work.traffic / machine.traffic, work.kernels * machine.launch


def _work(subject: Subject, rank: Member, which: str) -> Work:
    """All micro-batches of a pass; an operation in double precision counts as two."""
    one: Work = getattr(subject.footprint, which)(rank.size.times(1 / rank.pieces))
    n = rank.pieces
    return Work(n * one.flops * subject.width / 4, n * one.traffic, n * one.kernels)


def _update(subject: Subject, rank: Member, machine: Machine, ranks: int, sharded: bool) -> float:
    encoder = subject.encoder.sharded(ranks) if sharded else subject.encoder
    work = update_work(subject, encoder, len(rank.groups))
    return update_bytes(machine, work) / (machine.update or machine.traffic)


def update_work(subject: Subject, encoder: Parameters, branches: int) -> Work:
    """The optimizer's update of the encoder (or of a piece of it) and of some branches, with norm and average."""
    one, other = subject.update(encoder).work, subject.update(subject.branch).work
    number = encoder.count + branches * subject.branch.count
    moving = encoder.moving_count + branches * subject.branch.moving_count
    beside = subject.width * (moving * GRADIENTS + number * AVERAGE * subject.averaged)
    return Work(
        (one.flops + branches * other.flops) * subject.width / 4,  # an operation in double precision counts as two
        one.traffic + branches * other.traffic + beside,
        one.kernels + branches * other.kernels,
    )


def update_bytes(machine: Machine, work: Work) -> float:
    """What an update moves, and as many bytes as could be moved in the time of what it computes and launches."""
    host = work.kernels * machine.launch * machine.traffic
    device = work.traffic + work.flops / machine.flops * machine.traffic
    return max(device, host) if machine.queued else device + host


def _waits(
    subject: Subject, rank: Member, machine: Machine, ranks: int, sharded: bool, forward: float, backward: float
) -> float:
    """Reductions that are not hidden, and the report after every step.

    Counts of labels that are not known travel beside a step that holds a sum of the same length, and take nothing.
    """
    width = subject.width
    encoder = (subject.encoder.count if sharded else subject.encoder.moving_count) * width
    branch = subject.branch.moving_count * width
    groups = [(size, float(branch)) for _, size in rank.groups if size > 1]
    last = backward / rank.pieces  # gradients travel in the last micro-batch
    small = collective(machine, ranks, 0.0, rounds=2)
    part = subject.footprint.of_branches(rank.size)
    if not sharded:
        return small + exposed(machine, last, part, groups, (ranks, float(encoder)), BUCKET_BYTES)
    layers = max(1, subject.layers)
    moved = collective(machine, ranks, encoder, rounds=_rounds(subject))
    hidden = machine.overlap * min(moved * (1 - 1 / layers), (forward + backward) * (1 - 1 / layers))
    return small + moved - hidden + exposed(machine, last, part, groups, (1, 0.0), BUCKET_BYTES)
