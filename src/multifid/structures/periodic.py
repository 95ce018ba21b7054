"""What is known of elements before any data are: where they stand in the periodic table, their sizes and how strongly
they attract electrons.

Electronegativities are Pauling's (Allred 1961, and later ones); those of He, Ne and Ar, which have none, are Allen's.
Where lanthanides and actinides have none, they have that of their neighbours. Radii are the covalent ones of Cordero et
al. (2008), as in ASE.
"""

import numpy as np
from ase.data import covalent_radii

from multifid.structures.elements import MAX_Z, NOBLE

# fmt: off
_PAULING = [
    2.20, 4.16,
    0.98, 1.57, 2.04, 2.55, 3.04, 3.44, 3.98, 4.79,
    0.93, 1.31, 1.61, 1.90, 2.19, 2.58, 3.16, 3.24,
    0.82, 1.00, 1.36, 1.54, 1.63, 1.66, 1.55, 1.83, 1.88, 1.91, 1.90, 1.65, 1.81, 2.01, 2.18, 2.55, 2.96, 3.00,
    0.82, 0.95, 1.22, 1.33, 1.60, 2.16, 1.90, 2.20, 2.28, 2.20, 1.93, 1.69, 1.78, 1.96, 2.05, 2.10, 2.66, 2.60,
    0.79, 0.89, 1.10, 1.12, 1.13, 1.14, 1.13, 1.17, 1.20, 1.20, 1.10, 1.22, 1.23, 1.24, 1.25, 1.10, 1.27,
    1.30, 1.50, 2.36, 1.90, 2.20, 2.20, 2.28, 2.54, 2.00, 1.62, 2.33, 2.02, 2.00, 2.20, 2.20,
    0.70, 0.90, 1.10, 1.30, 1.50, 1.38, 1.36, 1.28, 1.30, 1.30, 1.30, 1.30, 1.30, 1.30, 1.30, 1.30,
]
# fmt: on
ELECTRONEGATIVITY = np.array([1.3, *_PAULING, *[1.3] * (MAX_Z - len(_PAULING))])  # (119,) by atomic number
RADIUS = np.asarray(covalent_radii[: MAX_Z + 1], np.float64)  # (119,) angstrom


def electrons(z: int) -> tuple[int, int, int, int, int]:
    """Period, and how many electrons beyond the noble gas before are in s, p, d and f shells, filled in this order of
    energies: s, f, d, p. The few exceptions of atoms in vacuum (Cr, Cu, ...) are none here.
    """
    period = next(k for k, end in enumerate(NOBLE) if z <= end)
    left = z - NOBLE[period - 1] if period else 0
    held = []
    for size in (2, 14 if period >= 6 else 0, 10 if period >= 4 else 0, 6 if period >= 2 else 0):
        held.append(min(left, size))
        left -= held[-1]
    s, f, d, p = held
    return period, s, p, d, f


def properties() -> np.ndarray:
    """(119, P) by atomic number: numbers near one that are equal or near for elements that are alike.

    Electronegativity, radius, electrons of each shell in parts of full shells, and one-hot period and column (of s, d
    and p blocks; lanthanides and actinides share one). Row 0 is zero.
    """
    rows = np.zeros((MAX_Z + 1, 6 + 7 + 19))
    for z in range(1, MAX_Z + 1):
        period, s, p, d, f = electrons(z)
        column = 17 if z == 2 else 18 if f and not d else 11 + p if p else s + d - 1
        rows[z, :6] = [ELECTRONEGATIVITY[z] - 1.8, RADIUS[z] - 1.5, s / 2, p / 6, d / 10, f / 14]
        rows[z, 5 + period] = rows[z, 13 + column] = 1.0
    return rows
