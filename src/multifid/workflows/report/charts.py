"""The figures of the report page, as plotly figures in JSON: zoom and hover without a network."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from ase.data import covalent_radii
from ase.data.colors import jmol_colors

from multifid.evaluation.calibrate import Points, quality
from multifid.evaluation.calibration import BINS, binned
from multifid.evaluation.periodic_table import place
from multifid.structures.elements import SYMBOLS
from multifid.training.journal import Row
from multifid.workflows.report.sample import OneStructure, TaskErrors

COLORS = ("#4878cf", "#e1812c", "#3a923a", "#c03d3e", "#9372b2", "#845b53", "#d684bd", "#7f7f7f", "#a9a922", "#2ab0c2")
POINTS = 1_500  # of a parity plot
BONDED = 1.25  # times the sum of covalent radii
DRAWN = 400  # atoms of a structure in a 3D view, at most
GRID = "rgba(128,128,128,0.25)"
MARGIN = {"l": 60, "r": 12, "t": 34, "b": 48}  # of a figure, pixels


def colors(tasks: Sequence[str]) -> dict[str, str]:
    """One colour for each task on the whole page."""
    return {task: COLORS[k % len(COLORS)] for k, task in enumerate(tasks)}


def as_json(figure: go.Figure, height: int, margin: Mapping[str, int] = MARGIN) -> str:
    """What the page hands to plotly; nothing in it can end the script that it stands in."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True}
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#7c818a"},
        margin=dict(margin),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"font": {"size": 13}},
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return json.dumps(json.loads(figure.to_json())).replace("</", "<\\/")


