"""What the checks of the contract run on: molecules and crystals from fixed seeds, their batches, small potentials."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from multifid.graphs.batch import Batch
from multifid.graphs.neighbors import neighbor_list
from multifid.model.potential import ModelConfig, Potential, Prediction
from multifid.structures.structure import Packed

CUTOFF = 4.0  # angstrom
TIGHT = 1e-10  # of float64, relative to the largest value, or absolute where that is below one
NEAREST = 0.7  # angstrom: no two atoms of a sample are nearer
TASK = "a"  # of samples and potentials where nothing else is said

Forces = Literal["direct", "conservative"]
EncoderKeys = Mapping[str, Any]  # what stands under `model.encoder` in a config


Periodic = bool | tuple[bool, bool, bool]


class System(NamedTuple):
    """One structure."""

    numbers: np.ndarray  # (N,)
    positions: np.ndarray  # (N, 3) angstrom
    cell: np.ndarray | None = None  # (3, 3) angstrom, rows = vectors
    pbc: Periodic = False
    charge: int = 0
    spin: int = 1

    def moved(self, turn: np.ndarray, by: np.ndarray | float = 0.0) -> "System":
        """Turned by an orthogonal matrix and shifted by a vector."""
        cell = None if self.cell is None else self.cell @ turn.T
        return self._replace(positions=self.positions @ turn.T + by, cell=cell)


def system(
    natoms: int, cell: np.ndarray | None = None, spread: float = 4.0, charge: int = 0, spin: int = 1, seed: int = 0
) -> System:
    """Atoms of light elements at random places in a box of `spread` angstrom, or in a periodic cell."""
    random = np.random.default_rng((natoms, seed))
    box = np.eye(3) * spread if cell is None else cell
    images = np.array(list(itertools.product((-1, 0, 1), repeat=3))) @ (0 * box if cell is None else box)
    places: list[np.ndarray] = []
    while len(places) < natoms:
        place = random.uniform(0, 1, 3) @ box
        if all(np.linalg.norm(place - other + images, axis=1).min() > NEAREST for other in places):
            places.append(place)
    positions = np.array(places).reshape(natoms, 3)
    return System(random.integers(1, 20, natoms), positions, cell, cell is not None, charge, spin)


def skewed(scale: float, seed: int = 0) -> np.ndarray:
    """A triclinic cell (3, 3) with vectors of about `scale` angstrom."""
    return np.eye(3) * scale + np.random.default_rng(seed).normal(0, 0.15 * scale, (3, 3))


def mixed() -> list[System]:
    """A molecule, a small crystal, a doublet cation, one atom, a larger crystal."""
    return [
        system(7),
        system(3, skewed(3.0)),
        system(5, charge=1, spin=2),
        system(1),
        system(4, skewed(5.0, seed=1)),
    ]


def batch_of(
    *systems: Sequence[Any],
    slices: Mapping[str, tuple[int, int]] | None = None,
    cutoff: float = CUTOFF,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Systems laid end to end; `slices`: the first structure of each task and the one after its last, else all of one.

    Without systems, a batch of no structures.
    """
    each = [System(*s) for s in systems]
    packed = Packed(
        numbers=np.concatenate([np.zeros(0, np.uint8), *(s.numbers for s in each)]).astype(np.uint8),
        positions=np.concatenate([np.zeros((0, 3)), *(s.positions for s in each)]),
        natoms=np.array([len(s.numbers) for s in each], np.int64),
        cell=np.array([np.zeros((3, 3)) if s.cell is None else s.cell for s in each]).reshape(-1, 3, 3),
        pbc=np.array([np.broadcast_to(s.pbc, 3) for s in each], bool).reshape(-1, 3),
        charge=np.array([s.charge for s in each], np.int8),
        spin=np.array([s.spin for s in each], np.uint8),
    )
    edges, shifts = neighbor_list(packed, cutoff)
    first = packed.offsets.tolist()
    where = {TASK: (0, len(each))} if slices is None else slices
    batch = Batch.from_packed(
        packed,
        torch.from_numpy(edges.astype(np.int64)),
        torch.from_numpy(shifts.astype(np.float64)),
        {task: (slice(a, b), slice(first[a], first[b])) for task, (a, b) in where.items()},
    )
    return batch.to(dtype=dtype)


def potential_with(
    encoder: EncoderKeys,
    forces: Forces,
    branches: Sequence[str] = (TASK,),
    branch_of: Mapping[str, str] | None = None,
    cutoff: float = CUTOFF,
    dtype: torch.dtype = torch.float64,
    **branch: Any,
) -> Potential:
    """A potential in evaluation mode whose weights are moved from their start, where some are zero; `branch`: keys."""
    keys = {"hidden": [10, 10], "forces": forces, **branch}
    config = ModelConfig.model_validate({"cutoff": cutoff, "encoder": dict(encoder), "branch": keys})
    potential = Potential(config, list(branches), branch_of or {b: b for b in branches}, seed=0).to(dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in potential.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=dtype))
        for table in potential.modules():
            if isinstance(table, nn.Embedding) and table.padding_idx is not None:
                table.weight[table.padding_idx] = 0.0
    return potential.eval()


def loss(predicted: Prediction, batch: Batch) -> Tensor:
    """Smooth in the weights, and a function of energies, forces and, where there is one, stress."""
    total = predicted.energy.square().sum() + (predicted.forces - 0.1).square().sum()
    if predicted.stress is not None:
        total = total + predicted.stress[torch.linalg.det(batch.cell).abs() > 0].square().sum()
    return total


def expect(holds: bool | Tensor, message: str) -> None:
    """AssertionError with the message, unless it holds."""
    if not holds:
        raise AssertionError(message)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TIGHT, what: str = "values") -> None:
    """Equal shapes, and values equal to `tolerance` times the largest one, or times one."""
    expect(found.shape == expected.shape, f"{what}: the shape is {tuple(found.shape)}, not {tuple(expected.shape)}")
    if expected.numel() == 0:
        return
    apart, allowed = (found - expected).abs().max().item(), tolerance * max(1.0, expected.abs().max().item())
    expect(apart < allowed, f"{what}: the largest difference is {apart:.3g}, at most {allowed:.3g} is allowed")


def assert_alike(found: Prediction, expected: Prediction, tolerance: float = TIGHT, what: str = "") -> None:
    """Equal energies, forces and stresses (NaN where there is none)."""
    assert_close(found.energy, expected.energy, tolerance, f"energies {what}".rstrip())
    assert_close(found.forces, expected.forces, tolerance, f"forces {what}".rstrip())
    expect((found.stress is None) == (expected.stress is None), f"stress {what}: given in one case only")
    if found.stress is not None and expected.stress is not None:
        expect(torch.equal(found.stress.isnan(), expected.stress.isnan()), f"stress {what}: NaN at other structures")
        assert_close(found.stress.nan_to_num(), expected.stress.nan_to_num(), tolerance, f"stress {what}".rstrip())


def expect_finite_gradients(model: nn.Module, what: str) -> None:
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    expect(not bad, f"gradients {what} are not finite: {', '.join(bad)}")
