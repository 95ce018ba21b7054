"""What `multifid evaluate` is asked about, `[TASK=][FORMAT:]PATH`: stores, and files that become stores in a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.evaluation.data import Data, label_sets
from multifid.parallel.groups import World
from multifid.preparation.cache import Files, cached, place_of
from multifid.readers import reader
from multifid.readers.formats import FORMATS
from multifid.readers.recognise import read_as_one, recognise
from multifid.store.fields import MANIFEST, TASK_NAME
from multifid.store.store import Store
from multifid.structures.properties import Property

# Of these formats a file can hold anything: it is called by its own name, not by that of the format.
ANYTHING = ("extxyz", "aselmdb")


NOTHING: Mapping[str, Property] = {}


@dataclass(frozen=True)
class Asked:
    """One `--data`: a store, or files of a format."""

    name: str | None  # TASK
    path: Path
    format: str | None = None  # None: a store
    properties: tuple[str, ...] = ()  # of files: those that are read in place of energies


def parse(text: str, option: str = "--data ") -> Asked:
    """`[TASK=]STORE` or `[TASK=][FORMAT:]FILE`, as an option gives it. ValueError says what is wrong."""
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists() or not TASK_NAME.fullmatch(name):
        name, rest = "", text
    format, colon, path = rest.partition(":")
    if not Path(rest).exists() and colon:
        if format not in FORMATS:
            raise ValueError(f"{option}{text}: {format!r} is no format: known are {', '.join(FORMATS)}")
        return Asked(name or None, Path(path), format)
    if (Path(rest) / MANIFEST).exists():
        return Asked(name or None, Path(rest))
    if Path(rest).is_file() or read_as_one(Path(rest)):
        return Asked(name or None, Path(rest), recognise(Path(rest)))
    if not Path(rest).exists() and not any(sign in rest for sign in "*?["):
        raise ValueError(f"{option}{text}: there is no store and no file {rest}")
    raise ValueError(
        f"{option}{text}: {rest} is no store (it has no {MANIFEST}); files in a directory or of a pattern are "
        f"FORMAT:{rest}, with FORMAT one of {', '.join(FORMATS)}"
    )


def open_data(
    texts: Sequence[str],
    options: dict[str, Any],
    trust_units: bool,
    cache: Path,
    world: World,
    console: Console,
    predicted: Mapping[str, Property] = NOTHING,
) -> list[Data]:
    """The datasets of all `--data`; predicted: task -> property that models predict, for files of such tasks.

    These are read from files that are asked about as such a task, or, without the name of a task, all of them where the
    models predict nothing else (then `predicted` has the empty name too). Files that were never asked about before
    become stores in the cache first. The first rank makes them, then that of each other host where the cache lies on
    its own disk. Called on all ranks.
    """
    made: list[tuple[Asked, str]] = []
    with world.together():
        if world.first:
            parsed = [_with_properties(parse(text), options, predicted) for text in texts]
            _refuse_options(parsed, options)
            made = [(one, _prepared(one, options, trust_units, cache, console)) for one in parsed]
    told = world.share([(one.name, str(one.path), one.format, list(one.properties), place) for one, place in made])
    asked = [(Asked(n, Path(path), format, tuple(own)), Path(place)) for n, path, format, own, place in told]
    with world.together():
        if world.rank == world.on_this_host()[0] and not world.first:
            for one, place in asked:
                if one.format is not None:
                    cached(_files(one, options, trust_units), place)
    with world.together():
        return distinct([d for one, place in asked for d in _data(one, place)])


def _files(one: Asked, options: dict[str, Any], trust_units: bool) -> Files:
    assert one.format is not None, "a store is no file"
    known = {key: value for key, value in options.items() if key in reader(one.format).Options.model_fields}
    known |= {"properties": list(one.properties)} if one.properties else {}
    return Files(one.path, one.format, known, trust_units)


def _prepared(one: Asked, options: dict[str, Any], trust_units: bool, cache: Path, console: Console) -> str:
    """The path of the store that is asked about; of files, a line says where it lies and whether it was there."""
    if one.format is None:
        return str(one.path)
    files = _files(one, options, trust_units)
    place = place_of(files, cache)
    store, before = cached(files, place, progress=True)
    how = "was prepared before" if before else "is prepared"
    skipped = f", {sum(store.manifest['skipped'].values())} skipped" if store.manifest["skipped"] else ""
    console.print(
        f"{one.path} {how} as {one.format}: {store.structures} structures{skipped}, all of them test, in {place}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return str(place)


def _data(one: Asked, place: Path) -> list[Data]:
    name = one.name
    found = label_sets(Store(place), name)
    energies = all(d.store.property_kind(d.label_set) is None for d in found)
    if name is None and one.format in ANYTHING and len(found) == 1 and energies:
        stem = one.path.name.partition(".")[0]
        found = [replace(found[0], name=stem if TASK_NAME.fullmatch(stem) else found[0].name)]
    return [replace(d, source=one.path) for d in found]


def _with_properties(one: Asked, options: dict[str, Any], predicted: Mapping[str, Property]) -> Asked:
    """With the properties that are read from its files, where options do not say them."""
    if one.format is None or "properties" in options or "properties" not in reader(one.format).Options.model_fields:
        return one
    if one.name in predicted:
        return replace(one, properties=(str(predicted[one.name or ""]),))
    everything = one.name is None and "" in predicted
    return replace(one, properties=tuple(str(p) for name, p in predicted.items() if name)) if everything else one


def _refuse_options(asked: Sequence[Asked], options: dict[str, Any]) -> None:
    """ValueError for an option that no format of the files knows; each file is given those that its format knows."""
    formats = {one.format for one in asked if one.format is not None}
    for key in options:
        if not any(key in reader(format).Options.model_fields for format in formats):
            known = "; ".join(f"{f} has {', '.join(reader(f).Options.model_fields) or 'none'}" for f in sorted(formats))
            raise ValueError(f"--option {key}: {known or 'options say how files are read, and only stores are given'}")


def distinct(data: list[Data]) -> list[Data]:
    """The datasets, if each has a name of its own. ValueError for two of one name: they would have one row."""
    for k, one in enumerate(data):
        for other in data[:k]:
            if one.name == other.name:
                raise ValueError(
                    f"--data: {other.path} and {one.path} are both called {one.name!r}; say NAME={one.path} for one"
                )
    return data
