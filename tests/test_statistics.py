"""Statistics of a store with planted content, against plain numpy over the structures that went in."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from multifid.preparation.prepare import prepare
from multifid.store.statistics import Range, statistics
from multifid.store.store import Store
from multifid.store.writer import StoreWriter
from multifid.structures.structure import SPLITS, Labels, Structure
from multifid.workflows.stats import _percent, stats, tables

REFERENCES = {1: -13.6, 6: -1030.0, 8: -2042.0, 26: -3455.0}  # none for gold


def _structures(n: int = 37) -> list[Structure]:
    rng = np.random.default_rng(0)
    made = []
    for k in range(n):
        natoms = int(rng.integers(1, 9))
        numbers = rng.choice([1, 6, 8] if k % 3 else [26, 8], natoms)
        if k == 5:
            numbers[0] = 79
        energy = sum(REFERENCES.get(int(z), -500.0) for z in numbers) + rng.normal() * natoms
        forces = rng.normal(size=(natoms, 3))
        periodic = k % 3 == 0
        first = Labels(
            energy if k % 4 else np.nan, forces if k % 5 else None, np.eye(3) * 0.01 * k if periodic else None
        )
        made.append(
            Structure(
                numbers=numbers,
                positions=rng.normal(size=(natoms, 3)) * 3,
                labels={"first": first} if k % 2 else {"first": first, "second": Labels(energy + 1.0)},
                relative=str(k),
                source_id=str(k),
                cell=np.diag([2.0, 3.0, 4.0 + k]) if periodic else None,
                pbc=np.ones(3, bool) if periodic else None,
                charge=1 if k == 7 else 0,
                spin=2 if k in (7, 8) else 1,
            )
        )
    return made


def _task() -> dict:
    references = {str(z): e for z, e in REFERENCES.items()}
    fit = {"references": references, "undetermined": [[6, 8]], "rank": 3, "residual": 12.5}
    return {"level_of_theory": "planted", "energy_kind": "total", "labels": {}, **fit, "scale": 1.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "planted"
    structures = _structures()
    with StoreWriter(path) as writer:
        for structure in structures:
            writer.append(structure)
        writer.seal()
        source = {"format": "none", "files": [{"name": "x", "bytes": 0, "xxh3": "", "structures": len(structures)}]}
        manifest = {
            "source": source,
            "tasks": {"first": _task(), "second": _task()},
            "splits": {},
            "edges_per_atom": {},
        }
        writer.commit((np.arange(len(structures)) % 4).astype(np.uint8), manifest)
    return path


@pytest.mark.parametrize("chunk", [1, 7, 40, 10**6])
def test_statistics_equal_numpy_over_the_structures_whatever_the_chunk(store, chunk):
    found, given = statistics(Store(store), chunk), _structures()
    natoms = np.array([len(s.numbers) for s in given])
    assert (found.structures, found.atoms, found.name) == (37, natoms.sum(), "planted")
    assert found.natoms == (natoms.min(), np.median(natoms), natoms.max())
    assert found.splits == {split: len(range(code, 37, 4)) for code, split in enumerate(SPLITS)}
    numbers = np.concatenate([s.numbers for s in given])
    assert found.elements == {z: int((numbers == z).sum()) for z in (1, 6, 8, 26, 79)}
    assert found.holders == {z: sum(z in s.numbers for s in given) for z in (1, 6, 8, 26, 79)}
    assert (found.periodic, found.charged, found.open_shell) == (13, 1, 2)
    volume = np.array([6 * (4.0 + k) / natoms[k] for k in range(0, 37, 3)])
    assert (found.volume.count, found.volume.minimum, found.volume.maximum, found.volume.mean) == pytest.approx(
        (13, volume.min(), volume.max(), volume.mean())
    )


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_label_ranges_equal_numpy(store, chunk):
    task, given = statistics(Store(store), chunk).tasks["first"], _structures()
    labels = [s.labels["first"] for s in given]
    energy = [
        (y.energy - sum(REFERENCES[int(z)] for z in s.numbers)) / len(s.numbers)
        for s, y in zip(given, labels, strict=True)
        if not np.isnan(y.energy) and 79 not in s.numbers
    ]
    forces = np.concatenate([y.forces for y in labels if y.forces is not None]).astype(np.float32).astype(float)
    assert task.labels == {"energy": 37 - 10, "forces": 37 - 8, "stress": 13}
    assert task.unreferenced == 1
    assert task.energy.count == len(energy) == 26
    assert (task.energy.minimum, task.energy.maximum) == pytest.approx((min(energy), max(energy)), abs=1e-9)
    assert (task.energy.mean, task.energy.deviation) == pytest.approx((np.mean(energy), np.std(energy)), abs=1e-9)
    assert task.forces.rms == pytest.approx(np.sqrt(np.mean(forces**2)))
    assert task.force.maximum == pytest.approx(np.linalg.norm(forces, axis=1).max())
    stress = np.concatenate([y.stress.ravel() for y in labels if y.stress is not None])
    assert (task.stress.rms, task.stress.maximum) == pytest.approx((np.sqrt(np.mean(stress**2)), 0.36))


def test_coverage_is_of_all_structures_and_a_task_may_lack_a_kind_of_label(store):
    found = statistics(Store(store))
    assert found.coverage("second", "energy") == pytest.approx(19 / 37)
    assert found.tasks["second"].labels == {"energy": 19, "forces": 0, "stress": 0}
    assert found.tasks["second"].forces.count == 0


def test_the_spread_of_large_numbers_is_not_lost():
    """Energies near -45,000 eV with a spread of 1 meV: sums of squares in float64 would leave no digit of it."""
    values = -45_000.0 + 1e-3 * np.random.default_rng(0).normal(size=1000)
    spread = Range()
    for part in np.array_split(values, 13):
        spread.add(part)
    assert spread.deviation == pytest.approx(np.std(values - values.mean()), rel=1e-6)
    assert Range().deviation == 0.0


def test_the_command_prints_every_store_and_draws_the_figure(store, tmp_path):
    text = io.StringIO()
    stats([store, store], tmp_path / "figures" / "elements.png", Console(file=text, width=250))
    printed = text.getvalue()
    assert printed.count("planted") >= 3 * 2 + 3 * 4  # a line per store in three tables, a line per task in three
    for expected in ("3 of 4", "12.5", "C O", "H C O Fe Au", "27 (73.0 %)"):
        assert expected in printed
    assert (tmp_path / "figures" / "elements.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["elements.png"]


def test_numbers_in_the_tables_are_those_of_the_statistics(store):
    found = statistics(Store(store))
    text = io.StringIO()
    console = Console(file=text, width=250)
    for table in tables([found]):
        console.print(table)
    task = found.tasks["first"]
    assert f"{1000 * task.energy.deviation:.1f}" in text.getvalue()
    assert f"{task.forces.rms:.3g} / {task.force.maximum:.3g}" in text.getvalue()


def test_no_number_is_cut_in_a_narrow_terminal(store):
    found = statistics(Store(store))
    found.structures, found.atoms, found.name = 24_000_000, 1_234_567_890, "a-store-with-quite-a-long-name"
    found.splits = dict.fromkeys(SPLITS, 6_000_000)
    text = io.StringIO()
    console = Console(file=text, width=80)
    for table in tables([found]):
        console.print(table)
    assert "…" not in text.getvalue() and "1,234,567,890" in text.getvalue()


def test_coverage_is_not_rounded_to_all_or_nothing():
    assert [_percent(x) for x in (0.0, 1e-7, 0.5, 1 - 1e-7, 1.0)] == ["0 %", "0.1 %", "50.0 %", "99.9 %", "100 %"]


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "ani1x" / "physicsml_tests_ani1x.h5"


@pytest.mark.skipif(not REAL.exists(), reason="the published ANI-1x sample is not at ../shared/data")
def test_statistics_of_published_ani1x_equal_the_file(tmp_path):
    import h5py

    found = statistics(prepare("ani1x", [REAL], tmp_path / "ani1x", progress=False))
    (task,) = found.tasks.values()
    with h5py.File(REAL) as file:
        groups = list(file.values())
        forces = [g["wb97x_dz.forces"][()].reshape(-1, 3).astype(float) * 27.211386245988 for g in groups]
        atoms = sum(g["coordinates"].shape[0] * g["coordinates"].shape[1] for g in groups)
        hydrogen = sum(g["coordinates"].shape[0] * int((g["atomic_numbers"][()] == 1).sum()) for g in groups)
    assert (found.structures, found.atoms, found.elements[1]) == (96, atoms, hydrogen)
    assert task.labels == {"energy": 96, "forces": 96, "stress": 0} and found.periodic == 0
    every = np.concatenate(forces)
    assert task.forces.rms == pytest.approx(np.sqrt(np.mean(every**2)), rel=1e-5)
    assert task.force.maximum == pytest.approx(np.linalg.norm(every, axis=1).max(), rel=1e-5)
    assert task.energy.deviation < 1.0  # eV/atom; totals differ by tens of eV/atom between formulas


def test_a_store_is_needed():
    with pytest.raises(ValueError, match="at least one store"):
        stats([])
