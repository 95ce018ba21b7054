"""How fast a training step is, beside the plain published form and beside what the machine can do.

    python benchmarks/training.py --molecules STORE --crystals STORE [--widths 866 128] [--short]

Both forms are trained by the same trainer (objective, AdamW, clipping, moving average) on the same batches, in turns;
medians are taken over the turns. The plain form (`plain.py`) is always eager float32. Printed are

    ratio       plain step / our step, of the same batch, in the same run
    of limit    arithmetic that remains (matrix products of our form, unpadded, x 3 for the backward pass) per second,
                by the rate of a 4096-cubed matrix product in the same precision, threads and run

Peak memory and start-up are those of fresh processes. Rows of results.json are replaced by name, so that parts can be
run one by one. `--short` prints small models only and fails where a ratio is far below what it should be.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from plain import PLAIN

from multifid.feed.loader import Source, TaskConfig, ahead, collate, open_sources
from multifid.graphs.batch import Batch
from multifid.model.branch import BranchConfig
from multifid.model.potential import ModelConfig, Potential
from multifid.parallel.gradients import Gradients, ModelPart
from multifid.parallel.groups import alone
from multifid.training.loss import ObjectiveConfig
from multifid.training.optimizer import MovingAverage, Schedule, adamw
from multifid.training.step import Task, Totals, Trainer

HEADS = {866: 889}  # the paper's widths; otherwise the heads are as wide as the encoder
PHASES = ("forward", "backward", "optimizer")
LEAST_RATIO = 1.2  # --short: well below what was measured (docs/performance.md)
CUTOFF = 5.0


class Timed(Trainer):
    """A trainer that knows how long the last forward pass and update took."""

    def _sums(self, batch, totals):
        started = now(self.device)
        sums = super()._sums(batch, totals)
        self.forward = now(self.device) - started
        return sums

    def _update(self, norm):
        started = now(self.device)
        super()._update(norm)
        self.update = now(self.device) - started

    def timed_step(self, batch: Batch) -> dict[str, float]:
        started = now(self.device)
        self.step([batch], Totals([t.name for t in self.tasks], self.device))
        step = now(self.device) - started
        backward = step - self.forward - self.update  # and the sums around it
        return {"step": step, "forward": self.forward, "backward": backward, "optimizer": self.update}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def potential_of(width: int, encoder: str = "egnn", forces: str = "direct") -> Potential:
    heads = HEADS.get(width, width)
    config = ModelConfig(
        cutoff=CUTOFF,
        encoder={"name": encoder, "layers": 4, "hidden": width},
        branch=BranchConfig(hidden=[heads] * 3, forces=forces),
    )
    return Potential(config, ["task"], {"task": "task"}, seed=0).train()


def trainer_of(potential: Potential, precision: str, device: torch.device) -> Timed:
    """One task, one process, the defaults of a run."""
    world = alone()
    potential = potential.to(device)
    parameters = dict(potential.named_parameters())
    parts = [("branch-task", potential.branch_parameters("task")), ("encoder", potential.encoder_parameters())]
    return Timed(
        potential=potential,
        parameters=parameters,
        gradients=Gradients([ModelPart(name, [p for _, p in of], world.group) for name, of in parts]),
        optimizer=adamw(parameters, 1e-3, 0.01),
        schedule=Schedule("constant", 100, 1000),
        average=MovingAverage(parameters, 0.999),
        objective=ObjectiveConfig(),
        tasks=[Task("task", 1.0, 1.0)],
        world=world.group,
        device=device,
        precision=precision,
        clip=10.0,
        lr=1e-3,
    )


def with_plain_encoder(potential: Potential) -> Potential:
    plain = copy.deepcopy(potential)
    plain.encoder = PLAIN[plain.config.encoder.name](plain.encoder)
    return plain


def batches_of(source: Source, structures: int, count: int) -> list[Batch]:
    """Batches of structures drawn at random from the training split."""
    index, rng = np.asarray(source.store.index("train")).astype(np.int64), np.random.default_rng(0)
    drawn = [rng.choice(index, structures, replace=len(index) < structures) for _ in range(count)]
    return [collate([(source, chosen)], CUTOFF) for chosen in drawn]


def arithmetic(potential: Potential, batch: Batch) -> float:
    """Floating-point operations of the matrix products of a step: 2 per entry and row forward, twice that backward."""
    atoms, edges, total = len(batch.numbers), batch.edges.shape[1], 0.0
    for name, module in potential.named_modules():
        if isinstance(module, torch.nn.Linear):
            on_edges = any(part in name for part in (".pair", ".angle", ".message", ".gate", ".move", ".filter"))
            rows = edges if on_edges else 3 * atoms if ".mix" in name else atoms
            total += 6.0 * module.weight.numel() * rows
    return total


def matmul_rate(precision: str, device: torch.device, size: int = 4096) -> float:
    """Floating-point operations per second of a square matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    started = now(device)
    torch.mm(a, b)
    return 2.0 * size**3 / (now(device) - started)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 256 MiB."""
    a = torch.ones(1 << 26, device=device)
    b = torch.empty_like(a)
    times = []
    for _ in range(5):
        started = now(device)
        b.copy_(a)
        times.append(now(device) - started)
    return 2 * a.nbytes / statistics.median(times)


def compare(
    name: str, source: Source, width: int, precision: str, args: argparse.Namespace, encoder: str = "egnn"
) -> list[dict]:
    """Steps of both forms in turns, and the matrix product between them."""
    device, rows = torch.device(args.device), []
    batches = [b.to(device, torch.float32) for b in batches_of(source, args.batch, args.turns)]
    potential = potential_of(width, encoder)
    plain = trainer_of(with_plain_encoder(potential), "fp32", device)
    ours = trainer_of(potential, precision, device)
    done = arithmetic(potential, batches[0])
    for trainer in (plain, ours):
        trainer.timed_step(batches[0])
    matmul_rate(precision, device)
    times = {"plain": [], "ours": []}
    rates = []
    for batch in batches:
        times["plain"].append(plain.timed_step(batch))
        times["ours"].append(ours.timed_step(batch))
        rates.append((matmul_rate(precision, device), arithmetic(potential, batch)))
    ratios = {p: statistics.median(a[p] / b[p] for a, b in zip(*times.values(), strict=True)) for p in times["ours"][0]}
    steps = [t["step"] for t in times["ours"]]
    limit = statistics.median(rate for rate, _ in rates)
    fraction = statistics.median(work / s for (_, work), s in zip(rates, steps, strict=True)) / limit
    label = f"{name} 4x{width} {precision}" if encoder == "egnn" else f"{name} {encoder} 4x{width} {precision}"
    rate = args.batch / statistics.median(steps)
    rows.append(row(f"{label}, step", rate, "structures/s", ratios["step"], fraction, args))
    plain_rate = args.batch / statistics.median(t["step"] for t in times["plain"])
    rows.append(row(f"{label}, step of the plain form in float32", plain_rate, "structures/s", 1.0, None, args))
    for phase in PHASES:
        median = statistics.median(t[phase] for t in times["ours"])
        rows.append(row(f"{label}, {phase}", 1000 * median, "ms", ratios[phase], None, args))
    rows.append(row(f"{label}, arithmetic of a step", done / 1e9, "Gflop", None, None, args))
    rows.append(row(f"{label}, product of 4096-cubed matrices", limit / 1e9, "Gflop/s", None, 1.0, args))
    return rows


def waiting(source: Source, width: int, args: argparse.Namespace) -> dict:
    """The share of the time that a run waits for its next batch, prepared by one thread ahead."""
    trainer = trainer_of(potential_of(width), "fp32", torch.device(args.device))
    index, rng = np.asarray(source.store.index("train")).astype(np.int64), np.random.default_rng(1)
    chosen = [rng.choice(index, args.batch) for _ in range(20)]
    steps, waited = ahead(lambda k: collate([(source, chosen[k])], CUTOFF), 0, len(chosen), 1), 0.0
    trainer.timed_step(next(steps))
    started = time.perf_counter()
    for _ in chosen[1:]:
        asked = time.perf_counter()
        batch = next(steps)
        waited += time.perf_counter() - asked
        trainer.timed_step(batch)
    share = 100 * waited / (time.perf_counter() - started)
    return row(f"4x{width} fp32, waiting for data", share, "% of the time", None, None, args)


def in_fresh_process(what: str, form: str, args: argparse.Namespace) -> float:
    """`memory`: peak resident bytes that a step of batch 128 adds; `start`: seconds until the first step is done."""
    command = [sys.executable, __file__, "--child", what, "--form", form, "--molecules", args.molecules]
    started = time.perf_counter()
    out = subprocess.run([*command, "--threads", str(args.threads)], check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1]) if what == "memory" else time.perf_counter() - started


def child(args: argparse.Namespace) -> None:
    width, size = (866, 128) if args.child == "memory" else (128, 32)
    batch = batches_of(source_of(args.molecules), size, 1)[0].to(dtype=torch.float32)
    potential = potential_of(width)
    potential = with_plain_encoder(potential) if args.form == "plain" else potential
    potential.encoder.recompute = args.form == "recompute"
    trainer = trainer_of(potential, "fp32", torch.device("cpu"))
    before = peak()
    trainer.timed_step(batch)
    print(peak() - before)


def peak() -> int:
    """Bytes that this process has had in memory at most (what getrusage says begins with what its parent had)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def row(name, value, unit, ratio, fraction, args) -> dict:
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "ratio_to_plain": ratio,
        "fraction_of_limit": fraction,
        "machine": machine(args),
    }


