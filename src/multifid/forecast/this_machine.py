"""This machine, as forecasts need it: measured in some seconds."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from multifid.forecast.estimate import pass_seconds, update_bytes
from multifid.forecast.machines import GB, Link, Machine
from multifid.forecast.subject import Subject
from multifid.model.footprint import BatchSize, blank_batch
from multifid.model.potential import ModelConfig, Potential
from multifid.parallel.devices import find_device
from multifid.training.optimizer import OPTIMIZERS, update
from multifid.training.work import UPDATES

MATRIX = 1024  # rows of the product that is timed on a processor; four times as many on an accelerator
COPY = 1 << 24  # numbers that are added to each other, larger than caches
REPEATS = 3
PATIENCE = 6.0  # seconds that a few passes, and a few updates, may take
# Not measured, since one process cannot: reductions through the loopback device by Gloo, and through PCIe 4 x16 between
# the accelerators of a host. `multifid scaling` measures what its ranks see and writes it as a file for --machine.
LOOPBACK = Link(1e-4, 1 * GB)
PCIE = Link(2e-5, 20 * GB)


def this_machine(name: str | None = None, ranks: int = 1) -> Machine:
    """This host as a machine of one node; `name` of a device as in `train.device`.

    On a processor a rank is one thread; `ranks` beyond its cores take turns, and share its memory.
    """
    device = find_device(name, 0)
    accelerator = device.type != "cpu"
    cores = os.cpu_count() or 1
    with _one_thread():
        n = MATRIX * (4 if accelerator else 1)
        a, b, x = torch.ones(n, n, device=device), torch.ones(n, n, device=device), torch.ones(COPY, device=device)
        tiny = torch.ones(1, device=device)
        flops = 2 * n**3 / _seconds(lambda: a @ b, device)
        traffic = 3 * x.nbytes / _seconds(lambda: x.add_(x), device)
        launch = _seconds(lambda: [tiny + tiny for _ in range(1000)], device) / 1000
    per_node = torch.accelerator.device_count() if accelerator else max(cores, ranks)
    if accelerator:
        memory = float(torch.accelerator.get_memory_info(device)[1])
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / per_node
    return Machine(
        "here",
        per_node=per_node,
        memory=memory,
        flops=flops,
        traffic=traffic,
        launch=launch,
        inside=PCIE if accelerator else LOOPBACK,
        between=PCIE if accelerator else LOOPBACK,
        queued=accelerator,
        overlap=1.0 if accelerator else 0.0,  # reductions take the cores that the backward pass needs
        cores=None if accelerator else cores,
        rings=not accelerator,
        ranks=per_node,
    )


def tried(machine: Machine, subject: Subject, name: str | None) -> Machine:
    """The machine with the rates that passes and updates of this run reach on it. name: of a device as in the config.

    What products and additions by themselves reach is more than the small operations of a pass do.
    """
    parts = (subject.encoder, subject.branch)
    seconds = seconds_of_update(machine, subject, name)
    slower = with_passes(machine, subject, name)
    return replace(slower, update=sum(update_bytes(slower, subject.update(p).work) for p in parts) / seconds)


def with_passes(machine: Machine, subject: Subject, name: str | None) -> Machine:
    """The machine, slower in all by what a forward and a backward pass of the model take longer than is told.

    Through a batch of made-up structures, as large as a step of the run or as `PATIENCE` allows.
    """
    step = subject.size
    told = told_passes(machine, subject, step)
    part = min(1.0, PATIENCE / (REPEATS + 1) / told)
    size = BatchSize(1.0, *(float(math.ceil(part * x)) for x in (step.atoms, step.atoms, step.edges, step.triplets)))
    if subject.footprint.activations(size) > machine.memory / 4:
        return machine
    passes = trial_passes(subject.model, size, find_device(name, 0), _dtype(subject))
    with _one_thread():
        slower = _seconds(passes, find_device(name, 0)) / told_passes(machine, subject, size)
    return replace(
        machine, flops=machine.flops / slower, traffic=machine.traffic / slower, launch=machine.launch * slower
    )


def trial_passes(config: ModelConfig, size: BatchSize, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A function that makes both passes of a model through made-up structures of this size, as a training step does."""
    potential = Potential(config, ["t0"], {"t0": "t0"}, seed=0).to(device, dtype).train()
    batch = blank_batch(["t0"], size, dtype, False, potential.encoder.needs).to(device)

    def passes() -> None:
        potential.zero_grad()
        predicted = potential(batch)["t0"]
        (predicted.energy.abs().sum() + predicted.forces.abs().sum()).backward()

    return passes


def told_passes(machine: Machine, subject: Subject, size: BatchSize) -> float:
    """Seconds of both passes through a batch."""
    works = (subject.footprint.forward(size), subject.footprint.backward(size))
    return sum(pass_seconds(work, machine, subject.width) for work in works)


def _dtype(subject: Subject) -> torch.dtype:
    return torch.float64 if subject.width == 8 else torch.float32


def seconds_of_update(machine: Machine, subject: Subject, name: str | None) -> float:
    """Of the encoder and a branch by the run's optimizer, in the mean over some updates.

    Where those would take too long or too much memory, told from what they compute and move.
    """
    parts = (subject.encoder, subject.branch)
    told = sum(update_bytes(machine, subject.update(p).work) for p in parts) / machine.traffic
    held = sum(2 * p.count * subject.width + subject.update(p).kept for p in parts)
    if told * UPDATES * (REPEATS + 1) > PATIENCE or held > machine.memory / 4:
        return told
    device, dtype = find_device(name, 0), _dtype(subject)
    shapes = [named for p in parts for named in p.shapes]
    made = {n: nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for n, shape in shapes}
    optimizer, norm = OPTIMIZERS[subject.optimizer](made, 1e-6, 0.0), torch.ones((), device=device)
    for p in made.values():
        p.grad = torch.randn_like(p)

    def updates() -> None:
        for _ in range(UPDATES):
            update(optimizer, 1e-6, norm, 1.0)

    with _one_thread():
        return _seconds(updates, device) / UPDATES


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread, as a rank does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
