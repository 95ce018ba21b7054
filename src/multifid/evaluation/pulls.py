"""How tasks pull at the encoder of a run, from its journals: the numbers and the figure of `multifid diagnose`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from multifid.evaluation.figures import blank
from multifid.evaluation.matrix import Row

LATER = 0.5  # measurements of this last part of the run are taken together


@dataclass(frozen=True)
class Pull:
    """One task's pull at the encoder, in the mean over the later measurements. None: never measured."""

    norm: float | None  # of the gradient of its weighted objective
    share: float | None  # its part in the encoder's gradient
    worst: tuple[str, float] | None  # the task that it agrees with least, and their cosine


@dataclass(frozen=True)
class Gap:
    """One task's objective where it was last validated. None: there is none."""

    step: int
    train: float | None  # over the steps before it, with the weights of each
    validation: float | None
    best: float | None  # lowest validation value so far
    best_step: int

    @property
    def ratio(self) -> float | None:
        """Validation by training: above 1 the task is better on what it was trained on."""
        return self.validation / self.train if self.validation is not None and self.train else None

    @property
    def above_best(self) -> float | None:
        """By which part the last value is above the best one."""
        return self.validation / self.best - 1 if self.validation is not None and self.best else None


def later(rows: Sequence[Row]) -> list[Row]:
    """The measurements of the last part of the run."""
    last = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] > LATER * last]


def cosines(rows: Sequence[Row], tasks: Sequence[str]) -> np.ndarray:
    """Mean cosines between the tasks' gradients (tasks, tasks), NaN where there is none; 1 on the diagonal."""
    out = np.eye(len(tasks))
    for i, one in enumerate(tasks):
        for j, other in enumerate(tasks):
            if i != j:
                out[i, j] = _mean([r["cosines"].get(other) for r in rows if r["task"] == one])
    return out


def pulls(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, Pull]:
    """Of each task, over the later measurements among `rows` of a diagnosis."""
    rows = later(rows)
    table, out = cosines(rows, tasks), {}
    for i, task in enumerate(tasks):
        own = [row for row in rows if row["task"] == task]
        others = [(float(table[i, j]), other) for j, other in enumerate(tasks) if j != i and np.isfinite(table[i, j])]
        least = min(others, default=None)
        out[task] = Pull(
            _known([r["norm"] for r in own]),
            _known([r["share"] for r in own]),
            None if least is None else (least[1], least[0]),
        )
    return out


def gaps(journal: Sequence[Row], tasks: Sequence[str]) -> dict[str, Gap]:
    """Of each task that was validated, from the rows of metrics.jsonl."""
    out = {}
    for task in tasks:
        own = [row for row in journal if row["task"] == task and row["split"] == "validation"]
        if not own:
            continue
        step = own[-1]["step"]
        trained = [r for r in journal if r["task"] == task and r["split"] == "train" and r["step"] <= step]
        best = min(((r["loss"], r["step"]) for r in own if r.get("loss") is not None), default=(None, step))
        out[task] = Gap(step, trained[-1]["loss"] if trained else None, own[-1]["loss"], *best)
    return out


def figure(rows: Sequence[Row], journal: Sequence[Row], tasks: Sequence[str]) -> Figure:
    """Four panels: norms and shares by step, mean cosines, each task's objective in training and validation."""
    made = blank(12.5, 8.6)
    (norms, shares), (matrix, losses) = made.subplots(2, 2)
    _curves(norms, rows, tasks, "norm", "norm of the gradient on the encoder")
    norms.set_yscale("log")
    _curves(shares, rows, tasks, "share", "share of the encoder's gradient")
    shares.axhline(0.0, color="0.6", linewidth=0.8)
    if rows:
        _matrix(made, matrix, cosines(later(rows), tasks), tasks)
    for k, task in enumerate(tasks):
        for split, style in (("train", ":"), ("validation", ".-")):
            own = [r for r in journal if r["task"] == task and r["split"] == split and r.get("loss")]
            losses.plot([r["step"] for r in own], [r["loss"] for r in own], style, color=f"C{k % 10}")
    losses.set(yscale="log", title="objective: dotted in training, solid in validation", xlabel="step")
    losses.grid(True, which="both", color="0.92")
    lines = [norms.plot([], [], "-", color=f"C{k % 10}")[0] for k in range(len(tasks))]
    made.legend(lines, list(tasks), loc="outside lower center", ncols=min(len(tasks), 8))
    return made


def _curves(axes: Axes, rows: Sequence[Row], tasks: Sequence[str], key: str, title: str) -> None:
    for k, task in enumerate(tasks):
        own = [r for r in rows if r["task"] == task and r[key] is not None]
        axes.plot([r["step"] for r in own], [r[key] for r in own], ".-", color=f"C{k % 10}")
    axes.set(title=title, xlabel="step")
    axes.grid(True, which="both", color="0.92")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _matrix(made: Figure, axes: Axes, table: np.ndarray, tasks: Sequence[str]) -> None:
    image = axes.imshow(np.ma.masked_invalid(table), cmap=colormaps["RdBu"], vmin=-1, vmax=1)
    if len(tasks) <= 12:
        for (i, j), value in np.ndenumerate(table):
            shade = "w" if np.isfinite(value) and abs(value) > 0.6 else "k"
            axes.text(j, i, f"{value:.2f}" if np.isfinite(value) else "–", ha="center", va="center", color=shade)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_title("cosines between gradients, mean of the run's second half")
    made.colorbar(image, ax=axes, fraction=0.04, pad=0.02)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _known(values: Sequence[float | None]) -> float | None:
    mean = _mean(values)
    return mean if np.isfinite(mean) else None


def by_pair(rows: Sequence[Row], tasks: Sequence[str]) -> Mapping[tuple[str, str], float]:
    """Mean cosine of every pair that was measured, the least first."""
    table = cosines(later(rows), tasks)
    pairs = {
        (one, other): float(table[i, j])
        for i, one in enumerate(tasks)
        for j, other in enumerate(tasks)
        if i < j and np.isfinite(table[i, j])
    }
    return dict(sorted(pairs.items(), key=lambda item: item[1]))
