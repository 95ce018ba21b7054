"""What uncertainties add to a prediction, on one thread: processor time in alternated turns, medians.

    python benchmarks/uncertainty.py [--draws 4 8] [--pairs 10] [--encoder egnn]

A prediction: energies and forces of a batch that is at hand; then the same with deviations of energies, and with those
of energies and forces by so many draws of the last layer. Of an untrained model: the cost is that of a trained one.
"""

import argparse
from statistics import median

import torch
from ase import Atoms
from ase.build import molecule
from calculator import crystal, spent, untrained

from multifid.graphs.batch import Batch
from multifid.model.pieces import batch_of
from multifid.model.rigid import held, inputs_of
from multifid.model.rigidity import BranchRigidity, Covariance
from multifid.structures.atoms import pack_atoms

MOLECULES = ("isobutane", "C6H6", "trans-butane", "CH3CH2OCH3", "bicyclobutane", "cyclobutane", "CH3COCH3", "C3H8")
STRUCTURES = {
    "molecule": lambda: [molecule("trans-butane")],
    "8 molecules": lambda: [molecule(name) for name in MOLECULES],
    "crystal, 20": lambda: [crystal(20)],
    "crystal, 200": lambda: [crystal(200)],
    "crystal, 2,000": lambda: [crystal(2000)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--encoder", default="egnn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = untrained(encoder=options.encoder)

    def batch(structures: list[Atoms]) -> Batch:
        return batch_of(pack_atoms(structures), model.cutoff, "salt").to(model.device, model.dtype)

    rows = inputs_of(model.potential, batch([crystal(200)]), "salt").scalars
    covariance = Covariance(rows.T @ rows)
    rigidities = [BranchRigidity(covariance, covariance, None, covariance.draws(n)) for n in options.draws]
    print("| structures | atoms | edges | prediction, ms | with energies | ", end="")
    print(
        " | ".join(f"and forces, {n} draws" for n in options.draws), "|\n|---" + "|---:" * (4 + len(rigidities)) + "|"
    )
    for name, made in STRUCTURES.items():
        of = batch(made())
        works = [
            lambda of=of: model.potential(of),
            lambda of=of: held(model.potential, of, "salt", rigidities[0], stress=False, forces=False),
            *(lambda of=of, r=r: held(model.potential, of, "salt", r, stress=False) for r in rigidities),
        ]
        for work in works:
            work()
        turns = max(3, options.pairs // (4 if len(of.numbers) > 1000 else 1))
        times = [[spent(work) for work in works] for _ in range(turns)]
        ratios = " | ".join(f"{median(t[k] / t[0] for t in times):.2f}" for k in range(1, len(works)))
        bare = median(t[0] for t in times) * 1e3
        print(f"| {name} | {len(of.numbers):,} | {of.edges.shape[1]:,} | {bare:.1f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
