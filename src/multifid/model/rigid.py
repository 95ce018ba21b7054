"""One pass that gives predictions and how well they are held: see `rigidity.py` for the equations.

Conservative forces and those of the sampled last layers come from one forward pass. One batched backward pass has as
many of them as what it needs for the edges allows. Where these are C++ (`kernels/native`) that is all, but for very
large systems; elsewhere as many as stay in a processor's cache, of large systems one.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multifid.graphs.batch import Batch
from multifid.graphs.edges import TILE_VALUES
from multifid.graphs.graph import Graph, completed, graph_of
from multifid.model.branch import Branch
from multifid.model.contract import Features
from multifid.model.kernels.native.build import usable
from multifid.model.layers import sum_over
from multifid.model.potential import Potential, Prediction, stress_of, under_strain
from multifid.model.rigidity import BranchRigidity

EDGES_AT_ONCE = 1 << 18  # of all last layers of a backward pass: some 20 numbers each, the gradients of what edges read


@dataclass
class Held:
    """A prediction of one task in scaled units, and its rigidities: variances before any constant; float64."""

    prediction: Prediction
    energy: Tensor  # (S,) of the energy per atom
    energies: Tensor  # (N,) of each atom alone
    forces: Tensor  # (N,) of a component, averaged over the three
    stress: Tensor  # (S,) of a component, averaged over the nine; NaN without a volume, or where it was not asked for


@dataclass
class Inputs:
    """What the last layers of one task's branch are applied to; float64, per structure or atom."""

    energy: Tensor  # (S, D) mean over the atoms of a structure
    scalars: Tensor  # (N, D) of each atom; psi of a direct force head
    vectors: Tensor | None  # (3N, C) v of a direct force head


@torch.no_grad()
def inputs_of(potential: Potential, batch: Batch, task: str) -> Inputs:
    """The inputs of the last layers; the batch on the potential's device and in its type."""
    features, graph = _encoded(potential, batch, task)
    branch = _branch(potential, task)
    phi = branch.last_features(features).double()
    energy = _means(phi, batch, task)
    if branch.forces is None:
        return Inputs(energy, phi, None)
    psi, v = branch.force_factors(features, graph)
    return Inputs(energy, psi.double(), v.double().transpose(1, 2).flatten(0, 1))


def held(
    potential: Potential, batch: Batch, task: str, rigidity: BranchRigidity, *, stress: bool, forces: bool = True
) -> Held:
    """Prediction and rigidities of one task; the batch on the potential's device and in its type.

    forces: theirs too, and that of the stress where there is one, for which conservative forces need a backward pass
    for each sample; NaN without.
    """
    if not potential.is_conservative(task):
        return _direct(potential, batch, task, rigidity)
    return _conservative(potential, batch, task, rigidity, stress, forces)


@torch.no_grad()
def _direct(potential: Potential, batch: Batch, task: str, rigidity: BranchRigidity) -> Held:
    features, graph = _encoded(potential, batch, task)
    branch = _branch(potential, task)
    energies, forces = branch(features, graph)
    psi, v = branch.force_factors(features, graph)
    assert rigidity.vectors is not None
    of_vectors = rigidity.vectors.variance(v.transpose(1, 2)).mean(dim=1)
    phi = branch.last_features(features)
    structures, atoms = batch.slices[task]
    energy = sum_over(energies, batch.structure[atoms] - structures.start, structures.stop - structures.start)
    return Held(
        Prediction(energy, forces, None, energies),
        rigidity.energy.variance(_means(phi.double(), batch, task)),
        rigidity.energy.variance(phi),
        rigidity.scalars.variance(psi) * of_vectors,
        energy.new_full(energy.shape, torch.nan, dtype=torch.float64),
    )


