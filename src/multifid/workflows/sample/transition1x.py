"""`transition1x.h5`: reaction paths between isomers, in the layout of Transition1x, labelled with GFN1-xTB.

Every reaction: the two minima, the highest image of the band's last step as transition state, and frames from the
band's earlier steps, as the published file keeps frames from all of its optimisation. Reactions of one formula share
minima, so the shipped split never cuts a formula.
"""

from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from multifid.workflows.sample import reactions
from multifid.workflows.sample.molecules import library
from multifid.workflows.sample.plan import new_rng, portions
from multifid.workflows.sample.xtb import JobResult, Point, Unusable

TASK = FORMAT = "transition1x"
LEVEL_OF_THEORY = reactions.METHOD
FILES = ("transition1x.h5",)
PER_REACTION = 10  # two minima, the transition state, seven frames
END_POINTS = ("reactant", "transition_state", "product")
FRACTION = 0.1  # of the reactions for validation, and again for test


def jobs(structures: int, seed: int) -> list[tuple]:
    chosen = _spread(max(1, structures // PER_REACTION), seed)
    counts = portions(structures, len(chosen))
    return [(*reaction, max(1, n - len(END_POINTS)), seed) for reaction, n in zip(chosen, counts, strict=True)]


def _spread(wanted: int, seed: int) -> list[tuple[str, str, str]]:
    """Reactions spread over the formulas: one of each formula before a second of any. (name, reactant, product)."""
    named = [(f"rxn{i:04d}", *pair) for i, pair in enumerate(reactions.isomers())]
    met: Counter[str] = Counter()
    ranked = []
    for k in new_rng(seed, TASK).permutation(len(named)):
        formula = library()[named[k][1]].formula
        ranked.append((met[formula], named[k]))
        met[formula] += 1
    ranked.sort(key=lambda entry: entry[0])
    return sorted(reaction for _, reaction in ranked[:wanted])


def compute(name: str, reactant: str, product: str, frames: int, seed: int) -> JobResult:
    """One record: (formula, name, points of the three end points, points of the frames)."""
    rng = new_rng(seed, TASK, name)
    try:
        steps = reactions.path(reactant, product, rng)
    except Unusable as reason:
        return JobResult(skipped=Counter({str(reason): 1}))
    last = steps[-1]
    highest = 1 + int(np.argmax([point.energy for point in last[1:-1]]))
    # the first third of the steps still remembers the interpolation, atoms passing through each other
    pool = [point for step in steps[len(steps) // 3 :] for point in step[1:-1] if point is not last[highest]]
    chosen = sorted(rng.permutation(len(pool))[:frames])
    return JobResult(
        [(library()[reactant].formula, name, (last[0], last[highest], last[-1]), [pool[i] for i in chosen])]
    )


def shipped_split(formulas: list[str], elements: list[set[int]], seed: int) -> list[str]:
    """train, val or test for each reaction: whole formulas, and every element occurs in train."""
    splits = dict.fromkeys(formulas, "train")
    quota = max(1, round(FRACTION * len(formulas)))
    order = [sorted(set(formulas))[i] for i in new_rng(seed, TASK, "split").permutation(len(set(formulas)))]
    everything = set().union(*elements)
    for split in ("test", "val"):
        for formula in order:
            size = sum(splits[f] == split or f == formula for f in formulas)
            rest = [e for f, e in zip(formulas, elements, strict=True) if splits[f] == "train" and f != formula]
            if splits[formula] == "train" and size <= quota and everything == set().union(*rest):
                splits[formula] = split
    return [splits[formula] for formula in formulas]


def write(
    paths: tuple[Path, ...], records: list[tuple[str, str, tuple[Point, ...], list[Point]]], seed: int
) -> list[int]:
    elements = [set(ends[0].numbers.tolist()) for _, _, ends, _ in records]
    splits = shipped_split([formula for formula, *_ in records], elements, seed)
    with h5py.File(paths[0], "w") as file:
        file.attrs["level_of_theory"] = LEVEL_OF_THEORY
        for name in ("data", "train", "val", "test"):
            file.create_group(name)
        for (formula, name, ends, frames), split in zip(records, splits, strict=True):
            reaction = file["data"].require_group(formula).create_group(name)
            _write_points(reaction, frames)
            for end_point, point in zip(END_POINTS, ends, strict=True):
                _write_points(reaction.create_group(end_point), [point])
            file[split].require_group(formula)[name] = reaction  # a hard link: `data` is the union of the three
    return [sum(len(frames) + 3 for *_, frames in records)]


def _write_points(group: h5py.Group, points: list[Point]) -> None:
    data = {
        "atomic_numbers": points[0].numbers.astype(np.int64),
        "positions": np.array([p.positions for p in points]),
        "wB97x_6-31G(d).energy": np.array([p.energy for p in points]),
        "wB97x_6-31G(d).forces": np.array([p.forces for p in points]),
    }
    for key, values in data.items():
        group.create_dataset(key, data=values, track_times=False)
