"""safetensors files, read and put together tensor by tensor: no rank ever holds a whole file in memory.

Tensors are read, not mapped: what a mapped tensor is copied into lives twice, and a tensor that is kept as it was
mapped keeps all pages of its file.
"""

import json
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from multifid.model.lora import has_lora, merged

NOTHING: Mapping[str, Any] = {}


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name. Each access reads one tensor into memory of its own."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt", backend="pread")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file.keys():  # noqa: SIM118 (not a mapping)
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


class TensorFiles(Mapping[str, TensorFile]):
    """The files of a folder by their stems, each opened when it is asked for."""

    def __init__(self, folder: Path, stems: Collection[str]) -> None:
        self.folder, self._stems = folder, frozenset(stems)
        self._open: dict[str, TensorFile] = {}

    def __getitem__(self, stem: str) -> TensorFile:
        if stem not in self._stems:
            raise KeyError(stem)
        if stem not in self._open:
            self._open[stem] = TensorFile(self.folder / f"{stem}.safetensors")
        return self._open[stem]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._stems))

    def __len__(self) -> int:
        return len(self._stems)


Places = dict[str, tuple[dict[str, Any], Path, int]]  # parameter -> (its description, its file, where its bytes begin)


def places_of(file: Path) -> Places:
    """The weights in a file of a checkpoint: the averaged ones where there are some."""
    header, begin = _header(file)
    kind = "ema/" if any(name.startswith("ema/") for name in header) else "weight/"
    return {
        name.removeprefix(kind): (about, file, begin + about["data_offsets"][0])
        for name, about in header.items()
        if name.startswith(kind)
    }


def consolidate(folder: Path, path: Path, beside: Mapping[str, Any] = NOTHING) -> None:
    """The weights of a checkpoint as one file, committed by rename. beside: weights that are not the checkpoint's."""
    places = dict(beside)
    for file in sorted(folder.glob("*.safetensors")):
        places |= places_of(file)
    part = path.with_suffix(".part")
    if has_lora(places):
        held = {n: TensorFile(file)[_kind(file, n)] for n, (_, file, _) in places.items()}
        save_file({name: tensor.contiguous() for name, tensor in merged(held)}, part)
        os.replace(part, path)
        return
    joined, end = {}, 0
    for name in sorted(places):
        about = places[name][0]
        first, last = about["data_offsets"]
        joined[name] = about | {"data_offsets": [end, end + last - first]}
        end += last - first
    with part.open("wb") as out:
        _write_header(out, joined)
        for name, about in joined.items():
            first, last = about["data_offsets"]
            with places[name][1].open("rb") as source:
                source.seek(places[name][2])
                out.write(source.read(last - first))
    os.replace(part, path)


def _kind(file: Path, name: str) -> str:
    """The key of the weight of a parameter that a model is made of: averaged where there are averages."""
    return f"ema/{name}" if f"ema/{name}" in _header(file)[0] else f"weight/{name}"


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file holds, and where its bytes begin: 8 bytes of length, JSON, data, as the format has it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _write_header(out: BinaryIO, header: dict[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
    out.write(struct.pack("<Q", len(text)) + text)
