"""How much a model's energy drifts in NVE dynamics: meV per atom and picosecond.

    python benchmarks/drift.py MODEL --task T FILE [--ps 20] [--step 0.5] [--kelvin 300] [--dtype float32 float64]
                               [--compiled]

FILE: anything that ASE reads; its last structure is relaxed for a few steps, set in motion at twice the temperature
(half of it becomes potential energy) and followed by ASE's velocity Verlet, which keeps positions in float64 whatever
the dtype of the model. drift: slope of a line through the total energy. noise: standard deviation about that line.
"""

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.optimize import LBFGS

import multifid

EVERY = 20  # steps between two energies


def set_in_motion(atoms: Atoms, kelvin: float) -> None:
    """Relax a little, and draw velocities without drift or rotation of the whole."""
    LBFGS(atoms, logfile=None).run(fmax=0.05, steps=200)
    spread = np.sqrt(atoms.get_masses() * units.kB * 2 * kelvin)
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)) * spread[:, None])
    Stationary(atoms)
    if not atoms.pbc.any():
        ZeroRotation(atoms)


def followed(atoms: Atoms, ps: float, step: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Times (ps), total energies (eV) and the mean temperature of a trajectory."""
    dynamics, energies, temperatures = VelocityVerlet(atoms, step * units.fs), [], []
    for _ in range(round(ps * 1000 / step / EVERY)):
        dynamics.run(EVERY)
        energies.append(atoms.get_total_energy())
        temperatures.append(atoms.get_temperature())
    return np.arange(1, len(energies) + 1) * EVERY * step / 1000, np.array(energies), float(np.mean(temperatures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--task")
    parser.add_argument("--ps", type=float, default=20)
    parser.add_argument("--step", type=float, default=0.5, help="femtoseconds")
    parser.add_argument("--kelvin", type=float, default=300)
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64"])
    parser.add_argument("--compiled", action="store_true", help="of the calculator")
    options = parser.parse_args()
    print("| structure | dtype | ps | mean K | drift, meV/atom/ps | noise, meV/atom |\n|---|---|---|---|---|---|")
    for dtype in options.dtype:
        atoms = ase.io.read(options.file, "-1")
        atoms.set_constraint()
        atoms.calc = multifid.load(options.model).calculator(options.task, dtype=dtype, compiled=options.compiled)
        set_in_motion(atoms, options.kelvin)
        times, energies, kelvin = followed(atoms, options.ps, options.step)
        line = np.polyfit(times, energies, 1)
        noise = (energies - np.polyval(line, times)).std() / len(atoms) * 1000
        drift = line[0] / len(atoms) * 1000
        name = f"{atoms.get_chemical_formula()}{' crystal' if atoms.pbc.all() else ''}"
        print(f"| {name} | {dtype} | {options.ps:g} | {kelvin:.0f} | {drift:+.2g} | {noise:.2g} |", flush=True)


if __name__ == "__main__":
    main()
