"""Weak and strong scaling as a figure: measured points filled, forecast ones open, ideal lines dashed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from multifid.forecast.scaling.beyond import Predicted
from multifid.forecast.scaling.measure import MeasuredPoint

MODES = ("weak", "strong")
COLOURS = {"replicated": "#4477aa", "split": "#cc6677", "auto": "#228833"}


@dataclass(frozen=True)
class Series:
    """Steps of one kind over numbers of ranks."""

    label: str
    placement: str
    measured: bool
    balanced: bool
    ranks: list[int]
    seconds: list[float]


def draw(
    measured: Sequence[MeasuredPoint],
    told: Sequence[float],
    predicted: Sequence[Predicted],
    path: Path,
    where: str = "here",
) -> None:
    """A row for weak and strong scaling, a column for this machine and for each described one.

    told: forecasts of the measured points, in their order.
    """
    machines = list(dict.fromkeys(p.machine for p in predicted))
    columns = ([where] if measured else []) + machines
    figure, axes = plt.subplots(2, len(columns), figsize=(3.4 * len(columns), 6.4), squeeze=False)
    for row, mode in enumerate(MODES):
        for column, name in enumerate(columns):
            mine = [p for p in predicted if p.machine == name and p.mode == mode]
            series = _described(mine) if mine else _here(measured, told, mode)
            _panel(axes[row][column], series, mode, f"{name}, {mode} scaling")
    axes[0][0].set_ylabel("seconds a step")
    axes[1][0].set_ylabel("seconds a step")
    entries = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _here(measured: Sequence[MeasuredPoint], told: Sequence[float], mode: str) -> list[Series]:
    out = []
    for placement in COLOURS:
        mine = [
            (m, t)
            for m, t in zip(measured, told, strict=True)
            if m.point.mode == mode and (m.point.placement == placement or m.point.ranks == 1)
        ]
        mine.sort(key=lambda pair: pair[0].point.ranks)
        if not any(m.point.placement == placement for m, _ in mine):
            continue
        ranks = [m.point.ranks for m, _ in mine]
        out.append(Series(f"{placement}, measured", placement, True, True, ranks, [m.step for m, _ in mine]))
        out.append(Series(f"{placement}, forecast", placement, False, True, ranks, [t for _, t in mine]))
    return out


def _described(predicted: Sequence[Predicted]) -> list[Series]:
    out = []
    for placement, balanced in dict.fromkeys((p.placement, p.balanced) for p in predicted):
        mine = sorted(
            (p.ranks, p.forecast.seconds) for p in predicted if (p.placement, p.balanced) == (placement, balanced)
        )
        label = f"{placement}, forecast" + ("" if balanced else ", not balanced")
        out.append(Series(label, placement, False, balanced, [r for r, _ in mine], [s for _, s in mine]))
    return out


def _panel(axis: Axes, series: Sequence[Series], mode: str, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("ranks")
    for s in series:
        colour, alpha = COLOURS[s.placement], 1.0 if s.balanced else 0.45
        lines = axis.plot(s.ranks, s.seconds, "o-", color=colour, label=s.label, ms=5, lw=1, alpha=alpha)
        lines[0].set_markerfacecolor(colour if s.measured else "white")
        if s.measured:
            lines[0].set_linestyle("none")
    if series:
        _ideal(axis, min(series, key=lambda s: s.seconds[0]), mode)
    ranks = sorted({r for s in series for r in s.ranks})
    axis.set_xticks(ranks, [str(r) for r in ranks], fontsize=8)
    axis.minorticks_off()
    axis.tick_params(axis="y", labelsize=8)
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:.3g}"))
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    low, high = axis.get_ylim()
    if high < 4 * low:  # so that what hardly differs does not look as if it did
        middle = (low * high) ** 0.5
        low, high = middle / 2, middle * 2
        axis.set_ylim(low, high)
    if high < 20 * low:  # hardly a power of ten in it: a few plain numbers
        axis.set_yticks([float(f"{low * (high / low) ** part:.2g}") for part in (0.15, 0.5, 0.85)])


def _ideal(axis: Axes, first: Series, mode: str) -> None:
    ranks = first.ranks
    ideal = [first.seconds[0] * (1.0 if mode == "weak" else ranks[0] / r) for r in ranks]
    axis.plot(ranks, ideal, "--", color="grey", lw=1, label="ideal")