def elements(counts: dict[int, int]) -> str:
    """The periodic table, coloured by the number of atoms (logarithmic)."""
    shape = (10, 18)
    colors, texts, hover = np.full(shape, np.nan), np.full(shape, "", object), np.full(shape, "", object)
    for z in range(1, 119):
        row, column = place(z)
        at = (int(np.ceil(row)) - 1, column - 1)  # lanthanides and actinides lie below an empty row
        n = counts.get(z, 0)
        texts[at], hover[at] = SYMBOLS[z], f"{SYMBOLS[z]}: {n:,} atoms"
        colors[at] = np.log10(n) if n else np.nan
    figure = go.Figure(
        go.Heatmap(
            z=[[None if np.isnan(v) else float(v) for v in line] for line in colors],
            text=texts.tolist(),
            hovertext=hover.tolist(),
            hoverinfo="text",
            colorscale=[[0, "#d5e3f7"], [0.5, "#7fa8e0"], [1, "#3f76c9"]],
            zmin=0,
            xgap=2,
            ygap=2,
            hoverongaps=True,
            colorbar={"title": {"text": "log₁₀ atoms"}, "orientation": "h", "thickness": 10, "y": -0.2, "len": 0.6},
        )
    )
    present = [(r, c) for r, c in np.argwhere(texts != "")]
    for there, color in ((True, "#16202e"), (False, "#8b919b")):
        some = [(r, c) for r, c in present if np.isfinite(colors[r, c]) == there]
        figure.add_scatter(
            x=[int(c) for _, c in some],
            y=[int(r) for r, _ in some],
            text=[str(texts[r, c]) for r, c in some],
            mode="text",
            textfont={"size": 10, "color": color},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    return as_json(figure, 380)


def curves(journal: Sequence[Row], key: str, label: str, factor: float) -> str | None:
    """Validation errors of every task by step; None where no task has any."""
    tasks = sorted({row["task"] for row in journal if row["split"] == "validation"})
    figure, of_task = go.Figure(), colors(tasks)
    for task in tasks:
        rows = [r for r in journal if r["split"] == "validation" and r["task"] == task and r.get(key) is not None]
        if rows:
            figure.add_scatter(
                x=[r["step"] for r in rows],
                y=[factor * r[key] for r in rows],
                name=task,
                mode="lines+markers",
                marker={"size": 4},
                line={"color": of_task[task]},
                hovertemplate=f"{task}<br>step %{{x}}<br>%{{y:.4g}} {label}<extra></extra>",
            )
    if not figure.data:
        return None
    figure.update_yaxes(type="log", title=label)
    figure.update_xaxes(title="step")
    return as_json(figure, 360)


def parity(found: TaskErrors, kind: str, color: str) -> str | None:
    """Predicted against label: energies per atom (aligned) or force components; None without labels."""
    if kind == "energy":
        pairs = np.array([s.energy for s in found.structures]).reshape(-1, 2)
        which = np.arange(len(pairs))
        unit = "eV/atom, references subtracted"
    else:
        pairs = np.concatenate(
            [np.stack([s.forces[0].ravel(), s.forces[1].ravel()], 1) for s in found.structures] or [np.zeros((0, 2))]
        )
        which = np.repeat(np.arange(len(found.structures)), [s.forces[0].size for s in found.structures])
        unit = "eV/Å, by component"
    known = np.isfinite(pairs).all(axis=1)
    pairs, which = pairs[known], which[known]
    if not len(pairs):
        return None
    if len(pairs) > POINTS:  # the largest errors always, the rest spread evenly
        order = np.argsort(-np.abs(pairs[:, 1] - pairs[:, 0]), kind="stable")
        rest = order[200:]
        chosen = np.concatenate([order[:200], rest[:: max(1, len(rest) // (POINTS - 200))]])
        pairs, which = pairs[chosen], which[chosen]
    low, high = float(pairs.min()), float(pairs.max())
    names = [formula(found.structures[k].numbers) for k in which]
    figure = go.Figure(
        go.Scatter(x=[low, high], y=[low, high], mode="lines", line={"color": GRID, "width": 1.5}, hoverinfo="skip")
    )
    figure.add_scatter(
        x=pairs[:, 0].round(6).tolist(),
        y=pairs[:, 1].round(6).tolist(),
        mode="markers",
        marker={"size": 4, "opacity": 0.5, "color": color},
        text=names,
        hovertemplate="%{text}<br>label %{x:.4g}<br>predicted %{y:.4g}<extra></extra>",
    )
    figure.update_layout(showlegend=False, title={"text": unit, "font": {"size": 13}})
    figure.update_xaxes(title="label")
    figure.update_yaxes(title="predicted")
    return as_json(figure, 340)


def by_element(errors: dict[str, TaskErrors]) -> str | None:
    """Mean absolute force error of the atoms of each element, each task beside the others."""
    figure, of_task = go.Figure(), colors(sorted(errors))
    for task, found in errors.items():
        if not found.structures:
            continue
        numbers = np.concatenate([s.numbers for s in found.structures])
        each = np.concatenate([np.abs(s.forces[1] - s.forces[0]).mean(axis=1) for s in found.structures])
        known = np.isfinite(each)
        present = np.unique(numbers[known])
        if len(present):
            figure.add_bar(
                x=[SYMBOLS[z] for z in present],
                y=[1000 * float(each[known & (numbers == z)].mean()) for z in present],
                customdata=[int((known & (numbers == z)).sum()) for z in present],
                name=task,
                marker={"color": of_task[task]},
                hovertemplate=f"{task}, %{{x}}: %{{y:.3g}} meV/Å<br>%{{customdata:,}} atoms<extra></extra>",
            )
    if not figure.data:
        return None
    drawn = {x for bar in figure.data for x in bar.x}
    order = [s for s in SYMBOLS[1:] if s in drawn]
    figure.update_xaxes(categoryorder="array", categoryarray=order)
    figure.update_yaxes(title="forces MAE, meV/Å")
    figure.update_layout(barmode="group")
    return as_json(figure, 360)


def by_size(errors: dict[str, TaskErrors]) -> str | None:
    """Median absolute energy error per atom by the number of atoms, in bins that double."""
    figure, of_task = go.Figure(), colors(sorted(errors))
    for task, found in errors.items():
        sizes = np.array([len(s.numbers) for s in found.structures])
        each = np.array([s.energy_error for s in found.structures])
        known = np.isfinite(each)
        if not known.any():
            continue
        bins = np.floor(np.log2(sizes)).astype(int)
        present = np.unique(bins[known])
        names = [f"{2**b}-{2 ** (b + 1) - 1}" if b else "1" for b in present.tolist()]
        figure.add_scatter(
            x=[float(sizes[known & (bins == b)].mean()) for b in present],
            y=[1000 * float(np.median(each[known & (bins == b)])) for b in present],
            text=[
                f"{name} atoms, {int((known & (bins == b)).sum())} structures"
                for name, b in zip(names, present, strict=True)
            ],
            name=task,
            mode="lines+markers",
            line={"color": of_task[task]},
            hovertemplate=f"{task}<br>%{{text}}<br>%{{y:.3g}} meV/atom<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_xaxes(type="log", title="atoms of a structure")
    figure.update_yaxes(type="log", title="median energy error, meV/atom")
    return as_json(figure, 340)


def deviations(found: Mapping[str, Points], kind: str, unit: str) -> str | None:
    """Errors found (rms) beside predicted deviations, in bins of equal number; None where nothing was calibrated."""
    figure, of_task = go.Figure(), colors(sorted(found))
    ends: list[float] = []
    for task, one in found.items():
        pairs = getattr(one, kind)
        if len(pairs) < BINS:
            continue
        x, q = 1000 * binned(pairs), quality(pairs)
        ends += [float(x.min()), float(x.max())]
        figure.add_scatter(
            x=x[:, 0].tolist(),
            y=x[:, 1].tolist(),
            name=task,
            mode="lines+markers",
            line={"color": of_task[task]},
            hovertemplate=f"{task} (rank correlation {q['rank']:.2f})<br>deviation %{{x:.3g}} {unit}"
            f"<br>error found %{{y:.3g}} {unit}<extra></extra>",
        )
    if not ends:
        return None
    line = [min(ends), max(ends)]
    figure.add_scatter(
        x=line, y=line, mode="lines", line={"color": GRID, "width": 1.5}, hoverinfo="skip", showlegend=False
    )
    figure.update_xaxes(type="log", title=f"predicted deviation, {unit}")
    figure.update_yaxes(type="log", title=f"error found (rms), {unit}")
    return as_json(figure, 340)


def view(structure: OneStructure) -> str:
    """A structure in three dimensions: atoms in the usual colours, bonds, the cell, and the errors of its forces."""
    numbers, x = structure.numbers[:DRAWN], structure.positions[:DRAWN]
    error = 1000 * np.abs(structure.forces[1] - structure.forces[0]).mean(axis=1)[:DRAWN]
    figure = go.Figure()
    lines: list[Any] = []
    radii = covalent_radii[numbers]
    near = np.linalg.norm(x[:, None] - x[None], axis=-1) < BONDED * (radii[:, None] + radii[None])
    for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True):
        lines += [x[i].tolist(), x[j].tolist(), [None] * 3]
    _lines(figure, lines, "#999999", 4)
    if structure.cell.any():
        a = structure.cell
        corners = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        edges: list[Any] = []
        for corner in corners:
            for axis in range(3):
                if corner[axis] == 0 and a[axis].any():
                    start = np.array(corner) @ a
                    edges += [start.tolist(), (start + a[axis]).tolist(), [None] * 3]
        _lines(figure, edges, "#4878cf", 2)
    figure.add_scatter3d(
        x=x[:, 0].tolist(),
        y=x[:, 1].tolist(),
        z=x[:, 2].tolist(),
        mode="markers",
        marker={
            "size": (7 + 7 * radii).tolist(),
            "color": ["rgb({},{},{})".format(*(int(255 * c) for c in jmol_colors[z])) for z in numbers],
            "line": {"width": 1, "color": "#555555"},
            "opacity": 1.0,
        },
        text=[_atom(k, int(z), float(e)) for k, (z, e) in enumerate(zip(numbers, error, strict=True))],
        hovertemplate="%{text}<extra></extra>",
    )
    hidden = {"visible": False}
    figure.update_layout(
        scene={"xaxis": hidden, "yaxis": hidden, "zaxis": hidden, "aspectmode": "data"}, showlegend=False
    )
    return as_json(figure, 320)


def formula(numbers: np.ndarray) -> str:
    """C2H6O, in the order of Hill."""
    counts = {SYMBOLS[z]: int((numbers == z).sum()) for z in np.unique(numbers)}
    first = [s for s in ("C", "H") if s in counts] if "C" in counts else []
    return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in [*first, *sorted(set(counts) - set(first))])


def _atom(k: int, z: int, error: float) -> str:
    return f"{SYMBOLS[z]} {k}" + (f": {error:.3g} meV/Å" if np.isfinite(error) else "")


def _lines(figure: go.Figure, points: list[Any], color: str, width: int) -> None:
    if points:
        x, y, z = zip(*points, strict=True)
        figure.add_scatter3d(
            x=x, y=y, z=z, mode="lines", line={"color": color, "width": width}, hoverinfo="skip", showlegend=False
        )
