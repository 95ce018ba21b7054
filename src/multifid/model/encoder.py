"""The encoder contract: batch -> node features, and the choice of encoder.

An encoder is a module whose `forward(batch)` gives `NodeFeatures`: scalars that no rotation, reflection or translation
changes, and vectors that turn with the structure. It reads positions and cell through `edge_vectors` only, is twice
differentiable, and says in `hidden` and `vectors` how wide its features are. To add one: a file in `encoders/` and an
entry in `ENCODERS`; the contract tests then run over it. What is large stands in layers, in a `ModuleList`, which take
and return tensors and are called once in a pass: between them a sharded encoder is cut.
"""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from multifid.model.encoders.egnn import EGNN
from multifid.model.encoders.painn import PaiNN
from multifid.model.layers import NodeFeatures

__all__ = ["ENCODERS", "EncoderConfig", "NodeFeatures", "build_encoder"]

ENCODERS: dict[str, type[EGNN] | type[PaiNN]] = {"egnn": EGNN, "painn": PaiNN}


class EncoderConfig(BaseModel):
    """What the shared encoder is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="egnn", description="The message-passing network: egnn or painn.")
    layers: int = Field(default=4, ge=1, description="Rounds of message passing.")
    hidden: int = Field(default=64, ge=1, description="Width of the scalar features and of the hidden layers.")
    vectors: int | None = Field(
        default=None,
        ge=1,
        description="Vector channels per atom; none means the encoder's own: 8 for egnn, hidden for painn.",
    )
    tensors: int = Field(
        default=0,
        ge=0,
        description="Channels of symmetric tensors per atom (egnn): with some, atoms and edges see the angles between "
        "neighbours; 8 take about twice as long for a step, and learn more from few structures.",
    )
    radial: int = Field(default=8, ge=1, description="Radial basis functions of the distance.")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ENCODERS:
            raise ValueError(f"the encoder must be one of {', '.join(ENCODERS)}, got {name!r}")
        return name


def build_encoder(config: EncoderConfig, cutoff: float) -> EGNN | PaiNN:
    """The encoder that the config names, its weights not yet drawn. Raises ValueError for options it does not have."""
    return ENCODERS[config.name](config.layers, config.hidden, config.vectors, config.radial, cutoff, config.tensors)
