"""How groups, arrays and attributes of a zarr store are asked for (package `zarr`); no pickle in it is executed.

Arrays of objects may be kept by zarr as pickles, which run whatever they say when they are read: an array with such a
codec is refused before a value of it is touched.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multifid.readers.records import BadRecord

FOLDER = ("zarr.json", ".zgroup", ".zarray")  # files by which a zarr store is known
LARGEST = 1 << 28  # bytes of a chunk, unpacked
CODECS = ("pickle", "dill", "cloudpickle")  # what executes


@contextmanager
def opened_zarr(path: Path) -> Iterator[Any]:
    """The outermost group. ValueError names the store where it is damaged, or the package where it is missing."""
    try:
        import zarr
    except ImportError:
        raise ValueError(f'{path}: zarr needs the package zarr: pip install "multifid[zarr]"') from None
    try:
        yield zarr.open_group(str(path), mode="r")
    except (BadRecord, GeneratorExit):
        raise
    except Exception as error:  # the library and its codecs raise whatever they met
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path}: truncated, damaged or no zarr store: {type(error).__name__}: {error}") from error


class ZarrGroups:
    """As `table_arrays.Hdf5Groups`."""

    def names(self, group: Any) -> list[str]:
        """Of what lies in a group, in the order of the alphabet."""
        return sorted(group.keys())

    def item(self, group: Any, name: str) -> Any:
        """What is called so in a group; None where nothing is."""
        return group.get(name)

    def is_group(self, item: Any) -> bool:
        import zarr

        return isinstance(item, zarr.Group)

    def same(self, group: Any) -> Any:
        """The path: nothing in a zarr store has two."""
        return group.path

    def check(self, array: Any) -> None:
        """BadRecord where an array is read by executing something, or its chunks are implausibly large."""
        named = repr(array.metadata.to_dict()).lower()
        if any(f"'{codec}'" in named for codec in CODECS):
            raise BadRecord("an array of pickles, which are not executed")
        if math.prod(array.chunks) * max(array.dtype.itemsize, 1) > LARGEST:
            raise BadRecord("a chunk of an array is larger than is plausible")

    def check_whole(self, array: Any) -> None:
        """BadRecord where chunks are missing: zarr would read them as zeros."""
        self.check(array)
        if array.nchunks_initialized < array.nchunks:
            raise BadRecord("chunks of an array are missing")
