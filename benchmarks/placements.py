"""The paper's model on its machines: what each placement costs on 5 to 1,920 ranks. Forecasts; nothing is run.

    python benchmarks/placements.py [--measured DIR] [--tables docs/scaling-tables.md] [--figure docs/scaling.png]

EGNN of 4 layers of 866, heads of three layers of 889, 128 structures a rank; 5, 16 and 64 tasks. `--measured DIR` adds
what `multifid scaling --out DIR` measured as the first column of the figure.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from multifid.forecast.estimate import Forecast, forecast
from multifid.forecast.machines import MACHINES, Machine
from multifid.forecast.scaling import efficiency
from multifid.forecast.scaling.beyond import curves, placed, scaled
from multifid.forecast.scaling.figure import draw
from multifid.forecast.scaling.measure import MeasuredPoint
from multifid.forecast.subject import CRYSTAL_ERROR, MOLECULE_ERROR, Subject, TaskLoad, make_subject
from multifid.model.potential import ModelConfig

MODEL = ModelConfig.model_validate(
    {
        "cutoff": 5.0,
        "encoder": {"name": "egnn", "layers": 4, "hidden": 866, "vectors": 8},
        "branch": {"hidden": [889, 889, 889], "forces": "direct"},
    }
)
LOCAL_BATCH = 128
TASKS = (5, 16, 64)
RANKS = (5, 20, 80, 320, 640, 1920)
# Atoms, edges within 5 angstrom and their spread, of the published samples of docs/results.md; QM7-X and Transition1x,
# small organic molecules too, are taken to be as ANI-1x.
SOURCES = {
    "ani1x": TaskLoad(1.0, 15.0, 202.0, 0.66, MOLECULE_ERROR),
    "qm7x": TaskLoad(1.0, 15.0, 202.0, 0.66, MOLECULE_ERROR),
    "transition1x": TaskLoad(1.0, 15.0, 202.0, 0.66, MOLECULE_ERROR),
    "mptrj": TaskLoad(1.0, 31.5, 1128.0, 1.00, CRYSTAL_ERROR),
    "alexandria": TaskLoad(1.0, 9.7, 400.0, 0.97, CRYSTAL_ERROR),
}
WAYS = (("replicated", True), ("split", True), ("auto", True), ("split", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, help="directory that `multifid scaling` wrote into")
    parser.add_argument("--tables", type=Path, default=Path("docs/scaling-tables.md"))
    parser.add_argument("--figure", type=Path, default=Path("docs/scaling.png"))
    args = parser.parse_args()
    subjects = {count: paper(count) for count in TASKS}
    text = "\n".join(lines(subjects)) + "\n"
    args.tables.write_text(text, encoding="utf-8")
    measured, told = [], []
    if args.measured is not None:
        rows = json.loads((args.measured / "scaling.json").read_text(encoding="utf-8"))["measured"]
        told = [row["forecast"] for row in rows]
        kept = ("point", "step", "phases", "epochs", "spread", "edge", "edges")
        measured = [MeasuredPoint.from_dict({k: row[k] for k in kept}) for row in rows]
    found = [p for machine in MACHINES.values() for p in curves(subjects[5], machine, LOCAL_BATCH)]
    draw(measured, told, found, args.figure)
    print(text)


def paper(count: int) -> Subject:
    """The paper's model with so many tasks: its five sources, over and over."""
    names = list(SOURCES)
    return make_subject(MODEL, {f"{names[k % 5]}-{k:02}": SOURCES[names[k % 5]] for k in range(count)})


def lines(subjects: dict[int, Subject]) -> Iterator[str]:
    yield "<!-- written by benchmarks/placements.py -->"
    yield "# Forecasts for the paper's model\n"
    yield f"{LOCAL_BATCH} structures a rank, or as many in all as the fewest ranks of a table have (strong). fp32.\n"
    for count, subject in subjects.items():
        yield f"## {count} tasks\n"
        encoder, branch = subject.encoder.count / 1e6, subject.branch.count / 1e6
        yield f"P_s = {encoder:.1f} M, P_h = {branch:.2f} M, N_h P_h = {count * branch:.1f} M.\n"
        yield from table("Memory of a rank (GiB: weights, gradients, moments, averages + activations)", subject, memory)
        yield from table("Sent by a rank in a step (MB)", subject, lambda f: f"{f.bytes_per_step / 1e6:.0f}")
        for machine in MACHINES.values():
            for mode in ("weak", "strong"):
                yield from times(subject, machine, mode)
    yield "## Efficiency of weak scaling at the largest number of ranks, and what limits it\n"
    yield from limits(subjects)
    yield "## Noise: weak efficiency on Aurora, 1,920 ranks against 60\n"
    yield from noises(subjects[5])


