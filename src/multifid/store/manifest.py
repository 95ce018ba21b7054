"""`manifest.json`, and what it promises of the files: sizes, dtypes, shapes, headers, checksums.

    STORE/manifest.json           of all parts
    STORE/*.npy                   what was prepared at once
    STORE/part-1/                 what was added first: field files and a manifest of their own, like a store
    STORE/earlier/0.json          manifest.json as it was before the first addition, 1.json before the second, ...

The manifest of several parts (schema 2) names each by the checksum of its manifest. A folder that it does not name is
no part of the store, whatever is in it.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from multifid.store.fields import (
    CHECKSUMS,
    HEADER,
    MANIFEST,
    PARTED,
    SCHEMA,
    block_checksums,
    blocks,
    damaged,
    field,
    npy_header,
)

EARLIER = "earlier"
_KEYS = ("source", "structures", "atoms", "elements", "tasks", "splits", "edges_per_atom", "skipped", "files")


def manifest_bytes(body: dict[str, Any]) -> bytes:
    """The text of manifest.json: `body` and, as its last key, the checksum of the text without that key."""
    body = {key: value for key, value in body.items() if key != "xxh3"}
    digest = xxhash.xxh3_64_hexdigest(_json(body))
    return _json({**body, "xxh3": digest})


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def part_folder(store: Path, number: int) -> Path:
    """Where the part of an addition is, from 1."""
    return store / f"part-{number}"


def manifest_file(store: Path, additions: int) -> Path:
    """Where a manifest is kept that is not the newest any longer."""
    return store / EARLIER / f"{additions}.json"


def read_manifest(path: Path, additions: int | None = None) -> tuple[dict[str, Any], str]:
    """The manifest of a store and its checksum, now or after so many additions. ValueError where there is no such."""
    manifest, checksum = _read(path, path / MANIFEST)
    newest = len(manifest.get("parts", []))
    if additions is None or additions == newest:
        return manifest, checksum
    if not 0 <= additions < newest:
        raise ValueError(f"{path}: files were added to it {newest} times, not {additions}")
    return _read(path, manifest_file(path, additions))


def folders_of(store: Path, manifest: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """The parts of a store with this manifest: the folder and the manifest of each.

    ValueError where one is not what the manifest names.
    """
    added = manifest.get("parts")
    if added is None:
        return [(store, manifest)]
    places = [(store, manifest_file(store, 0), manifest["first"])]
    for number, part in enumerate(added, 1):
        folder = part_folder(store, number)
        places.append((folder, folder / MANIFEST, part["checksum"]))
    out = []
    for folder, file, expected in places:
        own, checksum = _read(folder, file)
        if checksum != expected:
            raise ValueError(f"{file} is not the manifest that {store / MANIFEST} names: parts of two stores are mixed")
        out.append((folder, own))
    return out


def _read(path: Path, file: Path) -> tuple[dict[str, Any], str]:
    if not file.is_file():
        raise ValueError(f"{path} is not a store: it has no {file.name} (`multifid prepare` makes stores)")
    data = file.read_bytes()
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("schema") not in (SCHEMA, PARTED):
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise ValueError(f"{file} has schema {found!r}; this version of multifid reads schemas {SCHEMA} and {PARTED}")
    if not _intact(manifest, data):
        raise ValueError(f"{file} is damaged or was edited: it differs from its own checksum; prepare the store again")
    keys = _KEYS if manifest["schema"] == SCHEMA else (*_KEYS[:-1], "first", "parts", "content_of")
    if missing := [key for key in keys if key not in manifest]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return manifest, xxhash.xxh3_64_hexdigest(data)


def _intact(manifest: dict[str, Any], data: bytes) -> bool:
    try:
        return manifest_bytes(manifest) == data
    except ValueError:  # a number became infinite
        return False


def check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if (found := path.stat().st_size) != size:
        raise ValueError(f"{path} has {found} bytes where the manifest says {size}: truncated or overwritten")


def check_array(path: Path, key: str, entry: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Size, dtype, shape and header of an array file must all say the same."""
    what, shape, dtype = field(key), tuple(entry["shape"]), entry["dtype"]
    structures = manifest["structures"]
    known = {"structures": structures, "structures + 1": structures + 1, "atoms": manifest["atoms"]}
    rows = known.get(what.rows, manifest["splits"].get(what.rows, shape[0]))
    large_index = key.startswith("index/") and dtype == "<u8"
    if shape != (rows, *what.row) or (dtype != what.dtype and not large_index):
        raise ValueError(f"{path}: the manifest says {dtype} {shape}, which must be {what.dtype} {(rows, *what.row)}")
    if entry["bytes"] != HEADER + math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{path}: {entry['bytes']} bytes do not hold {dtype} {shape}")
    with path.open("rb") as file:
        if file.read(HEADER) != npy_header(dtype, shape):
            raise ValueError(f"{path} is damaged in bytes 0..{HEADER}: its header is not that of {dtype} {shape}")


def open_checksums(store: Path, manifest: dict[str, Any]) -> np.ndarray:
    path, entry = store / CHECKSUMS, manifest["files"].get(CHECKSUMS)
    if entry is None:
        raise ValueError(f"{store / MANIFEST} lists no {CHECKSUMS}")
    check_size(path, entry["bytes"])
    count = sum(blocks(e["bytes"]) for name, e in manifest["files"].items() if name != CHECKSUMS)
    data = path.read_bytes()
    if data[:HEADER] != npy_header("<u8", (count,)) or len(data) != HEADER + 8 * count:
        raise ValueError(f"{path} is damaged in bytes 0..{HEADER}: it must hold {count} checksums")
    if xxhash.xxh3_64_hexdigest(data[HEADER:]) != manifest["checksums"]:
        raise ValueError(f"{path} is damaged in bytes {HEADER}..{len(data)}: it differs from the manifest")
    return np.frombuffer(data, "<u8", offset=HEADER)


def verify_text(path: Path, sums: np.ndarray) -> None:
    for block, found in enumerate(block_checksums(path)):
        if found != int(sums[block]):
            raise ValueError(damaged(path, block, path.stat().st_size))
