"""Arguments that several commands have, and what their texts mean."""

from pathlib import Path
from typing import Annotated, Any

import typer

Stores = Annotated[list[Path], typer.Argument(metavar="STORE...", help="prepared stores")]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="a trained run, or a model file")]
StructureFiles = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="files that ASE reads, .aselmdb, or prepared stores")
]
Task = Annotated[str | None, typer.Option(help="whose branch answers; needed where there are several")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: an accelerator if there is one")]
SkipRefused = Annotated[
    bool, typer.Option("--skip-refused", help="leave out what has no prediction, as elements never seen, and count it")
]

Properties = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=KEY]:KIND",
        help="of files: a property that is read in place of energies; KIND is intensive, extensive, class, vector, "
        "atom or atom_vector; may be repeated",
    ),
]


def is_data(text: str) -> bool:
    """Whether an argument names a store or file ([TASK=][FORMAT:]PATH) and not a model: a directory, or NAME.mfid."""
    path = Path(text)
    if path.is_dir():
        return (path / "manifest.json").exists()
    if path.suffix == ".mfid" and "=" not in text:
        return False
    return path.is_file() or "=" in text or ":" in text


def is_override(text: str) -> bool:
    """Whether an argument is `section.key=value` (task names have no dot), or sets a key of a config's first level."""
    key, equals, _ = text.partition("=")
    return bool(equals) and ("." in key or key in ("seed", "objective", "sampling")) and not Path(text).exists()


def pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option {text!r} must have the form key=value")
    return key, value


def options_of(option: list[str] | None, properties: list[str] | None) -> dict[str, Any]:
    """How files are read: `--option` and `--property`."""
    options: dict[str, Any] = dict(pair(x) for x in option or [])
    if properties and "properties" in options:
        raise ValueError("--property and --option properties say the same thing: give one of them")
    return options | ({"properties": properties} if properties else {})


def number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not a number") from None


def count(text: str, where: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: {text!r} must be a whole number of at least 1")
    return int(text)
