"""PNA+, principal neighbourhood aggregation whose messages are filtered by distance.

The layer of `pna.py` with other messages, as in HydraGNN's "PNAPlus" (ORNL/HydraGNN,
`hydragnn/models/PNAPlusStack.py`); b is the radial basis of the distance:

    m_ij = (W_r h_i + W_s h_j + W_e silu(W_b b_ij)) * (F b_ij)                          * by component

Aggregators, scalers and what is made right stand there. Beside, the published form multiplies the basis by the
envelope, so that messages vanish at the cutoff but still count, as zeros, in means, deviations and degrees; here the
envelope weighs the message, once. The filter F has a bias, the activation no kink.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import linear, silu

from multifid.model.encoders.pna import PNA, Message, PNALayer
from multifid.model.encoders.scalar import ScalarEncoder
from multifid.model.layers import BASIS_GAIN, SILU_GAIN, Linear, RadialBasis


class PNAPlus(ScalarEncoder):
    """Scalars of width `hidden` per atom after `layers` layers."""

    class Config(PNA.Config):
        name: Literal["pna_plus"] = "pna_plus"  # type: ignore[assignment]

    def __init__(self, config: Config, cutoff: float):
        layers = (PNAPlusLayer(config) for _ in range(config.layers))
        super().__init__(config.hidden, cutoff, RadialBasis(config.radial, cutoff), layers)


def edge_message(
    a: Tensor, c: Tensor, b: Tensor, pair: Tensor, basis: Tensor, basis_bias: Tensor, filter: Tensor, bias: Tensor
) -> Tensor:
    """m_ij, (T, H); a, c (T, H): the parts of receiver and sender; basis b (T, R)."""
    return (a + c + linear(silu(linear(b, basis, basis_bias)), pair)) * linear(b, filter, bias)


class PNAPlusLayer(PNALayer):
    """One layer; the equation stands at the head of this file."""

    def __init__(self, config: PNA.Config):
        super().__init__(config)
        self.basis = Linear(config.radial, config.hidden, gain=BASIS_GAIN)
        self.pair = Linear(config.hidden, config.hidden, bias=False, gain=0.5 * SILU_GAIN)
        self.filter = Linear(config.radial, config.hidden, gain=BASIS_GAIN)

    def message(self) -> tuple[Message, list[Tensor]]:
        basis, filtered = self.basis, self.filter
        return edge_message, [self.pair.weight, basis.weight, basis.bias, filtered.weight, filtered.bias]
