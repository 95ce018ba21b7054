"""What QM7-X and Transition1x share: HDF5 files whose damage must be an error that names file and place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from multifid.data.readers.records import BadRecord


@contextmanager
def opened(path: Path, name: str | None = None) -> Iterator[h5py.File]:
    """The open file; what HDF5 cannot read while it is open is a ValueError naming `name` (the path, if not given)."""
    path.stat()  # a file that is not there is a FileNotFoundError, not a damaged one
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{name or path}: truncated, damaged or not the expected HDF5 layout: {error}") from error


def dataset(group: h5py.Group, key: str) -> np.ndarray:
    """The whole array under `key`; BadRecord where there is none."""
    if not isinstance(group, h5py.Group) or not isinstance(found := group.get(key), h5py.Dataset):
        raise BadRecord(f"record without {key}")
    return found[()]
