"""The compiled calculator beside the eager one, on one thread: a molecule of 8 atoms, crystals of 8, 64 and 216.

    python benchmarks/compiled.py [--encoder egnn] [--forces conservative] [--pairs 40] [--cache DIRECTORY]

A step is `atoms.get_forces()` after every atom has flown on for a femtosecond. Processor time in alternated pairs:
medians, and the median of the ratios of pairs. Compiles first, a minute or more, where the cache has no code.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from calculator import STEP, spent, untrained

from multifid.apply.model import Model


def structures() -> dict[str, Atoms]:
    """Rock salt; the molecule is one cell of it, alone."""
    cell = bulk("NaCl", "rocksalt", 5.6, cubic=True)
    alone = cell.copy()
    alone.pbc = False
    made = {"8, molecule": alone, "8, crystal": cell, "64, crystal": cell.repeat(2), "216, crystal": cell.repeat(3)}
    for atoms in made.values():
        atoms.rattle(0.05, seed=0)
    return made


def compare(model: Model, compiled, atoms: Atoms, pairs: int) -> tuple[list[tuple[float, float]], float]:
    """Seconds of steps, eager and compiled, and the largest difference of forces, eV/angstrom."""
    other, random, apart, times = atoms.copy(), np.random.default_rng(0), 0.0, []
    atoms.calc, other.calc = model.calculator(), compiled
    for _ in range(pairs + 3):
        flight = random.normal(0, STEP, (len(atoms), 3))
        atoms.positions += flight
        other.positions += flight
        times.append((spent(atoms.get_forces), spent(other.get_forces)))
        apart = max(apart, float(np.abs(atoms.get_forces() - other.get_forces()).max()))
    return times[3:], apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="egnn")
    parser.add_argument("--forces", default="conservative", choices=("conservative", "direct"))
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = untrained(encoder=options.encoder, forces=options.forces)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        compiled = model.calculator(compiled=options.cache or folder)
        print(f"{options.encoder}, {options.forces}, float32; opened in {time.perf_counter() - started:.0f} s")
        print("| atoms | eager, ms | compiled, ms | ratio | atoms/s | forces apart, eV/angstrom |")
        print("|---|---|---|---|---|---|")
        for name, atoms in structures().items():
            times, apart = compare(model, compiled, atoms, options.pairs)
            eager, fast = median(a for a, _ in times) * 1e3, median(b for _, b in times) * 1e3
            ratio = median(a / b for a, b in times)
            print(f"| {name} | {eager:.1f} | {fast:.1f} | {ratio:.1f} | {len(atoms) / fast * 1e3:,.0f} | {apart:.0e} |")


if __name__ == "__main__":
    main()
