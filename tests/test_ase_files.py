"""Trajectories and databases of ASE: values, the energy that belongs to the forces, constraints, damage."""

import ase.db
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import Trajectory

from multifid.readers import ase_files
from multifid.readers.contract import Skip
from multifid.readers.recognise import recognise


def frames() -> list:
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.05, seed=1)
    crystal.calc = EMT()
    crystal.get_potential_energy(), crystal.get_stress()
    crystal.set_constraint(FixAtoms([0]))
    other = molecule("H2O")
    other.calc = SinglePointCalculator(other, energy=-10.0, free_energy=-11.0, forces=np.ones((3, 3)))
    return [crystal, other, molecule("CH4")]


def records(path, **options) -> list:
    return list(ase_files.read(path, ase_files.Options(**options), lambda fraction: None))


@pytest.mark.parametrize("name", ["a.traj", "a.db"])
def test_values_are_those_of_ase(name, tmp_path):
    made, path = frames(), tmp_path / name
    if name == "a.traj":
        with Trajectory(str(path), "w") as file:
            for atoms in made:
                file.write(atoms)
    else:
        with ase.db.connect(str(path)) as file:
            for atoms in made:
                file.write(atoms)
    assert recognise(path) == "ase"
    crystal, water, skip = records(path)
    labels = crystal.labels["ase"]
    assert labels.energy == pytest.approx(made[0].calc.results["energy"], abs=1e-12)
    assert np.allclose(labels.forces, made[0].get_forces(apply_constraint=False), atol=1e-12)
    assert np.abs(labels.forces[0]).max() > 0.01  # that of the fixed atom
    assert np.allclose(labels.stress, made[0].get_stress(voigt=False), atol=1e-12)
    assert np.allclose(crystal.cell, made[0].cell) and crystal.pbc.all()
    assert water.pbc is None and water.labels["ase"].energy == -11.0
    assert records(path, energy="energy")[1].labels["ase"].energy == -10.0
    assert isinstance(skip, Skip) and skip.reason == "no energy and no forces"


def test_a_truncated_trajectory_is_an_error_that_names_the_file(tmp_path):
    with Trajectory(str(tmp_path / "a.traj"), "w") as file:
        for atoms in frames():
            file.write(atoms)
    data = (tmp_path / "a.traj").read_bytes()
    (tmp_path / "b.traj").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"b\.traj: truncated, damaged"):
        records(tmp_path / "b.traj")


VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <incar></incar>
 <kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v></varray></kpoints>
 <parameters></parameters>
 <atominfo><array name="atoms"><set><rc><c>Na</c><c>1</c></rc><rc><c>Cl</c><c>2</c></rc></set></array></atominfo>
 <structure name="initialpos">{structure}</structure>
 <calculation>
  <scstep>
   <energy><i name="e_fr_energy">-7.5</i><i name="e_wo_entrp">-7.3</i><i name="e_0_energy">-7.4</i></energy>
  </scstep>
  <structure>{structure}</structure>
  <varray name="forces"><v>0.1 0 0</v><v>-0.1 0 0</v></varray>
  <varray name="stress"><v>16.021766208 0 0</v><v>0 0 0</v><v>0 0 0</v></varray>
  <energy><i name="e_fr_energy">-7.5</i><i name="e_wo_entrp">-7.3</i><i name="e_0_energy">-7.4</i></energy>
 </calculation>
</modeling>"""
CELL = (
    '<crystal><varray name="basis"><v>4 0 0</v><v>0 4 0</v><v>0 0 4</v></varray></crystal>'
    '<varray name="positions"><v>0 0 0</v><v>0.5 0.5 0.5</v></varray>'
)


def test_vasp_has_a_free_energy_and_a_stress_in_kbar_with_its_own_sign(tmp_path):
    path = tmp_path / "vasprun.xml"
    path.write_text(VASPRUN.format(structure=CELL))
    (frame,) = records(path)
    labels = frame.labels["ase"]
    assert labels.energy == -7.5 and records(path, energy="energy")[0].labels["ase"].energy == -7.4
    assert frame.numbers.tolist() == [11, 17] and np.allclose(frame.positions[1], 2.0)
    assert np.allclose(labels.forces, [[0.1, 0, 0], [-0.1, 0, 0]])
    assert np.allclose(labels.stress, np.diag([-0.01, 0, 0]), rtol=1e-5)  # 16.02 kbar under pressure
