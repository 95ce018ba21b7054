"""What a layer of PaiNN computes of atoms in C++, from the sums over their neighbours (`native/painn_atoms.h`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multifid.model.kernels.egnn import matmul_type
from multifid.model.kernels.native import build, twice
from multifid.model.kernels.native.twice import Tensors

INPUTS = ("s", "v", "m")
WEIGHTS = ("norm", "norm_bias", "mix", "w0", "b0", "w1", "b1")
OUTPUTS = ("s", "v")
KEPT = ("uv", "z", "abc")
BACK = ("back_h", "back_x")
ARRAYS = (
    *INPUTS, *WEIGHTS, *(f"sum_{x}" for x in OUTPUTS), *KEPT, *(f"G_{x}" for x in OUTPUTS),
    *(f"g_{x}" for x in (*INPUTS, *WEIGHTS)), *BACK,
    *(f"d_{x}" for x in INPUTS), *(f"d_sum_{x}" for x in OUTPUTS), *(f"d_{x}" for x in KEPT),
    *(f"N_{x}" for x in OUTPUTS),
)  # fmt: skip


def usable(s: Tensor) -> bool:
    """Whether the library has this layer for such scalars (N, H)."""
    return build.usable(s, 3 * -(-s.shape[1] // 32) * 32)


def update(
    plain: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    neighbors: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Scalars (N, H) and vectors (N, 3, H) after a layer.

    plain: the same function in torch, of inputs and weights. inputs: s (N, H), v (N, 3, H), and sums over neighbours m
    (N, 4, H), not yet divided by the constant `neighbors` or its root. weights: weight and bias of the norm, whose
    epsilon is given, the matrix of U and V (2 H, H), and weights and biases of the two maps.
    """
    kind, s = twice.TYPES[matmul_type(inputs[0])], inputs[0]
    layer = _Atoms(
        OUTPUTS, (*INPUTS, *WEIGHTS), WEIGHTS, INPUTS, kind, (1 / neighbors, neighbors**-0.5, epsilon), plain
    )
    s, v = twice.apply(layer, [x.to(s.dtype).contiguous() for x in (*inputs, *weights)])
    return s, v


@dataclass
class _Atoms(twice.Layer):
    function = "multifid_painn_atoms"
    written = INPUTS
    layout = twice.Layout(4, 3, ARRAYS)  # PaiNNAtomsCall of native/painn_atoms.h
    constants: tuple[float, float, float]
    in_torch: Callable[..., tuple[Tensor, Tensor]]

    def numbers(self, tensors: Tensors) -> Sequence[int | float]:
        s = tensors["s"]
        assert s is not None
        return *s.shape, torch.get_num_threads(), self.type, *self.constants

    def sums(self, tensors: Tensors) -> list[Tensor]:
        s, v = tensors["s"], tensors["v"]
        assert s is not None and v is not None
        return [torch.empty_like(s), torch.empty_like(v)]

    def kept(self, tensors: Tensors) -> dict[str, Tensor]:
        s = tensors["s"]
        assert s is not None
        atoms, width = s.shape[0], self._width(s)
        return {
            "uv": s.new_empty(atoms, 6, width),
            "z": s.new_empty(atoms, width, dtype=self.kept_type),
            "abc": s.new_empty(atoms, 3, width),
        }

    def _width(self, s: Tensor) -> int:
        group = 32 if self.type >= twice.TYPES[torch.bfloat16] else 16
        return -(-s.shape[1] // group) * group

    def back(self, known: Tensors) -> dict[str, Tensor]:
        abc = known["abc"]
        assert abc is not None
        return {"back_h": torch.empty_like(abc[:, 0]), "back_x": torch.empty_like(abc[:, 1:])}

    def changes(self, kept: Tensors) -> dict[str, Tensor]:
        return {f"d_{name}": torch.empty_like(kept[name]) for name in KEPT}  # type: ignore[arg-type]

    def plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.in_torch(*inputs)
