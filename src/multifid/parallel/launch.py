"""Who I am among the ranks, from what torchrun or srun put into the environment.

Apart from `groups`, so that what needs no torch knows its rank too.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class OtherRankFailed(RuntimeError):
    """Another rank failed, and says why in its own output; this one leaves with it."""

    def __init__(self) -> None:
        super().__init__("another rank failed, and says why in its own output")


@dataclass(frozen=True)
class Launch:
    """What torchrun or srun says of this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this host: each takes another accelerator
    address: str = ""  # host and port of the rendezvous
    port: int = 0


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch of this process: torchrun's variables, else srun's, else one process.

    A batch script that Slurm runs carries SLURM_PROCID too, but no step: it is one process. ValueError for variables
    that contradict each other.
    """
    e = environment
    if "RANK" in e and "WORLD_SIZE" in e:
        found = Launch(_integer(e, "RANK"), _integer(e, "WORLD_SIZE"), int(e.get("LOCAL_RANK", 0)))
    elif "SLURM_PROCID" in e and ("SLURM_STEP_ID" in e or "SLURM_JOB_ID" not in e):
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in e else "SLURM_NTASKS"
        found = Launch(_integer(e, "SLURM_PROCID"), _integer(e, size), int(e.get("SLURM_LOCALID", 0)))
    else:
        return Launch(local_rank=int(e.get("LOCAL_RANK", 0)))
    if not 0 <= found.rank < found.size:
        raise ValueError(f"the launcher says rank {found.rank} of {found.size}: ranks must be 0..size-1")
    if found.size == 1:
        return Launch(local_rank=found.local_rank)
    address = e.get("MASTER_ADDR") or _first_host(e.get("SLURM_STEP_NODELIST") or e.get("SLURM_JOB_NODELIST") or "")
    job = int(e.get("SLURM_JOB_ID", 0)) * 31 + int(e.get("SLURM_STEP_ID", 0))
    port = _integer(e, "MASTER_PORT") if "MASTER_PORT" in e else 20_000 + job % 10_000
    if not address:
        raise ValueError(f"{found.size} ranks were launched, but MASTER_ADDR (the host of rank 0) is not set")
    return Launch(found.rank, found.size, found.local_rank, address, port)


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdecimal():
        raise ValueError(f"the launcher must set {name} to a whole number, it is {text!r}")
    return int(text)


def _first_host(nodes: str) -> str:
    """The first host of Slurm's list: nid[0012-0015,0020],login1 -> nid0012."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else ""


def command_of(
    module: Sequence[str],
    ranks: int,
    launcher: str = "auto",
    slot: int = 0,
    at_once: int = 1,
    options: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of a Python module on ranks of its own, one of `at_once` such groups side by side.

    module: its name and its arguments.  launcher: `torchrun`, `srun`, or `auto`: srun inside an allocation of Slurm.
    slot: of this group among those on this host, which take the host's accelerators in turn.  options: more of srun.
    """
    base, e = [sys.executable, "-m", *module], dict(environment)
    cores = os.cpu_count() or 1
    if at_once * ranks > 1:
        e.setdefault("OMP_NUM_THREADS", str(max(1, cores // (at_once * ranks))))
    if launcher == "srun" or (launcher == "auto" and "SLURM_JOB_ID" in e):
        return ["srun", f"--ntasks={ranks}", "--exact", *options, *base], e
    if ranks == 1:
        return base, e | {"LOCAL_RANK": str(slot)}
    if at_once > 1 and (shown := e.get("CUDA_VISIBLE_DEVICES", "")):
        devices = shown.split(",")
        mine = [devices[(slot * ranks + k) % len(devices)] for k in range(ranks)]
        e["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*launched, *module], e
