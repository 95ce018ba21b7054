"""How tasks pull at the encoder is measured the same on any placement, and measuring changes no bit."""

import itertools
import math

import numpy as np
import pytest
import torch

from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.parallel.groups import alone
from multifid.training.build import build
from multifid.training.diagnosis import NAME, rows_of
from multifid.training.directions import DIRECTIONS, coefficients
from multifid.training.journal import read_journal
from multifid.training.loss import loss_sums, task_objectives
from multifid.training.step import Totals
from multifid.training.task_gradients import chunks_of
from test_parallel import difference, values_of
from test_train import assert_same_bits, config_of, feed_of, start

MEASURED = [  # ranks, placement, forces, most edges of a micro-batch, bytes of gradients
    pytest.param(2, "replicated", "conservative", 20, 900, marks=pytest.mark.full),
    pytest.param(3, "split", "direct", None, 1 << 20, marks=pytest.mark.full),
    (4, {"apple": [1, 3], "berry": [2], "cherry": [2, 3], "figs": [1, 2], "figs2": [1, 2]}, "direct", 20, 3_000),
]


def with_two_fidelities(five, forces: str, placement="auto", **train) -> dict:
    """Three tasks with stores of their own, and two of one store."""
    out = values_of(five, 3, forces=forces, placement=placement, **train)
    out["tasks"] |= {
        "figs": {"store": str(five["damson"]), "labels": "damson"},
        "figs2": {"store": str(five["damson"]), "labels": "damson", "weight": 0.5},
    }
    return out


def whole_gradients(values: dict) -> np.ndarray:
    """(tasks, numbers) of the first step, from one pass over the whole batch, on the whole encoder."""
    config = parse_config(values, "test")
    sources = open_sources(config.tasks)
    feed = feed_of(config, sources)
    trainer = build(config, sources, feed.placement, 10, alone())
    (batch,) = [trainer.ready(batch) for batch in feed.step(0).batches]
    counts, _ = trainer.counts([batch]).wait()
    batch, predicted = trainer.predicted(batch)
    objectives = trainer.weights * task_objectives(
        loss_sums(trainer.objective, predicted, batch.labels, trainer.terms), counts
    )
    encoder = list(trainer.potential.encoder.parameters())
    rows = []
    for one in objectives:
        slopes = torch.autograd.grad(one, encoder, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([slope.flatten() for slope in slopes]))
    return torch.stack(rows).numpy()


_whole: dict = {}


@pytest.mark.parametrize(("ranks", "placement", "forces", "max_edges", "held"), MEASURED)
def test_products_of_gradients_are_those_of_whole_gradients_on_any_placement(
    pool, five, ranks, placement, forces, max_edges, held
):
    if forces not in _whole:
        _whole[forces] = whole_gradients(with_two_fidelities(five, forces))
    reference = _whole[forces] @ _whole[forces].T
    size = np.sqrt(np.outer(reference.diagonal(), reference.diagonal()))
    assert size.min() > 0 and np.abs(reference / size - 1)[~np.eye(5, dtype=bool)].max() > 0.1
    values = with_two_fidelities(five, forces, placement, max_edges=max_edges)
    values["parallel"] |= {"allow_idle": True}  # a rank without any task takes part
    found = pool.run(ranks, "products_of_gradients", values, held)
    for rank in found:
        assert np.array_equal(rank["products"], found[0]["products"]), "all ranks have the same bits"
        assert np.abs(rank["products"] - reference).max() <= 1e-12 * size.max()
        assert (np.abs(rank["products"] - reference) <= 1e-10 * size).all()
        assert rank["most"] <= max(held, rank["largest"] * rank["own"]), "one rank held more than it may"
        assert rank["untouched"], "gradients of the step, or random numbers, were touched"
    assert held > 10_000 or found[0]["chunks"] > 1


def test_a_chunk_is_as_large_as_it_may_be_and_never_divides_a_parameter():
    sizes = [3, 5, 20, 1, 1, 8, 2]
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in sizes]
    chunks = chunks_of(parameters, 80)
    assert [[p.numel() for p in chunk] for chunk in chunks] == [[3, 5], [20], [1, 1, 8], [2]]


