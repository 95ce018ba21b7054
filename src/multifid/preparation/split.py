"""Splits by relatives: structures that say nearly the same (one formula, one material) share a split.

Three rules, the first that speaks decides over a structure:

1. Its file was given for a split (`--train`, `--validation`, `--test`).
2. A split was published with it. Where a publication knows no validation (or test), it is carved out of its train
   split by rule 3, in the same proportion to train as `fractions` says.
3. The remaining structures are divided among the splits that no file was given for: by relatives, in the order of a
   seeded hash, which neither the order of input nor the names of others enter. Fractions count structures. A relative
   that a publication has placed (rule 2) is followed. Where there are fewer relatives than splits to fill, each file is
   cut into contiguous blocks (train first, test last), since neighbouring frames of one trajectory are nearly equal.

Where files were given for train and nothing else is there, the splits that no file was given for are carved out of them
in the same way (`--fractions` says 0 for one that is not wanted).

A split that would be empty is an error, unless its fraction is 0: then only files that are given for it fill it, or a
publication. Where one fraction is 1, published splits do not count either: `--fractions 0,0,1` makes a store that is
only test. `unused` (3) is for validation and test structures with an element that the train split lacks, if there is a
train split. Reference energies and scale are fitted to the train split, or to what `fitted` says where there is none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from multifid.store.fields import NO_SPLIT
from multifid.structures.structure import SPLITS, TEST, TRAIN, UNUSED, VALIDATION

DIVIDED = SPLITS[:3]
BLOCKS = "contiguous blocks of each"


class Sliced(Protocol):
    """An array, or a file that is read by slices."""

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class NothingLeft(ValueError):
    """All structures of a split have elements that the train split lacks."""


@dataclass(frozen=True, slots=True)
class Divided:
    """The split of every structure, and the rule that made it, in words, for the manifest."""

    split: np.ndarray  # (structures,) uint8
    rule: str


def divide(
    relative: np.ndarray,
    published: np.ndarray,
    file: np.ndarray,
    given: list[str | None],
    kind: str,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    within: bool = False,
) -> Divided:
    """Divide structures into train, validation and test.

    relative: (structures,) uint64 hashes. published: (structures,) uint8 codes, 255 = none. file: (structures,) the
    file of each. given: per file, the split it was given for, or None. kind: what makes relatives ("formula").
    within: cut each relative into contiguous blocks, in place of keeping relatives together.
    ValueError where a split would be empty.
    """
    _check_fractions(fractions)
    if max(fractions) == 1.0:
        published = np.full_like(published, NO_SPLIT)
    split = np.full(len(relative), NO_SPLIT, np.uint8)
    rules = []
    by_file = np.array([NO_SPLIT if name is None else SPLITS.index(name) for name in given], np.uint8)[file]
    if (chosen := by_file != NO_SPLIT).any():
        split[chosen] = by_file[chosen]
        rules.append("files: " + ", ".join(sorted({name for name in given if name})))
    if (chosen := (published != NO_SPLIT) & (split == NO_SPLIT)).any():
        split[chosen] = published[chosen]
        rules.append("published")
        _follow(split, relative, chosen)
    filled = {SPLITS.index(name) for name in given if name}
    pool = split == NO_SPLIT
    open_splits = [code for code in range(3) if fractions[code] == 1.0 or (code not in filled and fractions[code])]
    if not pool.any() and (rules[-1:] == ["published"] or TRAIN in filled):
        chosen = split == TRAIN
        missing = [code for code in open_splits if code != TRAIN and not (split == code).any()]
        pool = chosen if missing else pool
        open_splits = [code for code in (TRAIN, *missing) if fractions[code]]
    if pool.any() and open_splits:
        weights = np.array([fractions[code] for code in open_splits])
        codes, how = _divide_pool(relative[pool], file[pool], weights / weights.sum(), seed, within)
        split[pool] = np.array(open_splits, np.uint8)[codes]
        if max(fractions) == 1.0:
            how = f"all {'others ' * bool(rules)}to {DIVIDED[open_splits[0]]}"
        carved = f"{' and '.join(DIVIDED[c] for c in open_splits[1:])} carved out of train " if TRAIN in filled else ""
        rules.append(f"{carved}{how}{f' {kind}' if how in ('by', BLOCKS) else ''}")
    elif pool.any():
        raise ValueError("files are given for train, validation and test: nothing is left for the other inputs")
    for code, name in enumerate(DIVIDED):
        if not (split == code).any() and (fractions[code] or name in given):
            raise ValueError(_empty(name, given))
    return Divided(split, "; ".join(rules))


def appended(
    relative: np.ndarray,
    published: np.ndarray,
    file: np.ndarray,
    given: list[str | None],
    kind: str,
    stored: tuple[np.ndarray, np.ndarray],
    fractions: tuple[float, float, float],
    seed: int,
) -> Divided:
    """Divide structures that are added to a store, whose own keep their splits.

    As `divide`, but relatives of a stored structure go where that is (into train where stored relatives are in several
    splits), and a split may stay empty. Relatives that are new are divided by fractions and seed; where they are fewer
    than the splits, they go into the one with the largest fraction. stored: relatives and splits of what is there.
    """
    _check_fractions(fractions)
    by_file = np.array([NO_SPLIT if name is None else SPLITS.index(name) for name in given], np.uint8)[file]
    rules = ["files: " + ", ".join(sorted({name for name in given if name}))] if (by_file != NO_SPLIT).any() else []
    split = np.where(by_file != NO_SPLIT, by_file, published)
    if ((by_file == NO_SPLIT) & (published != NO_SPLIT)).any():
        rules.append("published")
    there = np.isin(stored[1], (TRAIN, VALIDATION, TEST))
    names, codes = (np.concatenate(both) for both in ((stored[0][there], relative), (stored[1][there], split)))
    left = split == NO_SPLIT
    if left.any() and (codes != NO_SPLIT).any():
        order = np.argsort(codes, kind="stable")  # where relatives are in several splits, the first one counts
        codes = codes[order]
        _follow(codes, names[order], codes != NO_SPLIT)
        split[left] = _spread(codes, order)[there.sum() :][left]
    if (left & (split != NO_SPLIT)).any():
        rules.append(f"with their {kind}")
    if (pool := split == NO_SPLIT).any():
        weights, few = np.array(fractions), len(np.unique(relative[pool])) < np.count_nonzero(fractions)
        open_splits = np.flatnonzero(weights) if not few else np.array([weights.argmax()])
        shares = weights[open_splits] / weights[open_splits].sum()
        parts, how = _divide_pool(relative[pool], file[pool], shares, seed)
        split[pool] = open_splits[parts]
        rules.append(f"all new to {DIVIDED[open_splits[0]]}" if few else f"new {how} {kind}")
    return Divided(split, "; ".join(rules))


def _spread(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Values in an order, back at their places."""
    out = np.empty_like(values)
    out[order] = values
    return out


