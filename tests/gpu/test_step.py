"""A training step on a device is the CPU's: predictions, gradients, updates, sums; eager, compiled and captured."""

import numpy as np
import pytest
import torch

from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.graphs.batch import edge_vectors
from multifid.model.encoders import ENCODERS
from multifid.parallel.groups import alone
from multifid.parallel.layout import place
from multifid.training.build import build
from multifid.training.feed import Feed, lists_of, make_draws
from multifid.training.outcome import Later
from multifid.training.state import tensors_of
from multifid.training.step import Totals
from test_train import config_of

KINDS = {name: {"name": name} for name in ENCODERS} | {"egnn with tensors": {"name": "egnn", "tensors": 2}}
# Relative errors of predictions and gradients, against float64 on the CPU. A product in TF32 keeps 11 bits, in bf16 8.
LIMITS = {"fp64": 1e-10, "fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}
CPU = torch.device("cpu")


def trainer_of(both, device, encoder="egnn", forces="direct", precision="fp64", **train):
    """The trainer of a run with molecules and crystals, and its feed."""
    values = config_of(both, "unused", train={"precision": precision, "batch": 4, "ema": 0.9} | train)
    values["model"] |= {
        "encoder": KINDS[encoder] | {"layers": 2, "hidden": 16},
        "branch": {"hidden": [16], "forces": forces},
    }
    values["objective"] = {"loss": "mse", "stress": 0.1 if forces == "conservative" else 0.0}
    config = parse_config(values, "test")
    sources = open_sources(config.tasks)
    placement, draws = place(list(config.tasks), "auto", 1), make_draws(config, sources)
    trainer = build(config, sources, placement, 10, alone(str(device)))
    return trainer, Feed(config, sources, draws, placement, 0, lists_of(config.train.neighbors, device))


def predictions(trainer, batch) -> torch.Tensor:
    """All that the model says of a batch, in one tensor on the host."""
    batch = trainer.ready(batch).to(trainer.device, trainer._dtype)
    trainer.potential.eval()
    with torch.no_grad(), trainer._autocast():
        said = trainer.potential(batch, stress=trainer.objective.stress > 0)
    trainer.potential.train()
    parts = [x for p in said.values() for x in (p.energy, p.forces, p.stress) if x is not None]
    return torch.cat([x.double().nan_to_num().flatten().cpu() for x in parts])


def error(values: torch.Tensor, exact: torch.Tensor) -> float:
    return float((values - exact).norm() / exact.norm())


def taken(trainer, feed, steps: int) -> dict:
    """Some steps: sums of each, gradient of the first, what has become of weights, averages and validation."""
    out = {"sums": [], "norms": []}
    for step in range(steps):
        made = feed.step(step)
        totals = Totals([task.name for task in trainer.tasks], trainer.device)
        batches = [trainer.ready(batch) for batch in made.batches]
        outcome = trainer.step(batches, totals, trainer.counts(batches, made.known))
        assert outcome.updated and not outcome.stop and not outcome.miscounted
        out["sums"].append(totals.as_tensor().cpu())
        out["norms"].append(outcome.norm)
        if step == 0:
            gradients = [p.grad.double().flatten().cpu() for _, p in sorted(trainer.parameters.items())]
            out["gradient"] = torch.cat(gradients)
    out["validation"] = trainer.validate(feed.split("validation")).as_tensor().cpu()
    for name, held in (("weights", trainer.parameters), ("averages", trainer.average.average)):
        out[name] = torch.cat([p.detach().double().flatten().cpu() for _, p in sorted(held.items())])
    return out


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("encoder", KINDS)
def test_values_and_gradients_are_those_of_float64_on_the_cpu(both, device, encoder, forces, precision):
    exact, feed = trainer_of(both, CPU, encoder, forces)
    if encoder == "dimenet" and forces == "conservative" and precision in ("tf32", "bf16"):
        with pytest.raises(ValueError, match=f"{precision} rounds the conservative forces of dimenet"):
            trainer_of(both, device, encoder, forces, precision)
        return
    trainer, _ = trainer_of(both, device, encoder, forces, precision)
    batch = feed.step(1).batches[0]
    assert error(predictions(trainer, batch), predictions(exact, batch)) < LIMITS[precision]
    here, there = (taken(t, feed, 1) for t in (trainer, exact))
    assert error(here["gradient"], there["gradient"]) < LIMITS[precision]
    assert here["norms"] == pytest.approx(there["norms"], rel=LIMITS[precision])
    torch.testing.assert_close(here["sums"][0][:, 3:6], there["sums"][0][:, 3:6], rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
@pytest.mark.parametrize("max_edges", [None, 30])
def test_five_updates_in_float64_are_the_cpus(both, device, max_edges, optimizer):
    settings = {"max_edges": max_edges, "optimizer": optimizer, "clip": 0.1, "warmup": 2}
    here, there = (taken(*trainer_of(both, place, **settings), 5) for place in (device, CPU))
    for key in ("gradient", "weights", "averages", "validation"):
        assert error(here[key], there[key]) < 1e-8, key
    for one, other in zip(here["sums"], there["sums"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("how", [True, "reduce-overhead"])
@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.full
def test_compiled_and_captured_steps_are_the_eager_ones(both, device, forces, how):
    if how == "reduce-overhead" and device.type != "cuda":
        pytest.skip("graphs of kernels are recorded on GPUs")
    if how is True and device.type == "cpu":
        pytest.skip("tests/test_compile.py compares compiled steps on the CPU, without generating code for minutes")
    eager, feed = trainer_of(both, CPU, forces=forces)
    compiled, padded = trainer_of(both, device, forces=forces, compile=how)
    here, there = taken(compiled, padded, 4), taken(eager, feed, 4)
    for key in ("gradient", "weights", "averages"):
        assert error(here[key], there[key]) < 1e-8, key
    for one, other in zip(here["sums"], there["sums"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("encoder", ["egnn", "painn"])
def test_recorded_steps_are_the_eager_ones(both, device, encoder, forces, precision):
    """Of torch in float64, of kernels in bf16: five updates by the same batch, of which three are replayed."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for GPUs; tests/test_recorded.py has what is left of recordings on a CPU")
    results = []
    for capture in (False, True):
        trainer, feed = trainer_of(both, device, encoder, forces, precision, capture=capture)
        for _ in range(5):
            totals = Totals([task.name for task in trainer.tasks], device)
            trainer.step([trainer.ready(feed.step(0).batches[0])], totals)
        results.append(torch.cat([totals.as_tensor().flatten(), *(p.grad.double().flatten() for p in
                                                                  trainer.parameters.values())]))  # fmt: skip
    assert trainer.recordings.held and not trainer.recordings.off
    assert error(results[1], results[0]) < {"fp64": 1e-8, "bf16": 1e-2}[precision]


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_edge_vectors_of_crystals_are_those_of_float64_in_every_precision(both, device, precision):
    trainer, feed = trainer_of(both, device, precision=precision)
    batch = feed.step(0).batches[0]
    exact = edge_vectors(batch)
    with trainer._autocast():
        here = edge_vectors(trainer.ready(batch).to(trainer.device, trainer._dtype))
    assert batch.shifts.any() and float((here.double().cpu() - exact).abs().max()) < 1e-5


def test_a_step_that_is_not_finite_changes_nothing_and_is_heard_of(both, device):
    trainer, feed = trainer_of(both, device)
    (batch,) = (trainer.ready(batch) for batch in feed.step(0).batches)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    batch.positions[:] = torch.nan
    outcome = trainer.step([batch], Totals([task.name for task in trainer.tasks], device))
    trainer.settle()
    assert not outcome.updated and trainer.skipped_in_a_row == 1 and trainer.updates == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_a_copy_for_a_checkpoint_is_of_its_step_while_training_goes_on(both, device):
    trainer, feed = trainer_of(both, device)
    taken(trainer, feed, 2)
    weights = {name: p.detach().clone().cpu() for name, p in trainer.parameters.items()}
    files = tensors_of(trainer)
    taken(trainer, feed, 2)
    copied = {key: tensor for file in files.values() for key, tensor in file.items()}
    for name, weight in weights.items():
        assert copied[f"weight/{name}"].device == CPU and torch.equal(copied[f"weight/{name}"], weight), name
    assert sum(not torch.equal(trainer.parameters[name].detach().cpu(), weight) for name, weight in weights.items()) > 9


def test_a_number_is_that_of_the_device_when_it_is_done_whichever_device_is_current(device):
    """Half a second of products lies before it in the stream."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(0)
    x = torch.eye(4096 if device.type != "cpu" else 8, device=device)
    for _ in range(1000):
        x = x @ x
    assert Later(x.sum()[None] + 1.0).values() == [len(x) + 1.0]


def test_random_tasks_without_labels_have_gradients_of_zero_there(both, device):
    """A head that nothing reaches is zero, not absent, wherever gradients are made."""
    trainer, feed = trainer_of(both, device)
    batch = feed.step(0).batches[0]
    batch.targets["apple"].forces[:] = np.nan
    trainer.step([batch], Totals([task.name for task in trainer.tasks], device))
    unreached = [p.grad for name, p in trainer.parameters.items() if name.startswith("branches.apple.forces")]
    assert unreached and all(g.device == device and not g.any() for g in unreached)
