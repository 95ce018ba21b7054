"""What answers for tasks: structures in, eV out, whatever computes the numbers.

A `TaskModel` knows what a description says of each task (references, elements, charges), checks structures and cuts
them into batches. The numbers of a batch are left to `answer`: of a `Predictor`, which holds the potential, or of an
exported file. The task is always named where there are several: the answer of another branch looks like any other, and
is wrong by thousands of eV.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, Self

import numpy as np
import torch

from multifid.graphs.batch import Batch
from multifid.model.disagreement import Disagreement
from multifid.model.electrons import as_trained
from multifid.model.output import Answer, Doubts, Output, doubts_of_each
from multifid.model.pieces import EDGES, batch_of, between, cut_structures, refuse_coincident
from multifid.model.undetermined import (
    NoForces,
    StaleBranch,
    UndeterminedEnergy,
    stale,
    undetermined,
    warning,
    without_forces,
)
from multifid.structures.atoms import pack_atoms
from multifid.structures.elements import MAX_Z, SYMBOLS
from multifid.structures.properties import OF_ATOMS, Property, shape_of
from multifid.structures.structure import Packed

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


class TaskModel(ABC):
    """A trained model, in whatever form, on one device and in one precision."""

    description: Any
    device: torch.device
    dtype: torch.dtype
    gives_features: bool = True

    @abstractmethod
    def is_conservative(self, task: str) -> bool:
        """Whether a task's forces are minus the gradient of its energy; only then there is a stress."""

    @abstractmethod
    def in_precision(self, precision: str | None) -> Self:
        """This model in another precision; itself where that is its own."""

    @abstractmethod
    def answer(
        self, packed: Packed, batch: Batch, task: str, *, stress: bool, features: bool = False
    ) -> Iterator[Answer]:
        """(energy, forces, stress, energies, features) of each structure of a batch; stress only where asked for."""

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that it was trained on."""
        return list(self.description["tasks"])

    @property
    def cutoff(self) -> float:
        """angstrom"""
        return float(self.description["cutoff"])

    def elements(self, task: str | None = None) -> list[str]:
        """The symbols of the elements that the branch of a task has seen in training."""
        return [SYMBOLS[z] for z in self._seen(self.task(task))]

    def property_of(self, task: str | None = None) -> Property | None:
        """The property that a task predicts in place of energies; None: energies."""
        name = task if task is not None and task in self.description["tasks"] else self.task(task)
        about = self.description["tasks"][name].get("property")
        return None if about is None else Property.from_manifest(name, about)

    def energy_task(self, name: str | None = None) -> str:
        """As `task`, for what needs energies: ValueError where the task predicts a property."""
        found = self.task(name)
        if (held := self.property_of(found)) is not None:
            able = [t for t in self.tasks if self.property_of(t) is None]
            raise ValueError(
                f"task {found!r} predicts a property ({held.kind}), no energies and forces; "
                + (f"tasks with energies: {', '.join(able)}" if able else "no task of this model has energies")
            )
        return found

    def values(self, packed: Packed, batch: Batch, task: str) -> np.ndarray:
        """The property of each structure or atom of a batch, in its unit; of a class probabilities (S, classes)."""
        raise ValueError("properties come from the trained run or its .mfid file, not from compiled code")

    def task(self, name: str | None = None) -> str:
        """The task of this name, or the only one. ValueError lists the tasks where the name says nothing."""
        listed = ", ".join(self.tasks)
        if name is None:
            if len(self.tasks) == 1:
                return self.tasks[0]
            raise ValueError(
                f"this model has several tasks: say which one answers, as task={self.tasks[0]!r}; it has {listed}"
            )
        if name not in self.tasks:
            raise ValueError(f"this model has no task {name!r}; it has {listed}")
        if (said := stale(name, self.description["tasks"][name])) is not None:
            warnings.warn(said, StaleBranch, stacklevel=3)
        if (said := without_forces(name, self.description["tasks"][name])) is not None:
            warnings.warn(said, NoForces, stacklevel=3)
        return name

    def predict(
        self,
        structures: Any,
        task: str | None = None,
        *,
        precision: str | None = None,
        stress: bool = True,
        features: bool = False,
        uncertainty: bool | Literal["energy"] = False,
        disagreement: bool = False,
        max_edges: int = EDGES,
    ) -> Output:
        """What the branch of a task says of structures.

        Charge and multiplicity are read from `info["charge"]` and `info["spin"]`, and used where the task was trained
        with several.

        Args:
            structures: one `ase.Atoms`, or a list of them.
            task: whose branch answers; may be left out where there is only one.
            precision: fp32 or fp64; default: that of the model.
            stress: where there is one; without it a pass takes a fifth less.
            features: give those of the encoder too.
            uncertainty: give standard deviations too, of all, or ("energy") of energies alone, which costs next to
                nothing. The run must have been calibrated (`multifid calibrate RUN`).
            disagreement: give standard deviations over the branches of all tasks too, which costs a prediction for
                each branch and needs no calibration.
            max_edges: of a batch; larger structures are taken alone.

        Returns:
            Total energies in eV, forces, stress and more, as numpy arrays.

        Raises:
            ValueError: an element that the task has never seen, a charge or multiplicity that it does not know, atoms
                that lie on each other, positions that are not finite, a cell that spans nothing where it is periodic.

        Warns:
            UndeterminedEnergy: the training data do not determine the total energy of a composition.
        """
        alone = not isinstance(structures, list | tuple)
        given = [structures] if alone else list(structures)
        name, model = self.task(task), self.in_precision(precision)
        said = pack_atoms(given)
        packed, with_stress = model.ready(said, name), stress and model.is_conservative(name)
        if (held := self.property_of(name)) is not None:
            if uncertainty or features or disagreement:
                raise ValueError(f"task {name!r} predicts a property: it has no uncertainty and gives no features")
            return model._output(held, packed, name, alone, max_edges)
        if uncertainty and features:
            raise ValueError("features and uncertainties come from different passes: ask for one of them")
        doubts: list[Doubts] = []
        parts = [
            part
            for first, last in cut_structures(packed, model.cutoff, max_edges)
            for part in model._of(between(packed, first, last), name, first, with_stress, features, uncertainty, doubts)
        ]
        energy = np.array([p[0] for p in parts], np.float64)
        rest = [[p[k] for p in parts] for k in range(1, 5)]
        forces, stresses, energies, of_atoms = ((x[0] if alone else x) for x in rest) if parts else ([], [], [], [])
        out = Output(
            energy,
            forces,
            stresses if with_stress else None,
            energies,
            of_atoms if features else None,
            name,
            model.undetermined(packed, name),
            *(doubts_of_each(doubts, alone) if uncertainty else ()),
        )
        if disagreement:
            found = model.disagreement(said, stress=stress, max_edges=max_edges)
            found.into(out, packed.offsets, alone)
        return out

    def _output(self, held: Property, packed: Packed, task: str, alone: bool, max_edges: int) -> Output:
        """The answer of a task of a property."""
        found = []
        for first, last in cut_structures(packed, self.cutoff, max_edges):
            part = between(packed, first, last)
            if len(part.numbers):
                batch = batch_of(part, self.cutoff, task)
                refuse_coincident(batch, first)
                found.append(self.values(part, batch, task))
        shape = (len(held.classes),) if held.kind == "class" else shape_of(held.kind)
        values = np.concatenate([np.zeros((0, *shape)), *found])
        nothing = np.zeros(len(packed.natoms), bool)
        out = Output(None, None, None, None, None, task, nothing, value=values)
        if held.kind in OF_ATOMS:
            each = [values[a:b] for a, b in zip(packed.offsets[:-1], packed.offsets[1:], strict=True)]
            out.value = each[0] if alone else each
        elif held.kind == "class":
            out.probabilities = values
            out.value = np.array([held.classes[k] for k in values.argmax(axis=1)]) if len(values) else np.array([])
        return out

    def ready(self, packed: Packed, task: str) -> Packed:
        """Structures with the charges and spins that a task answers for. ValueError where it has no answer to one.

        The warning `UndeterminedEnergy` names compositions whose total energy the training data do not determine.
        """
        self.refuse_unseen(packed, task)
        if (which := self.undetermined(packed, task)).any():
            groups = self.description["tasks"][task]["undetermined"]
            warnings.warn(warning(which, groups, packed, task), UndeterminedEnergy, stacklevel=3)
        return as_trained(packed, self.description["tasks"][task], task)

    def refuse_unseen(self, packed: Packed, task: str) -> None:
        """ValueError where a structure has an element that the branch of the task has never seen."""
        known = np.zeros(MAX_Z + 1, bool)
        known[self._seen(task)] = True
        strange = np.flatnonzero(~known[packed.numbers])
        if not len(strange):
            return
        structure = int(np.searchsorted(packed.offsets, strange[0], side="right") - 1)
        names = ", ".join(SYMBOLS[z] for z in np.unique(packed.numbers[strange]))
        able = [t for t in self.tasks if set(np.unique(packed.numbers).tolist()) <= set(self._seen(t))]
        hint = f"; tasks that know all of them: {', '.join(able)}" if able else ""
        raise ValueError(
            f"structure {structure}: task {task!r} has never seen {names}; "
            f"it knows {', '.join(self.elements(task))}{hint}"
        )

    def undetermined(self, packed: Packed, task: str) -> np.ndarray:
        """Which structures have a total energy that the training data do not determine: (S,) bool."""
        return undetermined(self.description["tasks"][task].get("null_space"), packed)

    def _seen(self, task: str) -> list[int]:
        """The atomic numbers that a task knows, ascending: those of its reference energies, or of its structures."""
        about = self.description["tasks"][task]
        return sorted(about["elements"] if "property" in about else self._references(task))

    def _references(self, task: str) -> dict[int, float]:
        return {int(z): float(e) for z, e in self.description["tasks"][task]["references"].items()}

    def refuse_uncalibrated(self, task: str) -> None:
        """ValueError, with what to do, where a task has no uncertainties."""
        raise ValueError("uncertainties come from the trained run or its .mfid file, not from compiled code")

    def disagreement(self, packed: Packed, *, stress: bool, max_edges: int = EDGES) -> Disagreement:
        """How far branches disagree about structures, asked with the charges and spins that they say."""
        raise ValueError(
            "the disagreement of branches comes from the trained run or its .mfid file, not from compiled code"
        )

    def answer_with_doubts(
        self, packed: Packed, batch: Batch, task: str, *, stress: bool, forces: bool
    ) -> Iterator[tuple[Answer, Doubts]]:
        """Like `answer`, with the standard deviations of each structure; forces: theirs too, which cost more."""
        self.refuse_uncalibrated(task)
        return iter(())

    def _of(
        self,
        packed: Packed,
        task: str,
        first: int,
        stress: bool,
        features: bool,
        uncertainty: bool | Literal["energy"],
        doubts: list[Doubts],
    ) -> Iterator[Answer]:
        """(energy, forces, stress, energies, features) of each structure of a batch; `doubts` gets theirs."""
        if not len(packed.numbers):
            none = np.zeros((0, 3))
            doubts += [(0.0, none[:, 0], none[:, 0], np.nan)] * len(packed.natoms)
            yield from [(0.0, none, np.zeros((3, 3)), none[:, 0], none)] * len(packed.natoms)
            return
        batch = batch_of(packed, self.cutoff, task)
        refuse_coincident(batch, first)
        if uncertainty:
            asked = {"stress": stress, "forces": uncertainty != "energy"}
            for answer, doubt in self.answer_with_doubts(packed, batch, task, **asked):
                doubts.append(doubt)
                yield answer
            return
        yield from self.answer(packed, batch, task, stress=stress, features=features)

    def references_of(self, packed: Packed, task: str) -> np.ndarray:
        """(N,) eV, the reference energy of each atom's element; zero for elements that the task has never seen."""
        table, known = np.zeros(MAX_Z + 1), self._references(task)
        table[list(known)] = list(known.values())
        return table[packed.numbers]
