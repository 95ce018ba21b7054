"""Writes dimenet.json: what torch_geometric's DimeNet++ gives for planted weights. Made with torch_geometric 2.8.1.

pip install torch torch_geometric sympy;  python tests/reference/make_dimenet.py
"""

import json
from pathlib import Path

import torch
from planted import CUTOFF, NUMBERS, POSITIONS, planted
from torch_geometric.nn.models import DimeNetPlusPlus

SIZES = {"layers": 2, "hidden": 6, "angular": 4, "basis": 3, "output": 5, "radial": 4, "spherical": 5}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    model = DimeNetPlusPlus(
        6, 6, 2, int_emb_size=4, basis_emb_size=3, out_emb_channels=5, num_spherical=5, num_radial=4, cutoff=CUTOFF
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rbf.freq":
                parameter.copy_(torch.from_numpy(planted(name, tuple(parameter.shape))))
    positions = torch.from_numpy(POSITIONS).requires_grad_()
    i, j = (
        x for x in ((torch.cdist(positions, positions) < CUTOFF) & ~torch.eye(len(NUMBERS), dtype=bool)).nonzero().T
    )
    pairs = [(f, e) for e in range(len(i)) for f in range(len(i)) if i[f] == j[e] and j[f] != i[e]]  # k -> j -> i
    kj, ji = torch.tensor(pairs).T
    there, here = positions[i[ji]] - positions[j[ji]], positions[j[ji]] - positions[j[kj]]
    angle = torch.atan2(torch.cross(there, here, dim=1).norm(dim=1), (there * here).sum(dim=1))
    distance = (positions[i] - positions[j]).norm(dim=1)
    rbf, sbf = model.rbf(distance), model.sbf(distance, angle, kj)
    x = model.emb(torch.from_numpy(NUMBERS), rbf, i, j)
    total = model.output_blocks[0](x, rbf, i, num_nodes=len(NUMBERS))
    for block, output in zip(model.interaction_blocks, model.output_blocks[1:], strict=True):
        x = block(x, rbf, sbf, kj, ji)
        total = total + output(x, rbf, i, num_nodes=len(NUMBERS))
    (slope,) = torch.autograd.grad(total.sin().sum(), positions)
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if name != "rbf.freq"}
    said = {"sizes": SIZES, "shapes": shapes, "scalars": total.tolist(), "slope": slope.tolist()}
    Path(__file__).with_name("dimenet.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
