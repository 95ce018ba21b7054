"""What a branch knows of its task, as model.json has it: elements, references, scale, and what its labels are."""

from collections.abc import Iterator, Mapping
from typing import Any

from multifid.feed.loader import Source, trained_values


def about_tasks(sources: list[Source], scales: Mapping[str, float]) -> dict[str, Any]:
    """Of every task of the sources, by name."""
    tasks = {task: about_task(source, task, scales[task]) for source in sources for task in source.tasks}
    return dict(sorted(tasks.items()))


def read_as(source: Mapping[str, Any]) -> Iterator[str]:
    """As which datasets or formats the files of a store were read, from its manifest's `source`; of parents theirs."""
    for file in source["files"]:
        if "store" in file:
            yield from read_as(file["store"]["source"])
        else:
            own = file if "format" in file else source  # a file that was added says how it was read
            mapping = own["options"].get("mapping") or {}
            yield own["options"].get("dataset") or mapping.get("published") or own["format"]


def about_task(source: Source, task: str, scale: float) -> dict[str, Any]:
    """Of one task.  scale: eV, by which its energies and forces were divided in training."""
    about = source.about(task)
    return {
        "elements": source.elements(task),
        "references": {str(z): e for z, e in source.references[task].energies.items()},
        "undetermined": about["undetermined"],
        "null_space": about.get("null_space"),  # None: the store is of a version that did not keep it
        "charges": trained_values(source.store, "charge"),
        "spins": trained_values(source.store, "spin"),
        "scale": scale,
        "level_of_theory": about["level_of_theory"],
        "structures": source.store.manifest["splits"]["train"],
        "labels": about["labels"],
        "read_as": sorted(set(read_as(source.store.manifest["source"]))),
        **({"property": about["property"]} if "property" in about else {}),
    }
