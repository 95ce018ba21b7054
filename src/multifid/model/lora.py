"""Low-rank additions to linear maps: W = W0 + up down, of which only the thin matrices move (Hu et al. 2021)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from multifid.model.layers import Linear
from multifid.model.potential import generator_for

HELD = ".parametrizations.weight.original"
UP, DOWN = ".parametrizations.weight.0.up", ".parametrizations.weight.0.down"
FACTORS = (UP, DOWN)


class LowRank(nn.Module):
    """up (outputs, rank) times down (rank, inputs), added to a map; zero at the beginning."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        outputs, inputs = weight.shape
        rank = min(rank, outputs, inputs)
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator) / inputs**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def chosen_maps(encoder: nn.Module, maps: str) -> dict[str, Linear]:
    """The encoder's linear maps whose names contain `maps`. ValueError, which names those that there are, for none."""
    linear = {name: module for name, module in encoder.named_modules() if isinstance(module, Linear)}
    chosen = {name: module for name, module in linear.items() if maps in name}
    if not chosen:
        raise ValueError(
            f"finetune.maps: no linear map of the encoder has {maps!r} in its name; it has {', '.join(linear)}"
        )
    return chosen


def add_lora(encoder: nn.Module, rank: int, maps: str, seed: int) -> None:
    """Add a product of two thin matrices to the encoder's linear maps whose names contain `maps`.

    ValueError as of `chosen_maps`.
    """
    chosen = chosen_maps(encoder, maps)
    for name, module in chosen.items():
        added = LowRank(module.weight, rank, generator_for(seed, f"lora {name}"))
        parametrize.register_parametrization(module, "weight", added.to(module.weight.device, module.weight.dtype))


def has_lora(names: Mapping[str, object]) -> bool:
    return any(name.endswith(HELD) for name in names)


def merged(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name with every addition merged into its map, as a model without any would hold them."""
    for name, tensor in tensors.items():
        if name.endswith(HELD):
            base = name.removesuffix(HELD)
            product = tensors[base + UP].double() @ tensors[base + DOWN].double()
            yield f"{base}.weight", (tensor.double() + product).to(tensor.dtype)
        elif not name.endswith(FACTORS):
            yield name, tensor
