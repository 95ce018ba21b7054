"""Layers with copied weights give the numbers of a public implementation, on a molecule whose envelopes are one.

The numbers were made once, by tests/reference/make_torch_geometric.py, with PyTorch Geometric. A layer gets its
envelopes as an argument, so that they may be one. Of smooth activations the published kinks take the place.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import leaky_relu, relu

from multifid.graphs.graph import graph_of
from multifid.model.encoders import cgcnn, gat, gin, mfc, pna, pna_plus, sage, schnet
from multifid.model.layers import TYPICAL_NEIGHBORS, RadialBasis
from multifid.model.suite.samples import assert_close, batch_of

NUMBERS = np.load(Path(__file__).with_name("reference") / "torch_geometric.npz")
HIDDEN, RADIAL, GAUSSIANS, FILTERS, HEADS, CUTOFF = 6, 5, 16, 8, 2, 5.0
SCALERS = ["identity", "amplification", "attenuation", "linear", "inverse_linear"]


class Published:
    """Weights of one case, in the names of PyTorch Geometric, and the graph that its layer saw."""

    def __init__(self, case: str):
        self.case = case
        self.positions, self.x = (torch.from_numpy(NUMBERS[key]) for key in ("positions", "x"))
        numbers = np.array([6, 6, 8, 1, 1, 1, 1, 1, 1, 2])
        self.graph = graph_of(batch_of((numbers, self.positions.numpy(), None, False, 0, 1), cutoff=self["cutoff"]))

    def __getitem__(self, name: str) -> torch.Tensor:
        value = torch.from_numpy(NUMBERS[f"{self.case}/{name}"])
        return float(value) if name == "cutoff" else value

    def assert_is(self, layer, *, basis=None):
        """What the layer gives, against the published numbers; several tiles of edges."""
        graph, d = self.graph, self.graph.distances
        assert torch.bincount(graph.receivers, minlength=10)[9] == 0, "one atom has no neighbours"
        if basis is None:
            basis = RadialBasis(RADIAL, CUTOFF)
            basis.waves = torch.arange(1, RADIAL + 1, dtype=torch.float64) * torch.pi  # not rounded to float32
        found = layer.convolved(self.x, graph.receivers, graph.senders, basis(d), torch.ones_like(d)[:, None])
        assert_close(found, self["out"], 1e-12)


def copy(into, weight, bias=None):
    with torch.no_grad():
        into.weight.copy_(weight)
        if bias is not None:
            into.bias.copy_(bias)


def split(weight):
    """A map of (h_i, h_j, edge) as its three parts."""
    return weight[:, :HIDDEN], weight[:, HIDDEN : 2 * HIDDEN], weight[:, 2 * HIDDEN :]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr("multifid.graphs.edges.TILE_EDGES", 7)
    monkeypatch.setattr("multifid.graphs.edges.TILE_VALUES", 7)


def test_schnet():
    published, layer = Published("schnet"), schnet.SchNetLayer(HIDDEN, FILTERS, GAUSSIANS).double()
    copy(layer.basis, published["mlp.0.weight"], published["mlp.0.bias"])
    copy(layer.filter, published["mlp.2.weight"], published["mlp.2.bias"])
    copy(layer.sender, published["conv.lin1.weight"])
    copy(layer.first, published["conv.lin2.weight"] * TYPICAL_NEIGHBORS, published["conv.lin2.bias"])
    copy(layer.last, published["lin.weight"], published["lin.bias"])
    published.assert_is(layer, basis=schnet.Gaussians(GAUSSIANS, CUTOFF).double())


def test_cgcnn():
    published, layer = Published("cgcnn"), cgcnn.CGCNNLayer(HIDDEN, RADIAL).double()
    weight, bias = (torch.cat([published[f"lin_{kind}.{key}"] for kind in "fs"]) for key in ("weight", "bias"))
    receiver, sender, pair = split(weight)
    copy(layer.receiver, receiver, bias)
    copy(layer.sender, sender)
    copy(layer.pair, pair)
    of_sum = layer.convolved
    layer.convolved = lambda x, *edges: x + of_sum(x, *edges)  # the published layer has h_i itself too
    published.assert_is(layer)


def test_gat(monkeypatch):
    monkeypatch.setattr(gat, "leaky", lambda x: leaky_relu(x, gat.SLOPE))
    published, layer = Published("gat"), gat.GATLayer(HIDDEN, HEADS, RADIAL).double()
    for mine, theirs in ((layer.left, "lin_l"), (layer.right, "lin_r")):
        copy(mine, published[f"{theirs}.weight"], published[f"{theirs}.bias"])
    copy(layer.pair, published["lin_edge.weight"])
    copy(layer.attention, published["att"][0])
    convolved = layer.convolved
    layer.convolved = lambda *inputs: convolved(*inputs) + published["bias"]  # which `out` has here
    published.assert_is(layer)


def test_gin(monkeypatch):
    monkeypatch.setattr(gin, "silu", relu)
    published, layer = Published("gin"), gin.GINLayer(HIDDEN, RADIAL).double()
    copy(layer.pair, published["lin.weight"], published["lin.bias"])
    assert published["eps"] == TYPICAL_NEIGHBORS - 1
    copy(layer.phi.linears()[0], published["nn.0.weight"] * TYPICAL_NEIGHBORS, published["nn.0.bias"])
    copy(layer.phi.linears()[1], published["nn.2.weight"], published["nn.2.bias"])
    published.assert_is(layer)


def test_sage():
    published, layer = Published("sage"), sage.SAGELayer(HIDDEN, RADIAL).double()
    copy(layer.filter, torch.zeros(HIDDEN, RADIAL), torch.ones(HIDDEN))
    copy(layer.others, published["lin_l.weight"])
    copy(layer.own, published["lin_r.weight"], published["lin_l.bias"])
    published.assert_is(layer)


def test_mfc():
    published, layer = Published("mfc"), mfc.MFCLayer(HIDDEN, RADIAL, max_degree=3, step=1).double()
    assert torch.bincount(published.graph.receivers).max() == 4, "an atom has more neighbours than have weights"
    copy(layer.filter, torch.zeros(HIDDEN, RADIAL), torch.full((HIDDEN,), TYPICAL_NEIGHBORS))
    copy(layer.own, torch.cat([published[f"lins_r.{k}.weight"] for k in range(4)]))
    weight, bias = (torch.cat([published[f"lins_l.{k}.{key}"] for k in range(4)]) for key in ("weight", "bias"))
    copy(layer.others, weight, bias)
    published.assert_is(layer)


@pytest.mark.parametrize("case", ["pna mean std", "pna max", "pna min", "pna_plus mean std"])
def test_pna(monkeypatch, case):
    """Of the sharp minimum and maximum, messages that all have one sign: there the zero is not among them."""
    monkeypatch.setattr(pna, "ROUND", 0.0)
    monkeypatch.setattr(pna_plus, "silu", relu)
    name, *aggregators = case.split()
    published, module = Published(case), {"pna": pna.PNA, "pna_plus": pna_plus.PNAPlus}[name]
    config = module.Config(
        hidden=HIDDEN, radial=RADIAL, aggregators=aggregators, scalers=SCALERS, sharpness=1e5, layers=1
    )
    (layer,) = module(config, CUTOFF).double().layers
    receiver, sender, pair = split(published["pre_nns.0.0.weight"])
    bias = published["pre_nns.0.0.bias"]
    if name == "pna":  # the edge's own map comes first there
        bias = bias + pair @ published["edge_encoder.bias"]
        pair = pair @ published["edge_encoder.weight"]
    else:
        copy(layer.basis, published["rbf_emb.0.weight"], published["rbf_emb.0.bias"])
        copy(layer.filter, published["rbf_lin.weight"], torch.zeros(HIDDEN))
    copy(layer.receiver, receiver, bias)
    copy(layer.sender, sender)
    copy(layer.pair, pair)
    last = published["lin.weight"]  # two maps in a row there
    copy(
        layer.all,
        last @ published["post_nns.0.0.weight"],
        last @ published["post_nns.0.0.bias"] + published["lin.bias"],
    )
    published.assert_is(layer)
