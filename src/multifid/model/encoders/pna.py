"""PNA, principal neighbourhood aggregation (Corso et al. 2020, arXiv 2004.05718, eq. 5 to 8).

With b the radial basis of the distance, u its cutoff envelope, n_i the smooth number of neighbours (`smooth.py`) and
delta = log(1 + M), one layer is

    m_ij = W_r h_i + W_s h_j + W_e b_ij
    A_i  = (mean_j m_ij, min_j m_ij, max_j m_ij, std_j m_ij)                            aggregators
    h_i += W_o silu(W_a (h_i, A_i, A_i log(1 + n_i) / delta, A_i delta / log(1 + n_i)))  scalers

Made right: all four aggregators jump when a neighbour leaves, the scalers because they count, and minimum and maximum
have kinks wherever two neighbours are equal, where forces of a symmetric crystal would depend on rounding. Here

    mean  sum_j u_ij m_ij / n_i
    std   sqrt(mean(m^2) - mean(m)^2 + r),     r = 0.001 keeps its slope finite where all messages are equal
    max   sum_j w_ij m_ij / (1 + sum_j w_ij),     w_ij = u_ij exp(t u_ij m_ij)

The last is the mean of neighbours and a zero, weighted by a softmax; it tends to max(0, max_j m_ij) as `sharpness`, t,
grows, and the zero is what is left when the last neighbour has gone. The minimum is minus the maximum of -m. Scalers
take the smooth number of neighbours in place of the integer degree. delta is a constant, and not a mean over training
data, of which there are many, with other densities. Where envelopes are one and t is large, these are the published
numbers, but for atoms of which all messages have one sign: their minimum or maximum is the zero.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from multifid.graphs.edges import largest_over_edges, over_edges
from multifid.model.contract import EncoderConfig
from multifid.model.encoders.scalar import ScalarEncoder
from multifid.model.layers import BASIS_GAIN, SILU_GAIN, TYPICAL_NEIGHBORS, LayerNorm, Linear, RadialBasis
from multifid.model.smooth import degree

Aggregator = Literal["mean", "min", "max", "std"]
Scaler = Literal["identity", "amplification", "attenuation", "linear", "inverse_linear"]
Message = Callable[..., Tensor]  # parts of receiver and sender, basis, weights -> m_ij
ROUND = 1e-3  # r, added to the variance
SIGNS = {"max": 1.0, "min": -1.0}


class PNA(ScalarEncoder):
    """Scalars of width `hidden` per atom after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["pna"] = "pna"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features.")
        aggregators: list[Aggregator] = Field(
            default=["mean", "min", "max", "std"], min_length=1, description="What is taken of the messages to an atom."
        )
        scalers: list[Scaler] = Field(
            default=["identity", "amplification", "attenuation"],
            min_length=1,
            description="Functions of the number of neighbours that all aggregators are multiplied by.",
        )
        sharpness: float = Field(
            default=4.0, gt=0, description="How near smooth minima and maxima are to the sharp ones, per unit message."
        )
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")

        @field_validator("aggregators", "scalers")
        @classmethod
        def _none_twice(cls, names: list[str]) -> list[str]:
            if len(set(names)) < len(names):
                raise ValueError(f"none may be named twice, got {', '.join(names)}")
            return names

    def __init__(self, config: Config, cutoff: float):
        layers = (PNALayer(config) for _ in range(config.layers))
        super().__init__(config.hidden, cutoff, RadialBasis(config.radial, cutoff), layers)


def edge_message(a: Tensor, c: Tensor, b: Tensor, pair: Tensor) -> Tensor:
    """m_ij, (T, H); a, c (T, H): the parts of receiver and sender; basis b (T, R)."""
    return a + c + linear(b, pair)


def exponents(message: Message, t: float, a: Tensor, c: Tensor, u: Tensor, *others: Tensor) -> tuple[Tensor]:
    """t u m, (T, H)."""
    return (t * u * message(a, c, *others),)


