"""Everything that waits for a GPU, in one command of at most eight minutes on one card.

    python benchmarks/gpu.py [--store STORE] [--minutes 8] [--only PART ...]
    python benchmarks/gpu.py --device cpu --tiny        that this command itself works, where there is no GPU

Runs the parts below one after the other, each in a process of its own with a time limit, so that one that fails or
hangs takes none of the others along; what a part has found when it is stopped is kept. Writes results-gpu.json beside
this file, with what was skipped and why, and the same as a table, results-gpu.md. Its status is 1 where a part failed.

    kernels        tests/gpu/test_kernels.py on the card: kernels against torch
    rates          products of 4096-cubed matrices in each precision, and copies
    steps-128      training steps of EGNN 4x128: plain form, torch, kernels; fp32, tf32, bf16; of the rate of products
    steps-866      the same of 4x866
    conservative   steps with forces that are minus the gradient of the energy, 3x64, beside direct ones
    painn          steps of PaiNN 4x128, direct and conservative
    captured       forward and backward pass of a padded batch as one CUDA graph, and whether its gradients are right
    compiled       the same by torch.compile, with and without CUDA graphs
    memory         the fullest moment of a step, beside what `multifid plan` says
    lists          neighbour lists on the card and on the host
    profile        operations that take most of a step
    tests          all other tests of tests/gpu on the card, as many as there is time for

Without a store, molecules of 9 to 26 atoms at random places with the density of molecules are made: as many edges, no
chemistry.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_parts
import torch
from results import machine

HERE = Path(__file__).parent
LIMITS = {  # seconds, at most; a part that needs less leaves its time to the others
    "kernels": 120,
    "rates": 25,
    "steps-128": 75,
    "steps-866": 75,
    "conservative": 60,
    "painn": 60,
    "captured": 60,
    "memory": 40,
    "lists": 45,
    "profile": 40,
    "compiled": 120,
    "tests": 240,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="store of molecules; without one, random ones")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="narrow models and few structures: does it work?")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--out", type=Path, default=HERE / "results-gpu.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        for found in gpu_parts.PARTS[args.part](args):
            print("ROW " + json.dumps(found), flush=True)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here; --device cpu --tiny tests this command without one")
    ends, report = time.monotonic() + 60 * args.minutes, about(args)
    for part in args.only:
        report["parts"][part] = outcome = run(part, args, min(LIMITS[part], ends - time.monotonic()))
        print(f"{part}: {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
        # After every part: what stops this command loses no more than the part under way.
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))
    failed = [part for part, outcome in report["parts"].items() if outcome["status"] != "done"]
    sys.exit(f"not done: {', '.join(failed)}" if failed else 0)


def about(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    report = {"machine": machine(device, torch.get_num_threads(), "wall"), "parts": {}}
    report["data"] = args.store or "random molecules"
    report["tiny"] = args.tiny
    for name in ("triton", "nvalchemiops"):
        report[name] = gpu_parts.version(name)
    return report


def run(part: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One part in a process of its own: its rows, how it ended, and the end of what it said where it failed."""
    if limit < 10:
        return {"status": "no time left", "seconds": 0.0, "rows": []}
    command = [sys.executable, str(HERE / "gpu.py"), "--part", part, "--device", args.device]
    command += ["--store", args.store] if args.store else []
    command += ["--tiny"] if args.tiny else []
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parent)
    try:
        said, _ = child.communicate(timeout=limit)
        status = "done" if child.returncode == 0 else f"failed ({child.returncode})"
    except subprocess.TimeoutExpired:
        child.kill()
        said, _ = child.communicate()
        status = f"stopped after {limit:.0f} s"
    lines = said.splitlines()
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    if any(row.get("failed") for row in rows) and status == "done":
        status = "failed (see its rows)"
    outcome = {"status": status, "seconds": time.monotonic() - started, "rows": rows}
    if status != "done":
        outcome["output"] = [line for line in lines if not line.startswith("ROW ")][-40:]
    return outcome


def as_markdown(report: dict[str, Any]) -> str:
    """A table for each part; a row that was skipped says why."""
    text = [f"# {report['machine']}", "", f"Data: {report['data']}. triton {report['triton']}, "
            f"nvalchemi-toolkit-ops {report['nvalchemiops']}."]  # fmt: skip
    for part, outcome in report["parts"].items():
        text += ["", f"## {part}: {outcome['status']}, {outcome['seconds']:.0f} s", ""]
        if outcome["rows"]:
            text += ["| | | | ratio | of products' rate |", "|---|---:|---|---:|---:|"]
        for row in outcome["rows"]:
            value = "" if row["value"] is None else f"{row['value']:.4g}"
            ratio, fraction = ("" if row.get(k) is None else f"{row[k]:.2f}" for k in ("ratio", "fraction"))
            note = "; ".join(str(row[k]) for k in ("unit", "skipped", "failed") if row.get(k))
            text.append(f"| {row['name']} | {value} | {note} | {ratio} | {fraction} |")
        text += ["", "```", *outcome["output"], "```"] if outcome.get("output") else []
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
