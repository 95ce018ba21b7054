"""The parts of `gpu.py`, each a generator of rows: name, value, unit, and what it is beside something else."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timed import (
    CUTOFF,
    Timed,
    batches_of,
    in_turns,
    now,
    potential_of,
    ratio,
    source_of,
    trainer_of,
    with_plain_encoder,
)
from training import arithmetic, copy_rate

from multifid.graphs.batch import Batch, Targets
from multifid.graphs.device_neighbors import device_neighbor_list
from multifid.graphs.neighbors import neighbor_list
from multifid.model.compiled import compile_training
from multifid.model.footprint import BatchSize, footprint
from multifid.model.kernels.gpu.chosen import _RIGHT, installed, use_kernels
from multifid.model.potential import Potential
from multifid.model.suite.samples import System, batch_of, system
from multifid.structures.structure import Packed
from multifid.training.recorded import CudaGraphs
from multifid.training.step import Totals, Trainer

Row = dict[str, Any]
PRECISIONS = ("fp32", "tf32", "bf16")
MOLECULES = 0.09  # atoms per cubic angstrom
TOLERANCES = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}  # of gradients, relative to their norm
PLAIN, EAGER, KERNELS = "plain form", "torch", "kernels"


def version(package: str) -> str | None:
    """Of a package that may not be installed."""
    try:
        return importlib.metadata.version({"nvalchemiops": "nvalchemi-toolkit-ops"}.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return None


def row(name: str, value: float | None, unit: str = "", **more: Any) -> Row:
    return {"name": name, "value": value, "unit": unit, **more}


def skipped(name: str, why: str) -> Row:
    return row(name, None, skipped=f"skipped: {why}")


def no_kernels(args: argparse.Namespace) -> str | None:
    """Why no kernels are run, if so."""
    if torch.device(args.device).type != "cuda":
        return "kernels of Triton are for CUDA devices"
    return None if installed() else "triton is not installed"


def random_molecules(count: int, seed: int) -> list[System]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(9, 27, count)
    return [system(int(n), spread=float(n / MOLECULES) ** (1 / 3), seed=seed + k) for k, n in enumerate(sizes)]


def batches(args: argparse.Namespace, structures: int, count: int) -> list[Batch]:
    """Of molecules, with labels, on the host."""
    if args.store:
        return batches_of(source_of(args.store), structures, count)
    return [labelled(batch_of(*random_molecules(structures, 1000 * k), cutoff=CUTOFF)) for k in range(count)]


def on_device(trainer: Timed, batch: Batch) -> Batch:
    """As a step wants it, copied ahead: it is not timed."""
    return trainer.ready(batch).to(trainer.device, torch.float32)


def labelled(batch: Batch) -> Batch:
    """All structures as those of one task, with random labels."""
    random = torch.Generator().manual_seed(0)
    (place,) = batch.slices.values()
    energy, forces = (
        torch.randn(batch.structures, generator=random),
        torch.randn(len(batch.numbers), 3, generator=random),
    )
    batch.slices, batch.targets = {"task": place}, {"task": Targets(energy.double(), forces.double(), None)}
    return batch


@contextlib.contextmanager
def settings(precision: str, kernels: bool) -> Iterator[None]:
    """Products in a precision; edges by kernels or by torch."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    before = use_kernels(kernels)
    try:
        yield
    finally:
        use_kernels(before)
        torch.set_float32_matmul_precision("highest")


def stepping(potential: Potential, form: str, precision: str, device: torch.device) -> Callable[[Batch], dict]:
    """What times a step of a form."""
    potential = with_plain_encoder(potential) if form == PLAIN else potential
    trainer, there = trainer_of(potential, precision, device), {}

    def timed(batch: Batch) -> dict[str, float]:
        if id(batch) not in there:
            there[id(batch)] = on_device(trainer, batch)
        with settings(precision, form == KERNELS):
            return trainer.timed_step(there[id(batch)])

    return timed


