"""Structures that stand for many: farthest-point sampling in the space of an encoder's features.

Each structure is the mean of its atoms' features. The first one chosen is farthest from the mean of all; each next one
is farthest from those that are chosen (Gonzalez 1985). Memory grows with the number of candidates times the width of
the features, and no structure is held.
"""

import numpy as np

from multifid.feed.loader import cut
from multifid.model.pieces import EDGES, batch_of
from multifid.model.predictor import Predictor
from multifid.store.store import Store

CANDIDATES = 50_000  # of a larger split so many are looked at, spread evenly


def pooled_features(model: Predictor, store: Store, indices: np.ndarray, task: str) -> np.ndarray:
    """The mean of the encoder's features over the atoms of each structure, (n, width) float32, batch by batch."""
    found = []
    costs = store.rows("natoms", indices).astype(float) * 50.0  # edges, roughly: a bound for memory
    for piece in cut(costs, EDGES):
        packed = store.read(indices[piece], [])
        batch = batch_of(packed, model.cutoff, task)
        for answer in model.answer(packed, batch, task, stress=False, features=True):
            features = answer[4]
            assert features is not None, "asked for"
            found.append(features.mean(axis=0).astype(np.float32))
    return np.stack(found)


def farthest(points: np.ndarray, count: int) -> np.ndarray:
    """The indices of `count` of the points (n, width), in the order of the choice; all if there are fewer.

    Equal distances are decided by the order of the points.
    """
    points = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    nearest = (points**2).sum(axis=1)
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        chosen.append(int(nearest.argmax()))
        away = ((points - points[chosen[-1]]) ** 2).sum(axis=1)
        nearest = away if len(chosen) == 1 else np.minimum(nearest, away)
        nearest[chosen] = -1.0
    return np.array(chosen, np.int64)


def candidates(store: Store, split: str, most: int = CANDIDATES) -> np.ndarray:
    """The structures of a split, or `most` of them, spread evenly."""
    size = store.size(split)
    places = np.unique(np.linspace(0, size - 1, most).astype(np.int64)) if size > most else slice(None)
    return store.pick(split, places)
