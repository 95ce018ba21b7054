"""Encoders of scalars alone: what those have in common that were published for graphs without geometry.

    h_i = embedding of element, charge and spin;     h = layer(h, edges) for every layer;     features = norm(h)

An edge is its two atoms, the radial basis b of its length and its cutoff envelope u. Nothing else of the geometry is
seen: features do not change under rotations, and there are no vectors, so that direct forces are sums of unit vectors
along edges (`model/branch.py`).
"""

from collections.abc import Iterable

from torch import Tensor, nn

from multifid.graphs.edges import EdgeFunction, over_edges
from multifid.graphs.graph import Graph
from multifid.model.contract import Encoder, Features
from multifid.model.layers import LayerNorm, NodeEmbedding, call, envelope


class ScalarEncoder(Encoder):
    """Scalars of width `hidden` after `layers`, each called with h (N, H), i, j (E,), b (E, R), u (E, 1) for a new h.

    basis: of distances, (E,) -> (E, R).
    """

    def __init__(self, hidden: int, cutoff: float, basis: nn.Module, layers: Iterable[nn.Module]):
        super().__init__()
        self.degrees = {0: hidden}
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden)
        self.radial = basis
        self.layers = nn.ModuleList(layers)
        self.readouts = len(self.layers) - 1
        self.norm = LayerNorm(hidden)

    def forward(self, graph: Graph) -> Features:
        h = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        b, u = self.radial(graph.distances), envelope(graph.distances, self.cutoff)
        of_layers = []
        for number, layer in enumerate(self.layers):
            if number:
                (h,) = graph.exchanged(h)
            h = call(layer, self.recompute, h, graph.receivers, graph.senders, b, u)
            of_layers.append(h)
        return Features(self.norm(h), layers=tuple(of_layers[:-1]))


def sum_over_neighbours(
    message: EdgeFunction, x: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor, *weights: Tensor
) -> Tensor:
    """(N, K): sums to the receivers i of message(x_j, u, b, weights), which gives ((T, K),); x (N, K)."""
    (total,) = over_edges(
        message, i, j, x.shape[0], u, width=x.shape[1], senders=[x.to(u.dtype)], edges=[b], weights=weights
    )
    return total
