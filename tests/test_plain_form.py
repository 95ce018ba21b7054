"""Encoders as they are computed against their plain published forms: float64, down to second derivatives."""

import copy

import pytest
import torch
from plain import PLAIN, PlainEGNN, PlainLayer, segment_sum

from multifid.graphs import edges as over
from multifid.graphs.graph import graph_of
from multifid.model.contract import Features
from multifid.model.encoders import all_encoders, build_encoder
from multifid.model.kernels.native import build
from multifid.model.layers import TYPICAL_NEIGHBORS, draw_weights, envelope
from multifid.model.suite.samples import (
    CUTOFF,
    TIGHT,
    assert_alike,
    assert_close,
    batch_of,
    loss,
    mixed,
    potential_with,
    system,
)
from test_model import FORCES, every_kind, small


class PlainTensors(PlainEGNN):
    """EGNN with tensors, which are whole matrices here, and every product of two is written out."""

    def __init__(self, encoder):
        super().__init__(encoder)
        self.layers = torch.nn.ModuleList(PlainTensorLayer(layer) for layer in encoder.layers)

    def forward(self, graph):
        h = self.embedding(graph.numbers, graph.charge, graph.spin, graph.structure)
        v = graph.vectors.new_zeros(len(h), self.degrees[1], 3)
        r, d, edges = graph.vectors, graph.distances, (graph.receivers, graph.senders)
        for k, layer in enumerate(self.layers):
            h, v = layer(
                k,
                h,
                v,
                edges,
                r,
                self.basis(d, graph.numbers, graph.receivers, graph.senders),
                envelope(d, self.cutoff),
            )
        return Features(self.norm(h), v)


class PlainTensorLayer(PlainLayer):
    def __init__(self, layer):
        super().__init__(layer)
        if layer.angle is not None:
            weight, bias = torch.cat([self.first.weight, layer.angle.weight], dim=1), self.first.bias
            self.first = torch.nn.Linear(weight.shape[1], len(weight), dtype=weight.dtype)
            with torch.no_grad():
                self.first.weight.copy_(weight)
                self.first.bias.copy_(bias)

    def forward(self, k, h, v, edges, r, b, u):
        (row, col), channels = edges, v.shape[1]
        n = self.norm(h)
        x = r[:, None, :] + v[col] - v[row]
        x2 = torch.sum(x**2, dim=2)
        s = r / torch.sqrt(torch.sum(r**2, dim=1) + 1)[:, None]
        y = s[:, :, None] * s[:, None, :] - torch.sum(s**2, dim=1)[:, None, None] * torch.eye(3, dtype=r.dtype) / 3
        seen = [x2 * self.per_area, b]
        if k > 0:
            seen += [torch.einsum("eck,ek->ec", v[end], r) * self.per_area for end in (row, col)]
        m = torch.nn.functional.silu(self.first(torch.cat([n[row], n[col], *seen], dim=1)))
        m = torch.nn.functional.silu(self.message(m))
        m = torch.sigmoid(self.gate(m)) * m
        phi = u * self.move(m)
        moved = (phi[:, :channels] / torch.sqrt(x2 + 1.0))[:, :, None] * x
        v = v + segment_sum(moved.flatten(1), row, len(h)).view_as(v) / TYPICAL_NEIGHBORS**0.5
        turned = phi[:, channels:, None, None] * y[:, None]
        t = segment_sum(turned.flatten(1), row, len(h)).view(len(h), -1, 3, 3) / TYPICAL_NEIGHBORS**0.5
        m_sum = segment_sum(u * m, row, len(h)) / TYPICAL_NEIGHBORS
        v2, t2 = torch.sum(v**2, dim=2), 1.5 * torch.sum(t**2, dim=(2, 3))
        w, q = v / torch.sqrt(v2 + 1)[:, :, None], t / torch.sqrt(t2 + 1)[:, :, None, None]
        products = [torch.sum(w[:, a] * w[:, b], dim=1) for a in range(channels) for b in range(a + 1, channels)]
        count = t.shape[1]
        products += [1.5 * torch.sum(q[:, a] * q[:, b], (1, 2)) for a in range(count) for b in range(a + 1, count)]
        products += [1.5 * torch.einsum("nk,nkl,nl->n", w[:, c], q[:, a], w[:, c])
                     for a in range(count) for c in range(channels)]  # fmt: skip
        known = [n, m_sum, torch.log1p(v2), torch.log1p(t2), torch.stack(products, dim=1)]
        return h + self.node(torch.cat(known, dim=1)), v


