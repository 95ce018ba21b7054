"""The speed of every way to use a model beside its bare pass, on one thread, at 20, 200 and 2,000 atoms of rock salt.

    python benchmarks/calculator.py [--atoms 20 200 2000] [--ways calculator compiled ...] [--pairs 20] [--cache DIR]

bare: energies and forces of a batch that is at hand. A step of each way: every atom has flown on for a femtosecond at
room temperature, then energy and forces are there; neighbours, checks and copies included. predict, exported and
torch-sim make their list of neighbours anew at each step; the calculator, OpenMM and LAMMPS have a skin. LAMMPS and
OpenMM move the atoms themselves (NVE, a femtosecond). Processor time in pairs of a bare pass and a step; medians, and
the median ratio. compiled and exported compile first, a minute or more (compiled: where the cache has no code). A way
whose library is not installed (or, for LAMMPS, whose plugin is not built) is left out and named.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from platform import processor as machine
from statistics import median
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

import multifid
from multifid.apply.model import Model
from multifid.graphs.neighbors import neighbor_list
from multifid.graphs.origin import near_origin
from multifid.model.model_file import write_model_file
from multifid.model.potential import ModelConfig, Potential
from multifid.model.predictor import batch_with
from multifid.model.saved import SCHEMA
from multifid.structures.atoms import pack_atoms

STEP = 0.0033  # angstrom along each axis, in a femtosecond: sodium at 300 K
PAIRS = {20: 4.0, 200: 1.0}  # times --pairs; a quarter of them for more atoms
Step = Callable[[], object]


def untrained(cutoff: float = 5.0, encoder: str = "egnn", forces: str = "conservative") -> Model:
    """A model of the size of `make demo`'s, its weights drawn."""
    config = ModelConfig(
        cutoff=cutoff,
        encoder={"name": encoder, "layers": 3, "hidden": 64} | ({"vectors": 8} if encoder == "egnn" else {}),
        branch={"hidden": [64, 64], "forces": forces},
    )
    potential = Potential(config, ["salt"], {"salt": "salt"}, seed=0)
    about = {"branch": "salt", "references": {"11": 0.0, "17": 0.0}, "scale": 1.0, "elements": [11, 17]}
    return Model(potential, {"cutoff": cutoff, "tasks": {"salt": about}})


def crystal(atoms: int) -> Atoms:
    """So many atoms of rock salt in an orthogonal box, four times a product of whole numbers."""
    side = round((atoms / 4) ** (1 / 3))
    repeats = {20: (1, 1, 5), 200: (5, 5, 2), 2000: (10, 10, 5)}.get(atoms, (side, side, side))
    made = bulk("NaCl", "rocksalt", 5.6, orthorhombic=True).repeat(repeats)
    made.rattle(0.05, seed=0)
    return made


