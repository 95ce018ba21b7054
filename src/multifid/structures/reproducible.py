"""Arithmetic with the same bits on every processor, for what decides over the content of a store or over its splits.

Products of matrices, inverses and determinants come from BLAS and LAPACK, sines from whatever vector library suits the
processor: their last bits differ from one machine to the next. What is added, multiplied, divided or rooted element by
element is rounded once, in the same way everywhere (IEEE 754), and so is what is made of such steps in a fixed order.
Of few atoms and small matrices it costs nothing that shows.
"""

import numpy as np

PARTS = 8  # of a full turn: what is left for the series of `cos_and_sin` is half of one at most, 0.39 radians
NEWTON = 6  # steps of `cube_root`: the error is squared in each
TERMS = 7  # of each series; the next one is below 2e-20


def times(rows: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """rows (..., 3) @ matrices (..., 3, n), the leading dimensions broadcast: (..., n)."""
    x, y, z = (rows[..., k, None] * matrices[..., k, :] for k in range(3))
    return np.asarray(x + y + z)


def determinant(cells: np.ndarray) -> np.ndarray:
    """(..., 3, 3) -> (...)."""
    a, b, c = (cells[..., k, :] for k in range(3))
    return _dot(a, cross(b, c))


def inverse(cells: np.ndarray) -> np.ndarray:
    """(..., 3, 3) of cells that have a volume."""
    a, b, c = (cells[..., k, :] for k in range(3))
    columns = np.stack([cross(b, c), cross(c, a), cross(a, b)], axis=-1)
    return np.asarray(columns / determinant(cells)[..., None, None])


def cube_root(values: np.ndarray) -> np.ndarray:
    """(...) of positive numbers, to about 1e-16 of each: Newton's iteration from a start that is exact arithmetic."""
    mantissa, exponent = np.frexp(values)
    third = -(-exponent // 3)
    a = np.ldexp(mantissa, exponent - 3 * third)  # from 1/8 to 1
    root = 0.4 + 0.6 * a  # within 0.2 of it
    for _ in range(NEWTON):
        root = (root + root + a / (root * root)) / 3
    return np.asarray(np.ldexp(root, third))


def cos_and_sin(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of 2 pi x turns, to about 1e-15: the nearest eighth of a turn by table, the rest by series."""
    eighth = np.round(turns * PARTS)
    x = (turns - eighth / PARTS) * (2 * np.pi)
    square, cos, sin = x * x, np.ones_like(x), np.ones_like(x)
    for k in range(TERMS, 0, -1):
        cos = 1 - cos * square * (1 / ((2 * k - 1) * (2 * k)))
        sin = 1 - sin * square * (1 / ((2 * k) * (2 * k + 1)))
    sin = sin * x
    half = np.sqrt(0.5)
    table = np.array([(1, 0), (half, half), (0, 1), (-half, half), (-1, 0), (-half, -half), (0, -1), (half, -half)])
    near = table[(eighth % PARTS).astype(np.int64)]
    c, s = near[..., 0], near[..., 1]
    return c * cos - s * sin, s * cos + c * sin


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of vectors (..., 3)."""
    i, j = np.array([1, 2, 0]), np.array([2, 0, 1])
    return a[..., i] * b[..., j] - a[..., j] * b[..., i]


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2])
