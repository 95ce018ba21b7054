"""What stays in float32 when matrix products do not: sums, coordinates, energies, weights."""

import pytest
import torch

from multifid.config import parse_config
from multifid.data.loader import open_sources
from multifid.parallel.groups import alone
from multifid.parallel.layout import place
from multifid.structures.batch import laid_out
from multifid.train.build import build
from multifid.train.step import Totals
from test_compile import batches_of, potential_of
from test_train import config_of, feed_of


def trainer_of(stores, tmp_path, precision):
    config = parse_config(config_of(stores, tmp_path / "run", train={"precision": precision}), "test")
    sources = open_sources(config.tasks)
    return build(config, sources, place(list(config.tasks), "auto", 1), 10, alone()), feed_of(config, sources)


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("encoder", ["egnn", "painn"])
def test_autocast_keeps_coordinates_sums_energies_and_forces_in_float32(stores, encoder, forces):
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
    assert sums.dtype == torch.float64 and sums.shape == (3, 3)


def test_tf32_is_set_for_the_runs_that_ask_for_it_only(stores, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        trainer_of(stores, tmp_path, "tf32")
        assert torch.get_float32_matmul_precision() == "high"
        trainer_of(stores, tmp_path, "fp32")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
