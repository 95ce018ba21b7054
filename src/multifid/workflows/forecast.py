"""What a run would take of a machine, from numbers alone: bytes of a rank, bytes on the network, seconds of a step.

Nothing is built and no structure is read: parameters and activations are counted on modules without memory
(`model/footprint.py`), work comes from the numbers of atoms and estimated edges of the stores, and a description of the
machine (`parallel/machines.py`) says how long that takes. A step is

    data | forward | backward | reductions that the backward pass does not hide | waiting for the slowest | optimizer
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from multifid.config import Config
from multifid.data.loader import Source, edge_costs
from multifid.data.order import Draw
from multifid.model.branch import Branch
from multifid.model.encoder import build_encoder
from multifid.model.footprint import Footprint, Size, Work, footprint
from multifid.model.potential import ModelConfig
from multifid.parallel.balance import network, spread
from multifid.parallel.gradients import BUCKET_BYTES
from multifid.parallel.machines import Machine, collective, sent, slowed
from multifid.parallel.predict import Kind, expected_slowest, exposed, taking_turns, unevenness
from multifid.parallel.shard import rows_of_piece
from multifid.train.build import holders
from multifid.train.costs import SAMPLE, gathered

# Error of an estimated cost, as `data.loader.edge_costs` states it.
CRYSTAL_ERROR, MOLECULE_ERROR = 0.05, 0.125
# Bytes that the optimizer moves for a byte of parameters: AdamW reads weight, gradient and two moments and writes all
# but the gradient (7), the average is read with the weight and written (3), gradients are zeroed and their norm is
# taken (2).
UPDATE, AVERAGE = 9.0, 3.0
GRAIN = 1 << 30  # costs as whole numbers, for the exact balance


@dataclass(frozen=True)
class TaskLoad:
    """Structures of a task in a mean step, over all ranks."""

    structures: float
    atoms: float  # of a structure
    edges: float  # of a structure
    spread: float = 0.0  # standard deviation of a structure's edges, as a part of the mean
    error: float = MOLECULE_ERROR  # of their estimate


@dataclass(frozen=True)
class Parameters:
    """Of the encoder, or of one branch."""

    shapes: tuple[tuple[int, ...], ...]
    gathered: int = 0  # numbers that a rank holds beside its pieces where they are sharded

    @property
    def count(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def sharded(self, ranks: int) -> "Parameters":
        """The largest piece of a rank where every parameter is cut along its first dimension."""
        return replace(self, shapes=tuple((rows_of_piece(s[0], ranks), *s[1:]) for s in self.shapes))


@dataclass(frozen=True)
class Subject:
    """A run, as far as forecasts know it."""

    model: ModelConfig
    encoder: Parameters
    branch: Parameters
    footprint: Footprint
    tasks: dict[str, TaskLoad]
    branch_of: dict[str, str]
    together: tuple[tuple[str, ...], ...]  # tasks of one store; every task is in one of them
    width: int = 4  # bytes of a number
    averaged: bool = True
    max_edges: int | None = None

    def times(self, factor: float) -> "Subject":
        """The same with so many times the structures in a step."""
        tasks = {t: replace(load, structures=load.structures * factor) for t, load in self.tasks.items()}
        return replace(self, tasks=tasks)

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """Seconds that a machine computes for one more edge, and for one more atom, of a step."""

        def of(size: Size) -> float:
            works = [self.footprint.forward(size), self.footprint.backward(size)]
            return sum(w.flops / machine.flops * self.width / 4 + w.traffic / machine.traffic for w in works)

        many = Size(1, 1e6, 1e6, 1e7)
        edge = (of(replace(many, edges=2e7)) - of(many)) / 1e7
        return edge, (of(replace(many, atoms=2e6, labelled=2e6)) - of(many)) / 1e6

    @property
    def structures(self) -> float:
        """Structures that pass through the encoder in a step; those that several tasks label count once."""
        return sum(self.tasks[unit[0]].structures for unit in self.together)


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


def subject_of(
    config: Config, sources: Sequence[Source], draws: Sequence[Draw], ranks: int, processor: bool
) -> Subject:
    """A run on `ranks` ranks as its config and stores describe it; `train.batch` must be resolved."""
    tasks: dict[str, TaskLoad] = {}
    for source, draw in zip(sources, draws, strict=True):
        index = np.asarray(source.store.index("train"))
        sample = index[:: max(1, len(index) // SAMPLE)].astype(np.int64)
        edges = edge_costs(source, sample, config.model.cutoff)
        mean = max(float(edges.mean()), 1e-9)
        load = TaskLoad(
            structures=float(draw.rate),
            atoms=float(source.store.rows("natoms", sample).mean()),
            edges=float(edges.mean()),
            spread=float(edges.std()) / mean,
            error=CRYSTAL_ERROR if "cell.npy" in source.store.manifest["files"] else MOLECULE_ERROR,
        )
        tasks |= dict.fromkeys(draw.tasks, load)
    atoms = sum(tasks[draw.tasks[0]].structures * tasks[draw.tasks[0]].atoms for draw in draws)
    return make_subject(
        config.model,
        dict(sorted(tasks.items())),
        branch_of=config.branch_of(),
        together=[draw.tasks for draw in draws],
        double=config.train.precision == "fp64",
        averaged=config.train.ema is not None,
        max_edges=config.train.max_edges,
        near=2 ** round(math.log2(min(max(atoms / ranks, 64), 8192))),
        processor=processor,
    )


def make_subject(
    model: ModelConfig,
    tasks: dict[str, TaskLoad],
    *,
    branch_of: Mapping[str, str] | None = None,
    together: Sequence[Sequence[str]] = (),
    double: bool = False,
    averaged: bool = True,
    max_edges: int | None = None,
    near: int = 2048,
    processor: bool = False,
) -> Subject:
    """A run from plain numbers, without stores. near: about the atoms of a rank's batch.  processor: no accelerator."""
    with torch.device("meta"):
        encoder = build_encoder(model.encoder, model.cutoff)
        branch = Branch(encoder.hidden, encoder.vectors, model.branch)
    beside = gathered(encoder, model.branch.forces == "conservative", max_edges is not None)
    atoms = sum(load.structures * load.atoms for load in tasks.values())
    edges = sum(load.structures * load.edges for load in tasks.values())
    alone = set(tasks) - {t for unit in together for t in unit}
    return Subject(
        model=model,
        encoder=replace(_parameters(encoder), gathered=beside),
        branch=_parameters(branch),
        footprint=_footprint(model.model_dump_json(), double, float(f"{edges / atoms:.2g}"), near, processor),
        tasks=tasks,
        branch_of=dict(branch_of or {t: t for t in tasks}),
        together=tuple(tuple(unit) for unit in [*together, *([t] for t in sorted(alone))]),
        width=8 if double else 4,
        averaged=averaged,
        max_edges=max_edges,
    )


