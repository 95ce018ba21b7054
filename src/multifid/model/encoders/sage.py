"""GraphSAGE with the mean of neighbours (Hamilton, Ying, Leskovec 2017, arXiv 1706.02216, algorithm 1 and eq. 2).

With b the radial basis of the distance, u its cutoff envelope and n_i the smooth number of neighbours (`smooth.py`):

    h_i += W_3 silu(W_1 h_i + W_2 1/n_i sum_j u_ij (F b_ij) * h_j)                     * by component

Made right: published for graphs without geometry, where F b_ij is one, and with samples of the neighbours, which would
make energies random. Here all neighbours within the cutoff count, filtered by their distance as in SchNet. A plain mean
jumps when a neighbour leaves; this one is weighted by envelopes, so that the number it is divided by is smooth, and an
only neighbour that leaves takes its message with it.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from multifid.model.contract import EncoderConfig
from multifid.model.encoders.scalar import ScalarEncoder, sum_over_neighbours
from multifid.model.layers import BASIS_GAIN, SILU_GAIN, LayerNorm, Linear, RadialBasis
from multifid.model.smooth import degree


class SAGE(ScalarEncoder):
    """Scalars of width `hidden` per atom after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["sage"] = "sage"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features.")
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")

    def __init__(self, config: Config, cutoff: float):
        layers = (SAGELayer(config.hidden, config.radial) for _ in range(config.layers))
        super().__init__(config.hidden, cutoff, RadialBasis(config.radial, cutoff), layers)


def filtered(n: Tensor, u: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """u (F b) * n, (T, H); n (T, H): of the senders; envelope u (T, 1), basis b (T, R); weight and bias of F."""
    return (u * linear(b, weight, bias) * n,)


class SAGELayer(nn.Module):
    """One layer; the equation stands at the head of this file."""

    def __init__(self, hidden: int, radial: int):
        super().__init__()
        self.norm = LayerNorm(hidden)
        self.filter = Linear(radial, hidden, gain=BASIS_GAIN)
        self.own = Linear(hidden, hidden)
        self.others = Linear(hidden, hidden, bias=False)
        self.mix = Linear(hidden, hidden, gain=SILU_GAIN)

    def forward(self, h: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """h (N, H), receivers i and senders j (E,), basis b (E, R), envelope u (E, 1)."""
        return h + self.mix(silu(self.convolved(self.norm(h), i, j, b, u)))

    def convolved(self, n: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """The published layer: what the activation is applied to."""
        total = sum_over_neighbours(filtered, n, i, j, b, u, self.filter.weight, self.filter.bias)
        return self.own(n) + self.others(total / degree(u, i, n.shape[0]))
