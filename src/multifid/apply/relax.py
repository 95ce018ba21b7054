"""`multifid relax MODEL FILE... --task T --out OUT.xyz`: structures to where their forces vanish, many at once.

Chunks of structures go from step to step together (`lockstep`), on the ranks of a launch in turn. Fixed atoms
(`move_mask` of extended XYZ, selective dynamics, constraints of ASE's trajectories) stay fixed. With `cell` the cells
of crystals are relaxed too, by `FrechetCellFilter`: forces on the cell then count for convergence like those on atoms.
With `symmetry` crystals keep their space group. A cell that is not periodic in three directions stays as it is.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.apply.calculator import DTYPES
from multifid.apply.frames import Given
from multifid.apply.lockstep import Evaluate, Relaxation, Settings, evaluator, relax_together
from multifid.apply.model import load
from multifid.apply.output import NAMED, Done, labelled, refuse_out, write_all
from multifid.apply.parts import contents
from multifid.model.predictor import EDGES
from multifid.model.task_model import TaskModel
from multifid.parallel import groups

__all__ = ["Settings", "relax"]
ATOMS, STRUCTURES = 1024, 32  # of a chunk on a processor, which they keep busy
ON_ACCELERATOR = 16  # times as many


def relax(
    model: Path | str,
    files: Sequence[Path | str],
    out: Path | str,
    task: str | None = None,
    settings: Settings = Settings(),
    *,
    device: str | None = None,
    dtype: str = "float64",
    max_edges: int | None = None,
    skip: bool = False,
    console: Console | None = None,
) -> bool:
    """Write the relaxed structures of files; returns whether all have converged.

    out: extended XYZ as of `predict`, with `converged`, `steps` and `fmax` (eV/angstrom, the longest force that is left
    on an atom that may move) in `info`; structures that have not converged are there too, and are named. files, skip,
    errors, what was stopped: as in `predict`. The same on every rank of a launch by torchrun or srun.
    """
    model, out, given = Path(model), Path(out), [Path(file) for file in files]
    refuse_out(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    with groups.world(device) as world:
        loaded = load(model, world.device).in_precision(DTYPES[dtype])
        name = loaded.energy_task(task)
        if settings.cell and not loaded.is_conservative(name):
            raise ValueError(
                f"--cell: {model} predicts the forces of {name} directly, so it has no stress, and its cells cannot be "
                "relaxed; a model of `model.branch.forces: conservative` can"
            )
        with world.together():
            if settings.trajectory is not None:
                settings.trajectory.mkdir(parents=True, exist_ok=True)
        in_motion = evaluator(loaded, name, max_edges or EDGES, stress=settings.cell)
        at_rest = evaluator(loaded, name, max_edges or EDGES, stress=True)
        more = 1 if world.device.type == "cpu" else ON_ACCELERATOR
        request: dict[str, Any] = {"command": "relax", "model": contents(model), "task": name, "dtype": dtype}
        request |= {"device": world.device.type, "max_edges": max_edges or EDGES, "settings": _as_json(settings)}
        tally = write_all(
            given,
            out,
            lambda chunk: _relaxed(chunk, loaded, name, in_motion, at_rest, settings),
            world,
            request,
            atoms=more * ATOMS,
            structures=more * STRUCTURES,
            skip=skip,
            title=f"relax {name}",
        )
        if world.first:
            unfinished = (
                f"; {tally.flagged} not converged in {settings.steps} steps, as {'; '.join(tally.flags[:NAMED])}"
            )
            text = f"{out}: {tally.structures} structures, task {name}"
            text += unfinished if tally.flagged else f", all converged to {settings.fmax} eV/angstrom"
            (console or Console()).print(text + tally.rest(), soft_wrap=True, highlight=False, markup=False)
    return not tally.flagged


def _relaxed(
    chunk: Sequence[Given], model: TaskModel, task: str, in_motion: Evaluate, at_rest: Evaluate, settings: Settings
) -> Done:
    """The structures of a chunk relaxed, or why not."""
    done, there = Done(), list[tuple[Given, Relaxation]]()
    for given in chunk:
        if not len(given.atoms):
            done.refused.append(f"{given.where}: it has no atoms")
    chunk = [given for given in chunk if len(given.atoms)]
    folder = settings.trajectory
    paths = [None if folder is None else folder / f"{given.number:06}.traj" for given in chunk]
    for given, one in zip(chunk, relax_together([g.atoms for g in chunk], in_motion, settings, paths), strict=True):
        if isinstance(one, str) or one.failed:
            done.refused.append(f"{given.where}: {one if isinstance(one, str) else one.failed}")
        else:
            there.append((given, one))
    results = at_rest([given.atoms for given, _ in there])
    for (given, one), final in zip(there, results, strict=True):
        how = one.finish()
        assert not isinstance(final, str), final  # it had an answer with the same atoms
        done.atoms.append(labelled(given.atoms, final, task=task, **how))
        if not one.converged:
            done.flagged.append(f"{given.where} (fmax {how['fmax']:.3g})")
    return done


def _as_json(settings: Settings) -> dict[str, Any]:
    about = asdict(settings)
    return about | {"trajectory": None if settings.trajectory is None else str(settings.trajectory)}