def summands(message: Message, ts: Sequence[float], a: Tensor, *rest: Tensor) -> tuple[Tensor]:
    """What is summed over neighbours: u m, u m^2, and w m, w with w = u exp(t u m - largest) for each t; (T, .. H).

    rest: the largest exponent (T, H) for each t, then part of the sender, envelope, and what else the message takes.
    """
    tops, (c, u, *others) = rest[: len(ts)], rest[len(ts) :]
    m = message(a, c, *others)
    parts = [u * m, u * m * m]
    for t, top in zip(ts, tops, strict=True):
        w = u * torch.exp(t * u * m - top)
        parts += [w * m, w]
    return (torch.cat(parts, dim=1),)


def scale(name: Scaler, count: Tensor) -> Tensor:
    """What a scaler multiplies by; count (N, 1): the smooth number of neighbours."""
    x, typical = count, TYPICAL_NEIGHBORS
    if name in ("amplification", "attenuation"):
        x, typical = torch.log(1.0 + count), math.log(1.0 + TYPICAL_NEIGHBORS)
    if name == "identity":
        return torch.ones_like(x)
    return x / typical if name in ("amplification", "linear") else typical / x


class PNALayer(nn.Module):
    """One layer; the equations stand at the head of this file."""

    def __init__(self, config: PNA.Config):
        super().__init__()
        hidden = config.hidden
        self.aggregators, self.scalers = tuple(config.aggregators), tuple(config.scalers)
        self.extrema = [name for name in self.aggregators if name in SIGNS]
        self.exponents = [SIGNS[name] * config.sharpness for name in self.extrema]
        self.norm = LayerNorm(hidden)
        self.receiver = Linear(hidden, hidden, gain=0.5)
        self.sender = Linear(hidden, hidden, bias=False, gain=0.5)
        self.pair = Linear(config.radial, hidden, bias=False, gain=BASIS_GAIN)
        self.all = Linear(hidden * (1 + len(self.aggregators) * len(self.scalers)), hidden)
        self.out = Linear(hidden, hidden, gain=SILU_GAIN)

    def message(self) -> tuple[Message, list[Tensor]]:
        """The function that gives m_ij, and its weights."""
        return edge_message, [self.pair.weight]

    def forward(self, h: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """h (N, H), receivers i and senders j (E,), basis b (E, R), envelope u (E, 1)."""
        return h + self.out(silu(self.convolved(self.norm(h), i, j, b, u)))

    def convolved(self, n: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """The published layer: what the activation is applied to."""
        count = degree(u, i, n.shape[0])
        aggregated = self.aggregated(self.receiver(n).to(u.dtype), self.sender(n).to(u.dtype), i, j, b, u, count)
        return self.all(torch.cat([n, *(aggregated * scale(name, count) for name in self.scalers)], dim=1))

    def aggregated(self, a: Tensor, c: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor, count: Tensor) -> Tensor:
        """All aggregators side by side, (N, ... H); a, c (N, H): parts of receivers and senders; count (N, 1)."""
        function, weights = self.message()
        of_edges: dict[str, Any] = {"receivers": [a], "senders": [c], "weights": weights}
        width = a.shape[1] * (2 + 2 * len(self.exponents))
        tops = [
            largest_over_edges(
                partial(exponents, function, t), i, j, torch.zeros_like(a), width=width, edges=[u, b], **of_edges
            )
            for t in self.exponents
        ]
        of_edges["receivers"] = [a, *tops]
        (sums,) = over_edges(
            partial(summands, function, self.exponents), i, j, a.shape[0], u, width=width, edges=[b], **of_edges
        )
        first, second, *weighted = sums.split(a.shape[1], dim=1)
        mean = first / count
        found = {"mean": mean, "std": ((second / count - mean.square()).clamp(min=-0.5 * ROUND) + ROUND).sqrt()}
        for name, top, above, below in zip(self.extrema, tops, weighted[::2], weighted[1::2], strict=True):
            found[name] = above / (torch.exp(-top) + below)
        return torch.cat([found[name] for name in self.aggregators], dim=1)
