"""Deviations beside the errors that were found: structures or atoms in bins of equal number, by their deviation."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from multifid.evaluation.calibrate import Points
from multifid.evaluation.figures import blank

BINS = 10


def binned(pairs: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(n, 2) deviations and absolute errors -> (b, 2), the root mean squares of both in each bin, ascending."""
    ordered = pairs[np.argsort(pairs[:, 0], kind="stable")]
    parts = [p for p in np.array_split(ordered, min(bins, max(1, len(ordered) // 5))) if len(p)]
    return np.array([np.sqrt((p**2).mean(axis=0)) for p in parts]).reshape(-1, 2)


def reliability(test: Mapping[str, Points]) -> Figure:
    """Root mean square error against deviation, energies and forces; on the diagonal deviations are right."""
    figure = blank(9.0, 4.2)
    panels = (("energy", "energy, meV/atom"), ("forces", "forces, meV/angstrom"))
    for number, (kind, unit) in enumerate(panels):
        axes = figure.add_subplot(1, 2, number + 1)
        ends = []
        for task, found in test.items():
            pairs = getattr(found, kind)
            if len(pairs) >= BINS:
                x = 1000 * binned(pairs)
                axes.plot(x[:, 0], x[:, 1], "o-", label=task, markersize=4)
                ends += [x.min(), x.max()]
        if ends:
            axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="gray", linewidth=1, linestyle="--")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.legend(frameon=False)
        axes.set_xlabel(f"predicted deviation of {unit}")
        axes.set_ylabel(f"error found (rms), {unit.split(', ')[1]}")
    return figure
