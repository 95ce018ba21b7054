"""What a task asks of a rank, estimated before anything is built: work of a step, and bytes. For `parallel.placement`.

Work is counted in multiplications: two passes backward and one forward, each over all encoder parameters for an edge
and over all branch parameters for an atom. That is too much by the same factor for all tasks, which is what matters.
"""

import math

import numpy as np
import torch
from torch import nn

from multifid.config import Config
from multifid.feed.loader import Source, edge_costs
from multifid.feed.order import Draw
from multifid.model.branch import Branch
from multifid.model.encoders import build_encoder
from multifid.model.potential import ModelConfig
from multifid.parallel.layout import GIB, Load, Memory
from multifid.parallel.shard import elements, layers_of
from multifid.training.finetune import moves_of_encoder
from multifid.training.optimizer import beside_moments
from multifid.training.settings import TrainConfig

SAMPLE = 1000  # structures of a train split whose edges are estimated
# Multiplications, in the unit above, that could be made while one parameter is summed over ranks and updated. AdamW,
# average, norm and zeroing move 48 bytes; processors make about 3 multiplications in the time of a byte, accelerators
# 7 to 14. Trial steps (`trial.py`) on two cores said 323 (EGNN 4 x 866, heads 3 x 889), 416 (4 x 128, 3 x 128) and 167
# (the same with conservative forces).
UPDATE = 300.0
SLOPES = 2.0  # a step with conservative forces, by one with direct forces (docs/performance.md)


def loads(config: Config, sources: list[Source], draws: list[Draw]) -> dict[str, Load]:
    """The load of every task in a mean step."""
    branch_of, out = config.branch_of(), {}
    kinds = {config.model.shape(branch).forces for branch in branch_of.values()}
    for source, draw in zip(sources, draws, strict=True):
        edges = mean_edges(source, config.model.cutoff)
        atoms = float(source.store.rows("natoms", sample_of(source)).mean())
        for task in draw.tasks:  # tasks of one store share the encoder's pass, and their ranks
            encoder, branch = parameters(config.model, branch_of[task])
            held = bytes_of_branch(config.model, config.train, branch_of[task])
            work = 3 * float(draw.rate) * (edges * encoder / len(draw.tasks) + atoms * branch)
            if len(kinds) > 1 and config.model.shape(branch_of[task]).forces == "conservative":
                work *= SLOPES
            own = config.branches != "shared"
            spread = spread_of(source, draw, config.model.cutoff)
            out[task] = Load(cost=work, holding=UPDATE * branch * own, bytes=held * own, spread=spread)
    return out


def spread_of(source: Source, draw: Draw, cutoff: float) -> float:
    """Standard deviation, by the mean, of the estimated edges that a step draws; the same number on every processor."""
    costs = edge_costs(source, sample_of(source), cutoff).astype(np.int64)  # whole numbers: their sums are exact
    n, total, squares = len(costs), int(costs.sum()), int((costs * costs).sum())
    return math.sqrt((n * squares - total * total) / float(draw.rate)) / max(total, 1)


def mean_edges(source: Source, cutoff: float) -> float:
    """Estimated edges of a structure of the train split."""
    return float(edge_costs(source, sample_of(source), cutoff).mean())


def sample_of(source: Source) -> np.ndarray:
    """Structures that stand for a train split."""
    return source.store.pick("train", slice(None, None, max(1, source.store.size("train") // SAMPLE)))


def memory(config: Config, ranks: int = 1) -> Memory | None:
    """The limit of a rank, and what it holds besides branches of its own."""
    if config.parallel.memory is None:
        return None
    everywhere = encoder_bytes(config, ranks)
    if config.branches == "shared":
        everywhere += bytes_of_branch(config.model, config.train, "shared")
    return Memory(limit=int(config.parallel.memory * GIB), encoder=everywhere)


def encoder_bytes(config: Config, ranks: int) -> int:
    """Of the encoder on a rank, the most in a step: all copies whole, or pieces and what is gathered for a while.

    Gathered at once are the weights of two layers, the gradients of one and these once more as they are sent; for
    conservative forces all weights and gradients, and one layer as it is sent; in steps of several micro-batches all
    gradients.
    """
    with torch.device("meta"):
        encoder = build_encoder(config.model.encoder, config.model.cutoff)
    copies, number = bytes_per_parameter(config.train), bytes_of_number(config.train)
    if ranks == 1 or not config.parallel.shard_encoder:
        if config.finetune is not None:
            moves_of_encoder(encoder, config.finetune, 0)
        moving = {n: p for n, p in encoder.named_parameters(prefix="encoder") if p.requires_grad}
        whole, trained = sum(p.numel() for p in encoder.parameters()), sum(p.numel() for p in moving.values())
        beside = beside_moments(config.train.optimizer, moving)
        return copies * trained + number * (beside + (whole - trained) * (1 + (config.train.ema is not None)))
    pieces = sum(elements(p.shape, ranks) for p in encoder.parameters())
    return copies * pieces + number * gathered(encoder, config.model.conservative, config.train.max_edges is not None)


def gathered(encoder: nn.Module, conservative: bool, micro_batches: bool) -> int:
    """Numbers of a sharded encoder that a rank holds beside its pieces at the fullest moment; see `encoder_bytes`."""
    whole = sum(p.numel() for p in encoder.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(encoder)]
    if conservative:
        return 2 * whole + max(layers)
    return 2 * (whole - sum(layers)) + 4 * max(layers) + (whole if micro_batches else 0)


def bytes_of_branch(model: ModelConfig, train: TrainConfig, branch: str | None = None) -> int:
    """Of a branch on a rank that trains it: all copies of it. None: of a branch like most."""
    copies, beside = bytes_per_parameter(train), kept_beside(model, train, branch)[1]
    return parameters(model, branch)[1] * copies + beside * bytes_of_number(train)


def parameters(model: ModelConfig, branch: str | None = None) -> tuple[int, int]:
    """Parameters of the encoder and of a branch, counted on modules without memory. None: of a branch like most."""
    encoder, module = _modules(model, branch)
    return sum(p.numel() for p in encoder.parameters()), sum(p.numel() for p in module.parameters())


def kept_beside(model: ModelConfig, train: TrainConfig, branch: str | None = None) -> tuple[int, int]:
    """Numbers that the optimizer keeps of the encoder and of a branch besides two moments."""
    encoder, held = (beside_moments(train.optimizer, dict(m.named_parameters())) for m in _modules(model, branch))
    return encoder, held


def _modules(model: ModelConfig, branch: str | None) -> tuple[nn.Module, nn.Module]:
    """Encoder and branch without memory."""
    with torch.device("meta"):
        encoder = build_encoder(model.encoder, model.cutoff)
        return encoder, Branch(encoder, model.shape(branch), model.cutoff)


def bytes_per_parameter(train: TrainConfig) -> int:
    """Weight, gradient, two moments, and the average."""
    return (4 + (train.ema is not None)) * bytes_of_number(train)


def bytes_of_number(train: TrainConfig) -> int:
    return 8 if train.precision == "fp64" else 4
