"""Many structures at once against ASE loops with the eager and the compiled calculator: processor time of FIRE.

    python benchmarks/batched.py [--structures 50] [--steps 10] [--pairs 2]

together: `multifid.apply.lockstep`, an ASE optimizer for each structure and one pass of the model for all, as
`multifid relax` does. torch-sim: its FIRE with `TorchSimModel`. ASE: the same FIRE, one structure after the
other, with either calculator. Rock salt of 8 atoms with and without a relaxed cell, and ethanol; float32, one thread,
all ways in turn in one process; medians over the turns of times and of ratios.
"""

import argparse
import warnings
from statistics import median

import numpy as np
import torch
import torch_sim
import torch_sim.optimizers
from ase import Atoms
from ase.build import bulk, molecule
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from calculator import spent, untrained

from multifid.apply.calculator import Calculator
from multifid.apply.lockstep import Settings, evaluator, relax_together
from multifid.apply.model import Model
from multifid.apply.torch_sim import TorchSimModel


def drawn(kind: str, number: int) -> list[Atoms]:
    """Structures that are displaced differently."""
    made = []
    for seed in range(number):
        atoms = bulk("NaCl", "rocksalt", 5.6, cubic=True) if kind.startswith("NaCl") else molecule("CH3CH2OH")
        if not kind.startswith("NaCl"):
            atoms.numbers = np.where(atoms.numbers == 1, 11, 17)  # elements that the model knows
        atoms.rattle(0.05, seed=seed)
        made.append(atoms)
    return made


def together(model: Model, kind: str, number: int, steps: int) -> None:
    cell = kind.endswith("cell")
    ask = evaluator(model, model.task(None), 50_000, stress=cell)
    relax_together(drawn(kind, number), ask, Settings(1e-9, steps, cell=cell), [None] * number)


def in_torch_sim(model: Model, kind: str, number: int, steps: int) -> None:
    asked = TorchSimModel(model, compute_stress=kind.endswith("cell"))
    state = torch_sim.io.atoms_to_state(drawn(kind, number), torch.device("cpu"), torch.float32)
    start, step = (torch_sim.frechet_cell_fire if kind.endswith("cell") else torch_sim.optimizers.fire)(model=asked)
    state = start(state)
    for _ in range(steps):
        state = step(state)


def one_by_one(calculator: Calculator, kind: str, number: int, steps: int) -> None:
    for atoms in drawn(kind, number):
        atoms.calc = calculator
        FIRE(FrechetCellFilter(atoms) if kind.endswith("cell") else atoms, logfile=None).run(fmax=1e-9, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, size = untrained(), (options.structures, options.steps)
    eager, compiled = model.calculator(), model.calculator(compiled=True)
    print("| structures | ASE eager, ms | ASE compiled, ms | together, ms | torch-sim, ms | ", end="")
    print("eager / together | eager / torch-sim | compiled / together | compiled / torch-sim |\n|" + "---|" * 9)
    for kind in ("ethanol", "NaCl", "NaCl, cell"):
        ways = [(one_by_one, eager), (one_by_one, compiled), (together, model), (in_torch_sim, model)]
        turns = [[spent(lambda w=w, x=x, k=kind: w(x, k, *size)) for w, x in ways] for _ in range(options.pairs)]
        times = " | ".join(f"{median(t[k] for t in turns) / (size[0] * size[1]) * 1e3:.2f}" for k in range(4))
        ratios = " | ".join(f"{median(t[k] / t[j] for t in turns):.1f}" for k in (0, 1) for j in (2, 3))
        print(f"| {size[0]} x {kind} | {times} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
