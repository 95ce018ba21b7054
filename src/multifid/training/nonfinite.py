"""Which structure made a step or a validation not finite: looked for when it has happened, so that no step pays for it.

What a step or a validation holds is a function of its number, so it is made once more and looked at structure by
structure: first the predictions and the losses of all of them; where these are finite, the gradient of each alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from multifid.feed.loader import Piece
from multifid.graphs.batch import Batch
from multifid.parallel.groups import World
from multifid.structures.properties import OF_ATOMS
from multifid.training.checkpoint import newest_first
from multifid.training.feed import Feed
from multifid.training.loss import column_of, loss_rows, loss_sums
from multifid.training.step import Trainer
from multifid.training.tensor_file import TensorFile

Bad = tuple[str, int, str]  # task, place of a structure in the task's slice, what of it is not finite


@dataclass
class NonFinite:
    """What a rank has found: how many structures, and the first of them in words."""

    structures: int = 0
    first: str = ""

    def add(self, piece: Piece, bad: Iterable[Bad]) -> None:
        """Structures of a batch; those that several tasks label count once."""
        seen = set()
        for task, place, what in bad:
            source, indices = next((source, indices) for source, indices in piece if task in source.tasks)
            store, index = source.store, int(indices[place])
            self.first = self.first or (
                f"task {task}: {what} of structure {index} of {store.path} "
                f"({store.source_file(index)}: {store.source_id(index)})"
            )
            seen.add((store.path, index))
        self.structures += len(seen)


def in_step(trainer: Trainer, feed: Feed, world: World, step: int, gradient: bool = False) -> str:
    """What is not finite in a step (counted from 0), in words; with `gradient` also that of each structure alone.

    Empty where every prediction and loss is finite by itself (and every gradient, where that was looked at).
    Called on all ranks, which all get the same. The weights are those of now, and those of the step if no update has
    been made since.
    """
    if _weights_are_not_finite(trainer, world):
        return "the weights of the model"
    told = _told(world, _losses(trainer, feed, feed.pieces_of_step(step), averaged=False))
    alone = trainer.gradients.shards is None and not trainer.padded  # else each pass needs all ranks, or the compiler
    if not told and gradient and alone:
        told = _told(world, _gradients(trainer, feed, feed.pieces_of_step(step)))
    return told


def in_validation(trainer: Trainer, feed: Feed, world: World) -> str:
    """What is not finite in the validation splits, in words. Called on all ranks, which all get the same."""
    if _weights_are_not_finite(trainer, world):
        return "the weights of the model"
    told = _told(world, _losses(trainer, feed, feed.pieces_of_split("validation"), averaged=True))
    return told or "the sum of losses that are finite by themselves"


def what_is_whole(run: Path, world: World) -> str:
    """Which checkpoint to go back to, in a sentence; on rank 0, where errors are raised, and empty elsewhere."""
    if not world.first:
        return ""
    there = newest_first(run)
    for folder in there:
        files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors"))]
        names = ((file, name) for file in files for name in file if name.startswith("weight/"))
        if all(bool(torch.isfinite(file[name]).all()) for file, name in names):
            model = "; so is model.safetensors" if (run / "model.safetensors").exists() else ""
            return f"{folder} is whole{model}."
    return f"No checkpoint in {run} has finite weights." if there else f"There is no checkpoint in {run} yet."


def _weights_are_not_finite(trainer: Trainer, world: World) -> bool:
    here = not all(bool(torch.isfinite(p).all()) for p in trainer.parameters.values())
    return bool(world.group.sum_(torch.tensor(float(here))))


def _told(world: World, found: NonFinite) -> str:
    """The first finding of the first rank that has any, and how many there are; empty where no rank has one."""
    counts = torch.zeros(world.size, dtype=torch.float64)
    counts[world.rank] = found.structures
    told = [int(n) for n in world.group.sum_(counts).tolist()]
    if not any(told):
        return ""
    first = world.share(found.first, next(rank for rank, n in enumerate(told) if n))
    return first if sum(told) == 1 else f"{first}, the first of {sum(told)} structures"


def _losses(trainer: Trainer, feed: Feed, pieces: Iterable[Piece], averaged: bool) -> NonFinite:
    """Structures whose prediction or loss is not finite, of this rank."""
    now: Piece = []
    found = NonFinite()

    def batches() -> Iterator[Batch]:
        nonlocal now
        for piece in pieces:
            now = piece
            yield trainer.ready(feed.batch(piece))

    with trainer.looking(averaged):
        for batch in trainer.in_rounds(batches()):
            found.add(now, sorted(_bad(trainer, batch), key=lambda one: one[1]))
    return found


def _bad(trainer: Trainer, batch: Batch) -> Iterator[Bad]:
    """The same of one batch. Padding has no labels, hence no loss."""
    batch, predicted = trainer.predicted(batch)
    labels = batch.labels
    assert labels is not None
    for kind, loss in loss_rows(trainer.objective, predicted, labels, trainer.terms).items():
        if loss is None:
            continue
        rows_of_kind = labels.rows(kind)
        assert rows_of_kind is not None
        owner, bad = rows_of_kind.owner, ~torch.isfinite(loss)
        for number in owner[bad].unique().tolist():
            task, mine = trainer.tasks[number].name, owner == number
            structures, atoms = batch.slices[task]
            rows = bad[mine].nonzero().flatten()
            places = (
                (batch.structure[atoms][rows] - structures.start).unique() if kind in ("forces", *OF_ATOMS) else rows
            )
            what = column_of(kind)
            known = torch.isfinite(predicted[kind][mine & bad]).all()
            yield from (
                (task, place, f"the loss of the {what}" if known else f"the {what}") for place in places.tolist()
            )


def _gradients(trainer: Trainer, feed: Feed, pieces: Iterable[Piece]) -> NonFinite:
    """Structures whose loss alone has a gradient that is not finite, of this rank."""
    found, parameters = NonFinite(), list(trainer.parameters.values())
    singles = [[(s, i[k : k + 1])] for piece in pieces for s, i in piece for k in range(len(i))]
    for single in singles:
        batch, predicted = trainer.predicted(trainer.ready(feed.batch(single)))
        assert batch.labels is not None
        sums = loss_sums(trainer.objective, predicted, batch.labels, trainer.terms)
        for task in batch.slices:
            loss = sums[trainer.number[task]].sum()
            if loss.requires_grad:
                slopes = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                if not all(bool(torch.isfinite(x).all()) for x in slopes if x is not None):
                    found.add(single, [(task, 0, "the gradient of the loss")])
    return found
