"""Predictions and labels gathered while a model is evaluated, for the parity plot."""

import numpy as np
import torch

from multifid.evaluation.data import Share
from multifid.evaluation.figures import Parity
from multifid.graphs.batch import Batch
from multifid.model.potential import Prediction


class ParityCollector:
    """Call it with every batch; `parity()` gives the points of all processes. About `limit` structures are kept."""

    def __init__(self, share: Share, limit: int = 20_000) -> None:
        self.share, self.limit = share, limit // share.size
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
        """Energies per atom (eV/atom, aligned) and force components (eV/angstrom). Called by all processes."""
        columns = [np.concatenate(c) for c in zip(*self.points, strict=True)] if self.points else [np.zeros(0)] * 4
        return Parity(*(self._gathered(c) for c in columns))

    def _gathered(self, column: np.ndarray) -> np.ndarray:
        """The points of all processes, one after the other: each puts its own between zeros, and these are added."""
        sizes = torch.zeros(self.share.size, dtype=torch.float64)
        sizes[self.share.rank] = len(column)
        ends = self.share.sum_(sizes).cumsum(0).long().tolist()
        points = torch.zeros(ends[-1], dtype=torch.float64)
        points[ends[self.share.rank] - len(column) : ends[self.share.rank]] = torch.from_numpy(column)
        return self.share.sum_(points).numpy()
