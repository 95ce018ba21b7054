"""MFC, convolutions of neural molecular fingerprints (Duvenaud et al. 2015, arXiv 1509.09292, algorithm 2).

Every number of neighbours has weights of its own. With b the radial basis of the distance, u its cutoff envelope and
D_i = sum_j u_ij the smooth degree, one layer is

    m_i  = 1/M sum_j u_ij (F b_ij) * h_j                                               * by component
    h_i += W_3 silu(sum_k w_k(D_i) (W_1^k h_i + W_2^k m_i))

Published with the bonds of a molecule and integer degrees, at whose change energies jump. Made right: between the
degrees k s that have weights (s is `degree_step`) they are interpolated, by w_k(D) = S(max(0, 1 - |D / s - k|)) with
S(x) = x^3 (10 - 15 x + 6 x^2), which has two continuous derivatives, and is one at its own degree and zero at all
others. Beyond the largest degree its weights stay. Where envelopes are one, s = 1 and F b = M this is the published
layer.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import silu

from multifid.model.contract import EncoderConfig
from multifid.model.encoders.sage import filtered
from multifid.model.encoders.scalar import ScalarEncoder, sum_over_neighbours
from multifid.model.layers import (
    BASIS_GAIN,
    SILU_GAIN,
    TYPICAL_NEIGHBORS,
    LayerNorm,
    Linear,
    RadialBasis,
    here,
    sum_over,
)


class MFC(ScalarEncoder):
    """Scalars of width `hidden` per atom after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["mfc"] = "mfc"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features.")
        max_degree: int = Field(
            default=32, ge=1, description="Largest number of neighbours, counted by envelopes, with weights of its own."
        )
        degree_step: int = Field(
            default=8,
            ge=1,
            description="Degrees 0, this, twice this, ... have weights; between, they are interpolated.",
        )
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")

        @model_validator(mode="after")
        def _ends_at_a_step(self) -> "MFC.Config":
            if self.max_degree % self.degree_step:
                raise ValueError(
                    f"model.encoder.max_degree must be a multiple of degree_step, got {self.max_degree} and "
                    f"{self.degree_step}"
                )
            return self

    def __init__(self, config: Config, cutoff: float):
        layers = (
            MFCLayer(config.hidden, config.radial, config.max_degree, config.degree_step) for _ in range(config.layers)
        )
        super().__init__(config.hidden, cutoff, RadialBasis(config.radial, cutoff), layers)


class MFCLayer(nn.Module):
    """One layer; the equations stand at the head of this file."""

    def __init__(self, hidden: int, radial: int, max_degree: int, step: int):
        super().__init__()
        sets = max_degree // step + 1
        self.step, self.last = step, sets - 1
        self.norm = LayerNorm(hidden)
        self.filter = Linear(radial, hidden, gain=BASIS_GAIN)
        # The maps of all degrees, one after the other: outputs k H to (k + 1) H are those of the k-th degree.
        self.own = Linear(hidden, sets * hidden, bias=False)
        self.others = Linear(hidden, sets * hidden)
        self.mix = Linear(hidden, hidden, gain=SILU_GAIN)
        self.register_buffer("degrees", here(torch.arange(sets, device="cpu") * 1.0), persistent=False)

    def forward(self, h: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """h (N, H), receivers i and senders j (E,), basis b (E, R), envelope u (E, 1)."""
        return h + self.mix(silu(self.convolved(self.norm(h), i, j, b, u)))

    def convolved(self, n: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """The published layer: what the activation is applied to."""
        total = sum_over_neighbours(filtered, n, i, j, b, u, self.filter.weight, self.filter.bias)
        of_all = (self.own(n) + self.others(total / TYPICAL_NEIGHBORS)).view(n.shape[0], self.last + 1, n.shape[1])
        return (self.of_degrees(sum_over(u, i, n.shape[0]))[:, :, None] * of_all).sum(dim=1)

    def of_degrees(self, degree: Tensor) -> Tensor:
        """How much the weights of each degree count: (N, 1) -> (N, K), rows sum to one."""
        x = (1.0 - ((degree / self.step).clamp(max=self.last) - self.degrees).abs()).clamp(min=0.0)  # type: ignore
        return x**3 * (10.0 - 15.0 * x + 6.0 * x**2)
