"""What a training pass of each encoder costs: its parameters, and processor time relative to egnn.

    OMP_NUM_THREADS=1 python benchmarks/encoder_costs.py

Default keys and branches; forward and backward pass of a batch of molecules and of one of crystals; medians of five
pairs, each encoder in turns with egnn, so that other work on the machine meets both.
"""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from multifid.model.encoders import ENCODERS
from multifid.model.potential import ModelConfig, Potential
from multifid.model.suite.samples import TASK, batch_of, loss, skewed, system

BATCHES = {  # so many edges an atom: 10 and 21
    "molecules": batch_of(*[system(14, spread=6.0, seed=k) for k in range(16)], cutoff=5.0, dtype=torch.float32),
    "crystals": batch_of(*[system(6, skewed(5.0, seed=k), seed=k) for k in range(4)], cutoff=5.0, dtype=torch.float32),
}
PAIRS = 5


def seconds(model, batch) -> float:
    """Of the processor, for one pass forward and backward."""
    started = time.process_time()
    loss(model(batch)[TASK], batch).backward()
    return time.process_time() - started


def main() -> None:
    settings = [(forces, kind) for forces in ("direct", "conservative") for kind in BATCHES]
    table = Table("encoder", "parameters", *(f"{forces}, {kind}" for forces, kind in settings))
    models = {
        (name, forces): Potential(
            ModelConfig.model_validate({"encoder": {"name": name}, "branch": {"forces": forces}}),
            [TASK],
            {TASK: TASK},
            0,
        ).train()
        for name in ENCODERS
        for forces in ("direct", "conservative")
    }
    for name in ENCODERS:
        ratios = []
        for forces, kind in settings:
            own, egnn, batch = models[name, forces], models["egnn", forces], BATCHES[kind]
            seconds(own, batch), seconds(egnn, batch)
            ratios.append(statistics.median(seconds(own, batch) / seconds(egnn, batch) for _ in range(PAIRS)))
        parameters = sum(p.numel() for p in models[name, "direct"].encoder.parameters())
        table.add_row(name, f"{parameters:,}", *(f"{r:.2f}" for r in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