def folded(
    relative: np.ndarray,
    file: np.ndarray,
    kind: str,
    fold: tuple[int, int],
    fractions: tuple[float, float, float],
    seed: int,
) -> Divided:
    """Cross-validation: of n parts of equal size, by relatives, one is test; the rest is train and validation.

    fold: (k, n), the k-th of n, from 0. The rest is divided as `fractions` says of train and validation. Published
    splits do not count. ValueError for another fold, or where a split would be empty.
    """
    k, n = fold
    _check_fractions(fractions)
    if not (n >= 2 and 0 <= k < n) or not fractions[TRAIN] or not fractions[VALIDATION]:
        raise ValueError(
            f"fold {k} of {n}: there are at least 2, numbered from 0, and train and validation in the rest"
        )
    parts, how = _divide_pool(relative, file, np.full(n, 1.0 / n), seed)
    split = np.full(len(relative), TEST, np.uint8)
    rest = parts != k
    weights = np.array(fractions[:2])
    split[rest] = _divide_pool(relative[rest], file[rest], weights / weights.sum(), seed + 1)[0]
    for code, name in enumerate(DIVIDED):
        if not (split == code).any():
            raise ValueError(f"fold {k} of {n}: the {name} split would be empty: give more structures, or fewer folds")
    return Divided(split, f"fold {k} of {n}, {how}{f' {kind}' if how in ('by', BLOCKS) else ''}")


def fitted(split: np.ndarray) -> tuple[int, np.ndarray]:
    """The split that references, scale and edges are fitted to, and which structures are in it, (structures,) bool.

    The train split; where it is empty, test; where that is empty too, validation.
    """
    for code in (TRAIN, TEST, VALIDATION):
        chosen = split == code
        if chosen.any():
            return code, chosen
    return TRAIN, chosen


