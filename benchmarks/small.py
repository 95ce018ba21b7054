"""What a source with few labels gains from larger ones, and what sampling by size costs each of them.

    OMP_NUM_THREADS=1 python benchmarks/small.py CONFIG.yaml [key=value ...] [--targets TASK ...] [--sizes 20 100 500]
        [--exponents 0 0.5] [--seeds 0 1 2] [--steps 900] [--repeat TASK=N ...] [--out runs/small]

Of each target task the train split is cut to some structures (validation and test stay), and it is trained alone and
with all other tasks of CONFIG, which keep theirs. `sampling.exponent` says how the structures of a step are shared
among them: 0 equally, 1 by size; portions of the config (`per_step`) are left out. All have the same number of steps,
of `train.batch` structures per task, and keep the weights of their best validation value. Errors are those of test
splits; reference energies and zero forces stand beside them. What is in OUT/results.json is not trained again.

--repeat: a source as large as in earnest: its training structures again and again, N in all, each atom moved by 0.01
angstrom, with energies to first order in that and the same forces. Sampling sees the size; nothing new is to be learnt.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

import multifid
from multifid.config import load_config
from multifid.preparation.selected import write_selected
from multifid.readers.stores import block_of, lineage
from multifid.store.block import Block
from multifid.workflows.derive import subset

MOVED = 0.01  # angstrom
CHUNK = 4096  # structures
Errors = dict[str, dict[str, float]]  # of each task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 100, 500])
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--repeat", nargs="+", default=[], metavar="TASK=N")
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    args = parser.parse_args()
    values = load_config(args.config, args.overrides).model_dump(mode="json", exclude_unset=True)
    args.targets = args.targets or list(values["tasks"])
    whole = {task: Path(given["store"]) for task, given in values["tasks"].items()}
    for task, size in (given.split("=") for given in args.repeat):
        values["tasks"][task]["store"] = str(repeated(whole[task], args.out / f"{task}-{size}", int(size)))
    known = args.out / "results.json"
    results: dict[str, Errors] = json.loads(known.read_text()) if known.exists() else {}
    print(
        "| target | labels | seed | trained | energy, meV/atom | forces, meV/angstrom |\n|---|---:|---:|---|---:|---:|"
    )
    for target in args.targets:
        for size in args.sizes:
            for seed in args.seeds:
                for exponent in [None, *args.exponents]:
                    name = f"{target}-{size}-{seed}-{'alone' if exponent is None else f'{exponent:g}'}"
                    if name not in results:
                        results[name] = of(values, whole, target, size, seed, exponent, args.steps, args.out / name)
                        known.write_text(json.dumps(results, indent=1))
                    e, f = (1000 * results[name][target][f"{kind}_mae"] for kind in ("energy", "forces"))
                    how = "alone" if exponent is None else f"with all, exponent {exponent:g}"
                    print(f"| {target} | {size} | {seed} | {how} | {e:.4g} | {f:.4g} |", flush=True)
    gained(results, args)
    lost(results, args)


def of(
    values: dict,
    whole: dict[str, Path],
    target: str,
    size: int,
    seed: int,
    exponent: float | None,
    steps: int,
    run: Path,
) -> Errors:
    """Train, and the errors of each of its tasks on the test split."""
    few = run.parent / f"{target}-{size}-{seed}.store"
    if not few.exists():
        few.parent.mkdir(parents=True, exist_ok=True)
        subset(whole[target], few, sizes={"train": size}, seed=seed)
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
    rows = {task: multifid.evaluate(run, {task: str(whole[task])}, "test", quiet=True)[-1] for task in tasks}
    kinds = ("energy_mae", "forces_mae", "zero_energy_mae", "zero_forces_mae")
    return {task: {kind: row[kind] for kind in kinds} for task, row in rows.items()}


def repeated(store: Path, out: Path, size: int) -> Path:
    """A store with the training structures of another, moved a little each time, until there are so many of them."""
    if out.exists():
        return out
    given = multifid.Store(store)
    train = given.index("train")
    others = np.concatenate([given.index("validation"), given.index("test")])
    indices = np.concatenate([train[np.arange(size) % len(train)], others])
    split = np.concatenate([np.zeros(size, np.uint8), given.rows("split", others)])

    def blocks() -> Iterator[Block]:
        random = np.random.default_rng(0)
        for first in range(0, len(indices), CHUNK):
            block = block_of(given, indices[first : first + CHUNK])
            yield moved(block, np.arange(first, first + len(block)) < size, random)

    source = {"name": f"{store}, repeated", **lineage(store)}
    write_selected(out, blocks(), split, given.manifest["tasks"], source, {})
    return out


def moved(block: Block, wanted: np.ndarray, random: np.random.Generator) -> Block:
    """Atoms of the wanted structures in other places, their energies to first order."""
    columns, first = dict(block.columns), block.first_atoms()
    step = MOVED * random.standard_normal(columns["positions"].shape) * np.repeat(wanted, block.natoms)[:, None]
    columns["positions"] = columns["positions"] + step
    for name in [name for name in columns if name.endswith("/forces")]:
        work = np.add.reduceat((columns[name] * step).sum(axis=1), first)
        energy = name.removesuffix("forces") + "energy"
        columns[energy] = columns[energy] - np.where(np.isfinite(work), work, 0.0)
    return Block(columns, block.sources, block.unstated, block.told)


def gained(results: dict[str, Errors], args: argparse.Namespace) -> None:
    """Means over seeds, and ratios to the same source alone, seed by seed."""
    print("\n| target | labels | trained | energy | forces | energy / alone | forces / alone |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for target in args.targets:
        for size in args.sizes:
            alone = [results[f"{target}-{size}-{seed}-alone"][target] for seed in args.seeds]
            for how in ["alone", *(f"{e:g}" for e in args.exponents)]:
                cells = [target, str(size), how if how == "alone" else f"with all, exponent {how}"]
                own = [results[f"{target}-{size}-{seed}-{how}"][target] for seed in args.seeds]
                cells += [spread([1000 * r[f"{kind}_mae"] for r in own]) for kind in ("energy", "forces")]
                for kind in ("energy", "forces"):
                    cells.append(spread([r[f"{kind}_mae"] / a[f"{kind}_mae"] for r, a in zip(own, alone, strict=True)]))
                print(f"| {' | '.join(cells)} |")
            zero = [1000 * fmean(r[f"zero_{kind}_mae"] for r in alone) for kind in ("energy", "forces")]
            print(f"| {target} | {size} | references, zero forces | {zero[0]:.4g} | {zero[1]:.4g} | | |")


def lost(results: dict[str, Errors], args: argparse.Namespace) -> None:
    """Errors of all sources, energies and forces, by the exponent."""
    for target in args.targets:
        for size in args.sizes:
            tasks = list(results[f"{target}-{size}-{args.seeds[0]}-{args.exponents[0]:g}"])
            print(
                f"\n{size} of {target}: energy (meV/atom) and forces (meV/angstrom) of all sources, by the exponent\n"
            )
            print(f"| source | {' | '.join(f'{e:g}' for e in args.exponents)} |\n|---|{'---|' * len(args.exponents)}")
            for task in tasks:
                cells = []
                for exponent in args.exponents:
                    rows = [results[f"{target}-{size}-{seed}-{exponent:g}"][task] for seed in args.seeds]
                    cells.append(
                        " and ".join(spread([1000 * r[f"{k}_mae"] for r in rows]) for k in ("energy", "forces"))
                    )
                print(f"| {task} | {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
