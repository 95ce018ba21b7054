"""Whether a search finds a better config than the one it began with, at equal processor time.

    OMP_NUM_THREADS=1 python benchmarks/tuning.py SEARCH.yaml [--kill-after 8] [--seeds 0 1 2] [--out runs/tuning]

SEARCH.yaml is a config with a `tune` section whose budget is processor_seconds; without that section it is the config
to compare with. The search is killed (SIGKILL) in the middle of the trial after so many that ended, and continued by
the same command. Then the config itself and OUT/search/best.yaml are trained with other seeds, in turns, each for the
budget of a trial by the clock of the processor, with the learning rate annealed within it. What is there already is
not made again. Validation values only: test splits are not looked at.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from multifid.config import load_config

TRIAL = [sys.executable, "-m", "multifid.workflows.tune.trial"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--kill-after", type=int, default=8, help="trials that end before the search is killed; 0: never"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
    args = parser.parse_args()
    folder = args.out / "search"
    command = [sys.executable, "-m", "multifid", "tune", str(args.config), f"run={folder}"]
    if args.kill_after and not (folder / "trials.json").exists():
        killed(command, folder, args.kill_after)
    subprocess.run(command, check=True)
    compare(args.config, folder, args.out, args.seeds)


def killed(command: list[str], folder: Path, after: int) -> None:
    """Start the search and kill it in the middle of a trial."""
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            time.sleep(1)
            trials = ended(folder)
            under_way = [p for p in folder.glob("trials/*/metrics.jsonl") if f"trials/{p.parent.name}" not in trials]
            if len(trials) >= after and any(p.stat().st_size for p in under_way):
                process.kill()
                process.wait()
                print(f"killed after {len(trials)} trials, in the middle of {under_way[-1].parent}", flush=True)


def ended(folder: Path) -> set[str]:
    """The runs of trials that have ended."""
    path = folder / "trials.json"
    trials = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {t["run"] for t in trials if t["state"] in ("complete", "pruned")}


def compare(path: Path, folder: Path, out: Path, seeds: list[int]) -> None:
    """Train both in turns, and print a line for each seed."""
    config = load_config(path)
    assert config.tune is not None and config.tune.budget.processor_seconds is not None
    budget = config.tune.budget.processor_seconds
    print(f"\nvalidation value after {budget:g} s of the processor\n\n| seed | config | steps | best.yaml | steps |")
    print("|---|---:|---:|---:|---:|")
    for seed in seeds:
        cells = [str(seed)]
        for name, source in (("config", path), ("best", folder / "best.yaml")):
            ending = trained(source, out / f"{name}-{seed}", seed, budget)
            cells += [f"{ending['best']:.4f}", f"{ending['steps']}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def trained(source: Path, run: Path, seed: int, budget: float) -> dict:
    """How a config ends that is trained for a budget of processor seconds."""
    ending = run.with_suffix(".json")
    if not ending.exists():
        values = yaml.safe_load(source.read_text(encoding="utf-8"))
        values = {k: v for k, v in values.items() if k not in ("tune", "study")} | {"run": str(run), "seed": seed}
        values["train"] = values["train"] | {"minutes": budget / 60, "steps": None}
        run.parent.mkdir(parents=True, exist_ok=True)
        run.with_suffix(".yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        with subprocess.Popen([*TRIAL, str(run.with_suffix(".yaml")), "processor_seconds"], stdin=subprocess.PIPE) as p:
            if p.wait() != 0:
                raise SystemExit(f"{run}: failed")
    return json.loads(ending.read_text(encoding="utf-8"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
