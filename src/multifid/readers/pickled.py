"""Arrays, numbers and texts out of a pickle of torch tensors and PyTorch Geometric data, of which nothing is executed.

A pickle is a program: it names functions and calls them, and a hostile one names `os.system`. Here names are looked up
in a table of our own and nowhere else. What stands in it builds numpy arrays from bytes, or keeps what it is given; any
other name makes the record one that is not used. Neither torch nor PyTorch Geometric is needed or imported.

A tensor's bytes are a stream as `torch.save` wrote it before 2020: pickles (a magic number, a version, the machine, the
storage, its keys), then the number of values and the values.
"""

import io
import math
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from multifid.readers.records import BadRecord

LARGEST = 1 << 24  # values of a tensor
MAGIC = 0x1950A86A20F9469CFC6C  # of the stream of a tensor's bytes
DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?",
}  # fmt: skip
PLAIN = "biufc?SU"  # kinds of numpy arrays without objects in them


def values_of(text: bytes) -> Any:
    """What a pickle holds: dictionaries, lists, numbers, texts, and arrays for tensors. BadRecord for anything else."""
    try:
        return _plain(_Reader(io.BytesIO(text), _names()).load())
    except BadRecord:
        raise
    except Exception:  # whatever damaged bytes make of the machine of pickles
        raise BadRecord("a damaged pickle") from None


class Kept:
    """An object of a class that is not here: its state is kept, its code is nowhere."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # (of the dictionary, of the slots)
            state = {**(state[0] or {}), **(state[1] or {})}
        self.state = state if isinstance(state, dict) else {"state": state}


class _Array:
    """A numpy array that is filled by its state: (version, shape, dtype, in Fortran's order, bytes)."""

    def __init__(self, *arguments: Any) -> None:
        self.array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _from_bytes(content, dtype, shape, "F" if fortran else "C")


def _from_bytes(content: Any, dtype: Any, shape: Any, order: str, *rest: Any) -> np.ndarray:
    if dtype.dtype.kind not in PLAIN or not isinstance(content, bytes | bytearray | str):
        raise BadRecord("an array of objects in a pickle")
    content = content.encode("latin1") if isinstance(content, str) else content  # as pickles of Python 2 have it
    return np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


class _Dtype:
    """A numpy dtype of numbers: name, and byte order by its state."""

    def __init__(self, name: str, *rest: Any) -> None:
        self.dtype = np.dtype(str(name))

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Reader(pickle.Unpickler):
    """An unpickler for which only the names of the table exist."""

    def __init__(self, file: io.BytesIO, names: dict[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        root = module.partition(".")[0]
        if (root, name) in self.names:
            return self.names[root, name]
        if root == "torch" and name in DTYPES:
            return DTYPES[name]
        if root == "torch_geometric":
            return self.names["torch_geometric", "*"]
        raise BadRecord(f"a pickle that asks for {module}.{name}, which is not executed")

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], str)):
            raise BadRecord("a damaged pickle")
        return _Storage(pid[1], str(pid[2]), pid[4])


class _Storage:
    """The values of tensors: a dtype, a key, how many, and then the array."""

    def __init__(self, dtype: str, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count
        self.array: np.ndarray = np.zeros(0)


def _names() -> dict[tuple[str, str], Any]:
    """(package, name) -> what stands for it. Classes of their own for every record, which a pickle may spoil."""
    kept, array, dtype = (type(one.__name__, (one,), {}) for one in (Kept, _Array, _Dtype))

    def first(build: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: build(*arguments)

    names: dict[tuple[str, str], Any] = {
        ("torch_geometric", "*"): kept,
        ("torch", "_rebuild_tensor"): first(_tensor),
        ("torch", "_rebuild_tensor_v2"): first(_tensor),
        ("torch", "_load_from_bytes"): lambda content: _storage(content, names),
        ("torch", "Size"): first(tuple),
        ("torch", "device"): first(str),
        ("collections", "OrderedDict"): dict,
        ("numpy", "_reconstruct"): first(lambda *arguments: array()),
        ("numpy", "_frombuffer"): first(_from_bytes),
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): dtype,
        ("numpy", "scalar"): first(lambda kind, content: np.frombuffer(content, kind.dtype)[0]),
        ("copyreg", "_reconstructor"): first(lambda kind, *rest: kind() if kind is kept else None),
        ("copy_reg", "_reconstructor"): first(lambda kind, *rest: kind() if kind is kept else None),
        ("builtins", "object"): "object",
        ("__builtin__", "object"): "object",
        ("_codecs", "encode"): first(lambda text, name: str(text).encode("latin1")),
    }
    return names


def _storage(content: bytes, names: dict[tuple[str, str], Any]) -> _Storage:
    """The storage in a stream of `torch.save`, with its values."""
    file = io.BytesIO(content)
    magic, _, _, storage, keys = (_Reader(file, names).load() for _ in range(5))
    if magic != MAGIC or not isinstance(storage, _Storage) or keys != [storage.key]:
        raise BadRecord("a damaged pickle")
    (count,) = struct.unpack("<q", file.read(8))
    if not 0 <= count <= LARGEST or count != storage.count:
        raise BadRecord("a tensor in a pickle is implausibly large")
    storage.array = np.frombuffer(file.read(count * np.dtype(storage.dtype).itemsize), storage.dtype)
    if len(storage.array) != count:
        raise BadRecord("a damaged pickle")
    return storage


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """The view that a tensor is of its storage; every value of it lies inside."""
    shape, strides, first = [int(n) for n in size], [int(n) for n in stride], int(offset)
    if len(shape) != len(strides) or min([first, *shape, *strides]) < 0:
        raise BadRecord("a damaged pickle")
    if math.prod(shape) > LARGEST:
        raise BadRecord("a tensor in a pickle is implausibly large")
    if (
        math.prod(shape)
        and first + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) >= storage.count
    ):
        raise BadRecord("a damaged pickle")
    width = storage.array.itemsize
    return as_strided(storage.array[first:], shape, [step * width for step in strides], writeable=False)


def _plain(value: Any) -> Any:
    """Without the stand-ins: what objects keep in place of them, arrays in place of what builds them."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, Kept):
        state = value.state
        inner = state.get("_store", state)  # as PyTorch Geometric 2 keeps it
        inner = inner.state.get("_mapping", {}) if isinstance(inner, Kept) else inner
        return {key: _plain(own) for key, own in inner.items() if isinstance(key, str) and not isinstance(own, Kept)}
    return value
