"""Encoders as they are computed against their plain published forms: float64, down to second derivatives."""

import copy

import pytest
import torch
from plain import PLAIN

from multifid.model.encoder import ENCODERS, EncoderConfig, build_encoder
from multifid.model.encoders import edge_messages
from multifid.model.layers import draw_weights
from test_model import CUTOFF, FORCES, TIGHT, assert_close, batch_of, loss, mixed, model_of, system


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
            found[f"encoder.layers.{k}.first.weight"] = torch.cat(parts, dim=1)
            found[f"encoder.layers.{k}.first.bias"] = layer.receiver.bias.grad
    return found


@pytest.mark.parametrize("forces", FORCES)
@pytest.mark.parametrize("tile", [5, 1024])
@pytest.mark.parametrize("encoder", PLAIN)
def test_an_encoder_is_its_published_form(encoder, forces, tile, monkeypatch):
    """Widths that are padded (12 to 16), several tiles or one, atoms and structures without edges."""
    monkeypatch.setattr(edge_messages, "TILE_EDGES", tile)
    monkeypatch.setattr(edge_messages, "TILE_VALUES", tile)
    fast = model_of(encoder, forces).train()
    plain = copy.deepcopy(fast)
    plain.encoder = PLAIN[encoder](plain.encoder)
    batch = batch_of(*mixed(), system(2, spread=200.0))
    a, b = (model(batch, stress=True)["a"] for model in (fast, plain))
    assert_close(a.energy, b.energy)
    assert_close(a.forces, b.forces)
    assert (a.stress is None) == (forces == "direct")
    if a.stress is not None:
        assert_close(a.stress.nan_to_num(), b.stress.nan_to_num())
    ours, published = gradients(fast, batch), gradients(plain, batch)
    assert set(published) <= set(ours) and len(published) > 20
    for name, gradient in published.items():
        assert_close(ours[name], gradient, TIGHT)
        assert gradient.any(), name


@pytest.mark.parametrize("forces", FORCES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_recomputed_activations_give_the_same_gradients(encoder, forces):
    batch = batch_of(*mixed())
    kept, again = (model_of(encoder, forces).train() for _ in range(2))
    again.encoder.recompute = True
    for model in (kept, again):
        loss(model(batch, stress=True)["a"], batch).backward()
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize(("name", "part"), [("egnn", 0.5), ("painn", 0.3)])
def test_what_is_kept_for_the_backward_pass_is_little(name, part):
    """Bytes that autograd holds on to while training, where edges outweigh atoms."""
    encoder = build_encoder(EncoderConfig(name=name, layers=2, hidden=64), CUTOFF)
    draw_weights(encoder, torch.Generator().manual_seed(0))
    batch = batch_of(*[system(14) for _ in range(8)], dtype=torch.float32)

    def kept(model):
        stored = {}

        def pack(x):
            stored[x.untyped_storage().data_ptr()] = x  # held, so that no other tensor gets its address
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(batch)
        return sum(x.untyped_storage().nbytes() for x in stored.values())

    assert kept(encoder) < part * kept(PLAIN[name](encoder))