def test_a_run_that_is_measured_ends_with_the_bits_of_one_that_is_not(stores, tmp_path):
    plain = start(config_of(stores, tmp_path / "plain", train={"diagnose_every": None}))
    measured = start(config_of(stores, tmp_path / "measured", train={"diagnose_every": 5}))
    assert_same_bits(plain, measured)
    assert not (plain / NAME).exists()
    rows = read_journal(measured, NAME)
    assert [(r["step"], r["task"]) for r in rows] == list(itertools.product((5, 10, 15, 20), sorted(stores)))
    for step in (5, 20):
        assert sum(r["share"] for r in rows if r["step"] == step) == pytest.approx(1, abs=1e-12)


def test_a_run_that_goes_on_has_the_measurements_of_one_that_was_never_stopped(stores, tmp_path):
    length = {"diagnose_every": 3, "checkpoint_every": 3, "schedule": "constant", "epoch_steps": 100, "patience": None}
    whole = start(config_of(stores, tmp_path / "whole", train=length | {"steps": 9}))
    values = config_of(stores, tmp_path / "parts", train=length | {"steps": 9})
    start(values)
    (tmp_path / "parts" / "checkpoints" / "step-000009" / "state.json").unlink()  # as if it was killed before
    start(values)
    assert read_journal(tmp_path / "parts", NAME) == read_journal(whole, NAME)


