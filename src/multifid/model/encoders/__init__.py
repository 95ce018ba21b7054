"""The choice of encoder: those of this package, and those that other packages announce.

To add one here: a file in this folder and an entry in `ENCODERS`. A package of its own announces its encoders in its
`pyproject.toml`:

    [project.entry-points."multifid.encoders"]
    mine = "my_package.my_module:MyEncoder"
"""

from functools import lru_cache, reduce
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from multifid.model.contract import Encoder, EncoderConfig
from multifid.model.encoders.cgcnn import CGCNN
from multifid.model.encoders.dimenet import DimeNet
from multifid.model.encoders.egnn import EGNN
from multifid.model.encoders.gat import GAT
from multifid.model.encoders.gin import GIN
from multifid.model.encoders.gotennet import GotenNet
from multifid.model.encoders.mace import MACE
from multifid.model.encoders.mfc import MFC
from multifid.model.encoders.painn import PaiNN
from multifid.model.encoders.pna import PNA
from multifid.model.encoders.pna_eq import PNAEq
from multifid.model.encoders.pna_plus import PNAPlus
from multifid.model.encoders.sage import SAGE
from multifid.model.encoders.schnet import SchNet

GROUP = "multifid.encoders"
DEFAULT = "egnn"

ENCODERS: dict[str, type[Encoder]] = {
    "egnn": EGNN,
    "painn": PaiNN,
    "schnet": SchNet,
    "dimenet": DimeNet,
    "gotennet": GotenNet,
    "cgcnn": CGCNN,
    "gat": GAT,
    "gin": GIN,
    "mace": MACE,
    "mfc": MFC,
    "pna": PNA,
    "pna_plus": PNAPlus,
    "pna_eq": PNAEq,
    "sage": SAGE,
}


@lru_cache(maxsize=1)
def announced() -> tuple[dict[str, type[Encoder]], dict[str, str]]:
    """Encoders of other packages, by name; and those that cannot be loaded, with the reason."""
    found, broken = {}, {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        where = f"{entry.value} ({entry.dist.name if entry.dist else 'unknown package'})"
        try:
            found[entry.name] = _checked(entry.name, entry.load())
        except Exception as error:  # whatever a foreign module raises must not break the other encoders
            broken[entry.name] = f"{where} cannot be loaded: {type(error).__name__}: {error}"
    return found, broken


def _checked(name: str, encoder: Any) -> type[Encoder]:
    if name in ENCODERS:
        raise ValueError(f"the name {name!r} belongs to an encoder of multifid")
    if not (isinstance(encoder, type) and issubclass(encoder, Encoder)):
        raise TypeError("an encoder must be a subclass of multifid.model.contract.Encoder")
    known = encoder.Config.model_fields["name"].annotation
    if getattr(known, "__args__", None) != (name,):
        raise TypeError(f'its Config must have name: Literal["{name}"], has {known}')
    return encoder


def all_encoders() -> dict[str, type[Encoder]]:
    return ENCODERS | announced()[0]


def why_unknown(name: Any) -> str:
    """What is wrong with the name of an encoder that is not among `all_encoders`."""
    if name in announced()[1]:
        return f"the encoder {name!r}: {announced()[1][name]}"
    return f"the encoder must be one of {', '.join(all_encoders())}, got {name!r}"


def build_encoder(config: EncoderConfig, cutoff: float) -> Encoder:
    """The encoder that a config describes, its weights not yet drawn. cutoff: angstrom."""
    encoder = all_encoders()[config.name](config, cutoff)  # type: ignore[call-arg]
    if config.attention is not None:
        encoder.add_attention(config.attention, cutoff)
    return encoder


if TYPE_CHECKING:
    AnyEncoderConfig = EncoderConfig
else:
    AnyEncoderConfig = Annotated[
        reduce(lambda a, b: a | b, (encoder.Config for encoder in all_encoders().values())), Field(discriminator="name")
    ]
