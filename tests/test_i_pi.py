"""A model in i-PI: the numbers of the calculator, beads in one pass, conserved energy, and virials that move cells."""

import os
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import units
from ase.build import molecule

pytest.importorskip("ipi", reason="i-PI is not installed")
from ipi.scripting import InteractiveSimulation, motion_nvt_xml, simulation_xml
from ipi.utils.units import unit_to_internal

import multifid
from multifid.apply import i_pi
from test_calculator import model
from test_openmm import skewed
from test_predict import run  # noqa: F401

NVE = f"<motion mode='dynamics'><dynamics><timestep units='ase'>{0.5 * units.fs}</timestep></dynamics></motion>"
NPT = """<motion mode='dynamics'><dynamics mode='npt'><timestep units='femtosecond'>0.5</timestep>
    <barostat mode='isotropic'><tau units='femtosecond'>200</tau></barostat></dynamics></motion>"""
SHOWN = "<output prefix='out'><properties filename='log'> [step, conserved{electronvolt}] </properties></output>"


def box():
    atoms = molecule("CH3CH2OH", vacuum=6)
    atoms.pbc = False
    return atoms


def simulation(trained, atoms, motion, beads=1, kelvin=300.0):
    ase.io.write("start.xyz", atoms)
    field = i_pi.forcefield(trained, "start.xyz", "a", dtype="float64", beads=beads)
    given = simulation_xml([atoms] * beads, field, motion, kelvin, SHOWN)
    return InteractiveSimulation(given.replace("</ensemble>", "<pressure> 0 </pressure> </ensemble>"))


def electronvolt(x):
    return np.asarray(x) / unit_to_internal("energy", "electronvolt", 1.0)


@pytest.mark.parametrize(("atoms", "beads"), [(box(), 3), (skewed(), 2)], ids=["molecule", "triclinic"])
def test_i_pi_has_the_numbers_of_the_calculator_for_all_beads_at_once(run, tmp_path, monkeypatch, atoms, beads):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    asked, really = [], i_pi.Driver._answers
    monkeypatch.setattr(i_pi.Driver, "_answers", lambda self, c, x: asked.append(len(x)) or really(self, c, x))
    monkeypatch.setattr("ipi.engine.forcefields.load_pes", lambda mode, path: i_pi.Driver)
    moved = simulation(run, atoms, NVE, beads)
    moved.run(6)
    assert set(asked) == {beads} and len(asked) == 7
    calculator = multifid.load(run).calculator("a", dtype="float64")
    system = moved.syslist[0]
    for bead, at in enumerate(moved.get_structures()):
        here = atoms.copy()
        here.positions, here.calc = at.positions, calculator
        assert at.get_potential_energy() == pytest.approx(here.get_potential_energy(), rel=1e-6)  # constants of nature
        np.testing.assert_allclose(at.get_forces(), here.get_forces(), rtol=1e-5, atol=1e-7)
        virial = np.triu(-here.get_stress(voigt=False) * here.get_volume())  # what i-PI keeps of it
        np.testing.assert_allclose(electronvolt(system.forces.virs[bead]), virial, rtol=1e-5, atol=1e-6)
        assert not np.allclose(here.positions, atoms.positions, atol=1e-4)
    conserved = np.loadtxt("out.log")[:, 1]
    assert len(conserved) == 7 and np.ptp(conserved) < 1e-3


@pytest.mark.full
def test_the_virial_moves_the_cell_and_a_model_without_one_is_refused(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    moved = simulation(run, skewed(), NPT)
    moved.run(20)
    assert np.ptp(np.loadtxt("out.log")[:, 1]) < 1e-3
    assert moved.get_structures().get_volume() != pytest.approx(skewed().get_volume(), rel=1e-4)
    monkeypatch.setattr(i_pi, "load", lambda *_, **__: model("direct"))
    monkeypatch.setattr("ipi.engine.forcefields.load_pes", lambda mode, path: i_pi.Driver)
    simulation(run, skewed(), NVE).run(2)
    with pytest.raises(ValueError, match="the cell moves, but the forces of this model are predicted directly"):
        simulation(run, skewed(), NPT).run(2)


def test_what_does_not_fit_is_refused(run, tmp_path):  # noqa: F811
    ase.io.write(tmp_path / "two.xyz", molecule("CO"))
    with pytest.raises(ValueError, match="several tasks: say which one"):
        i_pi.Driver(run, tmp_path / "two.xyz")
    with pytest.raises(ValueError, match="'half' must be one of float32, float64"):
        i_pi.Driver(run, tmp_path / "two.xyz", "a", "half")
    with pytest.raises(ValueError, match="i-PI sends 3 atoms, but the template has 2"):
        i_pi.Driver(run, tmp_path / "two.xyz", "a")(np.eye(3), np.ones((3, 3)))


@pytest.mark.full
def test_a_path_integral_by_i_pi_itself_through_a_socket(run, tmp_path):  # noqa: F811
    """A ring polymer of four beads under a thermostat, in one batch; i-PI and the model are processes of their own."""
    ase.io.write(tmp_path / "start.xyz", box())
    motion = motion_nvt_xml(0.5 * units.fs, path_integrals=True)
    name = f"multifid-{tmp_path.parent.name}-{os.getpid()}"
    field = f"<ffsocket name='x' mode='unix'><address>{name}</address><batch_size>4</batch_size></ffsocket>"
    given = simulation_xml([box()] * 4, field, motion, 300.0, SHOWN)
    (tmp_path / "input.xml").write_text(given.replace("<system>", "<total_steps> 9 </total_steps> <system>", 1))
    path = subprocess.run([sys.executable, "-m", "multifid.apply.i_pi"], capture_output=True, text=True, check=True)
    bin = Path(sys.executable).parent
    with subprocess.Popen([sys.executable, bin / "i-pi", "input.xml"], cwd=tmp_path) as server:
        given = f"model={run},template=start.xyz,task=a,dtype=float64"
        command = [sys.executable, bin / "i-pi-driver-py", "--unix", "--address", name, "--mode", "custom"]
        command += ["--pes_path", path.stdout.strip(), "--param", given]
        while not Path(f"/tmp/ipi_{name}").exists():
            assert server.poll() is None
            time.sleep(0.1)
        subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
        assert not server.wait(60)
    conserved = np.loadtxt(tmp_path / "out.log")[:, 1]
    assert len(conserved) == 10 and np.ptp(conserved) < 1e-2
