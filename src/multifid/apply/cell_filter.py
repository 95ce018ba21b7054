"""ASE's `FrechetCellFilter` with the same numbers in a tenth of the time.

What an optimizer moves: positions in the cell of the start, x F^-1, and the logarithm L of the deformation gradient F,
cell = cell0 F^T, scaled by the number of atoms. With W = virial F^-T the force on L is

    dE/dL_mn = - <W, D exp(L)[e_mn]> = - (D exp(L^T)[W])_mn

as the derivative D of the exponential in a direction has its transpose at L^T: one derivative in place of nine. It is
the corner of an exponential of twice the size, exp((X, W), (0, X)) = ((exp X, D exp(X)[W]), (0, exp X)). The logarithm
is kept from the step that set it. (Al-Mohy, Higham, SIAM J. Matrix Anal. Appl. 30, 1639, 2009.)
"""

from typing import Any

import numpy as np
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.stress import full_3x3_to_voigt_6_stress
from scipy.linalg import expm, logm


class CellFilter(FrechetCellFilter):  # type: ignore[misc]
    """Positions and cell of a structure as one thing for ASE's optimizers; each answer is a new `calc.results`."""

    def __init__(self, atoms: Atoms) -> None:
        super().__init__(atoms)
        self._cell, self._log = atoms.cell.array.copy(), np.zeros((3, 3))  # the logarithm is that of this cell
        self._results: Any = None  # of which `_forces` are
        self._forces = np.zeros((0, 3))

    def get_positions(self) -> np.ndarray:
        """(N + 3, 3): positions in the cell of the start, angstrom; N times the logarithm of the deformation."""
        moved = np.linalg.solve(self.deform_grad(), self.atoms.positions.T).T
        return np.concatenate([moved, self._logarithm() * self.exp_cell_factor])

    def set_positions(self, new: Any, **kwargs: Any) -> None:  # type: ignore[override]  # two names in ASE
        """Constraints of the atoms, fixed symmetry among them, have the last word on positions and cell."""
        log = new[-3:] / self.exp_cell_factor
        transposed = expm(log).T
        self.atoms.set_cell(self.orig_cell @ transposed, scale_atoms=True)
        self.atoms.set_positions(new[:-3] @ transposed, **kwargs)
        self._cell, self._log = self.orig_cell @ transposed, log

    def get_forces(self, **kwargs: Any) -> np.ndarray:
        """(N + 3, 3) eV/angstrom: minus the slopes of the energy along `get_positions`."""
        if self._results is None or self._results is not self.atoms.calc.results:
            self._forces = self._slopes(**kwargs)
            self._results = self.atoms.calc.results
        return self._forces.copy()

    def _slopes(self, **asked: Any) -> np.ndarray:
        stress = self.atoms.get_stress(voigt=False, **asked)
        gradient, x = self.deform_grad(), self._logarithm().T
        block = np.zeros((6, 6))
        block[:3, :3] = block[3:, 3:] = x
        block[:3, 3:] = -self.atoms.cell.volume * stress @ np.linalg.inv(gradient.T)
        self.stress = full_3x3_to_voigt_6_stress(stress)
        on_cell = expm(block)[:3, 3:] / self.exp_cell_factor
        return np.concatenate([self.atoms.get_forces(**asked) @ gradient, on_cell])

    def _logarithm(self) -> np.ndarray:
        """Of the deformation gradient."""
        if not np.array_equal(self._cell, self.atoms.cell.array):
            self._cell, self._log = self.atoms.cell.array.copy(), np.real(logm(self.deform_grad()))
        return self._log