def product_rate(precision: str, device: torch.device, size: int) -> float:
    """Operations per second of a product of square matrices, the median of ten."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    with settings(precision, False):
        for _ in range(13):
            started = now(device)
            torch.mm(a, b)
            times.append(now(device) - started)
    return 2.0 * size**3 / statistics.median(times[3:])


def rates(args: argparse.Namespace) -> Iterator[Row]:
    device, size = torch.device(args.device), 256 if args.tiny else 4096
    for precision in PRECISIONS:
        yield row(
            f"product of {size}-cubed matrices, {precision}", product_rate(precision, device, size) / 1e12, "Tflop/s"
        )
    yield row("copy of 256 MiB", copy_rate(device) / 1e9, "GB/s")


def steps_of(args: argparse.Namespace, width: int, structures: int, label: str, **model: Any) -> Iterator[Row]:
    """Steps of every form in every precision on the same batches, by turns."""
    device = torch.device(args.device)
    these = batches(args, structures, 3 if args.tiny else 12 if structures < 100 else 4)
    potential = potential_of(width, **model)
    forms = {(PLAIN, "fp32"): stepping(potential, PLAIN, "fp32", device)}
    why = no_kernels(args)
    for precision in PRECISIONS:
        for form in (EAGER,) if why else (EAGER, KERNELS):
            forms[form, precision] = stepping(potential, form, precision, device)
    for timed in forms.values():
        timed(these[0])  # compiles
    times = in_turns(forms, these, 8.0)
    done = statistics.median(arithmetic(potential, batch) for batch in these)
    size = 256 if args.tiny else 4096
    limits = {precision: product_rate(precision, device, size) for precision in PRECISIONS}
    edges = statistics.median(batch.edges.shape[1] for batch in these)
    for (form, precision), found in times.items():
        seconds = statistics.median(t["step"] for t in found)
        yield row(
            f"{label}, {structures} structures ({edges:.0f} edges), {precision}, {form}", structures / seconds,
            "structures/s", ratio=ratio(times[PLAIN, "fp32"], found, "step"),
            fraction=done / seconds / limits[precision] if model.get("forces") != "conservative" else None,
            edges_per_second=edges / seconds, milliseconds=1000 * seconds,
        )  # fmt: skip
    yield skipped(f"{label}, {KERNELS}", why) if why else used(label)


def used(name: str) -> Row:
    """Whether kernels did what rows of this process say they did."""
    if _RIGHT and all(_RIGHT.values()):
        return row(f"{name}, {KERNELS}: as near to float64 as torch", None)
    return row(f"{name}, {KERNELS}", None, failed="torch computed edges in their place; the warning above says why")


def steps(width: int) -> Callable[[argparse.Namespace], Iterator[Row]]:
    def part(args: argparse.Namespace) -> Iterator[Row]:
        narrow = {128: 12, 866: 20}[width] if args.tiny else width
        for structures in (2,) if args.tiny else (32, 256 if width == 128 else 128):
            yield from steps_of(args, narrow, structures, f"egnn 4x{narrow} direct")

    return part


def conservative(args: argparse.Namespace) -> Iterator[Row]:
    width, structures = (12, 2) if args.tiny else (64, 64)
    found = {}
    for forces in ("direct", "conservative"):
        for r in steps_of(args, width, structures, f"egnn 3x{width} {forces}", layers=3, forces=forces):
            yield r
            if r["value"]:
                found[forces, r["name"].split("edges), ")[1]] = r["milliseconds"]
    for (forces, form), milliseconds in found.items():
        if forces == "conservative":
            yield row(f"conservative / direct step, {form}", milliseconds / found["direct", form], "times")


def painn(args: argparse.Namespace) -> Iterator[Row]:
    width, structures = (12, 2) if args.tiny else (128, 64)
    for forces in ("direct", "conservative"):
        yield from steps_of(args, width, structures, f"painn 4x{width} {forces}", encoder="painn", forces=forces)


def passes(trainer: Timed, batch: Batch) -> Callable[[], None]:
    """Forward and backward pass of a batch whose tensors stay where they are; gradients begin at zero."""
    batch = on_device(trainer, batch)
    counts = trainer.labels_of(batch.labels).to(trainer.device)
    totals = Totals([t.name for t in trainer.tasks], trainer.device)
    # What times parts of a step waits for the device, which no recorded pass may do.
    untimed = Trainer(**{field.name: getattr(trainer, field.name) for field in dataclasses.fields(Trainer)})

    def run() -> None:
        untimed.gradients.zero()
        untimed._backward(batch, counts, totals, last=True)

    return run


def gradient(trainer: Timed) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in trainer.parameters.values()])


def milliseconds(run: Callable[[], None], device: torch.device, count: int) -> float:
    times = []
    for _ in range(count):
        started = now(device)
        run()
        times.append(now(device) - started)
    return 1000 * statistics.median(times)


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def captured(args: argparse.Namespace) -> Iterator[Row]:
    """A CUDA graph of a pass of torch, and of kernels; whether it follows weights, and has the pass's gradients."""
    device = torch.device(args.device)
    width, structures = (12, 2) if args.tiny else (128, 32)
    for forces in ("direct", "conservative"):
        for precision in ("fp32", "bf16"):
            for form in (EAGER, KERNELS):
                name = f"egnn 4x{width} {forces}, {structures} structures padded, {precision}, {form}"
                if form == KERNELS and (why := no_kernels(args)):
                    yield skipped(name, why)
                    continue
                trainer = trainer_of(potential_of(width, forces=forces), precision, device)
                trainer.padded = True
                run = passes(trainer, batches(args, structures, 1)[0])
                with settings(precision, form == KERNELS):
                    try:
                        yield from captured_pass(name, trainer, run, precision, args)
                    except Exception as error:  # the others are still of use
                        yield row(name, None, failed=f"{type(error).__name__}: {str(error)[:300]}")


