"""`multifid formats [FORMAT...]`: what `prepare` reads, and the options of each format."""

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table

from multifid.readers import reader
from multifid.readers.formats import FORMATS


def formats(names: Sequence[str] = (), console: Console | None = None) -> None:
    """Print the list of formats, or the options of those named. ValueError for one that is unknown."""
    console = console or Console()
    modules = {name: reader(name) for name in names}
    if not modules:
        table = Table(title="multifid prepare FORMAT", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("format", "files"):
            table.add_column(column, overflow="fold")
        for name, known in FORMATS.items():
            table.add_row(name, known.about)
        console.print(table)
        console.print("multifid formats FORMAT lists the options of one of them", highlight=False)
    for name, module in modules.items():
        console.print(_options(name, module.Options))


def _options(name: str, options: type[BaseModel]) -> Table:
    title = f"{name} ({FORMATS[name].about}): --option KEY=VALUE"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("key", no_wrap=True)
    for column in ("values", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for key, field in options.model_fields.items():
        default = "" if field.default is None else str(field.default)
        table.add_row(key, _values(field.annotation), default, field.description)
    return table


def _values(annotation: Any) -> str:
    """What an option may be, as a user would say it."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    inner = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) is tuple:
        return "list"
    if inner:
        return " or ".join(map(_values, inner))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true | false"}.get(
        annotation.__name__, annotation.__name__.lower()
    )
