"""Old tasks that are trained on beside the new ones: from their stores, replay stores, or labels of the old model."""

from pathlib import Path
from typing import Any

from multifid.config import load_config
from multifid.feed.loader import open_sources
from multifid.model.model_file import fingerprint
from multifid.model.predictor import Predictor
from multifid.store.fields import MANIFEST
from multifid.store.store import Store
from multifid.workflows.finetune.distil import PSEUDOLABELS
from multifid.workflows.replay_store import marks_of, replay_folder

AUTO = "auto"
Replayed = dict[str, dict[str, Any]]  # task -> store, label set


def replayed(model: Predictor, path: Path, texts: list[str]) -> Replayed:
    """What `--replay` names. ValueError where the model has no such task, or a store was made for another model.

    texts: TASK=STORE; a directory of stores that `multifid export --replay` wrote, or one of them; `auto`: those beside
    the model file, or the stores that the run was trained on.
    """
    found: Replayed = {}
    for text in texts:
        task, equals, where = text.partition("=")
        if text == AUTO:
            found |= _beside(model, path)
        elif equals:
            found |= _named(model, text, task, Path(where))
        else:
            found |= _replay_stores(model, Path(text), text)
    return found


def _named(model: Predictor, text: str, task: str, where: Path) -> Replayed:
    if not (where / MANIFEST).exists():
        raise ValueError(f"--replay {text}: must be TASK=STORE, with the directory of a prepared store")
    if task not in model.tasks:
        raise ValueError(f"--replay {text}: the model has the tasks {', '.join(model.tasks)}")
    store = Store(where)
    names = list(store.tasks)
    if task not in names and len(names) > 1:
        raise ValueError(f"--replay {text}: {where} has the label sets {', '.join(names)}, none of this name")
    if (mark := store.manifest.get(PSEUDOLABELS, {}).get(task)) is not None:
        refuse_other_model(model, task, mark["model"], where)
    return {task: {"store": str(where), "labels": task if task in names else names[0]}}


def _replay_stores(model: Predictor, where: Path, text: str) -> Replayed:
    stores = [where] if (where / MANIFEST).exists() else sorted(p.parent for p in where.glob(f"*/{MANIFEST}"))
    found: Replayed = {}
    for store in stores:
        for task, mark in marks_of(Store(store).manifest).items():
            if task in model.tasks:
                refuse_other_model(model, task, mark["model"], store)
                found[task] = {"store": str(store), "labels": mark["labels"]}
    if not found:
        raise ValueError(
            f"--replay {text}: must be TASK=STORE, a directory that `multifid export --replay N` wrote for this model, "
            f"or {AUTO}"
        )
    return found


def _beside(model: Predictor, path: Path) -> Replayed:
    if path.is_file():
        folder = replay_folder(path)
        if not folder.is_dir():
            raise ValueError(
                f"--replay {AUTO}: there is no {folder}; `multifid export RUN --out {path.name} --replay N` writes it, "
                "and --replay TASK=STORE takes any store"
            )
        return _replay_stores(model, folder, AUTO)
    held = load_config(path).tasks if (path / "config.yaml").is_file() else {}
    own = {t for t, about in model.description["tasks"].items() if "property" not in about}
    sources = open_sources({t: about for t, about in held.items() if t in own})
    found = {
        task: {"store": str(source.store.path), "labels": labels}
        for source in sources
        for task, labels in source.tasks.items()
        if PSEUDOLABELS not in source.store.manifest
    }
    if not found:
        raise ValueError(f"--replay {AUTO}: {path} names no store of a task of its model")
    return found


def refuse_other_model(model: Predictor, task: str, mark: str, where: Path) -> None:
    """ValueError where a store was made for another model of this task than this one."""
    if mark != fingerprint(model.potential, model.description, task):
        raise ValueError(
            f"{where} was made for another model: its fingerprint of task {task!r} is {mark}, not that of this model; "
            "export it again with this model"
        )
