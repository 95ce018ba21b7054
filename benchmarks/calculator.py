"""What the ASE calculator adds to the bare pass of a model, on one thread, at 20, 200 and 2,000 atoms.

    python benchmarks/calculator.py [--atoms 20 200 2000] [--pairs 40]

bare: energies and forces of a batch that is at hand. calculator: `atoms.get_forces()` after every atom has flown on for
a femtosecond at room temperature, neighbours, checks and copies included. Processor time in alternated pairs; means.
"""

import argparse
import time
from statistics import mean

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

from multifid.apply.model import Model
from multifid.graphs.neighbors import neighbor_list
from multifid.graphs.origin import near_origin
from multifid.model.potential import ModelConfig, Potential
from multifid.model.predictor import batch_with
from multifid.structures.atoms import pack_atoms

STEP = 0.0033  # angstrom along each axis, in a femtosecond: sodium at 300 K


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
    """About so many atoms of rock salt."""
    side = round((atoms / 2) ** (1 / 3))
    repeats = {20: (1, 2, 5), 200: (4, 5, 5), 2000: (10, 10, 10)}.get(atoms, (side, side, side))
    made = bulk("NaCl", "rocksalt", 5.6).repeat(repeats)
    made.rattle(0.05, seed=0)
    return made


def spent(work) -> float:
    """Seconds of processor time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(model: Model, atoms: Atoms, pairs: int) -> tuple[float, float]:
    """Seconds of a bare pass and of a calculator's step."""
    home = near_origin(pack_atoms([atoms]))
    batch = batch_with(home, *neighbor_list(home, model.cutoff), "salt").to(model.device, model.dtype)
    atoms.calc, flight = model.calculator(), np.random.default_rng(0).normal(0, STEP, (len(atoms), 3))

    def bare() -> None:
        with torch.no_grad():
            model.potential(batch)

    def step() -> None:
        atoms.positions += flight
        atoms.get_forces()

    step()
    bare()
    times = [(spent(bare), spent(step)) for _ in range(pairs)]
    return mean(a for a, _ in times), mean(b for _, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, nargs="+", default=[20, 200, 2000])
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = untrained()
    print("| atoms | bare pass, ms | calculator, ms | ratio | atoms/s | lists made |")
    print("|---|---|---|---|---|---|")
    for number in options.atoms:
        atoms = crystal(number)
        bare, step = compare(model, atoms, options.pairs)
        made, speed = f"{atoms.calc.neighbors.made} of {options.pairs + 1}", f"{len(atoms) / step:,.0f}"
        print(f"| {len(atoms)} | {bare * 1e3:.1f} | {step * 1e3:.1f} | {step / bare:.2f} | {speed} | {made} |")


if __name__ == "__main__":
    main()
