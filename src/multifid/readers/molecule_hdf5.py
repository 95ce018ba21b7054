"""What the HDF5 formats share: damage must be an error that names file and place, and hostile sizes a skip.

A dataset may claim any shape and be all fill value, or unpack a thousandfold, or lie in another file: what is read is
bounded by what the file holds.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from multifid.readers.holdings import of_first_group
from multifid.readers.records import BadRecord

HARTREE, BOHR = 27.211386245988, 0.529177210903  # eV, angstrom; CODATA 2018
MOST = (1 << 22, 100)  # bytes of a dataset: this many and this many times what it takes in the file


@contextmanager
def opened(path: Path, name: str | None = None) -> Iterator[h5py.File]:
    """The open file; what HDF5 cannot read while it is open is a ValueError naming `name` (the path, if not given)."""
    path.stat()  # a file that is not there is a FileNotFoundError, not a damaged one
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{name or path}: truncated, damaged or not the expected HDF5 layout: {error}") from error


def first_record(path: Path) -> list[str]:
    """The datasets of the first record of a file; nothing of a packed one."""
    if not h5py.is_hdf5(path):
        return []
    with opened(path) as file:
        return of_first_group(file)


def groups(file: h5py.File) -> list[str]:
    """The names of the groups in a file, links to other files left out."""
    links = (name for name in file if not isinstance(file.get(name, getlink=True), h5py.ExternalLink))
    return [name for name in links if file.get(name, getclass=True) is h5py.Group]


def dataset(group: h5py.Group, key: str) -> np.ndarray:
    """The whole array under `key`; BadRecord where there is none that is plausible."""
    return datasets_of(group, (key,))[key][()]


def datasets_of(group: h5py.Group, needed: Sequence[str], wanted: Sequence[str] = ()) -> dict[str, h5py.Dataset]:
    """The datasets of a record, those `wanted` where they are there. BadRecord where one is missing or implausible."""
    found = {}
    for key in (*needed, *wanted):
        values = group.get(key) if isinstance(group, h5py.Group) else None
        if isinstance(values, h5py.Dataset):
            plausible(values)
            found[key] = values
        elif key in needed:
            raise BadRecord(f"record without {key}")
    return found


def plausible(values: h5py.Dataset) -> None:
    """BadRecord where a dataset lies in another file, or unpacks to far more than it takes in this one."""
    size = math.prod(values.shape or (0,)) * values.dtype.itemsize
    if values.is_virtual or values.external:
        raise BadRecord("a dataset lies in another file")
    if size > MOST[0] and size > MOST[1] * values.id.get_storage_size():
        raise BadRecord("a dataset unpacks to more than is plausible")
