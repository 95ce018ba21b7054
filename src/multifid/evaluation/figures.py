"""Figures of a study: the matrix of errors, parity plots, convergence curves.

Every function returns a matplotlib `Figure` of its own (no pyplot, so no global state, no windows and no leak in a long
run); `save` writes it. The periodic table is in `periodic_table.py`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from multifid.evaluation.matrix import UNITS, Matrix, Row, matrix, quantities


@dataclass(slots=True)
class Parity:
    """Predictions and labels of one dataset, any subset of its structures. NaN labels are left out of the plot."""

    energy_predicted: np.ndarray  # (S,) eV/atom
    energy_label: np.ndarray  # (S,) eV/atom, in the same (total or aligned) space
    forces_predicted: np.ndarray  # (any,) eV/angstrom, by component
    forces_label: np.ndarray  # (any,) eV/angstrom


def save(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write the figure, in the format of the suffix, by temporary file and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{path.name}")
    figure.savefig(temporary, dpi=dpi)
    os.replace(temporary, path)


def error_matrix(rows: Sequence[Row]) -> Figure:
    """Models x datasets as a heat map with its numbers (meV/atom, meV/angstrom; mean over seeds)."""
    matrices = [m for quantity in quantities(rows) if (m := matrix(rows, quantity)).cells]
    if not matrices:
        raise ValueError("no row has an energy or forces error to draw")
    models, columns = len(matrices[0].models), max(len(m.columns) for m in matrices)
    panel = max(3.4, 1.15 * columns + 1.3)
    figure = blank(2.0 + panel * len(matrices), 1.9 + 0.48 * models)
    for k, (axes, m) in enumerate(zip(_panels(figure, 1, len(matrices))[0], matrices, strict=True)):
        _draw_matrix(figure, axes, m, names=k == 0)
    return figure


def _draw_matrix(figure: Figure, axes: Axes, m: Matrix, names: bool) -> None:
    estimates = [[m.estimate(model, c) for c in m.columns] for model in m.models]
    values = np.array([[np.nan if e is None else 1000.0 * e.mean for e in line] for line in estimates])
    positive = values[np.isfinite(values) & (values > 0.0)]
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 10.0)
    if high < 2.0 * low:  # differences of a few per cent must not look like decades
        low, high = low / 1.5, high * 1.5
    norm = LogNorm(low, high)
    colours = colormaps["viridis_r"].with_extremes(bad="0.9", under=colormaps["viridis_r"](0.0))
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        shade = float(norm(value)) if np.isfinite(value) and value > 0.0 else 0.0
        text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
        axes.text(
            j, i, text if np.isfinite(value) else "–", ha="center", va="center", color="w" if shade > 0.5 else "k"
        )
    axes.set_xticks(range(len(m.columns)), m.columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(m.models)), m.models if names else [""] * len(m.models))
    if len(m.columns) > len(m.datasets):
        axes.axvline(len(m.datasets) - 0.5, color="w", linewidth=4)
    axes.set_title(f"{m.quantity} MAE (m{UNITS[m.quantity]})")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).ax
    _plain_ticks(bar.yaxis, low, high)


def parity(datasets: Mapping[str, Parity], title: str = "", limit: int = 200_000, seed: int = 0) -> Figure:
    """Predicted against label for every dataset: energy per atom above, force components below; colour = density.

    At most `limit` points per panel are drawn, chosen at random with `seed`; the MAE written there is over all.
    """
    if not datasets:
        raise ValueError("no dataset to draw")
    figure = blank(3.4 * len(datasets) + 0.4, 7.0)
    figure.suptitle(title)
    upper, lower = _panels(figure, 2, len(datasets))
    rng = np.random.default_rng(seed)
    for axes, below, (data, points) in zip(upper, lower, datasets.items(), strict=True):
        axes.set_title(data)
        _draw_parity(axes, points.energy_label, points.energy_predicted, "energy", limit, rng)
        _draw_parity(below, points.forces_label, points.forces_predicted, "forces", limit, rng)
    upper[0].set_ylabel(f"predicted energy ({UNITS['energy']})")
    lower[0].set_ylabel(f"predicted forces ({UNITS['forces']})")
    return figure


def _draw_parity(axes: Axes, label, predicted, quantity: str, limit: int, rng: np.random.Generator) -> None:
    axes.set_xlabel(f"label ({UNITS[quantity]})")
    label, predicted = np.asarray(label, float).ravel(), np.asarray(predicted, float).ravel()
    known = np.isfinite(label) & np.isfinite(predicted)
    lost = int((np.isfinite(label) & ~known).sum())
    label, predicted = label[known], predicted[known]
    if not len(label):
        _nothing(axes, "no labels")
        axes.set_box_aspect(1.0)
        return
    mae = float(np.abs(predicted - label).mean())
    if len(label) > limit:
        drawn = rng.choice(len(label), limit, replace=False)
        label, predicted = label[drawn], predicted[drawn]
    low, high = float(min(label.min(), predicted.min())), float(max(label.max(), predicted.max()))
    margin = 0.03 * (high - low) or max(1e-3, 1e-3 * abs(high))
    extent = (low - margin, high + margin)
    axes.hexbin(label, predicted, gridsize=60, bins="log", mincnt=1, cmap="viridis", extent=(*extent, *extent))
    axes.plot(extent, extent, color="0.4", linewidth=0.8)
    axes.set(xlim=extent, ylim=extent, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    unit = UNITS[quantity]
    note = f"MAE {1000 * mae:.3g} m{unit}" + (f"\n{lost} predictions not finite" if lost else "")
    axes.text(0.04, 0.96, note, ha="left", va="top", transform=axes.transAxes)


def convergence(runs: Mapping[str, Sequence[Row]], x: str = "step", split: str = "validation") -> Figure:
    """Loss, energy MAE and forces MAE against `x` ("step", "epoch", or another number of the records), task by task.

    `runs` maps a model's name to its records of `metrics.jsonl`. Panels: a column per task, a curve per model. The loss
    of a task alone is comparable between models of one objective only.
    """
    chosen = {name: [r for r in records if r["split"] == split] for name, records in runs.items()}
    tasks = list(dict.fromkeys(r["task"] for records in chosen.values() for r in records))
    if not tasks:
        raise ValueError(f"no record of split {split!r} in the runs {', '.join(runs) or '(none)'}")
    figure = blank(3.4 * len(tasks) + 0.8, 8.6)
    panels = _panels(figure, len(_CURVES), len(tasks))
    handles = {}
    for line, (key, caption, factor) in zip(panels, _CURVES, strict=True):
        for axes, task in zip(line, tasks, strict=True):
            for k, (name, records) in enumerate(chosen.items()):
                points = [(r[x], factor * r[key]) for r in records if r["task"] == task and r.get(key) is not None]
                if points:
                    style = _LINES[k // 10 % len(_LINES)]
                    marker = "o" if len(points) == 1 else ""
                    handles[name] = axes.plot(*zip(*points, strict=True), style, color=f"C{k % 10}", marker=marker)[0]
            _finish_curve(axes)
        line[0].set_ylabel(caption)
    for axes, task in zip(panels[0], tasks, strict=True):
        axes.set_title(task)
    for axes in panels[-1]:
        axes.set_xlabel(x)
    names = [name for name in runs if name in handles]
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=min(len(names), 2 * len(tasks)))
    return figure


_CURVES = (
    ("loss", "loss", 1.0),
    ("energy_mae", "energy MAE (meV/atom)", 1000.0),
    ("forces_mae", "forces MAE (meV/Å)", 1000.0),
)
_LINES = ("-", "--", ":", "-.")


def _finish_curve(axes: Axes) -> None:
    values = [v for line in axes.get_lines() for v in np.asarray(line.get_ydata(), float) if np.isfinite(v)]
    if not values:
        _nothing(axes, "no values")
        return
    if min(values) > 0.0:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, min(values), max(values))
    axes.grid(True, which="both", color="0.92")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10, ... (powers of ten where there are many), written out."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100.0 * low else (1.0,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="0.5")
    axes.set(xticks=[], yticks=[])


def blank(width: float, height: float) -> Figure:
    """A figure of its own, inches wide and high, without pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(figure: Figure, lines: int, columns: int) -> list[list[Axes]]:
    return figure.subplots(lines, columns, squeeze=False).tolist()
