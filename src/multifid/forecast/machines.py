"""Machines as the forecasts see them, and what a reduction over some of their ranks takes. Plain numbers.

A rank is what torch sees as one device: an A100 (Perlmutter), half an MI250X (Frontier), a tile (Aurora). Rates are
what programs reach, not peaks, where somebody has published that. Everything not published is marked as assumed.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

GB = 1e9

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # per second
Size = Rate  # bytes
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Link:
    """What connects ranks."""

    __pydantic_config__ = _STRICT

    latency: Seconds  # for one step of a reduction
    bandwidth: Rate  # bytes per second and direction that a rank (inside a node) or a node (between nodes) can send


@dataclass(frozen=True)
class Machine:
    """A machine of equal nodes."""

    __pydantic_config__ = _STRICT

    name: str
    per_node: Count  # ranks
    memory: Size  # bytes of a rank
    flops: Rate  # per second of a rank, large fp32 matrix products
    traffic: Rate  # bytes per second of a rank, operations that wait for its memory
    launch: Seconds  # that the host needs to issue one operation
    inside: Link
    between: Link
    queued: bool = True  # operations are issued ahead of the device, so that issuing and computing overlap
    overlap: Annotated[float, Field(ge=0, le=1)] = 1.0  # the part of a reduction that the backward pass can hide
    cores: Count | None = None  # ranks that a node computes at once; more of them take turns. None: all
    contention: Annotated[float, Field(ge=1)] = 1.0  # how much slower a rank is where all cores are busy
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0  # standard deviation of a rank's time for equal work, a part of it
    update: Rate | None = None  # bytes per second of an update, where it is not the memory's rate
    data: Seconds = 0.0  # of the host for an edge that is read, found and laid into a batch
    bookkeeping: Seconds = 1e-3  # of the host for counts, sums and errors of a step
    rings: bool = False  # a sum is a ring of all ranks, 2 (N - 1) messages one after the other (Gloo, on processors)
    ranks: Count = 1920  # how far forecasts go


# NERSC, "Perlmutter Architecture" (docs.nersc.gov/systems/perlmutter/architecture): 4 A100 of 40 GB (1,536 nodes; 256
# have 80 GB), 4 NVLinks of 25 GB/s and direction between each two, 4 Slingshot 11 NICs of 25 GB/s a node. A100 data
# sheet: 19.5 TFLOP/s fp32 without TF32, which torch leaves off. Triad of 1,302 GB/s: github.com/luraess/JuliaGPUPerf.
# Assumed: 0.9 of the peak in large products; 0.75 of the links in reductions.
# Frontier: OLCF, "Frontier User Guide" (docs.olcf.ornl.gov/systems/frontier_user_guide.html): 8 GCDs of 64 GB and
# 1.6 TB/s, 50-200 GB/s between them, 4 NICs of 25 GB/s a node. AMD MI250X data sheet: 47.9 TFLOP/s fp32 matrix and 23.9
# fp32 vector a GCD. Assumed: 0.75 of the matrix peak, 0.8 of the memory rate, 0.75 of the links.
# Aurora: ALCF, "Aurora Machine Overview" (docs.alcf.anl.gov/aurora/hardware-overview/machine-overview): 6 GPUs of two
# tiles and 128 GB, all-to-all Xe Links, 8 Slingshot 11 NICs of 25 GB/s a node. ALCF, "Node performance overview"
# (docs.alcf.anl.gov/aurora/node-performance-overview), measured: 23 TFLOP/s fp32 and 21 in SGEMM, 1 TB/s in triad a
# tile, 15 GB/s from GPU to GPU. Assumed: 0.75 of the NICs.
# Assumed on all three: 10 us for a step of a reduction inside a node and 20 us between nodes, the order of what D. De
# Sensi et al., "Exploring GPU-to-GPU Communication" (SC 2024, arXiv:2408.14090) see on Slingshot 11; 10 us for the
# launch of an operation by eager torch. Bookkeeping was measured on a core of an AMD EPYC (docs/scaling.md).
_LAUNCH = 10e-6

MACHINES = {
    m.name: m
    for m in (
        Machine(
            "perlmutter",
            per_node=4,
            memory=40 * GB,
            flops=0.9 * 19.5e12,
            traffic=1302 * GB,
            launch=_LAUNCH,
            inside=Link(10e-6, 0.75 * 3 * 100 * GB),
            between=Link(20e-6, 0.75 * 4 * 25 * GB),
            ranks=640,
        ),
        Machine(
            "frontier",
            per_node=8,
            memory=64 * GB,
            flops=0.75 * 47.9e12,
            traffic=0.8 * 1600 * GB,
            launch=_LAUNCH,
            inside=Link(10e-6, 0.75 * 100 * GB),
            between=Link(20e-6, 0.75 * 4 * 25 * GB),
            ranks=640,
        ),
        Machine(
            "aurora",
            per_node=12,
            memory=64 * GB,
            flops=21e12,
            traffic=1000 * GB,
            launch=_LAUNCH,
            inside=Link(10e-6, 15 * GB),
            between=Link(20e-6, 0.75 * 8 * 25 * GB),
            ranks=1920,
        ),
    )
}


def read_machine(name: str) -> Machine:
    """A machine by its name, or from a YAML file with the fields of `Machine`. ValueError says what is known."""
    if name in MACHINES:
        return MACHINES[name]
    path = Path(name)
    if not path.exists():
        raise ValueError(f"machine {name!r} is neither one of {', '.join(MACHINES)} nor a file that describes one")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML file that describes a machine: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a machine is a map of {', '.join(f.name for f in fields(Machine))}; got {values!r}")
    try:
        return TypeAdapter(Machine).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(map(_what, error.errors()))}") from None


def _what(error: ErrorDetails) -> str:
    """What is wrong with a field, with its path and what was given."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {error['msg']}, got {error['input']!r}"


