"""Products of real spherical harmonics that turn as harmonics do: Gaunt coefficients, and products of many factors.

Everything is of natural parity: a component of degree l takes the sign (-1)^l under inversion. A product of components
of degrees l1 and l2 then has a part of degree l only where l1 + l2 + l is even, and that part is the one that the
product of the two functions on the sphere has: G[m1, m2, m] = integral of Y_l1m1 Y_l2m2 Y_lm, normalised to one.

Components of degrees 0, 1, ... stand one after the other; harmonics are those of `tensors.py`, of unit vectors times
sqrt(2 l + 1), so that their mean square over the sphere is one.
"""

import math
from functools import cache
from itertools import combinations_with_replacement, product

import numpy as np
import torch

from multifid.model.encoders.tensors import by_degree, harmonics_to

HIGHEST = 3  # degree of harmonics that are known
SAME = 1e-6  # of unit vectors: what is left beside the others, below which a product is one of them


@cache
def gaunt(a: int, b: int, c: int) -> np.ndarray:
    """(2 a + 1, 2 b + 1, 2 c + 1), its squares sum to one; by a quadrature that is exact for these degrees."""
    z, weights = np.polynomial.legendre.leggauss(16)
    angle = np.arange(32) * math.pi / 16
    r = np.sqrt(1 - z**2)[:, None]
    points = np.stack([r * np.cos(angle), r * np.sin(angle), np.broadcast_to(z[:, None], (16, 32))], axis=-1)
    higher = by_degree(harmonics_to(HIGHEST, torch.from_numpy(points)), 2)
    harmonics = [np.ones((16, 32, 1)), *(h.numpy() for h in higher)]
    found = np.einsum("z,zai,zaj,zak->ijk", weights, harmonics[a], harmonics[b], harmonics[c])
    found[np.abs(found) < 1e-10] = 0.0
    return found / np.linalg.norm(found)


def couple(a: int, b: int, c: int) -> bool:
    """Whether a product of degrees a and b has a part of degree c."""
    return abs(a - b) <= c <= a + b and (a + b + c) % 2 == 0


def span(degree: int) -> slice:
    """The components of a degree."""
    return slice(degree**2, (degree + 1) ** 2)


@cache
def products(factors: int, highest: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """The independent products of 2 or 3 equal vectors of components up to degree `highest` that are of one degree.

    Which factors each monomial has, (monomials, factors), and coefficients (monomials, products, 2 degree + 1): two
    factors are coupled first, and the third one to what they give, as far as these are not combinations of others.
    """
    size = (highest + 1) ** 2
    monomials = list(combinations_with_replacement(range(size), factors))
    place = {m: k for k, m in enumerate(monomials)}
    where = np.array([place[tuple(sorted(m))] for m in product(range(size), repeat=factors)])
    kept: list[np.ndarray] = []
    basis: list[np.ndarray] = []
    for tensor in _coupled(factors, highest, degree):
        vector = np.zeros((len(monomials), 2 * degree + 1))
        np.add.at(vector, where, tensor.reshape(-1, 2 * degree + 1))
        if np.linalg.norm(vector) < SAME:
            continue
        vector /= np.linalg.norm(vector)
        rest = vector.ravel() - sum((b * (b @ vector.ravel()) for b in basis), np.zeros(vector.size))
        if np.linalg.norm(rest) > SAME:
            basis.append(rest / np.linalg.norm(rest))
            kept.append(vector)
    return np.array(monomials), np.stack(kept, axis=1)


def _coupled(factors: int, highest: int, degree: int) -> list[np.ndarray]:
    """All products as whole tensors, (size, ..., 2 degree + 1)."""
    size, found = (highest + 1) ** 2, []
    for a, b in combinations_with_replacement(range(highest + 1), 2):
        if factors == 2:
            if couple(a, b, degree):
                found.append(np.zeros((size, size, 2 * degree + 1)))
                found[-1][span(a), span(b)] = gaunt(a, b, degree)
            continue
        for middle, c in product(range(HIGHEST + 1), range(highest + 1)):
            if couple(a, b, middle) and couple(middle, c, degree):
                found.append(np.zeros((size, size, size, 2 * degree + 1)))
                both = np.einsum("ijm,mkn->ijkn", gaunt(a, b, middle), gaunt(middle, c, degree))
                found[-1][span(a), span(b), span(c)] = both
    return found
