"""How accurate a small model is after a fixed number of steps, by `train.precision`: same seeds, weights and batches.

    python benchmarks/precision.py STORE --steps 300 --width 64 --seeds 0 1 2

A table of the last validation row of each run (of the averaged weights): energies in meV/atom, forces in meV/angstrom.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from multifid.config import parse_config
from multifid.training.journal import read_journal
from multifid.training.run import train


def errors(args: argparse.Namespace, precision: str, seed: int) -> tuple[float, float]:
    """Energy and force error of a run on the validation split."""
    label_set = next(iter(json.loads((args.store / "manifest.json").read_text())["tasks"]))
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "run": f"{folder}/run",
            "seed": seed,
            "tasks": {"task": {"store": str(args.store), "labels": label_set}},
            "model": {
                "cutoff": args.cutoff,
                "encoder": {"name": args.encoder, "layers": args.layers, "hidden": args.width},
                "branch": {"hidden": [args.width] * 2, "forces": args.forces},
            },
            "train": {
                "precision": precision, "steps": args.steps, "epoch_steps": args.steps, "batch": args.batch,
                "lr": 2e-3, "warmup": args.steps // 20, "ema": 0.99,
            },
        }  # fmt: skip
        run = train(parse_config(values, "benchmarks/precision.py"), Console(quiet=True)).run
        last = [row for row in read_journal(run) if row["split"] == "validation"][-1]
    return 1000 * last["energy_mae"], 1000 * last["forces_mae"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--encoder", default="egnn")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--forces", default="direct")
    parser.add_argument("--cutoff", type=float, default=4.0)
    args = parser.parse_args()
    print(f"{'':10}" + "".join(f"{f'seed {seed}':>20}" for seed in args.seeds) + f"{'mean':>20}")
    for precision in args.precisions:
        rows = [errors(args, precision, seed) for seed in args.seeds]
        rows.append((statistics.mean(e for e, _ in rows), statistics.mean(f for _, f in rows)))
        print(f"{precision:10}" + "".join(f"{f'{e:.2f} / {f:.1f}':>20}" for e, f in rows), flush=True)


if __name__ == "__main__":
    main()
