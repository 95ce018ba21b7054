"""Graphs: reverse edges and triplets against loops, and a function of edges in tiles against one over all edges."""

import pytest
import torch

from multifid.graphs import edges as over
from multifid.graphs.edges import in_tiles, over_edges
from multifid.graphs.graph import GraphNeeds, completed, graph_of
from multifid.graphs.padding import pad
from multifid.model.suite.samples import CUTOFF, assert_close, batch_of, mixed, skewed, system


def test_reverse_edges_and_triplets_are_those_of_loops():
    """Molecules, crystals with self-images, an atom alone."""
    batch = completed(batch_of(*mixed(), system(2, skewed(2.2)), system(1)), GraphNeeds(reverse=True, triplets=True))
    rows = [(i, j, *s) for (i, j), s in zip(batch.edges.T.tolist(), batch.shifts.long().tolist(), strict=True)]
    number = {row: e for e, row in enumerate(rows)}
    back = [number[j, i, -a, -b, -c] for i, j, a, b, c in rows]
    assert batch.reverse.tolist() == back
    into = {i: [e for e, row in enumerate(rows) if row[0] == i] for i in range(len(batch.numbers))}
    assert batch.triplets.T.tolist() == [[f, e] for e, row in enumerate(rows) for f in into[row[1]] if f != back[e]]
    vectors = graph_of(batch).vectors
    assert_close(vectors[batch.reverse], -vectors)


def test_padding_leaves_reverse_edges_and_triplets_of_real_edges_alone():
    needs = GraphNeeds(reverse=True, triplets=True)
    batch = completed(batch_of(*mixed()), needs)
    padded = pad(batch, CUTOFF)
    edges = batch.edges.shape[1]
    assert padded.edges.shape[1] > edges and padded.triplets.shape[1] > batch.triplets.shape[1]
    assert padded.reverse[:edges].tolist() == batch.reverse.tolist()
    real = padded.triplets[:, (padded.triplets < edges).all(dim=0)]
    assert real.tolist() == batch.triplets.tolist()


def edge_function(a, c, u, f, weight, bias):
    m = torch.tanh(a * c + torch.nn.functional.linear(f, weight, bias))
    return u * m, m[:, :2]


def plain(a, c, u, f, weight, bias, i, j):
    m, phi = edge_function(a[i], c[j], u, f, weight, bias)
    return torch.zeros_like(a).index_add(0, i, m), phi


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("tile", [5, 100000])
def test_a_function_of_edges_in_tiles_is_the_function(tile, twice, monkeypatch):
    """Values, first and second derivatives, with respect to all that it depends on."""
    monkeypatch.setattr(over, "TILE_EDGES", tile)
    monkeypatch.setattr(over, "TILE_VALUES", 0)
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(0, 6, (40,), generator=generator).sort().values
    j = torch.randint(0, 6, (40,), generator=generator)
    shapes = [(6, 4), (6, 4), (40, 1), (40, 3), (4, 3), (4,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    tensors[2].requires_grad_(twice)  # the envelope: depends on positions, or on nothing that is differentiated
    wanted = [x for x in tensors if x.requires_grad]

    def ours(a, c, u, f, weight, bias, i, j):
        return over_edges(
            edge_function, i, j, 6, u,
            width=4, receivers=[a], senders=[c], edges=[f], weights=[weight, bias], summed=(True, False),
        )  # fmt: skip

    derivatives = []
    for form in (ours, plain):
        out = form(*tensors, i, j)
        loss = sum((x**3).sum() for x in out)
        first = torch.autograd.grad(loss, wanted, create_graph=twice)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), wanted) if twice else ()
        derivatives.append([*out, *first, *second])
    for a, b in zip(*derivatives, strict=True):
        assert_close(a, b, 1e-12)
    with in_tiles(False):
        for a, b in zip(ours(*tensors, i, j), derivatives[1], strict=False):
            assert_close(a, b, 1e-12)
    nothing = [x[:0] if len(x) == 40 else x for x in tensors]
    assert [x.shape for x in ours(*nothing, i[:0], j[:0])] == [(6, 4), (0, 2)]
