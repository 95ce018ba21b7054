"""The same tests on the CPU, where every day's suite runs one case of each, and on accelerators, where all are run.

`make test-gpu` runs them all. A device that is not there is skipped with a reason.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from multifid.parallel.devices import lacking
from multifid.preparation.prepare import prepare

PLACES = {"cpu": None, "first": 0, "second": 1}


@pytest.fixture(params=PLACES)
def device(request) -> torch.device:
    """The CPU, the first accelerator, the second one: what a test compares with the CPU."""
    index = PLACES[request.param]
    if index is None:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or lacking(accelerator):
        pytest.skip("torch finds no accelerator with float64 here")
    if index >= torch.accelerator.device_count():
        pytest.skip("there is one accelerator here, and this is for a second one")
    return torch.device(accelerator.type, index)


def pytest_collection_modifyitems(items) -> None:
    """On the CPU the first case of each test stands for all in the ordinary suite."""
    seen = set()
    for item in items:
        if Path(__file__).parent in item.path.parents and item.callspec.params["device"] == "cpu":
            if item.originalname in seen:
                item.add_marker(pytest.mark.full)
            seen.add(item.originalname)


@pytest.fixture(scope="session")
def both(stores, tmp_path_factory) -> dict[str, Path]:
    """Molecules, and small skewed crystals whose atoms see images of themselves, with stress (of no theory at all)."""
    folder, random, frames = tmp_path_factory.mktemp("both"), np.random.default_rng(0), []
    for k in range(30):
        cell = np.diag(random.uniform(2.4, 4.0, 3)) + random.normal(0, 0.3, (3, 3))
        atoms = Atoms(["C", "O"][: 1 + k % 2], [[0, 0, 0], cell.sum(axis=0) / 2][: 1 + k % 2], cell=cell, pbc=True)
        stress = random.normal(0, 0.05, 6)
        labels = {"energy": random.normal(-9, 1), "forces": random.normal(0, 1, (len(atoms), 3)), "stress": stress}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    write(folder / "salts.xyz", frames, format="extxyz")
    options = {"task": "salts", "fractions": (0.6, 0.2, 0.2), "trust_units": True, "progress": False}
    prepare("extxyz", [folder / "salts.xyz"], folder / "salts", **options)
    return {"apple": stores["apple"], "salts": folder / "salts"}
