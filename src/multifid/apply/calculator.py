"""An ASE calculator: molecular dynamics, relaxation, phonons and all else that ASE drives.

    atoms.calc = multifid.load("runs/demo").calculator(task="ani1x")
    atoms.calc = multifid.Calculator(["runs/a", "runs/b", "runs/c"], task="ani1x")      a committee: means, deviations

Numbers are those of `Predictor.predict`. Nothing global is touched: no default type, threads, seeds or grad mode.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ase.calculators.calculator as ase
import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from multifid.apply.model import Models, opened
from multifid.graphs.skin import SKIN, SkinList
from multifid.model.pieces import NEAREST, batch_with
from multifid.model.predictor import Predictor
from multifid.model.task_model import TaskModel
from multifid.structures.atoms import pack_atoms
from multifid.structures.cells import spans_volume
from multifid.structures.structure import Packed

DTYPES = {"float32": "fp32", "float64": "fp64"}
AVERAGED = ("energy", "forces", "stress", "energies")
DOUBTS = ("energy_uncertainty", "energies_uncertainty", "forces_uncertainty", "stress_uncertainty")
DISAGREEMENTS = ("energy_disagreement", "energies_disagreement", "forces_disagreement", "stress_disagreement")
STRESSES = {"stress", "stress_std", "stress_uncertainty", "stress_disagreement"}
Results = dict[str, Any]


class Calculator(ase.Calculator):
    """Energy, free_energy, energies of atoms (eV), forces (eV/angstrom), stress (eV/angstrom^3, Voigt, ASE's sign).

    models: a model, or several that become a committee: results are means, and `energy_std`, `forces_std`, `stress_std`
    and `energies_std` the deviations (n - 1). task: which branch answers; may be left out where there is only one.
    dtype: float32 or float64; that of each model where nothing is said. skin: of the neighbour list, angstrom.

    `energy_uncertainty` (eV, of the total), `energies_uncertainty` (N,), `forces_uncertainty` (N,) eV/angstrom and
    `stress_uncertainty` eV/angstrom^3 are standard deviations, for one model whose run was calibrated (`multifid
    calibrate`): `get_property(NAME, atoms)`. `energy_disagreement` and the like, of the same shapes, are standard
    deviations over the branches of all tasks that know the structure, for one model with several.
    `features` (N, H) of the encoder are a property too, for one model. Energies are totals, reference energies of the
    task included; `energies` add up to `energy`. Charge and multiplicity are `atoms.info["charge"]` and
    `atoms.info["spin"]`, used where the task was trained with several. Only conservative forces have a stress, and
    only in a cell that spans a volume. ValueError for what cannot be predicted, with the reason.
    """

    name = "multifid"

    def __init__(
        self,
        models: Models,
        task: str | None = None,
        *,
        dtype: str | None = None,
        skin: float = SKIN,
        compiled: bool | Path | str = False,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} must be one of {', '.join(DTYPES)}")
        self.models = [m.in_precision(None if dtype is None else DTYPES[dtype]) for m in opened(models)]
        if not self.models:
            raise ValueError("a calculator needs at least one model")
        self.task = self.models[0].energy_task(task)
        for model in self.models[1:]:
            model.energy_task(self.task)
        self._trained, self._compiled = self.models, compiled
        if compiled:
            self.models = [as_compiled(model, self.task, compiled) for model in self.models]
        self.conservative = all(model.is_conservative(self.task) for model in self.models)
        self.neighbors = SkinList(max(model.cutoff for model in self.models), skin)
        self._stress_wanted = self._warned_of_motion = False
        self._doubts_wanted: bool | Literal["energy"] = False
        super().__init__()
        self.ignored_changes = {"initial_charges", "initial_magmoms"}
        self.parameters.update(task=self.task, dtype=dtype or str(self.models[0].dtype).removeprefix("torch."))
        self.implemented_properties = ["energy", "free_energy", "energies", "forces"]
        self.implemented_properties += ["stress"] if self.conservative else []
        if len(self.models) == 1:
            self.implemented_properties += ["features"] if self.models[0].gives_features else []
            for names in (DOUBTS, DISAGREEMENTS):
                self.implemented_properties += names if self.conservative else names[:3]
        else:
            self.implemented_properties += [f"{n}_std" for n in AVERAGED if n in self.implemented_properties]

    def set(self, **changes: Any) -> dict[str, Any]:
        """Refused: what a calculator answers for does not change under the feet of those who hold it."""
        if changes:
            raise ValueError(
                f"{', '.join(changes)}: settings of a calculator are fixed when it is made; "
                "another task of the same weights is calculator.switch(TASK)"
            )
        return {}

    def switch(self, task: str) -> "Calculator":
        """A calculator for another task; it shares all weights. This one stays as it is."""
        return Calculator(self._trained, task, skin=self.neighbors.skin, compiled=self._compiled)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation, charge and spin in `info` too; in any bit, whatever `tol`.

        ASE's own comparison takes longer than compiled code for a small molecule.
        """
        before = self.atoms
        if before is None:
            return list(ase.all_changes)
        pairs = {
            "positions": (before.positions, atoms.positions),
            "numbers": (before.numbers, atoms.numbers),
            "cell": (before.cell.array, atoms.cell.array),
            "pbc": (before.pbc, atoms.pbc),
        }
        changed = [name for name, (a, b) in pairs.items() if a.shape != b.shape or not (a == b).all()]
        return changed if _electrons(before) == _electrons(atoms) else [*changed, "info"]

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        if name in STRESSES and not self.conservative:
            raise ase.PropertyNotImplementedError(
                "the forces of this model are predicted directly, not as a gradient of its energy, so it has no "
                "stress; a model with `model.branch.forces: conservative` has one"
            )
        if name == "features" and len(self.models) > 1:
            raise ase.PropertyNotImplementedError("each model of a committee has features of its own: ask one of them")
        if name in DOUBTS and len(self.models) == 1:
            self.models[0].refuse_uncalibrated(self.task)
        if name in DISAGREEMENTS and len(self.models) == 1:
            self.models[0].disagreement(pack_atoms([]), stress=False)  # an error where there is none
        return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(ase.all_changes),
    ) -> None:
        """All results of a structure but the stress, which costs more and comes once somebody has asked for it."""
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        assert atoms is not None, "ASE gives a calculator its atoms"
        self._warn_of_motion(atoms)
        self._stress_wanted |= bool(STRESSES & set(properties))
        if {"forces_uncertainty", "stress_uncertainty"} & set(properties):
            self._doubts_wanted = True
        elif set(DOUBTS) & set(properties):
            self._doubts_wanted = self._doubts_wanted or "energy"
        packed = pack_atoms([atoms])
        if not len(atoms):
            self.results = self._of_nothing()
            return
        stress = self._stress_wanted and self.conservative and bool(spans_volume(packed.cell)[0])
        if STRESSES & set(properties) and not stress:
            raise ase.PropertyNotImplementedError(
                f"stress is an energy per volume, and the cell {atoms.cell.array.tolist()} spans none"
            )
        home = self.neighbors.update(packed)
        self._refuse_coincident()
        each = [self._ask(model, home, stress, "features" in properties) for model in self.models]
        self.results = each[0] if len(each) == 1 else _committee(each)
        self.results["free_energy"] = self.results["energy"]
        if set(DISAGREEMENTS) & set(properties):
            self.results |= self._disagreement(packed, stress)

    def _disagreement(self, packed: Packed, stress: bool) -> Results:
        found = self.models[0].disagreement(packed, stress=stress)
        if found.branches[0] < 2:
            known = "; ".join(f"{t}: {', '.join(self.models[0].elements(t))}" for t in self.models[0].tasks)
            raise ValueError(
                f"{found.branches[0]} branches of this model know these elements, this charge and multiplicity, and a "
                f"disagreement needs two; tasks and their elements: {known}"
            )
        values = (float(found.energy[0]), found.energies, found.forces, float(found.stress[0]))
        return dict(zip(DISAGREEMENTS if stress else DISAGREEMENTS[:3], values, strict=False))

    def _ask(self, model: TaskModel, home: Packed, stress: bool, features: bool) -> Results:
        """What one model says of one structure."""
        packed = model.ready(home, self.task)
        batch = batch_with(packed, *self.neighbors.within(model.cutoff), self.task)
        doubts: dict[str, Any] = {}
        if self._doubts_wanted and not features:
            wanted = {"stress": stress, "forces": self._doubts_wanted is True}
            answer, found = next(model.answer_with_doubts(packed, batch, self.task, **wanted))
            names = DOUBTS[:2] if not wanted["forces"] else DOUBTS if stress else DOUBTS[:3]
            doubts = dict(zip(names, found, strict=False))
        else:
            answer = next(model.answer(packed, batch, self.task, stress=stress, features=features))
        energy, forces, tensor, energies, of_atoms = answer
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise ValueError(
                f"the model's energy ({energy} eV) or forces are not finite; the shortest distance between two atoms "
                f"is {self.neighbors.nearest()[0]:.3g} angstrom: is the structure sound, or the time step too long?"
            )
        results: Results = {"energy": energy, "forces": forces, "energies": energies, **doubts}
        if tensor is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(tensor)
        if of_atoms is not None:
            results["features"] = of_atoms
        return results

    def _of_nothing(self) -> Results:
        """The results of no atoms at all: nothing costs nothing."""
        results: Results = {"energy": 0.0, "energies": np.zeros(0), "forces": np.zeros((0, 3))}
        if len(self.models) == 1 and self._doubts_wanted:
            results |= dict(zip(DOUBTS[:3], (0.0, np.zeros(0), np.zeros(0)), strict=True))
        if len(self.models) == 1:
            results |= dict(zip(DISAGREEMENTS[:3], (0.0, np.zeros(0), np.zeros(0)), strict=True))
        results = results if len(self.models) == 1 else _committee([results] * len(self.models))
        return results | {"free_energy": 0.0}

    def _refuse_coincident(self) -> None:
        distance, i, j = self.neighbors.nearest()
        if distance < NEAREST:
            raise ValueError(f"atoms {i} and {j} are {distance:.2g} angstrom apart")

    def _warn_of_motion(self, atoms: Atoms) -> None:
        """Direct forces in dynamics: said once."""
        if self.conservative or self._warned_of_motion or not atoms.has("momenta") or not atoms.get_momenta().any():
            return
        self._warned_of_motion = True
        warnings.warn(
            "atoms move under forces that are predicted directly: they are no gradient of an energy, so that total "
            "energy is not conserved in molecular dynamics; models of `model.branch.forces: conservative` conserve it",
            stacklevel=2,
        )


def as_compiled(model: TaskModel, task: str, where: bool | Path | str) -> TaskModel:
    """The compiled form of a model, from the cache that `where` names if it is no bool; itself if it has that form."""
    if not isinstance(model, Predictor):
        return model
    from multifid.apply.compiled import compiled

    return compiled(model, task, None if where is True else Path(str(where)))


def _committee(each: Sequence[Results]) -> Results:
    """Means over models, and their standard deviations with n - 1."""
    results: Results = {}
    for name in AVERAGED:
        if all(name in one for one in each):
            values = np.array([one[name] for one in each])
            mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
            results[name] = float(mean) if name == "energy" else mean
            results[f"{name}_std"] = float(deviation) if name == "energy" else deviation
    return results


def _electrons(atoms: Atoms) -> tuple[str, str]:
    """What `info` says of charge and spin, in a form that can be compared whatever it is."""
    return repr(atoms.info.get("charge")), repr(atoms.info.get("spin"))
