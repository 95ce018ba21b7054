"""`multifid merge` and `multifid subset`: stores from stores, which know their parents."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from multifid.preparation.prepare import prepare
from multifid.store.store import Store


def merge(stores: Sequence[Path], out: Path, workers: int = 1) -> Store | None:
    """One store of the structures of several, one after the other, with the splits that they have there.

    Tasks of one name must be of one level of theory (ValueError) and become one. Relatives of a test structure that are
    trained on in another parent stay where they are: `multifid check` finds them.
    """
    if len(stores) < 2:
        raise ValueError("merge needs two stores or more")
    return prepare("store", stores, out, workers=workers, trust_units=True, keep_splits=True)


def subset(
    store: Path, out: Path, where: Sequence[str] = (), workers: int = 1, sizes: Mapping[str, int] = {}, seed: int = 0
) -> Store | None:
    """A store of the structures that satisfy all conditions (see `readers.stores`). ValueError where none does.

    sizes: split -> at most so many of its structures, drawn by the seed; those of fewer are among those of more.
    """
    if not where and not sizes:
        raise ValueError("subset needs a condition, --where 'atoms <= 50', or a size, --train 100")
    options = {"where": "; ".join(where), **sizes, "seed": seed}
    return prepare("store", [store], out, options=options, workers=workers, trust_units=True, keep_splits=True)
