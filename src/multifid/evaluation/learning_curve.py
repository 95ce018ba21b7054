"""Errors against the number of structures that were trained on: fine-tuned and from scratch, as table and figure."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from multifid.evaluation.figures import blank
from multifid.evaluation.fitted import FittedTable
from multifid.evaluation.matrix import UNITS, Estimate, Row

FINETUNED, SCRATCH = "fine-tuned", "from scratch"
HOW = (FINETUNED, SCRATCH)
KINDS = ("forces", "energy", "stress")


def estimate(rows: Sequence[Row], how: str, data: str, size: int, kind: str) -> Estimate | None:
    """Mean and spread over seeds of an MAE, in thousandths (meV/atom, meV/angstrom); None where there is none."""
    chosen = (r for r in rows if (r["model"], r["data"], r["size"]) == (how, data, size))
    return Estimate.of(1000 * r[f"{kind}_mae"] for r in chosen if r.get(f"{kind}_mae") is not None)


def tables(rows: Sequence[Row]) -> list[FittedTable]:
    """One table for each quantity: a line for each dataset and size."""
    found = []
    for kind in KINDS:
        lines = []
        for data in dict.fromkeys(r["data"] for r in rows):
            for size in sorted({r["size"] for r in rows}):
                tuned, scratch = (estimate(rows, how, data, size, kind) for how in HOW)
                if tuned is not None or scratch is not None:
                    lines.append([data, str(size), _told(tuned), _told(scratch), _ratio(tuned, scratch)])
        if lines:
            unit = f"m{UNITS[kind]}"
            heads = ["structures", *(f"{how} ({unit})" for how in HOW), "ratio"]
            found.append(FittedTable(f"{kind} MAE by structures trained on", ["data"], heads, lines))
    return found


def _told(e: Estimate | None) -> str:
    if e is None:
        return ""
    return f"{e.mean:.3g}" + ("" if e.spread is None else f" ± {e.spread:.2g}")


def _ratio(tuned: Estimate | None, scratch: Estimate | None) -> str:
    return "" if tuned is None or scratch is None or not tuned.mean else f"{scratch.mean / tuned.mean:.2f}"


def figure(rows: Sequence[Row]) -> Figure:
    """A line of panels for each quantity, a column for each dataset; bars are sample standard deviations over seeds."""
    datasets = list(dict.fromkeys(r["data"] for r in rows))
    kinds = [kind for kind in KINDS if any(r.get(f"{kind}_mae") is not None for r in rows)]
    drawn = blank(3.4 * len(datasets) + 0.6, 3.0 * len(kinds) + 0.8)
    panels = drawn.subplots(len(kinds), len(datasets), squeeze=False)
    handles: dict[str, Any] = {}
    for k, kind in enumerate(kinds):
        for axes, data in zip(panels[k], datasets, strict=True):
            handles |= _curves(axes, rows, data, kind)
            if k == 0:
                axes.set_title(data)
        panels[k][0].set_ylabel(f"{kind} MAE (m{UNITS[kind]})")
    for axes in panels[-1]:
        axes.set_xlabel("structures trained on")
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(HOW))
    return drawn


def _curves(axes: Axes, rows: Sequence[Row], data: str, kind: str) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    sizes = sorted({r["size"] for r in rows})
    for how, marker in zip(HOW, "os", strict=True):
        found = [(n, e) for n in sizes if (e := estimate(rows, how, data, n, kind)) is not None]
        if found:
            values = [e.mean for _, e in found]
            bars = [min(e.spread or 0.0, 0.9 * e.mean) for _, e in found]
            handles[how] = axes.errorbar([n for n, _ in found], values, yerr=bars, marker=marker, capsize=3)
    if not handles:
        axes.text(0.5, 0.5, "no labels", ha="center", va="center", transform=axes.transAxes, color="0.5")
        axes.set(xticks=[], yticks=[])
        return handles
    shown = [
        e.mean for how in HOW for n in sizes if (e := estimate(rows, how, data, n, kind)) is not None and e.mean > 0
    ]
    low, high = (min(shown) / 1.4, 1.4 * max(shown)) if shown else (1.0, 10.0)
    axes.set(xscale="log", yscale="log", ylim=(low, high))
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="both", color="0.92")
    return handles
