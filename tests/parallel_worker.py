"""Processes that are started once and then work as the ranks of many small worlds, as if torchrun had started them.

The test process plays torchrun's agent: it hosts the rendezvous store and hands out the environment. A world takes the
first n processes; each job is a function of this file.
"""

import functools
import gc
import hashlib
import os
import signal
import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch.distributed import TCPStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

import multifid.training.build
from memory_worker import measured_run
from multifid.apply.predict import predict
from multifid.config import Config, parse_config
from multifid.feed.loader import open_sources
from multifid.graphs.batch import Batch
from multifid.model.potential import Potential
from multifid.parallel import groups
from multifid.parallel.gradients import Gradients
from multifid.store.store import Store
from multifid.training import checkpoint, share
from multifid.training.build import build
from multifid.training.checkpoint import load_checkpoint
from multifid.training.counts import announced
from multifid.training.feed import Feed, make_draws
from multifid.training.resolve import placement_of, resolve
from multifid.training.run import train
from multifid.training.step import Totals, Trainer
from multifid.training.task_gradients import TaskGradients, tasks_of_ranks
from multifid.training.trial import measured
from multifid.workflows.calibrate import calibrate_run
from multifid.workflows.evaluate import evaluate

HOST = "127.0.0.1"


class Pool:
    """`size` processes that wait for work."""

    def __init__(self, size: int) -> None:
        self.store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "multifid.training.run", "parallel_worker"])
        self.context = context
        self.pipes, self.processes = map(list, zip(*(self._start() for _ in range(size)), strict=True))
        self.cases = 0

    def _start(self):
        here, there = self.context.Pipe()
        process = self.context.Process(target=work, args=(there, self.store.port), daemon=True)
        process.start()
        there.close()  # so that a death is the end of the pipe
        return here, process

    def run(self, ranks: int, job: str, *arguments):
        """What the job returns on each rank; RuntimeError with the traceback where one raised."""
        self.begin(ranks, job, *arguments)
        answers = [self._answer(rank) for rank in range(ranks)]
        if failed := [text for ok, text in answers if not ok]:
            raise RuntimeError("\n".join(failed))
        return [answer for _, answer in answers]

    def _answer(self, rank: int) -> tuple:
        """What a process says; where one has died, a new one takes its place for the tests that follow."""
        try:
            return self.pipes[rank].recv()
        except (EOFError, OSError):
            self.processes[rank].join()
            answer = (False, f"rank {rank} died with exit code {self.processes[rank].exitcode}")
            self.pipes[rank], self.processes[rank] = self._start()
            return answer

    def begin(self, ranks: int, job: str, *arguments) -> None:
        self.cases += 1
        for rank, pipe in enumerate(self.pipes[:ranks]):
            pipe.send((rank, ranks, self.cases, job, arguments))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=5)
            process.kill()


