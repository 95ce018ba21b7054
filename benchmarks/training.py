"""How fast a training step is, beside the plain published form and beside what the machine can do.

    python benchmarks/training.py --molecules STORE --crystals STORE [--threads 1 2] [--widths 866 128] [--short]

Both forms are trained by the same trainer (objective, AdamW, clipping, moving average) on the same batches, in turns;
medians are taken over the turns. The plain form (`plain.py`) is always eager float32. Printed are

    edges/s     edges of the batches within the cutoff, none left out, per second
    ratio       plain step / our step, of the same batch, in the same run; of bf16 too the plain step is float32
    of limit    arithmetic that remains (matrix products of our form, unpadded, x 3 for the backward pass) per second,
                by the rate of a 4096-cubed matrix product in the same precision, threads and run

Peak memory and start-up are those of fresh processes. Rows of results.json are replaced by name and machine (model of
the processor, its instructions, threads), so that parts can be run one by one. `--short` prints small models only and
fails where a ratio is far below what it should be. `--clock processor` is for one thread on a machine that has other
work to do: it counts the time that the thread was running, and such rows are rows of their own, as are those of
`--keep-memory`: a run keeps what a step frees (`training/heap.py`), the published form does not; with it both do.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from results import keep, machine, row, shown
from timed import (
    CUTOFF,
    Clock,
    Times,
    batches_of,
    in_turns,
    now,
    potential_of,
    ratio,
    source_of,
    trainer_of,
    with_plain_encoder,
)

from multifid.feed.loader import Source, ahead, collate
from multifid.graphs.batch import Batch
from multifid.model.potential import Potential
from multifid.training.heap import keep_freed_memory

PHASES = ("forward", "backward", "optimizer")
LEAST_RATIO = 1.2  # --short: well below what was measured (docs/performance.md)
PARTS = ("step", "painn", "conservative", "prediction", "waiting", "memory", "start")


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
    """Floating-point operations per second of a square matrix product, the second of two."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
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


class Comparison:
    """Batches of one store on one device with one number of threads, and rows about them."""

    def __init__(self, name: str, source: Source, threads: int, args: argparse.Namespace) -> None:
        self.name, self.args, self.device = name, args, torch.device(args.device)
        self.machine = machine(self.device, threads, Clock.name)
        self.batches = [b.to(self.device, torch.float32) for b in batches_of(source, args.batch, args.turns)]

    def rate(self, label: str, unit: str, times: list[Times], part: str, **of: float | None) -> dict:
        """How many structures or atoms were done per second, and edges with them."""
        counts = [{"structures/s": b.structures, "atoms/s": len(b.numbers)}[unit] for b in self.batches]
        edges = [b.edges.shape[1] for b in self.batches]
        per_second, edge_rate = (
            statistics.median(n / t[part] for n, t in zip(many, times, strict=False)) for many in (counts, edges)
        )
        return row(f"{self.name} {label}", per_second, unit, self.machine, edges=edge_rate, **of)

    def steps(self, width: int, precisions: list[str], encoder: str = "egnn") -> Iterator[dict]:
        """Training steps of both forms, and the matrix products that they could be as fast as."""
        potential = potential_of(width, encoder)
        trainers = {"plain": trainer_of(with_plain_encoder(potential), "fp32", self.device)}
        trainers |= {precision: trainer_of(potential, precision, self.device) for precision in precisions}
        forms = {form: trainer.timed_step for form, trainer in trainers.items()}
        limits = {p: [matmul_rate(p, self.device) for _ in range(3)] for p in precisions}
        times = in_turns(forms, self.batches, self.args.seconds)
        limit_of = {
            p: statistics.median([*limits[p], *(matmul_rate(p, self.device) for _ in range(3))]) for p in limits
        }
        size = f"4x{width}" if encoder == "egnn" else f"{encoder} 4x{width}"
        label = f"{size} fp32, step of the plain form in float32"
        yield self.rate(label, "structures/s", times["plain"], "step", ratio=1.0)
        done = [arithmetic(potential, batch) for batch in self.batches]
        for p in precisions:
            of_limit = statistics.median(n / t["step"] for n, t in zip(done, times[p], strict=False)) / limit_of[p]
            ratios = {part: ratio(times["plain"], times[p], part) for part in ("step", *PHASES)}
            label = f"{size} {p}, step"
            yield self.rate(label, "structures/s", times[p], "step", ratio=ratios["step"], fraction=of_limit)
            for phase in PHASES:
                milliseconds = 1000 * statistics.median(t[phase] for t in times[p])
                yield row(f"{self.name} {size} {p}, {phase}", milliseconds, "ms", self.machine, ratio=ratios[phase])
            yield row(f"{self.name} {size} {p}, arithmetic of a step", done[0] / 1e9, "Gflop", self.machine)
            product = f"{self.name} {size} {p}, product of 4096-cubed matrices"
            yield row(product, limit_of[p] / 1e9, "Gflop/s", self.machine, fraction=1.0)

    def conservative(self) -> Iterator[dict]:
        """Steps with forces that are minus the gradient of the energy, beside those of a head, in both forms."""
        forms = {}
        for forces in ("direct", "conservative"):
            potential = potential_of(64, forces=forces, layers=3)
            forms[forces, "plain"] = trainer_of(with_plain_encoder(potential), "fp32", self.device).timed_step
            forms[forces, "ours"] = trainer_of(potential, "fp32", self.device).timed_step
        times = in_turns(forms, self.batches, self.args.seconds)
        for forces in ("direct", "conservative"):
            plain, ours = times[forces, "plain"], times[forces, "ours"]
            label = f"3x64 fp32 {forces}, step"
            yield self.rate(f"{label} of the plain form", "structures/s", plain, "step", ratio=1.0)
            yield self.rate(label, "structures/s", ours, "step", ratio=ratio(plain, ours, "step"))
        for form, of in (("plain", ", plain form"), ("ours", "")):
            value = ratio(times["conservative", form], times["direct", form], "step")
            yield row(f"{self.name} 3x64 fp32, conservative / direct step{of}", value, "times", self.machine)

    def prediction(self, width: int, precisions: list[str]) -> Iterator[dict]:
        """Energies and forces of a head without anything kept for gradients."""
        potential = potential_of(width)
        forms = {"plain": trainer_of(with_plain_encoder(potential), "fp32", self.device).timed_prediction}
        forms |= {p: trainer_of(potential, p, self.device).timed_prediction for p in precisions}
        times = in_turns(forms, self.batches, self.args.seconds)
        part = "prediction"
        yield self.rate(f"4x{width} fp32, prediction of the plain form", "atoms/s", times["plain"], part, ratio=1.0)
        for p in precisions:
            of = {"ratio": ratio(times["plain"], times[p], part)}
            yield self.rate(f"4x{width} {p}, prediction", "atoms/s", times[p], part, **of)


