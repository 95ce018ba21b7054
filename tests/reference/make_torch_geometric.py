"""Makes torch_geometric.npz: layers of PyTorch Geometric, their weights, and what they give for a molecule.

    pip install torch_geometric==2.8.1 && python make_torch_geometric.py

Run once; only the tests of multifid read the file, so that they need no such package. float64 throughout. An atom is
far from all others and has no neighbours. Arrays are named CASE/WEIGHT, as the layer names its weights, and CASE/out.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch_geometric.nn import CGConv, GATv2Conv, GINEConv, MFConv, PNAConv, SAGEConv
from torch_geometric.nn.models.schnet import GaussianSmearing, InteractionBlock

HIDDEN, RADIAL, GAUSSIANS, FILTERS, HEADS, CUTOFF = 6, 5, 16, 8, 2, 5.0
TYPICAL = 16  # neighbours, of multifid's constant M
BONDS, NEAR = 1.7, 2.6  # angstrom: neighbours of an atom: 1 to 4; at least 2
ETHANOL = [  # and a helium atom, 30 angstrom away
    [0.0072, -0.5687, 0.0], [-1.2854, 0.2499, 0.0], [1.1304, 0.3147, 0.0], [0.0392, -1.1972, 0.8900],
    [0.0392, -1.1972, -0.8900], [-1.3175, 0.8784, 0.8900], [-1.3175, 0.8784, -0.8900], [-2.1422, -0.4239, 0.0],
    [1.9857, -0.1365, 0.0], [30.0, 0.0, 0.0],
]  # fmt: skip


class PNAPlus(PNAConv):
    """With the messages of HydraGNN's PNAPlusStack."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rbf_lin = nn.Linear(RADIAL, HIDDEN, bias=False)
        self.rbf_emb = nn.Sequential(nn.Linear(RADIAL, HIDDEN), nn.ReLU())

    def message(self, x_i, x_j, edge_attr):
        embedded = self.rbf_emb(edge_attr)[:, None, :]
        hs = [layer(torch.cat([x_i, x_j, embedded], dim=-1)[:, k]) for k, layer in enumerate(self.pre_nns)]
        return torch.stack(hs, dim=1) * self.rbf_lin(edge_attr)[:, None, :]


def pna(kind, aggregators, scalers, **keys):
    histogram = torch.zeros(TYPICAL + 1, dtype=torch.long)
    histogram[TYPICAL] = 1  # all training atoms have the typical number of neighbours
    return kind(HIDDEN, HIDDEN, aggregators, scalers, histogram, towers=1, **keys)


def edges(positions, cutoff):
    """(2, E) senders and receivers, sorted by receiver and then sender; (E,) distances."""
    away = (positions[:, None] - positions[None]).norm(dim=2)
    i, j = torch.nonzero((away < cutoff) & (away > 0), as_tuple=True)
    return torch.stack([j, i]), away[i, j]


def main():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    positions = torch.tensor(ETHANOL)
    x = torch.randn(len(positions), HIDDEN)
    waves = torch.arange(1, RADIAL + 1) * np.pi
    scalers = ["identity", "amplification", "attenuation", "linear", "inverse_linear"]
    layers = {
        "schnet": (BONDS, InteractionBlock(HIDDEN, GAUSSIANS, FILTERS, cutoff=1e9)),
        "cgcnn": (BONDS, CGConv(HIDDEN, dim=RADIAL, aggr="add")),
        "gat": (BONDS, GATv2Conv(HIDDEN, HIDDEN // HEADS, HEADS, edge_dim=RADIAL, fill_value=0.0)),
        "gin": (
            BONDS,
            GINEConv(
                nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN)),
                eps=TYPICAL - 1,
                edge_dim=RADIAL,
            ),
        ),
        "sage": (BONDS, SAGEConv(HIDDEN, HIDDEN)),
        "mfc": (BONDS, MFConv(HIDDEN, HIDDEN, max_degree=3)),
        "pna mean std": (NEAR, pna(PNAConv, ["mean", "std"], scalers, edge_dim=RADIAL)),
        "pna max": (NEAR, pna(PNAConv, ["max"], scalers, edge_dim=RADIAL)),
        "pna min": (NEAR, pna(PNAConv, ["min"], scalers, edge_dim=RADIAL)),
        "pna_plus mean std": (NEAR, pna(PNAPlus, ["mean", "std"], scalers, edge_dim=HIDDEN)),
    }
    found = {"positions": positions, "x": x}
    for name, (cutoff, layer) in layers.items():
        index, d = edges(positions, cutoff)
        attributes = torch.sin(waves * d[:, None] / CUTOFF) * CUTOFF / d[:, None]
        with torch.no_grad():
            for weight in layer.parameters():
                if not weight.any():
                    weight.normal_(0.0, 0.1)  # biases that begin as zero
            if name == "pna max" or name == "pna min":  # one sign for all messages
                layer.pre_nns[0][0].bias += 50.0 if name == "pna max" else -50.0
            if name == "schnet":
                smeared = GaussianSmearing(0.0, CUTOFF, GAUSSIANS)(d)
                out = layer(x, index, d, smeared)
            elif name in ("sage", "mfc"):
                out = layer(x, index)
            else:
                out = layer(x, index, attributes)
        found |= {f"{name}/{key}": value for key, value in layer.state_dict().items()}
        found |= {f"{name}/cutoff": torch.tensor(cutoff), f"{name}/out": out}
    path = Path(__file__).with_name("torch_geometric.npz")
    np.savez_compressed(path, **{key: np.asarray(value) for key, value in found.items()})


if __name__ == "__main__":
    main()