def test_rows_say_what_the_products_say():
    gradients = torch.tensor([[3.0, 4.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    a, b, c = rows_of(["a", "b", "c"], gradients @ gradients.T, [1, 2, 3], [1, 1, 1])
    assert a["norm"] == 5 and b["norm"] == 3 and c["norm"] == 0
    assert a["cosines"] == {"b": pytest.approx(-0.6), "c": None}
    assert (a["share"], b["share"], c["share"]) == (1.0, 0.0, 0.0)  # g = (0, 4, 0)
    assert all(row["share"] is None for row in rows_of(["a", "b"], torch.full((2, 2), math.nan), [1, 1], [1, 1]))
    turned = rows_of(["a", "b", "c"], gradients @ gradients.T, [1, 2, 3], [1, 2, 1])
    assert turned[0]["share"] == pytest.approx((9 + 16 - 18) / 25) and turned[1]["coefficient"] == 2  # g = (-3, 4, 0)


@pytest.mark.parametrize(
    ("section", "change"),
    [("parallel", {"shard_encoder": True}), ("train", {"compile": True}), ("train", {"capture": True})],
)
def test_measurements_that_cannot_be_made_are_refused_where_they_are_asked_for(stores, section, change):
    values = config_of(stores, "unused", **{section: change})
    parse_config(values, "test")  # auto: never
    values["train"]["diagnose_every"] = 5
    with pytest.raises(ValueError, match=f"diagnose_every: 5 needs gradients of single tasks, which {section}"):
        parse_config(values, "test")


METHODS = ["uncertainty", "average", "gradnorm", "famo", *DIRECTIONS]


def ordinary(*methods: str, of=METHODS) -> list:
    """All methods; those that are not named are left to the full product."""
    return [m if m in methods else pytest.param(m, marks=pytest.mark.full) for m in of]


def encoder_and_branches(values: dict, **train) -> tuple[np.ndarray, dict[str, torch.Tensor], list[float]]:
    """The gradient that the first step leaves on the encoder, those of the branches, and the coefficients."""
    values = values | {"train": values["train"] | {"clip": None} | train}  # clipping would change them in place
    config = parse_config(values, "test")
    sources = open_sources(config.tasks)
    feed = feed_of(config, sources)
    trainer = build(config, sources, feed.placement, 10, alone())
    batches = [trainer.ready(batch) for batch in feed.step(0).batches]
    assert trainer.step(batches, Totals(list(config.tasks), trainer.device)).updated
    gradients = {name: p.grad.clone() for name, p in trainer.parameters.items()}
    encoder = torch.cat([g.flatten() for name, g in gradients.items() if name.startswith("encoder.")]).numpy()
    branches = {name: g for name, g in gradients.items() if not name.startswith("encoder.")}
    return encoder, branches, [] if trainer.balance is None else trainer.balance.coefficients()


@pytest.mark.parametrize("method", ordinary("pcgrad", "config", of=DIRECTIONS))
def test_a_turned_step_has_the_direction_on_the_encoder_and_leaves_branches_alone(five, method):
    """Two tasks of one store among them, which one pass of the encoder serves; in micro-batches."""
    for forces, max_edges in (("direct", 20), ("conservative", None)):
        values = with_two_fidelities(five, forces, max_edges=max_edges)
        plain, branches, _ = encoder_and_branches(values)
        each = whole_gradients(with_two_fidelities(five, forces))
        np.testing.assert_allclose(plain, each.sum(axis=0), atol=1e-12 * np.abs(plain).max())
        turned, same, found = encoder_and_branches(values, balance=method)
        expected = coefficients(method, each @ each.T, "0 0")
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        assert np.ptp(found) > 0.01 or method == "pcgrad"
        np.testing.assert_allclose(turned, expected @ each, atol=1e-10 * np.abs(turned).max())
        for name, slope in branches.items():
            assert torch.allclose(same[name], slope, rtol=1e-10, atol=1e-13), name


@pytest.mark.parametrize("method", ordinary("gradnorm", "config"))
def test_balanced_updates_of_any_number_of_ranks_are_those_of_one_process(pool, five, method):
    def values(placement="auto", max_edges=None) -> dict:
        out = {"balance": method, "balance_every": 2, "balance_rate": 0.1, "steps": 6, "optimizer": "adamw"}
        return with_two_fidelities(five, "direct", placement, max_edges=max_edges, **out)

    one = pool.run(1, "updated_weights", values())[0]
    plain = pool.run(1, "updated_weights", values() | {"train": values()["train"] | {"balance": "none"}})[0]
    assert any(np.abs(one["weights"][n] - plain["weights"][n]).max() > 1e-6 for n in one["weights"])
    ranks, placement, max_edges = ((2, "replicated", 20), (3, "split", None))[METHODS.index(method) % 2]
    for rank in pool.run(ranks, "updated_weights", values(placement, max_edges)):
        for name, tensor in rank["weights"].items():
            assert difference(one["weights"][name], tensor) <= 1e-10, name


@pytest.mark.parametrize("method", ordinary("famo", "nash"))
def test_a_balanced_run_that_goes_on_ends_with_the_bits_of_one_that_was_never_stopped(stores, tmp_path, method):
    train = {"balance": method, "balance_every": 4, "steps": 8, "checkpoint_every": 6, "epoch_steps": 100}
    whole = start(config_of(stores, tmp_path / "whole", train=train))
    values = config_of(stores, tmp_path / "parts", train=train)
    start(values)
    (tmp_path / "parts" / "checkpoints" / "step-000008" / "state.json").unlink()
    start(values)
    assert_same_bits(whole, tmp_path / "parts")


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("average", {"tasks": 1}, "average balances tasks, and there is one"),
        ("uncertainty", {"train": {"capture": True}}, "train.capture does not record"),
        ("nash", {"branches": "shared"}, "is for branches: per_task"),
        ("gradnorm", {"train": {"compile": True}}, "which train.compile does not give"),
        ("pcgrad", {"parallel": {"shard_encoder": True}}, "which parallel.shard_encoder does not give"),
        ("config", {"init": "x", "finetune": {"moves": "branch"}}, "finetune.moves: branch keeps it still"),
        ("balanced", {}, "train.balance"),
    ],
)
def test_what_cannot_be_balanced_is_refused_before_data_are_read(tmp_path, method, change, said):
    missing = {f"t{k}": tmp_path / "missing" for k in range(change.pop("tasks", 2))}
    values = config_of(missing, tmp_path / "run", **change)
    values["train"]["balance"] = method
    with pytest.raises(ValueError, match=said):
        parse_config(values, "test")
