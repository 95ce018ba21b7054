"""What LAMMPS says of the structures of `test_equality`: `mpiexec -n N python equality_worker.py FOLDER FILE.json`.

FILE.json has what is asked: {name: {symbols, positions, box, pbc}}. Rank 0 writes FOLDER/equal-N.json,
{way: {name: {dtype: what `lammps_worker.measured` gives}}}. FOLDER has a.mfid.
"""

import json
import os
import sys
from pathlib import Path

from ase import Atoms

import multifid
from lammps_worker import FOLDER, SYMBOLS, computed_by, measured, started
from multifid.apply.lammps.external import attach
from multifid.apply.lammps.mliap import MLIAP

DTYPES = ("float64", "float32")


def boundary(atoms: Atoms) -> str:
    return "boundary " + " ".join("p" if periodic else "f" for periodic in atoms.pbc)


def pair_style(atoms, dtype):
    return measured(started(atoms, options=f"dtype {dtype}", setup=[boundary(atoms)]))


def ml_iap(atoms, dtype):
    with computed_by(MLIAP(FOLDER / "a.mfid", "a", SYMBOLS, dtype)):
        return pair_style(atoms, dtype)


def fix_external(atoms, dtype):
    lmp = started(atoms, style="zero 4.0", coeff="", setup=[boundary(atoms)])
    lmp.command("fix model all external pf/callback 1 1")
    lmp.command("fix_modify model energy yes virial yes")
    precision = {"float64": "fp64", "float32": "fp32"}[dtype]
    attach(lmp, "model", multifid.load(FOLDER / "a.mfid", precision=precision), "a", SYMBOLS)
    return measured(lmp)


if __name__ == "__main__":
    asked = {
        name: Atoms(x["symbols"], x["positions"], cell=x["box"], pbc=x["pbc"])
        for name, x in json.loads(Path(sys.argv[2]).read_text()).items()
    }
    said = {
        way.__name__: {n: {dtype: way(atoms, dtype) for dtype in DTYPES} for n, atoms in asked.items()}
        for way in (pair_style, ml_iap, fix_external)
    }
    if int(os.environ.get("PMI_RANK", "0")) == 0:
        (FOLDER / f"equal-{os.environ.get('PMI_SIZE', '1')}.json").write_text(json.dumps(said))
