"""The errors of a model on a property: MAE, RMSE and R2 of numbers and vectors, accuracy and ROC-AUC of classes.

Of properties of structures all processes put their values into one table, so that ranks and variances are those of
the whole split; of properties of atoms only sums are added.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from multifid.evaluation.fitted import FittedTable
from multifid.evaluation.matrix import Row
from multifid.model.predictor import Predictor
from multifid.structures.properties import OF_ATOMS, Property, subtracted

Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of a batch: see `Measured.add`


@dataclass
class Measured:
    """What is known of predictions beside labels. kind: of the property; structures: of the whole split."""

    kind: str
    structures: int
    width: int  # numbers of a structure's prediction

    def __post_init__(self) -> None:
        self.table = np.zeros((self.structures, 1 + self.width * 2 + 1) if self.kind not in OF_ATOMS else (0, 0))
        self.sums = np.zeros(6)  # of atoms: count, |e|, e^2, y, y^2, |y - what is subtracted|

    def add(self, places: np.ndarray, predicted: np.ndarray, label: np.ndarray, known: np.ndarray) -> None:
        """Predictions and labels of some structures, at their places in the split, or of their atoms; NaN: no label.

        predicted (n, width), of classes their probabilities; label (n, width), of a class (n, 1) its number; known:
        what composition alone says, like predicted.
        """
        there = np.isfinite(label).all(axis=1) & np.isfinite(predicted).all(axis=1)
        if self.kind in OF_ATOMS:
            error, y = (predicted - label)[there], label[there]
            trivial = np.abs(y - known[there]).sum()
            self.sums += [error.size, np.abs(error).sum(), (error**2).sum(), y.sum(), (y**2).sum(), trivial]
            return
        wide = np.zeros((len(label), self.width))
        wide[:, : label.shape[1]] = label
        rows = np.concatenate([there[:, None].astype(float), predicted, wide, known[:, :1]], axis=1)
        self.table[places[there]] = rows[there]

    def values(self) -> dict[str, float | None]:
        """The metrics, None where they are not defined."""
        if self.kind in OF_ATOMS:
            count, absolute, squared, total, squares, trivial = self.sums.tolist()
            return _numbers(count, absolute, squared, squares - total**2 / max(count, 1.0), trivial)
        rows = self.table[self.table[:, 0] > 0]
        predicted, label = rows[:, 1 : 1 + self.width], rows[:, 1 + self.width : 1 + 2 * self.width]
        if self.kind == "class":
            return classification(predicted, label[:, 0].astype(np.int64))
        error, known = predicted - label, rows[:, -1:] if self.width == 1 else np.zeros((len(rows), 1))
        spread = float(np.square(label - label.mean()).sum()) if len(rows) else 0.0
        return _numbers(
            error.size, float(np.abs(error).sum()), float(np.square(error).sum()), spread,
            float(np.abs(label - known).sum()),
        )  # fmt: skip


def _numbers(count: float, absolute: float, squared: float, spread: float, trivial: float) -> dict[str, float | None]:
    if not count:
        return dict.fromkeys(("property_mae", "property_rmse", "r2", "zero_property_mae"))
    r2 = 1.0 - squared / spread if spread > 0 and count > 1 else None
    return {
        "property_mae": absolute / count,
        "property_rmse": math.sqrt(squared / count),
        "r2": r2,
        "zero_property_mae": trivial / count,
    }


def classification(probabilities: np.ndarray, label: np.ndarray) -> dict[str, float | None]:
    """accuracy, log_loss and roc_auc of probabilities (n, classes), label (n,); zero_accuracy: always the commonest."""
    if not len(label):
        return dict.fromkeys(("accuracy", "log_loss", "roc_auc", "zero_accuracy"))
    own = probabilities[np.arange(len(label)), label]
    return {
        "accuracy": float((probabilities.argmax(axis=1) == label).mean()),
        "log_loss": float(-np.log(np.maximum(own, 1e-300)).mean()),
        "roc_auc": roc_auc(probabilities, label),
        "zero_accuracy": float(np.bincount(label).max() / len(label)),
    }


def roc_auc(probabilities: np.ndarray, label: np.ndarray) -> float | None:
    """Area under the ROC curve; of several classes the mean of each against the rest, of those that occur.

    It is the part of pairs of one structure inside and one outside the class that are in the right order, ties count
    half (Mann and Whitney 1947). None where only one class occurs.
    """
    from scipy.stats import rankdata  # half a second to import

    classes = np.unique(label)
    if len(classes) < 2:
        return None
    asked = [1] if probabilities.shape[1] == 2 else classes.tolist()
    found = []
    for k in asked:
        inside = label == k
        n, m = int(inside.sum()), int((~inside).sum())
        ranks = rankdata(probabilities[:, k])
        found.append((ranks[inside].sum() - n * (n + 1) / 2) / (n * m))
    return float(np.mean(found))


def physical_values(model: Predictor, task: str, value: torch.Tensor) -> np.ndarray:
    """(n, width) of what a branch says of a property, in its unit, still without what is subtracted of it.

    Of a class: probabilities.
    """
    found = value.double()
    if model.property_of(task).kind == "class":  # type: ignore[union-attr]
        found = torch.softmax(found, dim=1)
    return found.reshape(len(found), -1).cpu().numpy()


def refuse_other(asked: Property, held: Property | None, task: str, where: object) -> None:
    """ValueError where a model's property is another than that of data."""
    if held is None or held.kind != asked.kind:
        told = "energies" if held is None else f"a property of kind {held.kind}"
        raise ValueError(
            f"{where} holds a property of kind {asked.kind}, but task {task!r} of the model predicts {told}"
        )
    if asked.kind == "class" and asked.classes[: len(held.classes)] != held.classes[: len(asked.classes)]:
        raise ValueError(
            f"{where} has the classes {', '.join(asked.classes)}, task {task!r} of the model {', '.join(held.classes)}"
        )
    if len(asked.classes) > len(held.classes):
        raise ValueError(
            f"{where} has {len(asked.classes)} classes, the highest {asked.classes[-1]}, of which task {task!r} of the "
            f"model knows {len(held.classes)}"
        )


