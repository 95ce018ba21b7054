"""Writes mace.npz: all products of the symmetric contraction of mace-torch, of planted sums over neighbours.

Made with mace-torch 0.3.16 and e3nn 0.4.4, in an environment of its own, since it needs that e3nn:

pip install torch mace-torch;  python tests/reference/make_mace.py
"""

from pathlib import Path

import numpy as np
import torch
from e3nn import o3
from mace.tools.cg import U_matrix_real

SAMPLES, NEIGHBOURS = 26, 5


def main() -> None:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(SAMPLES, NEIGHBOURS, 3, generator=generator), dim=2)
    weights = torch.randn(SAMPLES, NEIGHBOURS, 4, generator=generator)  # of each neighbour and degree
    out = {"vectors": vectors, "weights": weights}
    out["harmonics"] = o3.spherical_harmonics(2, vectors[:, 0], normalize=True, normalization="component")
    for highest in (2, 3):
        degrees = list(range(highest + 1))
        y = o3.spherical_harmonics(degrees, vectors, normalize=True, normalization="component")
        of_components = torch.repeat_interleave(
            weights[..., : highest + 1], torch.tensor([2 * d + 1 for d in degrees]), 2
        )
        a = (y * of_components).sum(dim=1)
        irreps = o3.Irreps.spherical_harmonics(highest)
        for factors in (2, 3):
            for degree in (0, 1, 2):
                ir = f"1x{degree}{'eo'[degree % 2]}"
                u = U_matrix_real(irreps, ir, factors, use_cueq_cg=False)[-1]
                u = u.reshape(2 * degree + 1, *[len(a[0])] * factors, -1)
                letters = "abc"[:factors]
                terms = ",".join(f"s{x}" for x in letters)
                out[f"{highest} {factors} {degree}"] = torch.einsum(f"m{letters}k,{terms}->skm", u, *[a] * factors)
    np.savez_compressed(Path(__file__).with_name("mace.npz"), **{name: x.numpy() for name, x in out.items()})


if __name__ == "__main__":
    main()
