"""The device that a process computes on, and that every thread of it must name for itself.

A thread has a current device of its own, number 0 at first. What it allocates in pinned memory, which streams it enters
and which events it records belong to that device unless they name another; and since CUDA 12 a thread that only returns
to its current device opens a context there, some hundred MB of its memory. So the main thread calls `use` when the
device is chosen, and every thread that touches the device before it does anything else.
"""

import sys

import torch

CPU = torch.device("cpu")


def find_device(name: str | None, local_rank: int) -> torch.device:
    """The device of a rank, made the current one of this thread.

    name: "cpu", a kind of accelerator ("cuda", "xpu"), or one device of it ("cuda:1"); None: the accelerator that torch
    finds here, else the CPU, with a word where there is an accelerator that lacks float64. Ranks of one host
    (`local_rank`) take its accelerators in turn. ValueError for a device that is not here, or lacks float64.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    asked = accelerator or CPU if name is None else _parsed(name)
    if asked.type == "cpu":
        return CPU
    if accelerator is None or asked.type != accelerator.type:
        there = "no accelerator" if accelerator is None else repr(accelerator.type)
        raise ValueError(f"train.device: {name}: torch finds {there} on this host; choose cpu, or leave it null")
    count = torch.accelerator.device_count()
    index = local_rank % count if asked.index is None else asked.index
    if index >= count:
        raise ValueError(f"train.device: {name}: this host has {count} of them, numbered from 0")
    chosen = torch.device(asked.type, index)
    use(chosen)
    lack = lacking(chosen)
    if lack is None:
        return chosen
    if name is not None:
        raise ValueError(f"train.device: {name}: {lack}; choose cpu, or leave it null")
    if local_rank == 0:
        print(f"multifid: {lack}: computing on the CPU", file=sys.stderr, flush=True)
    return CPU


def use(device: torch.device) -> None:
    """Make a device the current one of the thread that calls this."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def lacking(device: torch.device) -> str | None:
    """What a device lacks that training needs; None: nothing.

    Losses, counts, norms and edges of crystals are float64 sums. MPS (Macs) and some GPUs of Intel have no float64.
    """
    if device.type in ("cpu", "cuda"):
        return None
    try:
        torch.ones(2, dtype=torch.float64, device=device).sum().item()
    except (TypeError, RuntimeError) as error:
        return f"{device.type} has no float64, in which losses and norms are summed ({str(error).splitlines()[0]})"
    return None


def _parsed(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device: {name!r} is no device: give cpu, cuda, cuda:1, xpu ..., or null") from None
