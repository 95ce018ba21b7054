"""Tables and figure of what `benchmarks/encoders.py` measured.

    python benchmarks/encoders_table.py FILE.json [--figure FILE.png]

Means over seeds, with the standard deviation where there are several.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

Known = dict[str, dict[str, dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    known: Known = json.loads(args.file.read_text())
    budgets = sorted({key.split(",")[0] for of in known.values() for key in of if "seed" in key}, reverse=True)
    steps, seconds = next(b for b in budgets if "steps" in b), next(b for b in budgets if "seconds" in b)
    known = {name: of for name, of in known.items() if of_runs(known, name, seconds, "objective")}
    names = sorted(known, key=lambda name: mean(of_runs(known, name, seconds, "objective")))
    print(overview(known, names, steps, seconds), errors(known, names, seconds, steps), sep="\n\n")
    if args.figure:
        figure(known, names, steps, seconds, args.figure)


def of_runs(known: Known, name: str, budget: str, *keys: str) -> list[float]:
    """A number of all runs of an encoder with a budget, seed by seed."""
    found = []
    for key, run in known[name].items():
        if key.startswith(f"{budget},"):
            value: Any = run
            for k in keys:
                value = value[k]
            found.append(float(value))
    return found


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def told(values: list[float], digits: int, factor: float = 1.0) -> str:
    values = [factor * x for x in values]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def rate(known: Known, name: str, budget: str) -> float:
    """Structures trained on in a second of the processor."""
    steps, seconds = (of_runs(known, name, budget, key) for key in ("step", "seconds"))
    per_step = known[name]["costs"]["structures_in_a_step"]
    return statistics.median(per_step * a / b for a, b in zip(steps, seconds, strict=True))


def overview(known: Known, names: list[str], steps: str, seconds: str) -> str:
    heads = ["encoder", "seeds", "parameters", "trained / s", "predicted / s", "MB a step", f"after {steps}"]
    rows = []
    for name in names:
        costs = known[name]["costs"]
        runs = [of_runs(known, name, budget, "objective") for budget in (steps, seconds)]
        made, took = (mean(of_runs(known, name, seconds, key)) for key in ("step", "seconds"))
        rows.append(
            [
                f"`{name}`",
                str(len(runs[1])),
                f"{costs['parameters']:,}",
                f"{rate(known, name, seconds):.0f}",
                f"{costs['predicted_in_a_second']:.0f}",
                f"{costs['bytes'] / 1e6:.0f}",
                told(runs[0], 2),
                told(runs[1], 2),
                f"{made:.0f}",
                f"{took:.0f}",
            ]
        )
    return markdown([*heads, f"after {seconds}", "steps of it", "seconds taken"], rows)


def errors(known: Known, names: list[str], *budgets: str) -> str:
    tasks = sorted(next(run["tasks"] for key, run in known[names[0]].items() if "seed" in key))
    parts = []
    for budget in budgets:
        rows = []
        for name in names:
            if of_runs(known, name, budget, "objective"):
                keys = [(t, key) for t in tasks for key in ("energy_mae", "forces_mae")]
                cells = [told(of_runs(known, name, budget, "tasks", *key), 0, 1e3) for key in keys]
                both = zip(cells[::2], cells[1::2], strict=True)
                rows.append([f"`{name}`", *(" / ".join(pair) for pair in both)])
        title = f"Errors after {budget}: energy in meV/atom / forces in meV/angstrom, mean absolute."
        parts += [title, markdown(["encoder", *tasks], rows)]
    return "\n\n".join(parts)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(known: Known, names: list[str], steps: str, seconds: str, path: Path) -> None:
    """Validation objective against structures predicted in a second, for both budgets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot, axes = plt.subplots(1, 2, figsize=(11, 4.6), dpi=120, layout="constrained")
    places: list[dict[str, tuple[float, float, float]]] = [{}, {}]  # speed, objective, its spread over seeds
    for ax, budget, place in zip(axes, (steps, seconds), places, strict=True):
        for name in names:
            if values := of_runs(known, name, budget, "objective"):
                speed = known[name]["costs"]["predicted_in_a_second"]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                ax.errorbar(speed, mean(values), yerr=spread, fmt="o", capsize=2, markersize=5, elinewidth=1)
                place[name] = speed, mean(values), spread
        ax.set_xscale("log")
        ax.margins(x=0.15)
        ax.set_xlabel("structures predicted in a second of one core")
        ax.set_title(f"after {steps} of 10 structures" if budget == steps else f"after {seconds} of one core")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("validation objective (less is better)")
    plot.draw_without_rendering()  # so that it is known where points lie
    for ax, place in zip(axes, places, strict=True):
        write_names(ax, place)
    plot.savefig(path)


def write_names(ax: Any, place: dict[str, tuple[float, float, float]]) -> None:
    """Each name at the nearest place around its point where it covers no point and no other name, joined by a line."""
    from matplotlib.transforms import Bbox

    unit = ax.figure.dpi / 72  # pixels in a point
    taken = []
    for x, y, spread in place.values():
        (left, low), (right, high) = ax.transData.transform([(x, y - spread), (x, y + spread)])
        taken.append(Bbox([[left - 4 * unit, low - 4 * unit], [right + 4 * unit, high + 4 * unit]]))
    around = [(distance, 2 * math.pi * k / 16) for distance in range(6, 100, 4) for k in range(16)]
    for name, (x, y, _) in place.items():
        text = ax.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=7.5)
        size, (left, low) = text.get_window_extent(), ax.transData.transform((x, y))
        text.remove()
        for distance, angle in around:
            side = 0.5 - 0.5 * round(math.cos(angle))  # of the name: its left end, middle or right end is at the point
            dx, dy = unit * distance * math.cos(angle), unit * distance * math.sin(angle)
            corner = left + dx - side * size.width, low + dy - size.height / 2
            box = Bbox.from_bounds(*corner, size.width, size.height)
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        ax.annotate(
            name,
            (x, y),
            xytext=((corner[0] - left) / unit, dy / unit),
            textcoords="offset points",
            fontsize=7.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "relpos": (side, 0.5), "shrinkB": 3},
        )


if __name__ == "__main__":
    main()
