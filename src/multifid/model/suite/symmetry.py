"""Checks of the contract: symmetries of space, of copies and of batches, and continuity, in float64.

Each takes what stands under `model.encoder` in a config, and the force mode.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from multifid.graphs.graph import completed, graph_of
from multifid.model.suite.samples import (
    CUTOFF,
    TASK,
    EncoderKeys,
    Forces,
    System,
    assert_alike,
    assert_close,
    batch_of,
    expect,
    mixed,
    potential_with,
    skewed,
    system,
)

LATTICE = 3.61  # angstrom, of copper


def rotation() -> np.ndarray:
    """A proper rotation without any symmetry to the axes."""
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    return turn * np.linalg.det(turn)


def rotation_reflection_translation(encoder: EncoderKeys, forces: Forces) -> None:
    """Energies stay, forces and stresses turn with the structure."""
    model, systems = potential_with(encoder, forces), mixed()
    before = model(batch_of(*systems), stress=True)[TASK]
    expect(before.energy.abs().min() > 1e-3, "energies are zero, whatever the structure")
    expect(before.forces.abs().max() > 1e-3, "forces are zero, whatever the structure")
    by = np.random.default_rng(4).normal(0, 5, 3)
    for name, turn in (("rotated", rotation()), ("rotated and inverted", -rotation())):
        after = model(batch_of(*(s.moved(turn, by) for s in systems)), stress=True)[TASK]
        q = torch.from_numpy(turn)
        before_turned = type(before)(before.energy, before.forces @ q.T, None)
        if before.stress is not None:
            before_turned.stress = q @ before.stress @ q.T
        assert_alike(after, before_turned, what=f"of structures that were {name} and shifted")


def degrees_of_features(encoder: EncoderKeys, forces: Forces) -> None:
    """Features have the channels that `degrees` promises; those of degree l turn, and have the sign (-1)^l."""
    model, systems = potential_with(encoder, forces).encoder, mixed()

    def features(systems: Sequence[System]) -> dict[int, Tensor]:
        with torch.no_grad():
            given = model(graph_of(completed(batch_of(*systems), model.needs)))
        expect(
            len(given.layers) == model.readouts,
            f"{len(given.layers)} layers' scalars, `readouts` says {model.readouts}",
        )
        found = {0: given.scalars[:, :, None], **given.higher}
        return found if given.vectors is None else found | {1: given.vectors}

    before = features(systems)
    expect(set(before) == set(model.degrees), f"features of degrees {sorted(before)}, `degrees` says {model.degrees}")
    turned, inverted = (
        features([s.moved(rotation()) for s in systems]),
        features([s.moved(-np.eye(3)) for s in systems]),
    )
    atoms = sum(len(s.numbers) for s in systems)
    for degree, channels in model.degrees.items():
        x, y = before[degree], turned[degree]
        shape = (atoms, channels, 2 * degree + 1)
        expect(x.shape == shape, f"degree {degree}: features {tuple(x.shape)}, not {shape}")
        expect(degree < 2 or x.abs().max() > 1e-6, f"degree {degree}: features are zero, whatever the structure")
        assert_close(inverted[degree], (-1) ** degree * x, what=f"features of degree {degree} of inverted structures")
        flat, flat_turned = x.flatten(0, 1), y.flatten(0, 1)  # all products of two are kept by an orthogonal map only
        assert_close(flat_turned @ flat_turned.T, flat @ flat.T, what=f"products of features of degree {degree}")
        if degree == 1:
            assert_close(y, x @ torch.from_numpy(rotation()).T, what="vectors of rotated structures")


def lattice_translation(encoder: EncoderKeys, forces: Forces) -> None:
    """Moving single atoms by lattice vectors changes nothing."""
    model, crystal = potential_with(encoder, forces), system(4, skewed(3.5))
    assert crystal.cell is not None
    steps = np.random.default_rng(5).integers(-2, 3, (4, 3))
    images = crystal._replace(positions=crystal.positions + steps @ crystal.cell)
    before, after = (model(batch_of(s), stress=True)[TASK] for s in (crystal, images))
    assert_alike(after, before, what="with atoms in other cells")


def permutation(encoder: EncoderKeys, forces: Forces) -> None:
    """The order of atoms does not matter."""
    model = potential_with(encoder, forces)
    for s in (system(8), system(5, skewed(4.0))):
        order = np.random.default_rng(6).permutation(len(s.numbers))
        shuffled = s._replace(numbers=s.numbers[order], positions=s.positions[order])
        before, after = (model(batch_of(x), stress=True)[TASK] for x in (s, shuffled))
        before.forces = before.forces[order]
        assert_alike(after, before, what="of atoms in another order")


def batching(encoder: EncoderKeys, forces: Forces) -> None:
    """A batch predicts what its structures do one by one, and a task that has none gets none."""
    model, systems = potential_with(encoder, forces, ("a", "b")), mixed()
    predicted = model(batch_of(*systems, slices={"a": (0, 5), "b": (5, 5)}), stress=True)
    alone = [model(batch_of(s), stress=True)["a"] for s in systems]
    stress = None if alone[0].stress is None else torch.cat([p.stress for p in alone])
    joined = type(alone[0])(torch.cat([p.energy for p in alone]), torch.cat([p.forces for p in alone]), stress)
    assert_alike(predicted["a"], joined, what="of a batch")
    expect(predicted["b"].energy.shape == (0,) and predicted["b"].forces.shape == (0, 3), "an empty task has energies")


def extensivity(encoder: EncoderKeys, forces: Forces) -> None:
    """Two far copies have twice the energy, and each the forces of one."""
    model, one = potential_with(encoder, forces), system(6)
    two = one._replace(numbers=np.tile(one.numbers, 2), positions=np.concatenate([one.positions, one.positions + 30]))
    single, double = (model(batch_of(s))[TASK] for s in (one, two))
    assert_close(double.energy, 2 * single.energy, what="energy of two far copies")
    assert_close(double.forces, single.forces.repeat(2, 1), what="forces of two far copies")


def supercell(encoder: EncoderKeys, forces: Forces) -> None:
    """Of a crystal: n times the energy, the same forces and stress; cells shorter and longer than the cutoff."""
    model = potential_with(encoder, forces)
    for size in (0.6 * CUTOFF, 1.2 * CUTOFF):
        one = system(3, skewed(size))
        assert one.cell is not None
        positions = np.concatenate([one.positions, one.positions + one.cell[0]])
        two = one._replace(numbers=np.tile(one.numbers, 2), positions=positions, cell=one.cell * [[2], [1], [1]])
        cell, large = (model(batch_of(s), stress=True)[TASK] for s in (one, two))
        expected = type(cell)(2 * cell.energy, cell.forces.repeat(2, 1), cell.stress)
        assert_alike(large, expected, what=f"of a supercell of a cell of {size:.3g} angstrom")


def images_of_one_atom(encoder: EncoderKeys, forces: Forces) -> None:
    """A copper atom in its primitive cell sees its 42 images, as four in the cubic cell do; forces vanish."""
    model, corners = potential_with(encoder, forces, cutoff=5.0), np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    primitive = System(np.array([29]), np.zeros((1, 3)), LATTICE / 2 * corners, True)
    cubic = System(np.full(4, 29), LATTICE / 2 * np.vstack([np.zeros(3), corners]), LATTICE * np.eye(3), True)
    one, four = (model(batch_of(s, cutoff=5.0))[TASK] for s in (primitive, cubic))
    assert_close(four.energy, 4 * one.energy, what="energy of the cubic cell")
    for name, predicted in (("primitive", one), ("cubic", four)):
        assert_close(predicted.forces, torch.zeros_like(predicted.forces), what=f"forces in the {name} cell")


def continuity_at_the_cutoff(encoder: EncoderKeys, forces: Forces) -> None:
    """Nothing jumps when an atom crosses the cutoff."""
    model, x = potential_with(encoder, forces), np.array([[0, 0, 0], [1.2, 0.3, 0], [0, 0, 0]])

    def at(distance: float) -> tuple:
        x[2] = [0, 0, distance]
        batch = batch_of(System(np.array([6, 8, 1]), x.copy()))
        return model(batch)[TASK], batch.edges.shape[1]

    (inside, more), (outside, fewer), (near, _) = (at(CUTOFF + shift) for shift in (-1e-7, 1e-7, -1.0))
    assert more == fewer + 2
    assert_alike(inside, outside, 1e-9, "just inside the cutoff, against just outside")
    expect((near.energy - outside.energy).abs().max() > 1e-6, "a neighbour well inside the cutoff is not felt")


def momentum(encoder: EncoderKeys, forces: Forces) -> None:
    """Conservative forces of a molecule sum to zero."""
    total = potential_with(encoder, forces)(batch_of(system(9)))[TASK].forces.sum(dim=0)
    assert_close(total, torch.zeros_like(total), what="sum of the forces")
