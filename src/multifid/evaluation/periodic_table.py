"""The paper's Figure 1: how often each element occurs, as a heat map of the periodic table.

Logarithmic colours, for hydrogen outnumbers the rarest element a million to one; all 118 elements, absent ones grey.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from multifid.structures.elements import MAX_Z, SYMBOLS

_NOBLE = (2, 10, 18, 36, 54, 86, 118)  # the last element of each period
_HEIGHT = 8.7  # inches of a table 16 inches wide
_F_ROW = {6: 8.35, 7: 9.35}  # lanthanides and actinides are drawn below the table


def place(z: int) -> tuple[float, int]:
    """(row, column) of an element, both from 1; lanthanides and actinides in rows of their own, columns 4 to 17."""
    if not 1 <= z <= MAX_Z:
        raise ValueError(f"an atomic number is 1..{MAX_Z}, got {z}")
    period = next(k for k, last in enumerate(_NOBLE, start=1) if z <= last)
    left = z - (_NOBLE[period - 2] if period > 1 else 0)  # 1 for the alkali metal of the period
    right = _NOBLE[period - 1] - z  # 0 for the noble gas
    if period >= 6 and 3 <= left <= 16:  # La-Yb, Ac-No
        return _F_ROW[period], left + 1
    return period, left if left <= 2 and z != 2 else 18 - right


def periodic_tables(counts: Mapping[str, Mapping[int, int]], total: str = "all datasets") -> Figure:
    """All datasets together, 1600 px wide at 100 dpi, and each of several below it, on one colour scale.

    `counts` maps a name to {Z: atoms}. Raises ValueError without any atom, or for a number that is no element.
    """
    summed: dict[int, int] = {}
    for elements in counts.values():
        for z, n in elements.items():
            summed[z] = summed.get(z, 0) + n
    if not any(summed.values()):
        raise ValueError(f"no atoms to draw in {', '.join(counts) or 'no dataset'}")
    single = len(counts) == 1
    small = 0 if single else -(-len(counts) // 2)  # lines of two small tables
    figure = Figure(figsize=(16.0, _HEIGHT + 0.52 * _HEIGHT * small))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        1 + small,
        4,
        height_ratios=[1.0, *[0.52] * small],
        left=0.015,
        right=0.985,
        bottom=0.01,
        top=0.99,
        hspace=0.02,
        wspace=0.03,
    )
    norm = LogNorm(1, max(10, *summed.values()))
    _draw(figure.add_subplot(grid[0, :]), summed, next(iter(counts)) if single else total, norm, 1.0, figure)
    for k, (name, elements) in enumerate(counts.items() if small else ()):
        last = k == len(counts) - 1 and k % 2 == 0  # one left over stands in the middle
        columns = slice(1, 3) if last else slice(2 * (k % 2), 2 * (k % 2) + 2)
        _draw(figure.add_subplot(grid[1 + k // 2, columns]), elements, name, norm, 0.5)
    return figure


def _draw(
    axes: Axes, counts: Mapping[int, int], title: str, norm: LogNorm, size: float, figure: Figure | None = None
) -> None:
    """One table in the axes; `size` 1.0 fills 1600 px, smaller ones have no counts. With `figure`, a colour bar."""
    colours = colormaps["YlGnBu"]
    axes.set(xlim=(0.4, 18.6), ylim=(9.95, 0.0), aspect="equal")
    axes.axis("off")
    for z in range(1, MAX_Z + 1):
        row, column = place(z)
        n = counts.get(z, 0)
        face = colours(norm(n)) if n else (0.91, 0.91, 0.91, 1.0)
        axes.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=face, edgecolor="none"))
        ink = "w" if n and np.dot(face[:3], (0.299, 0.587, 0.114)) < 0.5 else "k" if n else "0.6"
        detailed = size >= 1.0
        axes.text(column, row + 0.02, SYMBOLS[z], ha="center", va="center", color=ink, fontsize=19 if detailed else 12)
        if detailed:
            axes.text(column - 0.42, row - 0.30, str(z), ha="left", va="center", color=ink, fontsize=8.5)
            axes.text(column, row + 0.34, _short(n) if n else "", ha="center", va="center", color=ink, fontsize=10)
    present = [z for z, n in counts.items() if n]
    atoms = sum(counts.values())
    axes.text(7.5, 1.0, title, ha="center", va="center", fontsize=24 * (0.45 + 0.55 * size), fontweight="bold")
    axes.text(
        7.5,
        1.75,
        f"{len(present)} elements, {atoms:,} atoms",
        ha="center",
        va="center",
        fontsize=17 * (0.4 + 0.6 * size),
    )
    if figure is not None:
        bar = axes.inset_axes((4.0, 2.7, 7.0, 0.25), transform=axes.transData)
        figure.colorbar(ScalarMappable(norm, colours), cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=11)
        axes.text(7.5, 2.4, "atoms (grey: none)", ha="center", va="center", fontsize=12)


def _short(n: int) -> str:
    """A count in at most five characters: 999, 12.3k, 4.56M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * unit:
            return f"{n / unit:.3g}{suffix}"
    return str(n)
