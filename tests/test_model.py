"""The contract of the model, over every encoder and both force modes, in float64: laws of physics and of our design."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk
from scipy.stats import ortho_group

from multifid.graphs.batch import Batch
from multifid.graphs.graph import completed, graph_of
from multifid.graphs.neighbors import neighbor_list
from multifid.model.branch import BranchConfig
from multifid.model.encoders import ENCODERS, announced, build_encoder
from multifid.model.layers import draw_weights
from multifid.model.potential import ModelConfig, Potential
from multifid.structures.structure import Packed

CUTOFF = 4.0
TIGHT = 1e-10
FORCES = ("direct", "conservative")
RANDOM = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def the_same_draws_in_any_order_of_tests():
    RANDOM.bit_generator.state = np.random.default_rng(7).bit_generator.state


# One is of another package (tests/elsewhere): scalars only, triplets.
KINDS = {name: {"name": name} for name in [*ENCODERS, "angular"]} | {
    "egnn with tensors": {"name": "egnn", "tensors": 3}
}
every_model = pytest.mark.parametrize(("encoder", "forces"), list(itertools.product(KINDS, FORCES)))
every_encoder = pytest.mark.parametrize("encoder", list(KINDS))


def model_of(encoder, forces, branches=("a",), branch_of=None, seed=0, cutoff=CUTOFF, dtype=torch.float64):
    config = ModelConfig(
        cutoff=cutoff,
        encoder={**KINDS[encoder], "layers": 2, "hidden": 12},
        branch=BranchConfig(hidden=[10, 10], forces=forces),
    )
    potential = Potential(config, list(branches), branch_of or {b: b for b in branches}, seed).to(dtype)
    with torch.no_grad():  # also the charge and spin tables, which start at zero
        generator = torch.Generator().manual_seed(1)
        for p in potential.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=dtype)
        for table in (potential.encoder.embedding.charge, potential.encoder.embedding.spin):
            table.weight[table.padding_idx] = 0.0
    return potential.eval()


def system(natoms, cell=None, spread=4.0, charge=0, spin=1):
    """(numbers, positions, cell, periodic, charge, spin) with atoms at random places, none nearer than 0.7 angstrom."""
    box = np.eye(3) * spread if cell is None else cell
    images = np.array(list(itertools.product((-1, 0, 1), repeat=3))) @ (0 * box if cell is None else box)
    places = []
    while len(places) < natoms:
        place = RANDOM.uniform(0, 1, 3) @ box
        if all(np.linalg.norm(place - other + images, axis=1).min() > 0.7 for other in places):
            places.append(place)
    return RANDOM.integers(1, 20, natoms), np.array(places), cell, cell is not None, charge, spin


def batch_of(*systems, slices=None, cutoff=CUTOFF, dtype=torch.float64):
    """Systems laid end to end; one task "a" over all of them unless slices say otherwise."""
    numbers, positions, cells, pbc, charge, spin = zip(*systems, strict=True)
    packed = Packed(
        numbers=np.concatenate(numbers).astype(np.uint8),
        positions=np.concatenate(positions),
        natoms=np.array([len(z) for z in numbers], np.int64),
        cell=np.array([np.zeros((3, 3)) if c is None else c for c in cells]),
        pbc=np.array([np.broadcast_to(p, 3) for p in pbc]),
        charge=np.array(charge, np.int8),
        spin=np.array(spin, np.uint8),
    )
    edges, shifts = neighbor_list(packed, cutoff)
    natoms = torch.from_numpy(packed.natoms)
    offsets = packed.offsets
    slices = {"a": (0, len(systems))} if slices is None else slices
    return Batch(
        numbers=torch.from_numpy(packed.numbers).long(),
        positions=torch.from_numpy(packed.positions).to(dtype),
        cell=torch.from_numpy(packed.cell).to(dtype),
        charge=torch.from_numpy(packed.charge).long(),
        spin=torch.from_numpy(packed.spin).long(),
        natoms=natoms,
        structure=torch.repeat_interleave(torch.arange(len(natoms)), natoms),
        edges=torch.from_numpy(edges),
        shifts=torch.from_numpy(shifts).to(dtype),
        slices={t: (slice(a, b), slice(int(offsets[a]), int(offsets[b]))) for t, (a, b) in slices.items()},
    )


def skewed(scale):
    return np.eye(3) * scale + RANDOM.normal(0, 0.15 * scale, (3, 3))


def mixed():
    return [system(7), system(3, skewed(3.0)), system(5, charge=1, spin=2), system(1), system(4, skewed(5.0))]


def assert_close(a, b, tolerance=TIGHT):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() < tolerance * max(1.0, b.abs().max().item())


def moved(systems, turn, by=0.0):
    return [(z, x @ turn.T + by, c if c is None else c @ turn.T, *rest) for z, x, c, *rest in systems]


@every_model
def test_energy_and_forces_turn_with_the_structure(encoder, forces):
    model, systems = model_of(encoder, forces), mixed()
    before = model(batch_of(*systems), stress=True)["a"]
    assert before.energy.abs().min() > 1e-3 and before.forces.abs().max() > 1e-3
    turn = ortho_group.rvs(3, random_state=3)
    for orthogonal in (turn, -turn):  # one of the two is a proper rotation, the other contains a reflection
        after = model(batch_of(*moved(systems, orthogonal, by=RANDOM.normal(0, 5, 3))), stress=True)["a"]
        q = torch.from_numpy(orthogonal)
        assert_close(after.energy, before.energy)
        assert_close(after.forces, before.forces @ q.T)
        if forces == "conservative":
            crystals = [1, 4]
            assert_close(after.stress[crystals], (q @ before.stress @ q.T)[crystals])


@every_model
def test_moving_atoms_by_lattice_vectors_changes_nothing(encoder, forces):
    model = model_of(encoder, forces)
    z, x, cell, *rest = system(4, skewed(3.5))
    images = x + RANDOM.integers(-2, 3, (4, 3)) @ cell
    before, after = (model(batch_of((z, p, cell, *rest)))["a"] for p in (x, images))
    assert_close(after.energy, before.energy)
    assert_close(after.forces, before.forces)


@every_model
def test_the_order_of_atoms_does_not_matter(encoder, forces):
    model = model_of(encoder, forces)
    for z, x, *rest in (system(8), system(5, skewed(4.0))):
        order = RANDOM.permutation(len(z))
        before, after = model(batch_of((z, x, *rest)))["a"], model(batch_of((z[order], x[order], *rest)))["a"]
        assert_close(after.energy, before.energy)
        assert_close(after.forces, before.forces[order])


@every_model
def test_a_batch_predicts_what_its_structures_do_one_by_one(encoder, forces):
    model, systems = model_of(encoder, forces), mixed()
    together = model(batch_of(*systems), stress=True)["a"]
    alone = [model(batch_of(s), stress=True)["a"] for s in systems]
    assert_close(together.energy, torch.cat([p.energy for p in alone]))
    assert_close(together.forces, torch.cat([p.forces for p in alone]))
    if forces == "conservative":
        assert_close(together.stress.nan_to_num(), torch.cat([p.stress for p in alone]).nan_to_num())


@every_model
def test_two_far_copies_have_twice_the_energy(encoder, forces):
    model = model_of(encoder, forces)
    z, x, *rest = system(6)
    one, two = (
        model(batch_of((z, x, *rest)))["a"],
        model(batch_of((np.tile(z, 2), np.concatenate([x, x + 30]), *rest)))["a"],
    )
    assert_close(two.energy, 2 * one.energy)
    assert_close(two.forces, one.forces.repeat(2, 1))


@every_model
@pytest.mark.parametrize("size", [2.5, 5.0])  # shorter and longer than the cutoff
def test_a_supercell_has_twice_the_energy_and_the_same_forces(encoder, forces, size):
    model = model_of(encoder, forces)
    z, x, cell, *rest = system(3, skewed(size))
    double = (np.tile(z, 2), np.concatenate([x, x + cell[0]]), cell * [[2], [1], [1]], *rest)
    one, two = model(batch_of((z, x, cell, *rest)), True)["a"], model(batch_of(double), True)["a"]
    assert_close(two.energy, 2 * one.energy)
    assert_close(two.forces, one.forces.repeat(2, 1))
    if forces == "conservative":
        assert_close(two.stress, one.stress)


@every_model
def test_a_copper_atom_sees_its_42_images(encoder, forces):
    model = model_of(encoder, forces, cutoff=5.0)
    primitive, cubic = (bulk("Cu", "fcc", 3.61, cubic=c) for c in (False, True))
    one, four = (
        model(batch_of((a.numbers, a.positions, np.asarray(a.cell), True, 0, 1), cutoff=5.0))["a"]
        for a in (primitive, cubic)
    )
    assert_close(four.energy, 4 * one.energy)
    assert four.forces.abs().max() < TIGHT and one.forces.abs().max() < TIGHT  # by symmetry


@every_model
def test_energy_and_forces_are_continuous_when_an_atom_crosses_the_cutoff(encoder, forces):
    model = model_of(encoder, forces)
    z, x = np.array([6, 8, 1]), np.array([[0, 0, 0], [1.2, 0.3, 0], [0, 0, 0]], float)

    def at(distance):
        x[2] = [0, 0, distance]
        batch = batch_of((z, x, None, False, 0, 1))
        return model(batch)["a"], batch.edges.shape[1]

    (inside, more), (outside, fewer) = at(CUTOFF - 1e-7), at(CUTOFF + 1e-7)
    assert more == fewer + 2
    assert_close(inside.energy, outside.energy, 1e-9)
    assert_close(inside.forces, outside.forces, 1e-9)
    assert (at(CUTOFF - 1.0)[0].energy - outside.energy).abs().max() > 1e-6  # further in, it is felt


@every_encoder
def test_conservative_forces_and_stress_are_slopes_of_the_energy(encoder):
    model = model_of(encoder, "conservative")
    systems = [system(4, skewed(3.0)), system(5), system(3, np.diag([3.0, 3.0, 0.0]) + np.ones((3, 3)))]
    for pbc in ((True, True, False), (False, True, False), (False, False, False)):  # a slab, a wire, a box
        z, x, cell, _, *rest = system(4, skewed(4.0))
        systems.append((z, x + RANDOM.normal(0, 3.0, 3), cell, pbc, *rest))
    z, x, cell, _, *rest = systems[2]
    systems[2] = (z, x, np.diag([1.0, 1.0, 0.0]) @ cell, (True, True, False), *rest)  # without a third vector
    batch, step = batch_of(*systems), 1e-4
    predicted = model(batch, stress=True)["a"]

    def energy(**changed):
        return model(replace(batch, **changed))["a"].energy

    for atom, axis in itertools.product((0, 2, 6), range(3)):
        change = torch.zeros_like(batch.positions)
        change[atom, axis] = step
        slope = (energy(positions=batch.positions + change) - energy(positions=batch.positions - change)).sum() / (
            2 * step
        )
        assert abs(slope + predicted.forces[atom, axis]) < 1e-5 * max(1.0, abs(slope))
    volume = torch.linalg.det(batch.cell).abs()
    whole = torch.tensor([0, 3, 4, 5])
    for a, b in itertools.product(range(3), range(3)):
        strain = torch.zeros(3, 3, dtype=torch.float64)
        strain[a, b] += step / 2
        strain[b, a] += step / 2
        up, down = (
            energy(positions=batch.positions @ deform, cell=batch.cell @ deform)
            for deform in (torch.eye(3) + strain, torch.eye(3) - strain)
        )
        slopes = ((up - down) / (2 * step) / volume)[whole]
        assert_close(predicted.stress[whole, a, b], slopes, 1e-5)
    assert predicted.stress[1:3].isnan().all()  # a molecule and a layer without a third vector have none
    assert_close(predicted.stress[whole], predicted.stress[whole].transpose(1, 2))
    assert predicted.stress[5].abs().max() > 1e-8  # that of a molecule in a box is its virial in that volume


@every_encoder
def test_conservative_forces_sum_to_zero(encoder):
    assert model_of(encoder, "conservative")(batch_of(system(9)))["a"].forces.sum(dim=0).abs().max() < TIGHT


@every_model
def test_one_atom_and_no_edge_are_finite_down_to_the_gradients(encoder, forces):
    model = model_of(encoder, forces).train()
    for systems in ([system(1)], [system(2, spread=200.0), system(1)]):
        batch = batch_of(*systems)
        assert batch.edges.shape[1] == 0
        predicted = model(batch, stress=True)["a"]
        assert predicted.energy.isfinite().all() and not predicted.forces.any()
        loss(predicted, batch).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def loss(predicted, batch):
    """Smooth in the weights, and touches energy, forces and, where there is one, stress."""
    total = predicted.energy.square().sum() + (predicted.forces - 0.1).square().sum()
    if predicted.stress is not None:
        total = total + predicted.stress[torch.linalg.det(batch.cell).abs() > 0].square().sum()
    return total


@every_model
def test_training_gradients_are_slopes_of_the_loss(encoder, forces):
    """Through the gradient of the energy too, and every parameter is reached."""
    model, batch = model_of(encoder, forces).train(), batch_of(*mixed())
    loss(model(batch, stress=True)["a"], batch).backward()
    generator, step = torch.Generator().manual_seed(5), 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if "embedding" in name:
            direction *= parameter.grad.any(dim=1, keepdim=True)  # neutral rows are fixed, other rows do not occur
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            ends.append(loss(model(batch, stress=True)["a"], batch).item())
            with torch.no_grad():
                parameter -= sign * step * direction
        slope, expected = (ends[0] - ends[1]) / (2 * step), (parameter.grad * direction).sum().item()
        assert abs(slope - expected) < 1e-5 * max(1.0, abs(expected)), name


@every_model
def test_predictions_do_not_depend_on_who_asks(encoder, forces):
    """While training, evaluating and under no_grad alike; evaluation holds on to no graph."""
    model, batch = model_of(encoder, forces), batch_of(*mixed())
    with torch.no_grad():
        quiet = model(batch, stress=True)["a"]
    evaluated, trained = model.eval()(batch, stress=True)["a"], model.train()(batch, stress=True)["a"]
    assert not quiet.forces.requires_grad and not quiet.energy.requires_grad
    assert trained.forces.requires_grad and trained.energy.requires_grad
    for other in (evaluated, trained):
        assert_close(other.energy, quiet.energy)
        assert_close(other.forces, quiet.forces)
    assert (quiet.stress is None) == (forces == "direct")


@every_model
def test_each_branch_sees_its_slice_and_tasks_of_one_store_share_theirs(encoder, forces):
    model = model_of(encoder, forces, ("x", "y", "z"), {"dft": "x", "ccsd": "y", "other": "z", "twin": "x"})
    first, second = [system(4), system(3, skewed(4.0))], [system(5)]
    slices = {"dft": (0, 2), "ccsd": (0, 2), "other": (2, 3)}
    together = model(batch_of(*first, *second, slices=slices), stress=True)
    assert list(together) == list(slices)
    for task, systems in (("dft", first), ("ccsd", first), ("other", second), ("twin", first)):
        alone = model(batch_of(*systems, slices={task: (0, len(systems))}), stress=True)[task]
        paired = together["dft" if task == "twin" else task]
        assert_close(paired.energy, alone.energy)
        assert_close(paired.forces, alone.forces)
        if forces == "conservative":
            assert_close(paired.stress.nan_to_num(), alone.stress.nan_to_num())
    assert (together["dft"].energy - together["ccsd"].energy).abs().min() > 1e-6


@every_model
def test_shared_slices_train_as_separate_ones_do(encoder, forces):
    systems, slices = [system(4), system(3, skewed(4.0))], {"s": (0, 2), "t": (0, 2)}

    def gradients(batches):
        model = model_of(encoder, forces, ("s", "t")).train()
        for batch in batches:
            sum(loss(p, batch) for p in model(batch, stress=True).values()).backward()
        return [p.grad for p in model.parameters()]

    joint = gradients([batch_of(*systems, slices=slices)])
    separate = gradients([batch_of(*systems, slices={t: (0, 2)}) for t in slices])
    for a, b in zip(joint, separate, strict=True):
        assert_close(a, b)


@every_model
def test_an_empty_slice_predicts_nothing(encoder, forces):
    model = model_of(encoder, forces, ("a", "b"))
    predicted = model(batch_of(system(3), slices={"a": (0, 1), "b": (1, 1)}), stress=True)
    assert predicted["b"].energy.shape == (0,) and predicted["b"].forces.shape == (0, 3)
    assert predicted["a"].energy.shape == (1,)


@every_model
def test_untrained_predictions_are_of_the_size_of_the_labels(encoder, forces):
    """In molecules and in dense crystals: labels in scaled units are near one, and training starts from there."""
    config = ModelConfig(encoder={**KINDS[encoder]}, branch=BranchConfig(hidden=[64, 64, 64], forces=forces))
    crystal = bulk("Fe", "bcc", 2.87, cubic=True).repeat(2)
    crystal.rattle(0.1, seed=0)
    systems = [system(16, spread=5.0), (crystal.numbers, crystal.positions, np.asarray(crystal.cell), True, 0, 1)]
    batch = batch_of(*systems, cutoff=5.0, dtype=torch.float32)
    for seed in range(3):
        predicted = Potential(config, ["a"], {"a": "a"}, seed).eval()(batch)["a"]
        assert (predicted.energy / batch.natoms).abs().max() < 1.0
        assert predicted.forces.square().mean() < 3.0**2


@every_model
def test_weights_depend_on_seed_and_name_alone(encoder, forces):
    config = ModelConfig(
        encoder={**KINDS[encoder], "layers": 1, "hidden": 8}, branch=BranchConfig(hidden=[6], forces=forces)
    )

    def weights(branches, seed=0):
        return Potential(config, branches, {}, seed).state_dict()

    torch.manual_seed(1)
    state, both = torch.get_rng_state(), weights(["a", "b"])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for branches in (["b"], ["b", "a"], ["a"], []):
        some = weights(branches)
        assert all(torch.equal(some[name], both[name]) for name in some)
        assert {n.split(".")[1] for n in some if n.startswith("branches.")} == set(branches)
    other = weights(["a"], seed=1)
    assert not torch.equal(other["encoder.embedding.element.weight"], both["encoder.embedding.element.weight"])
    assert not torch.equal(both["branches.a.energy.maps.0.weight"], both["branches.b.energy.maps.0.weight"])


@every_model
def test_parameters_are_named_by_part(encoder, forces):
    model = model_of(encoder, forces, ("a", "b"))
    parts = [dict(model.encoder_parameters()), dict(model.branch_parameters("a")), dict(model.branch_parameters("b"))]
    for prefix, part in zip(("encoder.", "branches.a.", "branches.b."), parts, strict=True):
        assert part and all(name.startswith(prefix) for name in part)
    assert {n: id(p) for part in parts for n, p in part.items()} == {n: id(p) for n, p in model.named_parameters()}
    assert any("forces" in name for name in parts[1]) == (forces == "direct")


@every_model
def test_float32_agrees_with_float64(encoder, forces):
    systems = mixed()
    exact, single = (
        model_of(encoder, forces).to(t)(batch_of(*systems, dtype=t))["a"] for t in (torch.float64, torch.float32)
    )
    assert single.energy.dtype == torch.float32
    assert_close(single.energy.double(), exact.energy, 1e-4)
    assert_close(single.forces.double(), exact.forces, 1e-4)


@every_model
def test_bfloat16_autocast_stays_near_float32(encoder, forces):
    model, batch = model_of(encoder, forces).float().train(), batch_of(*mixed(), dtype=torch.float32)
    exact = model(batch)["a"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)["a"]
    assert rough.energy.dtype == torch.float32 and rough.forces.dtype == torch.float32
    assert_close(rough.energy, exact.energy, 0.05)
    assert_close(rough.forces, exact.forces, 0.2)
    assert not torch.equal(rough.energy, exact.energy)
    loss(rough, batch).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_encoder
def test_charge_and_spin_matter_and_unseen_ones_act_as_neutral(encoder):
    z, x, cell, pbc, *_ = system(5)
    model = model_of(encoder, "direct")

    def energy(charge, spin):
        return model(batch_of((z, x, cell, pbc, charge, spin)))["a"].energy

    assert (energy(1, 1) - energy(0, 1)).abs() > 1e-6 and (energy(0, 3) - energy(0, 1)).abs() > 1e-6
    assert_close(energy(100, 1), energy(0, 1))
    assert_close(energy(0, 200), energy(0, 1))
    fresh = Potential(model.config, ["a"], {"a": "a"}, seed=0).double()
    model = fresh.train()
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    batch = batch_of((z, x, cell, pbc, 0, 1), (z, x + 1, cell, pbc, 1, 2))
    loss(fresh(batch)["a"], batch).backward()
    optimizer.step()  # trained on neutral singlets and on a cation: the dianion stays as good as neutral
    assert_close(energy(-2, 1), energy(0, 1))
    assert (energy(1, 2) - energy(0, 1)).abs() > 1e-8


@every_encoder
def test_charge_and_spin_states_of_one_geometry_are_told_apart_by_training(encoder):
    z, x, cell, pbc, *_ = system(3)
    batch = batch_of(*((z, x, cell, pbc, charge, spin) for charge, spin in ((0, 1), (1, 2), (-1, 2), (0, 3))))
    energy = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)  # a blind model: 2.19 at best
    config = ModelConfig(cutoff=CUTOFF, encoder={**KINDS[encoder], "layers": 1, "hidden": 12})
    model = Potential(config, ["a"], {"a": "a"}, seed=0).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.002)
    for _ in range(120):
        error = (model(batch)["a"].energy - energy).square()
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
    assert error.detach().sum() < 0.2


def test_every_encoder_has_its_own_keys():
    assert encoder_of(name="egnn").degrees == {0: 64, 1: 8}
    assert encoder_of(name="egnn", vectors=3).degrees == {0: 64, 1: 3}
    assert encoder_of(name="painn", hidden=16).degrees == {0: 16, 1: 16}
    for key, value in (("tensors", 2), ("vectors", 8)):
        with pytest.raises(ValueError, match=key):
            encoder_of(name="painn", hidden=16, **{key: value})
    written = {"name": "painn", "layers": 4, "hidden": 16, "vectors": None, "tensors": 0, "radial": 8}
    assert encoder_of(**written).degrees == {0: 16, 1: 16}, "as configs of the first release say it"
    assert encoder_of(**written | {"name": "egnn"}).degrees == {0: 16, 1: 8}


def encoder_of(**config):
    model = ModelConfig(cutoff=CUTOFF, encoder=config)
    return build_encoder(model.encoder, model.cutoff)


def test_with_tensors_atoms_see_what_distances_and_sums_of_vectors_do_not():
    """A centre with four neighbours in a square and one with four in a tetrahedron, each one alone.

    No neighbour sees another: the sum of all directions is zero in both, the distances are the same.
    """
    square = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]) * 2.5
    tetrahedron = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5 * 2.5
    systems = [
        (np.array([6, 1, 1, 1, 1]), np.vstack([np.zeros(3), x]), None, False, 0, 1) for x in (square, tetrahedron)
    ]
    batch = batch_of(*systems, cutoff=3.0)  # of encoders with a larger one, which see no more
    assert batch.edges.shape[1] == 16
    blind, seeing = (encoder_of(layers=1, hidden=8, tensors=tensors) for tensors in (0, 2))
    for encoder, same in ((blind, True), (seeing, False)):
        draw_weights(encoder, torch.Generator().manual_seed(0))
        energies = encoder.double()(graph_of(batch)).scalars[[0, 5]]
        assert torch.allclose(energies[0], energies[1], atol=TIGHT) == same


def test_encoders_of_other_packages_are_found_and_broken_ones_named():
    found, broken = announced()
    assert set(found) == {"angular"} and set(broken) == {"broken"}
    with pytest.raises(ValueError, match=r"'broken': angular:Nothing \(elsewhere-encoders\) cannot be loaded"):
        encoder_of(name="broken")
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        encoder_of(name="angular", vectors=3)
    with pytest.raises(ValueError, match=r"readout: layers reads .* so it must be last"):
        ModelConfig(encoder={"name": "angular", "layers": 1}, branch={"readout": "layers"})


@every_encoder
def test_energies_may_be_read_out_after_every_layer(encoder):
    config = ModelConfig(
        cutoff=CUTOFF, encoder={**KINDS[encoder], "layers": 3, "hidden": 8}, branch={"readout": "layers"}
    )
    model, batch = Potential(config, ["a"], {"a": "a"}, seed=0).double(), batch_of(*mixed())
    readouts = model.branches["a"].readouts
    assert len(readouts) == 2
    before = model(batch)["a"].energy
    features = model.encoder(graph_of(completed(batch, model.encoder.needs)))
    with torch.no_grad():
        for readout in readouts:
            readout.weight.zero_()
    more = sum(x @ torch.zeros(8, dtype=torch.float64) for x in features.layers)  # of the right number and shape
    assert more.shape == (len(batch.numbers),) and (model(batch)["a"].energy - before).abs().max() > 1e-6


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="egnn, painn"):
        encoder_of(name="nonesuch")
    with pytest.raises(ValueError, match="not among"):
        Potential(ModelConfig(), ["a"], {"task": "b"}, seed=0)
    with pytest.raises(ValueError, match="must not be called 'train'"):
        Potential(ModelConfig(), ["train"], {}, seed=0)
