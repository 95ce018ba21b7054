"""`multifid relax MODEL FILE... --task T --out OUT.xyz`: structures to where their forces vanish, by ASE's optimizers.

Each structure by itself, on the ranks of a launch in turn. Fixed atoms (`move_mask` of extended XYZ, selective
dynamics, constraints of ASE's trajectories) stay fixed. With `cell` the cells of crystals are relaxed too, by
`FrechetCellFilter`: forces on the cell then count for convergence like those on atoms. A cell that is not periodic in
three directions stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE, LBFGS
from rich.console import Console

from multifid.apply.calculator import Calculator
from multifid.apply.frames import Given
from multifid.apply.model import load
from multifid.apply.output import NAMED, labelled, refuse_out, write_all
from multifid.parallel import groups

OPTIMIZERS: dict[str, Any] = {"fire": FIRE, "lbfgs": LBFGS, "bfgs": BFGS}


@dataclass(frozen=True)
class Settings:
    """How structures are relaxed."""

    fmax: float = 0.05  # eV/angstrom: the longest force that is left
    steps: int = 500  # at most
    cell: bool = False  # cells of crystals too
    optimizer: str = "fire"
    trajectory: Path | None = None  # a directory for one ASE trajectory of each structure

    def __post_init__(self) -> None:
        if not self.fmax > 0:
            raise ValueError(f"--fmax {self.fmax} must be a positive force in eV/angstrom")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer {self.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")


def relax(
    model: Path,
    files: Sequence[Path],
    out: Path,
    task: str | None = None,
    settings: Settings = Settings(),
    *,
    device: str | None = None,
    dtype: str = "float64",
    skip: bool = False,
    console: Console | None = None,
) -> bool:
    """Write the relaxed structures of files; returns whether all have converged.

    out: extended XYZ as of `predict`, with `converged`, `steps` and `fmax` (eV/angstrom, the longest force that is left
    on an atom that may move) in `info`; structures that have not converged are there too, and are named. files, skip,
    errors: as in `predict`. The same on every rank of a launch by torchrun or srun.
    """
    refuse_out(out)
    with groups.world(device) as world:
        calculator = load(model, world.device).calculator(task, dtype=dtype)
        if settings.cell and not calculator.conservative:
            raise ValueError(
                f"--cell: the forces of {model} are predicted directly, so it has no stress, and its cells cannot be "
                "relaxed; a model of `model.branch.forces: conservative` can"
            )
        with world.together():
            if settings.trajectory is not None:
                settings.trajectory.mkdir(parents=True, exist_ok=True)
        late: list[str] = []

        def work(number: int, chunk: Sequence[Given]) -> tuple[list[Atoms], list[str]]:
            there, refused = _relaxed(calculator, number, chunk[0], settings) if chunk else ([], [])
            late.extend(f"{chunk[0].where} (fmax {a.info['fmax']:.3g})" for a in there if not a.info["converged"])
            return there, refused

        tally = write_all(files, out, work, world, atoms=1, structures=1, skip=skip, title=f"relax {calculator.task}")
        late = [where for rank in range(world.size) for where in world.share(late, rank)]
        if world.first:
            unfinished = f"; {len(late)} not converged in {settings.steps} steps, as {'; '.join(late[:NAMED])}"
            text = f"{out}: {tally.structures} structures, task {calculator.task}"
            text += (unfinished if late else f", all converged to {settings.fmax} eV/angstrom") + tally.left_out()
            (console or Console()).print(text, soft_wrap=True, highlight=False, markup=False)
    return not late


def _relaxed(calculator: Calculator, number: int, given: Given, settings: Settings) -> tuple[list[Atoms], list[str]]:
    """One structure relaxed, or why not."""
    atoms = given.atoms
    atoms.calc = calculator
    movable = FrechetCellFilter(atoms) if settings.cell and atoms.pbc.all() else atoms
    path = None if settings.trajectory is None else str(settings.trajectory / f"{number:06}.traj")
    try:
        optimizer = OPTIMIZERS[settings.optimizer](movable, logfile=None, trajectory=path)
        converged = bool(optimizer.run(fmax=settings.fmax, steps=settings.steps))
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
        left = np.linalg.norm(atoms.get_forces(), axis=1).max(initial=0.0)
        if calculator.conservative:
            results |= _stress(atoms)
    except ValueError as error:
        return [], [f"{given.where}: {str(error).removeprefix('structure 0: ')}"]
    how = {"converged": converged, "steps": int(optimizer.nsteps), "fmax": float(left)}
    return [labelled(atoms, results, task=calculator.task, **how)], []


def _stress(atoms: Atoms) -> dict[str, np.ndarray]:
    try:
        return {"stress": atoms.get_stress(apply_constraint=False)}
    except PropertyNotImplementedError:  # a cell without volume
        return {}
