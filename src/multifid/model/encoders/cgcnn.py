"""CGCNN, crystal graph convolutions with gates (Xie, Grossman 2018, Phys. Rev. Lett. 120, 145301, eq. 5).

With z_ij = (h_i, h_j, b_ij), b the radial basis of the distance and u its cutoff envelope, one layer is

    h_i += 1/M sum_j u_ij sigmoid(W_f z_ij) * softplus(W_s z_ij)                * by component

Made right: published with the 12 nearest neighbours, a hard cut at which energies jump; here all within the cutoff
count, each by its envelope. The published batch normalisation would make an atom's energy depend on the other
structures of its batch: h is normalised atom by atom instead. Sums are divided by the constant M.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from multifid.graphs.edges import over_edges
from multifid.model.contract import EncoderConfig
from multifid.model.encoders.scalar import ScalarEncoder
from multifid.model.layers import BASIS_GAIN, TYPICAL_NEIGHBORS, LayerNorm, Linear, RadialBasis


class CGCNN(ScalarEncoder):
    """Scalars of width `hidden` per atom after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["cgcnn"] = "cgcnn"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features.")
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")

    def __init__(self, config: Config, cutoff: float):
        layers = (CGCNNLayer(config.hidden, config.radial) for _ in range(config.layers))
        super().__init__(config.hidden, cutoff, RadialBasis(config.radial, cutoff), layers)


def edge_message(a: Tensor, c: Tensor, u: Tensor, b: Tensor, pair: Tensor) -> tuple[Tensor]:
    """(T, H); a, c (T, 2 H): the parts of both maps for receiver and sender; envelope u (T, 1), basis b (T, R)."""
    gate, core = (a + c + linear(b, pair)).chunk(2, dim=1)
    return (u * torch.sigmoid(gate) * softplus(core),)


class CGCNNLayer(nn.Module):
    """One convolution; the equation stands at the head of this file."""

    def __init__(self, hidden: int, radial: int):
        super().__init__()
        self.norm = LayerNorm(hidden)
        # Both maps of z at once, first the gate's; linear, so that parts for h_i and h_j are taken once per atom.
        self.receiver = Linear(hidden, 2 * hidden)
        self.sender = Linear(hidden, 2 * hidden, bias=False)
        self.pair = Linear(radial, 2 * hidden, bias=False, gain=BASIS_GAIN)

    def forward(self, h: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """h (N, H), receivers i and senders j (E,), basis b (E, R), envelope u (E, 1)."""
        return h + self.convolved(self.norm(h), i, j, b, u) / TYPICAL_NEIGHBORS

    def convolved(self, n: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """The published sum over neighbours."""
        return over_edges(
            edge_message,
            i,
            j,
            n.shape[0],
            u,
            width=self.pair.out_features,
            receivers=[self.receiver(n).to(u.dtype)],
            senders=[self.sender(n).to(u.dtype)],
            edges=[b],
            weights=[self.pair.weight],
        )[0]
