"""With copied weights a layer of MACE gives the numbers of mace-torch: messages of all paths, sums, products, maps.

What differs is taken away here: the normalisation of what neighbours tell, lengths among the scalars, biases of the
radial network; of mace-torch its skip connection with weights by element. The numbers were made once, by
tests/reference/make_mace_layer.py, on six atoms that all see each other, where envelopes are one.
"""

from pathlib import Path

import numpy as np
import torch

from multifid.model.encoders import mace
from multifid.model.encoders.coupling import gaunt, products, span
from multifid.model.encoders.mace import MACE, MACELayer
from multifid.model.encoders.tensors import by_degree
from test_products import components

PUBLISHED = np.load(Path(__file__).with_name("reference") / "mace_layer.npz")
CHANNELS, RADIAL, WIDTH, HIGHEST = 3, 5, 7, 2


def harmonics_of(unit):
    """As the encoder has them, (E, L)."""
    return torch.from_numpy(components(unit[:, None], np.ones((len(unit), 1, HIGHEST + 1)), HIGHEST))


def turns():
    """The matrix of each degree that makes our components of theirs, which stand in another order."""
    ours, theirs = harmonics_of(PUBLISHED["unit"]).numpy(), PUBLISHED["harmonics"]
    found = [np.linalg.lstsq(theirs[:, span(l)], ours[:, span(l)], rcond=None)[0] for l in range(HIGHEST + 1)]
    for turn in found:
        np.testing.assert_allclose(turn @ turn.T, np.eye(len(turn)), atol=1e-12)
    return found


def copy_weights(layer: MACELayer) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        for name in ("up", "down"):
            for degree, linear in enumerate(getattr(layer, name)):
                linear.weight.copy_(torch.from_numpy(PUBLISHED[f"{name} {degree}"].T))
        theirs = [tuple(path) for path in PUBLISHED["paths"].tolist()]
        assert sorted(theirs) == sorted(layer.paths)
        first, second, third = layer.filter.linears()
        first.weight.copy_(torch.from_numpy(PUBLISHED["filter 0"].T))
        second.weight.copy_(torch.from_numpy(PUBLISHED["filter 1"].T))
        radial = PUBLISHED["filter 2"].T.reshape(len(theirs), CHANNELS, WIDTH)
        ordered = np.concatenate([radial[theirs.index(path)] for path in layer.paths])
        third.weight.copy_(torch.from_numpy(ordered))
        for degree, joined in enumerate(layer.joined):
            paths = [path for path in layer.paths if path[2] == degree]
            blocks = [sign(*path) * PUBLISHED["joined {}{}{}".format(*path)] for path in paths]
            joined.weight.copy_(torch.from_numpy(np.concatenate(blocks).T))
        for degree, table in enumerate(layer.product.weights):
            for element, z in enumerate((1, 8)):
                found = weights_of_products(element, degree)
                table.weight[z].copy_(torch.from_numpy(found.ravel() * len(found) ** 0.5))


def sign(of_edge, of_sender, end):
    """Their coupling is ours, up to this sign."""
    turn = turns()
    theirs = PUBLISHED[f"coupling {of_edge}{of_sender}{end}"]
    theirs = np.einsum("abc,ai,bj,ck->ijk", theirs, turn[of_edge], turn[of_sender], turn[end])
    ours = gaunt(of_edge, of_sender, end) * (2 * end + 1) ** 0.5
    same = np.sign((theirs * ours).sum())
    np.testing.assert_allclose(same * theirs, ours, atol=1e-12)
    return same


def weights_of_products(element, degree):
    """What our products are weighted by where theirs have their weights, (products, C)."""
    numbers = np.load(Path(__file__).with_name("reference") / "mace.npz")
    a = components(numbers["vectors"], numbers["weights"], HIGHEST)
    found = [PUBLISHED[f"weights 1 {degree}"][element]]
    for factors in (2, 3):
        monomials, coefficients = products(factors, HIGHEST, degree)
        ours = np.einsum("sn,nkm->skm", a[:, monomials].prod(axis=2), coefficients)
        theirs = numbers[f"{HIGHEST} {factors} {degree}"] @ turns()[degree]
        one, other = (x.transpose(0, 2, 1).reshape(-1, x.shape[1]) for x in (ours, theirs))
        found.append(np.linalg.lstsq(one, other, rcond=None)[0] @ PUBLISHED[f"weights {factors} {degree}"][element])
    return np.concatenate(found)


def test_a_layer_with_copied_weights_gives_the_numbers_of_mace_torch(monkeypatch):
    config = MACE.Config(layers=1, hidden=CHANNELS, harmonics=HIGHEST, radial=RADIAL, filter=WIDTH)
    layer = MACELayer(config, first=False).double()
    copy_weights(layer)
    layer.norm = torch.nn.Identity()
    monkeypatch.setattr(mace, "_normed", lambda x: by_degree(x, 1))
    published = {name: torch.from_numpy(PUBLISHED[name]) for name in PUBLISHED}
    turn = torch.from_numpy(turns()[1])
    h, x = published["h"], (published["x"] @ turn).transpose(1, 2).contiguous()
    i, j, u = published["receivers"], published["senders"], torch.ones(len(published["unit"]), 1).double()
    y = harmonics_of(PUBLISHED["unit"])
    scalars, vectors = layer(h, x, published["numbers"], i, j, y, published["basis"], u)
    for found, theirs in (
        (scalars - h, published["scalars"]),
        (vectors - x, (published["vectors"] @ turn).transpose(1, 2)),
    ):
        assert theirs.abs().max() > 0.01
        assert (found - theirs).abs().max() < 1e-12 * theirs.abs().max()
