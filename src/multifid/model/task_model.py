"""What answers for tasks: structures in, eV out, whatever computes the numbers.

A `TaskModel` knows what a description says of each task (references, elements, charges), checks structures and cuts
them into batches. The numbers of a batch are left to `answer`: of a `Predictor`, which holds the potential, or of an
exported file. The task is always named where there are several: the answer of another branch looks like any other, and
is wrong by thousands of eV.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from multifid.graphs.batch import Batch, edge_vectors
from multifid.graphs.neighbors import neighbor_list
from multifid.graphs.origin import near_origin
from multifid.model.electrons import as_trained
from multifid.model.undetermined import StaleBranch, UndeterminedEnergy, stale, undetermined, warning
from multifid.structures.atoms import pack_atoms
from multifid.structures.elements import MAX_Z, SYMBOLS
from multifid.structures.properties import OF_ATOMS, Property, shape_of
from multifid.structures.structure import Packed

EDGES = 50_000  # of a batch, unless the caller says otherwise
NEAREST = 1e-3  # angstrom: atoms that are closer lie on each other
PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
Answer = tuple[float, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]
# Standard deviations: of the energy, of atoms' energies, of forces, of the stress.
Doubts = tuple[float, np.ndarray, np.ndarray, float]


@dataclass
class Output:
    """Predictions for S structures, in their order; numpy arrays in float64.

    For a single structure forces, stress, energies and features are its arrays; for a list they are lists of arrays.

    Attributes:
        energy: (S,) eV, totals: reference energies included.
        forces: (N, 3) eV/angstrom.
        stress: (3, 3) eV/angstrom^3, positive under tension; None for direct forces or unasked, NaN without a volume.
        energies: (N,) eV, what each atom adds to the total.
        features: (N, H), the encoder's scalars, where they were asked for.
        task: which one answered.
        undetermined: (S,) bool, the training data do not determine the total energy of this composition.
        energy_uncertainty: (S,) eV, standard deviation of the total, where uncertainties were asked for.
        energies_uncertainty: (N,) eV, of what each atom adds.
        forces_uncertainty: (N,) eV/angstrom, of a component of the force on each atom, averaged over directions.
        stress_uncertainty: (S,) eV/angstrom^3, of a component of the stress, averaged over the nine; NaN where there
            is no stress.
        value: of a task of a property, which has no energy, forces, stress and energies (None): (S,) or (S, 3), of a
            class its name; of atoms (N,) or (N, 3) as forces are. In the unit of the training data.
        probabilities: (S, classes), of a class, in the order of the model's `property_of(task).classes`.
    """

    energy: Any
    forces: Any
    stress: Any
    energies: Any
    features: Any = None
    task: str = ""
    undetermined: Any = None
    energy_uncertainty: Any = None
    energies_uncertainty: Any = None
    forces_uncertainty: Any = None
    stress_uncertainty: Any = None
    value: Any = None
    probabilities: Any = None


class TaskModel(ABC):
    """A trained model, in whatever form, on one device and in one precision."""

    description: Any
    device: torch.device
    dtype: torch.dtype
    gives_features: bool = True

    @property
    @abstractmethod
    def conservative(self) -> bool:
        """Whether forces are minus the gradient of the energy; only then there is a stress."""

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
        packed, with_stress = model.ready(pack_atoms(given), name), stress and model.conservative
        if (held := self.property_of(name)) is not None:
            if uncertainty or features:
                raise ValueError(f"task {name!r} predicts a property: it has no uncertainty and gives no features")
            return model._output(held, packed, name, alone, max_edges)
        if uncertainty and features:
            raise ValueError("features and uncertainties come from different passes: ask for one of them")
        doubts: list[Doubts] = []
        parts = [
            part
            for first, last in _pieces(packed, model.cutoff, max_edges)
            for part in model._of(between(packed, first, last), name, first, with_stress, features, uncertainty, doubts)
        ]
        energy = np.array([p[0] for p in parts], np.float64)
        rest = [[p[k] for p in parts] for k in range(1, 5)]
        forces, stresses, energies, of_atoms = ((x[0] if alone else x) for x in rest) if parts else ([], [], [], [])
        return Output(
            energy,
            forces,
            stresses if with_stress else None,
            energies,
            of_atoms if features else None,
            name,
            model.undetermined(packed, name),
            *(_of_each(doubts, alone) if uncertainty else ()),
        )

    def _output(self, held: Property, packed: Packed, task: str, alone: bool, max_edges: int) -> Output:
        """The answer of a task of a property."""
        found = []
        for first, last in _pieces(packed, self.cutoff, max_edges):
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


def _of_each(doubts: list[Doubts], alone: bool) -> tuple[Any, Any, Any, Any]:
    """Standard deviations of energies, of atoms' energies, of forces and of stresses, as `Output` holds them."""
    energy, stress = (np.array([d[k] for d in doubts], np.float64) for k in (0, 3))
    energies, forces = ([d[k] for d in doubts] for k in (1, 2))
    return energy, energies[0] if alone else energies, forces[0] if alone else forces, stress


