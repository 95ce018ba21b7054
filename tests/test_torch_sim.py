"""Many systems at once in torch-sim: the numbers of the predictor, its own check of models, relaxation and dynamics."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

torch_sim = pytest.importorskip("torch_sim", reason="torch-sim is not installed")

from torch_sim.models.interface import validate_model_outputs  # noqa: E402

from multifid.apply.torch_sim import TorchSimModel  # noqa: E402
from test_calculator import crystal, model, slab  # noqa: E402

CPU = torch.device("cpu")


def state_of(structures: list[Atoms], dtype=torch.float64):
    return torch_sim.io.atoms_to_state(structures, CPU, dtype)


def skewed() -> Atoms:
    atoms = bulk("NaCl", "rocksalt", 5.4)  # smaller than the cutoff
    atoms.rattle(0.1, seed=4)
    return atoms


@pytest.mark.parametrize("encoder", ["egnn", "painn"])
@pytest.mark.parametrize(
    "structures", [lambda: [crystal(), skewed(), slab_in_a_box()], lambda: [molecule("H2O"), molecule("CH3CH2OH")]]
)
def test_numbers_are_those_of_the_predictor(structures, encoder):
    given, own = structures(), model(encoder=encoder)
    found, expected = TorchSimModel(own, "a")(state_of(given)), own.predict(given, "a")
    np.testing.assert_allclose(found["energy"], expected.energy, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["forces"], np.concatenate(expected.forces), rtol=0, atol=1e-10)
    np.testing.assert_allclose(found["energies"], np.concatenate(expected.energies), rtol=0, atol=1e-9)
    for mine, theirs, atoms in zip(found["stress"], expected.stress, given, strict=True):
        np.testing.assert_allclose(mine, theirs if atoms.cell.volume else np.zeros((3, 3)), rtol=0, atol=1e-10)


def slab_in_a_box() -> Atoms:
    atoms = slab()
    atoms.pbc = True  # a state has one answer for all of its systems
    return atoms


def test_its_own_check_of_models_passes():
    references = {str(z): -1.0 for z in (14, 26)}
    validate_model_outputs(TorchSimModel(model(references=references, elements=[14, 26]), "a"), CPU, torch.float64)
    direct = TorchSimModel(model("direct", references=references, elements=[14, 26]), "a")
    validate_model_outputs(direct, CPU, torch.float64)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(NotImplementedError, match="predicted directly"):
        TorchSimModel(model("direct"), "a", compute_stress=True)
    with pytest.raises(ValueError, match="several tasks"):
        TorchSimModel(model())
    asked = TorchSimModel(model(), "b")
    with pytest.raises(ValueError, match=r"structure 1: task 'b' has never seen Cu"):
        asked(state_of([crystal(), slab_in_a_box()]))
    broken = state_of([crystal(), crystal()])
    broken.positions[9, 1] = torch.nan
    with pytest.raises(ValueError, match=r"system 1 of the state: .* finite"):
        asked(broken)


@pytest.mark.filterwarnings("ignore:Optimize has reached max steps")
def test_dynamics_of_several_systems_conserve_their_energies_and_a_relaxation_lowers_them():
    asked = TorchSimModel(model(), "a")
    given = [molecule("H2O"), molecule("CH4"), molecule("CH3CH2OH")]
    start = state_of(given)
    init, step = torch_sim.nve(model=asked, dt=torch.tensor(2e-3), kT=torch.tensor(0.01), seed=0)
    state = init(start.clone())

    def total(s):
        return s.energy + torch_sim.calc_kinetic_energy(momenta=s.momenta, masses=s.masses, system_idx=s.system_idx)

    before = total(state)
    kinetic = float((before - state.energy).max())
    for _ in range(50):
        state = step(state)
    assert float((total(state) - before).abs().max()) < 0.02 * kinetic
    assert not torch.equal(state.positions, start.positions)
    fire = torch_sim.frechet_cell_fire
    relaxed = torch_sim.optimize(system=state_of([crystal(), skewed()]), model=asked, optimizer=fire, max_steps=15)
    assert (asked(relaxed)["energy"] < asked(state_of([crystal(), skewed()]))["energy"]).all()


@pytest.mark.full
def test_batches_cut_by_torch_sim_keep_the_order_and_cells_count_for_convergence():
    from torch_sim.autobatching import InFlightAutoBatcher

    asked = TorchSimModel(model(), "a")
    given = [bulk("NaCl", "rocksalt", 5.4, cubic=True).repeat((1 + k % 2, 1, 1)) for k in range(6)]
    for seed, atoms in enumerate(given):
        atoms.rattle(0.05, seed=seed)
    few = InFlightAutoBatcher(model=asked, memory_scales_with="n_atoms", max_memory_scaler=40)
    done = torch_sim.generate_force_convergence_fn(force_tol=0.02, include_cell_forces=True)
    how = {"optimizer": torch_sim.frechet_cell_fire, "convergence_fn": done, "max_steps": 300}
    for batcher in (False, few):
        state = torch_sim.optimize(system=state_of(given), model=asked, autobatcher=batcher, **how)
        answer = asked(state)
        assert answer["forces"].norm(dim=1).max() < 0.021
        on_cell = answer["stress"] * torch.linalg.det(state.cell).abs()[:, None, None]
        assert (on_cell.abs().amax(dim=(1, 2)) / state.n_atoms_per_system).max() < 0.021
        assert state.n_atoms_per_system.tolist() == [len(atoms) for atoms in given]
        assert (answer["energy"] < asked(state_of(given))["energy"]).all()
