"""GIN, the graph isomorphism network (Xu et al. 2019, arXiv 1810.00826, eq. 4.1) with edges (Hu et al. 2020).

With b the radial basis of the distance and u its cutoff envelope, one layer is

    h_i += phi(h_i + 1/M sum_j u_ij silu(h_j + W b_ij))                                phi: two maps, SiLU between

Edges enter as Hu et al. (arXiv 1905.12265; "GINE") let them. Made right: published for graphs without geometry, the
layer sees no distances and no cutoff, and ReLU has a kink at which forces jump; here edges carry basis and envelope,
and activations are smooth. The sum is divided by the constant M: that is the published layer with a first map that
differs by M and epsilon = M - 1, fixed. The paper learns epsilon too, and finds it no better than a fixed one.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from multifid.model.contract import EncoderConfig
from multifid.model.encoders.scalar import ScalarEncoder, sum_over_neighbours
from multifid.model.layers import BASIS_GAIN, MLP, TYPICAL_NEIGHBORS, LayerNorm, Linear, RadialBasis


class GIN(ScalarEncoder):
    """Scalars of width `hidden` per atom after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["gin"] = "gin"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features and of the hidden layers.")
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")

    def __init__(self, config: Config, cutoff: float):
        layers = (GINLayer(config.hidden, config.radial) for _ in range(config.layers))
        super().__init__(config.hidden, cutoff, RadialBasis(config.radial, cutoff), layers)


def edge_message(n: Tensor, u: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """(T, H); n (T, H): of the senders; envelope u (T, 1), basis b (T, R)."""
    return (u * silu(n + linear(b, weight, bias)),)


class GINLayer(nn.Module):
    """One layer; the equation stands at the head of this file."""

    def __init__(self, hidden: int, radial: int):
        super().__init__()
        self.norm = LayerNorm(hidden)
        self.pair = Linear(radial, hidden, gain=BASIS_GAIN)
        self.phi = MLP([hidden, hidden, hidden])

    def forward(self, h: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """h (N, H), receivers i and senders j (E,), basis b (E, R), envelope u (E, 1)."""
        return h + self.convolved(self.norm(h), i, j, b, u)

    def convolved(self, n: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """The published layer, without what h is before it."""
        m = sum_over_neighbours(edge_message, n, i, j, b, u, self.pair.weight, self.pair.bias)
        return self.phi(n + m / TYPICAL_NEIGHBORS)
