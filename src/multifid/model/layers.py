"""Building blocks that all encoders and branches share, and the drawing of their weights.

No block draws weights when it is built: `draw_weights` does, from one generator, so that a part of the model starts
from the same numbers whatever else is built beside it and whatever the global random state is.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from multifid.graphs.graph import Graph
from multifid.model.kernels import mlp_native, pairs_native
from multifid.structures.elements import MAX_Z
from multifid.structures.periodic import RADIUS, properties

TYPICAL_NEIGHBORS = 16.0  # sums over neighbours are divided by this constant, never by their number
LARGEST_CHARGE = 15  # e: beyond, a structure is embedded as a neutral one
LARGEST_SPIN = 31  # multiplicity: beyond, as a singlet


class Linear(nn.Linear):
    """A linear map; weights are drawn from U(-a, a) with variance gain^2 / inputs, the bias is zero."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, gain: float = 1.0):
        self.gain = gain
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Left to `draw`."""

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        bound = self.gain * math.sqrt(3.0 / self.in_features)
        self.weight.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.zero_()


class Embedding(nn.Embedding):
    """A table of vectors with unit-normal entries, or, with a `neutral` row that stays zero for good, all zero.

    spread: of the entries, 0: all zero.
    """

    def __init__(self, rows: int, width: int, neutral: int | None = None, spread: float = 1.0):
        super().__init__(rows, width, padding_idx=neutral)
        self.spread = spread if neutral is None else 0.0

    def reset_parameters(self) -> None:
        """Left to `draw`."""

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        if self.spread:
            self.weight.normal_(std=self.spread, generator=generator)
        else:
            self.weight.zero_()


class LayerNorm(nn.LayerNorm):
    """Normalisation over the last dimension, starting with weight one and bias zero."""

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        self.reset_parameters()


class MLP(nn.Module):
    """Linear maps with SiLU between them; `last_gain` scales the drawn weights of the last map."""

    def __init__(self, widths: list[int], last_gain: float = 1.0):
        super().__init__()
        gains = [SILU_GAIN] * (len(widths) - 2) + [last_gain]
        self.maps = nn.ModuleList(
            Linear(a, b, gain=gain) for a, b, gain in zip(widths[:-1], widths[1:], gains, strict=True)
        )

    def linears(self) -> list[Linear]:
        """The maps, in order."""
        return list(self.maps)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return bent_maps(x, self.linears(), bent=False)

    def before_last(self, x: Tensor) -> Tensor:
        """What the last map is applied to."""
        return bent_maps(x, self.linears()[:-1], bent=True)


def bent_maps(x: Tensor, maps: list[Linear], bent: bool, norm: LayerNorm | None = None) -> Tensor:
    """Linear maps with SiLU between them and, if `bent`, behind the last one; before them the norm, if there is one."""
    if mlp_native.usable(x, maps) and all(type(m) is Linear for m in maps):
        return mlp_native.mlp(x, maps, bent, norm)
    x = x if norm is None else norm(x)
    for k, linear in enumerate(maps):
        x = silu(linear(x)) if bent or k + 1 < len(maps) else linear(x)
    return x


SILU_GAIN = 1.6766  # 1 / sqrt(E[silu(x)^2]) for unit-normal x: keeps the variance through layers of SiLU

BASIS_GAIN = 0.3  # of maps of a radial basis, whose values are near 3 at bond lengths


def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter of the module from the generator, in the order in which its blocks were built."""
    drawn = 0
    for block in module.modules():
        if callable(draw := getattr(block, "draw", None)):
            draw(generator)
            drawn += len(list(block.parameters()))
    assert drawn == len(list(module.parameters())), "a parameter lives outside the blocks that know how to draw it"


