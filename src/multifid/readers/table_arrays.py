"""Tables whose columns are arrays: HDF5 files and zarr stores (package `zarr`), by the same mapping as other tables.

    f[group]   numbers (N,), positions (S, N, 3), energy (S,)             S conformers of one molecule
    f[group]   numbers (N,), positions (N, 3), energy ()                  one structure in a group
    f          numbers (S, M), positions (S, M, 3), energy (S,)           M atoms at most, numbers 0 behind them
    f          natoms (S,), numbers (A,), positions (A, 3), energy (S,)   laid end to end: `natoms` in the mapping

Every group that has the positions is read, at any depth, by the order of names. A column is an array of that group;
`../NAME` is one of the group above, `@NAME` an attribute, `$path` the path of the group and `$path.0` its first name.
Numbers, cell, pbc, charge, spin and texts may be one for all conformers. Soft and external links are not followed.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from multifid.readers.contract import Part, Progress, Skip, cut
from multifid.readers.holdings import MOST as MOST_LINES
from multifid.readers.molecule_hdf5 import opened, plausible
from multifid.readers.records import BadRecord
from multifid.readers.table_columns import Ragged, of_objects
from multifid.readers.table_mapping import TableMapping
from multifid.readers.zarr_groups import FOLDER as ZARR
from multifid.readers.zarr_groups import ZarrGroups, opened_zarr

HDF5 = (".h5", ".hdf5", ".hdf")
BATCH = 1024  # structures read at once
PART = 1 << 14  # structures of a part
DEEPEST = 16  # groups in groups
LOOK = 100  # groups in which every column must be found once
WIDEST = 1 << 24  # values of one structure in a column
ATOMS = {"numbers": 1, "symbols": 1, "positions": 3, "forces": 3}  # values of an atom
SHARED = ("numbers", "symbols", "cell", "pbc", "charge", "spin", "group", "split", "only")


def is_arrays(path: Path) -> bool:
    """Whether a table is HDF5 or zarr, by its name or the files in it."""
    return path.name.lower().endswith(HDF5) or (path.is_dir() and any((path / mark).is_file() for mark in ZARR))


class Place(NamedTuple):
    """A group that has structures: its path, how many, and where their atoms begin where they lie end to end."""

    path: str
    structures: int
    offsets: np.ndarray | None = None


class Hdf5Groups:
    """How groups, arrays and attributes of HDF5 are asked for; links out of the file are left out."""

    def names(self, group: Any) -> list[str]:
        """Of what lies in a group."""
        return [name for name in group if isinstance(group.get(name, getlink=True), h5py.HardLink)]

    def item(self, group: Any, name: str) -> Any:
        """What is called so in a group; None where nothing is, or it lies elsewhere."""
        return group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None

    def is_group(self, item: Any) -> bool:
        return isinstance(item, h5py.Group)

    def same(self, group: Any) -> Any:
        """What tells a group from all others, whatever it is called."""
        return h5py.h5o.get_info(group.id).addr

    def check(self, array: Any) -> None:
        """BadRecord where an array cannot be as large as it says."""
        plausible(array)

    check_whole = check


Groups = Hdf5Groups | ZarrGroups


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Groups]]:
    try:
        if path.is_dir():
            with opened_zarr(path) as root:
                yield root, ZarrGroups()
        else:
            with opened(path) as file:
                yield file, Hdf5Groups()
    except BadRecord as bad:
        raise ValueError(f"{path}: {bad}") from None


def array_parts(path: Path, mapping: TableMapping | None) -> list[Part]:
    """Structures in the order of the file, about PART together; groups are not cut unless they are larger."""
    if mapping is None:
        return [None]
    with _opened(path) as (root, groups):
        sizes = [n for place in _places(root, groups, mapping) for n in _pieces(place.structures)]
    firsts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    return [(int(firsts[start]), int(firsts[stop])) for start, stop in filter(None, cut(sizes, PART))]


def _pieces(count: int) -> list[int]:
    return [PART] * (count // PART) + [count % PART] * (count % PART > 0)


class ArrayBatch(NamedTuple):
    """Some structures, as `table_files.Batch`, with their names."""

    first: int
    rows: int
    column: Callable[[str, bool], Ragged]
    names: list[str]


def array_batches(path: Path, mapping: TableMapping, progress: Progress, part: Part = None) -> Iterator[Any]:
    """Batches of structures, and a Skip for a group that cannot be used. ValueError names file and what is wrong."""
    with _opened(path) as (root, groups):
        places = list(_places(root, groups, mapping))
        if not places:
            raise ValueError(
                f"{path}: positions: no group has {mapping.positions!r}; the file has {_holds(root, groups)}"
            )
        if part is None or part[0] == 0:
            _check_columns(path, root, groups, mapping, places)
        start, stop = part or (0, sum(place.structures for place in places))
        waiting, first, at = _Waiting(mapping, start), 0, start
        for place in places:
            begin, end = max(start - first, 0), min(stop - first, place.structures)
            first += place.structures
            if begin >= end:
                continue
            try:
                group = _Group(root, groups, mapping, place)
                for low in range(begin, end, BATCH):
                    count = min(BATCH, end - low)
                    yield from waiting.add(group.rows(low, low + count), count)
                    at += count
                    progress((at - start) / (stop - start))
            except BadRecord as bad:
                yield Skip(str(bad), place.path.rstrip("/") or "/")
        yield from waiting.flush()


def holds_arrays(path: Path) -> list[str]:
    """The arrays of the first group that has some, with their shapes."""
    with _opened(path) as (root, groups):
        return _holds(root, groups)


def _holds(root: Any, groups: Groups) -> list[str]:
    for path, group in _walk(root, groups):
        items = [(name, groups.item(group, name)) for name in groups.names(group)]
        arrays = [f"{path}{name} {item.shape}" for name, item in items if not groups.is_group(item)]
        if arrays:
            return [*arrays, *(f"{path}@{name} = {value!s:.60}" for name, value in group.attrs.items())][:MOST_LINES]
    return []


def _walk(group: Any, groups: Groups, path: str = "", seen: set[Any] | None = None) -> Iterator[tuple[str, Any]]:
    """(path with a slash at its end, group), the outermost first, each once."""
    seen = set() if seen is None else seen
    if groups.same(group) in seen or path.count("/") > DEEPEST:
        return
    seen.add(groups.same(group))
    yield path, group
    for name in groups.names(group):
        if groups.is_group(item := groups.item(group, name)):
            yield from _walk(item, groups, f"{path}{name}/", seen)


def _places(root: Any, groups: Groups, mapping: TableMapping) -> Iterator[Place]:
    """The groups that have positions, with the number of their structures."""
    for path, _ in _walk(root, groups):
        if mapping.within and path.split("/")[0] not in mapping.within:
            continue
        array = _found(root, groups, path, mapping.positions)
        if array is None or groups.is_group(array) or not array.shape:
            continue
        try:
            groups.check_whole(array)
        except BadRecord:  # which reading it finds again, and says
            yield Place(path, 1)
            continue
        if mapping.natoms is None:
            one = len(array.shape) == 2 and array.shape[1] == 3
            yield Place(path, 1 if one else array.shape[0])
            continue
        counts = _found(root, groups, path, mapping.natoms)
        if counts is not None and not groups.is_group(counts):
            groups.check_whole(counts)
            sizes = np.asarray(counts[()], np.int64).reshape(-1)
            if (sizes < 0).any():
                raise ValueError(f"natoms: {path}{mapping.natoms} has a negative number of atoms")
            yield Place(path, len(sizes), np.concatenate([[0], np.cumsum(sizes)]))


def _found(root: Any, groups: Groups, path: str, name: str) -> Any:
    """The array, attribute or text that a column is in a group; None where it has none."""
    steps = [step for step in path.split("/") if step]
    if name == "$path" or name.startswith("$path."):
        place = name.partition(".")[2]
        if not place:
            return "/".join(steps)
        return steps[int(place)] if place.isdigit() and int(place) < len(steps) else None
    words = name.split("/")
    while words and words[0] == "..":
        words, steps = words[1:], steps[:-1]
    item = root
    for step in [*steps, *words[:-1]]:
        item = groups.item(item, step) if groups.is_group(item) else None
        if item is None:
            return None
    if not groups.is_group(item) or not words:
        return None
    return item.attrs.get(words[-1][1:]) if words[-1].startswith("@") else groups.item(item, words[-1])


def _check_columns(path: Path, root: Any, groups: Groups, mapping: TableMapping, places: list[Place]) -> None:
    for key, name in mapping.columns().items():
        if all(_found(root, groups, place.path, name) is None for place in places[:LOOK]):
            looked = min(len(places), LOOK)
            raise ValueError(
                f"{path}: {key}: there is no {name!r} in the first {looked} groups with structures;"
                f" the file has {', '.join(_holds(root, groups))}"
            )


class _Group:
    """The structures of one group, column by column."""

    def __init__(self, root: Any, groups: Groups, mapping: TableMapping, place: Place) -> None:
        self.root, self.groups, self.mapping, self.place = root, groups, mapping, place
        self.kept: np.ndarray | None = None  # how many of the atoms of each structure are some, where there is padding
        for key, name in mapping.columns().items():
            value = _found(root, groups, place.path, name)
            if _is_array(value) and key.rpartition(".")[2] in ("numbers", "positions", "energy"):
                groups.check_whole(value)

    def rows(self, low: int, high: int) -> dict[str, Ragged]:
        """Column -> the values of structures low to high, and under "" their names. BadRecord where they do not fit."""
        own, count = self.place, high - low
        found: dict[str, Ragged] = {}
        columns, self.kept = self.mapping.columns(), None
        order = sorted(columns, key=lambda key: key not in ("numbers", "symbols"))  # these say which atoms there are
        for key in order:
            value = _found(self.root, self.groups, own.path, columns[key])
            if value is None or self.groups.is_group(value):
                if key in ("numbers", "symbols", "positions"):
                    raise BadRecord(f"{key}: record without {columns[key]}")
                nothing: Any = [] if self.mapping.is_text(key) else np.zeros(0)
                found[columns[key]] = Ragged(nothing, np.zeros(count, np.int64), np.zeros(count, bool))
            else:
                found[columns[key]] = self._column(key, value, low, high)
        path = own.path.rstrip("/")
        names = [path or "0"] if own.structures == 1 else [f"{path}/{i}".lstrip("/") for i in range(low, high)]
        found[""] = Ragged(names, np.ones(count, np.int64), np.zeros(count, bool))
        return found

    def _column(self, key: str, value: Any, low: int, high: int) -> Ragged:
        kind = key.rpartition(".")[2] if key.startswith("labels.") else key.partition(".")[0]
        values, each = self._values(key, kind, value, low, high)
        times = high - low if each else 1
        if self.mapping.is_text(key):
            return of_objects([_texts(own) for own in values] * times, True)
        try:
            rows = [np.asarray(own, np.float64).reshape(-1) for own in values] * times
        except (TypeError, ValueError):
            raise BadRecord(f"{key} is not made of numbers") from None
        if self.place.offsets is None and kind in ATOMS:
            rows = self._without_padding(kind, rows)
        counts = np.array([len(row) for row in rows], np.int64)
        return Ragged(np.concatenate([*rows, np.zeros(0)]), counts, np.zeros(len(rows), bool))

    def _values(self, key: str, kind: str, value: Any, low: int, high: int) -> tuple[list[Any], bool]:
        """A value for each structure, or one for all of them (then True)."""
        if _is_array(value):
            self.groups.check(value)
        else:
            value = np.asarray(value, object if isinstance(value, str | bytes) else None)
        shape, count = tuple(value.shape), self.place.structures
        if shape and math.prod(shape[1:]) > WIDEST:
            raise BadRecord(f"{key}: a structure has more than {WIDEST:,} values")
        if self.place.offsets is not None and kind in ATOMS:
            return self._end_to_end(key, value, low, high), False
        if count == 1 and (not shape or kind in ATOMS or shape[0] != 1):
            return [value[()]], False
        atoms = self._atoms()
        alike = kind in ("numbers", "symbols") and math.prod(shape) == atoms
        if kind in SHARED and (not shape or shape[0] != count or alike):
            return [value[()]], True
        if not shape or shape[0] != count:
            raise BadRecord(f"{key}: another length than the structures")
        return list(value[low:high]), False

    def _atoms(self) -> int:
        positions = _found(self.root, self.groups, self.place.path, self.mapping.positions)
        return int(positions.shape[-2]) if len(positions.shape) == 3 else -1

    def _end_to_end(self, key: str, value: Any, low: int, high: int) -> list[Any]:
        offsets = self.place.offsets
        assert offsets is not None
        if not value.shape or value.shape[0] != offsets[-1]:
            raise BadRecord(f"{key}: another length than the atoms")
        flat = value[int(offsets[low]) : int(offsets[high])]
        return np.split(flat, (offsets[low + 1 : high] - offsets[low]).astype(int))

    def _without_padding(self, kind: str, rows: list[np.ndarray]) -> list[np.ndarray]:
        """Without the atoms whose number is 0 behind all others."""
        if kind == "numbers":
            ends = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in rows]
            if any(end < len(row) for end, row in zip(ends, rows, strict=True)):
                self.kept = np.array(ends)
        if self.kept is None:
            return rows
        width = ATOMS[kind]
        return [row[: end * width] for row, end in zip(rows, self.kept.tolist(), strict=True)]


def _is_array(value: Any) -> bool:
    """Whether it is an array of the file, not an attribute, a path or nothing."""
    return value is not None and not isinstance(
        value, str | bytes | int | float | np.generic | np.ndarray | list | tuple
    )


def _texts(value: Any) -> Any:
    """Texts of an array of any depth, those that are empty left out."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return [text for each in value.reshape(-1).tolist() if (text := _texts(each)) not in ("", None)]
    return value.item() if isinstance(value, np.generic) else value


class _Waiting:
    """Structures of small groups on their way to a batch."""

    def __init__(self, mapping: TableMapping, first: int) -> None:
        self.columns, self.first, self.count = mapping.columns(), first, 0
        self.found: list[dict[str, Ragged]] = []

    def add(self, rows: dict[str, Ragged], count: int) -> Iterator[ArrayBatch]:
        self.found.append(rows)
        self.count += count
        if self.count >= BATCH:
            yield from self.flush()

    def flush(self) -> Iterator[ArrayBatch]:
        """The batch of what waits."""
        if not self.found:
            return
        joined = {name: _joined([rows[name] for rows in self.found]) for name in self.found[0]}

        def column(name: str, text: bool) -> Ragged:
            return joined[name]

        yield ArrayBatch(self.first, self.count, column, list(joined[""].values))
        self.first, self.count, self.found = self.first + self.count, 0, []


def _joined(parts: list[Ragged]) -> Ragged:
    if len(parts) == 1:
        return parts[0]
    first = parts[0].values
    if isinstance(first, list):
        values: Any = [text for part in parts for text in part.values]
    else:
        values = np.concatenate([part.values for part in parts])
    return Ragged(values, np.concatenate([p.counts for p in parts]), np.concatenate([p.bad for p in parts]))
