"""One model, every way to use it: the same energies, forces, stresses and energies of atoms.

`python tests/test_equality.py [WAY ...]` prints the table of docs/use.md: the largest differences from
`Predictor.predict` of one structure. Bars are 1e-10 in float64; 1e-6 eV and 1e-5 eV/angstrom in float32. What a way
does not give is left out.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, diamond100, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress

from lammps_models import crystal, model_file
from multifid.apply.model import Exported, Model, load
from multifid.evaluation.data import Data
from multifid.evaluation.evaluate import evaluate
from multifid.model.aot import export_package
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from test_calculator import KNOWN, model
from test_exported import Uncompiled
from test_lammps import WORKER, home, needs_lammps  # noqa: F401  (home: a fixture)

DTYPES = {"float64": torch.float64, "float32": torch.float32}
# eV, eV/angstrom, eV/angstrom^3, eV
BARS = {
    "float64": {"energy": 1e-10, "forces": 1e-10, "stress": 1e-10, "energies": 1e-10},
    "float32": {"energy": 1e-6, "forces": 1e-5, "stress": 1e-6, "energies": 1e-6},
}
Found = dict[str, np.ndarray]  # energy (), forces (N, 3), stress (3, 3), energies (N,), as far as a way gives them
Answered = Iterator[tuple[str, Found]]  # by structure


def structures() -> dict[str, Atoms]:
    """Of hydrogen, carbon and oxygen; cells are lower triangular, places are what text and stores keep whole."""
    slab = diamond100("C", (2, 2, 3), vacuum=4.0)
    slab.pbc = [True, True, False]
    slab.symbols[-4:] = "O"
    tiny = bulk("C", "diamond", 3.6)  # its vectors are shorter than the cutoff
    tiny.set_cell([[2.6, 0, 0], [1.2, 2.3, 0], [1.1, 0.7, 2.2]], scale_atoms=True)
    tiny.symbols[1] = "O"
    made = {"molecule": molecule("CH3CH2OH"), "slab": slab, "triclinic": crystal(), "tiny": tiny}
    for k, atoms in enumerate(made.values()):
        atoms.rattle(0.05, seed=k)
        atoms.positions = np.round(atoms.positions * 256) / 256
        atoms.set_cell(np.round(atoms.cell.array * 256) / 256)
        atoms.set_constraint()
        atoms.info.clear()
    return made


@dataclass
class Ways:
    """Every way, of one model in one precision. Each gives the structures that it takes."""

    model: Model
    folder: Path

    def calculator(self, compiled: bool | Path = False) -> Answered:
        for name, atoms in structures().items():
            yield name, self._calculated(atoms, self.model.calculator("a", compiled=compiled))

    def moved_calculator(self) -> Answered:
        """Where a list of neighbours with a skin has been used again."""
        for name, atoms in structures().items():
            atoms.calc = self.model.calculator("a")
            end = atoms.positions.copy()
            atoms.positions += np.random.default_rng(0).uniform(-0.1, 0.1, end.shape)
            atoms.get_forces()
            atoms.positions = end
            found = self._calculated(atoms, atoms.calc)
            assert atoms.calc.neighbors.made == 1
            yield name, found

    def batch(self) -> Answered:
        yield from self._predicted(self.model)

    def torch_sim(self) -> Answered:
        from multifid.apply.torch_sim import TorchSimModel

        asked = TorchSimModel(self.model, "a")
        asked._dtype = torch.float64  # of what is handed over; the model computes in its own
        for name, atoms in structures().items():
            state = {
                "positions": torch.from_numpy(atoms.positions), "cell": torch.from_numpy(atoms.cell.array.T)[None],
                "pbc": torch.from_numpy(atoms.pbc), "atomic_numbers": torch.from_numpy(atoms.numbers),
                "system_idx": torch.zeros(len(atoms), dtype=torch.int64),
            }  # fmt: skip
            out = {k: x.numpy() for k, x in asked(state).items()}
            found = {"energy": out["energy"][0], "forces": out["forces"], "energies": out["energies"]}
            yield name, found | ({"stress": out["stress"][0]} if atoms.cell.rank == 3 else {})

    def openmm(self) -> Answered:
        openmm = pytest.importorskip("openmm", minversion="8.6", reason="OpenMM is not installed")
        from openmm import unit

        from multifid.apply.openmm import openmm_force

        mole = (unit.AVOGADRO_CONSTANT_NA * unit.elementary_charge * unit.volt).value_in_unit(unit.kilojoule_per_mole)
        platform = openmm.Platform.getPlatformByName("Reference")
        for name, atoms in structures().items():
            if atoms.pbc.any() != atoms.pbc.all():
                continue
            system = openmm.System()
            for mass in atoms.get_masses():
                system.addParticle(mass)
            if atoms.pbc.all():
                system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
            system.addForce(openmm_force(self.model, atoms, "a"))
            context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
            context.setPositions(atoms.positions / 10)
            state = context.getState(energy=True, forces=True)
            energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) / mole
            forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.angstrom) / mole
            yield name, {"energy": energy, "forces": np.array(forces)}

    def evaluated(self) -> Answered:
        """What `multifid evaluate` compares with labels: predictions on a store."""
        given = structures()
        for name, atoms in given.items():
            atoms.info["config"] = name
            atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)))
        path = self.folder / f"{self.model.dtype}"
        ase.io.write(f"{path}.xyz", list(given.values()))
        prepare("extxyz", [Path(f"{path}.xyz")], path, fractions=(1, 0, 0), trust_units=True, progress=False)
        store, by_size = Store(path), {len(atoms): name for name, atoms in given.items()}

        def collect(prediction, batch, _):
            for k, (energy, n) in enumerate(zip(prediction.energy, batch.natoms, strict=True)):
                mine = batch.structure == k
                references = sum(KNOWN[int(z)] for z in batch.numbers[mine])
                seen.append((by_size[int(n)], {"energy": energy + references, "forces": prediction.forces[mine]}))

        seen: list[tuple[str, Found]] = []
        evaluate(self.model, "m", Data("a", store, store.tasks[0]), "train", collect=collect)
        yield from seen

    def exported(self, compiled: bool = True) -> Answered:
        if not compiled:
            exported = Exported(Uncompiled(self.model))
        else:
            path = self.folder / f"{self.model.dtype}.pt2"
            export_package(self.model, "a", path)
            exported = load(path)
        yield from self._predicted(exported)

    def compiled_calculator(self) -> Answered:
        yield from self.calculator(compiled=self.folder / "cache")

    def in_lammps(self, way: str, ranks: int) -> Answered:
        said = json.loads((self.folder / f"equal-{ranks}.json").read_text())[way]
        for name, of_dtypes in said.items():
            one = of_dtypes[str(self.model.dtype).removeprefix("torch.")]
            found = {"energy": one["energy"], "forces": np.array(one["forces"]), "energies": np.ravel(one["energies"])}
            periodic = structures()[name].cell.rank == 3
            yield name, found | ({"stress": voigt_6_to_full_3x3_stress(one["virial"])} if periodic else {})

    def _predicted(self, asked) -> Answered:
        out = asked.predict(list(structures().values()), "a")
        for k, (name, atoms) in enumerate(structures().items()):
            found = {"energy": out.energy[k], "forces": out.forces[k], "energies": out.energies[k]}
            yield name, found | ({"stress": out.stress[k]} if atoms.cell.rank == 3 else {})

    def _calculated(self, atoms, calculator) -> Found:
        atoms.calc = calculator
        stress = {"stress": atoms.get_stress(voigt=False)} if atoms.cell.rank == 3 else {}
        return stress | {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "energies": atoms.get_potential_energies(),
        }


def differences(trained: Model, answered: Answered) -> dict[str, float]:
    """The largest from what the predictor says of each structure alone, by quantity."""
    largest: dict[str, float] = {}
    seen = set()
    for name, found in answered:
        out = trained.predict(structures()[name], "a")
        seen.add(name)
        for what, value in found.items():
            expected = getattr(out, what)[0] if what == "energy" else getattr(out, what)
            apart = np.abs(np.asarray(value) - expected)
            assert apart.shape == np.shape(expected) and np.isfinite(apart).all(), (name, what)
            largest[what] = max(largest.get(what, 0.0), float(apart.max()))
    assert seen >= {"molecule", "triclinic", "tiny"}
    return largest


def assert_equal(trained: Model, answered: Answered) -> dict[str, float]:
    found = differences(trained, answered)
    bars = BARS[str(trained.dtype).removeprefix("torch.")]
    assert {what: x for what, x in found.items() if not x <= bars[what]} == {}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    model_file(folder / "a.mfid")
    return folder


def run_lammps(home, folder: Path, ranks: int) -> None:  # noqa: F811
    """Let LAMMPS answer for all structures."""
    asked = {}
    for name, atoms in structures().items():
        box = atoms.cell.array
        if not atoms.pbc.any():  # LAMMPS wants a box around what has none
            box = np.eye(3) * 20
            atoms.positions += 10 - atoms.positions.mean(axis=0)
        asked[name] = {"symbols": list(atoms.symbols), "positions": atoms.positions.tolist()}
        asked[name] |= {"box": box.tolist(), "pbc": atoms.pbc.tolist()}
    (folder / "structures.json").write_text(json.dumps(asked))
    worker = WORKER.with_name("equality_worker.py")
    command = ["mpiexec", "-n", str(ranks), sys.executable, str(worker), str(folder), str(folder / "structures.json")]
    done = subprocess.run(command, env=home, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


HERE = {  # by what the table calls them
    "ASE calculator": Ways.calculator,
    "the same, neighbours of a step before": Ways.moved_calculator,
    "predict, all at once": Ways.batch,
    "evaluate": Ways.evaluated,
    "torch-sim": Ways.torch_sim,
    "OpenMM": Ways.openmm,
}
COMPILED = {"exported code": Ways.exported, "compiled calculator": Ways.compiled_calculator}
LAMMPS = {"LAMMPS, pair_style": "pair_style", "LAMMPS, ML-IAP": "ml_iap", "LAMMPS, fix external": "fix_external"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_ways_that_need_no_compiler_give_the_same(dtype, folder):
    ways = Ways(model(dtype=DTYPES[dtype]), folder)
    for way in HERE.values():
        assert_equal(ways.model, way(ways))
    assert_equal(ways.model, ways.exported(compiled=False))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_code_gives_the_same(dtype, folder):
    ways = Ways(model(dtype=DTYPES[dtype]), folder)
    for way in COMPILED.values():
        assert_equal(ways.model, way(ways))


@needs_lammps
@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_lammps_gives_the_same(ranks, home, folder):  # noqa: F811
    run_lammps(home, folder, ranks)
    for dtype in DTYPES.values():
        ways = Ways(model(dtype=dtype), folder)
        for way in LAMMPS.values():
            assert_equal(ways.model, ways.in_lammps(way, ranks))


def main(names: list[str]) -> None:
    """The table, in which LAMMPS runs on two ranks."""
    known = HERE | COMPILED | {name: lambda ways, of=of: ways.in_lammps(of, 2) for name, of in LAMMPS.items()}
    print("| | " + " | ".join(f"{what}, {dtype}" for dtype in DTYPES for what in BARS[dtype]) + " |")
    print("|---|" + "---:|" * 8)
    with tempfile.TemporaryDirectory() as place:
        folder, asked = Path(place), names or list(known)
        model_file(folder / "a.mfid")
        if set(asked) & set(LAMMPS):
            paths = os.pathsep.join([os.environ["PYTHONPATH"], str(WORKER.parent), str(WORKER.parent / "elsewhere")])
            run_lammps(os.environ | {"PYTHONPATH": paths}, folder, 2)
        for name in asked:
            row = []
            for dtype, bars in BARS.items():
                ways = Ways(model(dtype=DTYPES[dtype]), folder)
                found = assert_equal(ways.model, known[name](ways))
                row += [f"{found[what]:.0e}" if what in found else "" for what in bars]
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
