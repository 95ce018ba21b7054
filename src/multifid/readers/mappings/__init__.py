"""Mappings that come with the package, by name: `multifid prepare table FILES --option mapping=NAME`."""

from pathlib import Path

SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def mapping_file(text: str | Path) -> Path:
    """The file of a mapping: the one that is named, or the shipped one that is called so."""
    return Path(text) if Path(text).exists() else SHIPPED.get(str(text), Path(text))
