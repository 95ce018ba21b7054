"""Bytes at the fullest moment of a step, from what lives at every moment of a few small ones.

At one moment (an operation, or a loop over tiles) the bytes that live are linear in the numbers of tasks, atoms,
labelled atoms, edges and triplets of the batch; and, within a loop, in the rows of a tile:

    live = a . (1, tasks, atoms, labelled, edges, triplets)                  outside of loops, and in one of one tile
    live = the same without what it runs over, x  +  b x + c tile + d        in a loop of several tiles

Loops run over edges or over triplets. d is what is left of the tile before, beside what goes by its rows. The step
needs the largest of all. Which one it is differs between small and large batches, so none is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from multifid.model.counting import Moment

EDGES, TRIPLETS = 4, 5  # their places in a size


@dataclass(frozen=True)
class Moments:
    """The linear functions of all moments."""

    whole: np.ndarray  # (M, 6), where a loop has one tile
    tiled: np.ndarray  # (M, 3): d, b and c where it has several
    most: np.ndarray  # (M,) rows of a tile, at most; infinite outside of loops
    over: np.ndarray  # (M,) place in a size of what a loop runs over

    def at(self, size: np.ndarray) -> np.ndarray:
        """Bytes that live at each of them, (M,), with a batch of a size (6,)."""
        x = size[self.over]
        pieces = np.maximum(np.ceil(x / self.most), 1.0)
        d, b, c = self.tiled.T
        in_tiles = _others(self.whole, self.over) @ size + d + b * x + c * x / pieces
        return np.where(pieces > 1, in_tiles, self.whole @ size)

    def fullest(self, size: np.ndarray) -> float:
        """Bytes that live at the fullest one, with a batch of a size (6,)."""
        return float(self.at(size).max())

    def each(self, size: np.ndarray) -> np.ndarray:
        """Bytes for one more of everything at the moment that is the fullest for a size, (6,)."""
        at = int(self.at(size).argmax())
        row, over = self.whole[at].copy(), self.over[at]
        if size[over] > self.most[at]:
            row[over] = self.tiled[at, 1]
        return row


def _others(whole: np.ndarray, over: np.ndarray) -> np.ndarray:
    """The coefficients of all but what the loops run over, (M, 6)."""
    return np.where(np.arange(6) == over[:, None], 0.0, whole)


@dataclass(frozen=True)
class Trial:
    """A batch that was counted: its size (6,), the tiles of its loops, and its moments."""

    size: np.ndarray
    tiles: int
    moments: Sequence[Moment]


def solved(trials: Sequence[Trial]) -> Moments:
    """From as many trials with one tile as numbers of a size matter, and three with more of them, or none."""
    one, more = [t for t in trials if t.tiles == 1], [t for t in trials if t.tiles > 1]
    live = np.stack([_of_moments(t.moments, one[0].moments) for t in [*one, *more]])  # (trials, M)
    rows, known = np.zeros((live.shape[1], 6)), len(one)
    rows[:, :known] = np.linalg.solve(np.stack([t.size[:known] for t in one]), live[:known]).T
    first = one[0]
    over = np.array([TRIPLETS if 0 < m.rows == first.size[TRIPLETS] else EDGES for m in first.moments])
    if not more:
        return Moments(rows, np.zeros((len(rows), 3)), np.full(len(rows), np.inf), over)
    sizes, tiles = np.stack([t.size for t in more]), np.array([t.tiles for t in more])
    x = sizes[:, over].T  # (M, 3)
    equations = np.stack([np.ones_like(x), x, x / tiles], axis=2)
    of_loops = live[known:].T - _others(rows, over) @ sizes.T
    tiled = np.linalg.solve(equations, of_loops[:, :, None])[:, :, 0]
    return Moments(rows, tiled, np.array([m.tile for m in first.moments]), over)


def _of_moments(trial: Sequence[Moment], first: Sequence[Moment]) -> np.ndarray:
    """Bytes that live in a trial at the moments of the first one, (M,).

    Each of several tasks has a head: the moments are the same only at the beginning and at the end. Those in between
    have the bytes of the first trial, and as many more as there are at the fullest of them.
    """
    live, known = (np.array([m.live for m in of], dtype=float) for of in (trial, first))
    alike = [a.name == b.name for a, b in zip(trial, first, strict=False)]
    if len(trial) == len(first) and all(alike):
        return live
    shorter = min(len(trial), len(first))
    begin = next((k for k, same in enumerate(alike) if not same), shorter)
    end = next((k for k in range(shorter - begin) if trial[-1 - k].name != first[-1 - k].name), shorter - begin)
    places = [(max(begin - 1, 0), len(of) - max(end - 1, 0)) for of in (trial, first)]
    fullest, before = (of[a:b].max() for of, (a, b) in zip((live, known), places, strict=True))
    between = known[begin : len(first) - end] + fullest - before
    return np.concatenate([live[:begin], between, live[len(trial) - end :]])
