"""Symmetric tensors without trace, and what can be said of vectors and tensors that no rotation changes.

A vector r has five quadratic harmonics, the independent entries of r r^T - |r|^2 / 3, so scaled that their squares sum
to |r|^4. Channels of such tensors, sums over the neighbours of an atom, see what sums of vectors do not: two neighbours
on opposite sides. Inner products of sums over neighbours are sums over pairs of neighbours, of the cosine of an angle
(vectors) and of its square (tensors); v T v is a sum over triples. So a message depends on many atoms, for work that
is done once per atom (Drautz 2019; Batatia et al. 2022, arXiv 2206.07697).
"""

import torch
from torch import Tensor, nn

A = 3.0**0.5
# Of which harmonic the entries of r r^T - |r|^2 / 3, times 3 / 2, are made, row after row. The first four harmonics are
# multiplied by A / 2 before, so that these numbers are exact in every type.
TO_MATRIX = [
    [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0],
    [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    [1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0],
    [-0.5, 0.0, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0, 1.0],
]


def harmonics(r: Tensor) -> Tensor:
    """(E, 3) -> (E, 5): the quadratic harmonics of r / sqrt(|r|^2 + 1), smooth at zero too."""
    x, y, z = (r * torch.rsqrt(r.square().sum(dim=1, keepdim=True) + 1.0)).unbind(1)
    return torch.stack(
        [A * x * y, A * y * z, A * x * z, (A / 2) * (x * x - y * y), z * z - 0.5 * (x * x + y * y)], dim=1
    )


def along(v: Tensor, r: Tensor) -> Tensor:
    """Inner products of every channel of an edge, v (E, C, K), with what the edge is, r (E, K): (E, C)."""
    return (v * r[:, None, :]).sum(dim=2)


def bounded(v: Tensor) -> Tensor:
    """v / sqrt(|v|^2 + 1), channel by channel."""
    return v * torch.rsqrt(v.square().sum(dim=2, keepdim=True) + 1.0)


class Invariants(nn.Module):
    """Of C vectors and T tensors of each atom, all bounded: products of two vectors, of two tensors, and v T v.

    Besides log(1 + |T|^2); `size` numbers in all. Needs no weights.
    """

    def __init__(self, vectors: int, tensors: int):
        super().__init__()
        self.size = vectors * (vectors - 1) // 2 + tensors * (tensors + 1) // 2 + tensors * vectors
        for name, channels in (("of_vectors", vectors), ("of_tensors", tensors)):
            pairs = [a * channels + b for a in range(channels) for b in range(a + 1, channels)]
            self.register_buffer(name, torch.tensor(pairs, dtype=torch.int64), persistent=False)
        self.register_buffer("to_matrix", torch.tensor(TO_MATRIX), persistent=False)

    def forward(self, v: Tensor, t: Tensor) -> Tensor:
        """v (N, C, 3), t (N, T, 5) -> (N, size)."""
        sizes = torch.log1p(t.square().sum(dim=2))
        v, t = bounded(v), bounded(t)
        vv = (v @ v.mT).flatten(1).index_select(1, self.of_vectors)  # type: ignore[arg-type]
        tt = (t @ t.mT).flatten(1).index_select(1, self.of_tensors)  # type: ignore[arg-type]
        entries = torch.cat([t[:, :, :4] * (A / 2), t[:, :, 4:]], dim=2) @ self.to_matrix  # type: ignore[operator]
        turned = entries.view(len(t), -1, 3) @ v.mT  # (N, 3 T, C), every tensor times every vector
        vtv = (turned.view(len(t), t.shape[1], 3, v.shape[1]) * v.mT[:, None]).sum(dim=2)
        return torch.cat([sizes, vv, tt, vtv.flatten(1)], dim=1)
