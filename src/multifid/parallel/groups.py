"""Who I am among the ranks, and sums over groups of them. What a launch puts into the environment is read here and
in `launch` only.

    world      0 1 2 3 4                 encoder gradients, counts, norms: everybody
    ani1x      0 1                       gradients of a branch: the ranks that hold it. Groups may overlap,
    mptrj          2                     and a group of one is a group: its sums are what was put in,
    omol25         2 3 4                 and no code asks whether it runs alone, but
                                         `gradients`, which need not hear of what does not travel.

Beside the groups all ranks share a key-value store (the rendezvous of the launch; a dictionary in a world of one). What
is not a sum of tensors goes through it: small JSON values, the state of files that are being written, heartbeats.
"""

import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import blake2b
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from multifid.parallel.devices import find_device
from multifid.parallel.heartbeat import SILENCE, Heartbeat
from multifid.parallel.launch import OtherRankFailed, launch

# A rank that is gone is noticed by its heart; a rank that compiles or validates for an hour is not gone.
COLLECTIVE_TIMEOUT = timedelta(days=7)
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}  # nccl is RCCL on ROCm
FAULT = "fault"  # the key under which the first fault of any rank is told to all
STOPPED = 143  # the exit code after SIGTERM
POLL = 0.005  # seconds between two looks into the store
# A process may join one world after another (it trains, then evaluates): each has keys of its own in the store, which
# rank 0 serves, unless the launcher does, from the first one to the end of the process.
_WORLDS: defaultdict[tuple[str, str], Iterator[int]] = defaultdict(count)
_SERVERS: dict[str, dist.Store] = {}
FAULT_WAIT = 3.0  # seconds to wait for another rank's error message when a connection breaks


@dataclass(frozen=True)
class Group:
    """A set of ranks that reduce together. `ranks` in ascending order; the first one writes and counts for all."""

    ranks: tuple[int, ...] = (0,)
    rank: int = 0  # of this process, in the world
    process_group: dist.ProcessGroup | None = field(default=None, repr=False)  # None in a group of one

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def travels(self) -> bool:
        """Whether what is summed over the group has to go to other ranks; if not, it is the sum already."""
        return self.process_group is not None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, counts and talks for the group."""
        return self.rank == self.ranks[0]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the group, in place; the same bits on every rank."""
        work = self.sum_later(tensor)
        if work is not None:
            work.wait()
        return tensor

    @property
    def index(self) -> int:
        """The place of this process among the ranks of the group."""
        return self.ranks.index(self.rank)

    def gather(self, tensor: Tensor) -> Tensor | None:
        """The host tensors of all ranks, stacked, on the first rank of the group; None on the others."""
        if self.process_group is None:
            return tensor[None]
        out = tensor.new_empty(self.size, *tensor.shape) if self.first else None
        dist.gather(tensor, None if out is None else list(out), group=self.process_group, group_dst=0)
        return out

    def exchange(self, rows: Tensor, to: list[int], come: list[int]) -> Tensor:
        """Rows for each rank of the group, rank after rank, `to` says how many; alike what `come`s from them."""
        if self.process_group is None:
            return rows
        out = rows.new_empty(sum(come), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), come, to, group=self.process_group)
        return out

    def sum_later(self, tensor: Tensor) -> dist.Work | None:
        """Begin to sum in place; `tensor` is ready when the work has been waited for, or at once where that is None."""
        if self.process_group is None:
            return None
        return dist.all_reduce(tensor, group=self.process_group, async_op=True)


