"""The input of a run: which structures a step holds, which rank processes which, and the batches of this rank.

The places of a step are the same on every rank, and so is the cut: each rank computes it from the numbers of atoms, and
reads only what is its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from multifid.config import Config
from multifid.feed.loader import Lists, Piece, Source, collate, edge_costs, host_lists, most_pieces, pieces
from multifid.feed.order import Draw, Order, rates
from multifid.feed.readahead import ReadAhead
from multifid.feed.stage import stage, staged_path
from multifid.graphs.batch import Batch
from multifid.graphs.candidates import missing
from multifid.graphs.device_neighbors import DeviceLists
from multifid.parallel.groups import World
from multifid.store.store import Store
from multifid.structures.properties import OF_ATOMS
from multifid.training.counts import Known, labelled_parts
from multifid.training.division import Division, divide, places_of
from multifid.training.settings import MEASURING, TrainConfig
from multifid.training.share import Exchange

AT_ONCE = 1 << 16  # structures of a split that are shared out together


class Step(NamedTuple):
    """One step, as one rank sees it."""

    batches: list[Batch]  # micro-batches of this rank
    identities: bytes  # of all structures of the step
    known: Known


@dataclass(frozen=True)
class Feed:
    """The structures of a run as one rank sees them."""

    config: Config
    sources: list[Source]
    draws: list[Draw]  # of the sources, in their order
    placement: Mapping[str, Sequence[int]]  # task -> ranks
    rank: int = 0
    lists: Lists = host_lists  # make the neighbour lists
    exchange: Exchange | None = None  # brings the structures of its windows
    _ahead: list[ReadAhead] = field(init=False, repr=False)  # of the sources

    def __post_init__(self) -> None:
        followers = [ReadAhead(s.store, d.order, s.label_sets) for s, d in zip(self.sources, self.draws, strict=True)]
        object.__setattr__(self, "_ahead", followers)

    @property
    def epoch_steps(self) -> int:
        return epoch_steps(self.config.train, self.draws)

    @property
    def structures(self) -> float:
        """Structures of a mean step, over all ranks; what several tasks label counts once."""
        return float(sum(draw.rate for draw in self.draws))

    def size(self, split: str) -> int:
        """Structures of a split, in all stores."""
        return sum(source.store.size(split) for source in self.sources)

    def step(self, step: int) -> Step:
        """What this rank processes in a step, and what all ranks know of it."""
        if self.exchange is not None:
            division = self.exchange.wait(step)
        else:
            for draw, ahead in zip(self.draws, self._ahead, strict=True):
                ahead(draw.places(step)[0])
            division = self._divided(self._chosen(step))
        chosen, identities = division.chosen, b""
        for draw, indices in zip(self.draws, chosen, strict=True):
            identities += draw.name.encode() + indices.astype("<i8").tobytes()
        mine, rounds = self._pieces(division)
        batches = [self.batch(piece) for piece in mine]
        return Step(batches, identities, Known(self._known_counts(chosen), rounds))

    def reached(self, step: int) -> None:
        """All ranks are about to make this step."""
        if self.exchange is not None:
            self.exchange.reached(step)

    def finish(self) -> None:
        """All ranks have made their last step."""
        if self.exchange is not None:
            self.exchange.finish()

    def leave(self) -> None:
        """The run has ended, however it did."""
        if self.exchange is not None:
            self.exchange.leave()

    def split(self, split: str) -> Iterator[Batch]:
        """This rank's part of a whole split, store after store, in batches of about a training step's edges."""
        return map(self.batch, self.pieces_of_split(split))

    def pieces_of_step(self, step: int) -> list[Piece]:
        """Which structures the batches of this rank hold in a step."""
        return self._pieces(self._divided(self._chosen(step)))[0]

    def pieces_of_split(self, split: str) -> Iterator[Piece]:
        """Which structures the batches of this rank hold of a split; memory does not grow with the split."""
        sizes = [source.store.size(split) for source in self.sources]
        parts = max(1, -(-sum(sizes) // AT_ONCE))
        for k in range(parts):
            bounds = [(k * n // parts, (k + 1) * n // parts) for n in sizes]
            chosen = [s.store.pick(split, slice(*b)) for s, b in zip(self.sources, bounds, strict=True)]
            mine = self._mine(self._divided(chosen))[0]
            most = self.config.train.max_edges or self._edges_of_step(mine)
            for source, index in zip(self.sources, mine, strict=True):
                if len(index):
                    yield from pieces([(source, index)], self.config.model.cutoff, most)

    def _edges_of_step(self, chosen: Sequence[np.ndarray]) -> int:
        """About how many edges of such structures of the sources a rank has in a step; at least those of one task."""
        batch, together, largest = max(1.0, float(self.config.train.batch or 1)), 1.0, 1.0
        for source, draw, index in zip(self.sources, self.draws, chosen, strict=True):
            if len(index):
                mean = float(edge_costs(source, index, self.config.model.cutoff).mean())
                together += mean * float(draw.rate) / len(self.placement[draw.name])
                largest = max(largest, mean * batch)
        return int(max(together, largest))

    def batch(self, piece: Piece) -> Batch:
        return collate(piece, self.config.model.cutoff, self.lists)

    def _chosen(self, step: int) -> list[np.ndarray]:
        """The structures of a step: of each source, by their indices in its store."""
        places = places_of(self.draws, step)
        return [source.store.pick("train", at) for source, at in zip(self.sources, places, strict=True)]

    def _divided(self, chosen: list[np.ndarray]) -> Division:
        return divide(self.sources, self.draws, self.placement, self.config.model.cutoff, chosen)

    def _pieces(self, division: Division) -> tuple[list[Piece], int]:
        """This rank's part of the structures of a step in micro-batches, and how many of these a rank has at most."""
        mine, rounds = self._mine(division)
        parts = [(s, i) for s, i in zip(self.sources, mine, strict=True) if len(i)]
        together = [[part] for part in parts] if self._apart else [parts]
        cutoff, most = self.config.model.cutoff, self.config.train.max_edges
        return [piece for one in together for piece in pieces(one, cutoff, most)], rounds

    @property
    def _apart(self) -> bool:
        """Whether each store's structures make micro-batches of their own."""
        return self.config.train.balance in MEASURING

    def _mine(self, division: Division) -> tuple[list[np.ndarray], int]:
        """Of the structures of each source those that this rank processes, in their order; the most micro-batches."""
        chosen, costs, owners = division
        cost, owner = (np.concatenate([table[draw.name] for draw in self.draws]) for table in (costs, owners))
        mine = [indices[owners[draw.name] == self.rank] for draw, indices in zip(self.draws, chosen, strict=True)]
        most = self.config.train.max_edges
        if self._apart:  # no rank has more
            return mine, sum(most_pieces(costs[d.name], owners[d.name], most) for d in self.draws)
        return mine, most_pieces(cost, owner, most)

    def _known_counts(self, chosen: list[np.ndarray]) -> np.ndarray:
        """S_t, A_t, V_t and P_t of the structures of a step (tasks, 4), NaN where some of them may lack the label."""
        counts = {}
        for source, indices in zip(self.sources, chosen, strict=True):
            atoms = float(source.store.rows("natoms", indices).sum(dtype=np.int64))
            for task, label_set in source.tasks.items():
                part = labelled_parts(source.store.manifest["tasks"][label_set])
                kinds = ["energy", "forces", "stress", source.store.property_kind(label_set)]
                counts[task] = [
                    part.get(kind, 0.0) * (atoms if kind in ("forces", *OF_ATOMS) else len(indices)) if kind else 0.0
                    for kind in kinds
                ]
        return np.array([counts[task] for task in self.config.tasks], np.float64)


