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


# As VASP writes it (two ionic steps); of the parts that no reader looks at, only the heads.
OUTCAR = """ vasp.6.4.2 20Jul23 (build Oct 12 2023 11:05:21) complex

 POTCAR:    PAW_PBE Na_pv 19Sep2006
 POTCAR:    PAW_PBE Cl 06Sep2000
 POTCAR:    PAW_PBE Na_pv 19Sep2006
   VRHFIN =Na: p6s1
 POTCAR:    PAW_PBE Cl 06Sep2000
   VRHFIN =Cl: s2p5
   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands    NBANDS=      8
   ions per type =               1   1
   ISPIN  =      1    spin polarized calculation?
 k-points in reciprocal lattice and weights: Gamma
   0.00000000  0.00000000  0.00000000       1.000

--------------------------------------- Iteration      1(   1)  ---------------------------------------
{steps} General timing and accounting informations for this job:
"""
STEP = """
  FORCE on cell =-STRESS in cart. coord.  units (eV):
  Direction    XX          YY          ZZ          XY          YZ          ZX
  --------------------------------------------------------------------------------------
  Total       0.64000     0.32000     0.16000     0.08000     0.04000     0.02000
  in kB      {stress}
  external pressure =        9.34 kB  Pullay stress =        0.00 kB

 VOLUME and BASIS-vectors are now :
  volume of cell :       64.00
      direct lattice vectors                 reciprocal lattice vectors
     4.000000000  0.000000000  0.000000000     0.250000000  0.000000000  0.000000000
     0.000000000  4.000000000  0.000000000     0.000000000  0.250000000  0.000000000
     0.000000000  0.000000000  4.000000000     0.000000000  0.000000000  0.250000000

 POSITION                                       TOTAL-FORCE (eV/Angst)
 -----------------------------------------------------------------------------------
      0.00000      0.00000      0.00000         0.100000     -0.200000      0.300000
      2.00000      2.00000      {z:.5f}        -0.100000      0.200000     -0.300000
 -----------------------------------------------------------------------------------
    total drift:                                0.000001     -0.000002      0.000003

  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)
  ---------------------------------------------------
  free  energy   TOTEN  =        {energy:.8f} eV

  energy  without entropy=       -7.30000000  energy(sigma->0) =       -7.40000000

--------------------------------------- Iteration      2(   1)  ---------------------------------------
"""


def test_an_outcar_has_every_ionic_step_with_its_free_energy_and_a_stress_in_kbar(tmp_path):
    stress = "16.02177    32.04353    48.06530     1.60218     3.20435     4.80653"  # xx yy zz xy yz zx
    steps = [STEP.format(stress=stress, z=2.0 + 0.1 * i, energy=-7.5 - i) for i in range(2)]
    path = tmp_path / "OUTCAR"
    path.write_text(OUTCAR.format(steps="".join(steps)))
    assert recognise(path) == "ase"
    first, second = records(path)
    labels = first.labels["ase"]
    assert labels.energy == -7.5 and second.labels["ase"].energy == -8.5
    assert records(path, energy="energy")[0].labels["ase"].energy == -7.4
    assert first.numbers.tolist() == [11, 17] and np.allclose(second.positions[1], [2, 2, 2.1]) and first.pbc.all()
    assert np.allclose(first.cell, 4 * np.eye(3)) and np.allclose(labels.forces, [[0.1, -0.2, 0.3], [-0.1, 0.2, -0.3]])
    expected = [[-0.01, -0.001, -0.003], [-0.001, -0.02, -0.002], [-0.003, -0.002, -0.03]]
    assert np.allclose(labels.stress, expected, rtol=1e-5)


def test_an_outcar_that_was_cut_off_keeps_its_whole_steps_or_is_an_error(tmp_path):
    whole = OUTCAR.format(steps="".join(STEP.format(stress="1 1 1 0 0 0", z=2.0, energy=-7.5) for _ in range(3)))
    path = tmp_path / "OUTCAR"
    for end in range(0, len(whole), 157):
        path.write_text(whole[:end])
        try:
            found = records(path)
        except ValueError as error:
            assert "OUTCAR" in str(error)
        else:
            assert all(record.labels["ase"].energy == -7.5 for record in found) and len(found) == whole[:end].count(
                "sigma->0"
            )


def test_a_database_may_keep_labels_in_data_in_other_units(tmp_path):
    water = molecule("H2O")
    with ase.db.connect(tmp_path / "n.db") as database:
        database.write(water, data={"energy": np.array([-76.0]), "forces": np.full((3, 3), 0.5)})
        database.write(water)
    options = ase_files.Options(energy_unit="hartree")
    first, second = ase_files.read(tmp_path / "n.db", options, lambda far: None)
    assert first.labels["ase"].energy == -76.0 * 27.211386245988
    assert first.labels["ase"].forces[0, 0] == 0.5 * 27.211386245988  # hartree/angstrom, since lengths are in angstrom
    assert second.reason == "no energy and no forces"
