"""Linear maps with SiLU between them in C++ (`native/mlp.h`), for the features of atoms."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

from multifid.model.kernels.egnn import matmul_type
from multifid.model.kernels.native import build, twice
from multifid.model.kernels.native.twice import Tensors

MAPS = 8  # that a call may have
_MANY = {name: tuple(f"{name}{k}" for k in range(MAPS)) for name in ("w", "b", "z", "g_w", "g_b", "back", "d_z")}
ARRAYS = (
    "x", "norm", "norm_bias", *_MANY["w"], *_MANY["b"], "sum_y", *_MANY["z"], "G_y",
    "g_x", "g_norm", "g_norm_bias", *_MANY["g_w"], *_MANY["g_b"], *_MANY["back"], "back_x",
    "d_x", "d_sum_y", *_MANY["d_z"], "N_y",
)  # fmt: skip


def usable(x: Tensor, maps: Sequence[torch.nn.Linear]) -> bool:
    """Whether the library has such maps for such features."""
    widest = max((max(m.in_features, m.out_features) for m in maps), default=0)
    return x.dim() == 2 and 0 < len(maps) <= MAPS and build.usable(x, -(-widest // 32) * 32)


def mlp(x: Tensor, maps: Sequence[torch.nn.Linear], bent: bool, norm: torch.nn.LayerNorm | None = None) -> Tensor:
    """(N, D_0) -> (N, D_n) by a norm, n linear maps with SiLU between them and, if `bent`, SiLU behind the last one."""
    weights = [f"w{k}" for k in range(len(maps))]
    biases = [f"b{k}" for k, m in enumerate(maps) if m.bias is not None]
    before = [] if norm is None else [norm.weight, norm.bias]
    inputs = [x, *before, *(m.weight for m in maps), *(m.bias for m in maps if m.bias is not None)]
    widths = (x.shape[1], *(m.out_features for m in maps))
    parameters = (*(("norm", "norm_bias") if before else ()), *weights, *biases)
    epsilon = 0.0 if norm is None else norm.eps
    layer = _MLP(("y",), ("x", *parameters), parameters, ("x",), twice.TYPES[matmul_type(x)], widths, bent, epsilon)
    (y,) = twice.apply(layer, [given.to(x.dtype).contiguous() for given in inputs])
    return y


@dataclass
class _MLP(twice.Layer):
    function = "multifid_mlp"
    written = ("x",)
    layout = twice.Layout(5 + MAPS + 1, 1, ARRAYS)  # MLPCall of native/mlp.h
    widths: tuple[int, ...]
    bent: bool
    epsilon: float

    def numbers(self, tensors: Tensors) -> Sequence[int | float]:
        x, maps = tensors["x"], len(self.widths) - 1
        assert x is not None
        known = (x.shape[0], maps, self.bent, torch.get_num_threads(), self.type)
        return *known, *self.widths, *(0,) * (MAPS - maps), self.epsilon

    def sums(self, tensors: Tensors) -> list[Tensor]:
        x = tensors["x"]
        assert x is not None
        return [x.new_empty(x.shape[0], self.widths[-1])]

    def _wide(self, tensors: Tensors, maps: int, name: str) -> dict[str, Tensor]:
        x = tensors["x"]
        assert x is not None
        return {
            f"{name}{k}": x.new_empty(x.shape[0], -(-self.widths[k + 1] // 32) * 32, dtype=self.kept_type)
            for k in range(maps)
        }

    def kept(self, tensors: Tensors) -> dict[str, Tensor]:
        return self._wide(tensors, len(self.widths) - (1 if self.bent else 2), "z") or self._nothing(tensors)

    def _nothing(self, tensors: Tensors) -> dict[str, Tensor]:
        x = tensors["x"]
        assert x is not None
        return {"z0": x.new_empty(0)}  # a linear map keeps nothing

    def back(self, known: Tensors) -> dict[str, Tensor]:
        x, arrays = known["x"], [known[f"z{k}"] for k in range(len(self.widths) - 2)]
        assert x is not None
        back = {f"back{k}": torch.empty_like(z) for k, z in enumerate(arrays) if z is not None}
        if "norm" in self.names:
            back["back_x"] = x.new_empty(x.shape[0], -(-self.widths[0] // 32) * 32)
        return back

    def changes(self, kept: Tensors) -> dict[str, Tensor]:
        return {f"d_{name}": torch.empty_like(x) for name, x in kept.items() if x is not None}

    def plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given = dict(self.named(inputs))
        y, maps = given["x"], len(self.widths) - 1
        assert y is not None
        if "norm" in given:
            y = layer_norm(y, y.shape[1:], given["norm"], given["norm_bias"], self.epsilon)  # type: ignore[arg-type]
        for k in range(maps):
            y = linear(y, given[f"w{k}"], given.get(f"b{k}"))  # type: ignore[arg-type]
            y = silu(y) if self.bent or k + 1 < maps else y
        return [y]
