"""A model for i-PI (3.3 or later): molecular dynamics and path integrals, all beads in one pass of the model.

    from multifid.apply.i_pi import forcefield

    forcefield("runs/demo", "start.xyz", task="ani1x", beads=16)      the block <ffdirect> of an input of i-PI

i-PI loads this file by its path, as a custom PES. `python -m multifid.apply.i_pi` prints the path, for
`i-pi-driver-py --mode custom --pes_path PATH --param model=MODEL,template=FILE,task=T`, which serves i-PI by a socket.
"""

import warnings
from pathlib import Path
from typing import Any

import ase.io
import numpy as np

from multifid.apply.calculator import DTYPES
from multifid.apply.model import load
from multifid.model.undetermined import UndeterminedEnergy

try:
    from ipi.pes.dummy import Dummy_driver
    from ipi.utils.units import unit_to_internal, unit_to_user
except ImportError as error:
    raise ImportError(f"i-PI is not installed ({error}): pip install 'multifid[ipi]'") from error

__DRIVER_NAME__, __DRIVER_CLASS__ = "multifid", "Driver"  # by which i-PI finds the class in a file
Answer = tuple[float, np.ndarray, np.ndarray, str]


class Driver(Dummy_driver):
    """Energies, forces and virials of one branch, in atomic units, for i-PI.

    model: a run, a model file or an exported file. template: a file that ASE reads; its last structure says which
    elements the atoms have, in the order of i-PI's, charge and multiplicity (`info`), and what is periodic. task: which
    branch answers, where there are several. dtype: float32 or float64. ValueError where the cell moves and the forces
    of the model are direct, as such a model has no virial; otherwise as of `predict`.
    """

    def __init__(
        self, model: str, template: str, task: str | None = None, dtype: str | None = None, **about: Any
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
        self.model = load(model, precision=None if dtype is None else DTYPES[dtype])
        self.task, self.template = self.model.task(task), next(ase.io.iread(template, index="-1"))
        self.template.set_constraint()
        self._first_cell: np.ndarray | None = None
        super().__init__(**about)

    def compute(self, cell: Any, pos: Any) -> Any:
        """Of one structure, cell vectors as columns (3, 3) and positions (N, 3) in bohr, or of lists of them.

        (energy, forces (N, 3), virial (3, 3) = -stress x volume, extras) or a list of these.
        """
        return self._answers(cell, pos) if isinstance(pos, list) else self._answers([cell], [pos])[0]

    def _answers(self, cells: list[np.ndarray], positions: list[np.ndarray]) -> list[Answer]:
        structures = []
        for cell, x in zip(cells, positions, strict=True):
            atoms = self.template.copy()
            if len(x) != len(atoms):
                raise ValueError(f"i-PI sends {len(x)} atoms, but the template has {len(atoms)}")
            atoms.positions = unit_to_user("length", "angstrom", x)
            atoms.cell = unit_to_user("length", "angstrom", cell.T)
            structures.append(atoms)
        self._refuse_moving(cells)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndeterminedEnergy)  # differences of energy are not touched
            out = self.model.predict(structures, self.task)
        return [self._internal(k, out, atoms.get_volume()) for k, atoms in enumerate(structures)]

    def _internal(self, k: int, out: Any, volume: float) -> Answer:
        stress = np.zeros((3, 3)) if out.stress is None else out.stress[k]
        if not all(np.isfinite(x).all() for x in (out.energy[k], out.forces[k], stress)):
            raise ValueError("the model's answer is not finite: is the structure sound, or the time step too long?")
        return (
            float(unit_to_internal("energy", "electronvolt", out.energy[k])),
            unit_to_internal("force", "ev/ang", out.forces[k]),
            unit_to_internal("energy", "electronvolt", -stress * volume),
            "",
        )

    def _refuse_moving(self, cells: list[np.ndarray]) -> None:
        if self._first_cell is None:
            self._first_cell = np.array(cells[0])
        if not self.model.is_conservative(self.task) and not all(
            np.array_equal(cell, self._first_cell) for cell in cells
        ):
            raise ValueError(
                "the cell moves, but the forces of this model are predicted directly, so it has no virial: keep the "
                "cell, or take a model of `model.branch.forces: conservative`"
            )


def forcefield(
    model: Path | str,
    template: Path | str,
    task: str | None = None,
    *,
    dtype: str | None = None,
    beads: int = 1,
    name: str = "multifid",
) -> str:
    """The block `<ffdirect>` of an input of i-PI; beads: how many structures a pass takes. The rest as of `Driver`."""
    given = {"model": Path(model).resolve(), "template": Path(template).resolve(), "task": task, "dtype": dtype}
    parameters = ", ".join(f"{key}: {value}" for key, value in given.items() if value is not None)
    return (
        f"<ffdirect name='{name}' threaded='False'> <pes> custom </pes> "
        f"<pes_path> {Path(__file__).resolve()} </pes_path> <batch_size> {beads} </batch_size> "
        f"<parameters> {{{parameters}}} </parameters> </ffdirect>"
    )


if __name__ == "__main__":
    print(Path(__file__).resolve())
