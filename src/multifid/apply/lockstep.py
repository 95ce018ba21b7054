"""Many structures relaxed at once: an ASE optimizer for each, and all forces of a step from one pass of the model.

    forces of all --> every optimizer moves its structure --> forces of those that have not converged --> ...

What an optimizer does depends on its own structure only, so that each goes the way that it would go alone, and all
that ASE knows of constraints, symmetry and cells holds. (torch-sim has optimizers too, with other rules for cells, and
constraints only from 0.5 on.)
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import BFGS, FIRE, LBFGS
from ase.stress import full_3x3_to_voigt_6_stress

from multifid.apply.cell_filter import CellFilter
from multifid.model.task_model import TaskModel
from multifid.model.undetermined import UndeterminedEnergy

OPTIMIZERS: dict[str, Any] = {"fire": FIRE, "lbfgs": LBFGS, "bfgs": BFGS}
SYMPREC = 0.01  # angstrom: atoms that are closer to a symmetric place lie on it

Results = dict[str, Any]
Evaluate = Callable[
    [Sequence[Atoms]], list[Results | str]
]  # energy, forces, stress in ASE's form, or why there are none


@dataclass(frozen=True)
class Settings:
    """How structures are relaxed."""

    fmax: float = 0.05  # eV/angstrom: the longest force that is left
    steps: int = 500  # at most
    cell: bool = False  # cells of crystals too
    symmetry: bool = False  # space groups of crystals are kept
    optimizer: str = "fire"
    trajectory: Path | None = None  # a directory for one ASE trajectory of each structure

    def __post_init__(self) -> None:
        if not (np.isfinite(self.fmax) and self.fmax > 0):
            raise ValueError(f"--fmax {self.fmax} must be a positive force in eV/angstrom")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer {self.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")


class Known(SinglePointCalculator):  # type: ignore[misc]
    """What the model has said of a structure as it is: nobody asks between a move and the next answer."""

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Nothing has changed; to compare would take longer than all else that an optimizer does."""
        return []


class Relaxation:
    """One structure on its way; its positions and cell change in place."""

    def __init__(self, atoms: Atoms, results: Results, settings: Settings, trajectory: Path | None = None) -> None:
        self.atoms, self.settings, self.failed = atoms, settings, ""
        atoms.calc = Known(atoms, **results)
        movable = CellFilter(atoms) if settings.cell and atoms.pbc.all() else atoms
        path = None if trajectory is None else str(trajectory)
        self.optimizer = OPTIMIZERS[settings.optimizer](movable, logfile=None, trajectory=path)
        self.optimizer.fmax = settings.fmax
        self._look()

    @property
    def going(self) -> bool:
        """Whether there is another step to make."""
        return not (self.failed or self.converged or self.optimizer.nsteps >= self.settings.steps)

    def move(self) -> None:
        """One step of the optimizer. The forces at the new place are not known yet."""
        self.optimizer.step()
        self.optimizer.nsteps += 1

    def take(self, results: Results | str) -> None:
        """What the model says of the new place, or why it says nothing."""
        if isinstance(results, str):
            self.failed = f"after {self.optimizer.nsteps} steps: {results}"
            return
        self.atoms.calc.results = dict(results)
        self._look()

    def finish(self) -> Results:
        """How it went, for `info`; the structure has its own constraints and no others again."""
        self.optimizer.close()
        left = float(np.linalg.norm(self.atoms.get_forces(), axis=1).max(initial=0.0))
        self.atoms.set_constraint([c for c in self.atoms.constraints if type(c).__name__ != "FixSymmetry"])
        return {"converged": self.converged, "steps": int(self.optimizer.nsteps), "fmax": left}

    def _look(self) -> None:
        self.optimizer.call_observers()  # writes the trajectory
        self.converged = bool(self.optimizer.converged())  # forces on the cell too, where there is a filter


def relax_together(
    structures: Sequence[Atoms], evaluate: Evaluate, settings: Settings, paths: Sequence[Path | None]
) -> list[Relaxation | str]:
    """Each structure to where its forces vanish, or to the last step; or why the model has no answer to it.

    structures: change in place. paths: of their trajectories.
    """
    if settings.symmetry:
        for atoms in structures:
            keep_symmetry(atoms)
    there: list[Relaxation | str] = []
    for atoms, results, path in zip(structures, evaluate(structures), paths, strict=True):
        there.append(results if isinstance(results, str) else Relaxation(atoms, results, settings, path))
    going = [one for one in there if isinstance(one, Relaxation) and one.going]
    while going:
        for one in going:
            one.move()
        for one, results in zip(going, evaluate([one.atoms for one in going]), strict=True):
            one.take(results)
        going = [one for one in going if one.going]
    return there


def evaluator(model: TaskModel, task: str, max_edges: int, stress: bool) -> Evaluate:
    """One pass of a model over many structures, cut by edges. stress: of those whose cell spans a volume."""

    def evaluate(structures: Sequence[Atoms]) -> list[Results | str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UndeterminedEnergy)  # differences of energy are not touched
                out = model.predict(list(structures), task, max_edges=max_edges, stress=stress)
        except ValueError as error:
            if len(structures) == 1:
                return [str(error).removeprefix("structure 0: ")]
            return [results for atoms in structures for results in evaluate([atoms])]  # which one it is
        found: list[Results | str] = []
        for k in range(len(structures)):
            results: Results = {"energy": float(out.energy[k]), "forces": out.forces[k]}
            if not (np.isfinite(results["energy"]) and np.isfinite(out.forces[k]).all()):
                found.append("the model's answer is not finite: is the structure sound?")
                continue
            if out.stress is not None and np.isfinite(out.stress[k]).all():
                results["stress"] = full_3x3_to_voigt_6_stress(out.stress[k])
            found.append(results)
        return found

    return evaluate


def keep_symmetry(atoms: Atoms) -> None:
    """Move the atoms of a crystal to the symmetric places next to them, and let ASE keep its space group from now on.

    ImportError names the extra that it needs.
    """
    try:
        import spglib  # noqa: F401
        from ase.constraints import FixSymmetry
    except ImportError as error:
        raise ImportError(f"--symmetry needs spglib ({error}): pip install 'multifid[symmetry]'") from error
    if atoms.pbc.all():
        atoms.set_constraint([*atoms.constraints, FixSymmetry(atoms, symprec=SYMPREC)])