def known_of(kind: str, table: np.ndarray, numbers: np.ndarray, natoms: np.ndarray, width: int) -> np.ndarray:
    """(n, width): what composition alone says of each structure or atom."""
    found = subtracted(kind, table, numbers, natoms)
    return np.repeat(found[:, None], width, axis=1)


def property_rows(rows: Sequence[Row]) -> list[Row]:
    """Those about properties."""
    return [row for row in rows if row.get("property")]


def property_table(rows: Sequence[Row]) -> FittedTable:
    """One table for the terminal of all rows about properties, in their units."""
    keys = ("property_mae", "property_rmse", "r2", "zero_property_mae", "accuracy", "roc_auc", "zero_accuracy")
    heads = ("MAE", "RMSE", "R2", "MAE without\nmodel", "accuracy", "ROC-AUC", "accuracy\nwithout model")
    shown = [k for k, key in enumerate(keys) if any(row.get(key) is not None for row in rows)]
    cells = [
        [escape(f"{row['model']}, {row['data']}"), row["property"], str(row["counted_structures"])]
        + [_cell(row.get(keys[k])) for k in shown]
        for row in rows
    ]
    split = ", ".join(sorted({str(row["split"]) for row in rows}))
    return FittedTable(
        title="Properties, in the units of their data",
        names=["model, data"],
        numbers=["kind", "structures", *(heads[k] for k in shown)],
        rows=cells,
        notes=[f"Split {split}. Without model: what is known of each composition, or the commonest class."],
    )


def no_better_than_known(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row whose model is no better than what is known without it."""
    for row in property_rows(rows):
        mae, zero = row.get("property_mae"), row.get("zero_property_mae")
        if mae is not None and zero is not None and not mae < zero:
            name, data = row["model"], row["data"]
            yield f"warning: {name} is no better than nothing on {data}: MAE {mae:.4g}, without it {zero:.4g}"


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"
