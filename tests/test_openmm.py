"""A model as a force of OpenMM: the numbers of the calculator, in a box and without one, and conserved energy."""

import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule

openmm = pytest.importorskip("openmm", minversion="8.6", reason="OpenMM is not installed")
from openmm import unit  # noqa: E402

from multifid.apply.openmm import openmm_force  # noqa: E402
from test_calculator import model  # noqa: E402


def skewed():
    """A triclinic crystal in the reduced form that OpenMM asks for."""
    atoms = bulk("NaCl", "rocksalt", 5.4, cubic=True)
    atoms.set_cell([[5.4, 0, 0], [0.5, 5.6, 0], [-0.3, 0.4, 5.2]], scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def simulated(atoms):
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    if atoms.pbc.all():
        system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    system.addForce(openmm_force(model(), atoms, "a", dtype="float64"))
    context = openmm.Context(system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions / 10)
    return context


@pytest.mark.parametrize("atoms", [molecule("CH3CH2OH"), skewed()], ids=["molecule", "triclinic"])
def test_openmm_has_the_numbers_of_the_calculator_and_conserves_their_energy(atoms):
    context = simulated(atoms)
    state = context.getState(energy=True, forces=True)
    atoms.calc = model().calculator("a", dtype="float64")
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) * units.kJ / units.mol
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-7)  # ASE's and OpenMM's constants of nature
    np.testing.assert_allclose(forces * units.kJ / units.mol / 10, atoms.get_forces(), rtol=1e-6, atol=1e-8)
    totals = []
    for _ in range(5):
        context.getIntegrator().step(2)
        now = context.getState(energy=True)
        totals.append((now.getPotentialEnergy() + now.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole))
    assert np.ptp(totals) < 0.05 and not np.allclose(
        context.getState(positions=True).getPositions(True)._value, atoms.positions / 10, atol=1e-6
    )


def test_a_box_that_is_periodic_in_some_directions_is_refused():
    atoms = skewed()
    atoms.pbc = [True, True, False]
    with pytest.raises(ValueError, match="in all directions or in none"):
        openmm_force(model(), atoms, "a")
