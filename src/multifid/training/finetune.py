"""The `finetune` section: what of another model a run begins with, and what of it moves how fast.

branch   the encoder keeps its weights, branches move
last     branches and the last layers of the encoder
lora     branches, and a product of two thin matrices that is added to each linear map of the encoder
         (Hu et al. 2021, arXiv 2106.09685); merged into the maps in every model that is written
all      everything, the first layers of the encoder more slowly where `layer_decay` is below 1
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from multifid.feed.loader import Source
from multifid.model.lora import FACTORS, add_lora
from multifid.model.potential import Potential
from multifid.store.references import References


class FinetuneConfig(BaseModel):
    """The `finetune` section, which `multifid finetune` writes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    branches: dict[str, str | None] = Field(
        default_factory=dict,
        description="task -> branch of `init` that its own begins with, null: fresh weights; of others: of its name",
    )
    references: dict[str, dict[int, float]] = Field(
        default_factory=dict,
        description="task -> atomic number -> eV, in place of the store's reference energies: those with which the "
        "first branch's predictions fit the labels",
    )
    moves: Literal["branch", "last", "lora", "all"] = Field(
        "all", description="what of the encoder moves: nothing, its last `layers`, low-rank additions, or everything"
    )
    layers: int = Field(1, gt=0, description="moves last: so many layers of the encoder move")
    rank: int = Field(8, gt=0, description="moves lora: of the matrix that is added to each map")
    maps: str = Field("", description="moves lora: part of the names of the maps that get one; empty: all of them")
    encoder_lr: float = Field(
        1.0, gt=0.0, description="learning rate of the encoder's last layer, in parts of train.lr"
    )
    layer_decay: float = Field(
        1.0, gt=0.0, le=1.0, description="each layer's learning rate, in parts of that of the layer above it"
    )
    pull: float = Field(
        0.0,
        ge=0.0,
        description="decoupled decay of weights towards their beginning, as weight_decay towards zero",
    )


def with_references(sources: list[Source], finetune: FinetuneConfig | None) -> list[Source]:
    """The sources with the reference energies of the section in place of their stores'."""
    given = {} if finetune is None else finetune.references
    return [_with_references(source, given) for source in sources]


def _with_references(source: Source, given: Mapping[str, Mapping[int, float]]) -> Source:
    own: dict[str, References] = {}
    kept: dict[str, dict[str, Any]] = {}
    for task in source.tasks:
        if task in given:
            held = source.references[task]
            energies = {z: given[task].get(z, energy) for z, energy in held.energies.items()}
            own[task] = replace(held, energies=energies)
            kept[task] = source.about(task) | own[task].to_manifest()
    return replace(source, references=source.references | own, kept=source.kept | kept)


def prepare_moves(potential: Potential, finetune: FinetuneConfig | None, seed: int) -> dict[str, float]:
    """Add what is to be added to the encoder and freeze what is not to move; name -> part of the learning rate.

    ValueError where there is no map of the wanted name.
    """
    if finetune is None:
        return {}
    factors = {
        f"encoder.{name}": factor for name, factor in moves_of_encoder(potential.encoder, finetune, seed).items()
    }
    return factors | {n: 1.0 for n, p in potential.named_parameters() if p.requires_grad and n not in factors}


def moves_of_encoder(encoder: nn.Module, finetune: FinetuneConfig, seed: int) -> dict[str, float]:
    """`prepare_moves` for an encoder alone, which may be without memory (`meta`)."""
    if finetune.moves == "lora":
        add_lora(encoder, finetune.rank, finetune.maps, seed)
    height, factors = heights(encoder), {}
    for name, parameter in encoder.named_parameters():
        above = height[name]
        moving = {"branch": False, "last": above < finetune.layers, "lora": name.endswith(FACTORS), "all": True}
        parameter.requires_grad_(moving[finetune.moves])
        if parameter.requires_grad:
            factors[name] = finetune.encoder_lr * finetune.layer_decay**above
    return factors


def heights(encoder: nn.Module) -> dict[str, int]:
    """How many layers stand above each parameter of an encoder: 0 for the last layer and what follows it.

    Layers stand in `ModuleList`s; what is built before the first of them, as the embedding, is below them all.
    """
    lists = {name: len(child) for name, child in encoder.named_children() if isinstance(child, nn.ModuleList)}
    depth = max(lists.values(), default=0)
    out, seen = {}, False
    for name, child in encoder.named_children():
        for inner, _ in child.named_parameters():
            if name in lists:
                out[f"{name}.{inner}"] = lists[name] - 1 - int(inner.split(".")[0])
            else:
                out[f"{name}.{inner}"] = 0 if seen else depth
        seen = seen or name in lists
    return out | {name: depth for name, _ in encoder.named_parameters(recurse=False)}


class Pull:
    """Decoupled decay of weights towards where they began: p -= lr pull (p - start), after each update."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], strength: float, factors: Mapping[str, float]) -> None:
        self.strength, self.factors, self.parameters = strength, factors, dict(parameters)
        self.start = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def __call__(self, lr: float, norm: Tensor) -> None:
        """After an update at a learning rate; nothing where the norm of the gradient was not finite."""
        moved = torch.isfinite(norm).float()
        for factor in sorted({self.factors.get(name, 1.0) for name in self.parameters}):
            names = [name for name in self.parameters if self.factors.get(name, 1.0) == factor]
            weights = [self.parameters[name].detach() for name in names]
            back = torch._foreach_sub([self.start[name] for name in names], weights)
            torch._foreach_mul_(back, min(1.0, lr * factor * self.strength))
            torch._foreach_mul_(back, moved.to(weights[0].dtype))
            torch._foreach_add_(weights, back)


def pulled(names: Iterable[str], finetune: FinetuneConfig, branch_of: Mapping[str, str]) -> list[str]:
    """Those of the parameters that began with another model's weights."""
    fresh = tuple(f"branches.{branch_of[task]}." for task, begun in finetune.branches.items() if begun is None)
    return [name for name in names if not name.startswith(fresh)]
