"""GAT v2, attention over neighbours (Brody, Alon, Yahav 2022, arXiv 2105.14491, eq. 7; Veličković et al. 2018).

In each head, with b the radial basis of the distance, u its cutoff envelope and e_ii the score of the atom itself,
which has no distance:

    e_ij = a . leaky(W_l h_j + W_r h_i + W_e b_ij),     e_ii = a . leaky(W_l h_i + W_r h_i)
    alpha_ij = u_ij exp(e_ij) / (exp(e_ii) + sum_k u_ik exp(e_ik))
    h_i += W_o silu(sum_j alpha_ij W_l h_j + alpha_ii W_l h_i)                         heads side by side

Made right: published attention has no cutoff, so that a neighbour that leaves changes the weights of all others at
once; here the envelope stands inside the softmax, beside the exponentials. The atom itself always takes part, so that
the sum is never empty. leaky(x) = 0.2 x + 0.8 silu(x) has no kink, at which forces would jump. Where envelopes are one
and leaky has its kink, these are the published numbers.
"""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from multifid.graphs.edges import over_edges
from multifid.model.contract import EncoderConfig
from multifid.model.encoders.scalar import ScalarEncoder
from multifid.model.layers import BASIS_GAIN, SILU_GAIN, LayerNorm, Linear, RadialBasis
from multifid.model.smooth import attention

SLOPE = 0.2  # of the activation far below zero


class GAT(ScalarEncoder):
    """Scalars of width `hidden` per atom, `hidden / heads` from each head, after `layers` layers."""

    class Config(EncoderConfig):
        name: Literal["gat"] = "gat"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features, a multiple of `heads`.")
        heads: int = Field(default=4, ge=1, description="Attention heads.")
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")

        @model_validator(mode="after")
        def _heads_are_equal(self) -> "GAT.Config":
            if self.hidden % self.heads:
                raise ValueError(
                    f"model.encoder.hidden must be a multiple of heads, got {self.hidden} and {self.heads}"
                )
            return self

    def __init__(self, config: Config, cutoff: float):
        layers = (GATLayer(config.hidden, config.heads, config.radial) for _ in range(config.layers))
        super().__init__(config.hidden, cutoff, RadialBasis(config.radial, cutoff), layers)


def leaky(x: Tensor) -> Tensor:
    """A leaky rectifier without a kink."""
    return SLOPE * x + (1.0 - SLOPE) * silu(x)


def scores(x: Tensor, a: Tensor) -> Tensor:
    """a . leaky(x) of every head: x (T, H), heads side by side, a (K, H / K) -> (T, K)."""
    return (leaky(x).view(x.shape[0], a.shape[0], a.shape[1]) * a).sum(dim=2)


def edge_score(right: Tensor, left: Tensor, u: Tensor, b: Tensor, pair: Tensor, a: Tensor) -> tuple[Tensor]:
    """Scores of all heads, (T, K); right, left (T, H): of receivers and senders; basis b (T, R); a (K, H / K)."""
    return (scores(right + left + linear(b, pair), a),)


def edge_value(left: Tensor, u: Tensor, alpha: Tensor) -> tuple[Tensor]:
    """(T, K, C); left (T, K, C): of the senders; alpha (T, K) has the envelope u already."""
    return (alpha[:, :, None] * left,)


class GATLayer(nn.Module):
    """One layer; the equations stand at the head of this file."""

    def __init__(self, hidden: int, heads: int, radial: int):
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(hidden)
        self.left = Linear(hidden, hidden)
        self.right = Linear(hidden, hidden)
        self.pair = Linear(radial, hidden, bias=False, gain=BASIS_GAIN)
        self.attention = Linear(hidden // heads, heads, bias=False)
        self.out = Linear(hidden, hidden, gain=SILU_GAIN)

    def forward(self, h: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """h (N, H), receivers i and senders j (E,), basis b (E, R), envelope u (E, 1)."""
        return h + self.out(silu(self.convolved(self.norm(h), i, j, b, u)))

    def convolved(self, n: Tensor, i: Tensor, j: Tensor, b: Tensor, u: Tensor) -> Tensor:
        """The published layer: what the activation is applied to."""
        atoms, a = n.shape[0], self.attention.weight
        left, right = self.left(n).to(u.dtype), self.right(n).to(u.dtype)
        (e,) = over_edges(
            edge_score,
            i,
            j,
            atoms,
            u,
            width=n.shape[1],
            receivers=[right],
            senders=[left],
            edges=[b],
            weights=[self.pair.weight, a],
            summed=(False,),
        )
        of_edges, of_self = attention(e, u, i, scores(left + right, a))
        left = left.view(atoms, self.heads, a.shape[1])
        (total,) = over_edges(edge_value, i, j, atoms, u, width=n.shape[1], senders=[left], edges=[of_edges])
        return (total + of_self[:, :, None] * left).flatten(1)
