"""Many structures at once against an ASE loop with the eager calculator: processor time of FIRE, on one thread.

    python benchmarks/batched.py [--structures 50] [--steps 10] [--pairs 2]

together: `multifid.apply.lockstep`, an ASE optimizer for each structure and one pass of the model for all, as
`multifid relax` does. torch-sim: its FIRE with `TorchSimModel`. ASE: the same FIRE, one structure after the
other. Rock salt of 8 atoms with and without a relaxed cell, and ethanol; float32, alternated, means.
"""

import argparse
import warnings
from statistics import mean

import numpy as np
import torch
import torch_sim
import torch_sim.optimizers
from ase import Atoms
from ase.build import bulk, molecule
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from calculator import spent, untrained

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


def one_by_one(model: Model, kind: str, number: int, steps: int) -> None:
    calculator = model.calculator()
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
    print("| structures | ASE, ms a step of one | together | torch-sim | ASE / together | ASE / torch-sim |")
    print("|---|---|---|---|---|---|")
    for kind in ("ethanol", "NaCl", "NaCl, cell"):
        ways = [one_by_one, together, in_torch_sim]
        times = [
            [spent(lambda way=way, kind=kind: way(model, kind, *size)) for way in ways] for _ in range(options.pairs)
        ]
        ase, ours, theirs = (mean(t[k] for t in times) / (size[0] * size[1]) * 1e3 for k in range(3))
        print(f"| {size[0]} x {kind} | {ase:.2f} | {ours:.2f} | {theirs:.2f} | {ase / ours:.1f} | {ase / theirs:.1f} |")


if __name__ == "__main__":
    main()
