"""Reductions over neighbours that do not jump when one comes or leaves.

Published layers count neighbours, divide by their number and weigh them by a softmax: all of these jump when a
neighbour crosses the cutoff. Here each neighbour counts as much as its envelope u_ij says, from 1 to 0:

    degree     D_i = sum_j u_ij,     n_i = D_i + max(0, 1 - D_i)^3
    mean       sum_j u_ij x_ij / n_i
    softmax    u_ij exp(e_ij) / (exp(e_ii) + sum_k u_ik exp(e_ik))

n is the degree where that is at least one, and 1 where an atom is alone; in between the missing part of the only
neighbour is filled up by one of value zero. In a softmax the atom itself takes part, so that nothing is divided by
zero. Where all envelopes are one these are the published numbers, those of an atom without neighbours included.
"""

import torch
from torch import Tensor

from multifid.model.layers import sum_over


def degree(u: Tensor, i: Tensor, atoms: int) -> Tensor:
    """n of each atom: envelopes u (E, 1), receivers i (E,) -> (N, 1), never below 0.6."""
    d = sum_over(u, i, atoms)
    return d + (1.0 - d).clamp(min=0.0) ** 3


def attention(score: Tensor, u: Tensor, i: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the neighbours of an atom and the atom itself, neighbours weighted by their envelopes.

    score (E, K), u (E, 1), receivers i (E,), own score (N, K) -> weights of edges (E, K) and of atoms themselves
    (N, K), which sum to one for each atom.
    """
    shift = largest(score, i, own)
    of_edges = u * torch.exp(score - shift.index_select(0, i))
    of_self = torch.exp(own - shift)
    total = of_self + sum_over(of_edges, i, own.shape[0])
    return of_edges / total.index_select(0, i), of_self / total


def largest(values: Tensor, i: Tensor, at_least: Tensor) -> Tensor:
    """The largest of values (E, K) at each receiver, or `at_least` (N, K); without a derivative."""
    index = i[:, None].expand(values.shape)
    return at_least.detach().scatter_reduce(0, index, values.detach(), "amax")
