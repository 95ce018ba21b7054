"""`multifid export --replay N`: small stores beside a model file, from which its tasks can be trained on again.

    NAME.replay/TASK/    N training structures of a task, chosen by farthest-point sampling in feature space, and a
                         quarter as many validation and test structures, spread evenly

Tasks that label the same structures share a store. Reference energies and scale are those of the whole data, and the
manifest holds the fingerprint of the model for every task.
"""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from multifid.config import load_config
from multifid.evaluation.spread import candidates, farthest, pooled_features
from multifid.feed.loader import Source, open_sources
from multifid.model.model_file import fingerprint
from multifid.model.predictor import Predictor
from multifid.preparation.selected import write_selected
from multifid.readers.stores import block_of, lineage
from multifid.store.store import Store
from multifid.structures.structure import SPLITS

KEY = "replay"  # of the manifest: fingerprints of the model, by task
OF_A_SPLIT = 4  # a validation and a test structure for so many training structures


def replay_folder(model: Path) -> Path:
    """Where the replay stores of a model file lie."""
    return model.with_suffix(".replay")


def export_replay(model: Predictor, run: Path, out: Path, count: int, console: Console) -> list[Path]:
    """Write the stores of a model's tasks from those that RUN was trained on; returns their directories.

    ValueError where a store cannot be read, FileExistsError where `out` exists.
    """
    written = []
    for source in trained_sources(model, run):
        index, split = chosen(model, source, count)
        tasks = sorted(source.tasks)
        place = out / "+".join(tasks)[:100]
        marks = {task: fingerprint(model.potential, model.description, task) for task in tasks}
        parts = [index[a : a + 1000] for a in range(0, len(index), 1000)]
        write_selected(
            place,
            (block_of(source.store, part) for part in parts),
            split,
            {source.tasks[t]: source.store.manifest["tasks"][source.tasks[t]] for t in tasks}
            | {t: about for t, about in source.store.manifest["tasks"].items() if t not in source.tasks.values()},
            {"name": source.store.path.name, "store": lineage(source.store.path)},
            {KEY: {task: {"model": marks[task], "labels": source.tasks[task]} for task in tasks}},
        )
        sizes = ", ".join(f"{int((split == k).sum())} {SPLITS[k]}" for k in range(3))
        console.print(f"{place}: {sizes} structures of {', '.join(tasks)}", soft_wrap=True, highlight=False)
        written.append(place)
    return written


def trained_sources(model: Predictor, run: Path) -> list[Source]:
    """The stores that a run's tasks were trained on, without tasks of properties. ValueError where there are none."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"--replay needs the stores that a run was trained on, and {run} holds no config.yaml")
    held = load_config(run / "config.yaml").tasks
    own = {t for t, about in model.description["tasks"].items() if "property" not in about}
    wanted = {t: about for t, about in held.items() if t in own}
    if not wanted:
        raise ValueError(f"--replay: none of the tasks of this model ({', '.join(model.tasks)}) has a store in {run}")
    return open_sources(wanted)


def chosen(model: Predictor, source: Source, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Structures of a store, ascending within each split, and the code of the split of each."""
    store, task = source.store, min(source.tasks)
    pool = candidates(store, "train")
    train = np.sort(pool[farthest(pooled_features(model, store, pool, task), count)])
    known = np.unique(store.read(train, []).numbers)
    found = [train, *(_some(store, split, max(1, count // OF_A_SPLIT), known) for split in SPLITS[1:3])]
    if not len(found[1]):
        raise ValueError(
            f"--replay {count}: no validation structure of {store.path} has only elements of the chosen ones: take more"
        )
    index = np.concatenate(found)
    return index, np.repeat(np.arange(3, dtype=np.uint8), [len(part) for part in found])


def _some(store: Store, split: str, count: int, known: np.ndarray) -> np.ndarray:
    """At most so many structures of a split with known elements only, spread evenly."""
    found = candidates(store, split, 4 * count)
    if not len(found):
        return found
    packed = store.read(found, [])
    found = found[np.logical_and.reduceat(np.isin(packed.numbers, known), packed.offsets[:-1])]
    return found[np.unique(np.linspace(0, len(found) - 1, count).astype(int))] if len(found) > count else found


def marks_of(manifest: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Of a replay store: task -> fingerprint of its model, and its label set."""
    found: dict[str, dict[str, str]] = manifest.get(KEY, {})
    return found