def captured_pass(
    name: str, trainer: Timed, run: Callable[[], None], precision: str, args: argparse.Namespace
) -> Iterator[Row]:
    device = trainer.device
    count = 2 if args.tiny else 20
    run()
    eager = milliseconds(run, device, count)
    yield row(f"{name}: forward and backward pass", eager, "ms")
    if device.type != "cuda":
        yield skipped(f"{name}: as a CUDA graph", "CUDA graphs are for CUDA devices")
        return
    replay = CudaGraphs(device)(run)
    with torch.no_grad():  # a graph must follow what the optimizer does
        for p in trainer.parameters.values():
            p.mul_(1.01)
    run()
    theirs = gradient(trainer)
    replay()
    wrong = off(gradient(trainer), theirs)
    more = {} if wrong < TOLERANCES[precision] else {"failed": f"its gradient is off by {wrong:.1e}"}
    yield row(f"{name}: as a CUDA graph", milliseconds(replay, device, count), "ms", **more)
    yield row(f"{name}: its gradient is off by", wrong, "of the norm")


def compiled(args: argparse.Namespace) -> Iterator[Row]:
    """`train.compile`."""
    device = torch.device(args.device)
    if device.type != "cuda":
        yield skipped("compiled passes", "generating C++ takes a minute; tests/test_compile.py tests them on the CPU")
        return
    for forces, how in (("direct", True), ("direct", "reduce-overhead"), ("conservative", True)):
        name = f"egnn 4x128 {forces}, 32 structures padded, bf16, train.compile: {how}"
        eager = trainer_of(potential_of(128, forces=forces), "bf16", device)
        trainer = trainer_of(potential_of(128, forces=forces), "bf16", device)
        compile_training(trainer.potential, how)
        eager.padded = trainer.padded = True
        batch = batches(args, 32, 1)[0]
        try:
            run, other = passes(trainer, batch), passes(eager, batch)
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            yield row(f"{name}: first pass", time.perf_counter() - started, "s")
            yield row(f"{name}: forward and backward pass", milliseconds(run, device, 20), "ms")
            with settings("bf16", False):
                other()
            wrong = off(gradient(trainer), gradient(eager))
            more = {} if wrong < TOLERANCES["bf16"] else {"failed": "more than rounding"}
            yield row(f"{name}: its gradient is off by", wrong, "of the norm", **more)
        except Exception as error:
            yield row(name, None, failed=f"{type(error).__name__}: {str(error)[:300]}")


def memory(args: argparse.Namespace) -> Iterator[Row]:
    """Bytes beside weights and gradients at the fullest moment of a pass, and those that `plan` reckons with."""
    device = torch.device(args.device)
    width, structures = (12, 2) if args.tiny else (866, 128)
    for forces in ("direct", "conservative"):
        potential, batch = potential_of(width, forces=forces), batches(args, structures, 1)[0]
        atoms, edges = len(batch.numbers), batch.edges.shape[1]
        told = footprint(potential.config, edges_per_atom=edges / atoms, atoms=atoms, tasks=1)
        expected = told.activations(BatchSize(1, atoms, edges=edges)) / 2**20
        name = f"egnn 4x{width} {forces}, {structures} structures, fp32"
        yield row(f"{name}: as `plan` says", expected, "MiB")
        for form in (EAGER, KERNELS):
            if device.type != "cuda":
                yield skipped(f"{name}, {form}", "only accelerators count the memory of tensors")
                continue
            if form == KERNELS and (why := no_kernels(args)):
                yield skipped(f"{name}, {form}", why)
                continue
            trainer = trainer_of(potential, "fp32", device)
            run = passes(trainer, batch)
            with settings("fp32", form == KERNELS):
                run()
                held = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                run()
            most = (torch.cuda.max_memory_allocated(device) - held) / 2**20
            yield row(f"{name}, {form}", most, "MiB", ratio=most / expected)
            del trainer, run


