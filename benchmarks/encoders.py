"""All encoders under one protocol: errors after equal steps, after equal seconds of the processor, and costs.

    OMP_NUM_THREADS=1 python benchmarks/encoders.py CONFIG.yaml [--seconds 15] [--steps 80] [--seeds 0 1 2]
        [--encoders egnn painn] [--out FILE.json]

CONFIG has the tasks, the objective, the optimizer and the branches; every encoder takes its place with `KEYS`, and all
other keys as they are preset. Each pair of encoder and seed is trained twice, from the start to the end of its learning
rate: for a number of steps, and for as many steps as the processor makes in some seconds, by the rate of the first
training, in which validation does not count. Errors are those of the last weights on the validation splits, on which
nothing is chosen. Every training is a process of its own that has one core; all that is done is in FILE.json at once,
and the same command goes on from there.

    rate        structures trained on in a second of the processor, median over the seeds
    prediction  energies and forces of structures in a second of the processor, best of several passes
    bytes       that a training step of its mean batch needs beside weights, as `multifid plan` counts them
"""

import argparse
import json
import os
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml

from multifid.config import Config, parse_config
from multifid.feed.loader import open_sources
from multifid.model.encoders import ENCODERS
from multifid.model.footprint import BatchSize, count
from multifid.model.potential import Potential
from multifid.parallel.layout import place
from multifid.training.feed import Feed, make_draws
from multifid.training.resolve import resolve
from multifid.training.run import train

KEYS: dict[str, Any] = {"layers": 2, "hidden": 32}
MORE: dict[str, dict[str, Any]] = {
    "egnn with tensors": {"name": "egnn", "tensors": 8},
    "gotennet of degree 1": {"name": "gotennet", "degrees": 1},
    "painn with attention": {"name": "painn", "attention": {"heads": 4}},
    "painn with walks": {"name": "painn", "attention": {"heads": 4, "walks": 3}},
}
PASSES = 7  # of which the best tells the rate of prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoders", nargs="+", default=[*ENCODERS, *MORE])
    parser.add_argument("--out", type=Path, default=Path("encoders.json"))
    args = parser.parse_args()

    values = yaml.safe_load(args.config.read_text())
    known = json.loads(args.out.read_text()) if args.out.exists() else {}

    def note(name: str, what: str, function: Any, *inputs: Any) -> dict[str, Any]:
        """What a function says of an encoder, unless that is known already."""
        of_encoder = known.setdefault(name, {})
        if what not in of_encoder:
            of_encoder[what] = in_a_process(function, values, name, *inputs)
            args.out.write_text(json.dumps(known, indent=1) + "\n")
            print(name, what, of_encoder[what], flush=True)
        return of_encoder[what]

    for seed in args.seeds:
        for name in args.encoders:
            note(name, "costs", costs)
            run = note(name, f"{args.steps} steps, seed {seed}", trained, args.steps, seed)
            steps = round(args.seconds * run["step"] / run["seconds"])
            note(name, f"{args.seconds:g} seconds, seed {seed}", trained, steps, seed)


def in_a_process(function: Any, *inputs: Any) -> dict[str, Any]:
    """What a function returns in a copy of this process, whose time and memory are then its own."""
    ends = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(ends[1], json.dumps(function(*inputs)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(ends[1])
    with os.fdopen(ends[0]) as told:
        text = told.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit(f"{function.__name__}: {inputs[1:]} failed; see above")
    return json.loads(text)


def config_of(values: dict[str, Any], name: str, run: str, **of_train: Any) -> Config:
    """The config with another encoder, validated at the end only, with weights that are kept nowhere else."""
    encoder = KEYS | {"name": name} | MORE.get(name, {})
    never = 10**9
    train = values["train"] | {"epoch_steps": never, "checkpoint_every": never, "log_every": never}
    changed = {"run": run, "train": train | {"patience": None, "workers": 0} | of_train}
    model = values["model"] | {"encoder": encoder}
    return parse_config({k: v for k, v in values.items() if k != "study"} | changed | {"model": model}, name)


def trained(values: dict[str, Any], name: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one encoder: its errors at the end, its steps, and the seconds of training and of the validation."""
    rows: list[dict[str, Any]] = []
    told: list[float] = []  # by the clock: when training began, ..., at the end of the last step, after the validation

    def clock() -> float:
        told.append(time.process_time())
        return told[-1]

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(values | {"seed": seed}, name, f"{folder}/run", steps=steps)
        train(config, clock=clock, callbacks=[rows.extend])
    rows = [row for row in rows if row["split"] == "validation"]
    errors = {row["task"]: {key: row[key] for key in ("energy_mae", "forces_mae")} for row in rows}
    return {
        "step": rows[-1]["step"],
        "seconds": told[-2] - told[0],
        "validation": told[-1] - told[-2],
        "objective": rows[-1]["objective"],
        "tasks": errors,
    }


def costs(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Parameters, bytes of a step, and structures predicted in a second."""
    config = resolve(config_of(values, name, "run", steps=1), 1)
    sources = open_sources(config.tasks)
    feed = Feed(config, sources, make_draws(config, sources), place(list(config.tasks), "replicated", 1))
    batches = [batch.to(dtype=torch.float32) for step in range(4) for batch in feed.step(step).batches]
    potential = Potential(config.model, list(config.tasks), {t: t for t in config.tasks}, seed=0).eval()
    structures, seconds = sum(len(batch.natoms) for batch in batches), []
    for _ in range(PASSES):
        started = time.process_time()
        for batch in batches:
            potential(batch)
        seconds.append(time.process_time() - started)
    atoms = sum(len(b.numbers) for b in batches) / len(batches)
    edges = sum(b.edges.shape[1] for b in batches) / len(batches)
    triplets = sum(0 if b.triplets is None else b.triplets.shape[1] for b in batches) / len(batches)
    size = BatchSize(len(config.tasks), round(atoms), round(atoms), round(edges), round(triplets))
    return {
        "parameters": sum(p.numel() for p in potential.encoder.parameters()),
        "structures_in_a_step": feed.structures,
        "predicted_in_a_second": structures / min(seconds),
        "bytes": count(config.model, size, torch.float32, processor=True).bytes,
        "atoms": atoms,
        "edges": edges,
    }


if __name__ == "__main__":
    main()
