"""How long another config takes to the validation value that a config ends with.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py REFERENCE.yaml FAST.yaml [--seeds 0 1 2] [--out runs/accuracy]

Every seed is a pair of whole commands `multifid train`, one after the other: start, loading, training, validation and
writing are all in the time. The value is the objective of REFERENCE over the validation splits, with the weights of
its tasks; both configs must have the same objective, because losses of different kinds cannot be compared. A run that
is already in OUT is not made again.

    value      at the end of either run
    wall, cpu  seconds of the whole command, and of the processor in it, which other work hardly stretches
    reached    steps of FAST at the end of its first epoch whose value is at most the last one of REFERENCE
    until      seconds of the clock from the start of the command FAST to that
    ratios     FAST to REFERENCE: until that, and of the whole commands
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from multifid.config import Config, load_config

TIMES = "times.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("fast", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    args = parser.parse_args()

    reference, fast = load_config(args.reference), load_config(args.fast)
    if reference.objective != fast.objective or set(reference.tasks) != set(fast.tasks):
        raise SystemExit(f"{args.reference} and {args.fast} must have the same objective and the same tasks")
    print("| seed | value | wall | cpu | value, fast | wall | cpu | reached | until | ratio | whole wall | whole cpu |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        runs = [train(path, seed, args.out) for path in (args.reference, args.fast)]
        print(row(seed, reference, *runs), flush=True)


def train(config: Path, seed: int, out: Path) -> Path:
    """Train one config with a seed, unless that has been done, and note the seconds beside what it wrote."""
    run = out / f"{config.stem}-{seed}"
    if not (run / TIMES).exists():
        if run.exists():
            raise SystemExit(f"{run}: not complete, and its time is not known; delete it")
        started, used = time.perf_counter(), processor()
        command = [sys.executable, "-m", "multifid", "train", str(config), f"run={run}", f"seed={seed}"]
        subprocess.run(
            command, check=True, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        )
        times = {"wall": time.perf_counter() - started, "processor": processor() - used}
        (run / TIMES).write_text(json.dumps(times), encoding="utf-8")
    return run


def processor() -> float:
    """Seconds that ended children have used, user and system."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def curve(run: Path, reference: Config) -> list[tuple[int, float, float]]:
    """(step, value, seconds of training) at the end of every epoch; the value with the weights of the reference."""
    values: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        r = json.loads(line)
        if r["split"] == "validation":
            values[r["step"]] = values.get(r["step"], 0.0) + reference.tasks[r["task"]].weight * r["loss"]
            seconds[r["step"]] = r["seconds"]
    return [(step, values[step], seconds[step]) for step in sorted(values)]


def row(seed: int, reference: Config, slow: Path, fast: Path) -> str:
    cells, times = [str(seed)], []
    for run in (slow, fast):
        t = json.loads((run / TIMES).read_text(encoding="utf-8"))
        times.append(t)
        cells += [f"{curve(run, reference)[-1][1]:.4f}", f"{t['wall']:.0f}", f"{t['processor']:.0f}"]
    goal, epochs = curve(slow, reference)[-1][1], curve(fast, reference)
    step, at = next(((step, seconds) for step, value, seconds in epochs if value <= goal), (0, float("nan")))
    until = times[1]["wall"] - (epochs[-1][2] - at)  # the start of the command included, what followed not
    cells += [str(step) if step else "never", f"{until:.0f}", f"{until / times[0]['wall']:.2f}"]
    cells += [f"{times[1][kind] / times[0][kind]:.2f}" for kind in ("wall", "processor")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
