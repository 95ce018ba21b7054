"""What is trained on in one place and tested on in another: duplicates that cross the border between splits.

Structures of one material or formula share a split within a store, but nothing keeps a molecule of one source from
being a test structure there and a training structure in another source; the encoder, which both train, then has seen
it. `leaks` counts such structures. Stores are never edited: `set_aside` moves them to the split `unused` while a store
is being prepared.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from multifid.quality.duplicates import Fingerprints, Same, fingerprints, repeats
from multifid.store.store import Store
from multifid.structures.structure import TEST, TRAIN, UNUSED, VALIDATION, Packed

CHUNK = 4096  # structures read at once
MOST_STORES = 64  # that one number has a bit for


@dataclass(slots=True)
class Leaks:
    """repeats: for each store, its structures that are the same as one before them in it. leaks: (a, b) -> how many
    validation and test structures of store a are in the train split of store b; (a, a) within one store."""

    repeats: list[int] = field(default_factory=list)
    leaks: dict[tuple[int, int], int] = field(default_factory=dict)


def leaks(stores: Sequence[Store]) -> Leaks:
    """Read the positions of all stores once, and compare."""
    if len(stores) > MOST_STORES:
        raise ValueError(f"at most {MOST_STORES} stores can be compared at once, not {len(stores)}")
    starts = np.cumsum([0, *(store.structures for store in stores)])
    splits = [store.field("split") for store in stores]
    trained = np.zeros(starts[-1], np.uint64)  # bit b: it occurs in the train split of store b
    with Fingerprints() as found:
        for store in stores:
            for packed in chunks(store):
                found.add(fingerprints(packed))
        repeated = np.zeros(found.count, bool)
        for same in found.same():
            owner = np.searchsorted(starts, same.places, side="right") - 1
            split = _split_of(same.places, owner, starts, splits)
            bits = np.where(split == TRAIN, np.uint64(1) << owner.astype(np.uint64), np.uint64(0))
            if len(bits):
                trained[same.places] |= np.repeat(np.bitwise_or.reduceat(bits, same.starts), same.sizes)
            repeated[same.places] |= _seen_before(same, owner)
    out = Leaks()
    for a, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        out.repeats.append(int(repeated[start:stop].sum()))
        tested = np.isin(splits[a], (VALIDATION, TEST))
        for b in range(len(stores)):
            if count := int((tested & (trained[start:stop] >> np.uint64(b) & np.uint64(1)).astype(bool)).sum()):
                out.leaks[a, b] = count
    return out


def chunks(store: Store) -> Iterable[Packed]:
    """The geometries of a store, in order."""
    for start in range(0, store.structures, CHUNK):
        yield store.read(np.arange(start, min(start + CHUNK, store.structures)), tasks=())


def set_aside(split: np.ndarray, own: Iterable[Packed], within: bool, others: Sequence[Store]) -> int:
    """Move structures to `unused`, in place, and say how many.

    within: those that are the same as one before them. others: those that are trained on here and validated or tested
    on in another store, or the other way round.
    """
    before = int((split == UNUSED).sum())
    with Fingerprints() as found:
        for packed in own:
            found.add(fingerprints(packed))
        if within:
            split[repeats(found)] = UNUSED
        count, splits = found.count, [split]
        for store in others:
            splits.append(store.field("split"))
            for packed in chunks(store):
                found.add(fingerprints(packed))
        if others:
            starts = np.cumsum([0, *map(len, splits)])
            assert starts[1] == count
            for same in found.same():
                owner = np.searchsorted(starts, same.places, side="right") - 1
                codes = _split_of(same.places, owner, starts, splits)
                mine = owner == 0
                for ours, theirs in (((TRAIN,), (VALIDATION, TEST)), ((VALIDATION, TEST), (TRAIN,))):
                    bad = same.spread(np.isin(codes, theirs) & ~mine) & np.isin(codes, ours) & mine
                    split[same.places[bad]] = UNUSED
    return int((split == UNUSED).sum()) - before


def _split_of(places: np.ndarray, owner: np.ndarray, starts: np.ndarray, splits: Sequence[np.ndarray]) -> np.ndarray:
    out = np.empty(len(places), np.uint8)
    for k, split in enumerate(splits):
        own = owner == k
        out[own] = split[places[own] - starts[k]]
    return out


def _seen_before(same: Same, owner: np.ndarray) -> np.ndarray:
    """(rows,) bool: whether the same group holds an earlier structure of the same store. Places ascend in a group."""
    group = np.repeat(np.arange(len(same.starts)), same.sizes)
    seen = np.zeros(len(owner), bool)
    seen[1:] = (group[1:] == group[:-1]) & (owner[1:] == owner[:-1])
    return seen
