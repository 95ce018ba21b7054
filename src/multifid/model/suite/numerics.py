"""Checks of the contract: precision, export, charge and spin, weights.

Each takes what stands under `model.encoder` in a config, and the force mode.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from multifid.graphs.batch import Batch
from multifid.model.fixed import Fixed, inputs_for, tensors_of, write_down
from multifid.model.potential import ModelConfig, Potential
from multifid.model.predictor import Predictor
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
    expect_finite_gradients,
    loss,
    mixed,
    potential_with,
    skewed,
    system,
)

SUMS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_"}


def float32(encoder: EncoderKeys, forces: Forces) -> None:
    """Near float64."""
    exact, single = (
        potential_with(encoder, forces).to(t)(batch_of(*mixed(), dtype=t), stress=True)[TASK]
        for t in (torch.float64, torch.float32)
    )
    expect(single.energy.dtype == single.forces.dtype == torch.float32, "energies or forces are not in float32")
    stress = None if single.stress is None else single.stress.double()
    assert_alike(type(single)(single.energy.double(), single.forces.double(), stress), exact, 1e-4, "in float32")


def bfloat16(encoder: EncoderKeys, forces: Forces) -> None:
    """Under autocast: results in float32 and near it, no sum over neighbours in half precision, finite gradients."""
    model, batch = potential_with(encoder, forces).float().train(), batch_of(*mixed(), dtype=torch.float32)
    exact = model(batch)[TASK]
    with _Sums() as sums:
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(batch)[TASK]
        loss(rough, batch).backward()
    expect(rough.energy.dtype == rough.forces.dtype == torch.float32, "energies or forces are in half precision")
    assert_close(rough.energy, exact.energy, 0.05, "energies in bfloat16")
    assert_close(rough.forces, exact.forces, 0.2, "forces in bfloat16")
    expect(not torch.equal(rough.energy, exact.energy), "no product of matrices is taken in bfloat16")
    expect(sums.types == {torch.float32}, f"rows are added up by their index in {sums.types}: a GPU rounds every term")
    expect_finite_gradients(model, "in bfloat16")


class _Sums(TorchDispatchMode):
    """Notes the types in which rows are added up by their index."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in SUMS:
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def exportable(encoder: EncoderKeys, forces: Forces) -> None:
    """What an exported file computes, traced for one batch, is right for others, down to no edges and no atoms.

    `x.shape[0]` is a symbol while a pass is traced; `len(x)` is the number at hand.
    """
    references = {str(z): -0.1 * z for z in range(1, 20)}
    about = {"branch": TASK, "references": references, "scale": 1.5}
    model = Predictor(potential_with(encoder, forces), {"cutoff": CUTOFF, "tasks": {TASK: about}}, dtype=torch.float64)
    function = Fixed(model, TASK)
    operations = write_down(function, batch_of(*mixed())).operations
    names = [x.name for x in inputs_for(function.needs)]
    others = [[system(9), system(4, skewed(4.0)), system(2)], [system(1)], [system(2, spread=200.0)], []]
    for systems in others:
        batch, what = batch_of(*systems), f"of an exported pass, {sum(len(s.numbers) for s in systems)} atoms"
        try:
            energies, found, *virial = operations(*tensors_of(batch, names))
        except RuntimeError as error:
            raise AssertionError(f"a pass traced for one batch fails for another: {error}") from error
        expected = model.aligned(batch, TASK, stress=model.is_conservative(TASK))
        zero = torch.tensor([0.0, *references.values()], dtype=torch.float64)[batch.numbers]
        assert_close(energies - zero, expected.energies, what=f"energies {what}")  # type: ignore[arg-type]
        assert_close(found, expected.forces, what=f"forces {what}")
        if expected.stress is not None:
            spans = ~expected.stress.isnan()
            stress = -virial[0] / torch.linalg.det(batch.cell).abs()[:, None, None]
            assert_close(stress[spans], expected.stress[spans], what=f"stress {what}")


def charge_and_spin(encoder: EncoderKeys, forces: Forces) -> None:
    """They matter; those that a table has no row for, or that were not trained on, act as neutral singlets."""
    model, molecule = potential_with(encoder, forces), system(5)

    def energy(charge: int, spin: int) -> Tensor:
        return model(batch_of(molecule._replace(charge=charge, spin=spin)))[TASK].energy.detach()

    neutral = energy(0, 1)
    for name, other in (("a cation", energy(1, 1)), ("a triplet", energy(0, 3))):
        expect((other - neutral).abs() > 1e-6, f"{name} has the energy of a neutral singlet")
    assert_close(energy(100, 1), neutral, what="energy of an impossible charge, against the neutral one")
    assert_close(energy(0, 200), neutral, what="energy of an impossible spin, against the singlet")
    model = Potential(model.config, [TASK], {TASK: TASK}, seed=0).double().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = batch_of(molecule, molecule._replace(positions=molecule.positions + 1, charge=1, spin=2))
    loss(model(batch)[TASK], batch).backward()
    optimizer.step()
    assert_close(energy(-2, 1), energy(0, 1), what="energy of a dianion after training on neutral singlet and cation")
    expect((energy(1, 2) - energy(0, 1)).abs() > 1e-8, "training does not tell a cation from the neutral molecule")


