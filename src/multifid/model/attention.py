"""Global attention between the layers of any encoder: every atom of a structure sees all others, however far.

As in GPS (Rampášek et al. 2022, arXiv 2205.12454) local layers and attention over the whole graph take turns; here with
the linear attention of Katharopoulos et al. 2020 (arXiv 2006.16236, eq. 4 to 6), phi = softplus, per head:

    h_i += W [phi(q_i) . sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j))],      j: all atoms of the structure, i too
    h_i += MLP(h_i)

The sums are over segments, one for each structure, in work and memory that grow with the number of atoms and not with
its square. It acts on scalars alone, so every symmetry of the encoder stays, and a batch is its structures one by one.

It is a mean over a structure, so energies are *not* extensive with it: n identical far copies, and supercells, have n
times the energy, but two different molecules far apart change each other's energies, and so do an adsorbate and a slab
at any distance. A system cannot be cut into domains. Use it where long range matters more than that.

With `walks` the scalars learn before the first attention how often random walks come back (`walks.py`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from multifid.graphs.graph import Graph
from multifid.model.layers import MLP, LayerNorm, Linear, call, sum_over


class AttentionConfig(BaseModel):
    """Global attention within each structure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: int = Field(default=4, ge=1, description="Heads of global attention; must divide the width of the scalars.")
    every: int = Field(default=1, ge=1, description="Layers between one global attention and the next.")
    walks: Literal[0, 2, 3] = Field(
        default=0, description="Steps of random walks whose probabilities to come back encode an atom's place; 0: none."
    )


class GlobalAttention(nn.Module):
    """One attention over all atoms of each structure; the equations stand at the head of this file."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.second_norm = LayerNorm(hidden), LayerNorm(hidden)
        self.maps = Linear(hidden, 3 * hidden)
        self.out = Linear(hidden, hidden, gain=0.5)
        self.mlp = MLP([hidden, hidden, hidden], last_gain=0.5)

    def forward(self, h: Tensor, structure: Tensor, charge: Tensor) -> Tensor:
        """h (N, H), structure (N,) of each atom, charge (S,), of which only the number of structures is read."""
        atoms, hidden = h.shape
        maps = self.maps(self.norm(h)).to(h.dtype).view(atoms, 3, self.heads, hidden // self.heads)
        q, k, v = maps.unbind(1)  # (N, heads, D) each
        q, k = softplus(q), softplus(k)
        products = sum_over(k[:, :, :, None] * v[:, :, None, :], structure, charge.shape[0])  # (S, heads, D, D)
        keys = sum_over(k, structure, charge.shape[0])
        above = (q[:, :, :, None] * products.index_select(0, structure)).sum(dim=2)
        below = (q * keys.index_select(0, structure)).sum(dim=2, keepdim=True)
        h = h + self.out((above / below).view(atoms, hidden))
        return h + self.mlp(self.second_norm(h))


class BetweenLayers:
    """`Graph.exchange` of a whole graph: the scalars of atoms attend, every so many layers."""

    def __init__(
        self, graph: Graph, blocks: Sequence[nn.Module], every: int, recompute: bool, walks: nn.Module | None = None
    ):
        self.graph, self.blocks, self.every, self.recompute, self.walks = graph, blocks, every, recompute, walks
        self.passed = 0

    def __call__(self, h: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        self.passed += 1
        block, rest = divmod(self.passed, self.every)
        if rest == 0 and block <= len(self.blocks):
            if block == 1 and self.walks is not None:
                h = call(self.walks, self.recompute, h, self.graph)
            h = call(self.blocks[block - 1], self.recompute, h, self.graph.structure, self.graph.charge)  # type: ignore[assignment]
        return h, *others

    def within(self) -> Graph:
        """The graph, with attention between the layers that it is given to."""
        return replace(self.graph, exchange=self)