def lists_of(wanted: str, device: torch.device) -> Lists:
    """What makes the neighbour lists of a run on a device; wanted: `train.neighbors`.

    ValueError where they are to be made on a device on which they cannot.
    """
    trouble = missing(device)
    on_device = wanted == "device"  # auto: on no GPU have the kernels been seen to make the host's lists
    if on_device and trouble is not None:
        raise ValueError(f"train.neighbors: device: {trouble}")
    return DeviceLists(device) if on_device else host_lists


def make_draws(config: Config, sources: list[Source]) -> list[Draw]:
    """Which tasks are drawn together, in which order, how fast: one draw for each store."""
    sizes = {t: s.store.size("train") for s in sources for t in s.tasks}
    batch = Fraction(str(config.train.batch))
    rate = rates(sizes, batch, config.sampling, {t: c.per_step for t, c in config.tasks.items()})
    draws = []
    for source in sources:
        tasks = tuple(source.tasks)
        if len({rate[t] for t in tasks}) > 1:
            raise ValueError(f"tasks {', '.join(tasks)} share one store and are drawn together: give them one per_step")
        name = tasks[0] if len(tasks) == 1 else source.store.tasks[0]
        order = Order(config.seed, source.store.content.key, name, sizes[tasks[0]], config.sampling.blocks())
        draws.append(Draw(tasks[0], tasks, order, rate[tasks[0]]))
    return draws


def near(sources: list[Source], placement: Mapping[str, Sequence[int]], directory: Path, world: World) -> list[Source]:
    """The sources, those that this host's ranks train on with copies of their stores in a directory of the host.

    The first rank of each host copies, the others wait. Called on all ranks.
    """
    here = world.on_this_host()
    mine = [source for source in sources if any(rank in here for task in source.tasks for rank in placement[task])]
    with world.together():
        if world.rank == here[0]:
            for source in mine:
                stage(source.store, directory)
    with world.together():
        copies = {s.store.path: Store(staged_path(s.store, directory), s.store.verify) for s in mine}
    return [replace(s, store=copies.get(s.store.path, s.store)) for s in sources]


def epoch_steps(train: TrainConfig, draws: list[Draw]) -> int:
    """Steps in which the task with the longest pass completes it."""
    return train.epoch_steps or max(draw.pass_steps for draw in draws)


def total_steps(train: TrainConfig, draws: list[Draw]) -> int:
    """The length of a run that is not ended by the clock."""
    return train.steps or train.epochs * epoch_steps(train, draws)