def spent(work: Step) -> float:
    """Seconds of processor time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def bare(model: Model, atoms: Atoms) -> Step:
    """The pass alone."""
    home = near_origin(pack_atoms([atoms]))
    batch = batch_with(home, *neighbor_list(home, model.cutoff), "salt").to(model.device, model.dtype)

    def work() -> None:
        with torch.no_grad():
            model.potential(batch)

    return work


def flying(atoms: Atoms, ask: Step) -> Step:
    """A step in which atoms fly on and something is asked."""
    flight = np.random.default_rng(0).normal(0, STEP, (len(atoms), 3))

    def work() -> None:
        atoms.positions += flight
        ask()

    return work


def by_calculator(calculator: Any, atoms: Atoms) -> Step:
    atoms.calc = calculator
    return flying(atoms, atoms.get_forces)


def by_torch_sim(model: Model, atoms: Atoms) -> Step:
    import torch_sim

    from multifid.apply.torch_sim import TorchSimModel

    asked = TorchSimModel(model, "salt", compute_stress=False)
    state = torch_sim.io.atoms_to_state([atoms], model.device, model.dtype)

    def ask() -> None:
        state.positions = torch.as_tensor(atoms.positions, dtype=model.dtype)
        asked(state)

    return flying(atoms, ask)


def by_openmm(model: Model, atoms: Atoms) -> Step:
    import openmm

    from multifid.apply.openmm import openmm_force

    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    system.addForce(openmm_force(model, atoms))
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(atoms.positions / 10)
    context.setVelocitiesToTemperature(300, 0)
    return lambda: context.getIntegrator().step(1)


def lammps_with(atoms: Atoms, pair: str, coeff: str) -> Any:
    """LAMMPS with the atoms in motion; `run` is said by a step."""
    from multifid.apply import lammps

    lmp = lammps.start("-screen", "none", "-log", "none", "-nocite")
    for line in ("units metal", "atom_style atomic", "atom_modify map array", "boundary p p p", "timestep 0.001"):
        lmp.command(line)
    a, b, c = atoms.cell.lengths()
    lmp.command(f"region box block 0 {a:.17g} 0 {b:.17g} 0 {c:.17g} units box")
    lmp.command("create_box 2 box")
    types = [1 + ["Na", "Cl"].index(s) for s in atoms.symbols]
    lmp.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), types, atoms.positions.ravel().tolist())
    for line in ("mass 1 22.99", "mass 2 35.45", f"pair_style {pair}", f"pair_coeff * * {coeff}"):
        lmp.command(line)
    lmp.command("velocity all create 300 1")
    lmp.command("fix move all nve")
    return lmp


def by_pair_style(model: Model, atoms: Atoms, file: Path) -> Step:
    lmp = lammps_with(atoms, f"multifid {file} salt", "Na Cl")
    lmp.command("run 1 post no")
    return lambda: lmp.command("run 1 pre no post no")


def by_fix_external(model: Model, atoms: Atoms) -> Step:
    from multifid.apply.lammps.external import attach

    lmp = lammps_with(atoms, "zero 5.0", "")
    lmp.command("fix model all external pf/callback 1 1")
    lmp.command("fix_modify model energy yes virial yes")
    attach(lmp, "model", model, "salt", ["Na", "Cl"])
    lmp.command("run 1 post no")
    return lambda: lmp.command("run 1 pre no post no")


def ways(model: Model, folder: Path, cache: Path | None) -> dict[str, Callable[[Atoms], Step]]:
    """What makes a step of each way for some atoms."""
    file, code = folder / "salt.mfid", folder / "salt.pt2"
    config = model.potential.config
    about = {"schema": SCHEMA, "multifid": multifid.__version__, "architecture": config.model_dump()}
    write_model_file(model.potential, {**about, "branches": ["salt"], **model.description}, file)

    def exported(atoms: Atoms) -> Step:
        from multifid.model.aot import export_package

        if not code.exists():
            export_package(model, "salt", code)
        loaded = multifid.load(code)
        return flying(atoms, lambda: loaded.predict(atoms, stress=False))

    return {
        "predict": lambda atoms: flying(atoms, lambda: model.predict(atoms, stress=False)),
        "calculator": lambda atoms: by_calculator(model.calculator(), atoms),
        "compiled": lambda atoms: by_calculator(model.calculator(compiled=cache or folder / "cache"), atoms),
        "exported": exported,
        "torch-sim": lambda atoms: by_torch_sim(model, atoms),
        "OpenMM": lambda atoms: by_openmm(model, atoms),
        "pair_style": lambda atoms: by_pair_style(model, atoms, file),
        "fix external": lambda atoms: by_fix_external(model, atoms),
    }


def rows(model: Model, made: dict[str, Callable[[Atoms], Step]], number: int, pairs: int) -> Iterator[str]:
    """Lines of a table for so many atoms."""
    still = bare(model, crystal(number))
    for name, make in made.items():
        atoms = crystal(number)
        try:
            step = make(atoms)
        except (ImportError, OSError) as error:
            yield f"({name} is left out: {error})"
            continue
        for work in (step, still, step):
            work()
        times = [(spent(still), spent(step)) for _ in range(pairs)]
        pass_, way, ratio = (median(x) for x in zip(*((a, b, b / a) for a, b in times), strict=True))
        speed = f"{len(atoms) / way:,.0f}"
        yield f"| {len(atoms):,} | {name} | {pass_ * 1e3:.1f} | {way * 1e3:.1f} | {ratio:.2f} | {speed} |"


def processor() -> str:
    """What the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, nargs="+", default=[20, 200, 2000])
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = untrained()
    with tempfile.TemporaryDirectory() as folder:
        known = ways(model, Path(folder), options.cache)
        strange = set(options.ways or ()) - set(known)
        if strange:
            parser.error(f"--ways: {', '.join(sorted(strange))} must be of {', '.join(known)}")
        made = {name: make for name, make in known.items() if name in (options.ways or known)}
        print(
            f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, one thread, float32"
        )
        print("| atoms | way | bare pass, ms | step, ms | ratio | atoms/s |\n|---:|---|---:|---:|---:|---:|")
        for number in options.atoms:
            for row in rows(model, made, number, max(3, round(options.pairs * PAIRS.get(number, 0.25)))):
                print(row, flush=True)


if __name__ == "__main__":
    main()
