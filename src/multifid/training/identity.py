"""The data that a run is of: what it began with, wherever that lies now; other data at the same place are refused.

A checkpoint keeps, for every task, the hashes of its data (`data.content`), the order in which they are drawn, and what
the manifest said of them. When the run goes on, each store must hold the same data: paths are not compared. What was
fitted (references, scale) is the run's own from its beginning: another processor, or the next version, may round it
otherwise, and the run would not end with the same bits.
"""

import math
import socket
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from multifid.feed.loader import Source, TaskConfig
from multifid.feed.order import Draw
from multifid.model.saved import load_description
from multifid.store.content import SPLIT, STRUCTURES
from multifid.store.fields import LABELS, PROPERTIES
from multifid.store.references import References
from multifid.structures.elements import SYMBOLS
from multifid.structures.structure import SPLITS

Kept = dict[str, dict[str, Any]]  # task -> what a checkpoint keeps of its data

SAME_REFERENCE = 1e-5  # eV: reference energies that differ by less are the same fit, rounded elsewhere
SAME_SCALE = 1e-6  # part of the scale
WORDS = {"numbers": "elements", "natoms": "numbers of atoms", "cell": "cells", "pbc": "periodicity"}
WORDS |= {"charge": "charges", "spin": "multiplicities", "energy": "energies"}


def kept_of(tasks: Mapping[str, TaskConfig], sources: Iterable[Source], draws: Iterable[Draw]) -> Kept:
    """What a checkpoint keeps of the data. sources and draws belong together one by one."""
    kept = {}
    for source, draw in zip(sources, draws, strict=True):
        for task in source.tasks:
            drawn = {"drawn_with": draw.name, "order": [draw.order.task, draw.order.content]}
            kept[task] = {"store": tasks[task].store, **drawn, **_data(source, task)}
    return kept


def own_data(
    run: Path, tasks: Mapping[str, TaskConfig], sources: list[Source], state: Mapping[str, Any]
) -> tuple[list[Source], Kept, list[str]]:
    """The sources of a run that goes on from a checkpoint, with its own references; what it keeps; what to say.

    ValueError, which says what differs, where a store holds other data than the run began with.
    """
    said: list[str] = []
    trouble, kept = [], state.get("data")
    if kept is not None:
        sources = [_as_begun(source, kept, said) for source in sources]
    if kept is None:
        kept = _of_a_run_without(run, tasks, sources, state)
        places = ", ".join(f"{about['store']} for task {task!r}" for task, about in kept.items())
        said.append(
            f"{run} was begun by a version that kept no hashes of its data: what the stores hold now is taken for what "
            f"it began with ({places})"
        )
    for source in sources:
        for task in source.tasks:
            if task not in kept:  # it joins the run here
                continue
            now, then = _data(source, task), kept[task]
            if found := _differences(then, now):
                trouble.append(f"task {task!r}, {tasks[task].store}: " + "; ".join(found))
            if (level := now["about"]["level_of_theory"]) != (own := then["about"]["level_of_theory"]):
                said.append(f"task {task!r}: the level of theory is {level!r} now; the run keeps {own!r}")
    if trouble:
        raise ValueError(
            f"{run} was begun with other data than its stores hold now:\n  " + "\n  ".join(trouble) + "\n"
            "A run goes on with the data that it began with: put them back, or say where they are "
            "(tasks.NAME.store=DIRECTORY). To train on what is there now, begin another run (run=DIRECTORY, and "
            f"init={run} to start from these weights), or let it join this one under another name "
            "(train.change_tasks=true)."
        )
    return [part for source in sources for part in _as_kept(source, kept)], kept, said


def _as_begun(source: Source, kept: Kept, said: list[str]) -> Source:
    """The source with its store as it was when the run began, if files were added to it since then."""
    held = {task: kept[task]["content"] for task in source.tasks if task in kept}
    now = source.store
    then = now.as_it_was(lambda store: all(store.content.of(source.tasks[t]) == own for t, own in held.items()))
    if then is None or then is now:  # what differs is said of the store as it is
        return source
    added = f"{now.structures - then.structures:,} structures were added to {now.path} since the run began"
    said.append(f"{added}: it goes on with the {then.structures:,} that it began with")
    return replace(source, store=then)


def refuse_apart(contents: Mapping[str, Mapping[str, str]], of_first_rank: Mapping[str, Mapping[str, str]]) -> None:
    """ValueError where this rank's stores (task -> hashes) hold other data than those of the first rank.

    Stores may lie on disks of the hosts; ranks that cut the same step from different data would train on neither.
    """
    if apart := sorted(task for task, content in contents.items() if content != of_first_rank[task]):
        fields = [name for name, digest in contents[apart[0]].items() if digest != of_first_rank[apart[0]].get(name)]
        raise ValueError(
            f"this rank ({socket.gethostname()}) and the first one see other data at the stores of {', '.join(apart)} "
            f"({', '.join(fields) or 'fields are missing'}): put the same store on every host"
        )


def contents_of(sources: Iterable[Source]) -> dict[str, dict[str, str]]:
    """task -> hashes of its data."""
    return {task: s.store.content.of(label_set) for s in sources for task, label_set in s.tasks.items()}


