"""Transition1x (`Transition1x.h5`): geometries along 10,000 reaction paths.

    f["train" | "val" | "test" | "data"][formula]["rxnNNNN"]   atomic_numbers, positions, energies, forces of the frames
        ["reactant" | "transition_state" | "product"]          the same keys, one frame each

Schreiner et al., Scientific Data 9, 779 (2022). Everything is in eV and angstrom already; neutral singlets.

`data` is the union of the three splits: reading it beside them would count every frame twice. The shipped splits are
read where the file has them, else `data`, without a split; then all reactions of one formula are relatives, because
they share reactants.

The end points are records of their own: they are yielded after the frames of their reaction, unless the same geometry
is among the frames, which is a skip (a frame must not count twice).
"""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict

from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, cut
from multifid.readers.molecule_hdf5 import dataset, first_record, opened
from multifid.readers.records import BadRecord, array, atomic_numbers, number, structure_or_skip, vectors
from multifid.structures.structure import Labels, Structure

TASK = "transition1x"
TASKS = {TASK: LabelSet("wB97X/6-31G(d) (ORCA 5.0.2)", "total")}
RELATIVE = "formula"
ENDINGS = (".h5", ".hdf5")

SPLITS = {"train": "train", "val": "validation", "test": "test"}
END_POINTS = ("reactant", "transition_state", "product")
ENERGY, FORCES = "wB97x_6-31G(d).energy", "wB97x_6-31G(d).forces"
PART = 1 << 14  # frames of a part
SAME = 1e-5  # angstrom: two geometries closer than this in every coordinate are one


class Options(BaseModel):
    """Transition1x leaves nothing to choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)


holds = first_record


def parts(path: Path, options: Options) -> list[Part]:
    """Formulas in the order of the file, about PART frames together."""
    with opened(path) as file:
        return cut([_count(file[name][formula]) for name, formula in _formulas(path, file)], PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Every frame and end point of the file, or why it is skipped; part: which formulas. Memory holds one reaction.

    `source_id`: `split/formula/reaction/frame`, the frame a number or the name of an end point. ValueError if the file
    is damaged or has neither splits nor `data`.
    """
    with opened(path) as file:
        formulas = _formulas(path, file)
        start, stop = part or (0, len(formulas))
        for done, (name, formula) in enumerate(formulas[start:stop], start=1):
            reactions = file[name][formula]
            if not isinstance(reactions, h5py.Group):
                yield Skip("formula is not a group of reactions", f"{name}/{formula}")
                continue
            for reaction, group in reactions.items():
                yield from _reaction(group, f"{name}/{formula}/{reaction}", formula, SPLITS.get(name))
            progress(done / (stop - start))
    progress(1.0)


def _formulas(path: Path, file: h5py.File) -> list[tuple[str, str]]:
    groups = [name for name in SPLITS if name in file] or [name for name in ("data",) if name in file]
    if not groups:
        raise ValueError(f"{path}: groups train, val, test or data are expected, found {sorted(file)[:10]}")
    return [(name, formula) for name in groups for formula in file[name]]


def _count(reactions: h5py.Group | h5py.Dataset) -> int:
    """Frames of all reactions of a formula; what is none counts as nothing."""
    if not isinstance(reactions, h5py.Group):
        return 0
    energies = (group.get(ENERGY) for group in reactions.values() if isinstance(group, h5py.Group))
    return sum(energy.size for energy in energies if isinstance(energy, h5py.Dataset))


def _reaction(group: h5py.Group, where: str, formula: str, split: str | None) -> Iterator[Record]:
    try:
        numbers = atomic_numbers(dataset(group, "atomic_numbers"))
        frames = _frames(group, len(numbers))
    except BadRecord as bad:
        yield Skip(str(bad), where)
        return
    for i, frame in enumerate(zip(*frames, strict=True)):
        yield structure_or_skip(f"{where}/{i}", _structure, numbers, *frame, f"{where}/{i}", formula, split)
    for name in END_POINTS:
        if name in group:
            yield _end_point(group[name], numbers, frames[0], f"{where}/{name}", formula, split)


def _end_point(
    group: h5py.Group, numbers: np.ndarray, path: np.ndarray, where: str, formula: str, split: str | None
) -> Record:
    try:
        own = atomic_numbers(dataset(group, "atomic_numbers")) if "atomic_numbers" in group else numbers
        positions, energies, forces = _frames(group, len(own))
        if len(positions) != 1:
            raise BadRecord("end point is not one frame")
    except BadRecord as bad:
        return Skip(str(bad), where)
    if np.array_equal(own, numbers) and (np.abs(path - positions[0]).max(axis=(1, 2)) < SAME).any():
        return Skip("end point is a frame of its path", where)
    return structure_or_skip(where, _structure, own, positions[0], energies[0], forces[0], where, formula, split)


def _frames(group: h5py.Group, atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (frames, atoms, 3), energies (frames,) and forces (frames, atoms, 3) of a group."""
    positions = array(dataset(group, "positions"), "positions")
    energies = array(dataset(group, ENERGY), "energy")
    forces = array(dataset(group, FORCES), "forces")
    shape = (energies.size, atoms, 3)
    if positions.shape != shape or forces.shape != shape:
        raise BadRecord("positions, energies and forces of different lengths")
    return positions, energies.reshape(-1), forces


def _structure(
    numbers: np.ndarray,
    positions: np.ndarray,
    energy: float,
    forces: np.ndarray,
    where: str,
    formula: str,
    split: str | None,
) -> Structure:
    labels = Labels(number(energy, "energy"), vectors(forces, len(numbers), "forces"))
    positions = vectors(positions, len(numbers), "positions")
    return Structure(numbers, positions, {TASK: labels}, relative=formula, source_id=where, charge=0, split=split)