def machine(args: argparse.Namespace) -> str:
    if args.device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads, torch {torch.__version__}"


def source_of(store: str) -> Source:
    """A store as one task, with the first of its label sets."""
    labels = next(iter(json.loads((Path(store) / "manifest.json").read_text())["tasks"]))
    return open_sources({"task": TaskConfig(store=store, labels=labels)})[0]


def show(rows: list[dict]) -> None:
    print(f"{'':58}{'':>10} {'':14}{'ratio':>7}{'of limit':>9}")
    for r in rows:
        ratio, fraction = (f"{r[k]:.2f}" if r[k] is not None else "" for k in ("ratio_to_plain", "fraction_of_limit"))
        print(f"{r['name']:58}{r['value']:10.4g} {r['unit']:14}{ratio:>7}{fraction:>9}", flush=True)


def keep(rows: list[dict], path: Path) -> None:
    """Put rows into a file, in place of older ones of the same name and machine."""
    old = json.loads(path.read_text()) if path.exists() else []
    names = {(r["name"], r["machine"]) for r in rows}
    path.write_text(json.dumps([r for r in old if (r["name"], r["machine"]) not in names] + rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecules", help="store of molecules")
    parser.add_argument("--crystals", help="store of crystals")
    parser.add_argument("--widths", type=int, nargs="+", default=[866, 128])
    parser.add_argument("--precisions", nargs="+", default=None, help="fp32 bf16; bf16 only where it is fast")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=["step", "waiting", "memory", "start"], help="which figures")
    parser.add_argument("--short", action="store_true", help="small models; fails where a ratio is far too small")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.precisions is None:
        fast = args.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        args.precisions = ["fp32", "bf16"] if fast else ["fp32"]
    if args.child:
        child(args)
        return
    if args.short:
        args.widths, args.precisions, args.only = [128], ["fp32"], ["step"]
    stores = {n: source_of(s) for n, s in (("molecules", args.molecules), ("crystals", args.crystals)) if s}
    rows = []
    if "step" in args.only:
        for name, source in stores.items():
            for width in args.widths:
                for precision in args.precisions:
                    rows += compare(name, source, width, precision, args)
        if "molecules" in stores and not args.short:
            rows += compare("molecules", stores["molecules"], 128, "fp32", args, encoder="painn")
        rows.append(row("copy", copy_rate(torch.device(args.device)) / 1e9, "GB/s", None, None, args))
    if "waiting" in args.only and "molecules" in stores:
        rows.append(waiting(stores["molecules"], 128, args))
    if "memory" in args.only and args.molecules:
        peaks = {form: in_fresh_process("memory", form, args) for form in ("plain", "ours", "recompute")}
        for form, most in peaks.items():
            name = f"4x866 fp32, batch 128: peak memory of a step, {form}"
            rows.append(row(name, most / 2**30, "GiB", peaks["plain"] / most, None, args))
    if "start" in args.only and args.molecules:
        rows.append(row("4x128, import to first step", in_fresh_process("start", "ours", args), "s", None, None, args))
    if args.short:
        slow = [r["name"] for r in rows if r["name"].endswith("step") and r["ratio_to_plain"] < LEAST_RATIO]
        show(rows)
        sys.exit(f"slower than it should be: {', '.join(slow)}" if slow else 0)
    show(rows)
    keep(rows, args.out)


if __name__ == "__main__":
    main()
