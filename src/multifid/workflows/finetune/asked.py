"""What a model is fine-tuned to: stores, and files that become stores in a cache."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.evaluation.data import label_sets
from multifid.preparation.cache import Files, cached, place_of
from multifid.readers import reader
from multifid.store.fields import TASK_NAME
from multifid.store.store import Store
from multifid.structures.properties import Property
from multifid.workflows.asked import ANYTHING, parse

Fractions = tuple[float, float, float]
Fold = tuple[int, int]


@dataclass(frozen=True)
class Target:
    """A new task: a label set of a store."""

    name: str
    store: Store
    label_set: str

    @property
    def property(self) -> Property | None:
        """What is learnt in place of energies."""
        about = self.store.manifest["tasks"][self.label_set].get("property")
        return None if about is None else Property.from_manifest(self.name, about)


def targets(
    texts: list[str],
    fractions: Fractions,
    options: dict[str, Any],
    trust_units: bool,
    cache: Path,
    console: Console,
    fold: Fold | None = None,
) -> list[Target]:
    """The new tasks of all `[TASK=][FORMAT:]PATH`; files are prepared first, split by relatives as by `prepare`.

    fold: (k, n), files and stores are divided anew, test being the k-th of n parts. ValueError or OSError as `prepare`,
    or where two tasks have one name.
    """
    found = [t for text in texts for t in _of(text, fractions, options, trust_units, cache, console, fold)]
    names = [target.name for target in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two datasets are called {', '.join(twice)}: say NAME=PATH for one of them")
    return found


def _of(
    text: str,
    fractions: Fractions,
    options: dict[str, Any],
    trust_units: bool,
    cache: Path,
    console: Console,
    fold: Fold | None,
) -> list[Target]:
    one = parse(text, "")
    if one.format is None and fold is not None:
        one, options, trust_units = replace(one, format="store"), {}, True  # as it was accepted when it was prepared
    if one.format is None:
        return [Target(d.name, d.store, d.label_set) for d in label_sets(Store(one.path), one.name)]
    unknown = [key for key in options if key not in reader(one.format).Options.model_fields]
    if unknown:
        known = ", ".join(reader(one.format).Options.model_fields) or "none"
        raise ValueError(f"--option {unknown[0]}: {one.format} has {known}")
    files = Files(one.path, one.format, options, trust_units, fractions, fold=fold)
    place = place_of(files, cache)
    store, before = cached(files, place, progress=not console.quiet)
    sizes = ", ".join(f"{store.size(split)} {split}" for split in ("train", "validation", "test"))
    how = "was prepared before" if before else "is prepared"
    line = f"{one.path} {how} as {one.format}: {sizes}, in {place}"
    console.print(line, soft_wrap=True, highlight=False, markup=False)
    found = [Target(d.name, d.store, d.label_set) for d in label_sets(store, one.name)]
    stem = one.path.name.partition(".")[0]
    if any(target.property is not None for target in found):
        return found
    if one.name is None and one.format in ANYTHING and len(found) == 1 and TASK_NAME.fullmatch(stem):
        found = [replace(found[0], name=stem)]
    return found
