"""Physics of a calculator's results: curves without steps, zero modes, trajectories that turn with their structure."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.phonons import Phonons
from ase.vibrations import Vibrations
from scipy.spatial.transform import Rotation

from test_calculator import crystal, model


def steps_of(energies, slopes, where):
    """What the trapezoidal rule misses of each energy difference: of third order in the step unless there is a kink."""
    return np.diff(energies) - np.diff(where) * (slopes[1:] + slopes[:-1]) / 2


@pytest.mark.parametrize("encoder", ["egnn", "painn"])
def test_energy_and_volume_have_no_kink_where_neighbours_cross_the_cutoff(encoder):
    sides, energies, slopes = np.linspace(5.55, 5.75, 41), [], []  # the second shell crosses 4 angstrom at 5.657
    calculator, pairs = model(encoder=encoder).calculator("a"), []
    for a in sides:
        atoms = bulk("NaCl", "rocksalt", a)
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        slopes.append(atoms.get_stress()[:3].sum() * atoms.get_volume() / a)  # dE/da
        pairs.append(calculator.neighbors.within(4.0)[0].shape[1])
    assert pairs[0] > pairs[-1]
    assert np.abs(np.diff(energies)).max() > 1e-5
    assert np.abs(steps_of(np.array(energies), np.array(slopes), sides)).max() < 1e-6


def test_a_bond_breaks_without_a_step():
    lengths, energies, slopes = np.linspace(0.8, 4.4, 241), [], []
    atoms = Atoms("CO", positions=np.zeros((2, 3)))
    atoms.calc = model().calculator("a")
    for length in lengths:
        atoms.positions[1, 2] = length
        energies.append(atoms.get_potential_energy())
        slopes.append(-atoms.get_forces()[1, 2])
    missed = np.abs(steps_of(np.array(energies), np.array(slopes), lengths))
    assert missed.max() < 2e-4 and not slopes[-1] and np.ptp(energies) > 0.01
    assert np.ptp(np.array(energies)[lengths > 4.0]) < 1e-12


@pytest.mark.parametrize(("name", "zero"), [("H2O", 6), ("CO", 5), ("CO2", 5)])
def test_a_molecule_has_six_modes_without_frequency_and_a_linear_one_five(name, zero, tmp_path):
    atoms = molecule(name)
    atoms.calc = model().calculator("a")
    assert BFGS(atoms, logfile=None).run(fmax=1e-7, steps=1000)
    size, step = 3 * len(atoms), 1e-4
    hessian = np.zeros((size, size))
    for k in range(size):
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions.flat[k] += sign * step
            moved.calc = atoms.calc
            hessian[k] -= sign * moved.get_forces().ravel() / (2 * step)
    np.testing.assert_allclose(hessian, hessian.T, rtol=0, atol=1e-6)
    mass = np.repeat(atoms.get_masses(), 3) ** -0.5
    modes = np.sort(np.abs(np.linalg.eigvalsh(mass[:, None] * (hessian + hessian.T) / 2 * mass)))
    assert modes[zero - 1] < 1e-6 < 1e-4 < modes[zero]
    if name == "H2O":
        by_ase = Vibrations(atoms, name=str(tmp_path / "modes"), delta=1e-4)
        by_ase.run()
        energies = np.sqrt(modes[zero:]) * units._hbar * 1e10 / np.sqrt(units._e * units._amu)
        np.testing.assert_allclose(by_ase.get_energies().real[zero:], energies, rtol=1e-5)


@pytest.mark.full
def test_phonons_are_those_of_ase_with_three_zero_modes_and_symmetric_matrices(tmp_path):
    phonopy = pytest.importorskip("phonopy", reason="phonopy is not installed")
    atoms, points = bulk("NaCl", "rocksalt", 5.4), [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0, 0]]
    cell = phonopy.structure.atoms.PhonopyAtoms(atoms.symbols, cell=atoms.cell, positions=atoms.positions)
    ours = phonopy.Phonopy(cell, np.diag([2, 2, 2]), primitive_matrix=np.eye(3), is_symmetry=False)
    ours.generate_displacements(distance=1e-4, is_plusminus=True)
    calculator, forces = model().calculator("a"), []
    for moved in ours.supercells_with_displacements:
        forces.append(calculator.get_forces(Atoms(moved.symbols, moved.positions, cell=moved.cell, pbc=True)))
    ours.forces = forces
    ours.produce_force_constants()
    springs = ours.force_constants
    np.testing.assert_allclose(springs, springs.transpose(1, 0, 3, 2), rtol=0, atol=1e-6)
    ours.run_qpoints(points, with_dynamical_matrices=True)
    matrices, found = (ours.get_qpoints_dict()[name] for name in ("dynamical_matrices", "frequencies"))  # THz
    np.testing.assert_allclose(matrices, matrices.conj().transpose(0, 2, 1), rtol=0, atol=1e-8)
    assert np.sort(np.abs(found[0]))[2] < 0.01 < 0.1 < np.sort(np.abs(found[0]))[3]
    theirs = Phonons(atoms, calculator, supercell=(2, 2, 2), delta=1e-4, name=str(tmp_path / "phonons"))
    theirs.run()
    theirs.read(acoustic=False, symmetrize=0)
    expected = theirs.band_structure(points, verbose=False) * units._e / units._hplanck * 1e-12
    np.testing.assert_allclose(np.sort(found)[1:], np.sort(expected)[1:], rtol=1e-4, atol=1e-4)


def test_a_trajectory_turns_and_moves_with_its_structure():
    turn, ends = Rotation.from_euler("xyz", [0.4, 1.1, -2.0]).as_matrix(), []
    velocities = np.random.default_rng(4).normal(0, 0.02, (8, 3))
    for matrix, way in ((np.eye(3), np.zeros(3)), (turn, np.array([900.0, -40.0, 7.0]))):
        atoms = crystal()
        atoms.set_cell(atoms.cell.array @ matrix, scale_atoms=True)
        atoms.positions += way
        atoms.set_velocities(velocities @ matrix)
        atoms.calc = model().calculator("a")
        VelocityVerlet(atoms, units.fs).run(30)
        ends.append((atoms.positions - way) @ matrix.T)
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-8)


@pytest.mark.full
@pytest.mark.parametrize(
    ("atoms", "dtype", "most"),
    [
        pytest.param(crystal(), "float32", 0.1, id="crystal-float32"),
        pytest.param(molecule("CH3CH2OH"), "float64", 0.01, id="molecule-float64"),
    ],
)
def test_the_energy_of_a_long_trajectory_does_not_drift(atoms, dtype, most):
    """2 ps in steps of half a femtosecond; meV per atom and picosecond."""
    atoms = atoms.copy()
    atoms.set_velocities(np.random.default_rng(4).normal(0, 0.02, (len(atoms), 3)))
    atoms.calc = model().calculator("a", dtype=dtype)
    dynamics, energies = VelocityVerlet(atoms, 0.5 * units.fs), []
    for _ in range(200):
        dynamics.run(20)
        energies.append(atoms.get_total_energy())
    drift = np.polyfit(np.arange(200) * 0.01, energies, 1)[0] / len(atoms) * 1000
    assert abs(drift) < most
