"""Which published format a file is of: by the ending of its name, and where several share that, by its first records.

No reader says of itself what its files look like; each is asked to read, and the one that finds a structure is right.
"""

from itertools import islice
from pathlib import Path
from types import ModuleType

from multifid.readers import folder_marks, reader
from multifid.readers.formats import FORMATS
from multifid.readers.table_mapping import MAPPINGS
from multifid.store.block import Block
from multifid.structures.structure import Structure

LOOK = 200  # records of a file that a reader is shown


def recognise(path: Path) -> str:
    """The format of a file. ValueError, with how to say it, where none or several of the readers can read it.

    A name with an ending of one format alone is of that format; without a known ending, all formats are tried. A
    directory is known by the files in it, and YAML is the mapping of a table.
    """
    if path.is_dir():
        return _of_directory(path)
    if path.suffix.lower() in MAPPINGS:
        return "table"
    by_name = [name for name in FORMATS if path.name.lower().endswith(reader(name).ENDINGS)]
    if len(by_name) == 1:
        return by_name[0]
    found = [name for name in by_name or FORMATS if holds(path, reader(name))]
    found = found or [name for name in by_name or FORMATS if _looks_like(path, reader(name))]
    if len(found) == 1:
        return found[0]
    why = f"can be read as {' and as '.join(found)}" if found else "is in none of the formats that are known"
    hint = "; tables of your own need a MAPPING.yaml, see docs/formats.md" if "table" in by_name and not found else ""
    raise ValueError(f"{path} {why}: say which one it is, FORMAT:{path}, with FORMAT one of {', '.join(FORMATS)}{hint}")


def _looks_like(path: Path, module: ModuleType) -> bool:
    try:
        return bool(getattr(module, "looks_like", lambda path: False)(path))
    except Exception:  # as in `holds`
        return False


def read_as_one(path: Path) -> bool:
    """Whether a directory is one that some format reads as one file."""
    return path.is_dir() and any((path / mark).is_file() for name in FORMATS for mark in folder_marks(reader(name)))


def _of_directory(path: Path) -> str:
    marks = {name: folder_marks(reader(name)) for name in FORMATS}
    found = [name for name, own in marks.items() if any((path / mark).is_file() for mark in own)]
    below = [name for name, own in marks.items() if not found and any(next(path.rglob(mark), None) for mark in own)]
    if len(found or below) == 1:
        return (found or below)[0]
    raise ValueError(
        f"{path} is a directory: say what the files in it are, FORMAT:{path}, with FORMAT one of {', '.join(FORMATS)}"
    )


def holds(path: Path, module: ModuleType) -> bool:
    """Whether a reader finds a structure among the first records of a file."""
    try:
        records = list(islice(module.read(path, module.Options(), lambda far: None, None), LOOK))
    except Exception:  # whatever a library makes of a file of another format: it is of another format
        return False
    return any(isinstance(record, Structure | Block) for record in records)
