"""What trains, at its beginning: potential, gradients, optimizer, schedule and moving average of this rank.

A branch is built only where it lives; nothing is built to be deleted.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from multifid.config import Config
from multifid.feed.loader import Source
from multifid.model.branch import Branch
from multifid.model.compiled import compile_training
from multifid.model.inherit import start_from
from multifid.model.kernels.gpu.chosen import use_kernels
from multifid.model.potential import Potential
from multifid.model.property import PropertyBranch
from multifid.parallel.gradients import Gradients, ModelPart
from multifid.parallel.groups import World, in_one_order
from multifid.parallel.shard import Shards, shard
from multifid.training.balance import balance_of
from multifid.training.finetune import Pull, prepare_moves, pulled
from multifid.training.optimizer import OPTIMIZERS, MovingAverage, Named, Schedule, with_factors
from multifid.training.recorded import CudaGraphs, Recordings
from multifid.training.step import ENCODER, Task, Trainer, part_of_branch
from multifid.training.task_gradients import tasks_of_ranks


@contextmanager
def settings_of_torch_kept() -> Iterator[None]:
    """What a run sets for the whole process (products, order of sums, kernels, seed) is as before after it."""
    precision, order = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    state, kernels = torch.get_rng_state(), use_kernels(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        in_one_order(order)
        use_kernels(kernels)
        torch.set_rng_state(state)


Pairs = tuple[list[list[float]], list[float]]  # coefficients (K, M) and energies of elements (119,), in scaled units


def build(
    config: Config,
    sources: list[Source],
    placement: Mapping[str, Sequence[int]],
    per_epoch: int,
    world: World,
    begins: bool = True,
    pairs: Mapping[str, Pairs] | None = None,
) -> Trainer:
    """The trainer of this rank, with the branches of the tasks that the placement (task -> ranks) gives it.

    begins: whether the run does; one that goes on has its weights from a checkpoint, and needs no `init` any more.
    pairs: the pair potentials of fresh branches (`training/pairs.py`).
    """
    t, branch_of = config.train, config.branch_of()
    torch.manual_seed(config.seed)  # nothing here draws from the global generator; what may one day is a function of it
    groups = world.groups(holders(branch_of, placement))
    mine = [branch for branch, group in groups.items() if world.rank in group.ranks]
    potential = Potential(config.model, mine, {k: b for k, b in branch_of.items() if b in mine}, config.seed)
    if config.init is not None and begins:
        start_from(potential, Path(config.init), *started(config, sources))
    if begins:
        _begin_at_frequencies(potential, config, sources)
    factors = prepare_moves(potential, config.finetune, config.seed)
    potential.to(dtype=torch.float64 if t.precision == "fp64" else torch.float32).train()
    shards = apply_shards(potential, config.parallel.shard_encoder, world)
    potential.encoder.recompute = t.recompute
    potential.branches.to(world.device)
    for name, values in (pairs or {}).items():
        if name in mine and isinstance(branch := potential.branches[name], Branch) and branch.pairs is not None:
            branch.pairs.set(*values)
    # Of the whole process: products of float32 are exact unless a run asks for TF32.
    torch.set_float32_matmul_precision("high" if t.precision == "tf32" else "highest")
    in_one_order(t.deterministic)
    use_kernels(t.kernels == "auto")
    if t.compile:
        compile_training(potential, t.compile)
    parts = [
        ModelPart(part_of_branch(b), [p for _, p in potential.branch_parameters(b) if p.requires_grad], groups[b])
        for b in mine
    ]
    moving_encoder = [p for p in potential.encoder.parameters() if p.requires_grad]
    encoder = dict(potential.encoder_parameters()) if shards is None else shards.pieces
    whole = moving_encoder if shards is None else list(encoder.values())
    parts.append(ModelPart(ENCODER, whole, world.group, shards))
    parameters = encoder | {name: p for b in mine for name, p in potential.branch_parameters(b)}
    moving = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizer = OPTIMIZERS[t.optimizer](moving, t.lr, t.weight_decay)
    if factors:
        with_factors(optimizer, moving, factors)
    scales, units = task_scales(config, sources), branch_units(config, sources)
    gradients = Gradients(parts)
    trainer = Trainer(
        potential=potential,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        pull=_pull(config, moving, factors),
        schedule=Schedule(
            t.schedule, t.warmup, t.steps or t.epochs * per_epoch, factor=t.plateau_factor, patience=t.plateau_patience
        ),
        average=None if t.ema is None else MovingAverage(parameters, t.ema),
        objective=config.objective,
        tasks=[Task(name, of.weight, scales[name], units[name], of.loss) for name, of in config.tasks.items()],
        world=world.group,
        device=world.device,
        precision=t.precision,
        padded=bool(t.compile) or t.capture,
        recordings=_recordings(potential, gradients, t.precision, world) if t.capture else None,
        clip=t.clip,
        lr=t.lr,
    )
    of_ranks = tasks_of_ranks(list(config.tasks), placement, world.size)
    trainer.balance = balance_of(t.balance, trainer, of_ranks, t.balance_rate, t.balance_every, config.seed)
    return trainer


def _recordings(potential: Potential, gradients: Gradients, precision: str, world: World) -> Recordings:
    """For `train.capture`. ValueError where passes cannot be recorded."""
    if world.device.type != "cuda" or world.size > 1:
        here = f"{world.size} ranks on {world.device}" if world.size > 1 else f"this run is on {world.device}"
        raise ValueError(f"train.capture: true is for one process on a GPU, and {here}: set it to false")
    reads_edges = any(branch.reads_edges for branch in potential.branches.values())
    return Recordings(CudaGraphs(world.device), gradients, precision, reads_edges)


def _begin_at_frequencies(potential: Potential, config: Config, sources: list[Source]) -> None:
    """The first guess of fresh branches of classes: how frequent each is in the train split, one structure added."""
    begun = started(config, sources)[0] if config.init is not None else {}
    for source in sources:
        for task in source.tasks:
            branch = config.branch_of()[task]
            fresh = config.init is None or begun.get(branch, branch) is None
            if not fresh or branch not in potential.branches:
                continue
            module = potential.branches[branch]
            if isinstance(module, PropertyBranch) and module.kind == "class":
                counts = source.about(task)["property"]["counts"]
                wider = config.model.properties[branch].classes - len(counts)
                module.begin_at(torch.tensor([*counts, *[0] * wider], dtype=torch.float64) + 1.0)


def started(config: Config, sources: list[Source]) -> tuple[dict[str, str | None], dict[str, float], set[int]]:
    """How a fine-tuned run begins: branch -> that of `init`, the branches' scales, and the elements to be learnt."""
    if config.finetune is None:
        return {}, {}, set()
    branch_of = config.branch_of()
    units = branch_units(config, sources)
    elements = {z for source in sources for task in source.tasks for z in source.elements(task)}
    begun = {branch_of[task]: branch for task, branch in config.finetune.branches.items() if task in branch_of}
    return begun, {branch_of[task]: unit for task, unit in units.items()}, elements


