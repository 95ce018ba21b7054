"""What a run says when it starts: what it trains, on what, and where."""

import socket
from collections.abc import Mapping, Sequence
from datetime import datetime

import torch

import multifid
from multifid.config import Config
from multifid.feed.loader import Source, TaskConfig
from multifid.feed.order import Draw
from multifid.model.kernels.native.build import library
from multifid.model.potential import ModelConfig
from multifid.parallel.groups import World
from multifid.parallel.layout import ranges
from multifid.structures.structure import SPLITS
from multifid.training.costs import parameters
from multifid.training.lines import UNITS
from multifid.training.loss import ObjectiveConfig
from multifid.training.settings import TrainConfig

LABELS = ("energy", "forces", "stress")


def heading(run: str, step: int) -> str:
    """The line that every start of a run begins with."""
    doing = f"resumes {run} at step {step}" if step else f"begins {run}"
    return f"multifid {multifid.__version__} {doing}, {datetime.now():%Y-%m-%d %H:%M:%S}"


def opening(
    config: Config,
    sources: Sequence[Source],
    draws: Sequence[Draw],
    placement: Mapping[str, Sequence[int]],
    world: World,
    length: str,
) -> list[str]:
    """Where the run is, what it optimises, how large the model is, and a table of its tasks.

    length: how many steps there will be, in words. Called on one rank.
    """
    rate = {task: float(draw.rate) for draw in draws for task in draw.tasks}
    whole = sum(float(draw.rate) for draw in draws)
    lines = {
        "place": _place(world),
        "model": _model(config.model),
        "parameters": _parameters(config),
        "training": _training(config.train, config.objective, config.seed, config.init),
        "length": f"{length}; {whole:.6g} structures a step",
        "units": UNITS,
    }
    return [*(f"  {name:<10}  {text}" for name, text in lines.items()), *_tasks(config.tasks, sources, rate, placement)]


def _place(world: World) -> str:
    device = str(world.device)
    if world.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(world.device)})"
    ranks = f"{world.size} ranks" if world.size > 1 else "1 rank"
    made = "C++ and torch" if world.device.type == "cpu" and library() is not None else "torch"
    threads = f"threads {torch.get_num_threads()}"
    return f"{socket.gethostname()}, {device}, {ranks}, {threads}, {made} {torch.__version__}"


def _model(model: ModelConfig) -> str:
    encoder, branch = model.encoder, model.branch
    size = ", ".join(f"{key} {value}" for key, value in encoder if key != "name" and value is not None)
    size = f"{encoder.name}, {size}" if size else encoder.name
    others = [f"; branch {n} {'-'.join(map(str, b.hidden))}, {b.forces} forces" for n, b in model.branches.items()]
    heads = f"branches {'-'.join(map(str, branch.hidden))}, {branch.forces} forces{''.join(others)}"
    return f"{size}; {heads}; cutoff {model.cutoff}"


def _parameters(config: Config) -> str:
    names = sorted(set(config.branch_of().values()))
    encoder = parameters(config.model)[0]
    each = {name: parameters(config.model, name)[1] for name in names}
    sizes = sorted(set(each.values()))
    size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    branches = f"{len(names)} branch{'es' if len(names) > 1 else ''}"
    return f"encoder {encoder:,}; each branch {size}; in all, with {branches}, {encoder + sum(each.values()):,}"


def _training(t: TrainConfig, o: ObjectiveConfig, seed: int, init: str | None) -> str:
    weights = ", ".join(f"{kind} {getattr(o, kind):g}" for kind in LABELS if getattr(o, kind))
    begun = "" if init is None else f"; from the weights of {init}"
    return f"{o.loss} of {weights}; {t.optimizer}, lr {t.lr:g}, {t.schedule}, {t.precision}, seed {seed}{begun}"


def _tasks(
    tasks: Mapping[str, TaskConfig],
    sources: Sequence[Source],
    rate: Mapping[str, float],
    placement: Mapping[str, Sequence[int]],
) -> list[str]:
    """Structures in each split, labels in all splits together, structures in a step, weight and ranks of each task."""
    splits = SPLITS[:3]
    found, properties = {}, any("property" in s.about(t) for s in sources for t in s.tasks)
    kinds = (*LABELS, "property") if properties else LABELS
    for source in sources:
        for task, label_set in source.tasks.items():
            labels = source.store.manifest["tasks"][label_set]["labels"]
            found[task] = [source.store.size(split) for split in splits] + [labels[kind] for kind in LABELS]
            own = source.store.property_kind(label_set)
            found[task] += [labels.get(own, 0) if own else 0] if properties else []
    heads, rows = [*splits, *kinds, "a step", "weight", "ranks"], []
    for task in tasks:
        numbers = [f"{n:,}" for n in found[task]] + [f"{rate[task]:.4g}", f"{tasks[task].weight:g}"]
        rows.append([task, *numbers, ranges(placement[task])])
    columns = list(zip(["task", *heads], *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    wide = [sum(widths[1:4]) + 4, sum(widths[4 : 4 + len(kinds)]) + 2 * len(kinds) - 2]
    lines = [f"{'':<{widths[0]}}  {'structures':^{wide[0]}}  {'structures with':^{wide[1]}}"]
    for cells in zip(*columns, strict=True):
        lines.append(
            "  ".join(f"{c:>{w}}" if k else f"{c:<{w}}" for k, (c, w) in enumerate(zip(cells, widths, strict=True)))
        )
    return [f"  | {line.rstrip()}" for line in lines]
