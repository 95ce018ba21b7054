"""A force for OpenMM (8.6 or later): a branch of a model moves the particles of a `System`.

from multifid.apply.openmm import openmm_force

system.addForce(openmm_force(multifid.load("runs/demo"), atoms, task="ani1x"))
"""

from typing import Any

from ase import Atoms

from multifid.apply.model import Answers

try:
    import openmm
    from openmm import unit
except ImportError as error:
    raise ImportError(f"OpenMM is not installed ({error}): pip install 'multifid[openmm]'") from error

if not hasattr(openmm, "PythonForce"):
    raise ImportError(f"OpenMM {openmm.version.version} has no PythonForce: pip install 'multifid[openmm]'")


def openmm_force(model: Answers, atoms: Atoms, task: str | None = None, dtype: str | None = None) -> Any:
    """An `openmm.PythonForce` with the energies and forces of the calculator, in kJ/mol and kJ/mol/nm.

    atoms: the particles of the system in their order: elements, charge and multiplicity (`info`), and whether the box
    is periodic, in all directions or none; positions and cell are those of the simulation. dtype, ValueError: as of the
    calculator.
    """
    periodic = bool(atoms.pbc.any())
    if periodic and not atoms.pbc.all():
        raise ValueError(f"pbc {atoms.pbc.tolist()}: OpenMM's boxes are periodic in all directions or in none")
    moved = atoms.copy()
    moved.set_constraint()
    moved.calc = model.calculator(task, dtype=dtype)
    per_mole = unit.AVOGADRO_CONSTANT_NA * unit.elementary_charge * unit.volt
    electronvolt = per_mole.value_in_unit(unit.kilojoule_per_mole)

    def compute(state: Any) -> tuple[float, Any]:
        moved.set_positions(state.getPositions(asNumpy=True).value_in_unit(unit.angstrom))
        if periodic:
            moved.set_cell(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.angstrom))
        return moved.get_potential_energy() * electronvolt, moved.get_forces() * electronvolt * 10  # per nm

    force = openmm.PythonForce(compute, {})
    force.setUsesPeriodicBoundaryConditions(periodic)
    return force
