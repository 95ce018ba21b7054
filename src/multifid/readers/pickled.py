"""Arrays, numbers and texts out of a pickle of torch tensors and PyTorch Geometric data, of which nothing is executed.

A pickle is a program: it names functions and calls them, and a hostile one names `os.system`. Here its instructions are
carried out by a machine of our own (`pickle_opcodes`), and names are looked up in the table below and nowhere else.
What stands in it builds numpy arrays from bytes, or keeps what it is given; any other name makes the record one that is
not used. Neither torch nor PyTorch Geometric is needed or imported.

A tensor's bytes are a stream as `torch.save` wrote it before 2020: pickles (a magic number, a version, the machine, the
storage, its keys), then the number of values and the values.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from multifid.readers.pickle_opcodes import Machine
from multifid.readers.records import BadRecord

LARGEST = 1 << 24  # values of a tensor
MAGIC = 0x1950A86A20F9469CFC6C  # of the stream of a tensor's bytes
DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?",
}  # fmt: skip
PLAIN = "biufc?SU"  # kinds of numpy arrays without objects in them
DIMENSIONS, FIELDS = 32, 256  # of an array, of an object: no more are plausible
SHORT = 200  # instructions of a pickle in a tensor's stream; some 60 are usual


def values_of(content: bytes) -> Any:
    """What a pickle holds: dictionaries, lists, numbers, texts, and arrays for tensors. BadRecord for anything else."""
    try:
        return _plain(Machine(content, _named, _persistent).load())
    except BadRecord:
        raise
    except Exception:  # whatever damaged bytes lead to
        raise BadRecord("a damaged pickle") from None


class Kept:
    """An object of a class that is not here: its state is kept, its code is nowhere."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.state: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        """A dictionary, or one and another of its slots."""
        parts = state if isinstance(state, tuple) else (state,)
        if len(parts) > 2 or any(isinstance(part, dict) and len(part) > FIELDS for part in parts):
            raise BadRecord("an object of implausibly many fields in a pickle")
        self.state = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


class _Array:
    """A numpy array that is filled by its state: (version, shape, dtype, in Fortran's order, bytes)."""

    def __init__(self, *arguments: Any) -> None:
        self.array = np.zeros(0)

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _from_bytes(content, dtype, shape, "F" if fortran else "C")


class _Dtype:
    """A numpy dtype of numbers: name, and byte order by its state."""

    def __init__(self, name: str, *rest: Any) -> None:
        self.dtype = np.dtype(str(name))

    def set_state(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Storage:
    """The values of tensors: a dtype, a key, how many, and then the array."""

    def __init__(self, dtype: str, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count
        self.array: np.ndarray = np.zeros(0)


def _named(module: str, name: str) -> Any:
    root = module.partition(".")[0]
    if (root, name) in NAMES:
        return NAMES[root, name]
    if root == "torch" and name in DTYPES:
        return DTYPES[name]
    if root == "torch_geometric":
        return Kept
    raise BadRecord(f"a pickle that asks for {module}.{name}, which is not executed")


def _persistent(pid: Any) -> _Storage:
    _, dtype, key, _, count, *_ = pid
    if dtype not in DTYPES.values() or type(count) is not int:
        raise BadRecord("a damaged pickle")
    return _Storage(dtype, str(key), count)


def _from_bytes(content: Any, dtype: Any, shape: Any, order: str, *rest: Any) -> np.ndarray:
    if dtype.dtype.kind not in PLAIN:
        raise BadRecord("an array of objects in a pickle")
    content = content.encode("latin1") if isinstance(content, str) else content  # as pickles of Python 2 have it
    return np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _storage(content: bytes) -> _Storage:
    """The storage in a stream of `torch.save`, with its values."""
    machine = Machine(content, _named, _persistent, SHORT)
    magic, _, _, storage, keys = (machine.load() for _ in range(5))
    if magic != MAGIC or not isinstance(storage, _Storage) or keys != [storage.key]:
        raise BadRecord("a damaged pickle")
    (count,) = struct.unpack_from("<q", content, machine.place)
    if not 0 <= count <= LARGEST or count != storage.count:
        raise BadRecord("a tensor in a pickle is implausibly large")
    storage.array = np.frombuffer(content, storage.dtype, count, machine.place + 8)
    return storage


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """The view that a tensor is of its storage; every value of it lies inside."""
    if len(size) != len(stride) or len(size) > DIMENSIONS:
        raise BadRecord("a damaged pickle")
    shape, strides, first = [int(n) for n in size], [int(n) for n in stride], int(offset)
    if min([first, *shape, *strides]) < 0:
        raise BadRecord("a damaged pickle")
    if math.prod(shape) > LARGEST:
        raise BadRecord("a tensor in a pickle is implausibly large")
    last = first + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= len(storage.array):
        raise BadRecord("a damaged pickle")
    width = storage.array.itemsize
    return as_strided(storage.array[first:], shape, [step * width for step in strides], writeable=False)


def _reconstructed(kind: Any, *rest: Any) -> Any:
    return Kept() if kind is Kept else None


NAMES: dict[tuple[str, str], Callable[..., Any]] = {  # (package, name) -> what stands for it
    ("torch", "_rebuild_tensor"): _tensor,
    ("torch", "_rebuild_tensor_v2"): _tensor,
    ("torch", "_load_from_bytes"): _storage,
    ("torch", "Size"): lambda values: tuple(values),
    ("collections", "OrderedDict"): lambda *pairs: dict(*pairs),
    ("numpy", "_reconstruct"): lambda *arguments: _Array(),
    ("numpy", "_frombuffer"): _from_bytes,
    ("numpy", "ndarray"): lambda *arguments: None,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "scalar"): lambda kind, content: np.frombuffer(content, kind.dtype)[0],
    ("copyreg", "_reconstructor"): _reconstructed,
    ("copy_reg", "_reconstructor"): _reconstructed,
    ("builtins", "object"): lambda: None,
    ("__builtin__", "object"): lambda: None,
    ("_codecs", "encode"): lambda text, name: str(text).encode("latin1"),
}


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
