"""Walks come back as often as in the endless crystal, which is written out here as a matrix of all its atoms nearby."""

import itertools

import numpy as np
import pytest
import torch

from multifid.graphs.graph import GraphNeeds, completed, graph_of
from multifid.model.encoders import build_encoder
from multifid.model.potential import ModelConfig
from multifid.model.suite.samples import CUTOFF, assert_close, batch_of, skewed, system
from multifid.model.walks import returns


def found_for(*systems):
    return returns(graph_of(completed(batch_of(*systems), GraphNeeds(triplets=True))), 3, CUTOFF)


def expected_of(one):
    """Diagonals of P^2 and P^3, P over all atoms within two cutoffs of the cell: their neighbours are whole."""
    reach = 0 if one.cell is None else int(np.ceil(3 * CUTOFF / np.linalg.svd(one.cell)[1].min()))
    images = np.array(sorted(itertools.product(range(-reach, reach + 1), repeat=3), key=lambda s: np.abs(s).max()))
    cell = np.zeros((3, 3)) if one.cell is None else one.cell
    everyone = (one.positions[None] + (images @ cell)[:, None]).reshape(-1, 3)  # those of the cell first
    near = np.linalg.norm(everyone[:, None] - one.positions, axis=2).min(axis=1) < 2.01 * CUTOFF
    everyone = everyone[near]
    x = np.linalg.norm(everyone[:, None] - everyone, axis=2) / CUTOFF
    u = np.where(x < 1, 1 - 28 * x**6 + 48 * x**7 - 21 * x**8, 0.0)
    np.fill_diagonal(u, 0.0)
    n = u.sum(axis=1)
    p = u / (n + np.maximum(0, 1 - n) ** 3)[:, None]
    two, home = p @ p, len(one.positions)
    return torch.from_numpy(np.stack([np.diag(two), np.einsum("ij,ji->i", two, p)], axis=1)[:home])


SYSTEMS = {
    "molecule": system(7),
    "sparse": system(9, spread=9.0),
    "small cell": system(2, skewed(3.0)),
    "one atom": system(1, skewed(2.6)),
    "larger cell": system(4, skewed(5.0, seed=1)),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_walks_come_back_as_often_as_in_the_endless_crystal(name):
    found, expected = found_for(SYSTEMS[name]), expected_of(SYSTEMS[name])
    assert found.max() > 0.02 and found.min() >= 0 and found.sum(dim=1).max() < 1
    assert_close(found, expected)


def test_an_atom_alone_never_comes_back_and_a_pair_always_does_where_its_envelope_is_one():
    alone, pair = system(1), system(2, spread=1.0)._replace(positions=np.array([[0, 0, 0], [0, 0, 0.2]]))
    found = found_for(alone, pair, system(3, spread=90.0))
    assert_close(found[0], 0 * found[0])
    assert_close(found[1:3], torch.tensor([[1.0, 0.0]] * 2), 1e-5)
    assert_close(found[3:], 0 * found[3:])


def test_triplets_are_asked_for_where_walks_have_three_steps_only():
    for steps, asked in ((0, False), (2, False), (3, True)):
        keys = {"name": "gin", "layers": 2, "hidden": 8, "attention": {"heads": 2, "walks": steps}}
        assert build_encoder(ModelConfig(encoder=keys).encoder, CUTOFF).needs.triplets == asked
    with pytest.raises(ValueError, match="Input should be 0, 2 or 3"):
        ModelConfig(encoder=keys | {"attention": {"walks": 4}})
