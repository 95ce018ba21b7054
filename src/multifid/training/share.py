"""Train splits in pieces in the memory of the ranks that train on them, for stores larger than the memory of a host.

Which structures a step holds, and who processes them, is arithmetic (`feed.order`, `parallel.shares`). So every rank
knows of each window of steps what it needs, who holds that, and what the others need of what it holds; nobody asks.
Each window is one exchange in the group of a store's ranks, made by a thread of its own, a window ahead of the steps:

    place of the train index   | 0 .. 4095 | 4096 .. | 8192 .. | 12288 .. | ...     blocks of BLOCK places,
    held by rank of the group  |     0     |    1    |    2    |    0     | ...     dealt in turn
    steps                      | 0 ..... 15 | 16 ..... 31 | 32 ..... 47 |            windows of WINDOW steps
    exchanged while            |  (before)  |   0 ... 15  |  16 ... 31  |            the window before is used

What travels are the rows of a store's fields, end to end, without headers: both sides know how many atoms a structure
has. Numbers of atoms, cells and indices, by which steps are divided, are read from the store by every rank as always;
so are validation splits, and a structure that is asked for outside its window.
"""

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from multifid.feed.loader import Source
from multifid.feed.order import Draw
from multifid.parallel.groups import Group, World
from multifid.store.fields import LABELS, PROPERTIES, Field, field
from multifid.store.store import Store
from multifid.structures.structure import Packed, PackedLabels
from multifid.training.division import Division, divide, places_of

BLOCK = 4096  # places of the train index that one rank holds together
WINDOW = 16  # steps


@dataclass(frozen=True)
class Columns:
    """Structures as rows of the fields that travel: name -> rows of structures or of atoms; natoms (structures,)."""

    natoms: np.ndarray
    rows: dict[str, np.ndarray]

    def take(self, chosen: np.ndarray) -> "Columns":
        """Some structures, in that order."""
        ends = np.cumsum(self.natoms)
        natoms = self.natoms[chosen]
        atoms = np.repeat(ends[chosen] - np.cumsum(natoms), natoms) + np.arange(int(natoms.sum()))
        rows = {name: x.take(atoms if _of_atoms(name) else chosen, axis=0) for name, x in self.rows.items()}
        return Columns(natoms, rows)

    def packed(self, label_sets: Mapping[str, str | None]) -> Packed:
        """As `Store.read` gives them. label_sets: name -> kind of property, or None."""
        n, rows = len(self.natoms), self.rows
        return Packed(
            numbers=rows["numbers"],
            positions=rows["positions"],
            natoms=self.natoms,
            cell=rows.get("cell", np.zeros((n, 3, 3))),
            pbc=rows.get("pbc", np.zeros((n, 3), bool)),
            charge=rows.get("charge", np.zeros(n, np.int8)),
            spin=rows.get("spin", np.ones(n, np.uint8)),
            labels={
                name: PackedLabels(
                    kind=kind,
                    value=None if kind is None else rows.get(f"labels/{name}/{kind}"),
                    energy=rows.get(f"labels/{name}/energy", np.full(n, np.nan)),
                    forces=rows.get(f"labels/{name}/forces"),
                    stress=rows.get(f"labels/{name}/stress"),
                )
                for name, kind in label_sets.items()
            },
        )


def columns_of(packed: Packed, fields: Mapping[str, Field]) -> Columns:
    """Of structures as they are read; a label that none of them has is NaN throughout."""
    rows: dict[str, np.ndarray] = {}
    for name, what in fields.items():
        match name.split("/"):
            case ["labels", label_set, kind]:
                values = getattr(packed.labels[label_set], "value" if kind in PROPERTIES else kind)
            case _:
                values = getattr(packed, name)
        count = len(packed.numbers) if what.rows == "atoms" else len(packed.natoms)
        rows[name] = np.full((count, *what.row), np.nan, what.dtype) if values is None else values
    return Columns(packed.natoms, rows)


def _of_atoms(name: str) -> bool:
    return field(name).rows == "atoms"


