"""Models and crystals for the tests of what runs in LAMMPS."""

from pathlib import Path

import numpy as np
from ase import Atoms

from multifid import __version__
from multifid.model.model_file import write_model_file
from multifid.model.saved import SCHEMA
from test_calculator import model

SYMBOLS = ["H", "C", "O"]


def model_file(path: Path, **keys) -> Path:
    """A file with a model of tasks a and b (see `test_calculator.model`)."""
    made = model(**keys)
    config = made.potential.config
    about = {"schema": SCHEMA, "multifid": __version__, "architecture": config.model_dump(), "branches": ["a", "b"]}
    write_model_file(made.potential, {**about, **made.description}, path)
    return path


def crystal(side: float = 9.0, atoms: int = 24) -> Atoms:
    """Atoms of three elements on a rattled grid of a triclinic cell, as LAMMPS wants it: lower triangular."""
    random = np.random.default_rng(5)
    cell = np.array([[side, 0, 0], [0.2 * side, 0.9 * side, 0], [-0.15 * side, 0.25 * side, 0.8 * side]])
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)[:atoms] / 3.0
    places = grid + random.uniform(-0.04, 0.04, grid.shape) + 0.1
    symbols = [SYMBOLS[k] for k in random.integers(0, 3, atoms)]
    return Atoms(symbols, scaled_positions=places, cell=cell, pbc=True)
