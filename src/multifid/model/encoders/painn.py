"""PaiNN, the polarizable atom interaction network (Schütt, Unke, Gastegger 2021, arXiv 2102.03150).

Scalars s_i (H) and H vectors v_i per atom. One layer is a message block and an update block, with r_ij the vector from
i to j, W(|r_ij|) a linear map of its radial basis times the cutoff envelope, and U, V linear maps over channels:

    [a, b, c]_ij = phi(s_j) * W(|r_ij|)                                        paper eq. 7 and 8
    s_i += 1/M sum_j a_ij,    v_i += 1/sqrt(M) sum_j (b_ij v_j + c_ij r_ij / |r_ij|)
    [a, b, c]_i  = a(s_i, log(1 + |V v_i|^2))                                  paper eq. 9 and 10
    s_i += a_i + b_i <U v_i, V v_i> / sqrt(1 + |V v_i|^2),    v_i += c_i U v_i

M is a constant, never the number of neighbours: dividing by that would jump when an atom crosses the cutoff. The paper
takes |V v_i| and the bare product: the gradient of the one is undefined at zero, where v starts, and the other grows
with the square of v, which made forces of 1e7 scales out of untrained weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, silu

from multifid.graphs.edges import faster_form_of, over_edges
from multifid.graphs.graph import Graph
from multifid.model.contract import Encoder, EncoderConfig, Features
from multifid.model.kernels import painn as kernels
from multifid.model.kernels import painn_atoms_native as native_atoms
from multifid.model.kernels import painn_native as native
from multifid.model.kernels.embedded import painn as operations
from multifid.model.kernels.embedded import wanted
from multifid.model.kernels.gpu.chosen import on_gpu
from multifid.model.kernels.native.build import usable
from multifid.model.kernels.painn import filters
from multifid.model.layers import (
    ELEMENTS,
    MLP,
    SIZED,
    TYPICAL_NEIGHBORS,
    Elements,
    LayerNorm,
    Linear,
    NodeEmbedding,
    PairBasis,
    bent_maps,
    call,
    pairs,
)

Map = Callable[[Tensor], Tensor]


class PaiNN(Encoder):
    """Scalars of width `hidden` and as many vector channels per atom after `layers` layers."""

    edges_in_library = True

    class Config(EncoderConfig):
        name: Literal["painn"] = "painn"
        layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
        hidden: int = Field(default=64, ge=1, description="Width of the scalar features, and vector channels per atom.")
        radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")
        sized: int = SIZED
        elements: Elements = ELEMENTS

        @model_validator(mode="before")
        @classmethod
        def _without_former_keys(cls, values: Any) -> Any:
            """Runs of the first release wrote down two keys of another encoder, with values that meant nothing here."""
            former = {"tensors": (0,), "vectors": (None, values.get("hidden"))} if isinstance(values, dict) else {}
            return {k: v for k, v in values.items() if v not in former.get(k, ())} if former else values

    def __init__(self, config: Config, cutoff: float):
        super().__init__()
        hidden = config.hidden
        self.degrees = {0: hidden, 1: hidden}
        self.readouts = config.layers - 1
        self.cutoff = cutoff
        self.embedding = NodeEmbedding(hidden, config.elements)
        self.basis = PairBasis(config.radial, config.sized, cutoff)
        self.layers = nn.ModuleList(PaiNNLayer(hidden, self.basis.size) for _ in range(config.layers))
        self.norm = LayerNorm(hidden)

    def forward(self, graph: Graph) -> Features:
        numbers, structure = graph.of_own(graph.numbers), graph.of_own(graph.structure)
        s = self.embedding(numbers, graph.charge, graph.spin, structure)
        v = graph.vectors.new_zeros((numbers.shape[0], 3, self.degrees[1]))
        direction, basis, u = pairs(graph, self.basis, self.cutoff, directions=True)
        of_graph: dict[str, Any] = {} if graph.own is None else {"fetch": graph.exchanged}
        if usable(u, self.degrees[0]):
            of_graph["twin"] = native.twins(graph.receivers, graph.senders, graph.atoms, graph.vectors)
        of_layers = []
        for number, layer in enumerate(self.layers):
            if number and graph.own is None:
                s, v = graph.exchanged(s, v)
            of_domain = partial(layer, **of_graph) if of_graph else layer
            s, v = call(of_domain, self.recompute, s, v, graph.receivers, graph.senders, direction, basis, u)
            of_layers.append(s)
        return Features(self.norm(s), v.transpose(1, 2).contiguous(), layers=tuple(of_layers[:-1]))


def edge_message(
    phi: Tensor, v: Tensor, u: Tensor, direction: Tensor, basis: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor]:
    """The scalar message of each edge and the three components of the vector one, (T, 4, H).

    phi (T, 3, H) and v (T, 3, H): of the senders; envelope u (T, 1); direction (T, 3); basis (T, R); weight (3 H, R)
    and bias (3 H,) of the filter.
    """
    a, b, c = (phi * filters(basis, u, weight, bias)).unbind(1)
    moved = b[:, None] * v + c[:, None] * direction[:, :, None]
    return (torch.cat([a[:, None], moved], dim=1).to(v.dtype),)


faster_form_of(edge_message)(kernels.messages)
on_gpu(edge_message, "painn", summed=(True,))


def edges_of_layer(
    i: Tensor, j: Tensor, phi: Tensor, v: Tensor, direction: Tensor, basis: Tensor, u: Tensor, *filter: Tensor
) -> Tensor:
    """Sums over the neighbours of each atom of scalar and vector messages, (N, 4, H)."""
    atoms, _, hidden = phi.shape
    edges = [direction, basis]
    (sums,) = over_edges(edge_message, i, j, atoms, u, width=3 * hidden, senders=[phi, v], edges=edges, weights=filter)
    return sums


class PaiNNLayer(nn.Module):
    """Message block and update block; the equations stand at the head of this file."""

    def __init__(self, hidden: int, radial: int):
        super().__init__()
        self.norm = LayerNorm(hidden)
        self.phi = MLP([hidden, hidden, 3 * hidden])
        self.filter = Linear(radial, 3 * hidden, gain=0.3)  # the basis has values near 3 at bond lengths
        self.mix = Linear(hidden, 2 * hidden, bias=False)  # U and V: over channels, so that vectors stay vectors
        self.update = MLP([2 * hidden, hidden, 3 * hidden])

    def forward(
        self,
        s: Tensor,
        v: Tensor,
        i: Tensor,
        j: Tensor,
        direction: Tensor,
        basis: Tensor,
        u: Tensor,
        fetch: Callable[..., tuple[Tensor, ...]] | None = None,
        twin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """s (N, H), v (N, 3, H), receivers i and senders j (E,), direction (E, 3), basis (E, R), envelope u (E, 1).

        fetch: `Graph.exchanged` of a domain, whose own atoms s and v are of. twin: as by `native.twins`.
        """
        atoms, hidden = s.shape
        phi = bent_maps(s, self.phi.linears(), bent=False, norm=self.norm).view(atoms, 3, hidden).to(v.dtype)
        phi, of_all = (phi, v) if fetch is None else fetch(phi, v)
        inputs = (phi, of_all, direction, basis, u, self.filter.weight, self.filter.bias)
        known = partial(edges_of_layer, i, j)
        if usable(u, hidden):
            message = native.edges(known, i, j, inputs, twin)
        elif wanted(u, hidden):
            message = operations.edges(i, j, inputs)
        else:
            message = known(*inputs)
        message = message if fetch is None else message[:atoms]
        if native_atoms.usable(s):
            eps, of_atoms = self.norm.eps, (s, v, message)
            return native_atoms.update(
                partial(updated_with, eps), of_atoms, self.update_weights(), TYPICAL_NEIGHBORS, eps
            )
        mix = partial(bent_maps, maps=[self.mix], bent=False)
        return updated(s, v, message, self.norm, mix, self.update)

    def update_weights(self) -> list[Tensor]:
        """What `updated_with` is given."""
        maps = self.update.linears()
        return [self.norm.weight, self.norm.bias, self.mix.weight, *(p for m in maps for p in (m.weight, m.bias))]


def updated(s: Tensor, v: Tensor, sums: Tensor, norm: Map, mix: Map, update: Map) -> tuple[Tensor, Tensor]:
    """Scalars and vectors after the sums over neighbours (N, 4, H) and the update block.

    mix: (3 N, H) -> (3 N, 2 H), U and V. update: (N, 2 H) -> (N, 3 H).
    """
    atoms, hidden = s.shape
    s = s + sums[:, 0] / TYPICAL_NEIGHBORS
    v = v + sums[:, 1:] / TYPICAL_NEIGHBORS**0.5
    mixed = mix(v.reshape(3 * atoms, hidden))
    uv, vv = mixed.view(atoms, 3, 2 * hidden).to(v.dtype).chunk(2, dim=2)  # (N, 3, H) each
    vv2 = vv.square().sum(dim=1)
    a, b, c = update(torch.cat([norm(s), torch.log1p(vv2)], dim=1)).chunk(3, dim=1)
    return s + a + b * (uv * vv).sum(dim=1) * torch.rsqrt(vv2 + 1.0), v + c[:, None] * uv


def updated_with(
    epsilon: float, s: Tensor, v: Tensor, sums: Tensor, norm: Tensor, norm_bias: Tensor, mix: Tensor, *maps: Tensor
) -> tuple[Tensor, Tensor]:
    """`updated` as a function of weights; maps: two weights, each with its bias behind it."""
    w0, b0, w1, b1 = maps
    return updated(
        s,
        v,
        sums,
        lambda x: layer_norm(x, norm.shape, norm, norm_bias, epsilon),
        lambda x: linear(x, mix),
        lambda x: linear(silu(linear(x, w0, b0)), w1, b1),
    )
