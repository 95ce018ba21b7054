"""Unit vectors, functions of the distance and envelopes of edges in C++ (`native/pairs.h`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multifid.model.kernels.native import build, twice
from multifid.model.kernels.native.twice import Tensors

OUTPUTS = ("n", "b", "u")
ARRAYS = (
    "waves", "sizes", "centres", "r", *(f"sum_{x}" for x in OUTPUTS), *(f"G_{x}" for x in OUTPUTS), "g_r", "d_r",
    *(f"d_sum_{x}" for x in OUTPUTS), *(f"N_{x}" for x in OUTPUTS),
)  # fmt: skip


@dataclass(frozen=True)
class Functions:
    """Of the distance: `waves` (R,), and Gaussians of the distance by `sizes` (E,), at `centres` (C,), of a width."""

    cutoff: float
    waves: Tensor
    sizes: Tensor | None = None  # 1 / angstrom
    centres: Tensor | None = None
    width: float = 1.0

    @property
    def counts(self) -> tuple[int, int]:
        return self.waves.shape[0], 0 if self.centres is None else self.centres.shape[0]


def usable(r: Tensor) -> bool:
    """Whether the library has these functions for such vectors (E, 3)."""
    return build.usable(r, 0)


def pairs(
    plain: Callable[[Tensor], Sequence[Tensor]], functions: Functions, r: Tensor, directions: bool
) -> list[Tensor]:
    """Of vectors r (E, 3): unit vectors (E, 3) if `directions`, functions (E, R + C) and envelopes (E, 1).

    plain: the same in torch.
    """
    outputs = OUTPUTS if directions else OUTPUTS[1:]
    return twice.apply(_Pairs(outputs, ("r",), (), ("r",), twice.TYPES[r.dtype], functions, plain), [r.contiguous()])


@dataclass
class _Pairs(twice.Layer):
    function = "multifid_pairs"
    written = ("r",)
    layout = twice.Layout(5, 2, ARRAYS)  # PairsCall of native/pairs.h
    functions: Functions
    in_torch: Callable[[Tensor], Sequence[Tensor]]

    def numbers(self, tensors: Tensors) -> Sequence[int | float]:
        r, of = tensors["r"], self.functions
        assert r is not None
        return r.shape[0], *of.counts, torch.get_num_threads(), self.type, of.cutoff, of.width

    def call(self, what: int, arrays: Tensors, each: Sequence[Tensors] = ({},)) -> None:
        of = self.functions
        super().call(what, {**arrays, "waves": of.waves, "sizes": of.sizes, "centres": of.centres}, each)

    def sums(self, tensors: Tensors) -> list[Tensor]:
        r, of = tensors["r"], self.functions
        assert r is not None
        edges = r.shape[0]
        widths = {"n": 3, "b": sum(of.counts), "u": 1}
        return [r.new_empty(edges, widths[name]) for name in self.outputs]

    def plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.in_torch(*inputs)
