"""Encoders give the numbers of public implementations for the same weights, on a molecule, in float64.

The numbers were made once, by the scripts in tests/reference, with the packages and versions that they name.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from multifid.graphs.graph import completed, graph_of
from multifid.model.encoders import build_encoder
from multifid.model.layers import TYPICAL_NEIGHBORS
from multifid.model.potential import ModelConfig
from multifid.model.suite.samples import System, batch_of
from reference.planted import CUTOFF, NUMBERS, POSITIONS, planted


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)  # constants of an encoder too
    yield
    torch.set_default_dtype(torch.float32)


def read(name):
    said = json.loads((Path(__file__).parent / "reference" / f"{name}.json").read_text())
    return said, {n: torch.from_numpy(planted(n, tuple(shape))) for n, shape in said["shapes"].items()}


def built(name, **keys):
    return build_encoder(ModelConfig(cutoff=CUTOFF, encoder={"name": name, **keys}).encoder, CUTOFF)


def copy(into, weight, bias=None, factor=1.0):
    with torch.no_grad():
        into.weight.copy_(factor * weight)
        if into.bias is not None:
            into.bias.copy_(torch.zeros_like(into.bias) if bias is None else bias)


def scalars_and_slope(encoder):
    """The scalars of the test molecule before the last norm and without the element's embedding; and a derivative."""
    batch = batch_of(System(NUMBERS, POSITIONS), cutoff=CUTOFF)
    batch.positions = batch.positions.requires_grad_()
    seen = []
    for module in (encoder.embedding, encoder.norm):
        module.register_forward_hook(lambda module, given, out: seen.append((given, out)))
    encoder(graph_of(completed(batch, encoder.needs)))
    scalars = seen[1][0][0] - seen[0][1]
    (slope,) = torch.autograd.grad(scalars.sin().sum(), batch.positions)
    return scalars.detach(), slope


def test_dimenet_is_that_of_torch_geometric(float64):
    said, w = read("dimenet")
    encoder = built("dimenet", **said["sizes"])
    n, root = said["sizes"]["hidden"], TYPICAL_NEIGHBORS**0.5
    with torch.no_grad():
        encoder.embedding.element.weight[:95] = w["emb.emb.weight"]
        encoder.embedding.charge.weight.zero_()
        encoder.embedding.spin.weight.zero_()
    first = w["emb.lin.weight"]
    copy(encoder.receiver, first[:, :n], w["emb.lin.bias"])
    copy(encoder.sender, first[:, n : 2 * n])
    copy(encoder.pair, first[:, 2 * n :])
    copy(encoder.of_distance, w["emb.lin_rbf.weight"], w["emb.lin_rbf.bias"])
    for k, block in enumerate([encoder.first, *(layer.output for layer in encoder.layers)]):
        at = f"output_blocks.{k}"
        copy(block.filter, w[f"{at}.lin_rbf.weight"])
        copy(block.up, w[f"{at}.lin_up.weight"], factor=root)
        for m, linear in enumerate(block.maps.linears()[:-1]):
            copy(linear, w[f"{at}.lins.{m}.weight"], w[f"{at}.lins.{m}.bias"])
        copy(block.maps.linears()[-1], w[f"{at}.lin.weight"])
    for k, layer in enumerate(encoder.layers):
        at = f"interaction_blocks.{k}"
        for name, into in (("rbf1", layer.of_distance), ("rbf2", layer.filter), ("sbf1", layer.of_basis)):
            copy(into, w[f"{at}.lin_{name}.weight"])
        copy(layer.of_angle, w[f"{at}.lin_sbf2.weight"], factor=root)
        for name, into in (("kj", layer.kj), ("ji", layer.ji)):
            copy(into, w[f"{at}.lin_{name}.weight"], w[f"{at}.lin_{name}.bias"])
        copy(layer.down, w[f"{at}.lin_down.weight"])
        copy(layer.up, w[f"{at}.lin_up.weight"])
        before, after = "layers_before_skip.0", "layers_after_skip"
        names = [f"{before}.lin1", f"{before}.lin2", "lin", *(f"{after}.{a}.lin{b}" for a in (0, 1) for b in (1, 2))]
        for name, into in zip(names, layer.maps.linears(), strict=True):
            copy(into, w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"])
    scalars, slope = scalars_and_slope(encoder)
    np.testing.assert_allclose(scalars, said["scalars"], rtol=0, atol=1e-9)  # torch_geometric has roots in float32
    np.testing.assert_allclose(slope, said["slope"], rtol=0, atol=1e-8)