def set_unseen_aside(
    split: np.ndarray,
    numbers: Sliced,
    offsets: Sliced,
    elements: Sequence[int],
    chunk: int = 4096,
    elsewhere: Iterable[int] = (),
) -> list[int]:
    """Validation and test structures with an element that the train split lacks become unused, in place.

    numbers (atoms,), offsets (structures + 1,), elements: those that occur. elsewhere: elements of a train split that
    these structures are added to. Returns those that the train split lacks. Without a train split nothing is unseen.
    ValueError where a split is emptied, if there is no other.
    """
    filled, elsewhere = np.bincount(split, minlength=256) > 0, list(elsewhere)
    if not filled[TRAIN] and not elsewhere:
        return []
    trained, present, unseen = np.zeros((3, 256), bool)
    trained[elsewhere] = True
    present[list(elements)] = True
    parts = [slice(a, min(a + chunk, len(split))) for a in range(0, len(split), chunk)]

    def atoms(part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the atoms of a part, and which structure of it each is of."""
        bounds = offsets[part.start : part.stop + 1].astype(np.int64)
        return numbers[int(bounds[0]) : int(bounds[-1])], np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))

    for part in parts:
        z, structure = atoms(part)
        trained[z[(split[part] == TRAIN)[structure]]] = True
        if trained[present].all():  # nearly always soon
            break
    for part in parts if (present & ~trained).any() else ():
        z, structure = atoms(part)
        foreign = np.zeros(len(split[part]), bool)
        foreign[structure[~trained[z]]] = True
        foreign &= split[part] != UNUSED
        unseen[z[foreign[structure] & ~trained[z]]] = True
        split[part][foreign] = UNUSED
    for code, name in enumerate(DIVIDED):
        if filled[code] and not elsewhere and not (split == code).any():
            fractions = "0.9,0.1,0" if code == TEST else "0.9,0,0.1"
            raise NothingLeft(
                f"every {name} structure has an element that the train split lacks: nothing is left of it. Ways out: "
                f"more structures of each element; files with all elements (--train FILE --{name} FILE); "
                f"no {name} split (--fractions with 0 for it, as {fractions})"
            )
    return [int(z) for z in np.flatnonzero(unseen)]


def _follow(split: np.ndarray, relative: np.ndarray, published: np.ndarray) -> None:
    """Structures without a split go where a publication has put their relatives."""
    names, first = np.unique(relative[published], return_index=True)
    codes = split[published][first]
    left = np.flatnonzero(split == NO_SPLIT)
    place = np.minimum(np.searchsorted(names, relative[left]), len(names) - 1)
    known = names[place] == relative[left]
    split[left[known]] = codes[place[known]]


def _divide_pool(
    relative: np.ndarray, file: np.ndarray, fractions: np.ndarray, seed: int, within: bool = False
) -> tuple[np.ndarray, str]:
    """The place of each structure among the splits to fill, and how it was found."""
    names, inverse, sizes = np.unique(relative, return_inverse=True, return_counts=True)
    if len(fractions) == 1:
        return np.zeros(len(relative), np.int64), "the other files"
    if within:
        return _in_blocks(file.astype(np.int64) * len(names) + inverse, fractions), BLOCKS
    if len(names) >= len(fractions):
        return _by_relatives(names, sizes, fractions, seed)[inverse], "by"
    return _in_blocks(file, fractions), "contiguous blocks per file"


def _in_blocks(kind: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """The place of each structure: those of each kind, in their order, cut into contiguous blocks."""
    codes = np.empty(len(kind), np.int64)
    order = np.argsort(kind, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(kind[order])) + 1):
        codes[members] = np.repeat(np.arange(len(fractions)), _counts(len(members), fractions))
    return codes


def _by_relatives(names: np.ndarray, sizes: np.ndarray, fractions: np.ndarray, seed: int) -> np.ndarray:
    """The place of each relative: laid end to end in hash order, cut where the fractions of all structures end.

    Relatives larger than the smallest split should be come first (into train); a split that stays empty takes the
    smallest relative of the one that has most relatives.
    """
    large = sizes > fractions.min() * sizes.sum()
    order = np.lexsort((_mix(names, seed), ~large))
    ends = np.cumsum(sizes[order])
    middles = (ends - sizes[order] / 2) / ends[-1]
    codes = np.empty(len(names), np.int64)
    codes[order] = np.searchsorted(np.cumsum(fractions)[:-1], middles, side="right")
    for empty in range(len(fractions)):
        if (codes == empty).any():
            continue
        richest = np.bincount(codes, minlength=len(fractions)).argmax()
        members = np.flatnonzero(codes == richest)
        codes[members[np.lexsort((_mix(names[members], seed), sizes[members]))[0]]] = empty
    return codes


def _mix(names: np.ndarray, seed: int) -> np.ndarray:
    """A seeded hash of hashes: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = names + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _counts(n: int, fractions: np.ndarray) -> np.ndarray:
    """n cut by fractions into whole numbers, none of them zero where n is large enough."""
    bounds = np.round(np.cumsum(fractions) * n).astype(np.int64)
    counts = np.diff(bounds, prepend=0)
    while n >= len(fractions) and (counts == 0).any():
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1
    return counts


def _check_fractions(fractions: tuple[float, float, float]) -> None:
    if len(fractions) != 3 or not all(f >= 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"fractions must be three numbers (train, validation, test) of at least 0 that add up to 1, not {fractions}"
        )


def _empty(name: str, given: list[str | None]) -> str:
    if name in given:
        return f"the {name} split is empty: the files given for it hold no structure that can be used"
    return (
        f"the {name} split would be empty: give more structures, files for it with --{name}, or 0 in --fractions where "
        "it is to be empty (0,0,1: only a test set)"
    )
