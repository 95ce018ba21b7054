"""`multifid init STORE... --out CONFIG.yaml`: a first config for given stores, with comments, ready to train.

What depends on the data is worked out from the manifests: tasks and their labels, the cutoff from edges per atom, sizes
and optimizer from how much there is to learn from, the distance of validations from how much they take. The text is
`template.yaml` beside this file.
"""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from math import ceil
from pathlib import Path
from string import Template
from typing import NamedTuple

import yaml
from rich.console import Console

from multifid.config import Config, parse_config
from multifid.feed.loader import TaskConfig, open_sources
from multifid.store.store import Store
from multifid.structures.elements import SYMBOLS

EDGES = 40  # per atom, at most, in the densest store: what the cutoff is shortened for
CUTOFFS = (5.0, 4.5, 4.0)  # angstrom
VALIDATION = 0.1  # of the time of training; a structure that is validated costs a third of one that is trained on


class Size(NamedTuple):
    """Settings that go with an amount of data."""

    structures: float  # of the train splits, at most
    layers: int
    hidden: int
    tensors: int
    batch: int
    optimizer: str
    lr: float
    ema: float
    warmup: int


SMALL = Size(20_000, 3, 64, 8, 8, "soap", 5e-3, 0.995, 50)  # as measured in docs/accuracy.md
MEDIUM = Size(500_000, 3, 128, 0, 16, "adamw", 2e-3, 0.999, 500)
LARGE = Size(float("inf"), 4, 256, 0, 32, "adamw", 1e-3, 0.999, 500)


def first_config(
    stores: Sequence[Path], out: Path, run: str | None = None, minutes: float = 20.0, console: Console | None = None
) -> Config:
    """Write a config for the stores; returns what `multifid train` will read in it.

    run: the run's directory, `runs/` and the name of the config where nothing is said. ValueError where the config or
    the run is there already, and where a store cannot be trained on.
    """
    run = run or f"runs/{out.stem}"
    if out.exists():
        raise ValueError(f"{out} is there already and is not overwritten: choose another --out, or remove it")
    if Path(run).exists():
        raise ValueError(f"{run} is there already, and a run is not begun twice: choose another --run, or remove it")
    tasks = _tasks(stores)
    text = _text(tasks, out, run, minutes)
    config = parse_config(yaml.safe_load(text), str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("x", encoding="utf-8") as file:
        file.write(text)
    _say(console or Console(stderr=True), config, out)
    return config


def _tasks(stores: Sequence[Path]) -> dict[str, tuple[Store, str]]:
    """Task -> its store and label set: the names of the label sets, with the store's before where two are the same."""
    opened = [Store(path) for path in stores]
    if len({store.path.resolve() for store in opened}) < len(opened):
        raise ValueError("a store is given twice: " + ", ".join(map(str, stores)))
    times = Counter(labels for store in opened for labels in store.tasks)
    found: dict[str, tuple[Store, str]] = {}
    for store in opened:
        for labels in store.tasks:
            name = labels if times[labels] == 1 else f"{store.path.resolve().name}-{labels}"
            if name in found:
                raise ValueError(
                    f"{found[name][0].path} and {store.path} would both be task {name!r}: give the directory of one "
                    "another name, or prepare it with another --task"
                )
            found[name] = (store, labels)
    open_sources({name: TaskConfig(store=str(store.path), labels=labels) for name, (store, labels) in found.items()})
    return found


def _text(tasks: dict[str, tuple[Store, str]], out: Path, run: str, minutes: float) -> str:
    """The config as text; nothing of it is checked yet."""
    stores = list({id(store): store for store, _ in tasks.values()}.values())
    train = sum(store.size("train") for store in stores)
    size = next(size for size in (SMALL, MEDIUM, LARGE) if train <= size.structures)
    labels = Counter[str]()
    for store, name in tasks.values():
        labels.update(store.manifest["tasks"][name]["labels"])
    cutoff, edges = _cutoff(stores)
    stress = labels["stress"] > 0
    values = {
        "out": shlex.quote(str(out)),
        "run": _scalar(run),
        "tasks": "\n".join(_task(name, *where) for name, where in tasks.items()),
        "cutoff": cutoff,
        "cutoff_why": f"About {edges:.0f} neighbours an atom in the densest store",
        "energy": 1.0 if labels["energy"] else 0.0,
        "forces": 1.0 if labels["forces"] else 0.0,
        "stress": 10.0 if stress else 0.0,
        "stress_why": "in eV/angstrom^3, so its numbers are small" if stress else "no store has labels of stress",
        "minutes": f"{minutes:g}",
        "epoch_steps": _epoch_steps(stores, size.batch, len(tasks)),
        "weight_decay": 0.2 if len(tasks) == 1 and size is SMALL else 0.01,
        **size._asdict(),
    }
    return Template(files(__package__).joinpath("template.yaml").read_text(encoding="utf-8")).substitute(values)


def _cutoff(stores: Sequence[Store]) -> tuple[float, float]:
    """The longest cutoff with at most EDGES edges per atom in every store (the shortest where none has), and its edges.

    Between the cutoffs of the manifest edges grow as the volume does.
    """

    def edges(cutoff: float) -> float:
        return max(_edges(store.manifest["edges_per_atom"], cutoff) for store in stores)

    cutoff = next((c for c in CUTOFFS if edges(c) <= EDGES), CUTOFFS[-1])
    return cutoff, edges(cutoff)


def _edges(known: dict[str, float], cutoff: float) -> float:
    nearest = min(known, key=lambda c: (abs(float(c) - cutoff), -float(c)))
    return known[nearest] * min((cutoff / float(nearest)) ** 3, 1.0)


def _epoch_steps(stores: Sequence[Store], batch: float, tasks: int) -> int:
    """So many steps that validating takes a tenth of the time, and not more than the longest pass; at least 50."""
    validated = sum(store.size("validation") for store in stores)
    steps = ceil(validated / 3 / (VALIDATION * batch * tasks))
    return max(50, min(steps, ceil(max(store.size("train") for store in stores) / batch)))


def _task(name: str, store: Store, labels: str) -> str:
    about = store.manifest["tasks"][labels]
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in about["labels"].items() if count)
    symbols = [SYMBOLS[z] for z in sorted(store.elements)]
    elements = " ".join(symbols) if len(symbols) <= 12 else f"{len(symbols)} elements"
    lines = [
        f"  {_scalar(name)}:    # {' '.join((about['level_of_theory'] or 'level of theory not stated').split())}",
        f"    # {store.size('train'):,} training structures of {elements}; labels: {kinds}",
        f"    store: {_scalar(str(store.path))}",
        *([f"    labels: {_scalar(labels)}"] if labels != name else []),
        "    weight: 1.0",
    ]
    return "\n".join(lines)


def _scalar(text: str) -> str:
    """A text as YAML: as it is where YAML reads it as that text, in double quotes elsewhere."""
    try:
        plain = yaml.safe_load(f"{text}: {text}") == {text: text} and "\n" not in text and "#" not in text
    except (yaml.YAMLError, TypeError):
        plain = False
    return text if plain else json.dumps(text)


def _say(console: Console, config: Config, out: Path) -> None:
    encoder = config.model.encoder.model_dump()
    console.print(
        f"{out}: {len(config.tasks)} task(s) ({', '.join(config.tasks)}), {encoder['name']} of {encoder['layers']} "
        f"layers, width {encoder['hidden']}, cutoff {config.model.cutoff:g} angstrom, {config.train.minutes:g} min\n"
        f"next: multifid train {shlex.quote(str(out))}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
