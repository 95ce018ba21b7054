"""What a task asks of a rank, estimated before anything is built: work of a step, and bytes. For `parallel.placement`.

Work is counted in multiplications: two passes backward and one forward, each over all encoder parameters for an edge
and over all branch parameters for an atom. That is too much by the same factor for all tasks, which is what matters.
"""

import numpy as np
import torch

from multifid.config import Config
from multifid.data.loader import Source, edge_costs
from multifid.data.order import Draw
from multifid.model.branch import Branch
from multifid.model.encoder import build_encoder
from multifid.parallel.layout import GIB, Load, Memory

SAMPLE = 1000  # structures of a train split whose edges are estimated
UPDATE = 50.0  # multiplications that could be made while one parameter is reduced, updated and averaged


def loads(config: Config, sources: list[Source], draws: list[Draw]) -> dict[str, Load]:
    """The load of every task in a mean step."""
    encoder, branch = parameters(config)
    out = {}
    for source, draw in zip(sources, draws, strict=True):
        index = np.asarray(source.store.index("train"))
        sample = index[:: max(1, len(index) // SAMPLE)].astype(np.int64)
        edges = float(edge_costs(source, sample, config.model.cutoff).mean())
        atoms = float(source.store.rows("natoms", sample).mean())
        for task in draw.tasks:  # tasks of one store share the encoder's pass, and their ranks
            work = 3 * float(draw.rate) * (edges * encoder / len(draw.tasks) + atoms * branch)
            own = 0 if config.branches == "shared" else branch
            out[task] = Load(cost=work, holding=UPDATE * own, bytes=own * bytes_per_parameter(config))
    return out


def memory(config: Config) -> Memory | None:
    """The limit of a rank, and what it holds besides branches of its own."""
    if config.parallel.memory is None:
        return None
    encoder, branch = parameters(config)
    everywhere = encoder + (branch if config.branches == "shared" else 0)
    return Memory(limit=int(config.parallel.memory * GIB), encoder=everywhere * bytes_per_parameter(config))


def parameters(config: Config) -> tuple[int, int]:
    """Parameters of the encoder and of a branch, counted on modules without memory."""
    with torch.device("meta"):
        encoder = build_encoder(config.model.encoder, config.model.cutoff)
        branch = Branch(encoder.hidden, encoder.vectors, config.model.branch)
    return sum(p.numel() for p in encoder.parameters()), sum(p.numel() for p in branch.parameters())


def bytes_per_parameter(config: Config) -> int:
    """Weight, gradient, two moments, and the average."""
    copies = 4 + (config.train.ema is not None)
    return copies * (8 if config.train.precision == "fp64" else 4)
