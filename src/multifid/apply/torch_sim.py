"""A model for torch-sim: dynamics and relaxation of many structures at once, as `torch_sim.models.interface` wants it.

    import torch_sim
    from multifid.apply.torch_sim import TorchSimModel

    model = TorchSimModel(multifid.load("runs/demo"), task="ani1x")
    final = torch_sim.optimize(system=list_of_atoms, model=model, optimizer=torch_sim.frechet_cell_fire)

Numbers are those of `Predictor.predict`. Works with torch-sim 0.3 (Python 3.11) and later: `pbc` as a bool or a tensor,
charge and spin as extras of the state, outputs without a graph.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multifid.apply.calculator import as_compiled
from multifid.model.pieces import batch_of, refuse_coincident
from multifid.model.task_model import TaskModel
from multifid.structures.atoms import refuse_flat
from multifid.structures.cells import spans_volume
from multifid.structures.structure import Packed

try:
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise ImportError(f"torch-sim is not installed ({error}): pip install 'multifid[torch-sim]'") from error


class TorchSimModel(ModelInterface):
    """One branch of a model, for all systems of a state.

    model: what `multifid.load` gives; its device and precision are those of the states. task: which branch answers; may
    be left out where there is only one. compute_stress: by default where forces are conservative; NotImplementedError,
    as torch-sim expects, where it is asked of a model that predicts forces directly. compiled: see `Calculator`.
    """

    def __init__(
        self,
        model: TaskModel,
        task: str | None = None,
        *,
        compute_stress: bool | None = None,
        compiled: bool | Path | str = False,
    ) -> None:
        super().__init__()
        self.task = model.energy_task(task)
        self.model = as_compiled(model, self.task, compiled) if compiled else model
        self._device, self._dtype = model.device, model.dtype
        self._compute_forces, self._memory_scales_with = True, "n_atoms_x_density"
        self._compute_stress = False
        self.compute_stress = model.is_conservative(self.task) if compute_stress is None else compute_stress

    @property
    def compute_stress(self) -> bool:
        """Whether answers hold the stress."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, wanted: bool) -> None:
        if wanted and not self.model.is_conservative(self.task):
            # torch-sim's own check takes this error for "has no stress"
            raise NotImplementedError(
                "the forces of this model are predicted directly, not as a gradient of its energy, so it has no stress"
            )
        self._compute_stress = wanted

    @property
    def compute_forces(self) -> bool:
        """Whether answers hold forces: always."""
        return True

    @compute_forces.setter
    def compute_forces(self, wanted: bool) -> None:
        if not wanted:
            raise NotImplementedError("forces come with every energy")

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """energy (S,) eV, total; forces (N, 3) eV/angstrom; stress (S, 3, 3) eV/angstrom^3, tension-positive, zero for
        systems whose cell spans no volume; energies (N,) eV, of the atoms.

        ValueError for elements that the task has never seen, atoms that lie on each other, positions that are not
        finite; it names the system by its number in the state.
        """
        packed = self.model.ready(packed_of(state), self.task)
        batch = batch_of(packed, self.model.cutoff, self.task)
        refuse_coincident(batch, 0)
        answers = list(self.model.answer(packed, batch, self.task, stress=self.compute_stress))
        found = {
            "energy": np.array([a[0] for a in answers]),
            "forces": np.concatenate([np.zeros((0, 3)), *(a[1] for a in answers)]),
            "energies": np.concatenate([np.zeros(0), *(a[3] for a in answers)]),
        }
        if self.compute_stress:
            pairs = zip(answers, spans_volume(packed.cell), strict=True)
            stresses = [a[2] if a[2] is not None and spans else np.zeros((3, 3)) for a, spans in pairs]
            found["stress"] = np.array(stresses).reshape(-1, 3, 3)
        return {name: torch.as_tensor(x, dtype=self.dtype, device=self.device) for name, x in found.items()}


def packed_of(state: Any) -> Packed:
    """The systems of a torch-sim state, or of a dict with its fields, on the host in float64.

    A direction is periodic where the state says so and the system has a cell vector there. ValueError names a system
    whose positions or cell are not finite, or whose cell spans nothing where it is periodic.
    """

    def take(name: str, default: Any = None) -> Any:
        return state.get(name, default) if isinstance(state, dict) else getattr(state, name, default)

    def host(x: Any) -> np.ndarray:
        return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x)

    system = host(take("system_idx"))
    cell = host(take("cell")).astype(np.float64).transpose(0, 2, 1).copy()  # torch-sim has vectors as columns
    systems, positions = len(cell), host(take("positions")).astype(np.float64)
    natoms = np.bincount(system, minlength=systems)
    bad = np.asarray(~np.isfinite(cell).all(axis=(1, 2)))
    bad[system[~np.isfinite(positions).all(axis=1)]] = True
    if bad.any():
        raise ValueError(f"system {int(np.flatnonzero(bad)[0])} of the state: positions and cell must be finite")
    pbc = np.broadcast_to(host(take("pbc")).astype(bool), (systems, 3)) & cell.any(axis=2)
    for k in np.flatnonzero(pbc.any(axis=1) & ~spans_volume(cell)).tolist():
        refuse_flat(k, cell[k], pbc[k])

    def extra(name: str, default: int, dtype: Any) -> np.ndarray:
        given = take(name)
        if given is None:
            return np.full(systems, default, dtype)
        return np.broadcast_to(np.round(host(given)).astype(dtype).ravel(), (systems,)).copy()

    return Packed(
        numbers=host(take("atomic_numbers")).astype(np.uint8),
        positions=positions,
        natoms=natoms.astype(np.int64),
        cell=cell,
        pbc=pbc.copy(),
        charge=extra("charge", 0, np.int8),
        spin=extra("spin", 1, np.uint8),
    )