def memory(f: Forecast) -> str:
    state = f.bytes - f.bytes_per_rank["activations"]
    return f"{state / 2**30:.2f} + {f.bytes_per_rank['activations'] / 2**30:.1f}"


def table(title: str, subject: Subject, cell) -> Iterator[str]:
    machine = MACHINES["aurora"]
    yield from head(title, RANKS)
    for name, balanced in WAYS[:3]:
        row = [cell(at(subject, machine, name, ranks, LOCAL_BATCH * ranks, balanced)) for ranks in RANKS]
        yield line(name, row)
    sharded = [forecast_sharded(subject, machine, ranks) for ranks in RANKS]
    yield line("split, encoder sharded", [cell(f) for f in sharded])
    yield ""


def forecast_sharded(subject: Subject, machine: Machine, ranks: int) -> Forecast:
    loaded = scaled(subject, LOCAL_BATCH * ranks)
    return forecast(loaded, placed(loaded, "split", ranks, machine, True), machine, sharded=True)


def times(subject: Subject, machine: Machine, mode: str) -> Iterator[str]:
    numbers = [r for r in RANKS if r <= machine.ranks]
    if mode == "strong":
        numbers = [r for r in numbers if r >= 20]
    yield from head(f"{machine.name}, {mode} scaling (ms a step)", numbers)
    by_way: dict[tuple[str, bool], list[float]] = {}
    for name, balanced in WAYS:
        batch = [LOCAL_BATCH * (r if mode == "weak" else numbers[0]) for r in numbers]
        by_way[name, balanced] = [
            at(subject, machine, name, r, b, balanced).seconds for r, b in zip(numbers, batch, strict=True)
        ]
        label = name if balanced else f"{name}, not balanced"
        yield line(label, [f"{s * 1e3:.3g}" for s in by_way[name, balanced]])
    ratio = [s / r for s, r in zip(by_way["split", True], by_way["replicated", True], strict=True)]
    yield line("split / replicated", [f"{x:.2f}" for x in ratio])
    ratio = [s / r for s, r in zip(by_way["auto", True], by_way["replicated", True], strict=True)]
    yield line("auto / replicated", [f"{x:.2f}" for x in ratio])
    yield ""


def at(subject: Subject, machine: Machine, name: str, ranks: int, batch: float, balanced: bool = True) -> Forecast:
    loaded = scaled(subject, batch)
    return forecast(loaded, placed(loaded, name, ranks, machine, balanced), machine, balanced=balanced)


def limits(subjects: dict[int, Subject]) -> Iterator[str]:
    columns = ("tasks", "placement", "efficiency", "forward + backward", "sums", "waiting", "optimizer", "books")
    yield from head("machine (ms at the largest)", columns)
    for machine in MACHINES.values():
        few, many = machine.ranks // 8, machine.ranks
        for count, subject in subjects.items():
            for name, balanced in (("replicated", True), ("auto", True), ("replicated", False)):
                one, last = (at(subject, machine, name, r, LOCAL_BATCH * r, balanced) for r in (few, many))
                p = {k: f"{v * 1e3:.1f}" for k, v in last.phases.items()}
                passes = f"{(last.phases['forward'] + last.phases['backward']) * 1e3:.1f}"
                label = name if balanced else f"{name}, not balanced"
                share = f"{efficiency('weak', [few, many], [one.seconds, last.seconds]):.3f}"
                parts = [p["communication"], p["waiting"], p["optimizer"], p["bookkeeping"]]
                yield line(f"{machine.name}, {few} to {many}", [str(count), label, share, passes, *parts])
    yield ""


def noises(subject: Subject) -> Iterator[str]:
    levels = (0.0, 0.02, 0.05, 0.1)
    yield from head("standard deviation of a rank's time", [f"{100 * n:.0f} %" for n in levels])
    for name, balanced in WAYS:
        row = []
        for noise in levels:
            machine = replace(MACHINES["aurora"], noise=noise)
            one, last = (at(subject, machine, name, r, LOCAL_BATCH * r, balanced) for r in (60, 1920))
            row.append(f"{one.seconds / last.seconds:.3f}")
        yield line(name if balanced else f"{name}, not balanced", row)
    yield ""


def head(title: str, columns: Sequence[object]) -> Iterator[str]:
    yield line(title, [str(c) for c in columns])
    yield "|---" + "|---:" * len(columns) + "|"


def line(name: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join([name, *cells]) + " |"


if __name__ == "__main__":
    main()
