"""Direct forces no larger than validation bears out: `train.shrink`.

Where few structures say little about forces, a head learns those of its training structures, and elsewhere adds noise:
all its forces may be further from the labels than zero forces are. At the end of a run each branch with direct forces
is multiplied by a factor from 0 to 1: the smallest whose absolute errors on validation are not certainly above the
least. *Certainly* is a standard error of the difference, over compositions, since structures of one composition are
not independent. So a branch whose errors hang on a few structures does not count on them, and one that is certain
of its forces keeps them. Conservative forces cannot be made smaller without the energy.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from multifid.feed.loader import Source, collate
from multifid.model.branch import Branch
from multifid.model.potential import Potential
from multifid.model.predictor import Predictor
from multifid.model.saved import Description, load_description, load_potential, save_description

MOST = 2_000  # validation structures of a task
AT_ONCE = 32  # structures
FACTORS = np.linspace(0.0, 1.0, 21)
KEY = "forces_factor"  # in the description of a task
BEST, LAST = "model.safetensors", "last.safetensors"


def shrink_forces(run: Path, sources: list[Source], device: torch.device) -> list[str]:
    """Shrink the direct forces of a run's model and last model, and say so, in lines and in RUN/model.json.

    On one process, after the last model was written. A branch of the model that has been shrunk is left as it is.
    """
    potential, description = load_potential(run)
    model, factors, lines = Predictor(potential, description, device), {}, []
    trained = {description["tasks"][task]["branch"] for source in sources for task in source.tasks}
    own = {task: source for source in sources for task in source.tasks if KEY not in description["tasks"][task]}
    for name in sorted({description["tasks"][task]["branch"] for task in own}):
        branch = potential.branches[name]
        if not isinstance(branch, Branch) or branch.forces is None:
            continue
        tasks = [task for task in sorted(own) if description["tasks"][task]["branch"] == name]
        errors = np.concatenate([of_compositions(model, own[task], task) for task in tasks])
        factor = factor_of(errors)
        if factor == 1.0:
            continue
        factors[name] = factor
        ratio = errors[:, [0, -1]].sum(axis=0)
        lines.append(
            f"shrink: {', '.join(tasks)}: direct forces are multiplied by {factor:.2f}: on validation structures of "
            f"{len(errors)} compositions they had {ratio[1] / ratio[0]:.3f} of the errors of zero forces, and have "
            f"{errors[:, factor == FACTORS].sum() / ratio[0]:.3f}"
        )
    before = {about["branch"]: about[KEY] for about in description["tasks"].values() if KEY in about}
    before = {branch: factor for branch, factor in before.items() if branch in trained}
    for file, wanted in ((BEST, factors), (LAST, before | factors)):  # the last model was written anew
        if wanted:
            _multiply(run, file, potential, wanted)
    if factors:
        for about in description["tasks"].values():
            if about["branch"] in factors:
                about[KEY] = factors[about["branch"]]
        save_description(run / "model.json", description)
    return lines


def keep_factors(run: Path, description: Description) -> None:
    """Put into a description what RUN/model.json says of branches that have been shrunk."""
    if (run / "model.json").exists():
        before = load_description(run)["tasks"]
        for task, about in description["tasks"].items():
            if KEY in before.get(task, {}):
                about[KEY] = before[task][KEY]


def factor_of(errors: np.ndarray) -> float:
    """The factor, from absolute errors (compositions, factors); 1 where there are none."""
    errors = errors[np.ptp(errors, axis=1) > 0.0]  # where forces are zero by symmetry, all factors are alike
    if not len(errors):
        return 1.0
    best = int(errors.sum(axis=0).argmin())
    for k in range(best):
        more = errors[:, k] - errors[:, best]
        if len(more) > 1 and more.sum() <= more.std(ddof=1) * len(more) ** 0.5:
            return float(FACTORS[k])
    return float(FACTORS[best])


def of_compositions(model: Predictor, source: Source, task: str) -> np.ndarray:
    """Sums of absolute errors of forces, eV/angstrom, by each of `FACTORS`: (compositions, factors)."""
    sums: dict[bytes, np.ndarray] = {}
    for composition, predicted, label in _structures(model, source, task):
        found = [np.abs(factor * predicted - label).sum() for factor in FACTORS]
        sums[composition] = sums.get(composition, 0.0) + np.array(found)
    return np.array(list(sums.values())).reshape(-1, len(FACTORS))


def _structures(model: Predictor, source: Source, task: str) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """Composition, predicted forces and labels of validation structures, spread evenly; finite ones."""
    size = source.store.size("validation")
    index = source.store.pick("validation", np.linspace(0, max(size - 1, 0), min(size, MOST)).astype(np.int64))
    for first in range(0, len(index), AT_ONCE):
        batch = collate([(source, index[first : first + AT_ONCE])], model.cutoff)
        labels = batch.targets[task].forces
        if labels is None:
            return
        forces = model.aligned(batch, task, stress=False).forces.cpu().numpy()
        start = 0
        for natoms in batch.natoms.tolist():
            atoms = slice(start, start := start + natoms)
            label = labels[atoms].double().numpy()
            counts = np.bincount(batch.numbers[atoms].numpy())
            if np.isfinite(label).all() and np.isfinite(forces[atoms]).all():
                yield (counts // np.gcd.reduce(counts)).tobytes(), forces[atoms], label


def _multiply(run: Path, file: str, potential: Potential, factors: dict[str, float]) -> None:
    """Multiply the last maps of force heads in RUN/FILE, in the precision that they have; committed by rename."""
    tensors = load_file(run / file)
    for name, factor in factors.items():
        branch = potential.branches[name]
        assert isinstance(branch, Branch)
        last = {id(parameter) for parameter in branch.last_of_forces()}
        for key, parameter in branch.named_parameters(prefix=f"branches.{name}"):
            if id(parameter) in last:
                tensors[key] = tensors[key] * factor
    part = (run / file).with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, run / file)