Elements = Literal["table", "periodic"]
ELEMENTS: Any = Field(
    default="table",
    description="table: a vector for each element; periodic: also a linear map of what the periodic table says of it, "
    "and vectors begin at zero, so that elements that are alike begin alike.",
)
SIZED: Any = Field(
    default=0,
    ge=0,
    description="Radial functions of the distance in units of both atoms' covalent radii, beside the others.",
)
PROPERTIES_GAIN = 3.0  # rows of `structures.periodic.properties` have lengths near two: so embeddings are near one


class NodeEmbedding(nn.Module):
    """What an atom is before it sees its neighbours: its element, and the charge and spin of its structure.

    Neutral singlets add nothing, and a charge or spin that training never showed acts as they do. Data that say nothing
    of charge and spin are taken as neutral singlets, so their rows are exactly those of a model without these tables.

    Every atom sees the total charge and spin of its structure; which one carries the charge is learned. So energies are
    extensive for neutral singlets only: two far copies of a cation are one structure of charge 2, and a sum over atoms
    that see the total cannot know that they are not one dication.
    """

    def __init__(self, width: int, elements: Elements = "table"):
        super().__init__()
        self.element = Embedding(MAX_Z + 1, width, spread=1.0 if elements == "table" else 0.0)
        self.properties = self.of_properties = None
        if elements == "periodic":
            self.properties = Constant(properties())
            self.of_properties = Linear(self.properties.exact.shape[1], width, bias=False, gain=PROPERTIES_GAIN)
        self.charge = Embedding(2 * LARGEST_CHARGE + 1, width, neutral=LARGEST_CHARGE)
        self.spin = Embedding(LARGEST_SPIN + 1, width, neutral=1)

    def forward(self, numbers: Tensor, charge: Tensor, spin: Tensor, structure: Tensor) -> Tensor:
        """numbers (N,), charge (S,), spin (S,), structure (N,) -> (N, width)."""
        charge_row = torch.where(charge.abs() <= LARGEST_CHARGE, charge + LARGEST_CHARGE, LARGEST_CHARGE)
        spin_row = torch.where((spin >= 0) & (spin <= LARGEST_SPIN), spin, 1)
        of_structure = self.charge(charge_row) + self.spin(spin_row)  # (S, width)
        of_element = self.element(numbers)
        if self.properties is not None and self.of_properties is not None:
            of_element = of_element + product(self.properties.value, self.of_properties.weight.t())[numbers]
        return of_element + of_structure.index_select(0, structure)


