"""An encoder as another package would write it: scalars only, angles from triplets, its own config."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from multifid.graphs.graph import Graph, GraphNeeds
from multifid.model.contract import Encoder, EncoderConfig, Features
from multifid.model.layers import MLP, LayerNorm, NodeEmbedding, RadialBasis, envelope, sum_over


class Angular(Encoder):
    """Sums over neighbours of filtered features, and over pairs of neighbours of a function of their angle."""

    needs = GraphNeeds(triplets=True)

    class Config(EncoderConfig):
        name: Literal["angular"] = "angular"
        layers: int = Field(default=2, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=32, ge=1, description="Width of the features.")

    def __init__(self, config: Config, cutoff: float):
        super().__init__()
        self.degrees, self.cutoff, self.readouts = {0: config.hidden}, cutoff, config.layers - 1
        self.embedding = NodeEmbedding(config.hidden)
        self.radial = RadialBasis(6, cutoff)
        self.layers = nn.ModuleList(Layer(config.hidden) for _ in range(config.layers))
        self.norm = LayerNorm(config.hidden)

    def forward(self, graph: Graph) -> Features:
        h = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        u = envelope(graph.distances, self.cutoff)
        unit = graph.vectors / graph.distances[:, None]
        f, e = graph.triplets
        cosine = -(unit[f] * unit[e]).sum(dim=1, keepdim=True)
        seen = []
        for layer in self.layers:
            h = layer(h, graph.receivers, graph.senders, self.radial(graph.distances), u, f, e, u[f] * u[e], cosine)
            seen.append(h)
        return Features(self.norm(h), layers=tuple(seen[:-1]))


class Layer(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm, self.filter = LayerNorm(hidden), MLP([6, hidden, hidden])
        self.angle, self.update = MLP([1, hidden, hidden]), MLP([hidden, hidden, hidden])

    def forward(self, h, i, j, b, u, f, e, both, cosine):
        message = u * self.filter(b) * self.norm(h).index_select(0, j)
        angles = sum_over(both * self.angle(cosine) * message.index_select(0, f), e, message.shape[0])
        return h + self.update(sum_over(message + torch.tanh(angles) * u, i, h.shape[0]) / 16)
