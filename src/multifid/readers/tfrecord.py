"""TFRecord files of `tf.train.Example`, as TensorFlow Datasets writes them (`NAME-full.tfrecord-00000-of-00100`).

A record is its length (uint64), a checksum of that, the message and a checksum of it (masked CRC-32C, 4 bytes each); a
message is a map from names to lists of texts, float32 or int64. Neither TensorFlow nor protobuf is needed. Lengths are
checked by their checksum, so a cut or shifted file is an error; flipped bits in values are not noticed: the checksum of
a whole message takes longer here than all else.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from multifid.readers.contract import Progress

NAMES = re.compile(r"\.tfrecord(-\d+-of-\d+)?$")
LARGEST = 1 << 26  # bytes of a message
BYTES, FLOATS, INTEGERS = 1, 2, 3  # fields of a Feature
DAMAGED = (IndexError, ValueError, struct.error, UnicodeDecodeError)


def examples(path: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    """The records, name -> list of numbers or texts. ValueError names file and byte where it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while head := file.read(12):
            at = file.tell() - len(head)
            if len(head) < 12 or _masked(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise ValueError(f"{path}: truncated, damaged or no TFRecord file near byte {at:,}")
            (length,) = struct.unpack("<Q", head[:8])
            if length > LARGEST:
                raise ValueError(f"{path}: a record of {length:,} bytes begins at byte {at:,}: more than {LARGEST:,}")
            message = file.read(length + 4)
            if len(message) < length + 4:
                raise ValueError(f"{path}: truncated within the record at byte {at:,}")
            try:
                yield _example(message[:length])
            except DAMAGED:
                raise ValueError(f"{path}: the record at byte {at:,} is damaged, or no tf.train.Example") from None
            progress(file.tell() / size)


def _example(message: bytes) -> dict[str, Any]:
    """Example { features: Features { feature: map<string, Feature> } }."""
    found = {}
    for _, features in _fields(message):
        for _, entry in _fields(features):
            pair = dict(_fields(entry))
            found[pair[1].decode("utf-8")] = _feature(pair[2]) if 2 in pair else None
    return found


def _feature(message: bytes) -> Any:
    """A list of texts (bytes that are none are kept as hexadecimal), float32 or int64."""
    for kind, values in _fields(message):
        parts = [part for number, part in _fields(values, kind) if number == 1]
        if kind == BYTES:
            return [_text(part) for part in parts]
        if kind == FLOATS:
            return np.frombuffer(b"".join(parts), "<f4").tolist()
        if kind == INTEGERS:
            return [value for part in parts for value in _integers(part)]
    return None


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.hex()


def _fields(message: bytes, kind: int = 0) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the fields of a message: of length-delimited ones, and unpacked numbers of lists."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == 2:
            length, place = _varint(message, place)
            end = place + length
        elif wire == 5 and kind == FLOATS:
            end = place + 4
        elif wire == 0 and kind == INTEGERS:
            end = _varint(message, place)[1]
        else:
            raise ValueError(f"wire type {wire}")
        if end > len(message):
            raise ValueError("truncated")
        yield number, message[place:end]
        place = end


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _integers(message: bytes) -> Iterator[int]:
    place = 0
    while place < len(message):
        value, place = _varint(message, place)
        yield value - (1 << 64) if value >> 63 else value


def _table() -> list[int]:
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        found.append(byte)
    return found


CRC = _table()


def _masked(content: bytes) -> int:
    """The masked CRC-32C (Castagnoli) of some bytes."""
    value = 0xFFFFFFFF
    for byte in content:
        value = CRC[(value ^ byte) & 255] ^ value >> 8
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
