"""A split in batches for the prediction, the same on any number of processes, and the predictions for them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from multifid.evaluation.data import AT_ONCE, Share
from multifid.feed.loader import Source, ahead, collate, cut, edge_costs
from multifid.graphs.batch import Batch
from multifid.model.potential import Prediction
from multifid.model.predictor import Predictor
from multifid.store.store import Store

EDGES = 20_000  # of a batch on a processor: large enough to keep it busy
MEMORY = 1 << 30  # bytes of a batch's features on a processor
PART = 0.25  # of an accelerator's free memory
KEPT = 16  # numbers for each edge, hidden unit and layer that a pass keeps if autograd needs them, at most


def edge_budget(model: Predictor, share: Share) -> int:
    """Edges of a batch, so that what a pass keeps of them stays within the memory."""
    if share.max_edges is not None:
        return share.max_edges
    encoder = model.potential.encoder
    of_edge = KEPT * encoder.degrees[0] * max(encoder.depth, 1) * model.dtype.itemsize
    if model.device.type == "cpu":
        return max(1, min(EDGES, MEMORY // of_edge))
    free, _ = torch.accelerator.get_memory_info(model.device)
    return max(EDGES // 10, min(100 * EDGES, int(PART * free) // of_edge))


def batches_of(
    source: Source, split: str, cutoff: float, edges: int, share: Share
) -> Iterator[tuple[np.ndarray, Batch]]:
    """This process's batches of a split (or "all"), prepared ahead; memory does not grow with the split."""
    first = 0
    for pieces in cut_split(source.store, split, lambda i: edge_costs(source, i, cutoff), edges):
        mine = pieces[(share.rank - first) % share.size :: share.size]
        first += len(pieces)  # goes on where the part before has ended, so that all have nearly as many

        def prepared(k: int, mine: list[np.ndarray] = mine) -> tuple[np.ndarray, Batch]:
            return mine[k], collate([(source, mine[k])], cutoff)

        yield from ahead(prepared, 0, len(mine), share.workers)


def cut_split(
    store: Store, split: str, costs: Callable[[np.ndarray], np.ndarray], most: int
) -> Iterator[list[np.ndarray]]:
    """The structures of a split (or "all") part by part, each cut into batches of about so much cost."""
    size = store.structures if split == "all" else store.size(split)
    for start in range(0, size, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, size))
        index = np.arange(part.start, part.stop) if split == "all" else store.pick(split, part)
        yield [index[piece] for piece in cut(costs(index), most)]


def predictions(
    model: Predictor, source: Source, index: np.ndarray, batch: Batch
) -> Iterator[tuple[np.ndarray, Batch, Prediction]]:
    """A batch and what the model says of it, in eV; in halves where the device has no memory for the whole.

    index: of its structures in the source's store; comes back with the batch, or with each half.
    """
    task, label_set = next(iter(source.tasks.items()))
    stress = model.is_conservative(task) and source.store.manifest["tasks"][label_set]["labels"]["stress"] > 0
    prediction = None
    try:
        prediction = model.aligned(replace(batch, targets={}), task, stress=stress)
    except torch.OutOfMemoryError as error:
        if len(index) == 1:
            where = f"structure {index[0]} of {source.store.path} ({int(batch.natoms[0])} atoms)"
            raise ValueError(f"{model.device} has not enough memory for {where}: try --device cpu") from error
    if prediction is not None:
        yield index, batch, prediction
        return
    for half in (index[: len(index) // 2], index[len(index) // 2 :]):
        yield from predictions(model, source, half, collate([(source, half)], model.cutoff))
