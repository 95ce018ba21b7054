"""`--distil`: old branches kept by what the start model predicts of structures, where their data are not at hand.

The predictions are energies and forces of every old task that knows the elements, and become a store in the cache. Its
manifest holds the fingerprint of the model that made them. Known as learning without forgetting (Li and Hoiem 2016,
arXiv 1606.09282).
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console

from multifid.feed.loader import cut
from multifid.model.model_file import fingerprint
from multifid.model.pieces import EDGES, batch_of, between
from multifid.model.predictor import Predictor
from multifid.model.undetermined import UndeterminedEnergy
from multifid.preparation.selected import write_selected
from multifid.store.block import Block, relative_hash
from multifid.store.fields import MANIFEST
from multifid.store.store import Store
from multifid.structures.atoms import pack_atoms
from multifid.structures.structure import SPLITS, Packed
from multifid.workflows.finetune.asked import Target

NEW = "new"
PSEUDOLABELS = "pseudolabels"  # of the manifest: fingerprints of the model that made the labels, by task
AT_ONCE = 1000
VALIDATED = 10  # of a file, one structure of so many is for validation


def distilled(
    model: Predictor, on: str, asked: list[Target], but: set[str], cache: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Old tasks with labels of the model itself: task -> store and label set. ValueError where there are none.

    on: `new` (the structures of the new data), a store, or a file that ASE reads, with or without labels; or a store
    that this made before, which must be of this model.  but: tasks that are replayed.
    """
    where = Path(on)
    if on != NEW and (where / MANIFEST).exists() and PSEUDOLABELS in Store(where).manifest:
        return _made_before(model, where, but)
    pieces = _structures(on, asked)
    _refuse_empty_splits(on, np.concatenate([split for _, split in pieces]))
    elements = set(np.unique(np.concatenate([packed.numbers for packed, _ in pieces])).tolist())
    tasks, left = [], {}
    for task in model.tasks:
        about = model.description["tasks"][task]
        if task in but or "property" in about:
            continue
        if strange := elements - {int(z) for z in about["references"]}:
            left[task] = strange
        else:
            tasks.append(task)
    if left:
        console.print(f"not distilled, as they do not know all elements: {', '.join(left)}", soft_wrap=True)
    if not tasks:
        raise ValueError(f"--distil {on}: no branch of the model is left that knows all elements of these structures")
    marks = {task: fingerprint(model.potential, model.description, task) for task in tasks}
    key = xxhash.xxh3_128()
    for packed, split in pieces:
        for x in (packed.numbers, packed.positions, packed.natoms, packed.cell, packed.charge, packed.spin, split):
            key.update(np.ascontiguousarray(x).tobytes())
    key.update(repr(sorted(marks.items())).encode())
    place = cache / f"pseudolabels-{key.hexdigest()}"
    if not place.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _write(model, place, pieces, tasks, marks)
    console.print(
        f"distilled on {sum(len(split) for _, split in pieces)} structures: {', '.join(tasks)}; labels in {place}",
        soft_wrap=True,
        highlight=False,
    )
    return {task: {"store": str(place), "labels": task} for task in tasks}


def _made_before(model: Predictor, where: Path, but: set[str]) -> dict[str, dict[str, Any]]:
    from multifid.workflows.finetune.replay import refuse_other_model

    held = Store(where).manifest[PSEUDOLABELS]
    marks = {t: m for t, m in held.items() if t in model.tasks and t not in but}
    if not marks:
        raise ValueError(
            f"--distil {where}: it has labels of the tasks {', '.join(held)}, and of the model's "
            f"({', '.join(model.tasks)}) none of these is left to distil"
        )
    for task, mark in marks.items():
        refuse_other_model(model, task, mark["model"], where)
    return {task: {"store": str(where), "labels": task} for task in marks}


