"""The spherical basis of pairs of edges that meet (Gasteiger, Groß, Günnemann 2020, arXiv 2003.03123, eq. 6).

    a_ln(d, angle) = u(d) / x sqrt(2 / j_{l+1}(z_ln)^2) j_l(z_ln x) Y_l(angle),   x = d / cutoff,  j_l(z_ln) = 0

in the normalisation of its public implementations. The radial part is of one edge and the angular part, a Legendre
polynomial of the cosine, of both. The radial parts are taken as Chebyshev series in x, fitted once in float64: closed
forms of j_l lose all digits in float32 at short distances, where terms of size x^-l cancel.
"""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn


class SphericalBasis(nn.Module):
    """The radial parts, without the envelope, of degrees 0 to `degrees` - 1 with `radial` functions each."""

    series: Tensor

    def __init__(self, degrees: int, radial: int, cutoff: float):
        super().__init__()
        self.shape, self.cutoff = (degrees, radial), cutoff
        series = torch.tensor(_series(degrees, radial).tolist(), dtype=torch.get_default_dtype())
        self.register_buffer("series", series, persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """(E,) angstrom -> (E, degrees, radial)."""
        x = (distance / self.cutoff).clamp(max=1.0)[:, None]
        polynomials = chebyshev(2.0 * x - 1.0, self.series.shape[0])
        # In float64, which neither autocast nor TF32 rounds: this is geometry.
        values = (polynomials.double() @ self.series.double()).to(x.dtype)
        return (values / x).unflatten(1, self.shape)


def chebyshev(x: Tensor, size: int) -> Tensor:
    """T_0 to T_{size - 1}: (E, 1) -> (E, size). From those up to T_m follow m more, T_{m+k} = 2 T_m T_k - T_{m-k}."""
    known = torch.cat([torch.ones_like(x), x], dim=1)
    while known.shape[1] < size:
        last = known[:, -1:]
        known = torch.cat([known, 2.0 * last * known[:, 1:] - known[:, :-1].flip(1)], dim=1)
    return known[:, :size]


def legendre(x: Tensor, size: int) -> Tensor:
    """sqrt((2 l + 1) / 4 pi) P_l(x) for l = 0 to size - 1: (T,) -> (T, size)."""
    p = [torch.ones_like(x), x]
    for degree in range(2, size):
        p.append(((2 * degree - 1) * x * p[-1] - (degree - 1) * p[-2]) / degree)
    return torch.stack([math.sqrt((2 * degree + 1) / (4 * math.pi)) * y for degree, y in enumerate(p[:size])], dim=1)


def roots(degrees: int, radial: int) -> np.ndarray:
    """The first positive roots of the spherical Bessel functions, (degrees, radial): those of l lie between l - 1's."""
    from scipy.optimize import brentq  # a third of a second, for this alone
    from scipy.special import spherical_jn

    found = np.arange(1, radial + degrees) * math.pi
    rows = [found[:radial]]
    for degree in range(1, degrees):
        found = np.array([brentq(partial(spherical_jn, degree), a, b) for a, b in pairwise(found)])
        rows.append(found[:radial])
    return np.stack(rows)


def _series(degrees: int, radial: int) -> np.ndarray:
    """Chebyshev coefficients of every radial part over 0 < x < 1: (terms, degrees * radial), exact to 1e-13."""
    from scipy.special import spherical_jn

    z = roots(degrees, radial)
    terms = int(z.max() / 2) + 32
    x = 0.5 + 0.5 * np.cos((np.arange(2 * terms) + 0.5) * math.pi / (2 * terms))
    columns = [
        spherical_jn(degree, z[degree, n] * x) * math.sqrt(2.0) / abs(spherical_jn(degree + 1, z[degree, n]))
        for degree in range(degrees)
        for n in range(radial)
    ]
    return np.polynomial.chebyshev.chebfit(2.0 * x - 1.0, np.stack(columns, axis=1), terms - 1)