def lists(args: argparse.Namespace) -> Iterator[Row]:
    """Neighbour lists of a batch: on the host, and on the device, copies of what it needs included."""
    device = torch.device(args.device)
    if importlib.util.find_spec("nvalchemiops") is None:
        yield skipped("neighbour lists on the device", "nvalchemi-toolkit-ops is not installed")
        return
    structures = 4 if args.tiny else 256
    each = random_molecules(structures, 0)
    packed = Packed(
        numbers=np.concatenate([s.numbers for s in each]).astype(np.uint8),
        positions=np.concatenate([s.positions for s in each]),
        natoms=np.array([len(s.numbers) for s in each], np.int64),
        cell=np.zeros((structures, 3, 3)),
        pbc=np.zeros((structures, 3), bool),
        charge=np.zeros(structures, np.int8),
        spin=np.ones(structures, np.uint8),
    )
    edges, _ = device_neighbor_list(packed, CUTOFF, device)
    host, _ = neighbor_list(packed, CUTOFF)
    same = np.array_equal(edges.cpu().numpy(), host)
    count = 1 if args.tiny else 20
    for where, make in (("the host", lambda: neighbor_list(packed, CUTOFF)),
                        (str(device), lambda: device_neighbor_list(packed, CUTOFF, device))):  # fmt: skip
        more = {} if same else {"failed": "they are not the host's"}
        name = f"lists of {structures} molecules, {host.shape[1]} edges, on {where}"
        yield row(name, milliseconds(make, device, count), "ms", **more)


def profile(args: argparse.Namespace) -> Iterator[Row]:
    """Operations by the time that they take of the device."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    device = torch.device(args.device)
    gpu = device.type == "cuda"
    for width, structures in ((12, 2),) if args.tiny else ((128, 32), (866, 128)):
        form = EAGER if no_kernels(args) else KERNELS
        step = stepping(potential_of(width), form, "bf16", device)
        batch = batches(args, structures, 1)[0]
        for _ in range(3):
            step(batch)
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
        with profiler(activities=kinds) as seen:
            whole = step(batch)["step"]
        field = "self_device_time_total" if gpu else "self_cpu_time_total"
        events = sorted(seen.key_averages(), key=lambda e: -getattr(e, field))
        name = f"4x{width}, {structures} structures, bf16, {form}"
        yield row(f"{name}: a step that is profiled", 1000 * whole, "ms")
        busy = sum(getattr(e, field) for e in events) / 1000
        yield row(f"{name}: operations, all", busy, "ms", calls=sum(e.count for e in events))
        for event in events[:12]:
            took, calls = getattr(event, field) / 1000, event.count
            yield row(f"{name}: {event.key[:80].replace('|', ' ')}", took, f"ms, {calls} calls")


def pytest_of(*arguments: str) -> Iterator[Row]:
    """Tests one by one as they end, so that those are counted that end before the time does."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "-rs", "--tb=short", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    counts = {"PASSED": 0, "SKIPPED": 0, "FAILED": 0, "ERROR": 0}
    assert child.stdout is not None
    for line in child.stdout:
        print(line, end="", flush=True)
        word = next((w for w in counts if "::" in line and f" {w}" in line), None)
        if word is None:
            continue
        counts[word] += 1
        if word in ("FAILED", "ERROR"):
            yield row(line.split()[0], None, failed=word.lower())
        elif sum(counts.values()) % 20 == 0:
            yield row("tests so far: " + ", ".join(f"{n} {w.lower()}" for w, n in counts.items()), counts["PASSED"])
    code = child.wait()
    yield row("tests, all: " + ", ".join(f"{n} {w.lower()}" for w, n in counts.items()), counts["PASSED"],
              **({} if code == 0 else {"failed": f"pytest ended with {code}"}))  # fmt: skip


def kernels(args: argparse.Namespace) -> Iterator[Row]:
    if why := no_kernels(args):
        yield skipped("tests/gpu/test_kernels.py", why)
        return
    yield from pytest_of("tests/gpu/test_kernels.py", "-k", "first")


def tests(args: argparse.Namespace) -> Iterator[Row]:
    if torch.device(args.device).type == "cuda":
        others = "first and not compiled_and_captured"  # code is generated for these: minutes, in the part `compiled`
        yield from pytest_of("tests/gpu", "--deselect", "tests/gpu/test_kernels.py", "-k", others)
    else:
        yield from pytest_of("tests/gpu/test_step.py", "-k", "cpu and edge_vectors")


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "kernels": kernels,
    "rates": rates,
    "steps-128": steps(128),
    "steps-866": steps(866),
    "conservative": conservative,
    "painn": painn,
    "captured": captured,
    "memory": memory,
    "lists": lists,
    "profile": profile,
    "compiled": compiled,
    "tests": tests,
}