def in_kept_order(draws: list[Draw], kept: Kept) -> list[Draw]:
    """The draws with the orders that their tasks began with; those of new tasks alone as they are."""
    out = []
    for draw in draws:
        held = next((kept[task] for task in draw.tasks if task in kept), None)
        if held is not None:
            name, content = held["order"]
            draw = replace(draw, order=replace(draw.order, task=name, content=content))
        out.append(draw)
    return out


def _data(source: Source, task: str) -> dict[str, Any]:
    """What a task's data are, in the words of its store's manifest and by hash."""
    manifest = source.store.manifest
    counts = {key: manifest[key] for key in ("structures", "atoms", "elements")} | {"splits": dict(manifest["splits"])}
    return {"content": source.store.content.of(source.tasks[task]), **counts, "about": source.about(task)}


def _of_a_run_without(
    run: Path, tasks: Mapping[str, TaskConfig], sources: list[Source], state: Mapping[str, Any]
) -> Kept:
    """What a run that kept no hashes is taken to have kept: its order, keyed by checksums then, and its references.

    The latter, and how many structures it trains on, are told by its model, if it has written one.
    """
    model = load_description(run)["tasks"] if (run / "model.json").exists() else {}
    kept = {}
    for source in sources:
        held = [task for task in source.tasks if task in state["draws"]]
        for task in held:
            name = task if len(held) == 1 else source.store.tasks[0]
            drawn = {"drawn_with": held[0], "order": [name, source.store.checksum]}
            data, own = _data(source, task), model.get(task, {})
            data["about"] |= {
                key: own[key] for key in ("references", "undetermined", "null_space", "labels") if key in own
            }
            data["splits"] |= {"train": own["structures"]} if own else {}
            kept[task] = {"store": tasks[task].store, **drawn, **data}
    return kept


def _as_kept(source: Source, kept: Kept) -> list[Source]:
    """A source with what the run keeps of its tasks; in parts where they were drawn apart, from what is one store now.

    New tasks are drawn with those that are there.
    """
    known = {task: kept[task] for task in source.tasks if task in kept}
    first = next((about["drawn_with"] for about in known.values()), "")
    groups: dict[str, list[str]] = {}
    for task in source.tasks:
        groups.setdefault(known[task]["drawn_with"] if task in known else first, []).append(task)
    own = {task: about["about"] for task, about in known.items()}
    references = source.references | {task: References.from_manifest(about) for task, about in own.items()}
    return [
        Source(
            source.store,
            {task: source.tasks[task] for task in tasks},
            {task: references[task] for task in tasks},
            {task: own[task] for task in tasks if task in own},
        )
        for tasks in groups.values()
    ]


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the data of a run and those of a store, in words."""
    out = []
    if fields := _other(then, now, STRUCTURES):
        here, there = (f"{d['structures']:,} of {d['atoms']:,} atoms" for d in (then, now))
        counts = f"{here} in the run, {there} now"
        if here == there and then["elements"] == now["elements"]:
            counts = f"{here}, as in the run: others, or in another order"
        out.append(f"structures differ in {fields} ({counts})")
    mine, theirs = ({int(z) for z in d["elements"]} for d in (then, now))
    if mine != theirs:
        out.append(f"elements differ ({_symbols(mine)} in the run, {_symbols(theirs)} now)")
    if kinds := _other(then, now, (*LABELS, *PROPERTIES)):
        out.append(f"labels differ: {kinds} ({_counts(then)} in the run, {_counts(now)} now)")
    sizes = [[d["splits"][name] for name in SPLITS[:3]] for d in (then, now)]
    if _other(then, now, [SPLIT]) or sizes[0] != sizes[1]:
        out.append(f"the split differs ({_split(then)} in the run, {_split(now)} now)")
    return out + _other_fit(then["about"], now["about"])


def _other(then: dict[str, Any], now: dict[str, Any], fields: Iterable[str]) -> str:
    """The fields with other hashes, in words."""
    names = [name for name in fields if then["content"].get(name) != now["content"].get(name)]
    return ", ".join(WORDS.get(name, name) for name in names)


def _other_fit(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How references and scale differ, by more than another processor or version would round."""
    out = []
    mine, theirs = (References.from_manifest({"rank": 0, "residual": 0.0, **about}) for about in (then, now))
    apart = {z: abs(mine.energies[z] - theirs.energies[z]) for z in mine.energies.keys() & theirs.energies.keys()}
    if apart and apart[z := max(apart, key=lambda k: apart[k])] > SAME_REFERENCE:
        values = f"{mine.energies[z]:.10g} eV in the run, {theirs.energies[z]:.10g} eV now"
        out.append(f"reference energies differ (most that of {SYMBOLS[z]}: {values})")
    elif mine.energies.keys() != theirs.energies.keys() or mine.undetermined != theirs.undetermined:
        out.append("reference energies are of other elements, or others are undetermined")
    if not math.isclose(then["scale"], now["scale"], rel_tol=SAME_SCALE):
        out.append(f"the scale differs ({then['scale']:.6g} in the run, {now['scale']:.6g} now)")
    return out


def _symbols(numbers: set[int]) -> str:
    return " ".join(SYMBOLS[z] for z in sorted(numbers))


def _counts(data: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in data["about"]["labels"].items() if count) or "none"


def _split(data: dict[str, Any]) -> str:
    splits = data["splits"]
    seed = f", seed {splits['seed']}" if "seed" in splits else ""
    return " ".join(f"{name} {splits[name]:,}" for name in SPLITS[:3]) + seed
