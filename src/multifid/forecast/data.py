"""What the data of a run ask of disks, of the memory of hosts, and of the file system when all ranks begin.

From sizes alone: of stores as their manifests say, or of stores that do not exist yet, as their layout would have it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from multifid.feed.order import Blocks
from multifid.store.fields import BLOCK, FIELDS, LABELS, Field, field
from multifid.store.store import Store

SOURCE_ID = 20  # bytes of one, in a store that does not exist yet
COSTS = ("index/train", "natoms", "cell", "pbc")  # what every rank reads of all structures of a step, to divide it

# A parallel file system. Assumed, in the order of what large ones do; a run measures what is true of its own.
OPENS = 1e5  # files opened per second, by all ranks together
HOST = 10e9  # bytes per second that a host reads
ALL = 5e12  # bytes per second that all hosts read together


@dataclass(frozen=True)
class StoreSize:
    """What a store takes up: bytes, files, structures of the train split, bytes of one structure's COSTS."""

    bytes: int
    files: int
    structures: int
    train: int
    costs: int

    @classmethod
    def of(cls, store: Store) -> "StoreSize":
        """Of a store that is there, by its manifest."""
        files = [entry for part in store.parts.each for entry in part.manifest["files"].values()]
        costs = sum(row_bytes(field(name)) for name in COSTS if store.has(name))
        return cls(sum(e["bytes"] for e in files), len(files), store.structures, store.size("train"), costs)

    @classmethod
    def expected(
        cls, structures: int, atoms: float, cells: bool = False, stress: bool = False, train: float = 0.8
    ) -> "StoreSize":
        """Of one that does not exist yet: so many atoms a structure, energies and forces; cells, or charges and spins.

        train: which part of the structures is trained on.
        """
        without = {"charge", "spin"} if cells else {"cell", "pbc"}
        named = [name for name in FIELDS if name not in without]
        fields = [FIELDS[name] for name in named] + [LABELS[k] for k in ("energy", "forces", *(["stress"] * stress))]
        per = {"atoms": atoms, "structures": 1.0, "structures + 1": 1.0, "bytes": float(SOURCE_ID)}
        size = structures * (4 + sum(per[f.rows] * row_bytes(f) for f in fields))
        costs = sum(row_bytes(field(name)) for name in COSTS if name not in without)
        return cls(int(size), len(fields) + 5, structures, int(train * structures), costs)  # four indices, checksums

    @property
    def row(self) -> float:
        """Bytes of a structure."""
        return self.bytes / max(self.structures, 1)


def row_bytes(what: Field) -> int:
    return np.dtype(what.dtype).itemsize * math.prod(what.row)


@dataclass(frozen=True)
class Data:
    """What the data of a run ask for, in bytes. Hosts: of the one that has most.

    disk: all stores. host: the stores whose tasks it trains on; `train.stage` copies them, and random order keeps them
    in the page cache where they fit. windows: of these, two windows of `sampling.order: blocks`. shared: what its ranks
    hold with `train.share_data`. costs: rows of all
    stores that every rank reads to divide the steps of a pass, in each host's page cache. opens: files that all ranks
    open. begin: what a host reads to open them (checksums).
    """

    disk: int
    host: int
    windows: int
    shared: int
    costs: int
    opens: int
    begin: int
    hosts: int

    @property
    def opening(self) -> float:
        """Seconds until all ranks have opened all stores, at the assumed rates."""
        return self.opens / OPENS + self.begin / min(HOST, ALL / self.hosts)

    @property
    def staging(self) -> float:
        """Seconds that `train.stage` takes, at the assumed rates."""
        return self.host / min(HOST, ALL / self.hosts)


def data_of(
    sizes: Mapping[str, StoreSize],
    ranks_of: Mapping[str, Sequence[int]],
    ranks: int,
    per_node: int,
    blocks: Blocks | None = None,
) -> Data:
    """sizes: of every store, under the name of one of its tasks. ranks_of: of these, the ranks that hold its branches.

    blocks: the order in blocks; None: the preset one.
    """
    blocks = blocks or Blocks(16384, 32)
    on_host: dict[int, dict[str, int]] = {}  # host -> store -> how many of its ranks train on it
    for name in sizes:
        for rank in ranks_of[name]:
            own = on_host.setdefault(rank // per_node, {})
            own[name] = own.get(name, 0) + 1
    piece = {name: one.row * one.train / len(ranks_of[name]) for name, one in sizes.items()}
    most = 2 * (blocks.window + 1) * blocks.block  # structures
    window = {name: min(one.bytes, one.row * most) for name, one in sizes.items()}
    hosts = -(-ranks // per_node)
    disk = sum(one.bytes for one in sizes.values())
    return Data(
        disk=disk,
        host=max(sum(sizes[n].bytes for n in names) for names in on_host.values()),
        windows=int(max(sum(window[n] for n in names) for names in on_host.values())),
        shared=int(max(sum(piece[n] * count for n, count in names.items()) for names in on_host.values())),
        costs=sum(one.train * one.costs for one in sizes.values()),
        opens=ranks * sum(one.files for one in sizes.values()),
        begin=8 * math.ceil(disk / BLOCK),
        hosts=hosts,
    )
