"""Errors structure by structure and atom by atom, on a sample of a test split."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from multifid.evaluation.data import Data
from multifid.evaluation.evaluate import evaluate
from multifid.feed.loader import Source
from multifid.graphs.batch import Batch
from multifid.model.potential import Prediction
from multifid.model.predictor import Predictor
from multifid.store.store import Store


@dataclass
class OneStructure:
    """A structure with its labels and what was predicted of it. Energies are aligned (references subtracted)."""

    numbers: np.ndarray  # (N,)
    positions: np.ndarray  # (N, 3) angstrom
    cell: np.ndarray  # (3, 3) angstrom; zero without one
    energy: tuple[float, float]  # label and prediction, eV/atom
    forces: tuple[np.ndarray, np.ndarray]  # label and prediction, (N, 3) eV/angstrom; NaN where there is no label

    @property
    def energy_error(self) -> float:
        """eV/atom, absolute; NaN without a label."""
        return abs(self.energy[1] - self.energy[0])

    @property
    def forces_error(self) -> float:
        """eV/angstrom, mean absolute of the components; NaN without labels."""
        return float(np.abs(self.forces[1] - self.forces[0]).mean())


@dataclass
class TaskErrors:
    """The sample of one task. Called with every batch by `evaluate`."""

    structures: list[OneStructure] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    of: int = 0  # structures of the whole split

    def __call__(self, predicted: Prediction, batch: Batch, task: str) -> None:
        targets, end = batch.targets[task], 0
        for k, n in enumerate(batch.natoms.tolist()):
            start, end = end, end + n
            nothing = np.full((n, 3), np.nan)
            self.structures.append(
                OneStructure(
                    batch.numbers[start:end].numpy(),
                    batch.positions[start:end].double().numpy(),
                    batch.cell[k].double().numpy(),
                    (float(targets.energy[k]) / n, float(predicted.energy[k]) / n),
                    (
                        nothing if targets.forces is None else targets.forces[start:end].double().numpy(),
                        predicted.forces[start:end].double().numpy(),
                    ),
                )
            )

    @property
    def unseen(self) -> int:
        """Structures with an element that training never saw."""
        return int(self.row.get("unseen_structures") or 0)

    @property
    def nonfinite(self) -> int:
        """Structures whose prediction is not finite."""
        return int(self.row.get("nonfinite_structures") or 0)


class Thinned(Store):
    """A store whose test split is an evenly spread sample of its own."""

    def __init__(self, store: Store, most: int) -> None:
        super().__init__(store.path, store.verify, store.additions)
        whole = store.index("test")
        self._test = whole[np.unique(np.linspace(0, len(whole) - 1, most).astype(np.int64))] if len(whole) else whole

    def index(self, split: str) -> np.ndarray:
        return self._test if split == "test" else super().index(split)

    def size(self, split: str) -> int:
        return len(self._test) if split == "test" else super().size(split)

    def pick(self, split: str, places: np.ndarray | slice) -> np.ndarray:
        return np.asarray(self._test[places], np.int64) if split == "test" else super().pick(split, places)


def errors_of(model: Predictor, name: str, task: str, source: Source, most: int) -> TaskErrors | None:
    """The errors of one task's branch on at most so many structures of its test split; None where it is empty."""
    whole = source.store.size("test")
    if not whole:
        return None
    found = TaskErrors(of=whole)
    data = Data(task, Thinned(source.store, most), source.tasks[task])
    found.row = evaluate(model, name, data, collect=found)
    return found
