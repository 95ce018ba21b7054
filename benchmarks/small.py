"""What a source with few labels gains from larger ones, and what sampling by size costs it.

    OMP_NUM_THREADS=1 python benchmarks/small.py CONFIG.yaml [--targets TASK ...] [--sizes 20 100 500]
        [--exponents 0 0.5] [--seeds 0 1 2] [--steps 900] [--out runs/small] [key=value ...]

Of each target task the train split is cut to some structures (validation and test stay), and it is trained alone and
with all other tasks of CONFIG, which keep theirs. `sampling.exponent` says how the structures of a step are shared
among them: 0 equally, 1 by size; portions of the config (`per_step`) are left out. All have the same number of steps,
of `train.batch` structures per task, and keep the weights of their best validation value. Errors are those of the
target's test split; reference energies and zero forces stand beside them. What is in OUT/results.json is not trained
again.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import multifid
from multifid.config import load_config
from multifid.workflows.derive import subset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 100, 500])
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    args = parser.parse_intermixed_args()
    values = load_config(args.config, args.overrides).model_dump(mode="json", exclude_unset=True)
    known = args.out / "results.json"
    results: dict[str, dict] = json.loads(known.read_text()) if known.exists() else {}
    print(
        "| target | labels | seed | trained | energy, meV/atom | forces, meV/angstrom |\n|---|---:|---:|---|---:|---:|"
    )
    for target in args.targets or list(values["tasks"]):
        for size in args.sizes:
            for seed in args.seeds:
                for exponent in [None, *args.exponents]:
                    name = f"{target}-{size}-{seed}-{'alone' if exponent is None else f'{exponent:g}'}"
                    if name not in results:
                        results[name] = of(values, target, size, seed, exponent, args.steps, args.out / name)
                        known.write_text(json.dumps(results, indent=1))
                    e, f = (1000 * results[name][f"{kind}_mae"] for kind in ("energy", "forces"))
                    how = "alone" if exponent is None else f"with all, exponent {exponent:g}"
                    print(f"| {target} | {size} | {seed} | {how} | {e:.4g} | {f:.4g} |", flush=True)
    summary(results, args)


def of(values: dict, target: str, size: int, seed: int, exponent: float | None, steps: int, run: Path) -> dict:
    """Train, and the row of the target's test split."""
    whole = Path(values["tasks"][target]["store"])
    few = run.parent / f"{target}-{size}-{seed}.store"
    if not few.exists():
        few.parent.mkdir(parents=True, exist_ok=True)
        subset(whole, few, sizes={"train": size}, seed=seed)
    tasks: dict[str, Any] = {target: {**values["tasks"][target], "store": str(few)}}
    if exponent is not None:
        tasks = {**values["tasks"], **tasks}
    tasks = {name: {k: v for k, v in one.items() if k != "per_step"} for name, one in tasks.items()}
    branches = {b: shape for b, shape in values["model"].get("branches", {}).items() if b in tasks}
    multifid.train(
        {
            **values,
            "run": str(run),
            "seed": seed,
            "tasks": tasks,
            "model": {**values["model"], "branches": branches},
            "sampling": {"exponent": exponent or 0.0},
            "train": {**values["train"], "steps": steps, "epoch_steps": max(1, steps // 9), "patience": None},
        }
    )
    row = multifid.evaluate(run, {target: str(whole)}, "test", quiet=True)[-1]
    return {key: row[key] for key in ("energy_mae", "forces_mae", "zero_energy_mae", "zero_forces_mae")}


def summary(results: dict[str, dict], args: argparse.Namespace) -> None:
    """Means over seeds, and ratios to the same source alone, seed by seed."""
    print("\n| target | labels | trained | energy | forces | energy / alone | forces / alone |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for target, size in sorted({(name.split("-")[0], int(name.split("-")[1])) for name in results}):
        for how in ["alone", *(f"{e:g}" for e in args.exponents)]:
            cells = [target, str(size), how if how == "alone" else f"with all, exponent {how}"]
            own = [results[f"{target}-{size}-{s}-{how}"] for s in args.seeds]
            cells += [spread([1000 * r[f"{kind}_mae"] for r in own]) for kind in ("energy", "forces")]
            alone = [results[f"{target}-{size}-{s}-alone"] for s in args.seeds]
            for kind in ("energy", "forces"):
                cells.append(spread([r[f"{kind}_mae"] / a[f"{kind}_mae"] for r, a in zip(own, alone, strict=True)]))
            print(f"| {' | '.join(cells)} |")
        zero = results[f"{target}-{size}-{args.seeds[0]}-alone"]
        energy, forces = (1000 * zero[f"zero_{kind}_mae"] for kind in ("energy", "forces"))
        print(f"| {target} | | references, zero forces | {energy:.4g} | {forces:.4g} | | |")


def spread(values: list[float]) -> str:
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
