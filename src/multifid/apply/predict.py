"""`multifid predict MODEL FILE... --task T --out OUT.xyz`: a model's energies, forces and stresses of files."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress
from rich.console import Console

from multifid.apply.frames import Given
from multifid.apply.model import load
from multifid.apply.output import DEVIATIONS, Done, labelled, refuse_out, write_all
from multifid.apply.parts import contents
from multifid.model.output import Output
from multifid.model.pieces import EDGES
from multifid.model.predictor import Predictor
from multifid.model.task_model import TaskModel
from multifid.model.undetermined import UndeterminedEnergy
from multifid.parallel import groups
from multifid.structures.atoms import pack_atoms

ATOMS = 4096  # of a chunk, about
STRUCTURES = 512  # of a chunk, at most


def predict(
    model: Path | str,
    files: Sequence[Path | str],
    out: Path | str,
    task: str | None = None,
    *,
    device: str | None = None,
    precision: str | None = None,
    max_edges: int | None = None,
    uncertainty: bool = False,
    disagreement: bool = False,
    skip: bool = False,
    console: Console | None = None,
) -> int:
    """Write the structures of files with what a model says of them; returns how many, on every rank.

    out: extended XYZ that ASE reads back: energy (eV, total), forces (eV/angstrom), stress (eV/angstrom^3) where there
    is one, `info["task"]`, and what else a structure had but its labels; `info["undetermined"]` is true where the
    training data do not determine the total energy of a composition. uncertainty: also
    `info["energy_uncertainty"]` (eV, of the total), `info["stress_uncertainty"]` (eV/angstrom^3) and the columns
    `energies_uncertainty` (eV) and `forces_uncertainty` (eV/angstrom), standard deviations. disagreement: also
    `info["branches"]`, how many branches know a structure, and, where there are two or more, the standard deviations
    over them, `info["energy_disagreement"]` and so on, named as uncertainties are. A task of a property writes
    that in place of energies, under the task's name: in `info`, of a class with its probabilities beside it, or as a
    column of atoms. files: see `frames`. skip: leave out what the model refuses, and count it, in place of an error.
    The same on every rank of a launch by torchrun or srun.

    ValueError names the structures that are refused: elements that the task has never seen, atoms that coincide,
    positions that are not finite, ...; FileExistsError where `out` exists. Then nothing is written.
    """
    model, out, given = Path(model), Path(out), [Path(file) for file in files]
    refuse_out(out)
    with groups.world(device) as world:
        loaded = load(model, world.device, precision)
        name = loaded.task(task)
        if uncertainty:
            loaded.refuse_uncalibrated(name)
        if disagreement:  # an error, before hours of work, where there is none
            loaded.energy_task(name)
            loaded.disagreement(pack_atoms([]), stress=False)
        asked = {"uncertainty": uncertainty, "disagreement": disagreement, "max_edges": max_edges or EDGES}

        def work(chunk: Sequence[Given]) -> Done:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UndeterminedEnergy)  # said once, at the end
                there, refused = _predicted(loaded, name, chunk, asked)
            return Done(there, refused, ["" for atoms in there if "undetermined" in atoms.info])

        request: dict[str, Any] = {"command": "predict", "model": contents(model), "task": name, "precision": precision}
        request |= {"device": world.device.type, "max_edges": max_edges or EDGES}
        if uncertainty and isinstance(loaded, Predictor):
            request["uncertainty"] = repr(loaded.calibrated(name)[1])
        request |= {"disagreement": True} if disagreement else {}
        tally = write_all(
            given, out, work, world, request, atoms=ATOMS, structures=STRUCTURES, skip=skip, title=f"predict {name}"
        )
        if world.first:
            text = f"{out}: {tally.structures} structures, task {name}{tally.rest()}"
            if tally.flagged:
                text += (
                    f"; {tally.flagged} of compositions whose total energy the training data of {name} do not determine"
                )
            (console or Console()).print(text, soft_wrap=True, highlight=False, markup=False)
    return tally.structures


def _predicted(
    model: TaskModel, task: str, chunk: Sequence[Given], asked: dict[str, Any]
) -> tuple[list[Atoms], list[str]]:
    """Atoms with their predictions, and what was refused of a chunk: where and why."""
    try:
        out = model.predict([given.atoms for given in chunk], task, **asked)
    except ValueError as error:
        if len(chunk) == 1:
            return [], [f"{chunk[0].where}: {str(error).removeprefix('structure 0: ')}"]
        each = [_predicted(model, task, [given], asked) for given in chunk]  # which one it is
        return [atoms for there, _ in each for atoms in there], [text for _, refused in each for text in refused]
    there, refused = [], []
    if out.value is not None:
        for k, given in enumerate(chunk):
            made = with_property(given.atoms, out, k, task)
            there += [] if made is None else [made]
            refused += [f"{given.where}: the model's answer is not finite"] if made is None else []
        return there, refused
    for k, given in enumerate(chunk):
        results = {"energy": float(out.energy[k]), "forces": out.forces[k]}
        if not (np.isfinite(results["energy"]) and np.isfinite(out.forces[k]).all()):
            refused.append(f"{given.where}: the model's answer is not finite")
            continue
        if out.stress is not None and np.isfinite(out.stress[k]).all():
            results["stress"] = full_3x3_to_voigt_6_stress(out.stress[k])
        doubt: dict[str, Any] = {"undetermined": True} if out.undetermined[k] else {}
        columns: dict[str, np.ndarray] = {}
        if asked["disagreement"]:
            doubt["branches"] = int(out.branches[k])
        for kind in DEVIATIONS:
            if asked[kind]:
                _add_deviations(out, kind, k, doubt, columns)
        made = labelled(given.atoms, results, task=task, **doubt)
        made.arrays |= columns
        there.append(made)
    return there, refused


def _add_deviations(out: Output, kind: str, k: int, info: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
    """The standard deviations of structure `k`, those that are numbers; `kind`: whose."""
    for name in ("energy", "stress"):
        if np.isfinite(value := getattr(out, f"{name}_{kind}")[k]):
            info[f"{name}_{kind}"] = float(value)
    for name in ("energies", "forces"):
        if np.isfinite(values := getattr(out, f"{name}_{kind}")[k]).all():
            columns[f"{name}_{kind}"] = values


def with_property(atoms: Atoms, out: Output, k: int, task: str) -> Atoms | None:
    """Atoms with the property of structure `k` under the name of its task; None where it is not finite."""
    value = out.value[k]
    finite = out.probabilities[k] if out.probabilities is not None else value
    if not np.isfinite(finite).all():
        return None
    made = labelled(atoms, {}, task=task)
    made.calc = None
    for place in (made.info, made.arrays):
        place.pop(task, None)
    if np.shape(value)[:1] == (len(made),) and isinstance(out.value, list):
        made.arrays[task] = value
    elif out.probabilities is not None:
        made.info |= {task: str(value), f"{task}_probabilities": out.probabilities[k]}
    else:
        made.info[task] = float(value) if np.shape(value) == () else value
    return made