class Shared(Store):
    """A store whose structures come from the window that they belong to, where they do."""

    def __init__(self, store: Store, label_sets: Sequence[str]) -> None:
        super().__init__(store.path, store.verify, store.additions)
        self.label_sets = {name: self.property_kind(name) for name in label_sets}
        named = ["numbers", "positions", "cell", "pbc", "charge", "spin"]
        named += [f"labels/{name}/{kind}" for name in label_sets for kind in (*LABELS, *PROPERTIES)]
        self.travelling = {name: field(name) for name in named if self.has(name)}
        self.windows: dict[int, tuple[np.ndarray, np.ndarray, Columns]] = {}  # indices ascending, their rows, the rows

    def read(self, indices: Sequence[int] | np.ndarray, tasks: Sequence[str] | None = None) -> Packed:
        wanted = np.asarray(indices)
        if tasks is not None and set(tasks) <= set(self.label_sets) and len(wanted):
            for known, at, columns in list(self.windows.values()):
                places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
                if len(known) and (known[places] == wanted).all():
                    return columns.take(at[places]).packed({name: self.label_sets[name] for name in tasks})
        return super().read(indices, tasks)

    def piece(self, group: Group) -> Columns:
        """What this rank of a group holds: its blocks of the train index, read and verified; nothing is held twice."""
        size = self.size("train")
        blocks = [np.arange(b, min(b + BLOCK, size)) for b in range(group.index * BLOCK, size, group.size * BLOCK)]
        indices = self.pick("train", np.concatenate([np.zeros(0, np.int64), *blocks]))
        natoms = self.rows("natoms", indices).astype(np.int64)
        counts = {True: int(natoms.sum()), False: len(natoms)}
        fields = self.travelling
        whole = Columns(natoms, {n: np.empty((counts[_of_atoms(n)], *w.row), w.dtype) for n, w in fields.items()})
        first = {True: 0, False: 0}
        for start in range(0, len(indices), BLOCK):
            part = columns_of(super().read(indices[start : start + BLOCK], list(self.label_sets)), fields)
            for name, values in part.rows.items():
                at = first[_of_atoms(name)]
                whole.rows[name][at : at + len(values)] = values
            first = {True: first[True] + int(part.natoms.sum()), False: first[False] + len(part.natoms)}
        return whole