def write_machine(machine: Machine, path: Path) -> None:
    """A file that `read_machine` takes."""
    path.write_text(yaml.safe_dump(asdict(machine), sort_keys=False), encoding="utf-8")


def slowed(machine: Machine, ranks: int) -> float:
    """How many times longer a rank computes where `ranks` share a node's cores: they take turns, or contend."""
    if machine.cores is None:
        return 1.0
    busy = min(ranks, machine.per_node) / machine.cores
    return machine.contention * busy if busy >= 1 and ranks > 1 else 1.0


def all_reduce(machine: Machine, size: int, bytes_: float) -> float:
    """Seconds to sum `bytes_` over a group of `size` ranks with consecutive numbers.

    Inside the nodes a ring, between them a ring of all ranks with the same place; both are pipelined, so the narrower
    one counts. Latencies are those of trees, up and down, or where the machine has only `rings` those of a ring.
    """
    return collective(machine, size, bytes_, rounds=2)


def collective(machine: Machine, size: int, bytes_: float, rounds: int) -> float:
    """An all-reduce is two rounds; a reduce-scatter or an all-gather is one."""
    if size <= 1:
        return 0.0
    local = min(size, machine.per_node)
    nodes = -(-size // machine.per_node)
    if machine.rings:
        steps = rounds * (size - 1) * (machine.inside if nodes == 1 else machine.between).latency
    else:
        steps = rounds * (math.log2(local) * machine.inside.latency + math.log2(nodes) * machine.between.latency)
    inside = rounds * (local - 1) / local * bytes_ / machine.inside.bandwidth
    between = rounds * (nodes - 1) / nodes * bytes_ / (machine.between.bandwidth * local / machine.per_node)
    return (steps + max(inside, between)) * slowed(machine, size)


def sent(size: int, bytes_: float, rounds: int = 2) -> float:
    """Bytes that each rank of a group sends to sum `bytes_`."""
    return rounds * (size - 1) / size * bytes_