def waiting(source: Source, width: int, threads: int, args: argparse.Namespace) -> dict:
    """The share of the time that a run waits for its next batch, prepared by one thread ahead."""
    device = torch.device(args.device)
    trainer = trainer_of(potential_of(width), "fp32", device)
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
    return row(f"4x{width} fp32, waiting for data", share, "% of the time", machine(device, threads, Clock.name))


def in_fresh_process(what: str, form: str, threads: int, args: argparse.Namespace) -> float:
    """`memory`: peak resident bytes that a step of batch 128 adds; `start`: seconds until the first step is done."""
    command = [sys.executable, __file__, "--child", what, "--form", form, "--molecules", args.molecules]
    started = time.perf_counter()
    out = subprocess.run([*command, "--threads", str(threads)], check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1]) if what == "memory" else time.perf_counter() - started


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads[0])
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


def measured(threads: int, args: argparse.Namespace) -> Iterator[dict]:
    """All rows that are asked for, with one number of threads."""
    torch.set_num_threads(threads)
    stores = {n: source_of(s) for n, s in (("molecules", args.molecules), ("crystals", args.crystals)) if s}
    here = machine(torch.device(args.device), threads, Clock.name)
    if "step" in args.only:
        for name, source in stores.items():
            for width in args.widths:
                yield from Comparison(name, source, threads, args).steps(width, args.precisions)
        yield row("copy", copy_rate(torch.device(args.device)) / 1e9, "GB/s", here)
    if "molecules" not in stores:
        return
    molecules = Comparison("molecules", stores["molecules"], threads, args)
    if "painn" in args.only:
        yield from molecules.steps(128, ["fp32"], "painn")
    if "conservative" in args.only:
        yield from molecules.conservative()
    if "prediction" in args.only:
        yield from molecules.prediction(128, args.precisions)
    if "waiting" in args.only:
        yield waiting(stores["molecules"], 128, threads, args)
    if "memory" in args.only:
        peaks = {form: in_fresh_process("memory", form, threads, args) for form in ("plain", "ours", "recompute")}
        for form, most in peaks.items():
            name = f"4x866 fp32, batch 128: peak memory of a step, {form}"
            yield row(name, most / 2**30, "GiB", here, ratio=peaks["plain"] / most)
    if "start" in args.only:
        yield row("4x128, import to first step", in_fresh_process("start", "ours", threads, args), "s", here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecules", help="store of molecules")
    parser.add_argument("--crystals", help="store of crystals")
    parser.add_argument("--widths", type=int, nargs="+", default=[866, 128])
    parser.add_argument("--precisions", nargs="+", default=None, help="fp32 bf16; bf16 only where it is fast")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9, help="batches")
    parser.add_argument(
        "--seconds", type=float, default=60, help="begin no further turn after these, from the fourth on"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=None, help="one after the other; 1, and 2 if there are"
    )
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: of one thread only")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory stays with the process, in both forms")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="which figures")
    parser.add_argument("--short", action="store_true", help="small models; fails where a ratio is far too small")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    if args.threads is None:
        two = args.device == "cpu" and args.clock == "wall" and (os.cpu_count() or 1) > 1
        args.threads = [1, 2] if two else [1]
    if args.clock == "processor" and args.threads != [1]:
        parser.error("--clock processor adds up the times of threads: give it --threads 1")
    Clock.use(args.clock)
    if args.keep_memory and keep_freed_memory():
        Clock.name += ", memory kept"
    if args.precisions is None:
        fast = args.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        args.precisions = ["fp32", "bf16"] if fast else ["fp32"]
    if args.short:
        args.widths, args.precisions, args.only, args.threads = [128], ["fp32"], ["step"], args.threads[:1]
    for threads in args.threads:
        rows = list(shown(measured(threads, args)))
        if args.short:
            slow = [r["name"] for r in rows if r["name"].endswith("step") and r["ratio_to_plain"] < LEAST_RATIO]
            sys.exit(f"slower than it should be: {', '.join(slow)}" if slow else 0)
        keep(rows, args.out)


if __name__ == "__main__":
    main()