def sums_of(values: np.ndarray, packed: Packed) -> np.ndarray:
    """(N,) -> (S,): the sum over each structure's atoms."""
    return np.array([values[a:b].sum() for a, b in zip(packed.offsets[:-1], packed.offsets[1:], strict=True)])


def each_of(
    packed: Packed,
    energy: np.ndarray,
    forces: np.ndarray,
    stress: np.ndarray | None,
    energies: np.ndarray,
    features: np.ndarray | None,
) -> Iterator[Answer]:
    """Results of a batch, (S,), (N, 3), (S, 3, 3), (N,), (N, H), structure by structure."""
    for k, (a, b) in enumerate(zip(packed.offsets[:-1], packed.offsets[1:], strict=True)):
        yield (
            float(energy[k]),
            forces[a:b],
            None if stress is None else stress[k],
            energies[a:b],
            None if features is None else features[a:b],
        )


def batch_of(packed: Packed, cutoff: float, task: str) -> Batch:
    """Packed structures with their edges as one batch, all of them asked of one task; float64, on the host."""
    home = near_origin(packed)
    return batch_with(home, *neighbor_list(home, cutoff), task)


def batch_with(packed: Packed, edges: np.ndarray, shifts: np.ndarray, task: str) -> Batch:
    """The same for edges (2, E) and shifts (E, 3) that are at hand."""
    place = (slice(0, len(packed.natoms)), slice(0, len(packed.numbers)))
    return Batch.from_packed(
        packed, torch.from_numpy(edges.astype(np.int64)), torch.from_numpy(shifts.astype(np.float64)), {task: place}
    )


def refuse_coincident(batch: Batch, first: int) -> None:
    """ValueError where two atoms, or an atom and its own image, lie on each other; `first`: number of the first one."""
    lengths = torch.linalg.vector_norm(edge_vectors(batch), dim=1)
    if not len(lengths) or float(lengths.min()) >= NEAREST:
        return
    edge = int(lengths.argmin())
    i, j = batch.edges[:, edge].tolist()
    structure = int(batch.structure[i])
    start = int(batch.natoms[:structure].sum())
    raise ValueError(
        f"structure {first + structure}: atoms {i - start} and {j - start} are {lengths[edge]:.2g} angstrom apart"
    )


def between(packed: Packed, first: int, last: int) -> Packed:
    """Consecutive structures."""
    structures, atoms = slice(first, last), slice(int(packed.offsets[first]), int(packed.offsets[last]))
    return Packed(
        packed.numbers[atoms],
        packed.positions[atoms],
        packed.natoms[structures],
        packed.cell[structures],
        packed.pbc[structures],
        packed.charge[structures],
        packed.spin[structures],
    )


def _pieces(packed: Packed, cutoff: float, max_edges: int) -> Iterator[tuple[int, int]]:
    """Consecutive structures, in pieces of about at most so many edges, estimated from densities."""
    volume = np.abs(np.linalg.det(packed.cell))
    periodic = packed.pbc.any(axis=1) & (volume > 0)
    density = np.where(periodic, packed.natoms / np.where(periodic, volume, 1.0), 0.1)
    each = np.maximum(packed.natoms * density * 4 / 3 * np.pi * cutoff**3, 1.0)
    each = np.where(periodic, each, np.minimum(each, packed.natoms * np.maximum(packed.natoms - 1, 1)))
    first, total = 0, 0.0
    for k, cost in enumerate(each.tolist()):
        if k > first and total + cost > max_edges:
            yield first, k
            first, total = k, 0.0
        total += cost
    if first < len(each):
        yield first, len(each)
