"""The edges of a layer of PaiNN in C++ (`native/painn.h`)."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from multifid.model.kernels.native import twice
from multifid.model.kernels.native.twice import Tensors

INPUTS = ("phi", "v", "r", "b", "u", "weight", "bias")
ARRAYS = (
    "i", "j", *INPUTS, "sum_m", "G_m", *(f"g_{x}" for x in INPUTS), *(f"d_{x}" for x in INPUTS[:5]), "d_sum_m", "N_m",
)  # fmt: skip
GROUP = 16  # what channels are a multiple of


class _Call(ctypes.Structure):
    """PaiNNCall of native/painn.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("edges", "atoms", "H", "R", "threads", "type")),
        *((name, ctypes.c_void_p) for name in ARRAYS),
    ]


def edges(plain: Callable[..., Tensor], i: Tensor, j: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Sums over the neighbours of each atom, (N, 4, H): of scalars, and of the three components of vectors.

    plain: the same function in torch, of the inputs. i, j: (E,), i ascending. inputs: phi, v (N, 3, H), unit vectors
    r (E, 3), basis b (E, R), envelope u (E, 1), and weight (3 H, R) and bias (3 H,) of the filters.
    """
    channels, kind = inputs[0].shape[2], twice.TYPES[inputs[0].dtype]
    layer = Edges(
        ("m",), INPUTS, ("weight", "bias"), ("phi", "v"), kind, i.contiguous(), j.contiguous(), channels, plain,
    )  # fmt: skip
    (sums,) = twice.apply(layer, padded(inputs))
    return sums[:, :, :channels]


def padded(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs as the library takes them: channels up to a multiple of `GROUP`, zeros behind."""
    phi, v, r, b, u, weight, bias = inputs
    channels = phi.shape[2]
    behind = -channels % GROUP
    if behind:
        weight = pad(weight.unflatten(0, (3, channels)), [0, 0, 0, behind]).flatten(0, 1)
        phi, v, bias = pad(phi, [0, behind]), pad(v, [0, behind]), pad(bias.view(3, -1), [0, behind]).flatten()
    return [x.contiguous() for x in (phi, v, r, b, u, weight, bias)]


@dataclass
class Edges(twice.Layer):
    function = "multifid_painn"
    i: Tensor
    j: Tensor
    channels: int
    in_torch: Callable[..., Tensor] | None

    def structure(self, tensors: Tensors, addresses: Mapping[str, int]) -> ctypes.Structure:
        phi, b = tensors["phi"], tensors["b"]
        assert phi is not None and b is not None
        return _Call(
            edges=self.i.shape[0], atoms=phi.shape[0], H=phi.shape[2], R=b.shape[1], threads=torch.get_num_threads(),
            type=self.type, i=self.i.data_ptr(), j=self.j.data_ptr(), **addresses,
        )  # fmt: skip

    def sums(self, tensors: Tensors) -> list[Tensor]:
        phi = tensors["phi"]
        assert phi is not None
        return [phi.new_zeros(phi.shape[0], 4, phi.shape[2])]

    def kept(self, tensors: Tensors) -> dict[str, Tensor]:
        return {}

    def back(self, kept: Tensors) -> dict[str, Tensor]:
        return {}

    def changes(self, kept: Tensors) -> dict[str, Tensor]:
        return {}

    def plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        assert self.in_torch is not None
        phi, v, r, b, u, weight, bias = inputs
        wide, n = phi.shape[2], self.channels
        weight, bias = weight.unflatten(0, (3, wide))[:, :n].flatten(0, 1), bias.view(3, wide)[:, :n].flatten()
        return [pad(self.in_torch(phi[:, :, :n], v[:, :, :n], r, b, u, weight, bias), [0, wide - n])]
