"""Which structures a step holds and which rank processes each: arithmetic that every rank does for all ranks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from multifid.feed.loader import Source, edge_costs
from multifid.feed.order import Draw
from multifid.parallel.shares import shares

Placement = Mapping[str, Sequence[int]]  # task -> ranks


class Division(NamedTuple):
    """Structures of all draws, divided among the ranks. Lists are in the order of the draws, maps by their names."""

    chosen: list[np.ndarray]  # (structures,) indices in the store
    costs: dict[str, np.ndarray]  # (structures,) estimated edges
    owners: dict[str, np.ndarray]  # (structures,) ranks


def places_of(draws: Sequence[Draw], step: int) -> list[np.ndarray]:
    """Which places of each train index a step holds."""
    return [draw.order(*draw.places(step)) for draw in draws]


def divide(
    sources: Sequence[Source], draws: Sequence[Draw], placement: Placement, cutoff: float, chosen: list[np.ndarray]
) -> Division:
    """Divide the structures of a step, or some of a split, by their estimated costs."""
    costs = {
        draw.name: edge_costs(source, indices, cutoff)
        for source, draw, indices in zip(sources, draws, chosen, strict=True)
    }
    return Division(chosen, costs, shares(costs, {draw.name: placement[draw.tasks[0]] for draw in draws}))
