"""All encoders on the same data: errors after the same steps, and after the same seconds of the processor.

    OMP_NUM_THREADS=1 python benchmarks/encoders.py STORE... [--seconds 300] [--encoders egnn painn] [--out FILE.json]

Each encoder is trained once, in a process of its own, on all stores at once, with default keys, the same seed and the
same learning rate, constant with a moving average of weights. Validations are not counted as seconds. The error is that
of the last validation within the seconds; that at the same steps is the one at the last step that all have reached.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXTRA: dict[str, dict[str, object]] = {"egnn with tensors": {"name": "egnn", "tensors": 8}}
EVERY = 20  # steps between validations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--encoders", nargs="+", help="all without")
    parser.add_argument("--forces", choices=["direct", "conservative"], default="conservative")
    parser.add_argument("--out", type=Path, default=Path("encoders.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(args)))
        return
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.encoders or every():
        if name not in known:
            command = [sys.executable, __file__, *map(str, args.stores), "--one", name, "--forces", args.forces]
            done = subprocess.run([*command, "--seconds", str(args.seconds)], check=True, stdout=subprocess.PIPE)
            known[name] = json.loads(done.stdout.splitlines()[-1])
            args.out.write_text(json.dumps(known, indent=1) + "\n")
    print(table(known))


def every() -> list[str]:
    from multifid.model.encoders import ENCODERS

    return [*ENCODERS, *EXTRA]


def train(args: argparse.Namespace) -> dict:
    """Train one encoder: its parameters, and steps, seconds and errors at every validation."""
    import multifid

    used, since, rows = [0.0], [time.process_time()], []

    def note(of_tasks: list[dict]) -> str | bool:
        """The time since the last call is of training, or of a validation where that is what is told."""
        now = time.process_time()
        if of_tasks[0]["split"] != "validation":
            used[0] += now - since[0]
        else:
            errors = {row["task"]: {k: row[k] for k in ("energy_mae", "forces_mae")} for row in of_tasks}
            rows.append(
                {
                    "step": of_tasks[0]["step"],
                    "seconds": used[0],
                    "objective": of_tasks[0]["objective"],
                    "tasks": errors,
                }
            )
        since[0] = time.process_time()
        return "the seconds are used" if used[0] > args.seconds else False

    encoder = EXTRA.get(args.one, {"name": args.one}) | {"layers": 3, "hidden": 64}
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "run": f"{folder}/run",
            "tasks": {store.name: {"store": str(store.resolve())} for store in args.stores},
            "model": {"cutoff": 4.5, "encoder": encoder, "branch": {"hidden": [64, 64], "forces": args.forces}},
            "train": {"lr": 3e-3, "schedule": "constant", "warmup": 20, "ema": 0.98, "batch": 8, "log_every": EVERY},
        }
        config["train"] |= {"epoch_steps": EVERY, "steps": 100_000, "patience": None, "workers": 0}
        result = multifid.train(config, callbacks=[note])
        about = json.loads((Path(result.run) / "model.safetensors").read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}")
    parameters = sum(size(v["shape"]) for k, v in about.items() if k.startswith("encoder."))
    return {"encoder": encoder, "parameters": parameters, "rows": rows}


def size(shape: list[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def table(known: dict) -> str:
    """Markdown, best first by the objective after the same seconds."""
    common = min(of["rows"][-1]["step"] for of in known.values())
    tasks = list(next(iter(known.values()))["rows"][0]["tasks"])
    columns = [f"{task}, {what}" for task in tasks for what in ("meV/atom", "meV/angstrom")]
    heads = ["encoder", "parameters", "steps", "objective", *columns, f"objective at step {common}"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, of in sorted(known.items(), key=lambda item: item[1]["rows"][-1]["objective"]):
        last = of["rows"][-1]
        errors = [f"{1e3 * last['tasks'][t][k]:.0f}" for t in tasks for k in ("energy_mae", "forces_mae")]
        then = next(row["objective"] for row in of["rows"] if row["step"] >= common)
        cells = [name, str(of["parameters"]), str(last["step"]), f"{last['objective']:.3f}", *errors, f"{then:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