def _pull(config: Config, moving: Named, factors: Mapping[str, float]) -> Pull | None:
    if config.finetune is None or not config.finetune.pull:
        return None
    names = pulled(moving, config.finetune, config.branch_of())
    return Pull({name: moving[name] for name in names}, config.finetune.pull, factors)


def apply_shards(potential: Potential, wanted: bool, world: World) -> Shards | None:
    """The encoder on the device of this rank: in pieces (wanted, and several ranks), or whole."""
    conservative = potential.config.conservative
    shards = shard(potential.encoder, ENCODER, world, keep_gathered=conservative) if wanted else None
    if shards is None:
        potential.encoder.to(world.device)
    else:
        potential.inner_gradient = shards.inner_gradient
        potential.apart = False
    return shards


def holders(branch_of: Mapping[str, str], placement: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The ranks of every branch: those of all its tasks. In the order of their names, which is the global one."""
    return {
        branch: sorted({rank for task, b in branch_of.items() if b == branch for rank in placement[task]})
        for branch in sorted(set(branch_of.values()))
    }


def task_scales(config: Config, sources: list[Source]) -> dict[str, float]:
    """What divides the residuals of each task, eV/angstrom."""
    about = {task: source.about(task) for source in sources for task in source.tasks}
    in_units = config.objective.scale == "task"
    return {t: config.tasks[t].scale or (float(a["scale"]) if in_units else 1.0) for t, a in about.items()}


def branch_units(config: Config, sources: list[Source]) -> dict[str, float]:
    """What each task's branch predicts in, eV/angstrom: its scale, or the pooled one where all tasks share a branch."""
    own = task_scales(config, sources)
    if config.branches == "per_task":
        return own
    about = {task: source.about(task) for source in sources for task in source.tasks}
    counts = {t: max(a["labels"]["forces"], a["labels"]["energy"]) for t, a in about.items()}
    pooled = math.sqrt(sum(counts[t] * own[t] ** 2 for t in own) / sum(counts.values()))
    return dict.fromkeys(own, pooled)
