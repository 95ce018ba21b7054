"""Predictions and labels gathered while a model is evaluated, for the parity plot."""

import numpy as np

from multifid.evaluate.figures import Parity
from multifid.model.potential import Prediction
from multifid.structures.batch import Batch


class ParityCollector:
    """Call it with every batch; `parity()` gives all points. At most `limit` structures are kept."""

    def __init__(self, limit: int = 20_000) -> None:
        self.limit = limit
        self.kept = 0
        self.points: list[tuple[np.ndarray, ...]] = []

    def __call__(self, predicted: Prediction, batch: Batch, task: str) -> None:
        """predicted: eV, eV/angstrom; the batch's targets are aligned, and so is what is plotted."""
        if self.kept >= self.limit:
            return
        targets, natoms = batch.targets[task], batch.natoms
        self.kept += len(natoms)
        label = targets.forces if targets.forces is not None else predicted.forces * float("nan")
        self.points.append(
            tuple(
                x.detach().double().numpy().ravel()
                for x in (predicted.energy / natoms, targets.energy / natoms, predicted.forces, label)
            )
        )

    def parity(self) -> Parity:
        """Energies per atom (eV/atom, aligned) and force components (eV/angstrom)."""
        columns = [np.concatenate(c) for c in zip(*self.points, strict=True)] if self.points else [np.zeros(0)] * 4
        return Parity(*columns)
