"""Raw files to structures: one file per published format, one entry each in `formats.FORMATS`.

A reader is a function `read(path, options, progress, part=None)` that streams one file: it yields a `Structure` (in our
units), many at once as a `Block` (whose values may still be unfit: prepare looks at them), a `Skip` for a record that
cannot be used (never an exception: one bad record must not cost the file), or an `IsolatedAtom`. It raises `ValueError`
naming the file where the file as a whole is not what it should be. Memory does not grow with the file. `progress` is
called now and then with the fraction done, 0..1.

`parts(path, options)` cuts a file into parts that can be read by different processes: `(start, stop)` in whatever the
reader counts, and `read` with one of them yields what lies there. All parts one after the other are the file.

Beside the two, a reader's module says what prepare writes into the manifest:

    TASKS     task (label set) -> LabelSet, for the default options; the first is the default
    ENDINGS   of the names of files of the format, lower case: which files of a directory are read
    FOLDER    names of files by which a directory is known that is read as one file; absent where there are none
    RELATIVE  what makes structures relatives (they share a split): "formula", "material", ...
    resolved  function(inputs, files of splits, options) -> the same, where an input says which files are meant and how
    label_sets, lineage   of files that say themselves what their labels are, and where they come from (`stores` only)
    Options   pydantic model of what the user may choose, each field with a description
    looks_like  function(path): of files that have no structure until an option says more: whether one is of the format
    holds     function(path): names and examples of values of the first record, for the error where none can be used
"""

from importlib import import_module
from types import ModuleType

from multifid.readers.formats import FORMATS


def folder_marks(module: ModuleType) -> tuple[str, ...]:
    """The names of files by which directories are known that a reader reads as one file."""
    marks: tuple[str, ...] = getattr(module, "FOLDER", ())
    return marks


def reader(name: str) -> ModuleType:
    """The module of a format; imported only when asked for. ValueError names the formats there are."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: known are {', '.join(FORMATS)}")
    return import_module(FORMATS[name].reader)