def charge_and_spin_are_learned(encoder: EncoderKeys, forces: Forces) -> None:
    """States of one geometry that differ in charge and spin are told apart by a short training."""
    molecule = system(3)
    states = ((0, 1), (1, 2), (-1, 2), (0, 3))
    batch = batch_of(*(molecule._replace(charge=charge, spin=spin) for charge, spin in states))
    energy = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)  # the best of a blind model: 2.19
    config = ModelConfig.model_validate({"cutoff": CUTOFF, "encoder": dict(encoder), "branch": {"forces": forces}})
    model = Potential(config, [TASK], {TASK: TASK}, seed=0).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(60):
        error = (model.train()(batch)[TASK].energy - energy).square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    expect(error < 0.2, f"the squared error is {error.item():.3g} after training, at most 0.2 is allowed")


def size_of_untrained_predictions(encoder: EncoderKeys, forces: Forces) -> None:
    """Of molecules and dense crystals, in scaled units: labels are near one, and training starts from there."""
    keys = {"encoder": dict(encoder), "branch": {"hidden": [64, 64, 64], "forces": forces}}
    config, random = ModelConfig.model_validate(keys), np.random.default_rng(0)
    places = 2.87 * np.array([(x, y, z, s) for x in (0, 1) for y in (0, 1) for z in (0, 1) for s in (0, 0.5)])
    iron = places[:, :3] + places[:, 3:] + random.normal(0, 0.1, (16, 3))
    systems = [system(16, spread=5.0), System(np.full(16, 26), iron, 2 * 2.87 * np.eye(3), True)]
    batch: Batch = batch_of(*systems, cutoff=config.cutoff, dtype=torch.float32)
    for seed in range(3):
        predicted = Potential(config, [TASK], {TASK: TASK}, seed).eval()(batch)[TASK]
        largest, forces_rms = (predicted.energy / batch.natoms).abs().max(), predicted.forces.square().mean().sqrt()
        expect(largest < 1.0, f"untrained energies of {largest:.3g} an atom: at most 1 is allowed")
        expect(forces_rms < 3.0, f"untrained forces of {forces_rms:.3g}: at most 3 is allowed")


def weights_depend_on_the_seed_alone(encoder: EncoderKeys, forces: Forces) -> None:
    """Not on the global state of random numbers, which stays as it is, nor on the branches that are built beside."""
    keys = {"encoder": dict(encoder), "branch": {"hidden": [6], "forces": forces}}
    config = ModelConfig.model_validate(keys)

    def weights(branches: list[str], seed: int = 0) -> dict[str, Tensor]:
        return Potential(config, branches, {}, seed).state_dict()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state, both = torch.get_rng_state(), weights(["a", "b"])
        expect(torch.equal(torch.get_rng_state(), state), "building it draws from the global random numbers")
        torch.manual_seed(2)
        for branches in (["b"], ["b", "a"], ["a"], []):
            some = weights(branches)
            differ = [name for name in some if not torch.equal(some[name], both[name])]
            expect(not differ, f"{differ}: other weights beside other branches")
            expect({n.split(".")[1] for n in some if n.startswith("branches.")} == set(branches), "a branch too many")
    other = weights(["a"], seed=1)
    expect(any(not torch.equal(other[n], both[n]) for n in other if n.startswith("encoder.")), "the seed is not used")


def readouts_of_layers(encoder: EncoderKeys, forces: Forces) -> None:
    """Where an encoder gives scalars of every layer, energies may be read out of all of them."""
    plain = potential_with(encoder, forces)
    if not plain.encoder.readouts:
        return
    model, batch = potential_with(encoder, forces, readout="layers"), batch_of(*mixed())
    readouts = [p for name, p in model.named_parameters() if ".readouts." in name and name.endswith("weight")]
    expect(len(readouts) == model.encoder.readouts, "another number of readouts than `readouts` says")
    before = model(batch)[TASK].energy.detach()
    with torch.no_grad():
        for readout in readouts:
            readout.zero_()
    expect((model(batch)[TASK].energy - before).abs().max() > 1e-6, "the layers' scalars do not matter")
