"""Which structures hold two atoms at one place, periodic images included.

No model can tell such atoms apart, and forces between them are undefined. Looked for in columns, structures of equal
size together:

* molecules: atoms that are close are close in every direction, so their projections on one line are; sorted, few pairs
  of neighbours on the line remain to be measured.
* crystals: on a line half of the atoms of a symmetric cell coincide, so all pairs are compared, along the first cell
  vector first.
"""

import numpy as np

from multifid.data.block import Block

COINCIDENT = 1e-3  # angstrom
LINE = np.array([0.5471, 0.7236, 0.4210]) / np.linalg.norm([0.5471, 0.7236, 0.4210])  # along no usual bond
MOST_PAIRS = 1 << 20  # compared at once
LARGEST = 512  # atoms; larger structures go through a tree, one by one


def coincident(block: Block) -> np.ndarray:
    """(structures,) bool: whether two atoms are closer than COINCIDENT; positions must be finite, cells have volume."""
    found = np.zeros(len(block), bool)
    first, positions = block.first_atoms(), block.columns["positions"]
    pbc = block.columns.get("pbc")
    periodic = np.zeros(len(block), bool) if pbc is None else pbc.any(axis=1)
    for n in np.unique(block.natoms).tolist():
        if n == 1:
            continue
        for rows in _portions(np.flatnonzero((block.natoms == n) & ~periodic), n):
            found[rows] = _molecules(positions[first[rows, None] + np.arange(n)].astype(np.float64))
        for rows in _portions(np.flatnonzero((block.natoms == n) & periodic), n):
            places = positions[first[rows, None] + np.arange(n)].astype(np.float64)
            found[rows] = _crystals(places, block.columns["cell"][rows], block.columns["pbc"][rows])
    return found


def _portions(rows: np.ndarray, n: int) -> list[np.ndarray]:
    size = max(1, MOST_PAIRS // n**2)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _molecules(positions: np.ndarray) -> np.ndarray:
    """positions (S, n, 3) -> (S,)."""
    on_line = np.sort(positions @ LINE, axis=1)
    suspect = (np.diff(on_line, axis=1) < COINCIDENT).any(axis=1)
    found = np.zeros(len(positions), bool)
    n = positions.shape[1]
    for s in np.flatnonzero(suspect) if n > LARGEST else ():
        found[s] = _by_tree(positions[s], None)
    if n <= LARGEST and suspect.any():
        x = positions[suspect]
        close = _far_triangle(n)
        near = np.ones((len(x), len(close[0])), bool)
        for axis in range(3):
            near &= np.abs(x[:, close[0], axis] - x[:, close[1], axis]) < COINCIDENT
        found[suspect] = _measured(x, close, near, None)
    return found


def _crystals(positions: np.ndarray, cells: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """positions (S, n, 3), cells (S, 3, 3), pbc (S, 3) -> (S,)."""
    cells = np.array([c if p.all() else _filled(c, p) for c, p in zip(cells, pbc, strict=True)])
    inverse = np.linalg.inv(cells)
    fractional = positions @ inverse
    n = positions.shape[1]
    if n > LARGEST:
        return np.array([_by_tree(f, (c, p)) for f, c, p in zip(fractional, cells, pbc, strict=True)])
    tolerance = COINCIDENT * np.linalg.norm(inverse, axis=1)  # |f_k| <= |f @ cell| |column k of the inverse|
    i, j = _far_triangle(n)
    apart = fractional[:, i, 0] - fractional[:, j, 0]
    apart -= np.round(apart) * pbc[:, None, 0]
    near = np.abs(apart) <= tolerance[:, None, 0]
    for axis in (1, 2):
        s, pair = np.nonzero(near)
        apart = fractional[s, i[pair], axis] - fractional[s, j[pair], axis]
        apart -= np.round(apart) * pbc[s, axis]
        near[s, pair] = np.abs(apart) <= tolerance[s, axis]
    return _measured(fractional, (i, j), near, (cells, pbc))


def _far_triangle(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(n, 1)


def _measured(
    x: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], near: np.ndarray, lattice: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """(S,) whether one of the pairs that may be near (S, pairs) is; x is fractional where a lattice is given."""
    s, pair = np.nonzero(near)
    apart = x[s, pairs[0][pair]] - x[s, pairs[1][pair]]
    if lattice is not None:
        cells, pbc = lattice
        apart = np.einsum("pk,pkl->pl", apart - np.round(apart) * pbc[s], cells[s])
    found = np.zeros(len(x), bool)
    found[s[np.linalg.norm(apart, axis=1) < COINCIDENT]] = True
    return found


def _filled(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Rows that are not periodic are replaced by unit vectors at right angles to those that are."""
    full = cell.copy()
    full[~pbc] = np.linalg.svd(cell[pbc])[2][int(pbc.sum()) :]
    return full


def _by_tree(x: np.ndarray, lattice: tuple[np.ndarray, np.ndarray] | None) -> bool:
    """One large structure; x (n, 3) is fractional where (cell, pbc) is given."""
    from scipy.spatial import cKDTree  # a tenth of a second to import, and rarely needed

    if lattice is None:
        return bool(cKDTree(x).query_pairs(COINCIDENT))
    cell, pbc = lattice
    wrapped = x.copy()
    wrapped[:, pbc] %= 1.0
    wrapped[:, pbc] = np.where(wrapped[:, pbc] == 1.0, 0.0, wrapped[:, pbc])
    wrapped[:, ~pbc] -= wrapped[:, ~pbc].min(axis=0)
    reach = min(COINCIDENT * float(np.linalg.norm(np.linalg.inv(cell), 2)), 0.5)
    pairs = cKDTree(wrapped, boxsize=np.where(pbc, 1.0, 0.0)).query_pairs(reach, output_type="ndarray")
    apart = wrapped[pairs[:, 0]] - wrapped[pairs[:, 1]]
    apart[:, pbc] -= np.round(apart[:, pbc])
    return bool((np.linalg.norm(apart @ cell, axis=1) < COINCIDENT).any())
