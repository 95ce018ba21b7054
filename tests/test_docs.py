"""docs/config.md names every key of the config. `python tests/test_docs.py` writes it anew."""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from multifid.config import Config, _section, load_config
from multifid.model.encoders import DEFAULT, ENCODERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config.md"


def reference(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """One table row for each key: name, type, default, meaning."""
    rows = []
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        key = f"{prefix}{name}"
        if key == "model.encoder":
            what = "the message-passing network, of this package or announced by another; each has its own keys"
            rows.append(f"| `{key}.name` | {', '.join(ENCODERS)}, ... | `{DEFAULT}` | {what} |")
            for encoder_name, encoder in ENCODERS.items():
                own = reference(encoder.Config, f"{encoder_name}: {key}.")
                rows += [row.replace(f"`{encoder_name}: ", f"{encoder_name}: `") for row in own[1:]]
            continue
        if inner is not None:
            many = "dict[" in str(field.annotation)
            rows += reference(inner, f"{key}.<name>." if many else f"{key}.")
            continue
        default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
        rows.append(f"| `{key}` | {_kind(field.annotation)} | {default} | {field.description} |")
    return rows


def _kind(annotation: Any) -> str:
    """The type as a user would say it."""
    if get_origin(annotation) is Literal:
        return ", ".join(_plain(a) for a in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_kind(a) for a in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "map"
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    return {"str": "text", "int": "integer", "float": "number", "bool": "true, false", "NoneType": "null"}[
        annotation.__name__
    ]


def _plain(value: Any) -> Any:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), value)


def page() -> str:
    head = (
        "# Every key of the config\n\n"
        "A config is YAML. `key.key=value` on the command line overrides it. Unknown keys are errors.\n"
        "RUN/config.yaml is the resolved copy: `train.batch` and the placement are written out in it.\n\n"
        "| key | type | default | meaning |\n|---|---|---|---|\n"
    )
    return head + "\n".join(reference()) + "\n"


def test_every_key_is_documented_with_its_default():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tests/test_docs.py`"


def test_the_configs_that_are_shipped_are_valid():
    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        load_config(path)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
