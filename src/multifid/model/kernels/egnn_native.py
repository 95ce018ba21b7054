"""The edges of a layer of EGNN in C++ (`native/egnn.h`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from multifid.model.kernels.egnn import EdgeWeights, matmul_type
from multifid.model.kernels.native import twice
from multifid.model.kernels.native.twice import Tensors

INPUTS = ("a", "c", "v", "r", "b", "u", "y")
WEIGHTS = EdgeWeights._fields
OUTPUTS = ("m", "v", "t")
WIDE = ("first", "second", "third")
ARRAYS = (
    "i", "j", *INPUTS, *WEIGHTS, *(f"sum_{x}" for x in OUTPUTS), *WIDE, "gates", "phi",
    *(f"G_{x}" for x in OUTPUTS), *(f"g_{x}" for x in (*INPUTS, *WEIGHTS)), "back_m", "back_y",
    *(f"d_{x}" for x in INPUTS), *(f"d_sum_{x}" for x in OUTPUTS), *(f"d_{x}" for x in WIDE), "d_phi",
    *(f"N_{x}" for x in OUTPUTS),
)  # fmt: skip
GROUP = 8  # channels that the library takes at once

Plain = Callable[..., tuple[Tensor, ...]]


def edges(
    plain: Plain, i: Tensor, j: Tensor, per_area: float, angles: bool, inputs: Sequence[Tensor], weights: EdgeWeights
) -> tuple[Tensor, ...]:
    """Sums over the neighbours of each atom: messages (N, K), moves (N, C, 3) and, with `y`, tensors (N, T, 5).

    plain: the same function in torch, of inputs and weights. i, j: (E,), i ascending. inputs: a, c (N, K), v (N, C, 3),
    r (E, 3), b (E, R), u (E, 1), and y (E, 5) where there are tensors. K: a multiple of 16; of 32 for bfloat16. Where a
    has fewer rows, receivers are of those, and sums have as many.
    """
    vectors = inputs[2].shape[1]
    channels = Channels(vectors, weights.weight.shape[0] - vectors, inputs[4].shape[1], angles)
    names = (*INPUTS[: len(inputs)], *WEIGHTS)
    layer = Edges(
        OUTPUTS[: len(inputs) - 4], names, WEIGHTS, ("a", "c"), twice.TYPES[matmul_type(inputs[5])],
        i.contiguous(), j.contiguous(), per_area, channels, plain,
    )  # fmt: skip
    return channels.outputs(twice.apply(layer, channels.given(inputs, weights)))


@dataclass(frozen=True)
class Channels:
    """The library takes vectors and tensors eight by eight, those of one component side by side; zeros behind them."""

    vectors: int
    tensors: int
    radial: int
    angles: bool

    def given(self, inputs: Sequence[Tensor], weights: EdgeWeights) -> list[Tensor]:
        """Inputs and weights as the library takes them."""
        a, c, v, *rest = inputs
        behind = -self.vectors % GROUP
        pair, weight, bias = weights.pair, weights.weight, weights.weight_bias
        if behind:
            columns = pair.split([self.vectors, self.radial, *([self.vectors] * 2 if self.angles else [])], dim=1)
            pair = torch.cat([x if n == 1 else pad(x, [0, behind]) for n, x in enumerate(columns)], dim=1)
        if behind or self.tensors % GROUP:
            counts = [(self.vectors, behind), (self.tensors, -self.tensors % GROUP)]
            parts = zip(weight.split([n for n, _ in counts]), bias.split([n for n, _ in counts]), counts, strict=True)
            rows, biases = zip(*((pad(x, [0, 0, 0, n]), pad(y, [0, n])) for x, y, (_, n) in parts), strict=True)
            weight, bias = torch.cat(rows), torch.cat(biases)
        weights = weights._replace(pair=pair, weight=weight, weight_bias=bias)
        return [
            x.contiguous()
            for x in (a, c, pad(v.transpose(1, 2), [0, behind]) if behind else v.transpose(1, 2), *rest, *weights)
        ]

    def outputs(self, sums: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the library gives, as (N, K), (N, C, 3) and (N, T, 5)."""
        m, *moved = sums
        kept = zip(moved, (self.vectors, self.tensors), strict=False)
        return (m, *(x[:, :, :n].transpose(1, 2) for x, n in kept))

    def back(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Inputs and weights from what the library takes."""
        a, c, v, *rest = given
        inputs, weights = rest[: -len(WEIGHTS)], EdgeWeights(*rest[-len(WEIGHTS) :])
        wide, starts = self.vectors + -self.vectors % GROUP, [0]
        for n in (wide, self.radial, wide):
            starts.append(starts[-1] + n)
        sizes = [self.vectors, self.radial, *([self.vectors] * 2 if self.angles else [])]
        pair = torch.cat([weights.pair[:, s : s + n] for s, n in zip(starts, sizes, strict=False)], dim=1)
        rows = [slice(0, self.vectors), slice(wide, wide + self.tensors)]
        weight, bias = (torch.cat([x[r] for r in rows]) for x in (weights.weight, weights.weight_bias))
        weights = weights._replace(pair=pair, weight=weight, weight_bias=bias)
        return [a, c, v[:, :, : self.vectors].transpose(1, 2), *inputs, *weights]

    def as_given(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Sums as the library gives them."""
        m, *moved = sums
        return [m, *(pad(x.transpose(1, 2), [0, -x.shape[1] % GROUP]) for x in moved)]


@dataclass
class Edges(twice.Layer):
    function = "multifid_egnn"
    layout = twice.Layout(9, 1, ARRAYS)  # EGNNCall of native/egnn.h
    i: Tensor
    j: Tensor
    per_area: float
    channels: Channels
    in_torch: Plain | None

    def numbers(self, tensors: Tensors) -> Sequence[int | float]:
        c, v, b, phi = (tensors[name] for name in ("c", "v", "b", "weight_bias"))
        assert c is not None and v is not None and b is not None and phi is not None
        (atoms, hidden), vectors, radial = c.shape, v.shape[2], b.shape[1]
        sizes = (self.i.shape[0], atoms, hidden, vectors, radial, phi.shape[0] - vectors, self.channels.angles)
        return *sizes, torch.get_num_threads(), self.type, self.per_area

    def call(self, what: int, arrays: Tensors, each: Sequence[Tensors] = ({},)) -> None:
        super().call(what, {**arrays, "i": self.i, "j": self.j}, each)

    def sums(self, tensors: Tensors) -> list[Tensor]:
        a, v, phi = (tensors[name] for name in ("a", "v", "weight_bias"))
        assert a is not None and v is not None and phi is not None
        found = [torch.zeros_like(a), a.new_zeros(a.shape[0], *v.shape[1:])]
        more = phi.shape[0] - v.shape[2]
        return [*found, a.new_zeros(a.shape[0], 5, more)] if len(self.outputs) == len(OUTPUTS) else found

    def kept(self, tensors: Tensors) -> dict[str, Tensor]:
        a, phi = tensors["a"], tensors["weight_bias"]
        assert a is not None and phi is not None
        edges, width = self.i.shape[0], a.shape[1]
        wide = {name: a.new_empty(edges, width, dtype=self.kept_type) for name in WIDE}
        return {**wide, "gates": a.new_empty(edges), "phi": a.new_empty(edges, phi.shape[0])}

    def back(self, known: Tensors) -> dict[str, Tensor]:
        return {name: torch.empty_like(known["first"]) for name in ("back_m", "back_y")}  # type: ignore[arg-type]

    def changes(self, kept: Tensors) -> dict[str, Tensor]:
        return {f"d_{name}": torch.empty_like(kept[name]) for name in (*WIDE, "phi")}  # type: ignore[arg-type]

    def plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        assert self.in_torch is not None
        return self.channels.as_given(self.in_torch(*self.channels.back(inputs)))