def _structures(on: str, asked: list[Target]) -> list[tuple[Packed, np.ndarray]]:
    """Structures in pieces, and the split of each."""
    if on == NEW:
        stores = list({str(t.store.path): t.store for t in asked}.values())
    elif (Path(on) / MANIFEST).exists():
        stores = [Store(on)]
    else:
        return _of_file(Path(on))
    found = []
    for store in stores:
        for start in range(0, store.structures, AT_ONCE):
            index = np.arange(start, min(start + AT_ONCE, store.structures))
            found.append((store.read(index, []), store.rows("split", index)))
    return found


def _refuse_empty_splits(on: str, split: np.ndarray) -> None:
    for name in SPLITS[:2]:
        if not (split == SPLITS.index(name)).any():
            raise ValueError(
                f"--distil {on}: no structure is of the split {name}; there must be some of train and of validation "
                "(`multifid prepare` divides files: --fractions)"
            )


def _of_file(path: Path) -> list[tuple[Packed, np.ndarray]]:
    import ase.io

    if not path.exists():
        raise ValueError(f"--distil {path}: must be {NEW}, a store, or a file with structures that ASE reads")
    try:
        structures = list(ase.io.iread(path, index=":"))
    except Exception as error:  # ASE's readers raise whatever their formats make them raise
        raise ValueError(f"--distil {path}: ASE cannot read it ({type(error).__name__}: {error})") from error
    if len(structures) < 2:
        raise ValueError(
            f"--distil {path}: {len(structures)} structure; there must be one to train and one to validate"
        )
    packed = pack_atoms(structures)
    split = np.zeros(len(structures), np.uint8)
    split[VALIDATED - 1 :: VALIDATED] = SPLITS.index("validation")
    split[-1] = SPLITS.index("validation")
    return [(replace(packed, positions=packed.positions.astype(np.float32)), split)]


def _write(
    model: Predictor,
    place: Path,
    pieces: list[tuple[Packed, np.ndarray]],
    tasks: list[str],
    marks: dict[str, str],
) -> None:
    of_the_model = ("references", "scale", "undetermined", "null_space", "level_of_theory")
    about = {
        task: {
            **{k: v for k, v in model.description["tasks"][task].items() if k in of_the_model and v is not None},
            "energy_kind": "total",
            "labels": {"energy": 0, "forces": 0, "stress": 0},
            "rank": len(model.description["tasks"][task]["references"]),
            "residual": 0.0,
            "complete": ["energy", "forces"],
        }
        for task in tasks
    }
    write_selected(
        place,
        _blocks(model, pieces, tasks),
        np.concatenate([split for _, split in pieces]),
        about,
        {"name": "pseudolabels"},
        {PSEUDOLABELS: {task: {"model": marks[task]} for task in tasks}},
    )


def _blocks(model: Predictor, pieces: list[tuple[Packed, np.ndarray]], tasks: list[str]) -> Iterator[Block]:
    number = 0
    for packed, split in pieces:
        names = [f"structure {number + k}" for k in range(len(split))]
        number += len(split)
        columns = {
            "natoms": packed.natoms,
            "numbers": packed.numbers,
            "positions": packed.positions,
            "relative": np.array([relative_hash(name) for name in names], np.uint64),
            "split": split,
            "cell": packed.cell,
            "pbc": packed.pbc,
            "charge": packed.charge,
            "spin": packed.spin,
        }
        for task in tasks:
            energy, forces = predicted(model, packed, task)
            columns |= {f"labels/{task}/energy": energy, f"labels/{task}/forces": forces}
        yield Block(columns, names)


def predicted(model: Predictor, packed: Packed, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Total energies (S,) eV and forces (N, 3) eV/angstrom of a task."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndeterminedEnergy)
        packed = model.ready(packed, task)
    energies, forces = [], []
    for piece in cut(packed.natoms.astype(float) * 50.0, EDGES):
        part = between(packed, piece.start, piece.stop)
        for answer in model.answer(part, batch_of(part, model.cutoff, task), task, stress=False):
            energies.append(answer[0])
            forces.append(answer[1])
    return np.array(energies), np.concatenate(forces)