@lru_cache(maxsize=32)
def _footprint(model: str, double: bool, edges_per_atom: float, near: int, processor: bool) -> Footprint:
    """Counted once for the many forecasts of one model."""
    dtype = torch.float64 if double else torch.float32
    return footprint(ModelConfig.model_validate_json(model), dtype, edges_per_atom, near, processor)


def _parameters(module: torch.nn.Module) -> Parameters:
    return Parameters(tuple(tuple(p.shape) for p in module.parameters()))


@dataclass(frozen=True)
class _Rank:
    """A rank of one class: all of them hold the same branches."""

    count: int  # ranks of this class
    groups: list[tuple[str, int]]  # branches held, and the ranks of their groups
    structures: dict[tuple[str, ...], float]  # of each unit
    size: Size
    pieces: int  # micro-batches
    even: float  # most / mean within the class
    deviation: float  # of a rank's time, as a part of it


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
    members = _ranks(subject, placement, balanced)
    held = [_bytes(subject, rank, ranks, sharded) for rank in members]
    most = max(held, key=lambda b: sum(b.values()))
    limit = machine.memory if memory is None else memory
    room = min(_largest(subject, r, b, limit, sharded) for r, b in zip(members, held, strict=True))
    return Forecast(
        ranks_of={task: list(where) for task, where in placement.items()},
        bytes_per_rank=most,
        largest_local_batch=int(room * subject.structures / ranks),
        bytes_per_step=int(max(_sent(subject, rank, ranks, sharded) for rank in members)),
        phases=_phases(subject, members, machine, ranks, sharded),
    )


