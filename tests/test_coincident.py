"""Atoms at one place: found in columns as all pairs of all images find them."""

import numpy as np
import pytest

from multifid.quality.coincident import COINCIDENT, LARGEST, coincident
from multifid.store.block import Block


def plain(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> bool:
    """Every pair, with the nearest images along each cell vector."""
    if pbc.any():
        full = cell.copy()
        full[~pbc] = np.linalg.svd(cell[pbc])[2][int(pbc.sum()) :]
        apart = (positions[:, None] - positions[None]) @ np.linalg.inv(full)
        apart = (apart - np.round(apart) * pbc) @ full
    else:
        apart = positions[:, None] - positions[None]
    distance = np.linalg.norm(apart, axis=2) + np.eye(len(positions))
    return bool(distance.min() < COINCIDENT)


def structure(random: np.random.Generator, atoms: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, cell and pbc; often on symmetric places, now and then with an atom twice, some images away."""
    cell = np.diag(random.uniform(2, 12, 3)) if random.random() < 0.3 else random.normal(0, 6, (3, 3))
    pbc = {"molecule": np.zeros(3, bool), "slab": random.permutation([True, True, False]), "crystal": np.ones(3, bool)}[
        kind
    ]
    grid = random.random() < 0.5
    fractional = random.integers(0, 24, (atoms, 3)) / 24 if grid else random.random((atoms, 3))
    if atoms > 1 and random.random() < 0.4:
        fractional[-1] = fractional[0] + random.integers(-3, 4, 3) * pbc
    moved = random.normal(0, 10 ** random.uniform(-7, -2), (atoms, 3))
    return fractional @ cell + moved, np.where(pbc[:, None], cell, 0.0), pbc


@pytest.mark.parametrize("kinds", [["molecule"], ["slab"], ["crystal"], ["molecule", "slab", "crystal"]])
def test_coincident_atoms_are_found_as_all_pairs_find_them(kinds):
    random = np.random.default_rng(len(kinds[0]))
    natoms = [*random.integers(1, 40, 400), LARGEST + 1, LARGEST + 1, LARGEST + 1]
    made = [structure(random, int(n), str(random.choice(kinds))) for n in natoms]
    positions, cells, pbc = zip(*made, strict=True)
    columns = {"natoms": np.array(natoms), "positions": np.concatenate(positions)}
    if kinds != ["molecule"]:
        columns |= {"cell": np.array(cells), "pbc": np.array(pbc)}
    expected = [plain(*one) for one in made]
    assert 40 < sum(expected) < 300
    np.testing.assert_array_equal(coincident(Block(columns, [""] * len(natoms))), expected)
