"""Reductions over neighbours that do not jump when one comes or leaves.

Published layers count neighbours, take means and maxima of them, and weigh them by a softmax: all of these jump when a
neighbour crosses the cutoff, and a maximum has a kink wherever two of them are equal, as in every crystal. Here each
neighbour counts as much as its envelope u_ij says, from 1 to 0:

    degree     D_i = sum_j u_ij,     n_i = D_i + max(0, 1 - D_i)^3
    mean       sum_j u_ij x_ij / n_i
    softmax    u_ij exp(e_ij) / (exp(e_ii) + sum_k u_ik exp(e_ik))

n is the degree where that is at least one, and 1 where an atom is alone; in between the missing part of the only
neighbour is filled up by one of value zero. In a softmax the atom itself takes part, so that nothing is divided by
zero. Where all envelopes are one these are the published numbers, those of an atom without neighbours included.
"""

from torch import Tensor

from multifid.model.layers import sum_over


def degree(u: Tensor, i: Tensor, atoms: int) -> Tensor:
    """n of each atom: envelopes u (E, 1), receivers i (E,) -> (N, 1), never below 0.6."""
    d = sum_over(u, i, atoms)
    return d + (1.0 - d).clamp(min=0.0) ** 3


def mean_over(values: Tensor, u: Tensor, i: Tensor, atoms: int) -> Tensor:
    """The mean over neighbours of values (E, ...) that already carry the envelope u (E, 1): (N, ...)."""
    total = sum_over(values, i, atoms)
    return total / degree(u, i, atoms).view(-1, *[1] * (total.dim() - 1))