@dataclass(frozen=True)
class Mean:
    """What a rank does in a step, in the mean over ranks."""

    forward: Work
    backward: Work
    updated: float  # bytes that the optimizer moves


def mean_rank(subject: Subject, placement: Mapping[str, Sequence[int]]) -> Mean:
    """The work behind a forecast, for fitting a machine's rates to measured times."""
    members = _ranks(subject, placement, balanced=True)
    counts = [r.count for r in members]

    def mean(which: str) -> Work:
        works = [_work(subject, r, which) for r in members]
        return Work(*np.average([(w.flops, w.traffic, w.kernels) for w in works], axis=0, weights=counts).tolist())

    moved = [_moved(subject, subject.encoder, len(r.groups)) for r in members]
    return Mean(mean("forward"), mean("backward"), float(np.average(moved, weights=counts)))


def _ranks(subject: Subject, placement: Mapping[str, Sequence[int]], balanced: bool) -> list[_Rank]:
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
        out.append(_rank(subject, count, groups, structures, balanced))
    return out


def _rank(
    subject: Subject,
    count: int,
    groups: list[tuple[str, int]],
    structures: dict[tuple[str, ...], float],
    balanced: bool,
) -> _Rank:
    loads = {u: subject.tasks[u[0]] for u in structures}
    atoms = sum(n * loads[u].atoms for u, n in structures.items())
    edges = sum(n * loads[u].edges for u, n in structures.items())
    labelled = sum(n * loads[u].atoms * len(u) for u, n in structures.items())
    seen = sum(-math.expm1(-n) * len(u) for u, n in structures.items())  # tasks of which a step holds a structure
    pieces = 1 if subject.max_edges is None else max(1, math.ceil(edges / subject.max_edges))
    kinds = [Kind(n, loads[u].edges, loads[u].spread, loads[u].error) for u, n in structures.items()]
    even, deviation = unevenness(kinds, count, balanced)
    return _Rank(count, groups, structures, Size(max(seen, 1.0), atoms, labelled, edges), pieces, even, deviation)


def _bytes(subject: Subject, rank: _Rank, ranks: int, sharded: bool) -> dict[str, int]:
    """What a rank holds, by kind."""
    encoder = subject.encoder.sharded(ranks) if sharded else subject.encoder
    number = encoder.count + len(rank.groups) * subject.branch.count
    tensors = len(encoder.shapes) + len(rank.groups) * len(subject.branch.shapes)
    activations = subject.footprint.activations(rank.size.times(1 / rank.pieces))
    if sharded:
        activations += subject.encoder.gathered * subject.width
    return {
        "parameters": number * subject.width,
        "gradients": number * subject.width,
        "optimizer": 2 * number * subject.width + 4 * tensors,  # two moments, and a count of updates for each tensor
        "averages": number * subject.width * subject.averaged,
        "activations": int(max(activations, 0)),
    }


def _largest(subject: Subject, rank: _Rank, held: dict[str, int], limit: float, sharded: bool) -> float:
    """How many times this rank's batch, in one piece, its memory would hold."""
    own = subject.footprint
    state = sum(held.values()) - held["activations"]
    state += subject.encoder.gathered * subject.width * sharded
    nothing = own.activations(replace(rank.size, atoms=0.0, labelled=0.0, edges=0.0))
    growth = own.activations(rank.size) - nothing
    return max(0.0, (limit - state - nothing) / max(growth, 1.0))


def _sent(subject: Subject, rank: _Rank, ranks: int, sharded: bool) -> float:
    encoder, branch = subject.encoder.count * subject.width, subject.branch.count * subject.width
    rounds = _rounds(subject) if sharded else 2
    return sent(ranks, encoder, rounds) + sum(sent(size, branch) for _, size in rank.groups)


