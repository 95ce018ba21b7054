"""A run as far as forecasts know it: numbers of parameters, what a step asks of a device, structures of each task.

Nothing is built and no structure is read: parameters and activations are counted on modules without memory
(`model/footprint.py`), work comes from the numbers of atoms and estimated edges of the stores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from multifid.config import Config
from multifid.feed.loader import Source, edge_costs
from multifid.feed.order import Draw
from multifid.forecast.machines import Machine
from multifid.model.branch import Branch
from multifid.model.encoders import build_encoder
from multifid.model.footprint import BatchSize, Footprint, footprint
from multifid.model.potential import ModelConfig
from multifid.parallel.shard import rows_of_piece
from multifid.store.store import Store
from multifid.training.costs import SAMPLE, gathered
from multifid.training.finetune import FinetuneConfig, moves_of_encoder
from multifid.training.work import Shapes, UpdateWork, count_update

# Error of an estimated cost, as `data.loader.edge_costs` states it.
CRYSTAL_ERROR, MOLECULE_ERROR = 0.05, 0.125


@dataclass(frozen=True)
class TaskLoad:
    """Structures of a task in a mean step, over all ranks."""

    structures: float
    atoms: float  # of a structure
    edges: float  # of a structure
    spread: float = 0.0  # standard deviation of a structure's edges, as a part of the mean
    error: float = MOLECULE_ERROR  # of their estimate
    triplets: float = 0.0  # of a structure: pairs of edges that meet


@dataclass(frozen=True)
class Parameters:
    """Of the encoder, or of one branch."""

    shapes: Shapes
    frozen: frozenset[str] = frozenset()  # names of those that are not trained: no gradient, no moments
    gathered: int = 0  # numbers that a rank holds beside its pieces where they are sharded

    @property
    def count(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def moving(self) -> Shapes:
        """Those that are trained."""
        return tuple((name, shape) for name, shape in self.shapes if name not in self.frozen)

    @property
    def moving_count(self) -> int:
        return sum(math.prod(shape) for _, shape in self.moving)

    def sharded(self, ranks: int) -> "Parameters":
        """The largest piece of a rank where every parameter is cut along its first dimension."""
        return replace(self, shapes=tuple((name, (rows_of_piece(s[0], ranks), *s[1:])) for name, s in self.shapes))


@dataclass(frozen=True)
class Subject:
    """A run, as far as forecasts know it."""

    model: ModelConfig
    encoder: Parameters
    branch: Parameters
    layers: int  # of the encoder, between which it may be cut
    footprint: Footprint
    tasks: dict[str, TaskLoad]
    branch_of: dict[str, str]
    together: tuple[tuple[str, ...], ...]  # tasks of one store; every task is in one of them
    width: int = 4  # bytes of a number
    averaged: bool = True
    max_edges: int | None = None
    optimizer: str = "adamw"

    def update(self, parameters: Parameters) -> UpdateWork:
        """What the optimizer asks of a device for an update of these parameters, and what it keeps of them."""
        return count_update(self.optimizer, parameters.moving, torch.float64 if self.width == 8 else torch.float32)

    def times(self, factor: float) -> "Subject":
        """The same with so many times the structures in a step."""
        tasks = {t: replace(load, structures=load.structures * factor) for t, load in self.tasks.items()}
        return replace(self, tasks=tasks)

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """Seconds that a machine computes for one more edge, and for one more atom, of a step."""

        def of(size: BatchSize) -> float:
            works = [self.footprint.forward(size), self.footprint.backward(size)]
            return sum(w.flops / machine.flops * self.width / 4 + w.traffic / machine.traffic for w in works)

        many = BatchSize(1, 1e6, 1e6, 1e7)
        edge = (of(replace(many, edges=2e7)) - of(many)) / 1e7
        return edge, (of(replace(many, atoms=2e6, labelled=2e6)) - of(many)) / 1e6

    @property
    def size(self) -> BatchSize:
        """A mean step of all ranks, as if one task had its structures; those that several tasks label count once."""
        loads = [self.tasks[unit[0]] for unit in self.together]
        atoms, edges, triplets = (
            sum(load.structures * x for load, x in zip(loads, of, strict=True))
            for of in zip(*((load.atoms, load.edges, load.triplets) for load in loads), strict=True)
        )
        return BatchSize(1.0, atoms, atoms, edges, triplets)

    @property
    def structures(self) -> float:
        """Structures that pass through the encoder in a step; those that several tasks label count once."""
        return sum(self.tasks[unit[0]].structures for unit in self.together)


def subject_of(
    config: Config, sources: Sequence[Source], draws: Sequence[Draw], ranks: int, processor: bool
) -> Subject:
    """A run on `ranks` ranks as its config and stores describe it; `train.batch` must be resolved."""
    tasks: dict[str, TaskLoad] = {}
    for source, draw in zip(sources, draws, strict=True):
        index = np.asarray(source.store.index("train"))
        sample = index[:: max(1, len(index) // SAMPLE)].astype(np.int64)
        edges = edge_costs(source, sample, config.model.cutoff)
        mean, natoms = max(float(edges.mean()), 1e-9), source.store.rows("natoms", sample)
        load = TaskLoad(
            structures=float(draw.rate),
            atoms=float(natoms.mean()),
            edges=float(edges.mean()),
            spread=float(edges.std()) / mean,
            error=CRYSTAL_ERROR if _periodic(source.store, sample) else MOLECULE_ERROR,
            triplets=float(triplets_of(edges, natoms).mean()),
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
        optimizer=config.train.optimizer,
        max_edges=config.train.max_edges,
        near=2 ** round(math.log2(min(max(atoms / ranks, 64), 8192))),
        processor=processor,
        finetune=config.finetune,
    )


def make_subject(
    model: ModelConfig,
    tasks: dict[str, TaskLoad],
    *,
    branch_of: Mapping[str, str] | None = None,
    together: Sequence[Sequence[str]] = (),
    double: bool = False,
    averaged: bool = True,
    optimizer: str = "adamw",
    max_edges: int | None = None,
    near: int = 2048,
    processor: bool = False,
    finetune: FinetuneConfig | None = None,
) -> Subject:
    """A run from plain numbers, without stores. near: about the atoms of a rank's batch.  processor: no accelerator."""
    with torch.device("meta"):
        encoder = build_encoder(model.encoder, model.cutoff)
        branch = Branch(encoder, model.branch, model.cutoff)
    if finetune is not None:
        moves_of_encoder(encoder, finetune, 0)
    beside = gathered(encoder, model.conservative, max_edges is not None)
    atoms = sum(load.structures * load.atoms for load in tasks.values())
    edges = sum(load.structures * load.edges for load in tasks.values())
    triplets = sum(load.structures * load.triplets for load in tasks.values())
    each = (float(f"{edges / atoms:.2g}"), float(f"{triplets / max(edges, 1e-9):.2g}"))
    alone = set(tasks) - {t for unit in together for t in unit}
    return Subject(
        model=model,
        encoder=replace(_parameters("encoder", encoder), gathered=beside),
        branch=_parameters("branches.branch", branch),
        layers=encoder.depth,
        footprint=_footprint(model.model_dump_json(), double, *each, near, processor, len(tasks)),
        tasks=tasks,
        branch_of=dict(branch_of or {t: t for t in tasks}),
        together=tuple(tuple(unit) for unit in [*together, *([t] for t in sorted(alone))]),
        width=8 if double else 4,
        averaged=averaged,
        max_edges=max_edges,
        optimizer=optimizer,
    )


def triplets_of(edges: np.ndarray, natoms: np.ndarray) -> np.ndarray:
    """Pairs of edges that meet in each structure, if all its atoms have as many edges."""
    return edges * np.maximum(edges / natoms - 1.0, 0.0)


def _periodic(store: Store, indices: np.ndarray) -> bool:
    """Whether some of these structures are crystals, slabs or wires."""
    return store.has("pbc") and bool(store.rows("pbc", indices).any())


@lru_cache(maxsize=32)
def _footprint(
    model: str, double: bool, edges_per_atom: float, triplets_per_edge: float, near: int, processor: bool, tasks: int
) -> Footprint:
    """Counted once for the many forecasts of one model."""
    dtype = torch.float64 if double else torch.float32
    config = ModelConfig.model_validate_json(model)
    return footprint(config, dtype, edges_per_atom, triplets_per_edge, near, processor, tasks)


def _parameters(prefix: str, module: torch.nn.Module) -> Parameters:
    """With the names that they have in a whole model: an optimizer may go by them."""
    named = dict(module.named_parameters(prefix=prefix))
    frozen = frozenset(name for name, p in named.items() if not p.requires_grad)
    return Parameters(tuple((name, tuple(p.shape)) for name, p in named.items()), frozen)
