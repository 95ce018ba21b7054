"""What one rank of LAMMPS asks of a model: energies of its own atoms, and the slope of the energy along its pairs.

The pair style and the ML-IAP object come here; they differ in how they hand over pairs, and in how rows of atoms travel
between ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.graph import Graph
from multifid.model.domain import Exchange, Link, Share, share_of, widest_exchange
from multifid.model.electrons import as_trained
from multifid.model.package import is_package
from multifid.model.predictor import NEAREST, Predictor, load
from multifid.structures.elements import MAX_Z, SYMBOLS
from multifid.structures.structure import Packed

OTHER_STYLES = "NULL"  # in a type map: a type that another pair style has


def open_model(path: Path | str, device: str | torch.device | None = None, precision: str = "fp32") -> Predictor:
    """A run or a model file, whose layers the ranks take part in; ValueError for an exported file, which has none."""
    if is_package(Path(path)):
        raise ValueError(f"{path}: an exported file is code of a whole pass; LAMMPS needs the run or its .mfid file")
    return load(path, device, precision)


@dataclass(frozen=True)
class Pairs:
    """The atoms and pairs of a rank, on the device of the model.

    Raises ValueError, from `check`, for what cannot be predicted.
    """

    types: Tensor  # (N,) int64 from 1, own atoms first, then ghosts
    no_ghosts: int  # so many of them, the first ones
    own: Tensor  # (M,) int64: the atoms whose energies count
    i: Tensor  # (P,) int64, own atoms, ascending
    j: Tensor  # (P,) int64, own atoms or ghosts
    r: Tensor  # (P, 3) angstrom, from i to j

    def check(self) -> None:
        """ValueError where positions are not finite, or atoms lie on each other."""
        lengths = torch.linalg.vector_norm(self.r, dim=1)
        if not torch.isfinite(lengths).all():
            raise ValueError("positions are not finite: is the time step too long?")
        if lengths.shape[0] and float(lengths.min()) < NEAREST:
            raise ValueError(f"two atoms are {float(lengths.min()):.2g} angstrom apart")


@dataclass
class Answer:
    """Of one model or the mean over a committee; eV, float64, reference energies included."""

    energies: Tensor  # (M,) eV of own atoms
    slopes: Tensor | None  # (P, 3) eV/angstrom, dE/dr of the energy of all ranks
    forces: Tensor | None  # (M, 3) eV/angstrom, where they are predicted directly
    deviations: Tensor | None = None  # (M,) eV/angstrom, of a committee's forces, where they were asked for


@dataclass
class RankModel:
    """Models as a rank of LAMMPS has them: all of one task, one cutoff, one way to give forces.

    charge, spin: of the whole system; used where the task was trained with several. ValueError where models do not fit
    each other or cannot run on domains.
    """

    models: Sequence[Predictor]
    task: str
    charge: int = 0
    spin: int = 1
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # atomic number of each type
    references: list[Tensor] = field(init=False)  # of each model: (MAX_Z + 1,) eV, float64, by atomic number

    def __post_init__(self) -> None:
        first = self.models[0]
        for model in self.models:
            model.energy_task(self.task)
            if model.cutoff != first.cutoff or model.is_conservative(self.task) != self.conservative:
                raise ValueError("the models of a committee must have one cutoff, and forces of one kind")
        self.width = max(3, *(widest_exchange(model.potential) for model in self.models))
        self.references = [self._references(model) for model in self.models]

    @property
    def cutoff(self) -> float:
        """angstrom"""
        return self.models[0].cutoff

    @property
    def conservative(self) -> bool:
        """Whether answers have slopes of pairs, or else forces of atoms."""
        return self.models[0].is_conservative(self.task)

    def set_types(self, symbols: Sequence[str]) -> None:
        """Elements of the types, in their order. ValueError for what is none, or one that the task has not seen."""
        numbers = [0 if s == OTHER_STYLES else _number(s, k + 1) for k, s in enumerate(symbols)]
        if not any(numbers):
            raise ValueError("no type is an element: all of them are NULL")
        for model in self.models:
            known = model.elements(self.task)
            for k, z in enumerate(numbers):
                if z and SYMBOLS[z] not in known:
                    raise ValueError(
                        f"type {k + 1}: task {self.task!r} has never seen {SYMBOLS[z]}; it knows {', '.join(known)}"
                    )
        self.numbers = torch.tensor([0, *numbers], device=self.models[0].device)

    def set_system(self, counts: Sequence[float]) -> None:
        """Atoms of each type in the whole system. Charge and spin become those that the task answers for.

        Warns where the training data do not determine the energy of the composition.
        """
        numbers = self.numbers[1:].cpu().numpy()
        packed = self._packed(np.repeat(numbers, np.where(numbers, np.array(counts, np.int64), 0)))
        ready = self.models[0].ready(packed, self.task)
        if len(ready.numbers):
            self.charge, self.spin = int(ready.charge[0]), int(ready.spin[0])

    def set_electrons(self) -> None:
        """Charge and spin become those that the task answers for. ValueError where it knows several, and not these."""
        ready = as_trained(self._packed([1]), self.models[0].description["tasks"][self.task], self.task)
        self.charge, self.spin = int(ready.charge[0]), int(ready.spin[0])

    def answer(self, pairs: Pairs, link: Link | None, deviations: bool = False) -> Answer:
        """What own atoms add, exact over all ranks. Called on all ranks, also on those without atoms or pairs.

        link: None where there is no other rank, and all atoms are own ones.
        """
        pairs.check()
        each = [self._of(*known, pairs, link) for known in zip(self.models, self.references, strict=True)]
        energies = _mean([one.energies for one in each])
        assert energies is not None
        answer = Answer(energies, _mean([one.slopes for one in each]), _mean([one.forces for one in each]))
        if deviations:
            answer.deviations = self._deviations(each, pairs, link)
        if not all(x is None or bool(torch.isfinite(x).all()) for x in (answer.energies, answer.slopes, answer.forces)):
            raise ValueError("the model's energies or forces are not finite: is the structure sound?")
        return answer

    def _references(self, model: Predictor) -> Tensor:
        table = torch.zeros(MAX_Z + 1, dtype=torch.float64)
        for z, energy in model.description["tasks"][self.task]["references"].items():
            table[int(z)] = energy
        return table.to(model.device)

    def _of(self, model: Predictor, references: Tensor, pairs: Pairs, link: Link | None) -> Answer:
        numbers = self.numbers[pairs.types].clamp(min=1)  # of other styles' types: they have no pairs
        r = pairs.r.to(model.dtype)
        device = r.device
        graph = Graph(
            numbers,
            torch.zeros_like(numbers),
            torch.tensor([self.charge], device=device),
            torch.tensor([self.spin], device=device),
            pairs.i,
            pairs.j,
            r,
            torch.linalg.vector_norm(r, dim=1),
            exchange=None if link is None else Exchange(link),
            own=None if link is None else pairs.no_ghosts,
        )
        share: Share = share_of(model.potential, self.task, graph, pairs.own)
        scale = model.description["tasks"][self.task]["scale"]
        energies = share.energies.double() * scale + references[numbers[pairs.own]]
        slopes, forces = (None if x is None else x.double() * scale for x in (share.slopes, share.forces))
        return Answer(energies, slopes, forces)

    def _deviations(self, each: Sequence[Answer], pairs: Pairs, link: Link | None) -> Tensor:
        """(M,) root of the summed variances (n - 1) of a force's three components over the committee."""
        forces = torch.stack([_forces(one, pairs, link) for one in each])
        return forces.var(dim=0).sum(dim=1).sqrt()

    def _packed(self, numbers: Any) -> Packed:
        """Atoms of a system whose positions do not matter, in a cell: one structure with its charge and spin."""
        return Packed(
            np.asarray(numbers, np.uint8),
            np.zeros((len(numbers), 3)),
            np.array([len(numbers)], np.int64),
            np.eye(3)[None],
            np.ones((1, 3), bool),
            np.array([self.charge], np.int8),
            np.array([self.spin], np.uint8),
        )


def _forces(answer: Answer, pairs: Pairs, link: Link | None) -> Tensor:
    """(M, 3) forces on own atoms, those of ghosts fetched from other ranks."""
    if answer.slopes is None:
        assert answer.forces is not None
        return answer.forces
    pull = answer.slopes.new_zeros((pairs.types.shape[0], 3))
    pull.index_add_(0, pairs.i, answer.slopes).index_add_(0, pairs.j, -answer.slopes)
    return (pull if link is None else link.reverse(pull)).index_select(0, pairs.own)


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    given = [x for x in values if x is not None]
    return torch.stack(given).mean(dim=0) if len(given) > 1 else (given[0] if given else None)


def _number(symbol: str, of_type: int) -> int:
    if symbol not in SYMBOLS[1:]:
        raise ValueError(f"type {of_type}: {symbol!r} is no element; give symbols in the order of the types, as H C O")
    return SYMBOLS.index(symbol)
