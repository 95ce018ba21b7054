"""How the tasks' gradients on the encoder stand to each other: their inner products, G_tu = <g_t, g_u>.

g_t is the gradient of w_t L_t, task t's part of the objective of a whole step. Norms, cosines and shares follow from
G, and so do the coefficients of every method that combines gradients of tasks (`directions.py`). No rank ever holds
the gradients of all tasks. The encoder is taken in chunks of whole parameters, the same on all ranks:

    for each chunk    every rank: one backward pass for each of its tasks, no further down than the chunk
                      an exchange: of each chunk, rank r of R gets its R-th part, of all tasks, from who has them
                      every rank: inner products of its part, in float64
    after the last    one sum over ranks, of tasks x tasks numbers

So a rank holds its own tasks' gradients on one chunk, and as much that came from others. A chunk is as large as `held`
bytes allow; more chunks are more passes. `parameter.grad`, weights and generators of random numbers are left alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multifid.graphs.batch import Batch
from multifid.parallel.gradients import BUCKET_BYTES
from multifid.training.loss import loss_sums, task_objectives
from multifid.training.step import Trainer

Chunk = list[nn.Parameter]


def tasks_of_ranks(tasks: Sequence[str], placement: Mapping[str, Sequence[int]], ranks: int) -> list[list[int]]:
    """The numbers of the tasks that each rank may process structures of."""
    return [[k for k, task in enumerate(tasks) if rank in placement[task]] for rank in range(ranks)]


@dataclass
class TaskGradients:
    """Measures the inner products of the tasks' gradients on the encoder. The same on all ranks.

    of_ranks: as by `tasks_of_ranks`. held: bytes that gradients of tasks may take on a rank, and as many again what
    others send; one parameter is never divided, so it may be more.
    """

    trainer: Trainer
    of_ranks: list[list[int]]
    held: int = BUCKET_BYTES

    def __post_init__(self) -> None:
        parameters = [p for p in self.trainer.potential.encoder.parameters() if p.requires_grad]
        self.chunks = chunks_of(parameters, self.held // max(1, *map(len, self.of_ranks)))

    @property
    def whole(self) -> int:
        """Bytes of one gradient of the encoder."""
        return sum(p.nbytes for chunk in self.chunks for p in chunk)

    @property
    def _own(self) -> list[int]:
        return self.of_ranks[self.trainer.world.rank]

    def products(self, batches: Sequence[Batch], counts: Tensor) -> Tensor:
        """G (tasks, tasks) float64 on the device, the same bits on all ranks; called on all of them.

        batches: this rank's structures of a step, each batch of one store, ready. counts (tasks, 4): labels of the
        whole step, over all ranks.
        """
        number = len(self.trainer.tasks)
        out = torch.zeros(number, number, dtype=torch.float64, device=self.trainer.device)
        random = torch.get_rng_state()
        for chunk in self.chunks:
            part = self._exchanged(self._slopes(batches, counts, chunk))
            out += part @ part.T
        torch.set_rng_state(random)
        return self.trainer.world.sum_(out)

    def _slopes(self, batches: Sequence[Batch], counts: Tensor, chunk: Chunk) -> Tensor:
        """The gradients of this rank's tasks on a chunk, from its own structures: (own tasks, numbers, padded)."""
        ranks, numbers = self.trainer.world.size, sum(p.numel() for p in chunk)
        flat = chunk[0].new_zeros(len(self._own), -(-numbers // ranks) * ranks).detach()
        row = {self.trainer.tasks[k].name: flat[i, :numbers] for i, k in enumerate(self._own)}
        for batch in batches:
            for task, share in objectives_apart(self.trainer, batch, counts):
                slopes = torch.autograd.grad(share, chunk, retain_graph=True, allow_unused=True)
                pieces = row[task].split([p.numel() for p in chunk])
                for piece, slope in zip(pieces, slopes, strict=True):
                    if slope is not None:
                        piece += slope.reshape(-1)
        return flat

    def _exchanged(self, flat: Tensor) -> Tensor:
        """This rank's part of the gradients of all tasks, summed over ranks: (tasks, numbers / ranks) float64."""
        world = self.trainer.world
        own, width = len(flat), flat.shape[1] // world.size
        mine = flat.view(own, world.size, width).transpose(0, 1).reshape(-1, width)  # rank after rank
        come = world.exchange(mine, [own] * world.size, [len(tasks) for tasks in self.of_ranks])
        owner = torch.tensor([k for tasks in self.of_ranks for k in tasks], device=flat.device)
        out = torch.zeros(len(self.trainer.tasks), width, dtype=torch.float64, device=flat.device)
        return out.index_add_(0, owner, come.double())


def chunks_of(parameters: Sequence[nn.Parameter], most: int) -> list[Chunk]:
    """Parameters in their order, in chunks of at most `most` bytes, or of one that is larger."""
    out: list[Chunk] = []
    room = 0
    for parameter in parameters:
        if parameter.nbytes > room:
            out.append([])
            room = most
        out[-1].append(parameter)
        room -= parameter.nbytes
    return out


def objectives_apart(trainer: Trainer, batch: Batch, counts: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each task of a batch with its weighted part of the objective, where that depends on weights. One forward pass."""
    batch, predicted = trainer.predicted(batch)
    assert batch.labels is not None
    sums = loss_sums(trainer.objective, predicted, batch.labels, trainer.terms)
    shares = trainer.weights * task_objectives(sums, counts)
    if shares.requires_grad:
        for task in batch.slices:
            yield task, shares[trainer.number[task]]
