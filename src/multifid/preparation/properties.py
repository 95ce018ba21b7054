"""The second pass of `prepare` for properties: what is subtracted of them, their scale, how frequent classes are.

All from the train split (see `fitted`). Subtracted are the mean of an intensive number, the least-squares part of each
element in an extensive one, the mean of each element of a number of atoms: `references`, by element, of any kind. The
scale is the RMS of what remains (of an extensive number: per atom; of vectors: by component); of classes it is 1.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from multifid.preparation.split import fitted
from multifid.preparation.survey import STRETCH, MeanSquare, Stretch, folded, pieces
from multifid.store.passes import Each, Fields, one_by_one
from multifid.store.references import Folded, Pass, References, fit_by
from multifid.structures.elements import MAX_Z
from multifid.structures.properties import OF_ATOMS, Property, aligned


def survey_property(
    task: str, asked: Property, fields: Fields, split: np.ndarray, elements: list[int], each: Each = one_by_one
) -> dict[str, Any]:
    """What the manifest says of a property: property, references, undetermined, rank, residual, scale, complete.

    elements: the atomic numbers that occur in the store.
    """
    name = f"labels/{task}/{asked.kind}"
    about = asked.to_manifest()
    if asked.kind == "class":
        counts = _classes(name, asked, fields, split)
        about |= {"classes": list(asked.classes) or [str(k) for k in range(len(counts))], "counts": counts}
        references, scale = References({}, [], 0, 0.0), 1.0
    else:
        references = _references(task, asked.kind, fields, split, elements, each)
        scale = _scale(name, asked.kind, references, fields, split)
    whole = all(np.isfinite(values).all() for _, _, values in _labels(name, asked.kind, fields, split))
    return {
        "property": about,
        **references.to_manifest(),
        "scale": scale,
        "complete": [asked.kind] if whole else [],
    }


def _labels(
    name: str, kind: str, fields: Fields, split: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers and natoms of train structures, and their labels, piece by piece."""
    _, chosen = fitted(split)
    for structures, atoms, numbers, natoms in pieces(fields):
        train = chosen[structures]
        of_atoms = np.repeat(train, natoms)
        values = fields[name][atoms][of_atoms] if kind in OF_ATOMS else fields[name][structures][train]
        yield numbers[of_atoms], natoms[train], np.asarray(values, np.float64)


def _references(task: str, kind: str, fields: Fields, split: np.ndarray, elements: list[int], each: Each) -> References:
    if kind == "extensive":
        _, chosen = fitted(split)
        used = {name: fields[name] for name in ("natoms", "offsets", "numbers", f"labels/{task}/{kind}")}
        starts = range(0, len(split), STRETCH)
        parts = [Stretch(used, start, chosen[start : start + STRETCH], task, kind) for start in starts]

        def fold(once: Pass) -> list[Folded]:
            return list(each(folded, [(part, elements, once) for part in parts]))

        return fit_by(fold, elements, {})
    sums, counts = np.zeros(MAX_Z + 1), np.zeros(MAX_Z + 1)
    total, number = 0.0, 0
    for numbers, _, values in _labels(f"labels/{task}/{kind}", kind, fields, split):
        known = np.isfinite(values)
        if kind == "atom":
            np.add.at(sums, numbers[known], values[known])
            np.add.at(counts, numbers[known], 1.0)
        elif kind == "intensive":
            total, number = total + float(values[known].sum()), number + int(known.sum())
    if kind == "atom":
        means = {z: float(sums[z] / counts[z]) if counts[z] else 0.0 for z in elements}
        return References(means, [], len(means), 0.0)
    if kind == "intensive":
        return References(dict.fromkeys(elements, total / max(number, 1)), [], 1, 0.0)
    return References({}, [], 0, 0.0)


def _scale(name: str, kind: str, references: References, fields: Fields, split: np.ndarray) -> float:
    """RMS of what remains; 1 where nothing does."""
    found = MeanSquare()
    for numbers, natoms, values in _labels(name, kind, fields, split):
        rest = aligned(kind, values, references.table, numbers, natoms)
        found.add(rest / natoms if kind == "extensive" else rest)
    return found.rms() or 1.0


def _classes(name: str, asked: Property, fields: Fields, split: np.ndarray) -> list[int]:
    """How many train structures are of each class: of all classes that the store has, or that are named."""
    highest = len(asked.classes) - 1
    for structures, _, _, _ in pieces(fields):
        values = fields[name][structures]
        highest = max([highest, *values[np.isfinite(values)].astype(np.int64).tolist()])
    counts = np.zeros(highest + 1, np.int64)
    for _, _, values in _labels(name, "class", fields, split):
        counts += np.bincount(values[np.isfinite(values)].astype(np.int64), minlength=highest + 1)
    return counts.tolist()
