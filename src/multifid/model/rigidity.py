"""How well training data hold a branch's last layer: uncertainties of energies and forces without a second model.

The energy of a branch is linear in its last layer, E_s = w . g_s with g_s = sum_i phi_i, phi_i the last features of
atom i and a one. With one covariance of what training showed, the variance of a prediction is

    C         = sum_s (g_s / N_s)(g_s / N_s)^T              over the training split of the branch's tasks, float64
    var E_s   = alpha_E^2 g_s^T (C + r I)^-1 g_s            r = REGULARISER x the largest eigenvalue of C
    v_ix      = (dg/dx_i)^T (C + r I)^-1 (dg/dx_i)

(Bigi, Chong, Ceriotti, Grasselli 2024, arXiv 2403.02251.) The derivative is not taken for every feature: a few last
layers w_k with covariance (C + r I)^-1 are drawn, and the variance is mean_k |dE_k/dx_i|^2 / 3. They are orthogonal
draws, whose estimate has less noise, and are kept, so that all processors sample the same ones. As few draws are noisy,
the variance of a force is the geometric mean of theirs and of the atom's own rigidity phi_i^T A^-1 phi_i, A the sum of
phi_i phi_i^T over all training atoms, which costs nothing. The same draws give the variance of a stress, the mean of
|dE_k/dstrain|^2 / (9 V^2).

Direct forces are linear in the last layer of their own head, F_ix = sum_ch W_ch psi_ih v_icx. Its covariance is taken
as a product of those of the two factors (Ritter, Botev, Barber 2018), which is exact with one channel:

    A = sum_i psi_i psi_i^T,  B = sum_ix v_ix v_ix^T,  var F_ix = alpha_F^2 (psi_i^T A^-1 psi_i)(v_ix^T B^-1 v_ix)

Every variance is made of inner products that no rotation, translation, reflection or order of atoms changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

REGULARISER = 1e-9  # of the largest eigenvalue: more would level the differences between directions
SAMPLES = 4  # last layers that are drawn: see docs/uncertainty.md for what more of them cost and give
SEED = 2403_02251


@dataclass(frozen=True)
class Covariance:
    """What training showed of some linear layer: the sum of outer products of its inputs, (D, D) float64."""

    sum: Tensor

    @cached_property
    def root(self) -> Tensor:
        """L, lower triangular, with L L^T = C + r I."""
        largest = torch.linalg.eigvalsh(self.sum)[-1].clamp_min(torch.finfo(torch.float64).tiny)
        return torch.linalg.cholesky(self.sum + REGULARISER * largest * torch.eye(len(self.sum), dtype=torch.float64))

    def variance(self, rows: Tensor) -> Tensor:
        """x^T (C + r I)^-1 x for rows x of (..., D): (...,) float64, on the device of the rows."""
        flat = rows.reshape(-1, rows.shape[-1]).double()
        solved = torch.linalg.solve_triangular(self.root.to(rows.device), flat.T, upper=False)
        return solved.square().sum(dim=0).reshape(rows.shape[:-1])

    def draws(self, number: int = SAMPLES) -> Tensor:
        """(number, D) with covariance (C + r I)^-1: rows of an orthogonal matrix times sqrt(D), through L^-T."""
        width = len(self.sum)
        normal = np.random.default_rng(SEED).normal(size=(-(-number // width), width, width))
        pairs = [np.linalg.qr(block) for block in normal]
        q = np.concatenate([q * np.sign(np.diag(r)) for q, r in pairs])[:number]
        z = torch.from_numpy(q * width**0.5)
        return torch.linalg.solve_triangular(self.root.T, z.T, upper=True).T.contiguous()


@dataclass(frozen=True)
class BranchRigidity:
    """What is kept of one branch."""

    energy: Covariance  # C, of structures
    scalars: Covariance  # A: of atoms, what the forces of an atom are made of
    vectors: Covariance | None  # B, of a direct force head
    samples: Tensor  # (K, D) float64, last layers of the energy head

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        more = {} if self.vectors is None else {"vectors": self.vectors.sum}
        return {"energy": self.energy.sum, "scalars": self.scalars.sum, "samples": self.samples, **more}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "BranchRigidity":
        """The reverse of `tensors`; without samples, from sums alone, they are drawn."""
        energy, scalars = Covariance(tensors["energy"]), Covariance(tensors["scalars"])
        vectors = Covariance(tensors["vectors"]) if "vectors" in tensors else None
        return cls(energy, scalars, vectors, tensors["samples"] if "samples" in tensors else energy.draws())


@dataclass(frozen=True)
class TaskConstants:
    """What was calibrated on the validation split of one task; None where it has no such label.

    energy: eV of the error of an energy per atom for each unit of rigidity, alpha_E; forces: likewise, eV/angstrom.
    stress: likewise, eV/angstrom^3.
    floor: the variance below which that of a force is not trusted: by symmetry the force on an atom and its variance
    can both vanish.
    """

    energy: float | None
    forces: float | None
    floor: float
    structures: int  # of the validation split
    stress: float | None = None


@dataclass(frozen=True)
class Rigidity:
    """The uncertainty of a model: of its branches, and the constants of its tasks."""

    weights: dict[str, str]  # branch -> checksum of the weights that it was calibrated for
    branches: dict[str, BranchRigidity]
    tasks: dict[str, TaskConstants]


@dataclass(frozen=True)
class Doubt:
    """Standard deviations of S structures with N atoms; float64 tensors on the host, NaN where nothing was calibrated.

    Attributes:
        energy: (S,) eV, of totals.
        energies: (N,) eV, of what each atom adds: the local prediction rigidity.
        forces: (N,) eV/angstrom, of one component, averaged (in squares) over the three.
    """

    energy: Tensor
    energies: Tensor
    forces: Tensor


def deviation(variance: Tensor, constant: float | None, floor: float = 0.0) -> Tensor:
    """Standard deviations of variances before their constant; NaN where none was calibrated."""
    return variance.clamp_min(floor).sqrt() * (float("nan") if constant is None else constant)
