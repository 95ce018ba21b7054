"""A pass over one domain of a system that is spread over ranks, exact as if the system were whole.

    rank 0:  own atoms | ghosts        rows of a graph: first what a rank owns, then copies of its neighbours' atoms
    rank 1:  own atoms | ghosts

Only own atoms receive. Before a layer reads what neighbours have learnt, the rows of ghosts are overwritten by their
owners' (forward exchange); in the backward pass their gradients are added to those of the owners (reverse exchange):
so the slope along every edge is that of the total energy, the sum over ranks of what each one's own atoms add.
The width of a domain's rim is one cutoff, whatever the number of layers.

How rows travel is a `Link`: that of LAMMPS on many ranks, or within one process (`WithinProcess`), where the domains
lie in one graph, the atoms of all before the ghosts of all.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from multifid.graphs.batch import Batch, edge_vectors
from multifid.graphs.graph import EDGES_ONLY, Graph, graph_of
from multifid.model.branch import Branch
from multifid.model.contract import Features, Indivisible
from multifid.model.potential import Potential

EXACT = 1e-9  # of float64 features, relative to the largest one: what a system in one piece may differ from its domains


class Link(Protocol):
    """How rows travel between ranks. Both are called by all ranks equally often, in one order."""

    def forward(self, rows: Tensor) -> Tensor:
        """(N, W), contiguous -> the same with the rows of ghosts replaced by their owners'."""

    def reverse(self, rows: Tensor) -> Tensor:
        """(N, W), contiguous -> the rows of ghosts added to their owners', and zero themselves."""


class Exchange:
    """`Graph.exchange` over a link: tensors of atoms travel side by side as one; differentiable once.

    Tensors have a row for each of `atoms`, or for the first ones, which are no ghosts. widths: of the exchanges that
    were made, for those who reserve memory for them.
    """

    def __init__(self, link: Link):
        self.link = link
        self.widths: list[int] = []

    def __call__(self, atoms: int, *of_atoms: Tensor) -> tuple[Tensor, ...]:
        sizes = [math.prod(x.shape[1:]) for x in of_atoms]
        self.widths.append(sum(sizes))
        rows = torch.cat([x.reshape(x.shape[0], n) for x, n in zip(of_atoms, sizes, strict=True)], dim=1)
        parts = _Exchanged.apply(rows, self.link, atoms).split(sizes, dim=1)
        return tuple(y.reshape(atoms, *x.shape[1:]) for x, y in zip(of_atoms, parts, strict=True))


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, link: Link, atoms: int) -> Tensor:
        ctx.link, ctx.given = link, rows.shape[0]
        return link.forward(pad(rows, [0, 0, 0, atoms - rows.shape[0]]).contiguous())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.link.reverse(gradient.contiguous())[: ctx.given], None, None


@dataclass
class WithinProcess:
    """The link of domains that lie in one graph. owner: (N,) int64, the row that each row is a copy of."""

    owner: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.owner)

    def reverse(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows).index_add_(0, self.owner, rows)


@dataclass(slots=True)
class Share:
    """What the own atoms of a domain add to a system, in the task's scaled units."""

    energies: Tensor  # (M,) of each own atom
    slopes: Tensor | None  # (E, 3) of the system's energy along every edge vector; None for direct forces
    forces: Tensor | None  # (M, 3), only where they are predicted directly


def share_of(potential: Potential, task: str, graph: Graph, own: Tensor) -> Share:
    """What the branch of a task says of a domain. own: (M,) int64, the rows whose energies count.

    Conservative forces follow from slopes g of edges r_ij: F_i += g, F_j -= g, virial -sum r_ij (x) g.
    """
    branch = potential.branches[potential.branch_of[task]]
    assert isinstance(branch, Branch)
    if not potential.is_conservative(task):
        with torch.no_grad():
            features = potential.encoder(graph)
            if branch.reads_edges:
                energies, forces = (x.index_select(0, own) for x in branch(features, graph))
            else:
                energies, forces = branch(_rows(features, own))
        return Share(energies, None, forces)
    with torch.enable_grad():
        vectors = graph.vectors.detach().requires_grad_()
        features = potential.encoder(
            replace(graph, vectors=vectors, distances=torch.linalg.vector_norm(vectors, dim=1))
        )
        energies, _ = branch(_rows(features, own))
        (slopes,) = torch.autograd.grad(energies.sum(), [vectors], allow_unused=True, materialize_grads=True)
    return Share(energies.detach(), slopes, None)


