"""SchNet, continuous-filter convolutions (Schütt et al. 2017, arXiv 1706.08566; 2018, J. Chem. Phys. 148, 241722).

With ssp(x) = log(1 + e^x) - log 2, b the Gaussians of the distance and u its cutoff envelope, one layer is

    W_ij = u_ij (W_2 ssp(W_1 b_ij))                       filter-generating network
    m_i  = 1/M sum_j W_ij * (W_3 h_j)                     continuous-filter convolution, * by component
    h_i += W_5 ssp(W_4 m_i)                               interaction block

Made right: the paper has no cutoff function, so that energies jump when a neighbour comes into reach; here filters
carry the envelope. Sums are divided by the constant M and h is normalised before it is convolved, which keeps untrained
predictions of dense crystals as small as those of molecules. M, u and the normalisation aside, the numbers are the
published ones. Angles are seen only through more than one layer.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from multifid.model.contract import EncoderConfig
from multifid.model.encoders.scalar import ScalarEncoder, sum_over_neighbours
from multifid.model.layers import SILU_GAIN, TYPICAL_NEIGHBORS, LayerNorm, Linear, here


class SchNet(ScalarEncoder):
    """Scalars of width `hidden` per atom after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["schnet"] = "schnet"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features.")
        filters: int = Field(default=64, ge=1, description="Width of the filters, and of what they are applied to.")
        gaussians: int = Field(default=32, ge=2, description="Gaussians of the distance, evenly from 0 to the cutoff.")

    def __init__(self, config: Config, cutoff: float):
        layers = (SchNetLayer(config.hidden, config.filters, config.gaussians) for _ in range(config.layers))
        super().__init__(config.hidden, cutoff, Gaussians(config.gaussians, cutoff), layers)


class Gaussians(nn.Module):
    """exp(-(d - k s)^2 / (2 s^2)) for k = 0 .. size - 1; the spacing s takes the last one to the cutoff."""

    def __init__(self, size: int, cutoff: float):
        super().__init__()
        self.per_length = (size - 1) / cutoff
        self.register_buffer("places", here(torch.arange(size, device="cpu") * 1.0), persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """(E,) angstrom -> (E, size)."""
        return torch.exp(-0.5 * (distance[:, None] * self.per_length - self.places).square())  # type: ignore[operator]


def ssp(x: Tensor) -> Tensor:
    """The shifted softplus, zero at zero."""
    return softplus(x) - math.log(2.0)


def edge_message(
    x: Tensor, u: Tensor, b: Tensor, w1: Tensor, bias1: Tensor, w2: Tensor, bias2: Tensor
) -> tuple[Tensor]:
    """(T, F); x (T, F): of the senders; envelope u (T, 1), basis b (T, R); weights and biases of the filter network."""
    return (u * linear(ssp(linear(b, w1, bias1)), w2, bias2) * x,)


class SchNetLayer(nn.Module):
    """One interaction block; the equations stand at the head of this file."""

    def __init__(self, hidden: int, filters: int, gaussians: int):
        super().__init__()
        self.norm = LayerNorm(hidden)
        self.sender = Linear(hidden, filters, bias=False)
        # The squares of the Gaussians at one distance sum to sqrt(pi), not to their number.
        self.basis = Linear(gaussians, filters, gain=math.sqrt(gaussians / math.sqrt(math.pi)))
        self.filter = Linear(filters, filters, gain=SILU_GAIN)
        self.first = Linear(filters, hidden)
        self.last = Linear(hidden, hidden, gain=SILU_GAIN)

    def forward(self, h: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """h (N, H), receivers i and senders j (E,), basis b (E, R), envelope u (E, 1)."""
        return h + self.convolved(self.norm(h), i, j, b, u)

    def convolved(self, n: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """The published layer, without what h is before it."""
        weights = (self.basis.weight, self.basis.bias, self.filter.weight, self.filter.bias)
        m = sum_over_neighbours(edge_message, self.sender(n), i, j, b, u, *weights)
        return self.last(ssp(self.first(m / TYPICAL_NEIGHBORS)))
