"""The encoder contract: what an encoder gets, what it gives, and what heads may require of it.

An encoder is a module with a config of its own. It gets a graph and gives features of every atom:

    class MyEncoder(Encoder):
        class Config(EncoderConfig):
            name: Literal["mine"] = "mine"
            hidden: int = Field(64, ge=1, description="Width of the scalar features.")

        def __init__(self, config: Config, cutoff: float):
            super().__init__()
            self.degrees = {0: config.hidden}
            ...

        def forward(self, graph: Graph) -> Features: ...

* Features are unchanged by translation; those of degree l rotate as the spherical harmonics of that degree do, and take
  the sign (-1)^l under inversion. They are continuous when a neighbour crosses the cutoff: messages carry `envelope`.
* It is twice differentiable, also where atoms have no neighbours, and works on no atoms at all. Numbers of atoms and
  edges are read as `x.shape[0]`, a symbol while a pass is traced; `len(x)` would write down the number at hand.
* Weights live in the blocks of `model/layers.py`, which know how to draw them.
* What is large stands in layers, in a `ModuleList`, which take and return tensors and are called once in a pass:
  between them a sharded encoder is cut.
* A system may be cut into domains, one on each rank (`model/domain.py`). So what an atom has learnt of its neighbours
  passes through `graph.exchanged` before a layer reads it of senders: before every layer but the first, which reads
  what the numbers say. An encoder that this does not suffice for, as it attends to all atoms or keeps features of
  edges, says in its config that it reads triplets or reverse edges, or raises `Indivisible` where there is an
  `exchange`.

Encoders of this package are the entries of `model/encoders/__init__.py`; those of other packages are found by the entry
point group `multifid.encoders`. `multifid.model.suite` holds every encoder to this contract, those of other packages in
their own tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from multifid.graphs.graph import EDGES_ONLY, Graph, GraphNeeds
from multifid.model.attention import AttentionConfig, BetweenLayers, GlobalAttention
from multifid.model.walks import Walks

NEEDS = {"reverse": "reverse edges", "triplets": "triplets"}


class EncoderConfig(BaseModel):
    """Options of an encoder. A subclass has `name: Literal["..."]` and its own fields, each with a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    attention: AttentionConfig | None = Field(
        default=None, description="Global attention within each structure, between the layers; null: none."
    )


class Indivisible(ValueError):
    """An encoder that needs the whole of a system at once: it cannot run on domains of it."""


@dataclass(slots=True)
class Features:
    """The output of an encoder for each atom."""

    scalars: Tensor  # (N, H)
    vectors: Tensor | None = None  # (N, C, 3): x, y, z
    higher: dict[int, Tensor] = field(default_factory=dict)  # degree l > 1 -> (N, C_l, 2 l + 1)
    layers: tuple[Tensor, ...] = ()  # scalars (N, H) after each layer but the last, for readouts of every layer

    def part(self, atoms: slice) -> "Features":
        """Those of consecutive atoms."""
        return Features(
            self.scalars[atoms],
            None if self.vectors is None else self.vectors[atoms],
            {degree: x[atoms] for degree, x in self.higher.items()},
            tuple(x[atoms] for x in self.layers),
        )

    def tensors(self) -> list[Tensor]:
        """All of them, in one order: scalars, vectors, higher degrees, layers."""
        vectors = [] if self.vectors is None else [self.vectors]
        return [self.scalars, *vectors, *(self.higher[degree] for degree in sorted(self.higher)), *self.layers]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Features":
        """The same features with other tensors, in the order of `tensors`."""
        rest = iter(tensors)
        return Features(
            next(rest),
            None if self.vectors is None else next(rest),
            {degree: next(rest) for degree in sorted(self.higher)},
            tuple(next(rest) for _ in self.layers),
        )


class Encoder(nn.Module):
    """Base of all encoders; see the head of this file."""

    Config: ClassVar[type[EncoderConfig]]
    needs: GraphNeeds = EDGES_ONLY
    degrees: dict[int, int]  # degree -> channels; scalars (0) always
    slopes_need_float32: ClassVar[bool] = False  # conservative forces with bf16 or TF32 products would be off by 10 %
    edges_in_library: ClassVar[bool] = False  # `kernels/native` computes its edges, where there is a compiler
    readouts: int = 0  # entries of `Features.layers`
    recompute: bool = False  # keep nothing between the layers' ends for the backward pass
    every: int = 1  # layers from one block of global attention to the next

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of global attention, none without."""
        return list(self._modules.get("attention") or [])  # type: ignore[arg-type]

    def add_attention(self, config: AttentionConfig, cutoff: float) -> None:
        """Let scalars attend to their whole structure between the layers. Raises ValueError where that cannot be."""
        hidden, places = self.degrees[0], (self.depth - 1) // config.every
        if hidden % config.heads:
            raise ValueError(f"attention: heads must divide the width of the scalars, {hidden}, got {config.heads}")
        if places < 1:
            raise ValueError(
                f"attention: with {self.depth} layers there is no place between them after every {config.every}; "
                "add layers, or let every be smaller"
            )
        self.attention = nn.ModuleList(GlobalAttention(hidden, config.heads) for _ in range(places))
        self.every = config.every
        if config.walks:
            self.walks = Walks(hidden, config.walks, cutoff)
            self.needs = replace(self.needs, triplets=self.needs.triplets or config.walks > 2)

    def __call__(self, graph: Graph) -> Features:
        for need in ("reverse", "triplets"):
            if getattr(self.needs, need) and getattr(graph, need) is None:
                raise ValueError(
                    f"{type(self).__name__} reads {NEEDS[need]}, and this graph has none: make it of "
                    "completed(batch, encoder.needs)"
                )
        if not self.blocks:
            return super().__call__(graph)
        if graph.exchange is not None:
            raise Indivisible("with global attention every atom sees the whole system")
        between = BetweenLayers(graph, self.blocks, self.every, self.recompute, self._modules.get("walks"))
        features = super().__call__(between.within())
        if between.passed < len(self.blocks) * self.every:
            raise ValueError(f"{type(self).__name__} has no attention: it does not pass through `graph.exchanged`")
        return features

    @property
    def depth(self) -> int:
        """Layers: what stands in `ModuleList`s."""
        return sum(len(child) for child in self.children() if isinstance(child, nn.ModuleList))

    def forward(self, graph: Graph) -> Features:
        raise NotImplementedError(f"{type(self).__name__} must say what its features are")