def _rounds(subject: Subject) -> int:
    """A sharded encoder is gathered forward (and again backward, if it was dropped), and its gradients scattered."""
    return 2 if subject.model.branch.forces == "conservative" else 3


def _phases(subject: Subject, members: list[_Rank], machine: Machine, ranks: int, sharded: bool) -> dict[str, float]:
    """Seconds of the parts of a step; passes are those of a mean rank, what the slowest takes longer is `waiting`."""
    turns = slowed(machine, ranks)
    forward = [turns * _pass(subject, r, machine, "forward") for r in members]
    backward = [turns * _pass(subject, r, machine, "backward") for r in members]
    counts = [r.count for r in members]
    compute = [turns * _both(subject, r, machine, r.even) for r in members]
    more = [turns * _both(subject, r, machine, r.even * (1 + r.deviation)) for r in members]
    deviation = [math.hypot(m - c, c * machine.noise) for m, c in zip(more, compute, strict=True)]
    mean_forward, mean_backward = np.average(forward, weights=counts), np.average(backward, weights=counts)
    longest = expected_slowest(compute, deviation, counts)
    if machine.cores is not None and ranks > machine.cores:
        alone = [c / turns * machine.contention for c in compute]
        longest += taking_turns(alone, counts, machine.cores) - max(compute)
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
        "bookkeeping": machine.bookkeeping * len(subject.tasks),
    }
    # Prepared on the host ahead of the step; where cores are shared, their contention holds what it costs.
    phases["data"] = max(0.0, data - sum(v for k, v in phases.items() if k != "data"))
    return phases


def _both(subject: Subject, rank: _Rank, machine: Machine, factor: float) -> float:
    """Seconds of both passes with so many times the structures; what does not grow with them stays."""
    larger = replace(rank, size=rank.size.times(factor))
    return _pass(subject, larger, machine, "forward") + _pass(subject, larger, machine, "backward")


def _pass(subject: Subject, rank: _Rank, machine: Machine, which: str) -> float:
    work = _work(subject, rank, which)
    device = work.flops / machine.flops + work.traffic / machine.traffic
    host = work.kernels * machine.launch
    return max(device, host) if machine.queued else device + host


def _work(subject: Subject, rank: _Rank, which: str) -> Work:
    """All micro-batches of a pass; an operation in double precision counts as two."""
    one: Work = getattr(subject.footprint, which)(rank.size.times(1 / rank.pieces))
    n = rank.pieces
    return Work(n * one.flops * subject.width / 4, n * one.traffic, n * one.kernels)


def _update(subject: Subject, rank: _Rank, machine: Machine, ranks: int, sharded: bool) -> float:
    encoder = subject.encoder.sharded(ranks) if sharded else subject.encoder
    return _moved(subject, encoder, len(rank.groups)) / (machine.update or machine.traffic)


def _moved(subject: Subject, encoder: Parameters, branches: int) -> float:
    number = encoder.count + branches * subject.branch.count
    return number * subject.width * (UPDATE + AVERAGE * subject.averaged)


def _waits(
    subject: Subject, rank: _Rank, machine: Machine, ranks: int, sharded: bool, forward: float, backward: float
) -> float:
    """Reductions that are not hidden, and the two small sums of every step."""
    width = subject.width
    encoder, branch = subject.encoder.count * width, subject.branch.count * width
    groups = [(size, float(branch)) for _, size in rank.groups if size > 1]
    last = backward / rank.pieces  # gradients travel in the last micro-batch
    small = 2 * collective(machine, ranks, 0.0, rounds=2)
    part = subject.footprint.of_branches(rank.size)
    if not sharded:
        return small + exposed(machine, last, part, groups, (ranks, float(encoder)), BUCKET_BYTES)
    layers = max(1, subject.model.encoder.layers)
    moved = collective(machine, ranks, encoder, rounds=_rounds(subject))
    hidden = machine.overlap * min(moved * (1 - 1 / layers), (forward + backward) * (1 - 1 / layers))
    return small + moved - hidden + exposed(machine, last, part, groups, (1, 0.0), BUCKET_BYTES)