class RadialBasis(nn.Module):
    """Bessel functions of the distance, sqrt(2 / c) sin(n pi d / c) / d (Gasteiger et al. 2020, eq. 7), n = 1..size.

    Multiplied by c / sqrt(2) so that the values stay near one whatever the cutoff.
    """

    waves: Tensor

    def __init__(self, size: int, cutoff: float):
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("waves", here(torch.arange(1, size + 1, device="cpu") * math.pi), persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """(E,) angstrom -> (E, size)."""
        x = (distance / self.cutoff)[:, None]
        return torch.sin(self.waves * x) / x


class SizedBasis(nn.Module):
    """Gaussians of the distance in units of both atoms' covalent radii, exp(-(d / (R_i + R_j) - c_n)^2 / w^2).

    Bonds of all elements are near one in this unit, and so what is learnt of one pair holds for others.
    """

    LEAST, MOST = 0.5, 2.5  # centres c_1 and c_size; beyond both nothing changes

    def __init__(self, size: int):
        super().__init__()
        self.radii = Constant(RADIUS)
        self.centres = Constant(np.linspace(self.LEAST, self.MOST, size))
        self.width = 1.5 * (self.MOST - self.LEAST) / max(size - 1, 1)

    def forward(self, distance: Tensor, numbers: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """(E,) angstrom, numbers (N,), receivers and senders (E,) -> (E, size)."""
        x = distance / self.sizes(numbers, i, j)
        return torch.exp(-(((x[:, None] - self.centres.value) / self.width) ** 2))

    def sizes(self, numbers: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """(E,) angstrom: the sums of both atoms' radii."""
        radii = self.radii.value.index_select(0, numbers)
        return radii.index_select(0, i) + radii.index_select(0, j)


class PairBasis(nn.Module):
    """`RadialBasis`, and with `sized` functions of the distance in units of radii also `SizedBasis`, side by side."""

    def __init__(self, radial: int, sized: int, cutoff: float):
        super().__init__()
        self.size = radial + sized
        self.radial = RadialBasis(radial, cutoff)
        self.sized = SizedBasis(sized) if sized else None

    def forward(self, distance: Tensor, numbers: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """(E,) angstrom, numbers (N,), receivers and senders (E,) -> (E, size)."""
        basis = self.radial(distance)
        return basis if self.sized is None else torch.cat([basis, self.sized(distance, numbers, i, j)], dim=1)


def envelope(distance: Tensor, cutoff: float) -> Tensor:
    """A polynomial that falls from 1 at 0 to 0 at the cutoff, where two derivatives vanish too; (E,) -> (E, 1).

    u(x) = 1 - (p + 1)(p + 2)/2 x^p + p(p + 2) x^(p + 1) - p(p + 1)/2 x^(p + 2) at p = 6 (Gasteiger et al. 2020, eq. 8).
    """
    x = (distance / cutoff).clamp(max=1.0)[:, None]
    return 1.0 - x**6 * (28.0 - 48.0 * x + 21.0 * x**2)


def pairs(graph: Graph, basis: PairBasis, cutoff: float, directions: bool = False) -> list[Tensor]:
    """Of every edge, if asked for, its direction (E, 3); then the basis (E, size) and the envelope (E, 1)."""
    of_atoms = (graph.numbers, graph.receivers, graph.senders)

    def in_torch(r: Tensor, d: Tensor | None = None) -> list[Tensor]:
        d = torch.linalg.vector_norm(r, dim=1) if d is None else d
        return [*([r / d[:, None]] if directions else []), basis(d, *of_atoms), envelope(d, cutoff)]

    r, sized = graph.vectors, basis.sized
    if not pairs_native.usable(r):
        return in_torch(r, graph.distances)
    functions = pairs_native.Functions(cutoff, basis.radial.waves.to(r.dtype))
    if sized is not None:
        sizes, centres = sized.sizes(*of_atoms).reciprocal().to(r.dtype), sized.centres.value.to(r.dtype)
        functions = replace(functions, sizes=sizes, centres=centres, width=sized.width)
    return pairs_native.pairs(in_torch, functions, r, directions)


def call(layer: Callable[..., Any], recompute: bool, *inputs: Any) -> Any:
    """layer(*inputs); with `recompute` only the inputs are kept, and the layer runs again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)


def sum_over(values: Tensor, index: Tensor, size: int) -> Tensor:
    """out[k] = sum of values[e] where index[e] == k: (E, ...) -> (size, ...)."""
    return values.new_zeros((size, *values.shape[1:])).index_add(0, index, values)


def here(values: Tensor) -> Tensor:
    """Values made on the CPU, put where modules are built: on "meta" `arange` imports torch's compiler, a second."""
    return values.to(torch.get_default_device())


class Constant(nn.Module):
    """Numbers that are never trained, exact in float64: `value` has them in the type and on the device of the model.

    A buffer that was made in float32 keeps its rounding when a model is moved to float64.
    """

    value: Tensor

    def __init__(self, exact: np.ndarray):
        super().__init__()
        self.exact = exact
        dtype = torch.get_default_dtype() if exact.dtype.kind == "f" else torch.int64
        self.register_buffer("value", torch.tensor(exact.tolist(), dtype=dtype), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Constant":
        super()._apply(fn, recurse)
        self.value = torch.from_numpy(self.exact).to(self.value.device, self.value.dtype)
        return self


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix in their own type, under autocast too: for what half precision would spoil."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x @ matrix
    with torch.autocast(kind, enabled=False):
        return x @ matrix