PLAIN_KINDS = {**PLAIN, "egnn with tensors": PlainTensors}


def plain_name(name):
    """The n-th map of an MLP is the 2n-th block of a sequence in the plain form; branches are the same in both."""
    if not name.startswith("encoder"):
        return name
    return name.replace("maps.0.", "0.").replace("maps.1.", "2.")


def gradients(model, batch):
    """Gradients of a loss of energies, forces and stresses, under the names that plain and fast form share."""
    loss(model(batch, stress=True)["a"], batch).backward()
    found = {}
    for name, parameter in model.named_parameters():
        found[plain_name(name)] = parameter.grad
    for k, layer in enumerate(model.encoder.layers):
        if hasattr(layer, "pair"):
            parts = [layer.receiver.weight.grad, layer.sender.weight.grad, layer.pair.weight.grad]
            parts += [] if layer.angle is None else [layer.angle.weight.grad]
            found[f"encoder.layers.{k}.first.weight"] = torch.cat(parts, dim=1)
            found[f"encoder.layers.{k}.first.bias"] = layer.receiver.bias.grad
    return found


@pytest.mark.parametrize("forces", FORCES)
@pytest.mark.parametrize("tile", [5, 1024, "native"])
@pytest.mark.parametrize("encoder", PLAIN_KINDS)
def test_an_encoder_is_its_published_form(encoder, forces, tile, monkeypatch):
    """Widths that are padded (12 to 16), several tiles or one or C++, atoms and structures without edges."""
    if tile == "native" and build.library() is None:
        pytest.skip("no C++ compiler is here")
    if tile != "native":
        monkeypatch.setattr(build, "library", lambda: None)
        monkeypatch.setattr(over, "TILE_EDGES", tile)
        monkeypatch.setattr(over, "TILE_VALUES", tile)
    fast = potential_with(small(encoder), forces).train()
    plain = copy.deepcopy(fast)
    plain.encoder = PLAIN_KINDS[encoder](plain.encoder)
    batch = batch_of(*mixed(), system(2, spread=200.0))
    a, b = (model(batch, stress=True)["a"] for model in (fast, plain))
    assert_alike(a, b)
    ours, published = gradients(fast, batch), gradients(plain, batch)
    assert set(published) <= set(ours) and len(published) > 20
    for name, gradient in published.items():
        assert_close(ours[name], gradient, TIGHT)
        assert gradient.any(), name


@pytest.mark.parametrize("encoder", every_kind)
def test_a_backward_pass_goes_through_the_tiles_of_its_forward_pass(encoder, monkeypatch):
    """Another number of threads, or another model that is counted in between, cuts tiles otherwise."""
    monkeypatch.setattr(build, "library", lambda: None)
    found, whole, batch = [], potential_with(small(encoder), "direct").train(), batch_of(*mixed())
    for later in (8, 32):
        monkeypatch.setattr(over, "TILE_EDGES", 8)
        monkeypatch.setattr(over, "TILE_VALUES", 8)
        model = copy.deepcopy(whole)
        value = loss(model(batch)["a"], batch)
        monkeypatch.setattr(over, "TILE_EDGES", later)
        with over.in_tiles(later == 8):
            value.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize(("name", "part"), [("egnn", 0.5), ("painn", 0.3)])
def test_what_is_kept_for_the_backward_pass_is_little(name, part):
    """Bytes that autograd holds on to while training, where edges outweigh atoms."""
    encoder = build_encoder(all_encoders()[name].Config(layers=2, hidden=64), CUTOFF)
    draw_weights(encoder, torch.Generator().manual_seed(0))
    batch = batch_of(*[system(14, seed=k) for k in range(8)], dtype=torch.float32)

    def kept(model):
        stored = {}

        def pack(x):
            stored[x.untyped_storage().data_ptr()] = x  # held, so that no other tensor gets its address
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(graph_of(batch))
        return sum(x.untyped_storage().nbytes() for x in stored.values())

    assert kept(encoder) < part * kept(PLAIN[name](encoder))
