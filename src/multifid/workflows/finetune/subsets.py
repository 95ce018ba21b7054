"""The sizes of a learning curve, and the stores that hold so many structures.

Subsets are nested: of one seed, the structures of a smaller size are among those of a larger one. The validation split
is reduced in the same proportion (to no fewer than five structures): labels that choose the weights are labels too.
"""

from collections.abc import Sequence
from pathlib import Path

from multifid.preparation.cache import Files, cached
from multifid.store.store import Store
from multifid.workflows.finetune.asked import Target

ALL = "all"
LEAST = 5  # structures of the validation split


def sizes_of(asked: Sequence[str | int], store: Store) -> list[int]:
    """The sizes as numbers, ascending. ValueError where one is none, or more than the train split has."""
    most = store.size("train")
    found = [most if str(one).strip() == ALL else _whole(str(one).strip()) for one in asked]
    for size in found:
        if size > most:
            raise ValueError(
                f"--sizes {size}: the train split of {store.path} has {most} structures; say {ALL} for all of them, or "
                "give more data"
            )
    if twice := sorted({size for size in found if found.count(size) > 1}):
        raise ValueError(f"--sizes: {twice[0]} is given twice (the train split has {most} structures)")
    return sorted(found)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ValueError(f"--sizes: {text!r} must be a whole number of at least 2, or {ALL} (as --sizes 20,50,{ALL})")
    return int(text)


def subset_of(target: Target, size: int, seed: int, folder: Path) -> Path:
    """The store of `size` train structures, and of validation in proportion; made in FOLDER where it is not yet."""
    store = target.store
    train, validation = store.size("train"), store.size("validation")
    kept = min(validation, max(LEAST, round(validation * size / train)))
    options = {"train": size, "validation": kept, "test": 0, "seed": seed}
    place = folder / f"{target.name}-{size}-{seed}-{store.content.key[:8]}"
    cached(Files(store.path, "store", options, trust_units=True, keep_splits=True), place)
    return place
