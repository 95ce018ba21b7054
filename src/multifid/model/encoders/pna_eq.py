"""PNAEq: principal neighbourhood aggregation of scalars, with the vectors of PaiNN.

HydraGNN's "PNAEq" (ORNL/HydraGNN, `hydragnn/models/PNAEqStack.py`): PaiNN whose scalar messages are aggregated by PNA.
Scalars s_i (H) and H vectors v_i per atom; with r_ij the vector from i to j, W a linear map of the radial basis b_ij of
its length, u the cutoff envelope and U, V linear maps over channels, one layer is

    s_i += the layer of `pna_plus.py`: mean, minimum, maximum and deviation of m_ij, times scalers
    [b, c]_ij = phi(s_j) * W(b_ij),     v_i += 1/sqrt(M) sum_j u_ij (b_ij v_j + c_ij r_ij / |r_ij|)
    [a, b, c]_i = MLP(s_i, log(1 + |V v_i|^2))                               the update of PaiNN, see `painn.py`
    s_i += a_i + b_i <U v_i, V v_i> / sqrt(1 + |V v_i|^2),     v_i += c_i U v_i

Vectors are summed and not aggregated otherwise: no minimum of vectors turns with the structure. What is made right in
the aggregators stands in `pna.py`; the published form takes bare lengths, whose slope is undefined where v starts.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from multifid.graphs.edges import over_edges
from multifid.graphs.graph import Graph
from multifid.model.contract import Encoder, Features
from multifid.model.encoders.pna import PNA
from multifid.model.encoders.pna_plus import PNAPlusLayer
from multifid.model.layers import (
    BASIS_GAIN,
    MLP,
    TYPICAL_NEIGHBORS,
    LayerNorm,
    Linear,
    NodeEmbedding,
    RadialBasis,
    call,
    envelope,
)


class PNAEq(Encoder):
    """Scalars of width `hidden` and as many vector channels per atom after `layers` layers."""

    class Config(PNA.Config):
        name: Literal["pna_eq"] = "pna_eq"  # type: ignore[assignment]

    def __init__(self, config: Config, cutoff: float):
        super().__init__()
        hidden = config.hidden
        self.degrees = {0: hidden, 1: hidden}
        self.readouts = config.layers - 1
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden)
        self.radial = RadialBasis(config.radial, cutoff)
        self.layers = nn.ModuleList(PNAEqLayer(config) for _ in range(config.layers))
        self.norm = LayerNorm(hidden)

    def forward(self, graph: Graph) -> Features:
        s = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        v = graph.vectors.new_zeros((graph.atoms, 3, self.degrees[1]))
        direction = graph.vectors / graph.distances[:, None]
        b, u = self.radial(graph.distances), envelope(graph.distances, self.cutoff)
        of_layers = []
        for number, layer in enumerate(self.layers):
            if number:
                s, v = graph.exchanged(s, v)
            s, v = call(layer, self.recompute, s, v, graph.receivers, graph.senders, direction, b, u)
            of_layers.append(s)
        return Features(self.norm(s), v.transpose(1, 2).contiguous(), layers=tuple(of_layers[:-1]))


def vector_message(
    phi: Tensor, v: Tensor, u: Tensor, direction: Tensor, b: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor]:
    """(T, 3, H); phi (T, 2, H) and v (T, 3, H) of senders, u (T, 1), direction (T, 3), basis b (T, R)."""
    of_v, of_direction = (phi * (u * linear(b, weight, bias)).view_as(phi)).unbind(1)
    return ((of_v[:, None] * v + of_direction[:, None] * direction[:, :, None]).to(v.dtype),)


class PNAEqLayer(nn.Module):
    """One layer; the equations stand at the head of this file."""

    def __init__(self, config: PNA.Config):
        super().__init__()
        hidden = config.hidden
        self.scalars = PNAPlusLayer(config)
        self.norm, self.update_norm = LayerNorm(hidden), LayerNorm(hidden)
        self.phi = MLP([hidden, hidden, 2 * hidden])
        self.filter = Linear(config.radial, 2 * hidden, gain=BASIS_GAIN)
        self.mix = Linear(hidden, 2 * hidden, bias=False)  # U and V: over channels, so that vectors stay vectors
        self.update = MLP([2 * hidden, hidden, 3 * hidden])

    def forward(
        self, s: Tensor, v: Tensor, i: Tensor, j: Tensor, direction: Tensor, b: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """s (N, H), v (N, 3, H), receivers i, senders j (E,), direction (E, 3), basis b (E, R), envelope u (E, 1)."""
        atoms, hidden = s.shape
        (message,) = over_edges(
            vector_message,
            i,
            j,
            atoms,
            u,
            width=3 * hidden,
            senders=[self.phi(self.norm(s)).view(atoms, 2, hidden).to(v.dtype), v],
            edges=[direction, b],
            weights=[self.filter.weight, self.filter.bias],
        )
        s, v = self.scalars(s, i, j, b, u), v + message / TYPICAL_NEIGHBORS**0.5
        uv, vv = self.mix(v).to(v.dtype).chunk(2, dim=2)  # (N, 3, H) each
        vv2 = vv.square().sum(dim=1)
        of_a, of_b, of_c = self.update(torch.cat([self.update_norm(s), torch.log1p(vv2)], dim=1)).chunk(3, dim=1)
        return s + of_a + of_b * (uv * vv).sum(dim=1) * torch.rsqrt(vv2 + 1.0), v + of_c[:, None] * uv
