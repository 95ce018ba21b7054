"""How often a random walk comes back to its atom: an encoding of places for global attention, of the endless crystal.

Attention over a structure does not see where atoms stand to each other. As in GPS, random walks tell it something of
that (Dwivedi et al. 2022, arXiv 2110.07875): the probabilities to be back after k steps, here of walks that take the
edge to a neighbour the likelier the larger its envelope u, with n the smooth number of neighbours (`smooth.py`):

    P_ij  = u_ij / n_i
    p_2   = sum_j P_ij P_ji              the two ways of one edge, u_ij^2 / (n_i n_j)
    p_3   = sum_jk P_ij P_jk P_ki        triangles; k -> j -> i are the triplets, and |r_ij + r_jk| is the third side

A walk goes on to the very image that an edge leads to, and is back only where its edges add up to nothing. So in a
crystal these are the numbers of the endless one: a supercell has the same, and an atom is not at home at its image.
They are smooth, as envelopes are; an atom alone comes back never. Longer walks would take all paths of three and more
edges from every atom. Eigenvectors of a graph's Laplacian, the other encoding of GPS, are not smooth in positions.
"""

import torch
from torch import Tensor, nn

from multifid.graphs.graph import Graph
from multifid.model.layers import TYPICAL_NEIGHBORS, Linear, envelope, sum_over
from multifid.model.smooth import degree


class Walks(nn.Module):
    """A linear map of the probabilities of walks up to `steps` steps, 2 or 3, that is added to the scalars."""

    def __init__(self, hidden: int, steps: int, cutoff: float):
        super().__init__()
        self.steps, self.cutoff = steps, cutoff
        self.map = Linear(steps - 1, hidden)

    def forward(self, h: Tensor, graph: Graph) -> Tensor:
        """h (N, H)."""
        return h + self.map(TYPICAL_NEIGHBORS * returns(graph, self.steps, self.cutoff))


def returns(graph: Graph, steps: int, cutoff: float) -> Tensor:
    """p_2 to p_steps of every atom, (N, steps - 1)."""
    i, j, atoms = graph.receivers, graph.senders, graph.numbers.shape[0]
    u = envelope(graph.distances, cutoff)
    n = degree(u, i, atoms)
    there = u / n.index_select(0, j)  # and back: P_ij P_ji = u_ij^2 / (n_i n_j)
    found = [sum_over(u * there, i, atoms) / n]
    if steps > 2:
        assert graph.triplets is not None
        f, e = graph.triplets  # k -> j, j -> i
        third = torch.linalg.vector_norm(graph.vectors.index_select(0, e) + graph.vectors.index_select(0, f), dim=1)
        two = there.index_select(0, e) * there.index_select(0, f)  # u_ij u_jk / (n_j n_k)
        around = sum_over(two * envelope(third, cutoff), i.index_select(0, e), atoms)
        found.append(around / n)
    return torch.cat(found, dim=1)
