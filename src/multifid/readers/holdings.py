"""What a file holds, for the error where nothing of it can be used: names with examples of values, a line each."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np

WIDEST = 60  # characters of an example
MOST = 40  # lines


def listed(values: Mapping[str, Any], above: str = "") -> list[str]:
    """Keys and values of a record; those of a dictionary in it one level deeper."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping) and not above and "__ndarray__" not in value:
            lines += listed(value, f"{key}.")
        else:
            lines.append(f"{above}{key} = {example(value)}")
    return lines[:MOST]


def example(value: Any) -> str:
    """The beginning of a value."""
    if isinstance(value, Mapping):
        value = value.get("__ndarray__", value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 4]} ..."


def of_first_group(group: h5py.Group) -> list[str]:
    """The datasets of the first group below this one that has some, with shapes and first values."""
    for name, inner in _members(group):
        if any(isinstance(own, h5py.Dataset) for _, own in _members(inner)):
            return [f"{name}/{key}{_described(own)}" for key, own in _members(inner)][:MOST]
        if lines := of_first_group(inner):
            return [f"{name}/{line}" for line in lines]
    return []


def _members(group: h5py.Group) -> Iterator[tuple[str, Any]]:
    """What lies in a group and in this file."""
    if isinstance(group, h5py.Group):
        for name in group:
            if isinstance(group.get(name, getlink=True), h5py.HardLink):
                yield name, group[name]


def _described(own: Any) -> str:
    if not isinstance(own, h5py.Dataset):
        return "/"
    unit = f" {unit}" if isinstance(unit := own.attrs.get("units"), str) else ""
    first = f" = {np.asarray(own[(0,) * own.ndim]).item()}" if own.size and own.dtype.kind in "iuf" else ""
    return f" {own.shape}{first}{unit}{' ...' if first and own.size > 1 else ''}"
