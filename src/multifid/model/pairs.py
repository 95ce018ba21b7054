"""A pair potential whose coefficients are functions of what the periodic table says of two elements.

    E_i = e_Zi + sum_j u(r_ij) sum_k B_k(r_ij / (R_i + R_j)) sum_m c_km P_m(Z_i, Z_j)

B_k are Gaussians of the distance in units of both covalent radii (`SizedBasis`), u is the cutoff envelope. P_m are 1,
the sums, products and absolute differences of electronegativity, radius and filled shells of both elements: products of
all pairs of them, made symmetric. It is linear in c and e, which are fitted before the first step
(`training/pairs.py`) and then stay. What few data of many elements say of bonds, a ridge regression finds at once, and
a network that is trained for the rest generalises better.
"""

import numpy as np
import torch
from torch import Tensor, nn

from multifid.graphs.graph import Graph
from multifid.model.layers import Constant, SizedBasis, envelope, sum_over
from multifid.structures.elements import MAX_Z
from multifid.structures.periodic import properties

USED = 6  # of `structures.periodic.properties`: electronegativity, radius, shells s, p, d and f


def pair_properties() -> np.ndarray:
    """P_m(Z, Z'), (119, 119, M) float64, symmetric in both."""
    a = properties()[:, None, :USED]
    b = properties()[None, :, :USED]
    columns = [np.ones((MAX_Z + 1, MAX_Z + 1, 1)), a + b, np.abs(a - b)]
    for k in range(USED):
        for m in range(k, USED):
            columns.append((a[..., k] * b[..., m] + a[..., m] * b[..., k])[..., None])
    return np.concatenate(columns, axis=2)


class PairEnergies(nn.Module):
    """The energies of atoms (N,), in the scaled units of a branch; zero until coefficients are set."""

    def __init__(self, functions: int, cutoff: float):
        super().__init__()
        self.cutoff = cutoff
        self.basis = SizedBasis(functions)
        self.of_pair = Constant(pair_properties())
        size = self.of_pair.exact.shape[2]
        self.coefficients = nn.Parameter(torch.zeros(functions, size), requires_grad=False)
        self.of_element = nn.Parameter(torch.zeros(MAX_Z + 1), requires_grad=False)

    def draw(self, generator: torch.Generator) -> None:
        """Nothing is drawn: coefficients are fitted, or zero."""
        del generator

    def forward(self, graph: Graph) -> Tensor:
        """(N,); every pair is two edges, and each of its atoms has half of it."""
        with torch.autocast(graph.distances.device.type, enabled=False):
            table = self.of_pair.value @ self.coefficients.t()  # (119, 119, K)
            i, j = graph.receivers, graph.senders
            numbers = graph.numbers
            shapes = table[numbers.index_select(0, i), numbers.index_select(0, j)]
            of_edges = (shapes * self.functions(graph)).sum(dim=1)
            return sum_over(of_edges, i, graph.atoms) + self.of_element.index_select(0, numbers)

    def functions(self, graph: Graph) -> Tensor:
        """u B_k of each edge, (E, K)."""
        basis = self.basis(graph.distances, graph.numbers, graph.receivers, graph.senders)
        return basis * envelope(graph.distances, self.cutoff)

    @torch.no_grad()
    def set(self, coefficients: list[list[float]], of_element: list[float]) -> None:
        """Coefficients (K, M) and energies of elements (119,), in the scaled units of the branch."""
        self.coefficients.copy_(torch.tensor(coefficients, dtype=torch.float64))
        self.of_element.copy_(torch.tensor(of_element, dtype=torch.float64))

    @torch.no_grad()
    def multiply(self, ratio: float) -> None:
        """All energies, by a number."""
        self.coefficients.mul_(ratio)
        self.of_element.mul_(ratio)