def work(pipe, port: int) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, size, case, job, arguments = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR=HOST,
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT=str(case),
        )
        try:
            pipe.send((True, JOBS[job](*arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank} of {size}:\n{traceback.format_exc()}"))


def built(values: dict, world: groups.World) -> tuple[Config, Feed, Trainer]:
    """What a run of these values is made of on this rank."""
    config = resolve(parse_config(values, "test"), world.size)
    sources = open_sources(config.tasks)
    draws = make_draws(config, sources)
    placement = placement_of(config, sources, draws, world.size)
    return config, Feed(config, sources, draws, placement, world.rank), build(config, sources, placement, 10, world)


def five_steps(values: dict, without_forces: str | None, unlabelled: str | None, bucket_bytes: int) -> dict:
    """Five updates, driven by hand, and everything that two layouts can be compared by.

    without_forces: a task that has no force labels.  unlabelled: a task whose labels are missing in the third step.
    """
    out: dict = {"totals": [], "norms": [], "structures": [], "gradients": [], "late": [], "sent": []}

    class Watched(Gradients):
        def finish(self) -> None:
            out["late"].append(len(self.travelling) - self._next)
            super().finish()

    small = functools.partial(Watched, bucket_bytes=bucket_bytes)
    with groups.world("cpu") as world, patch.object(multifid.training.build, "Gradients", small):
        config, feed, trainer = built(values, world)
        out["built"] = held_bytes(trainer)
        for step in range(5):
            micro, _, known = feed.step(step)
            lost = [lose_labels(batch, without_forces, unlabelled if step == 2 else None) for batch in micro]
            lost += [without_forces, unlabelled if step == 2 else None]  # in batches of other ranks
            micro = [trainer.ready(batch) for batch in micro]
            counts = trainer.counts(micro, None if any(lost) else known)
            out["sent"].append(counts.on_the_way)
            totals = Totals(list(config.tasks), trainer.device)
            outcome = trainer.step(micro, totals, counts)
            assert outcome.updated and not outcome.stop
            out["totals"].append(totals.as_tensor().numpy())
            out["norms"].append(outcome.norm)
            out["structures"].append([fingerprints(batch) for batch in micro])
            out["gradients"].append(wholes(trainer, {n: p.grad for n, p in trainer.parameters.items()}))
        out["validation"] = trainer.validate(feed.split("validation")).as_tensor().numpy()
        out["micro"] = len(micro)
        out["weights"] = wholes(trainer, trainer.parameters)
        out["averages"] = wholes(trainer, trainer.average.average)
        out["bytes"] = held_bytes(trainer)
    return out


def groups_of(placements: list[dict[str, list[int]]]) -> tuple[int, list[float]]:
    """Process groups that were made for some placements one after the other, and what a one sums to in each group."""
    with groups.world("cpu") as world, patch.object(groups.dist, "new_group", wraps=groups.dist.new_group) as made:
        found = [group for placement in placements for group in world.groups(placement).values()]
        sums = [float(group.sum_(torch.ones(1))) for group in found if world.rank in group.ranks]
        return made.call_count, sums


def groups_kept() -> int:
    """How many process groups are still there: each has threads, which look for messages a hundred times a second."""
    gc.collect()
    return sum(path.read_text().strip() == "gloo_tcp_loop" for path in Path("/proc/self/task").glob("*/comm"))


def collectives_of(values: dict) -> list[str]:
    """The parts of three steps as they begin, and the sums over ranks that are begun in them."""
    log: list[str] = []

    def all_reduce(tensor, *arguments, original=groups.dist.all_reduce, **options):
        log.append(f"sum {tensor.numel()}")
        return original(tensor, *arguments, **options)

    with groups.world("cpu") as world, patch.object(groups.dist, "all_reduce", all_reduce):
        config, feed, trainer = built(values, world)
        trainer.begins = log.append
        made = (feed.step(k) for k in range(3))
        ready = (step._replace(batches=[trainer.ready(batch) for batch in step.batches]) for step in made)
        for step, counts in announced(ready, lambda step: trainer.counts(step.batches, step.known)):
            log.append("step")
            trainer.step(step.batches, Totals(list(config.tasks), trainer.device), counts)
    return log


def updated_weights(values: dict) -> dict:
    """Weights and averages of this rank after `train.steps` updates, and the most micro-batches of a step."""
    with groups.world("cpu") as world:
        config, feed, trainer = built(values, world)
        micro = 0
        for step in range(config.train.steps):
            batches = feed.step(step).batches
            micro = max(micro, len(batches))
            assert trainer.step(batches, Totals(list(config.tasks), trainer.device)).updated
        weights, averages = wholes(trainer, trainer.parameters), wholes(trainer, trainer.average.average)
        return {"weights": weights, "averages": averages, "micro": micro}


def products_of_gradients(values: dict, held: int) -> dict:
    """Inner products of the tasks' gradients in the first step, and the most bytes of them that this rank held."""
    with groups.world("cpu") as world:
        config, feed, trainer = built(values, world)
        of_ranks = tasks_of_ranks(list(config.tasks), feed.placement, world.size)
        gradients, most = TaskGradients(trainer, of_ranks, held), []
        pieces = [[part] for piece in feed.pieces_of_step(0) for part in piece]
        counts = trainer.counts([trainer.ready(batch) for batch in feed.step(0).batches])
        slopes = gradients._slopes

        def watched(*arguments):
            out = slopes(*arguments)
            most.append(sum(p.nbytes for p in arguments[-1]) * len(out))
            return out

        gradients._slopes = watched
        before, random = [p.grad.clone() for p in trainer.parameters.values()], torch.get_rng_state()
        products = gradients.products([trainer.ready(feed.batch(piece)) for piece in pieces], counts.wait()[0])
        same = [torch.equal(p.grad, g) for p, g in zip(trainer.parameters.values(), before, strict=True)]
        return {
            "products": products.numpy(),
            "most": max(most),
            "largest": max(p.nbytes for p in trainer.potential.encoder.parameters()),
            "own": len(of_ranks[world.rank]),
            "chunks": len(gradients.chunks),
            "untouched": all(same) and torch.equal(random, torch.get_rng_state()),
        }


def recorded_steps(values: dict, poisoned: int) -> dict:
    """Four steps in which all collectives over tensors are written down, one of them with a NaN on the first rank.

    Returns the log of each step, whether it made an update, and whether the weights stayed as they were.
    """
    log: list[str] = []

    class Gather(DefaultAllGather):
        def __call__(self, output_tensor, input_tensor, group, async_op=False):
            log.append(f"gather {input_tensor.numel()}")
            return super().__call__(output_tensor, input_tensor, group, async_op)

    class Scatter(DefaultReduceScatter):
        def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
            log.append(f"scatter {output_tensor.numel()}")
            return super().__call__(output_tensor, input_tensor, group, op, async_op)

    def sum_later(group, tensor, original=groups.Group.sum_later):
        log.append(f"sum {tensor.numel()} over {group.ranks}")
        return original(group, tensor)

    small = functools.partial(Gradients, bucket_bytes=200)
    out: dict = {"logs": [], "updated": [], "kept": []}
    with (
        groups.world("cpu") as world,
        patch.object(multifid.training.build, "Gradients", small),
        patch.object(groups.Group, "sum_later", sum_later),
    ):
        config, feed, trainer = built(values, world)
        for module in trainer.potential.encoder.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(Gather())
                module.set_custom_reduce_scatter(Scatter())
        for step in range(4):
            micro = feed.step(step).batches
            for batch in micro:
                lose_labels(batch, "apple", None)
            if step == poisoned and world.first:
                micro[0].positions[:] = torch.nan
            before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
            log.clear()
            outcome = trainer.step(micro, Totals(list(config.tasks), trainer.device))
            out["logs"].append(list(log))
            out["updated"].append(outcome.updated)
            out["kept"].append(all(torch.equal(p, before[n]) for n, p in trainer.parameters.items() if p.numel()))
        out["buckets"] = [f"sum {b.flat.numel()} over {b.group.ranks}" for b in trainer.gradients.buckets]
    return out


def wholes(trainer: Trainer, tensors: dict) -> dict:
    """Arrays by name; of a sharded encoder on the first rank only, put together."""
    shards = trainer.gradients.shards
    pieces = {} if shards is None else shards.pieces
    out = {n: shards.whole(n, t) if n in pieces else t.detach() for n, t in tensors.items()}
    return {n: t.numpy().copy() for n, t in out.items() if t is not None}


def lose_labels(batch: Batch, without_forces: str | None, unlabelled: str | None) -> None:
    for task, targets in batch.targets.items():
        if task == without_forces:
            targets.forces = None
        if task == unlabelled:
            targets.energy[:] = torch.nan
            if targets.forces is not None:
                targets.forces[:] = torch.nan


def fingerprints(batch: Batch) -> list[tuple[str, str]]:
    """(task, what the structure is) of every structure of a batch."""
    out = []
    for task, (structures, _) in batch.slices.items():
        for s in range(structures.start, structures.stop):
            atoms = batch.structure == s
            content = batch.positions[atoms].numpy().tobytes() + batch.numbers[atoms].numpy().tobytes()
            out.append((task, hashlib.sha256(content).hexdigest()))
    return out


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of the memory in which this rank holds parameters, gradients, moments, averages."""
    parameters = list(trainer.parameters.values())
    held = {
        "parameters": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "moments": [t for s in trainer.optimizer.state.values() for t in s.values() if t.dim() > 0],
        "averages": list(trainer.average.average.values()),
    }
    storages = {kind: {t.untyped_storage().data_ptr(): t.untyped_storage() for t in ts} for kind, ts in held.items()}
    return {kind: sum(storage.nbytes() for storage in found.values()) for kind, found in storages.items()}


def shared_run(values: dict, block: int, window: int) -> tuple[int, int]:
    """A run whose ranks hold blocks of so few places and exchange windows of so few steps.

    How many reads of train structures windows served, and how many the store.
    """
    served, missed = [], []
    read, from_store = share.Shared.read, Store.read

    def counted(self, indices, tasks=None):
        before = len(missed)
        out = read(self, indices, tasks)
        served.extend([1] if len(missed) == before else [])
        return out

    def of_store(self, indices, tasks=None):
        exchanging = isinstance(self, share.Shared) and self.windows
        missed.extend([1] if exchanging and np.isin(indices, self.index("train")).any() else [])
        return from_store(self, indices, tasks)

    changed = patch.multiple(share, BLOCK=block, WINDOW=window), patch.object(share.Shared, "read", counted)
    with changed[0], changed[1], patch.object(Store, "read", of_store):
        train(parse_config(values, "test"), Console(quiet=True))
    return len(served), len(missed)


def whole_run(values: dict, stop_at: int | None = None, told: int = 0) -> int:
    """A run by the front door; its exit code. With `stop_at`, rank `told` gets SIGTERM in that step."""
    original, steps = Trainer.step, []

    def step(self, *arguments, **options):
        steps.extend([1] if "stop" in options else [])  # trial steps are not steps of the run
        if len(steps) == stop_at and "stop" in options and self.world.rank == told:
            os.kill(os.getpid(), signal.SIGTERM)
            options["stop"] = False  # heard in the midst of this step, so the next one carries the flag
        return original(self, *arguments, **options)

    Trainer.step = step
    try:
        return 0 if train(parse_config(values, "test"), Console(quiet=True), signals=True).complete else groups.STOPPED
    finally:
        Trainer.step = original


def stopped_by_callback(values: dict, step: int) -> tuple[int, bool, str, float | None]:
    """How a run ends that a callback stops at a step."""
    result = multifid.train(values, [lambda rows: "enough" if rows[0]["step"] == step else None], quiet=True)
    return result.steps, result.complete, result.reason, result.best


def train_and_evaluate(values: dict, stores: dict) -> list[float]:
    """Errors of a run, trained in one world, evaluated in the next, and found complete in a third."""
    result = multifid.train(values, quiet=True)
    rows = multifid.evaluate(result.run, stores, device="cpu", quiet=True)
    assert multifid.train(values, quiet=True).steps == result.steps
    return [row["forces_mae"] for row in rows]


def contexts_after_a_run(values: dict) -> list[int]:
    """The GPUs on which this process has a context when a run has ended."""
    assert whole_run(values) == 0
    here = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [index for index in here if torch._C._cuda_hasPrimaryContext(index)]


def newest_checkpoint(run: str) -> tuple[int, list[str], list[str]]:
    """What each rank would go on from: (step, files, complaints)."""
    with groups.world("cpu") as world:
        state, files, complaints = load_checkpoint(Path(run), world)
    return state["step"], sorted(files), complaints


def error_of(values: dict) -> str:
    """How a run that cannot start ends on this rank."""
    try:
        train(parse_config(values, "test"), Console(quiet=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it ran"


def trial_with_a_slow_task(values: dict, slow: str, seconds: float) -> tuple[dict, dict]:
    """(cost, holding) of every task as trial steps measure them, where each structure of one task takes its time."""

    def forward(self, batch, original=Potential.forward, **options):
        structures, _ = batch.slices.get(slow, (slice(0, 0), None))
        time.sleep(seconds * (structures.stop - structures.start))
        return original(self, batch, **options)

    with groups.world("cpu") as world, patch.object(Potential, "forward", forward):
        config = resolve(parse_config(values, "test"), world.size)
        sources = open_sources(config.tasks)
        found = measured(config, sources, make_draws(config, sources), world)
    return {t: load.cost for t, load in found.items()}, {t: load.holding for t, load in found.items()}


def evaluated(run: str, data: list[str], split: str, max_edges: int, cache: str = "unused") -> list[dict]:
    """The rows of a run as each rank has them."""
    options = {"device": "cpu", "max_edges": max_edges, "cache": Path(cache), "quiet": True}
    return evaluate([Path(run)], data, split, **options)


def predicted(run: str, files: list[str], out: str, task: str) -> int:
    """How many structures a launch has predicted, as each rank has it."""
    options = {"device": "cpu", "precision": "fp64", "console": Console(quiet=True)}
    return predict(Path(run), [Path(file) for file in files], Path(out), task, **options)


def calibrated(run: str) -> dict[str, torch.Tensor]:
    """The sums that a launch has calibrated, as each rank has them."""
    found = calibrate_run(Path(run), device="cpu", max_edges=60, console=Console(quiet=True)).rigidity
    sums = {f"{b}.{n}": x for b, one in found.branches.items() for n, x in one.tensors().items() if n != "samples"}
    return sums | {t: torch.tensor([c.energy, c.forces, c.floor]) for t, c in found.tasks.items()}


def train_until_killed(values: dict, environment: dict[str, str], torn_at: int | None) -> None:
    """A rank in a process of its own, which the test kills; it never gets through with the checkpoint of one step."""

    def torn(tensors, path: Path) -> None:
        if path.parent.name == f".step-{torn_at:06d}.part":
            (path.parent / "torn").write_bytes(b"half of a file")
            time.sleep(60)
        save_file(tensors, path)

    os.environ.update(environment)
    torch.set_num_threads(1)
    if torn_at is not None:
        checkpoint.save_file = torn
    train(parse_config(values, "test"), Console(quiet=True))


JOBS = {
    f.__name__: f
    for f in (
        five_steps,
        collectives_of,
        contexts_after_a_run,
        groups_kept,
        groups_of,
        recorded_steps,
        shared_run,
        stopped_by_callback,
        train_and_evaluate,
        updated_weights,
        whole_run,
        newest_checkpoint,
        products_of_gradients,
        error_of,
        evaluated,
        predicted,
        calibrated,
        measured_run,
        trial_with_a_slow_task,
    )
}
