"""What the objective weighs and the stores do not have: said at the start, refused where nothing is left to learn."""

from collections.abc import Iterator, Sequence

import numpy as np

from multifid.feed.loader import Source
from multifid.structures.cells import spans_volume
from multifid.structures.properties import KINDS as PROPERTIES
from multifid.training.loss import COLUMNS, ObjectiveConfig

LOOKED_AT = 1 << 18  # structures without periodicity in some direction, at most


def missing_labels(objective: ObjectiveConfig, sources: Sequence[Source]) -> list[str]:
    """A sentence for each task and kind of label that has weight and no labels, or labels that cannot be used.

    ValueError where no task has a label of a kind that has weight.
    """
    weighed = [name for name in COLUMNS if getattr(objective, name) > 0]
    tasks = sorted((task, source) for source in sources for task in source.tasks)
    counts = {task: _labels(source, task) for task, source in tasks}
    if not any(counts[task][kind] for task, _ in tasks for kind in weighed):
        has = "; ".join(f"{task}: {_present(counts[task])}" for task, _ in tasks)
        raise ValueError(
            f"there is nothing to learn: objective gives weight to {' and '.join(weighed)}, of which no task has a "
            f"label ({has})"
        )
    return [text for task, source in tasks for text in _of_task(objective, weighed, task, source)]


def _of_task(objective: ObjectiveConfig, weighed: list[str], task: str, source: Source) -> Iterator[str]:
    about = source.about(task).get("property")
    if about is not None:
        if about["kind"] == "class" and (kinds := sum(n > 0 for n in about["counts"])) < 2:
            only = next((name for name, n in zip(about["classes"], about["counts"], strict=True) if n), "none")
            raise ValueError(
                f"task {task}: every labelled structure of the train split of {source.store.path} is of one class "
                f"({only}): there is nothing to tell apart"
                if kinds
                else f"task {task}: no train structure has a class"
            )
        return
    weighed = [name for name in weighed if name != "property"]
    counts, where = _labels(source, task), f"label set {source.tasks[task]} of {source.store.path}"
    for kind in weighed:
        if not counts[kind]:
            yield (
                f"task {task}: objective.{kind} is {getattr(objective, kind):g}, but {where} has no {kind} "
                f"(it has {_present(counts)}), so nothing trains them for this task: prepare it from files with "
                f"{kind}, or set objective.{kind}: 0 if no task has them"
            )
    if "stress" in weighed and counts["stress"] and (flat := _without_volume(source)):
        yield (
            f"task {task}: {where} holds no whole cell of {flat:,} or more structures that are not periodic in three "
            "directions, so that any stress of them is left out: prepare it again, if the files have their cells"
        )


def _labels(source: Source, task: str) -> dict[str, int]:
    """Structures with a label of each kind, in all splits; `property` whatever its kind."""
    counts = source.store.manifest["tasks"][source.tasks[task]]["labels"]
    return {**counts, "property": sum(n for kind, n in counts.items() if kind in PROPERTIES)}


def _present(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} of {counts[kind]:,}" for kind in COLUMNS if counts[kind]) or "no label"


def _without_volume(source: Source) -> int:
    """Structures with stress labels and no volume, as stores of earlier versions have them; of the first ones."""
    store, found = source.store, 0
    if not store.has("pbc"):
        return 0
    open_ones = np.flatnonzero(~store.field("pbc").all(axis=1))[:LOOKED_AT]
    flat = open_ones[~spans_volume(store.rows("cell", open_ones))]
    for name in source.label_sets:
        if store.manifest["tasks"][name]["labels"]["stress"]:
            found += int(np.isfinite(store.rows(f"labels/{name}/stress", flat)).all(axis=(1, 2)).sum())
    return found