def _rows(features: Features, own: Tensor) -> Features:
    return features.with_tensors([x.index_select(0, own) for x in features.tensors()])


def in_domains(batch: Batch, domain: Sequence[int]) -> tuple[Graph, Tensor, Tensor]:
    """One structure cut into domains that lie in one graph, with the exchange between them.

    domain: which one owns each atom. Every periodic image that a domain sees is a ghost of its own; those of all
    domains lie behind the atoms that are no ghosts. Returns the graph, the rows (N,) of the atoms of the structure,
    and for each edge of the graph its number in the batch.
    """
    assert batch.structures == 1, "one structure"
    receivers, senders = batch.edges.tolist()
    images = [tuple(s) for s in batch.shifts.round().to(torch.int64).tolist()]
    vectors, owner, home = edge_vectors(batch), list[int](), [0] * len(domain)
    atoms, edges = list[int](), list[tuple[int, int, int]]()
    for a in sorted(range(len(domain)), key=lambda a: domain[a]):
        home[a] = len(atoms)
        atoms.append(a)
    for d in sorted(set(domain)):
        ghosts: dict[tuple[int, tuple], int] = {}
        for e, (i, j) in enumerate(zip(receivers, senders, strict=True)):
            if domain[i] != d:
                continue
            if domain[j] == d and not any(images[e]):
                edges.append((home[i], home[j], e))
                continue
            if (j, images[e]) not in ghosts:
                ghosts[j, images[e]] = len(atoms)
                atoms.append(j)
            edges.append((home[i], ghosts[j, images[e]], e))
    owner = [home[a] for a in atoms]
    i, j, number = torch.tensor(sorted(edges), dtype=torch.int64).view(-1, 3).unbind(1)
    rows = torch.tensor(atoms, dtype=torch.int64)
    exchange = Exchange(WithinProcess(torch.tensor(owner, dtype=torch.int64)))
    r = vectors[number]
    graph = Graph(
        batch.numbers[rows],
        torch.zeros_like(rows),
        batch.charge,
        batch.spin,
        i,
        j,
        r,
        torch.linalg.vector_norm(r, dim=1),
        exchange=exchange,
        own=len(domain),
    )
    return graph, torch.tensor(home, dtype=torch.int64), number


def widest_exchange(potential: Potential) -> int:
    """Numbers per atom in the widest exchange of a pass. Raises Indivisible where domains would not be exact.

    That is tried, in float64: a chain of atoms in one piece, and in two. So an encoder that does not pass through the
    exchange is found before it answers anything.
    """
    name = potential.config.encoder.name
    if (needs := potential.encoder.needs) != EDGES_ONLY:
        what = "triplets" if needs.triplets else "reverse edges"
        raise Indivisible(f"the encoder {name} reads {what}, which reach over the rims of domains")
    encoder = copy.deepcopy(potential.encoder).to(device="cpu", dtype=torch.float64)
    chain = _chain(potential.config.cutoff)
    graph, home, _ = in_domains(chain, [0, 0, 0, 1, 1, 1])
    with torch.no_grad():
        expected, found = encoder(graph_of(chain)).tensors(), encoder(graph).tensors()
    for x, y in zip(expected, found, strict=True):
        if not (x - y[home]).abs().max() <= EXACT * max(1.0, float(x.abs().max())):  # nor where it is no number
            raise Indivisible(f"the encoder {name} does not pass through the exchange between domains")
    assert isinstance(graph.exchange, Exchange)
    of_scalars = [potential.encoder.degrees[0]]  # heads that read edges exchange these
    return max([*of_scalars, *graph.exchange.widths])


def _chain(cutoff: float) -> Batch:
    """Six atoms, each of which sees its two neighbours on either side."""
    x = torch.arange(6, dtype=torch.float64) * (0.45 * cutoff)
    positions = torch.stack([x, torch.sin(x), torch.cos(2 * x)], dim=1) * torch.tensor([1.0, 0.1, 0.1]).double()
    apart = torch.cdist(positions, positions).fill_diagonal_(torch.inf)
    edges = torch.nonzero(apart < cutoff).t().contiguous()
    one = torch.zeros(1, dtype=torch.int64)
    return Batch(
        numbers=torch.tensor([1, 6, 8, 1, 7, 6]),
        positions=positions,
        cell=torch.zeros((1, 3, 3), dtype=torch.float64),
        charge=one,
        spin=one + 1,
        natoms=one + 6,
        structure=torch.zeros(6, dtype=torch.int64),
        edges=edges,
        shifts=torch.zeros((edges.shape[1], 3), dtype=torch.float64),
    )