class Exchange:
    """Fetches windows a window ahead of the steps. Every rank must reach the same steps, in order.

    ahead: so many steps ahead of the one that was reached are prepared.
    """

    def __init__(
        self,
        sources: list[Source],
        draws: list[Draw],
        placement: Mapping[str, Sequence[int]],
        cutoff: float,
        world: World,
        ahead: int = 0,
    ) -> None:
        self.ahead = max(WINDOW, ahead)
        self.kept = 2 + self.ahead // WINDOW  # windows: of the last step, those ahead, and one that just came
        self.draws, self.placement, self.cutoff = draws, placement, cutoff
        self.sources = [replace(s, store=Shared(s.store, s.label_sets)) for s in sources]
        groups = world.apart_for_data({draw.name: placement[draw.tasks[0]] for draw in draws})
        self.groups = {name: group for name, group in groups.items() if group.rank in group.ranks}
        self.pieces = {
            draw.name: _shared(source).piece(self.groups[draw.name])
            for draw, source in zip(draws, self.sources, strict=True)
            if draw.name in self.groups
        }
        self._asked: queue.Queue[int | None] = queue.Queue()
        self._ready = threading.Condition()
        self._newest, self._done = -1, -1  # windows that were asked for, and that have arrived
        self._error: BaseException | None = None
        self._divisions: dict[int, Division] = {}  # of the steps of the windows that are there
        self._thread = threading.Thread(target=self._work, name="exchange", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """All ranks are about to make this step: its window and those ahead are fetched, if they are not there."""
        last = (step + self.ahead) // WINDOW
        first = step // WINDOW if self._newest < 0 else self._newest + 1
        for window in range(first, last + 1):
            self._asked.put(window)
        self._newest = max(self._newest, last)

    def wait(self, step: int) -> Division:
        """How a step is divided, when its structures are there. The error of the exchange where it failed."""
        with self._ready:
            self._ready.wait_for(lambda: self._done >= step // WINDOW or self._error is not None)
        if self._error is not None:
            raise self._error
        return self._divisions[step]

    def finish(self) -> None:
        """All ranks have made their last step: what was asked for is fetched by all, and no more."""
        self._asked.put(None)
        self._thread.join()

    def leave(self) -> None:
        """The run has ended, however: nobody waits any longer, and what this rank holds can go."""
        with self._ready:
            self._error = self._error or RuntimeError("the run has ended")
            self._ready.notify_all()
        self._asked.put(None)
        self.pieces = {}

    def _work(self) -> None:
        try:
            while (window := self._asked.get()) is not None:
                self._fetch(window)
                with self._ready:
                    self._done = window
                    self._ready.notify_all()
        except BaseException as error:  # told to whoever waits
            with self._ready:
                self._error = error
                self._ready.notify_all()

    def _fetch(self, window: int) -> None:
        """One exchange for each store that this rank trains on, in the order of the draws, which is every rank's."""
        steps = range(window * WINDOW, (window + 1) * WINDOW)
        places = [places_of(self.draws, step) for step in steps]
        divisions = []
        for at in places:
            chosen = [source.store.pick("train", own) for source, own in zip(self.sources, at, strict=True)]
            divisions.append(divide(self.sources, self.draws, self.placement, self.cutoff, chosen))
        for k, (draw, source) in enumerate(zip(self.draws, self.sources, strict=True)):
            if draw.name in self.groups:
                store = _shared(source)
                whole = (
                    np.concatenate([at[k] for at in places]),
                    np.concatenate([division.chosen[k] for division in divisions]),
                    np.concatenate([division.owners[draw.name] for division in divisions]),
                )
                store.windows[window] = _exchanged(store, self.pieces[draw.name], self.groups[draw.name], *whole)
                store.windows.pop(window - self.kept, None)
        self._divisions |= dict(zip(steps, divisions, strict=True))
        for step in steps:
            self._divisions.pop(step - self.kept * WINDOW, None)


def _shared(source: Source) -> Shared:
    assert isinstance(source.store, Shared)
    return source.store


def _exchanged(
    store: Shared, piece: Columns, group: Group, places: np.ndarray, indices: np.ndarray, owners: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Columns]:
    """What this rank gets of a window: indices in the store ascending, the row of each, and the rows.

    places, indices (structures,): of the whole window in the train index and in the store. owners: ranks.
    """
    block = places // BLOCK
    holder = block % group.size  # by their places in the group, as all that follows
    owner = np.searchsorted(np.array(group.ranks), owners)
    mine = np.flatnonzero(holder == group.index)
    mine = mine[np.argsort(owner[mine], kind="stable")]
    sent = piece.take((block[mine] // group.size) * BLOCK + places[mine] % BLOCK)
    got = np.flatnonzero(owner == group.index)
    got = got[np.argsort(holder[got], kind="stable")]
    natoms = store.rows("natoms", indices[got]).astype(np.int64)
    to = _Lengths.of(sent.natoms, owner[mine], group.size)
    come = _Lengths.of(natoms, holder[got], group.size)
    received = _travelled(_written(sent, to, store.travelling), to, come, store.travelling, group)
    ascending = np.argsort(indices[got], kind="stable")
    return indices[got][ascending], ascending, Columns(natoms, _read(received, come, store.travelling))


@dataclass(frozen=True)
class _Lengths:
    """Structures and atoms for or from each rank of a group, (ranks,)."""

    structures: np.ndarray
    atoms: np.ndarray

    @classmethod
    def of(cls, natoms: np.ndarray, ranks: np.ndarray, size: int) -> "_Lengths":
        return cls(np.bincount(ranks, minlength=size), np.bincount(ranks, natoms, size).astype(np.int64))

    def rows(self, name: str) -> np.ndarray:
        return self.atoms if _of_atoms(name) else self.structures

    def bytes(self, fields: Mapping[str, Field]) -> list[int]:
        """For or from each rank."""
        total = np.zeros(len(self.structures), np.int64)
        for name, what in fields.items():
            total += _row_bytes(what) * self.rows(name)
        return [int(n) for n in total]


def _row_bytes(what: Field) -> int:
    return np.dtype(what.dtype).itemsize * int(np.prod(what.row, dtype=np.int64))


def _written(sent: Columns, to: _Lengths, fields: Mapping[str, Field]) -> np.ndarray:
    """Bytes for all ranks: for the first all its columns, then for the second, ..."""
    cuts = {name: np.split(rows, np.cumsum(to.rows(name))[:-1]) for name, rows in sent.rows.items()}
    parts = [
        np.ascontiguousarray(cuts[name][rank], what.dtype).reshape(-1).view(np.uint8)
        for rank in range(len(to.structures))
        for name, what in fields.items()
    ]
    return np.concatenate([np.zeros(0, np.uint8), *parts])


def _travelled(data: np.ndarray, to: _Lengths, come: _Lengths, fields: Mapping[str, Field], group: Group) -> np.ndarray:
    """The bytes that all ranks of the group have for this one, by sender."""
    if group.process_group is None:
        return data
    out = torch.empty(int(sum(come.bytes(fields))), dtype=torch.uint8)
    splits = come.bytes(fields), to.bytes(fields)
    dist.all_to_all_single(out, torch.from_numpy(data), *splits, group=group.process_group)
    return out.numpy()


def _read(data: np.ndarray, come: _Lengths, fields: Mapping[str, Field]) -> dict[str, np.ndarray]:
    """Columns of what came, sender after sender."""
    found: dict[str, list[np.ndarray]] = {name: [np.zeros((0, *w.row), w.dtype)] for name, w in fields.items()}
    at = 0
    for rank in range(len(come.structures)):
        for name, what in fields.items():
            size = _row_bytes(what) * int(come.rows(name)[rank])
            found[name].append(data[at : at + size].view(what.dtype).reshape(-1, *what.row))
            at += size
    return {name: np.concatenate(parts) for name, parts in found.items()}
