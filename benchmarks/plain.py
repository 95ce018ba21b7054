"""The encoders as their authors publish them: what `training.py` compares with, and the reference of the tests.

EGNN has one concatenated input per edge; every operation stands on its own, in the expressions of the published code
(`h[row]`, `scatter_add_`). The same mathematics, widths and weights as in `multifid.model.encoders`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from multifid.graphs.graph import Graph
from multifid.model.contract import Encoder, Features
from multifid.model.encoders.egnn import EGNN
from multifid.model.encoders.painn import PaiNN
from multifid.model.layers import MLP, TYPICAL_NEIGHBORS, envelope


class PlainEGNN(Encoder):
    """The plain form of a given encoder, with a copy of its weights."""

    def __init__(self, encoder: EGNN):
        super().__init__()
        self.degrees, self.cutoff = encoder.degrees, encoder.cutoff
        self.embedding, self.basis, self.norm = encoder.embedding, encoder.basis, encoder.norm
        self.layers = nn.ModuleList(PlainLayer(layer) for layer in encoder.layers)

    def forward(self, graph: Graph) -> Features:
        h = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        v = graph.vectors.new_zeros((len(h), self.degrees[1], 3))
        r, d, edges = graph.vectors, graph.distances, (graph.receivers, graph.senders)
        for layer in self.layers:
            h, v = layer(
                h, v, edges, r, self.basis(d, graph.numbers, graph.receivers, graph.senders), envelope(d, self.cutoff)
            )
        return Features(self.norm(h), v)


class PlainLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.per_area, self.norm, self.node = layer.per_area, layer.norm, plain(layer.node)
        hidden = layer.message.in_features
        self.first = nn.Linear(2 * hidden + layer.pair.in_features, hidden, dtype=layer.pair.weight.dtype)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([layer.receiver.weight, layer.sender.weight, layer.pair.weight], dim=1))
            self.first.bias.copy_(layer.receiver.bias)
        self.message, self.gate, self.move = layer.message, layer.gate, plain(layer.move)

    def forward(
        self, h: Tensor, v: Tensor, edges: tuple[Tensor, Tensor], r: Tensor, b: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        row, col = edges
        n = self.norm(h)
        x = r[:, None, :] + v[col] - v[row]
        x2 = torch.sum(x**2, dim=2)
        m = silu(self.first(torch.cat([n[row], n[col], x2 * self.per_area, b], dim=1)))
        m = silu(self.message(m))
        m = torch.sigmoid(self.gate(m)) * m
        moved = (u * self.move(m) / torch.sqrt(x2 + 1.0))[:, :, None] * x
        v = v + segment_sum(moved.flatten(1), row, len(h)).view_as(v) / TYPICAL_NEIGHBORS**0.5
        m_sum = segment_sum(u * m, row, len(h)) / TYPICAL_NEIGHBORS
        return h + self.node(torch.cat([n, m_sum, torch.log1p(torch.sum(v**2, dim=2))], dim=1)), v


class PlainPaiNN(Encoder):
    """The plain form of a given encoder, with its weights."""

    def __init__(self, encoder: PaiNN):
        super().__init__()
        self.degrees, self.cutoff = encoder.degrees, encoder.cutoff
        self.embedding, self.basis, self.norm = encoder.embedding, encoder.basis, encoder.norm
        self.layers = encoder.layers

    def forward(self, graph: Graph) -> Features:
        s = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        v = graph.vectors.new_zeros((len(s), self.degrees[1], 3))
        r, d, row, col = graph.vectors, graph.distances, graph.receivers, graph.senders
        direction = (r / d[:, None])[:, None, :]
        for layer in self.layers:
            w = layer.filter(self.basis(d, graph.numbers, graph.receivers, graph.senders)) * envelope(d, self.cutoff)
            a, b, c = (layer.phi(layer.norm(s))[col] * w).chunk(3, dim=1)
            moved = b[:, :, None] * v[col] + c[:, :, None] * direction
            s = s + segment_sum(a, row, len(s)) / TYPICAL_NEIGHBORS
            v = v + segment_sum(moved.flatten(1), row, len(s)).view_as(v) / TYPICAL_NEIGHBORS**0.5
            uv, vv = layer.mix(v.transpose(1, 2)).transpose(1, 2).chunk(2, dim=1)
            vv2 = torch.sum(vv**2, dim=2)
            a, b, c = layer.update(torch.cat([layer.norm(s), torch.log1p(vv2)], dim=1)).chunk(3, dim=1)
            s = s + a + b * torch.sum(uv * vv, dim=2) / torch.sqrt(vv2 + 1.0)
            v = v + c[:, :, None] * uv
        return Features(self.norm(s), v)


PLAIN = {"egnn": PlainEGNN, "painn": PlainPaiNN}


def segment_sum(values: Tensor, segment: Tensor, size: int) -> Tensor:
    return values.new_zeros(size, values.shape[1]).scatter_add_(0, segment[:, None].expand_as(values), values)


def plain(mlp: MLP) -> nn.Sequential:
    """The same maps with SiLU between them."""
    blocks = [block for linear in mlp.maps for block in (linear, nn.SiLU())]
    return nn.Sequential(*blocks[:-1])
