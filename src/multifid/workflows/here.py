"""This machine, as forecasts need it: measured in a second or two."""

import os
import time
from collections.abc import Callable

import torch

from multifid.parallel.devices import find_device
from multifid.parallel.machines import GB, Link, Machine

MATRIX = 1024  # rows of the product that is timed on a processor; four times as many on an accelerator
COPY = 1 << 24  # numbers that are added to each other, larger than caches
REPEATS = 3
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        n = MATRIX * (4 if accelerator else 1)
        a, b, x = torch.ones(n, n, device=device), torch.ones(n, n, device=device), torch.ones(COPY, device=device)
        tiny = torch.ones(1, device=device)
        flops = 2 * n**3 / _seconds(lambda: a @ b, device)
        traffic = 3 * x.nbytes / _seconds(lambda: x.add_(x), device)
        launch = _seconds(lambda: [tiny + tiny for _ in range(1000)], device) / 1000
    finally:
        torch.set_num_threads(threads)
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
        ranks=per_node,
    )


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
