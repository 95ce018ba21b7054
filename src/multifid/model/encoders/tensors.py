"""Symmetric tensors without trace, and what can be said of vectors and tensors that no rotation changes.

A vector r has five quadratic harmonics, the independent entries of r r^T - |r|^2 / 3, so scaled that their squares sum
to |r|^4. Channels of such tensors, sums over the neighbours of an atom, see what sums of vectors do not: two neighbours
on opposite sides. Inner products of sums over neighbours are sums over pairs of neighbours, of the cosine of an angle
(vectors) and of its square (tensors); v T v is a sum over triples. So a message depends on many atoms, for work that
is done once per atom (Drautz 2019; Batatia et al. 2022, arXiv 2206.07697).
"""

import torch
from torch import Tensor, nn

A, B, C = 3.0**0.5, (5 / 8) ** 0.5, (3 / 8) ** 0.5


def harmonics(r: Tensor) -> Tensor:
    """The quadratic harmonics of each vector: (..., 3) -> (..., 5)."""
    x, y, z = r.unbind(-1)
    return torch.stack(
        [A * x * y, A * y * z, A * x * z, (A / 2) * (x * x - y * y), z * z - 0.5 * (x * x + y * y)], dim=-1
    )


def cubic_harmonics(r: Tensor) -> Tensor:
    """The cubic harmonics of each vector, whose squares sum to |r|^6: (..., 3) -> (..., 7)."""
    x, y, z = r.unbind(-1)
    x2, y2, z2 = x * x, y * y, z * z
    of_z = 4.0 * z2 - x2 - y2
    return torch.stack(
        [
            B * y * (3.0 * x2 - y2),
            15.0**0.5 * x * y * z,
            C * y * of_z,
            0.5 * z * (2.0 * z2 - 3.0 * (x2 + y2)),
            C * x * of_z,
            15.0**0.5 / 2 * z * (x2 - y2),
            B * x * (x2 - 3.0 * y2),
        ],
        dim=-1,
    )


def harmonics_to(degree: int, r: Tensor) -> Tensor:
    """Those of degree 1 (the vector itself) to at most 3, one after the other: (..., 3) -> (..., 3, 8 or 15)."""
    kinds = (lambda r: r, harmonics, cubic_harmonics)
    return torch.cat([kind(r) for kind in kinds[:degree]], dim=-1)


def by_degree(x: Tensor, dim: int) -> list[Tensor]:
    """The parts of a tensor that along one dimension has the components of degree 1, 2, ... one after the other."""
    parts, start, size = [], 0, 3
    while start < x.shape[dim]:
        parts.append(x.narrow(dim, start, size))
        start, size = start + size, size + 2
    return parts


def along(v: Tensor, r: Tensor) -> Tensor:
    """Inner products of every channel of an edge, v (E, C, K), with what the edge is, r (E, K): (E, C)."""
    return (v * r[:, None, :]).sum(dim=2)


def bounded(v: Tensor) -> Tensor:
    """v / sqrt(|v|^2 + 1), smooth at zero too, along the last dimension."""
    return v * torch.rsqrt(v.square().sum(dim=-1, keepdim=True) + 1.0)


class Invariants(nn.Module):
    """Of C vectors and T tensors of each atom, all bounded: products of two vectors, of two tensors, and v T v.

    Besides log(1 + |T|^2); `size` numbers in all. Needs no weights. v T v is the product of T with the harmonics of v.
    All of it is in the type of the vectors: products of matrices would be rounded by autocast, and then not invariant.
    """

    def __init__(self, vectors: int, tensors: int):
        super().__init__()
        self.size = vectors * (vectors - 1) // 2 + tensors * (tensors + 1) // 2 + tensors * vectors
        for name, channels in (("of_vectors", vectors), ("of_tensors", tensors)):
            self.register_buffer(name, torch.triu_indices(channels, channels, offset=1), persistent=False)

    def forward(self, v: Tensor, t: Tensor) -> Tensor:
        """v (N, C, 3), t (N, T, 5) -> (N, size)."""
        sizes = torch.log1p(t.square().sum(dim=2))
        v, t = bounded(v), bounded(t)
        vv = _products(v, *self.of_vectors)  # type: ignore[misc]
        tt = _products(t, *self.of_tensors)  # type: ignore[misc]
        vtv = (t[:, :, None] * harmonics(v)[:, None]).sum(dim=3)  # (N, T, C)
        return torch.cat([sizes, vv, tt, vtv.flatten(1)], dim=1)


def _products(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Inner products of channels a with channels b: (N, channels, K), (P,), (P,) -> (N, P)."""
    return (x.index_select(1, a) * x.index_select(1, b)).sum(dim=2)
