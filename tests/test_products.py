"""The products of MACE here are those of mace-torch: each is a combination of the others, to rounding.

The numbers were made once, by tests/reference/make_mace.py. Couplings differ by a change of basis (which mace-torch and
we each choose), which the weights of the products take in: so the layers can compute the same functions.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from multifid.model.encoders.coupling import products, span
from multifid.model.encoders.tensors import by_degree, harmonics_to

NUMBERS = np.load(Path(__file__).with_name("reference") / "mace.npz")


def components(vectors, weights, highest):
    """Sums over neighbours of weighted harmonics, (S, L)."""
    unit = harmonics_to(highest, torch.from_numpy(vectors))
    parts = [np.ones((*vectors.shape[:2], 1))]
    parts += [np.sqrt(2 * l + 1) * y.numpy() for l, y in enumerate(by_degree(unit, 2), 1)]
    return np.concatenate([(y * weights[..., l, None]).sum(axis=1) for l, y in enumerate(parts)], axis=1)


CASES = [
    pytest.param(*case, marks=pytest.mark.full if case[:2] == (3, 3) else [])
    for case in itertools.product((2, 3), (2, 3), (0, 1, 2))
]


@pytest.mark.parametrize(("highest", "factors", "degree"), CASES)
def test_products_are_combinations_of_those_of_mace_torch_and_the_other_way_round(highest, factors, degree):
    vectors, weights = NUMBERS["vectors"], NUMBERS["weights"]
    a = components(vectors, weights, highest)
    monomials, coefficients = products(factors, highest, degree)
    ours = np.einsum("sn,nkm->skm", a[:, monomials].prod(axis=2), coefficients)
    theirs = NUMBERS[f"{highest} {factors} {degree}"]
    if degree == 2:  # the components of degree 2 stand in another order there
        own = components(vectors[:, :1], np.ones((len(vectors), 1, 3)), 2)[:, span(2)]
        turn = np.linalg.lstsq(NUMBERS["harmonics"], own, rcond=None)[0]
        theirs = theirs @ turn
    one, other = (x.transpose(0, 2, 1).reshape(-1, x.shape[1]) for x in (ours, theirs))
    assert np.linalg.matrix_rank(one, tol=1e-8) == one.shape[1] == np.linalg.matrix_rank(other, tol=1e-8)
    for x, basis in ((one, other), (other, one)):
        left = x - basis @ np.linalg.lstsq(basis, x, rcond=None)[0]
        assert np.abs(left).max() < 1e-12 * np.abs(x).max()
