"""The edges of a layer of PaiNN in C++ (`native/painn.h`)."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from multifid.model.kernels.native import build, twice
from multifid.model.kernels.native.twice import Tensors

INPUTS = ("phi", "v", "r", "b", "u", "weight", "bias")
ARRAYS = (
    "i", "j", "twin", *INPUTS, "sum_m", "G_m",
    *(f"g_{x}" for x in INPUTS), *(f"d_{x}" for x in INPUTS[:5]), "d_sum_m", "N_m",
)  # fmt: skip
GROUP = 16  # what channels are a multiple of


def twins(i: Tensor, j: Tensor, atoms: int, r: Tensor) -> Tensor:
    """For each edge the number of the one that runs the other way, -1 where there is none: (E,) int64.

    i, j: (E,), i ascending; j below `atoms`. r: vectors of the edges (E, 3).
    """
    found, made = torch.empty_like(i, memory_format=torch.contiguous_format), build.library()
    assert made is not None
    if i.is_meta:  # of a pass that is counted
        return found
    i, j, r = (x.detach().contiguous() for x in (i, j, r))
    places = [ctypes.c_void_p(x.data_ptr()) for x in (i, j, r, found)]
    made.multifid_twins(ctypes.c_long(i.shape[0]), ctypes.c_long(atoms), *places, ctypes.c_long(twice.TYPES[r.dtype]))
    return found


def edges(
    plain: Callable[..., Tensor], i: Tensor, j: Tensor, inputs: Sequence[Tensor], twin: Tensor | None = None
) -> Tensor:
    """Sums over the neighbours of each atom, (N, 4, H): of scalars, and of the three components of vectors.

    plain: the same function in torch, of the inputs. i, j: (E,), i ascending. inputs: phi, v (N, 3, H), unit vectors
    r (E, 3), basis b (E, R), envelope u (E, 1), and weight (3 H, R) and bias (3 H,) of the filters. twin: as by
    `twins`, whose filters are made once where b and u are the same.
    """
    channels, kind = inputs[0].shape[2], twice.TYPES[inputs[0].dtype]
    always = ("phi", "v") if inputs[1].requires_grad else ("phi",)  # v of a first layer is zero
    layer = Edges(
        ("m",), INPUTS, ("weight", "bias"), always, kind, i.contiguous(), j.contiguous(), channels, plain, twin,
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
    written = ("r", "b", "u")
    layout = twice.Layout(6, 0, ARRAYS)  # PaiNNCall of native/painn.h
    i: Tensor
    j: Tensor
    channels: int
    in_torch: Callable[..., Tensor] | None
    twin: Tensor | None = None

    def numbers(self, tensors: Tensors) -> Sequence[int]:
        phi, b = tensors["phi"], tensors["b"]
        assert phi is not None and b is not None
        return self.i.shape[0], phi.shape[0], phi.shape[2], b.shape[1], torch.get_num_threads(), self.type

    def call(self, what: int, arrays: Tensors, each: Sequence[Tensors] = ({},)) -> None:
        super().call(what, {**arrays, "i": self.i, "j": self.j, "twin": self.twin}, each)

    def sums(self, tensors: Tensors) -> list[Tensor]:
        phi = tensors["phi"]
        assert phi is not None
        return [phi.new_zeros(phi.shape[0], 4, phi.shape[2])]

    def plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        assert self.in_torch is not None
        phi, v, r, b, u, weight, bias = inputs
        wide, n = phi.shape[2], self.channels
        weight, bias = weight.unflatten(0, (3, wide))[:, :n].flatten(0, 1), bias.view(3, wide)[:, :n].flatten()
        return [pad(self.in_torch(phi[:, :, :n], v[:, :, :n], r, b, u, weight, bias), [0, wide - n])]
