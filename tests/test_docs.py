"""docs/config.md names every key of the config, docs/commands.md every command with its options.

`python tests/test_docs.py` writes both anew.
"""

import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from multifid.cli import app
from multifid.config import Config, _section, load_config
from multifid.model.encoders import DEFAULT, ENCODERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config.md"
COMMANDS = ROOT / "docs" / "commands.md"


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
            many = str(field.annotation).count("dict[")
            own = reference(inner, f"{key}{'.<name>' * many}.")
            if key == "model.branches":  # where nothing is said
                own = [re.sub(r"\| `[^|]*` (\|[^|]*\|)$", r"| as `model.branch` \1", row) for row in own]
            rows += own
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        default = "required" if default is PydanticUndefined else f"`{_plain(default)}`"
        rows.append(f"| `{key}` | {_kind(field.annotation)} | {default} | {field.description} |")
    return rows


def _kind(annotation: Any) -> str:
    """The type as a user would say it."""
    if get_origin(annotation) is Literal:
        return ", ".join(str(_plain(a)) for a in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_kind(a) for a in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "map"
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if annotation is Any:
        return "anything"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true, false", "NoneType": "null"}[
        annotation.__name__
    ]


def _plain(value: Any) -> Any:
    return {"None": "null", "True": "true", "False": "false", "": "''"}.get(str(value), value)


def page() -> str:
    head = (
        "# Every key of the config\n\n"
        "A config is YAML. `key.key=value` on the command line overrides it. Unknown keys are errors.\n"
        "RUN/config.yaml is the resolved copy: `train.batch` and the placement are written out in it.\n\n"
        "| key | type | default | meaning |\n|---|---|---|---|\n"
    )
    return head + "\n".join(reference()) + "\n"


def commands() -> str:
    """Every command as `--help` has it."""
    known = _commands(typer.main.get_command(app))
    lines = [
        "# Commands\n",
        "`multifid COMMAND --help` prints the same. RUN is the directory of a run, STORE that of a prepared dataset.\n",
        "| command | what it does |\n|---|---|",
        *(f"| [`{name}`](#{name.replace(' ', '-')}) | {_first_line(command)} |" for name, command in known.items()),
    ]
    for name, command in known.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join([f"multifid {name}", *map(_usage, arguments), *(["[OPTIONS]"] if options else [])])
        lines += [f"\n## {name}\n", f"    {usage}\n", f"{_first_line(command)}\n", "| | default | |\n|---|---|---|"]
        lines += [f"| `{_usage(p)}` |  | {_cell(p.help)} |" for p in arguments]
        lines += [f"| `{_usage(p)}` | {_default(p)} | {_cell(p.help)} |" for p in options]
    return "\n".join(lines) + "\n"


def _commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """All commands by name, those of groups as `group command`."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None) is not None
        found |= _commands(command, f"{name} ") if inner else {f"{prefix}{name}": command}
    return found


def _first_line(command: Any) -> str:
    return _cell(" ".join(command.help.split()))


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = _cell(parameter.metavar or parameter.name.upper())
        return name if parameter.required or name.startswith("[") else f"[{name}]"
    value = "" if parameter.is_flag else f" {parameter.metavar or _value(parameter.type_descriptor.annotation)}"
    return f"{parameter.opts[0]}{value}{' ...' if parameter.multiple else ''}"


def _value(annotation: Any) -> str:
    """What follows an option, for one that does not say it itself."""
    kind = next((a for a in get_args(annotation) if a is not type(None)), annotation)
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kind]


def _default(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.default is None or option.default is False else f"`{option.default}`"


def _cell(text: str | None) -> str:
    """Text without what would end a cell of a table, or would be a link ([a][b])."""
    return (text or "").replace(" | ", ", ").replace("|", " or ").replace("][", "]\\[")


def test_every_command_is_documented_with_its_options():
    assert COMMANDS.read_text(encoding="utf-8") == commands(), "run `python tests/test_docs.py`"


def test_every_key_is_documented_with_its_default():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tests/test_docs.py`"


def test_every_link_to_a_file_leads_to_one():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))]
    assert len(links) > 40
    assert not [f"{p.name}: {a}" for p, a in links if "://" not in a and not (p.parent / a).exists()]


def test_the_configs_that_are_shipped_are_valid():
    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        load_config(path)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    COMMANDS.write_text(commands(), encoding="utf-8")
