"""Many structures at once against ASE loops with the eager and the compiled calculator: processor time of a step.

    python benchmarks/batched.py [--structures 50] [--steps 10] [--pairs 2] [--cache DIRECTORY]

together: `multifid.apply.lockstep`, an ASE optimizer for each structure and one pass of the model for all, as
`multifid relax` does. torch-sim: FIRE, NVE and Langevin's NPT with `TorchSimModel`, eager and compiled. ASE: FIRE,
velocity Verlet and Berendsen's NPT, one structure after the other, with either calculator. Rock salt of 8 atoms, with
relaxed cells too, and ethanol; float32, one thread, all ways in turn in one process; medians over the turns of times
and of ratios.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch_sim
import torch_sim.optimizers
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.filters import FrechetCellFilter
from ase.md.nptberendsen import NPTBerendsen
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from calculator import spent, untrained

from multifid.apply.calculator import Calculator
from multifid.apply.lockstep import Settings, evaluator, relax_together
from multifid.apply.model import Model
from multifid.apply.torch_sim import TorchSimModel

KINDS = ("ethanol, FIRE", "NaCl, FIRE", "NaCl, FIRE of cells", "ethanol, NVE", "NaCl, NVE", "NaCl, NPT")
WITH_STRESS = ("FIRE of cells", "NPT")
FEMTOSECOND, KELVIN = 1e-3, 300.0  # of torch-sim's ps; a cold start, in which structures keep their neighbours


def drawn(structure: str, number: int) -> list[Atoms]:
    """Structures that are displaced differently."""
    made = []
    for seed in range(number):
        atoms = bulk("NaCl", "rocksalt", 5.6, cubic=True) if structure == "NaCl" else molecule("CH3CH2OH")
        if structure != "NaCl":
            atoms.numbers = np.where(atoms.numbers == 1, 11, 17)  # elements that the model knows
        atoms.rattle(0.05, seed=seed)
        made.append(atoms)
    return made


def together(model: Model, structure: str, process: str, number: int, steps: int) -> None:
    cell = process in WITH_STRESS
    ask = evaluator(model, model.task(None), 50_000, stress=cell)
    relax_together(drawn(structure, number), ask, Settings(1e-9, steps, cell=cell), [None] * number)


def in_torch_sim(model: TorchSimModel, structure: str, process: str, number: int, steps: int) -> None:
    model.compute_stress = process in WITH_STRESS
    state = torch_sim.io.atoms_to_state(drawn(structure, number), torch.device("cpu"), torch.float32)
    dt, kT = torch.tensor(FEMTOSECOND), torch.tensor(units.kB * KELVIN, dtype=torch.float32)
    if process == "NVE":
        start, step = torch_sim.nve(model=model, dt=dt, kT=kT, seed=0)
    elif process == "NPT":
        start, step = torch_sim.npt_langevin(model=model, dt=dt, kT=kT, external_pressure=torch.tensor(0.0), seed=0)
    else:
        fire = torch_sim.frechet_cell_fire if process in WITH_STRESS else torch_sim.optimizers.fire
        start, step = fire(model=model)
    state = start(state)
    for _ in range(steps):
        state = step(state)


def one_by_one(calculator: Calculator, structure: str, process: str, number: int, steps: int) -> None:
    for seed, atoms in enumerate(drawn(structure, number)):
        atoms.calc = calculator
        if process in ("NVE", "NPT"):
            MaxwellBoltzmannDistribution(atoms, temperature_K=KELVIN, rng=np.random.default_rng(seed))
        if process == "NVE":
            VelocityVerlet(atoms, units.fs).run(steps)
        elif process == "NPT":
            NPTBerendsen(atoms, units.fs, temperature_K=KELVIN, pressure_au=0.0, compressibility_au=0.01).run(steps)
        else:
            moved = FrechetCellFilter(atoms) if process in WITH_STRESS else atoms
            FIRE(moved, logfile=None).run(fmax=1e-9, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, size = untrained(), (options.structures, options.steps)
    forms = (False, options.cache or True)
    always: list[tuple[Callable, Any]] = [(one_by_one, model.calculator(compiled=form)) for form in forms]
    always += [(in_torch_sim, TorchSimModel(model, compiled=form)) for form in forms]
    several = ("torch-sim", "compiled torch-sim", "together")
    print("| structures | ASE eager, ms | ASE compiled, ms | " + " | ".join(f"{x}, ms" for x in several), end=" | ")
    print(" | ".join(f"{x} / {y}" for y in several for x in ("eager", "compiled")), "|\n|" + "---|" * 12)
    for kind in KINDS:
        structure, process = kind.split(", ")
        ways = [*always, (together, model)] if "FIRE" in process else always
        works = [partial(way, of, structure, process, *size) for way, of in ways]
        turns = [[spent(work) for work in works] for _ in range(options.pairs)]
        times = [f"{median(t[k] for t in turns) / (size[0] * size[1]) * 1e3:.2f}" for k in range(len(ways))]
        ratios = [f"{median(t[k] / t[j] for t in turns):.1f}" for j in range(2, len(ways)) for k in (0, 1)]
        cells = times + [""] * (5 - len(times)) + ratios + [""] * (6 - len(ratios))
        print(f"| {size[0]} x {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
