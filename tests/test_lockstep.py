"""Structures that are relaxed together go the way that ASE takes each of them alone."""

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter

from multifid.apply.lockstep import OPTIMIZERS, Settings, evaluator, relax_together
from test_calculator import crystal, model, slab


def given():
    """A crystal, a slab of which half is fixed, a molecule, a crystal at rest."""
    fixed = slab()
    fixed.set_constraint(FixAtoms([0, 1, 2, 3]))
    return [crystal(), fixed, molecule("H2O"), bulk("NaCl", "rocksalt", 5.4)]


@pytest.mark.parametrize("optimizer", ["fire", "bfgs", pytest.param("lbfgs", marks=pytest.mark.full)])
def test_each_structure_goes_the_way_that_it_would_go_alone(optimizer):
    settings = Settings(fmax=0.02, steps=5, cell=True, optimizer=optimizer)
    ask = evaluator(model(), "a", 300, stress=True)
    for atoms, one in zip(given(), relax_together(given(), ask, settings, [None] * 4), strict=True):
        atoms.calc = model().calculator("a", dtype="float64")
        alone = OPTIMIZERS[optimizer](FrechetCellFilter(atoms) if atoms.pbc.all() else atoms, logfile=None)
        assert one.converged == alone.run(fmax=0.02, steps=5)
        assert one.optimizer.nsteps == alone.nsteps
        np.testing.assert_allclose(one.atoms.positions, atoms.positions, rtol=0, atol=1e-8)
        np.testing.assert_allclose(one.atoms.cell, atoms.cell, rtol=0, atol=1e-8)


def test_forces_on_the_cell_count_for_convergence():
    ask = evaluator(model(), "a", 300, stress=True)
    settings = Settings(fmax=1e-3, steps=0)
    (still,) = relax_together([bulk("NaCl", "rocksalt", 5.0)], ask, settings, [None])  # atoms at rest by symmetry
    (strained,) = relax_together([bulk("NaCl", "rocksalt", 5.0)], ask, Settings(1e-3, 0, cell=True), [None])
    assert still.converged and not strained.converged


def test_a_crystal_keeps_its_space_group_where_that_is_asked_for():
    pytest.importorskip("spglib", reason="spglib is not installed")
    ask, ends = evaluator(model(), "a", 300, stress=False), []
    for symmetry in (True, False):
        atoms = bulk("NaCl", "rocksalt", 5.4, cubic=True)
        atoms.rattle(0.001, seed=0)
        settings = Settings(fmax=1e-6, steps=3, symmetry=symmetry)
        (one,) = relax_together([atoms], ask, settings, [None])
        ends.append(one.finish()["steps"])
        assert not atoms.constraints
    assert ends == [0, 3]  # at symmetric places forces vanish, next to them they do not


def test_a_structure_that_comes_to_grief_does_not_hold_up_the_others():
    def ask(structures):
        return [
            {"energy": 0.0, "forces": -(a.positions - 1)} if a.positions[0, 0] > 0.9 else "too far" for a in structures
        ]

    good, bad, worse = (molecule("H2O") for _ in range(3))
    good.positions += 1.5
    bad.positions += 1.2
    worse.positions -= 2

    def asked(structures):
        answers = ask(structures)
        return [
            "broken" if a is bad and a.positions[0, 0] < 1.19 else r for a, r in zip(structures, answers, strict=True)
        ]

    done = relax_together([good, bad, worse], asked, Settings(fmax=0.01, steps=200), [None] * 3)
    assert done[0].converged and not done[0].failed
    assert done[1].failed.startswith("after ") and done[1].failed.endswith("steps: broken")
    assert done[2] == "too far"