def _conservative(
    potential: Potential, batch: Batch, task: str, rigidity: BranchRigidity, stress: bool, forces: bool
) -> Held:
    structures, atoms = batch.slices[task]
    branch = _branch(potential, task)
    with torch.enable_grad():
        positions = batch.positions.detach().requires_grad_()
        strain = torch.zeros_like(batch.cell).requires_grad_(stress)
        moved = replace(batch, positions=positions)
        features, _ = _encoded(potential, under_strain(moved, strain) if stress else moved, task)
        phi = branch.last_features(features)
    samples = rigidity.samples if forces else rigidity.samples[:0]
    last = torch.cat([branch.last_weights()[None].double(), samples.to(phi.device)]).to(phi.dtype)  # (1 + K, D)
    slopes = _slopes(phi, [positions, strain] if stress else [positions], last, _at_once(potential, batch, phi))
    phi, local = phi.detach(), rigidity.scalars.variance(phi.detach())
    energies = (phi * last[0]).sum(dim=1)
    energy = sum_over(energies, batch.structure[atoms] - structures.start, structures.stop - structures.start)
    stresses = [stress_of(x[structures], batch.cell[structures]) for x in slopes[1]] if stress else []  # (S, 3, 3) each
    of_stress = torch.full_like(energy, torch.nan, dtype=torch.float64)
    if stress and forces:
        of_stress = torch.stack(stresses[1:]).double().square().mean(dim=(0, 2, 3))
    sampled = slopes[0][1:, atoms].double().square().mean(dim=2)  # (K, M)
    of_forces = sampled.mean(dim=0).mul(local).sqrt() if forces else torch.full_like(local, torch.nan)
    return Held(
        Prediction(energy, -slopes[0][0, atoms], stresses[0] if stress else None, energies),
        rigidity.energy.variance(_means(phi.double(), batch, task)),
        rigidity.energy.variance(phi),
        of_forces,
        of_stress,
    )


def _at_once(potential: Potential, batch: Batch, phi: Tensor) -> int:
    """Last layers in a backward pass."""
    edges = max(1, batch.edges.shape[1])
    if potential.encoder.edges_in_library and usable(phi, phi.shape[1]):
        return max(1, EDGES_AT_ONCE // edges)
    return max(1, TILE_VALUES * torch.get_num_threads() // (edges * phi.shape[1]))


def _slopes(phi: Tensor, wanted: list[Tensor], last: Tensor, at_once: int) -> list[Tensor]:
    """(K, ...) derivatives of the energies that last layers (K, D) give with respect to each of `wanted`."""
    pieces, found = list(last.split(at_once)), []
    for k, piece in enumerate(pieces):
        keep = k + 1 < len(pieces)
        slopes = _batched(phi, wanted, piece) if len(piece) > 1 else None
        if slopes is None:
            slopes = [torch.stack(x) for x in zip(*_in_turn(phi, wanted, piece, keep), strict=True)]
        found.append(slopes)
    return [torch.cat(x) for x in zip(*found, strict=True)]


def _batched(phi: Tensor, wanted: list[Tensor], last: Tensor) -> list[Tensor] | None:
    """All in one backward pass, which keeps the graph; None where an operation of the encoder has no batched form."""
    each = last[:, None].expand(-1, phi.shape[0], -1)
    asked = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    try:
        return list(torch.vmap(lambda gradient: torch.autograd.grad(phi, wanted, gradient, **asked))(each))
    except RuntimeError:
        return None


def _in_turn(phi: Tensor, wanted: list[Tensor], last: Tensor, keep: bool) -> list[tuple[Tensor, ...]]:
    """A backward pass for each."""
    found = []
    for k, w in enumerate(last):
        asked = {"retain_graph": keep or k + 1 < len(last), "allow_unused": True, "materialize_grads": True}
        found.append(torch.autograd.grad(phi, wanted, w.expand(phi.shape[0], -1), **asked))
    return found


def _branch(potential: Potential, task: str) -> Branch:
    branch = potential.branches[potential.branch_of[task]]
    assert isinstance(branch, Branch)
    return branch


def _encoded(potential: Potential, batch: Batch, task: str) -> tuple[Features, Graph | None]:
    """The features of a task's atoms, and the graph of its structures where its branch reads edges."""
    batch = completed(batch, potential.encoder.needs)
    graph = graph_of(batch)
    structures, atoms = batch.slices[task]
    reads = potential.branches[potential.branch_of[task]].reads_edges
    assert batch.edge_slices is not None
    part = graph.part(structures, atoms, batch.edge_slices[task]) if reads else None
    return potential.encoder(graph).part(atoms), part


def _means(phi: Tensor, batch: Batch, task: str) -> Tensor:
    """(N, D) -> (S, D), over the atoms of each structure."""
    structures, atoms = batch.slices[task]
    sums = sum_over(phi, batch.structure[atoms] - structures.start, structures.stop - structures.start)
    return sums / batch.natoms[structures, None].clamp_min(1)
