"""Which structures hold two atoms at one place, periodic images included.

No model can tell such atoms apart, and forces between them are undefined. Looked for in columns:

* molecules of equal size together: atoms that are close are close in every direction, so their projections on one line
  are; sorted, few pairs of neighbours on the line remain to be measured.
* crystals of all sizes together: on a line half of the atoms of a symmetric cell coincide, so atoms are put into boxes
  of fractional coordinates; those of one box remain to be measured. An atom that is as near to a wall of its box as
  another may be in the box behind it is in both.
"""

from collections.abc import Iterator

import numpy as np

from multifid.store.block import Block
from multifid.structures.cells import completed
from multifid.structures.reproducible import inverse, times

COINCIDENT = 1e-3  # angstrom
SUSPECT = COINCIDENT + 1e-6  # angstrom: pairs that are looked at, found with rounding; distances decide
LINE = np.array([0.5471, 0.7235, 0.4210])  # a little shorter than one, along no usual bond
WALLS = np.array([0.0618, 0.0414, 0.0732])  # of boxes, moved away from where symmetric cells have their atoms
MOST_PAIRS = 1 << 20  # compared at once
LARGEST = 512  # atoms; larger structures go through a tree, one by one


def coincident(block: Block) -> np.ndarray:
    """(structures,) bool: whether two atoms are closer than COINCIDENT; positions must be finite, cells have volume."""
    found = np.zeros(len(block), bool)
    pbc = block.columns.get("pbc")
    periodic = np.zeros(len(block), bool) if pbc is None else np.any(pbc, axis=1)
    first, positions = block.first_atoms(), block.columns["positions"]
    for n in np.unique(block.natoms[~periodic]).tolist():
        if n == 1:
            continue
        for rows in _portions(np.flatnonzero((block.natoms == n) & ~periodic), n):
            found[rows] = _molecules(positions[first[rows, None] + np.arange(n)].astype(np.float64))
    if periodic.any():
        found[periodic] = _crystals(block.take(periodic))
    return found


def _portions(rows: np.ndarray, n: int) -> list[np.ndarray]:
    size = max(1, MOST_PAIRS // n**2)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _molecules(positions: np.ndarray) -> np.ndarray:
    """positions (S, n, 3) -> (S,)."""
    on_line = np.sort(positions @ LINE, axis=1)
    suspect = (np.diff(on_line, axis=1) < SUSPECT).any(axis=1)
    found = np.zeros(len(positions), bool)
    n = positions.shape[1]
    for s in np.flatnonzero(suspect) if n > LARGEST else ():
        found[s] = _by_tree(positions[s], None)
    if n <= LARGEST and suspect.any():
        x = positions[suspect]
        i, j = np.triu_indices(n, 1)
        near = np.ones((len(x), len(i)), bool)
        for axis in range(3):
            near &= np.abs(x[:, i, axis] - x[:, j, axis]) < COINCIDENT
        which, pair = np.nonzero(near)
        close = np.linalg.norm(x[which, i[pair]] - x[which, j[pair]], axis=1) < COINCIDENT
        found[np.flatnonzero(suspect)[which[close]]] = True
    return found


def _crystals(block: Block) -> np.ndarray:
    """(structures,) bool, of periodic structures."""
    pbc = block.columns["pbc"]
    cells = completed(block.columns["cell"].astype(np.float64), pbc)
    inverses = inverse(cells)
    owner = np.repeat(np.arange(len(block)), block.natoms)
    positions = block.columns["positions"].astype(np.float64)
    fractional = times(positions, inverses[owner])
    found = np.zeros(len(block), bool)
    first = block.first_atoms()
    for s in np.flatnonzero(block.natoms > LARGEST):
        atoms = slice(first[s], first[s] + block.natoms[s])
        found[s] = _by_tree(positions[atoms], (fractional[atoms], cells[s], pbc[s]))
    small = (block.natoms <= LARGEST)[owner]
    tolerance = SUSPECT * np.linalg.norm(inverses, axis=1)  # |f_k| <= |f @ cell| |column k of the inverse|
    boxes = np.minimum(2 * np.cbrt(block.natoms)[:, None], 0.25 / tolerance).astype(np.int64).clip(1)
    positions, fractional, owner = positions[small], fractional[small], owner[small]
    for i, j in _in_one_box(fractional, owner, boxes, tolerance):
        wraps = np.round(fractional[i] - fractional[j]) * pbc[owner[i]]
        apart = positions[i] - positions[j] - times(wraps, cells[owner[i]])
        close = np.linalg.norm(apart, axis=1) < COINCIDENT
        found[owner[i[close]]] = True
    return found


def _in_one_box(
    fractional: np.ndarray, owner: np.ndarray, boxes: np.ndarray, tolerance: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, j) of atoms of one structure, some at a time: all that differ by `tolerance` at most, and some more.

    fractional (A, 3), compared modulo one; owner (A,) the structure of each atom, tolerance (S, 3), boxes (S, 3) how
    many there are along each axis: at most a quarter of 1 / tolerance.
    """
    place = fractional + WALLS
    place = (place - np.floor(place)) * boxes[owner]
    box = place.astype(np.int64)
    into = place - box
    margin = (tolerance * boxes * (1 + 1e-6) + 1e-9)[owner]
    atom = np.arange(len(owner))
    for axis in range(3):
        before, behind = into[atom, axis] < margin[atom, axis], into[atom, axis] > 1 - margin[atom, axis]
        step = np.array([axis == k for k in range(3)])
        box = np.concatenate([box, box[before] - step, box[behind] + step])
        atom = np.concatenate([atom, atom[before], atom[behind]])
    box %= boxes[owner[atom]]
    along = int(boxes.max(initial=1))
    key = ((owner[atom] * along + box[:, 0]) * along + box[:, 1]) * along + box[:, 2]
    order = np.argsort(key)
    key, atom = key[order], atom[order]
    for apart in range(1, len(key)):
        same = np.flatnonzero(key[apart:] == key[:-apart])
        if not len(same):
            return
        i, j = atom[same], atom[same + apart]
        yield i[i != j], j[i != j]


def _by_tree(positions: np.ndarray, lattice: tuple[np.ndarray, np.ndarray, np.ndarray] | None) -> bool:
    """One large structure, positions (n, 3); with a lattice (fractional coordinates (n, 3), cell, pbc) or without."""
    from scipy.spatial import cKDTree  # a tenth of a second to import, and rarely needed

    if lattice is None:
        i, j = cKDTree(positions).query_pairs(SUSPECT, output_type="ndarray").T
        return bool((np.linalg.norm(positions[i] - positions[j], axis=1) < COINCIDENT).any())
    x, cell, pbc = lattice
    wrapped = x.copy()
    wrapped[:, pbc] %= 1.0
    wrapped[:, pbc] = np.where(wrapped[:, pbc] == 1.0, 0.0, wrapped[:, pbc])
    wrapped[:, ~pbc] -= wrapped[:, ~pbc].min(axis=0)
    reach = min(SUSPECT * float(np.linalg.norm(np.linalg.inv(cell), 2)), 0.5)
    i, j = cKDTree(wrapped, boxsize=np.where(pbc, 1.0, 0.0)).query_pairs(reach, output_type="ndarray").T
    apart = positions[i] - positions[j] - times(np.round(x[i] - x[j]) * pbc, cell)
    return bool((np.linalg.norm(apart, axis=1) < COINCIDENT).any())