@dataclass
class World:
    """All ranks of a run, and what they share beside tensors."""

    group: Group
    store: dist.Store
    device: torch.device
    _made: dict[tuple[int, ...], dist.ProcessGroup | None] = field(default_factory=dict, repr=False)
    _apart: DeviceMesh | None = field(default=None, repr=False)
    _shared: int = 0  # values shared so far
    _known: bool = False  # all ranks know of the fault that ends the run

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def first(self) -> bool:
        return self.group.first

    def groups(self, placement: Mapping[str, Sequence[int]]) -> dict[str, Group]:
        """The group of every key of a placement (key -> ranks); called on all ranks with the same placement.

        Every distinct set of ranks is a process group, made on all ranks in one order, members or not, and once in the
        life of a world: connections cost memory and time. On ranks outside, a group cannot sum.
        """
        sets = {key: tuple(sorted(where)) for key, where in placement.items()}
        self._made.setdefault(self.group.ranks, self.group.process_group)
        for where in sorted(set(sets.values()) - set(self._made)):
            self._made[where] = dist.new_group(list(where)) if len(where) > 1 else None
        return {key: Group(where, self.rank, self._made[where]) for key, where in sets.items()}

    def apart_for_data(self, placement: Mapping[str, Sequence[int]]) -> dict[str, Group]:
        """Groups like `groups`, for host data that a thread exchanges beside all else. Called on all ranks, once."""
        sets = {key: tuple(sorted(where)) for key, where in placement.items()}
        made = {w: dist.new_group(list(w), backend="gloo") if len(w) > 1 else None for w in sorted(set(sets.values()))}
        return {key: Group(where, self.rank, made[where]) for key, where in sets.items()}

    def on_this_host(self) -> list[int]:
        """The ranks that run on the same host as this one, ascending, itself among them; called on all ranks."""
        name = blake2b(socket.gethostname().encode(), digest_size=7).digest()
        hosts = torch.zeros(self.size, dtype=torch.int64)
        hosts[self.rank] = int.from_bytes(name, "little")
        hosts = self.group.sum_(hosts)
        return torch.nonzero(hosts == hosts[self.rank]).flatten().tolist()

    def mesh_apart(self) -> DeviceMesh:
        """All ranks as a mesh with a process group of its own, whose collectives queue behind no others."""
        if self._apart is None:
            self._apart = DeviceMesh.from_group(dist.new_group(list(self.group.ranks)), self.device.type)
        return self._apart

    def share(self, value: Any, rank: int = 0) -> Any:
        """One rank's value on every rank, as JSON brings it over. Called on all ranks, in the same order."""
        key = f"shared/{self._shared}"
        self._shared += 1
        if self.rank == rank:
            self.store.set(key, json.dumps(value))
        while not self.store.check([key]):  # a blocking call would hold the store against the threads that use it
            time.sleep(POLL)
        return json.loads(self.store.get(key))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do here must succeed on all: where one fails, the others leave with it.

        The rank that failed raises its own error, the others OtherRankFailed, so that one message is read and not many.
        """
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as e:
            error = e
        failed = self.group.sum_(torch.tensor([0 if error is None else 1]))
        self._known = bool(failed)
        if error is not None:
            raise error
        if failed:
            raise OtherRankFailed

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """A part of the store for one of several runs that follow each other in this world: their keys never meet."""
        whole = self.store
        self.store = dist.PrefixStore(name, whole)
        try:
            yield
        finally:
            self.store = whole

    def fail(self, error: Exception) -> None:
        """End the run for a reason that all ranks found at the same place: rank 0 says it, the others just leave."""
        self._known = True
        raise error if self.first else OtherRankFailed


def alone(name: str | None = "cpu") -> World:
    """A world of one process; `name` of a device as in `world`."""
    return World(Group(), dist.HashStore(), find_device(name, launch().local_rank))


@contextmanager
def world(name: str | None, silence: float = SILENCE) -> Iterator[World]:
    """All ranks that were launched together, from now until the end of the block.

    name: of the device to compute on, as in `find_device`. The first fault of any rank is told to all, and a rank that
    is silent for `silence` seconds takes the others with it (see `heartbeat`).
    """
    me = launch()
    if me.size == 1:
        yield alone(name)
        return
    url = f"tcp://{me.address}:{me.port}?rank={me.rank}&world_size={me.size}"
    root, _, _ = next(dist.rendezvous(url, timeout=RENDEZVOUS_TIMEOUT))
    _SERVERS.setdefault(url, root)
    prefix = f"multifid/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    prefix = f"{prefix}/{next(_WORLDS[url, prefix])}"
    heart = Heartbeat(dist.PrefixStore(prefix, root.clone()), me.rank, me.size, FAULT, silence)
    root.set_timeout(COLLECTIVE_TIMEOUT)
    store = dist.PrefixStore(prefix, root)
    chosen = find_device(name, me.local_rank)
    dist.init_process_group(
        BACKENDS.get(chosen.type), store=store, rank=me.rank, world_size=me.size, timeout=COLLECTIVE_TIMEOUT
    )
    here = World(Group(tuple(range(me.size)), me.rank, dist.group.WORLD), store, chosen)
    heart.start()
    try:
        yield here
        _leave_together(here)
    except SystemExit as leaving:
        if leaving.code == STOPPED:  # all ranks stop at the same step
            _leave_together(here)
        raise
    except Exception as error:
        if not here._known:
            _tell(here, error)
        raise
    finally:
        heart.stop()
        dist.destroy_process_group()


def _leave_together(here: World) -> None:
    """Wait until all ranks are through: a connection that is closed while others still reduce is a fault to them.

    A barrier would not do: some come out of it, and close their connections, while others are still inside.
    """
    here.store.add("left", 1)
    try:
        while here.store.add("left", 0) < here.size:
            time.sleep(POLL)
    except (RuntimeError, OSError):  # rank 0, the last to be waited for, has left with its store
        return


def _tell(here: World, error: Exception) -> None:
    """Tell the others of this rank's fault; where another's fault came first, leave because of that."""
    mine = f"rank {here.rank} on {socket.gethostname()}: {type(error).__name__}: {error}"
    try:
        until = time.monotonic() + (FAULT_WAIT if isinstance(error, RuntimeError) else 0.0)
        while time.monotonic() < until and not here.store.check([FAULT]):
            time.sleep(0.05)  # a broken connection is the effect of a fault elsewhere, which is about to be told
        first = here.store.compare_set(FAULT, "", mine).decode()
    except (RuntimeError, OSError):  # the store is gone too
        first = mine
    if first != mine:
        print(f"multifid: rank {here.rank} leaves because of {first}", file=sys.stderr, flush=True)
        raise OtherRankFailed from error


def side_by_side(number: int) -> None:
    """This process is one of several that work on this host, each for itself: they take its accelerators in turn."""
    os.environ["LOCAL_RANK"] = str(number)


def in_one_order(wanted: bool) -> None:
    """Whether torch adds up in one order in this process on accelerators too; what it cannot, it then refuses by name.

    Without it the kernels add to the sums over neighbours in the order in which they happen to come. The products of
    cuBLAS need a workspace for it, which its environment asks for.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.get_deterministic_debug_mode() != (2 if wanted else 0):  # 1 warns only; to be told imports the compiler
        torch.use_deterministic_algorithms(wanted)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that start inside compute with one OpenMP thread: those of a pool would fight for the same cores.

    It must be in the environment they are born with; a library that is loaded before it is set does not see it.
    """
    name = "OMP_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
