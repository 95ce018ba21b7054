"""What uncertainties add to a prediction, on one thread: processor time in alternated pairs, medians.

    python benchmarks/uncertainty.py RUN [--task T] [--structures 1 8 64] [--pairs 10]

RUN has been calibrated (`multifid calibrate RUN`). A prediction: energies and forces of a batch that is at hand; then
the same with deviations of energies, and with those of energies and forces. Structures: the first for training.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

import multifid
from multifid.config import load_config
from multifid.feed.loader import collate, open_sources
from multifid.model.rigid import held


def spent(work) -> float:
    """Seconds of processor time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--task")
    parser.add_argument("--structures", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = multifid.load(options.run)
    task = options.task or model.tasks[0]
    (source,) = open_sources({task: load_config(options.run / "config.yaml").tasks[task]})
    rigidity, _ = model.calibrated(task)
    print(f"task {task}, {len(rigidity.samples)} last layers")
    print("| structures | atoms | prediction, ms | with energies | with energies and forces |")
    print("|---|---|---|---|---|")
    for number in options.structures:
        batch = collate([(source, source.store.pick("train", np.arange(number)))], model.cutoff)
        batch = batch.to(model.device, model.dtype)
        works = (
            lambda: model.potential(batch),  # noqa: B023
            lambda: held(model.potential, batch, task, rigidity, stress=False, forces=False),  # noqa: B023
            lambda: held(model.potential, batch, task, rigidity, stress=False),  # noqa: B023
        )
        for work in works:
            work()
        times = [[spent(work) for work in works] for _ in range(options.pairs)]
        bare = median(t[0] for t in times)
        ratios = [median(t[k] / t[0] for t in times) for k in (1, 2)]
        print(f"| {number} | {len(batch.numbers)} | {bare * 1e3:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
