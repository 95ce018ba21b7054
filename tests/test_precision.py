"""What stays in float32 when products of matrices do not: geometry, strain, sums, energies, weights; by value."""

import itertools

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.graphs.batch import edge_vectors, laid_out
from multifid.model import potential as potential_file
from multifid.model.branch import BranchConfig
from multifid.model.compiled import compile_training
from multifid.model.contract import Features
from multifid.model.encoders import all_encoders
from multifid.model.encoders.tensors import Invariants
from multifid.model.kernels.native import build as native_build
from multifid.model.potential import ModelConfig, Potential
from multifid.model.suite.samples import batch_of, potential_with, system
from multifid.parallel.groups import alone
from multifid.parallel.layout import place
from multifid.training.build import build
from multifid.training.step import Totals
from test_compile import batches_of, potential_of
from test_model import FORCES, KINDS, small
from test_train import config_of, feed_of

aten = torch.ops.aten
ADDED = {aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_, aten.addmv, aten.addmv_}
PRODUCTS = ADDED | {aten.mm, aten.bmm, aten.mv, aten.dot}


class Rounded(TorchDispatchMode):
    """Products of float32 matrices are taken from operands of `bits` bits of mantissa: TF32 (10) on any hardware."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.cut = 23 - bits

    def round(self, x):
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        return ((x.contiguous().view(torch.int32) + (1 << self.cut - 1)) >> self.cut << self.cut).view(torch.float32)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            added = func.overloadpacket in ADDED  # what is added to a product stays as it is
            args = (*args[:added], *(self.round(x) for x in args[added:]))
        return func(*args, **(kwargs or {}))


IN_LOW_PRECISION = {"bf16": lambda: torch.autocast("cpu", torch.bfloat16), "tf32": lambda: Rounded(10)}
# Relative to the length of all forces, or of the stress. Between a cell and its supercell only geometry could differ by
# more: edge vectors in bfloat16 make it 0.03 to 0.13 for this crystal, and in TF32 0.006 to 0.02.
GEOMETRY = {"bf16": 0.035, "tf32": 0.008}
NETWORK = {"bf16": 0.1, "tf32": 0.008}  # against float32: 0.01 to 0.05 was seen in bf16, for all encoders
in_low_precision = pytest.mark.parametrize("precision", IN_LOW_PRECISION)
ALL = [
    (kind, forces, precision)
    for kind, forces, precision in itertools.product(KINDS, FORCES, IN_LOW_PRECISION)
    if forces == "direct" or not all_encoders()[KINDS[kind]["name"]].slopes_need_float32  # refused
]
ORDINARY = {("egnn", "conservative", "bf16"), ("painn", "direct", "tf32"), ("egnn with tensors", "direct", "bf16")}
every_setting = pytest.mark.parametrize(
    ("encoder", "forces", "precision"),
    [pytest.param(*case, marks=[] if case in ORDINARY else pytest.mark.full) for case in ALL],
)


def crystal():
    """A strained, rattled cell of rock salt, and the same crystal in eight cells."""
    random = np.random.default_rng(0)
    atoms = bulk("NaCl", "rocksalt", 5.64, cubic=True)
    atoms.positions += random.normal(0, 0.1, (8, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + random.normal(0, 0.02, (3, 3))), scale_atoms=True)
    return [(x.numbers, x.positions, x.cell.array, True, 0, 1) for x in (atoms, atoms.repeat((2, 2, 2)))]


def usual_model(encoder, forces, layers=3):
    """As wide and deep as models are, with weights that are not symmetric by chance."""
    config = ModelConfig(
        cutoff=5.0,
        encoder={**KINDS[encoder], "layers": layers, "hidden": 64},
        branch=BranchConfig(hidden=[64, 64], forces=forces),
    )
    model, generator = Potential(config, ["a"], {"a": "a"}, seed=0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return model.eval()


def assert_within(found, exact, tolerance):
    assert found.dtype == torch.float32
    apart = float((found - exact).detach().norm() / exact.detach().norm())
    assert apart <= tolerance, apart


@in_low_precision
def test_geometry_and_strain_of_a_crystal_are_those_of_float32_to_the_last_bit(precision):
    batch, generator = batch_of(*crystal(), cutoff=5.0, dtype=torch.float32), torch.Generator().manual_seed(0)
    strain = 0.1 * torch.randn(2, 3, 3, generator=generator)

    def geometry():
        strained = potential_file.under_strain(batch, strain)
        slopes = potential_file.stress_of(strain, batch.cell)
        return [edge_vectors(batch), strained.positions, strained.cell, edge_vectors(strained), slopes]

    exact = geometry()
    assert (exact[0] - edge_vectors(batch_of(*crystal(), cutoff=5.0))).abs().max() < 1e-5, "than in float64"
    with IN_LOW_PRECISION[precision]():
        for a, b in zip(geometry(), exact, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b)


@in_low_precision
def test_invariants_and_energies_of_atoms_are_not_rounded(precision):
    generator = torch.Generator().manual_seed(0)
    v, t = (torch.randn(9, 4, k, generator=generator) for k in (3, 5))
    branch = potential_with(small("egnn"), "direct", dtype=torch.float32).branches["a"]
    last = branch.energy.linears()[-1]
    exact = Invariants(4, 4)(v, t)
    with IN_LOW_PRECISION[precision](), torch.no_grad():
        assert torch.equal(Invariants(4, 4)(v, t), exact)
        features = Features(torch.randn(9, 12, generator=generator), torch.zeros(9, 8, 3))
        energy, _ = branch(features)
        seen = branch.energy.before_last(features.scalars)
    wanted = seen.double() @ last.weight[0].double() + last.bias.double()
    torch.testing.assert_close(energy.double(), wanted, rtol=1e-5, atol=1e-6)


@every_setting
def test_crystals_and_molecules_are_near_float32_and_a_cell_near_its_supercell(encoder, forces, precision):
    model, systems = usual_model(encoder, forces), [*crystal(), system(9), system(6, charge=1, spin=2)]
    batches = [batch_of(x, cutoff=5.0, dtype=torch.float32) for x in systems]
    exact = [model(batch, stress=True)["a"] for batch in batches]
    with IN_LOW_PRECISION[precision]():
        found = [model(batch, stress=True)["a"] for batch in batches]
    of_atoms = [torch.cat([p.energy / len(p.forces) for p in predictions]) for predictions in (found, exact)]
    assert_within(*of_atoms, NETWORK[precision])
    for a, b in zip(found, exact, strict=True):
        assert_within(a.forces, b.forces, NETWORK[precision])
        assert not torch.equal(a.forces, b.forces), "products are taken in low precision"
    cell, large = found[:2]
    assert_within(large.energy / 8, cell.energy, GEOMETRY[precision] / 2)
    assert_within(large.forces, cell.forces.repeat(8, 1), GEOMETRY[precision])
    if forces == "conservative":
        assert_within(cell.stress, exact[0].stress, NETWORK[precision])
        assert_within(large.stress, cell.stress, GEOMETRY[precision])


def test_conservative_forces_that_would_be_rounded_by_a_tenth_are_refused(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train={"precision": "bf16"})
    values["model"]["encoder"] = {"name": "dimenet"}
    parse_config(values, "test")  # direct forces
    values["model"]["branch"]["forces"] = "conservative"
    with pytest.raises(ValueError, match="bf16 rounds the conservative forces of dimenet"):
        parse_config(values, "test")


# Layers that differ in what they ask of a compiler; all of them in float32: test_compile.py. A case takes many seconds.
@pytest.mark.parametrize(
    ("encoder", "forces"),
    [
        ("egnn", "direct"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("egnn with tensors", "conservative"),
                ("painn", "conservative"),
                ("painn with attention", "direct"),
                ("gat", "conservative"),
                ("dimenet", "direct"),
                ("mace", "conservative"),
                ("gotennet", "direct"),
            )
        ),
    ],
)
def test_compiled_passes_in_bf16_are_the_eager_ones_for_a_crystal(encoder, forces, monkeypatch):
    monkeypatch.setattr(native_build, "library", lambda: None)  # which rounds fewer numbers
    model = usual_model(encoder, forces, layers=2 if "attention" in KINDS[encoder] else 1).train()
    batch = batch_of(crystal()[0], cutoff=5.0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(batch, stress=True)["a"]
        compile_training(model, True, backend="aot_eager")
        found = model(batch, stress=True)["a"]
    assert_within(found.energy, eager.energy, 1e-3)
    assert_within(found.forces, eager.forces, 1e-3)
    if forces == "conservative":
        assert_within(found.stress, eager.stress, 1e-3)


def trainer_of(stores, tmp_path, precision):
    config = parse_config(config_of(stores, tmp_path / "run", train={"precision": precision}), "test")
    sources = open_sources(config.tasks)
    return build(config, sources, place(list(config.tasks), "auto", 1), 10, alone()), feed_of(config, sources)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("encoder", ["egnn", "painn"])
def test_autocast_keeps_coordinates_sums_energies_and_forces_in_float32(stores, encoder, forces, native, monkeypatch):
    if not native:
        monkeypatch.setattr(native_build, "library", lambda: None)
    potential = potential_of(encoder, forces, torch.float32)
    batch = batches_of(stores, 1)[0].to(dtype=torch.float32)
    kept, inside = [], []
    for layer in potential.encoder.layers:
        layer.register_forward_hook(lambda _, inputs, outputs: kept.extend([*inputs, *outputs]))
    for linear in (m for m in potential.modules() if isinstance(m, torch.nn.Linear)):
        linear.register_forward_hook(lambda _, inputs, output: inside.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        predictions = potential(batch)
    assert {x.dtype for x in kept if x.is_floating_point()} == {torch.float32}, "between layers"
    if native:  # no call of a module tells what is computed in C++
        exact = potential(batch)
        assert not any(torch.equal(p.forces, exact[task].forces) for task, p in predictions.items()), "products"
    else:
        assert torch.bfloat16 in inside, "products of matrices"
    for p in predictions.values():
        assert p.energy.dtype == p.forces.dtype == torch.float32


def test_a_sum_over_many_neighbours_is_not_rounded_to_bfloat16():
    """4,096 messages of 1 + 1/256 each: in bfloat16 the sum would stop at 256, and each term would be 1."""
    from multifid.model.layers import sum_over

    with torch.autocast("cpu", torch.bfloat16):
        total = sum_over(torch.full((4096, 1), 1 + 1 / 256), torch.zeros(4096, dtype=torch.int64), 1)
    assert float(total) == pytest.approx(4096 * (1 + 1 / 256), rel=1e-6)


def test_bf16_gradients_arrive_in_float32_and_near_those_of_float32(stores, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        trainer, feed = trainer_of(stores, tmp_path, precision)
        trainer.step(feed.step(0)[0], Totals([t.name for t in trainer.tasks], trainer.device))
        grads = {n: p.grad for n, p in trainer.parameters.items()}
        assert {g.dtype for g in grads.values()} == {p.dtype for p in trainer.parameters.values()} == {torch.float32}
        found[precision] = torch.cat([g.flatten() for g in grads.values()])
    apart = float((found["bf16"] - found["fp32"]).norm() / found["fp32"].norm())
    assert 0 < apart < 0.1


def test_loss_sums_and_errors_are_float64_whatever_the_precision(stores, tmp_path):
    trainer, feed = trainer_of(stores, tmp_path, "bf16")
    batch = trainer.ready(feed.step(0)[0][0])
    assert laid_out(batch, trainer.number) is batch and batch.positions.dtype == torch.float32
    sums = trainer._sums(batch, Totals([t.name for t in trainer.tasks], trainer.device))
    assert sums.dtype == torch.float64 and sums.shape == (3, 4)


def test_tf32_is_set_for_the_runs_that_ask_for_it_only(stores, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        trainer_of(stores, tmp_path, "tf32")
        assert torch.get_float32_matmul_precision() == "high"
        trainer_of(stores, tmp_path, "fp32")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
