"""Writes mace_layer.npz: one layer of mace-torch, what goes into it and comes out, and its weights as plain matrices.

The layer is RealAgnosticResidualInteractionBlock and EquivariantProductBasisBlock, without the skip connection.
Matrices have in them what e3nn multiplies weights by. Made with mace-torch 0.3.16 and e3nn 0.4.4, in an environment of
its own, since it needs that e3nn:

pip install torch mace-torch;  TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 python tests/reference/make_mace_layer.py
"""

from pathlib import Path

import numpy as np
import torch
from e3nn import o3
from mace.modules.blocks import EquivariantProductBasisBlock, RealAgnosticResidualInteractionBlock
from mace.tools.cg import U_matrix_real
from torch.nn.functional import silu

ATOMS, CHANNELS, HIGHEST, CORRELATION, RADIAL, WIDTH, NEIGHBOURS = 6, 3, 2, 3, 5, 7, 16
ELEMENTS = (1, 8)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    hidden = o3.Irreps(f"{CHANNELS}x0e + {CHANNELS}x1o")
    wide = o3.Irreps(f"{CHANNELS}x0e + {CHANNELS}x1o + {CHANNELS}x2e")
    harmonics = o3.Irreps.spherical_harmonics(HIGHEST)
    interaction = RealAgnosticResidualInteractionBlock(
        node_attrs_irreps=o3.Irreps(f"{len(ELEMENTS)}x0e"),
        node_feats_irreps=hidden,
        edge_attrs_irreps=harmonics,
        edge_feats_irreps=o3.Irreps(f"{RADIAL}x0e"),
        target_irreps=wide,
        hidden_irreps=hidden,
        avg_num_neighbors=NEIGHBOURS,
        radial_MLP=[WIDTH, WIDTH],
    )
    product = EquivariantProductBasisBlock(
        wide, hidden, CORRELATION, use_sc=False, num_elements=len(ELEMENTS), use_reduced_cg=False
    )
    elements = torch.tensor([0, 1, 0, 1, 1, 0])
    j, i = torch.cartesian_prod(torch.arange(ATOMS), torch.arange(ATOMS)).T
    i, j = i[i != j], j[i != j]
    order = torch.argsort(i, stable=True)
    i, j = i[order], j[order]
    unit = torch.nn.functional.normalize(torch.randn(len(i), 3), dim=1)
    basis, h, x = torch.randn(len(i), RADIAL), torch.randn(ATOMS, CHANNELS), torch.randn(ATOMS, CHANNELS, 3)
    y = o3.spherical_harmonics(harmonics, unit, normalize=True, normalization="component")
    attributes = torch.nn.functional.one_hot(elements, len(ELEMENTS)).double()
    features = torch.cat([h, x.flatten(1)], dim=1)
    message, _ = interaction(attributes, features, y, basis, torch.stack([j, i]))
    result = product(message, None, attributes)
    out = {
        "numbers": torch.tensor(ELEMENTS)[elements], "receivers": i, "senders": j, "unit": unit, "basis": basis,
        "h": h, "x": x, "harmonics": y, "scalars": result[:, :CHANNELS],
        "vectors": result[:, CHANNELS:].view(ATOMS, CHANNELS, 3),
    }  # fmt: skip
    for name, linear in (("up", interaction.linear_up), ("down", product.linear)):
        for degree, matrix in enumerate(matrices(linear)):
            out[f"{name} {degree}"] = matrix
    layers = list(interaction.conv_tp_weights.children())
    gain = float(layers[0].act(torch.ones(1)) / silu(torch.ones(1)))
    for k, layer in enumerate(layers):
        out[f"filter {k}"] = layer.weight * (gain if k else 1.0) / layer.weight.shape[0] ** 0.5
    paths = interaction.conv_tp.instructions
    degrees = [
        (harmonics[p.i_in2].ir.l, hidden[p.i_in1].ir.l, interaction.conv_tp.irreps_out[p.i_out].ir.l) for p in paths
    ]
    out["paths"] = torch.tensor(degrees)
    for path, instruction in zip(degrees, paths, strict=True):
        of_edge, of_sender, end = path
        coupling = o3.wigner_3j(of_sender, of_edge, end).permute(1, 0, 2) * instruction.path_weight
        out[f"coupling {of_edge}{of_sender}{end}"] = coupling
        k = next(k for k, ins in enumerate(interaction.linear.instructions) if ins.i_in == instruction.i_out)
        out[f"joined {of_edge}{of_sender}{end}"] = matrices(interaction.linear)[k]
    for degree, contraction in enumerate(product.symmetric_contractions.contractions):
        weights = [contraction.weights_max, *contraction.weights][::-1]
        for factors, w in enumerate(weights, 1):
            out[f"weights {factors} {degree}"] = w  # (elements, products, channels)
        ir = f"1x{degree}{'eo'[degree % 2]}"
        first = U_matrix_real(o3.Irreps.spherical_harmonics(HIGHEST), ir, 1, use_cueq_cg=False)[-1]
        out[f"single {degree}"] = first.reshape(2 * degree + 1, (HIGHEST + 1) ** 2)
    arrays = {name: value.detach().numpy() for name, value in out.items()}
    np.savez_compressed(Path(__file__).with_name("mace_layer.npz"), **arrays)


def matrices(linear: o3.Linear) -> list[torch.Tensor]:
    """(channels of the input, channels of the output) of every instruction."""
    views = linear.weight_views(yield_instruction=True)
    return [instruction.path_weight * w for _, instruction, w in views]


if __name__ == "__main__":
    main()
