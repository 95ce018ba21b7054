"""What `multifid plan` says beforehand is what a run then takes; forecasts agree with other ways to find the same."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from angular import Angular
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.feed.order import Blocks
from multifid.forecast import this_machine as here
from multifid.forecast.data import SOURCE_ID, StoreSize, data_of, row_bytes
from multifid.forecast.estimate import forecast, update_bytes
from multifid.forecast.machines import MACHINES, Link, Machine, all_reduce, read_machine, write_machine
from multifid.forecast.plan import STATE, make_plan, plan, ranges
from multifid.forecast.subject import TaskLoad, make_subject
from multifid.forecast.this_machine import this_machine
from multifid.forecast.waiting import Kind, expected_slowest, exposed, taking_turns, unevenness
from multifid.graphs import edges
from multifid.model import counting
from multifid.model.encoders import announced
from multifid.model.footprint import BatchSize, count, footprint
from multifid.model.potential import ModelConfig
from multifid.parallel.groups import alone
from multifid.parallel.layout import place
from multifid.parallel.shares import shares
from multifid.store.fields import FIELDS, HEADER
from multifid.store.store import Store
from multifid.training import costs, soap_native
from multifid.training.build import build
from multifid.training.feed import Feed, make_draws
from multifid.training.optimizer import OPTIMIZERS, update
from multifid.training.resolve import resolve
from multifid.training.step import Totals
from multifid.training.work import UPDATES, count_update
from test_model import KINDS
from test_train import config_of

SLOW = Machine("slow", 2, 1e9, 1e9, 1e9, 1e-6, Link(1e-5, 1e8), Link(1e-4, 1e7), queued=False)


def measured(config, folder: Path) -> dict[str, int]:
    """Live bytes of one process that has made a step, and the most that the allocator held in another one beside."""
    config = resolve(config, 1)
    sources = open_sources(config.tasks)
    draws = make_draws(config, sources)
    placement = place(list(config.tasks), "replicated", 1)
    trainer = build(config, sources, placement, 10, alone("cpu"), begins=config.init is None)
    (batch,) = Feed(config, sources, draws, placement).step(0).batches
    trainer.step([batch], Totals(list(config.tasks), trainer.device))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.step([batch], Totals(list(config.tasks), trainer.device))
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    whole = (batch.numbers, batch.charge, batch.spin, batch.natoms, batch.structure, batch.edges)  # not copied here
    moving = [p for p in trainer.parameters.values() if p.requires_grad]
    storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in moving}
    return {
        "parameters": sum(p.nbytes for p in trainer.parameters.values()),
        "gradients": sum(storages.values()),
        "optimizer": sum(t.nbytes for s in trainer.optimizer.state.values() for t in s.values()),
        "averages": sum(t.nbytes for t in trainer.average.average.values()),
        "activations": max(itertools.accumulate(size for _, size in memory)) + sum(t.nbytes for t in whole),
    }


EXAMINED = ("egnn", "painn", "angular", "egnn with tensors")  # in several sizes, or with several optimizers


@pytest.mark.parametrize(
    ("encoder", "hidden", "forces", "optimizer"),
    [(e, h, "direct", "adamw") for e in ("egnn", "painn") for h in (16, 64, 160)]
    + [("egnn", 64, "conservative", "adamw"), ("egnn", 16, "direct", "soap")]
    + [("egnn with tensors", 16, "direct", "adamw"), ("egnn with tensors", 16, "conservative", "soap")]
    + [("angular", 16, "direct", "adamw"), ("angular", 16, "conservative", "adamw")]
    + [
        (e, 16, ("conservative", "direct")[k % 2], "adamw")
        for k, e in enumerate(kind for kind in KINDS if kind not in EXAMINED)
    ],
)
def test_bytes_are_those_of_a_run(stores, tmp_path, encoder, hidden, forces, optimizer):
    layers = 2 if (encoder, hidden, forces) == ("egnn", 160, "direct") else 1  # counting takes a second for a layer
    layers = 2 if "attention" in KINDS[encoder] else layers  # it stands between two
    model = {"cutoff": 6.0, "encoder": {**KINDS[encoder], "layers": layers, "hidden": hidden}}
    model["branch"] = {"hidden": [hidden, hidden], "forces": forces}
    config = parse_config(
        config_of(stores, tmp_path / "run", model=model, train={"batch": 40, "optimizer": optimizer}), "test"
    )
    planned = make_plan(config, 1, SLOW).forecasts["replicated"].bytes_per_rank
    seen = measured(config, tmp_path)
    assert {k: planned[k] for k in STATE} == {k: seen[k] for k in STATE}
    assert planned["activations"] == pytest.approx(seen["activations"], rel=0.1)


@pytest.mark.parametrize("moves", ["lora", *(pytest.param(m, marks=pytest.mark.full) for m in ("branch", "last"))])
def test_what_does_not_move_has_no_gradient_and_no_moments(stores, tmp_path, moves):
    model = {"cutoff": 6.0, "encoder": {**KINDS["egnn"], "layers": 1, "hidden": 16}, "branch": {"hidden": [16, 16]}}
    values = config_of(stores, tmp_path / "run", model=model, train={"batch": 40})
    config = parse_config(values | {"init": "start", "finetune": {"moves": moves, "rank": 2}}, "test")
    made = make_plan(config, 1, SLOW)
    planned, seen = made.forecasts["replicated"].bytes_per_rank, measured(config, tmp_path)
    assert {k: planned[k] for k in STATE} == {k: seen[k] for k in STATE}
    assert planned["gradients"] < planned["parameters"] and planned["optimizer"] < 2 * planned["parameters"]
    branches = len(config.tasks) * costs.parameters(config.model)[1] * costs.bytes_per_parameter(config.train)
    assert costs.encoder_bytes(config, 1) + branches == pytest.approx(sum(planned[k] for k in STATE), rel=0.01)


# `angular` knows no tiles.
@pytest.mark.parametrize("encoder", [kind for kind in KINDS if kind != "angular"])
def test_a_large_batch_in_tiles_is_told_from_a_small_one(monkeypatch, encoder):
    monkeypatch.setattr(edges, "TILE_EDGES", 96)
    monkeypatch.setattr(edges, "TILE_VALUES", 0)
    layers = 2 if "attention" in encoder else 1
    keys = {"filters": 16} if encoder == "schnet" else {}
    model = {"encoder": {**KINDS[encoder], "layers": layers, "hidden": 16, **keys}}
    model["branch"] = {"hidden": [16], "forces": "direct"}
    config, large = ModelConfig.model_validate(model), BatchSize(1, 400, 400, 40 * 96, 300 * 96)
    told = footprint(config, edges_per_atom=9.6, atoms=400, processor=True)
    seen = count(config, large, torch.float32, processor=True)
    assert told.activations(large) == pytest.approx(seen.bytes, rel=0.02)
    of_work = {"dimenet": 0.2}.get(encoder, 0.05)  # small products of triplets are traffic, large ones arithmetic
    forward, backward = told.forward(large), told.backward(large)
    for quantity in ("flops", "traffic", "kernels"):
        assert getattr(forward, quantity) == pytest.approx(seen.work[f"forward.{quantity}"], rel=of_work)
        assert getattr(backward, quantity) == pytest.approx(seen.work[f"backward.{quantity}"], rel=of_work)


@pytest.mark.parametrize("edges_per_atom", [0.0, 0.01, 3000.0])
@pytest.mark.parametrize("processor", [False, True])
def test_few_and_many_edges_are_counted_too(edges_per_atom, processor):
    model = {"encoder": {"layers": 1, "hidden": 16}, "branch": {"hidden": [16], "forces": "direct"}}
    told = footprint(ModelConfig.model_validate(model), edges_per_atom=edges_per_atom, atoms=64, processor=processor)
    for quantity, coefficients in told.coefficients.items():
        assert np.isfinite(coefficients).all(), quantity
    assert told.forward(BatchSize(1, 64, 64, 640)).flops + told.forward(BatchSize(1, 64, 64, 640)).traffic > 0


def test_an_encoder_whose_operations_need_values_is_counted_with_a_batch_that_has_them(monkeypatch):
    class Reading(Angular):
        def forward(self, graph):
            features = super().forward(graph)
            features.scalars = features.scalars * (1.0 + 0.0 * int(graph.receivers.max()))
            return features

    model = {"encoder": {"name": "angular", "layers": 1, "hidden": 16}, "branch": {"hidden": [16], "forces": "direct"}}
    config, size = ModelConfig.model_validate(model), BatchSize(1, 400, 400, 4000, 36000)
    told = footprint(config, edges_per_atom=10.0, atoms=128)
    monkeypatch.setitem(announced()[0], "angular", Reading)
    other = footprint(config, edges_per_atom=10.0, atoms=128)
    assert other.activations(size) == pytest.approx(told.activations(size), rel=0.02)
    assert other.forward(size).traffic == pytest.approx(told.forward(size).traffic, rel=0.02)
    assert told.coefficients["backward.traffic"][5] > 0, "triplets count"


def test_the_largest_batch_is_the_largest_that_fits(stores, tmp_path):
    config = parse_config(config_of(stores, tmp_path / "run", train={"batch": 20}), "test")
    roomy = replace(SLOW, memory=3e6)
    largest = make_plan(config, 1, roomy).forecasts["split"].largest_local_batch
    assert largest > 20
    for local, fits in ((largest, True), (largest + 6, False)):
        changed = config.model_copy(
            update={"train": config.train.model_copy(update={"batch": None, "local_batch": local})}
        )
        made = make_plan(changed, 1, roomy)
        assert made.fits("split") == fits


def test_json_says_what_was_promised(stores, tmp_path, capsys):
    config = parse_config(config_of(stores, tmp_path / "run"), "test")
    plan(config, 6, "frontier", as_json=True, console=Console(width=200))
    said = json.loads(capsys.readouterr().out)
    assert said["ranks"] == 6 and said["case"] in (1, 2, 3) and said["chosen"] in said["placements"]
    assert set(said["parameters"]) == {"encoder", "branches"} and set(said["parameters"]["branches"]) == set(stores)
    sharing = {"replicated", "split", "auto"}
    assert sharing <= set(said["placements"])
    for name, about in said["placements"].items():
        assert {"parameters", "gradients", "optimizer", "activations"} <= set(about["bytes_per_rank"])
        assert about["largest_local_batch"] > 0 and about["step_seconds"] == pytest.approx(
            sum(about["phases"].values())
        )
        assert about["bytes_per_step"] > 0 and {r for w in about["ranks_of"].values() for r in w} == set(range(6)), name
    held = {name: about["bytes_per_rank"]["parameters"] for name, about in said["placements"].items()}
    encoder, branch = said["parameters"]["encoder"], next(iter(said["parameters"]["branches"].values()))
    assert held["replicated"] == 4 * (encoder + 3 * branch) and held["split"] == 4 * (encoder + branch)
    assert held["split_sharded"] < held["split"]
    plan(config, 6, "frontier", console=Console(width=80))
    shown = capsys.readouterr().out
    assert "…" not in shown and "2-3" in shown, "no number is cut, and ranks are ranges"


def test_what_a_store_takes_up_is_known_before_it_is_made(stores):
    """By its layout, up to headers, names of sources and the checksums."""
    made = Store(stores["apple"])
    there = StoreSize.of(made)
    sources = len(made.field("source_id")) / made.structures - SOURCE_ID
    part = made.size("train") / made.structures
    told = StoreSize.expected(made.structures, made.atoms / made.structures, train=part)
    beside = sum(row_bytes(FIELDS[name]) for name in ("charge", "spin") if not made.has(name)) - sources
    own = HEADER * there.files + 8 * (there.files - 1) + 2 * 8  # one row more in both files of offsets
    assert there.bytes == told.bytes + own - round(beside * made.structures)
    assert (there.train, there.costs) == (told.train, told.costs)


def test_hosts_hold_what_their_ranks_train_on():
    sizes = {"a": StoreSize(1000, 10, 100, 80, 6), "b": StoreSize(4000, 12, 400, 300, 81)}
    data = data_of(sizes, {"a": [0, 1, 2], "b": [2, 3, 4]}, 5, 2, Blocks(10, 2))
    assert (data.disk, data.host, data.hosts) == (5000, 5000, 3)  # the second host has ranks 2 and 3
    assert data.windows == 2 * (10 * 30 + 10 * 30) and data.opens == 5 * 22
    assert data.costs == 80 * 6 + 300 * 81
    assert data.shared == 2266  # ranks 2 and 3: a third of 80 rows, and two thirds of 300, of 10 bytes


def test_many_tasks_on_many_ranks_are_planned_quickly_and_read_easily():
    tasks = {f"t{k:02}": TaskLoad(128 * 30.0, 20.0, 300.0, 0.4) for k in range(64)}
    model = ModelConfig.model_validate({"encoder": {"layers": 2, "hidden": 32}, "branch": {"hidden": [64]}})
    subject = make_subject(model, tasks)
    split = forecast(subject, place(list(tasks), "split", 1920), MACHINES["aurora"])
    assert ranges(split.ranks_of["t63"]) == "1890-1919" and ranges([0, 1, 2, 8, 10, 11]) == "0-2, 8, 10-11"
    replicated = forecast(subject, place(list(tasks), "replicated", 1920), MACHINES["aurora"])
    assert replicated.bytes_per_step > split.bytes_per_step and replicated.bytes > split.bytes


def test_reductions_take_what_rings_and_trees_take():
    assert all_reduce(SLOW, 1, 1e9) == 0.0
    assert all_reduce(SLOW, 2, 1e8) == pytest.approx(2 * 1e-5 + 1.0)  # a ring of two sends everything once
    # 4 nodes of 2: 2 (3/4) 1e8 bytes leave a node at 1e7 a second; 2 log2(4) steps between nodes, 2 inside
    assert all_reduce(SLOW, 8, 1e8) == pytest.approx(15.0 + 2 * 2 * 1e-4 + 2 * 1e-5)


def test_gloo_sums_in_rings_of_single_messages():
    processors = replace(SLOW, rings=True)
    assert all_reduce(processors, 2, 0.0) == pytest.approx(2 * 1e-5)
    assert all_reduce(processors, 8, 0.0) == pytest.approx(2 * 7 * 1e-4), "the slowest message of a round counts"


def test_only_what_the_backward_pass_cannot_hide_is_waited_for():
    one = all_reduce(SLOW, 2, 1e6)
    assert exposed(SLOW, 1e3, 0.3, [(2, 1e6)], (2, 1e6), 1e9) == pytest.approx(one)  # only the last bucket
    assert exposed(SLOW, 0.0, 0.3, [(2, 1e6)], (2, 2e6), 1e6) == pytest.approx(3 * one)  # nothing to hide behind
    blocked = replace(SLOW, overlap=0.0)  # moving bytes takes what computes; waiting for each other does not
    moving = one - all_reduce(SLOW, 2, 0.0)
    assert 0 < moving < one
    assert exposed(blocked, 1e3, 0.3, [(2, 1e6)], (2, 1e6), 1e9) == pytest.approx(one + moving)


def test_the_slowest_of_many_is_as_sampled():
    means, deviations, counts = [1.0, 1.1, 0.5], [0.1, 0.05, 0.3], [40, 10, 100]
    generator = np.random.default_rng(0)
    drawn = [
        np.concatenate([generator.normal(m, s, n) for m, s, n in zip(means, deviations, counts, strict=True)]).max()
        for _ in range(4000)
    ]
    assert expected_slowest(means, deviations, counts) == pytest.approx(np.mean(drawn), rel=3e-3)
    assert expected_slowest([2.0, 1.0], [0.0, 0.0], [3, 4]) == 2.0


def test_ranks_that_share_cores_end_when_all_work_is_done():
    assert taking_turns([1.0], [4], 2) == pytest.approx(2.0)
    assert taking_turns([1.0, 3.0], [3, 1], 2) == pytest.approx(2.0 + 2.0)  # the last one ends alone on its core
    assert taking_turns([1.0, 2.0], [2, 2], 4) == pytest.approx(2.0)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("count", [2.5, 40])
def test_waiting_for_the_slowest_is_as_sampled(balanced, count):
    """Forecast from moments against whole steps, cut by `shares` from wrong estimates or by number."""
    ranks, generator = 60, np.random.default_rng(1)
    kinds = [Kind(count, 1.0, 0.5, 0.1), Kind(count / 2, 3.0, 0.3, 0.05)]
    ratios = []
    for _ in range(20):
        load = np.zeros(ranks)
        true = [generator.gamma(1 / k.spread**2, k.cost * k.spread**2, round(k.count * ranks)) for k in kinds]
        told = {
            str(i): t * generator.normal(1, k.error, len(t)) for i, (t, k) in enumerate(zip(true, kinds, strict=True))
        }
        owner = shares(told, {i: list(range(ranks)) for i in told})
        for i, t in enumerate(true):
            load += np.bincount(owner[str(i)] if balanced else np.arange(len(t)) % ranks, weights=t, minlength=ranks)
        ratios.append(load.max() / load.mean())
    even, deviation = unevenness(kinds, ranks, balanced)
    assert expected_slowest([even], [even * deviation], [ranks]) == pytest.approx(np.mean(ratios), rel=0.1)


def test_one_costly_structure_can_be_more_than_a_rank_should_get():
    """Few structures of very different cost on a rank: sometimes one decides the step, and the others wait."""
    ranks, count, generator, most, mean = 8, 3.0, np.random.default_rng(5), 0.0, 0.0
    for _ in range(1000):
        costs = generator.gamma(1.0, 1.0, round(count * ranks))
        owner = shares({"a": costs}, {"a": list(range(ranks))})["a"]
        load = np.bincount(owner, weights=costs, minlength=ranks)
        most, mean = most + load.max(), mean + load.mean()
    even, _ = unevenness([Kind(count, 1.0, 1.0, 0.0)], ranks, True)
    assert most / mean > 1.2 and even == pytest.approx(most / mean, rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "where"),
    [
        (2, {"a": [0], "b": [0], "c": [1], "d": [1]}),
        (8, {"a": [0, 1], "b": [2, 3], "c": [4, 5], "d": [6, 7]}),
        (6, {"a": [0, 1], "b": [1, 2, 3], "c": [3, 4], "d": [4, 5]}),
    ],
)
def test_groups_wait_for_the_one_that_drew_the_costliest_structures(ranks, where):
    """Forecast against whole steps of structures with skewed costs, cut by `shares`: groups cannot help each other."""
    machine = replace(SLOW, flops=1e30, launch=0.0, inside=Link(0.0, 1e30), between=Link(0.0, 1e30))
    model = ModelConfig.model_validate({"encoder": {"layers": 1, "hidden": 32}, "branch": {"hidden": [8]}})
    loads = {
        t: TaskLoad(12.0, 1e-3, 400.0, spread, 0.0) for t, spread in zip("abcd", (1.0, 0.6, 0.8, 0.2), strict=True)
    }
    phases = forecast(make_subject(model, loads), where, machine).phases
    generator, most, mean = np.random.default_rng(3), 0.0, 0.0
    for _ in range(300):
        drawn = {t: generator.gamma(1 / load.spread**2, load.spread**2, 12) for t, load in loads.items()}
        owner = shares(drawn, where)
        load = sum(np.bincount(owner[t], weights=drawn[t], minlength=ranks) for t in drawn)
        most, mean = most + load.max(), mean + load.mean()
    told = 1 + phases["waiting"] / (phases["forward"] + phases["backward"])
    assert told == pytest.approx(most / mean, rel=0.05) and most / mean > 1.06


def named_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    subject = make_subject(model, {"a": TaskLoad(1.0, 10.0, 100.0)})
    return dict(subject.encoder.shapes + subject.branch.shapes)


WIDE = {"encoder": {"layers": 1, "hidden": 96}, "branch": {"hidden": [96, 96]}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_is_counted_as_it_is_made(optimizer, monkeypatch):
    """Products against torch's own counter of operations, state against that of real updates, moved bytes by bounds."""
    monkeypatch.setattr(counting, "LAPACK", 0.0)  # torch counts products only
    monkeypatch.setattr(soap_native, "usable", lambda *_: False)  # and none of those in C++
    shapes = named_of(ModelConfig.model_validate(WIDE))
    count_update.cache_clear()
    told = count_update(optimizer, tuple(shapes.items()), torch.float32)
    count_update.cache_clear()
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    made = OPTIMIZERS[optimizer](parameters, 1e-3, 0.0)
    update(made, 1e-3, torch.tensor(1.0), 1.0)
    with FlopCounterMode(display=False) as counter:
        for _ in range(UPDATES):
            update(made, 1e-3, torch.tensor(1.0), 1.0)
    assert told.kept == sum(t.nbytes for state in made.state.values() for t in state.values())
    flops = counter.get_total_flops() / UPDATES
    assert told.work.flops == pytest.approx(flops, rel=0.1) and told.work.flops <= flops
    held = sum(p.nbytes for p in parameters.values())
    assert 7 * held <= told.work.traffic <= 100 * held and 0 < told.work.kernels < 40 * len(parameters)


def test_a_step_holds_the_update_of_what_its_rank_holds():
    """By hand for AdamW, whose kernel reads weights, gradients and moments and writes them."""
    model = ModelConfig.model_validate(WIDE)
    loads = {t: TaskLoad(1.0, 10.0, 100.0) for t in "ab"}
    machine = replace(SLOW, launch=0.0, flops=1e30)
    seconds = {}
    for optimizer in OPTIMIZERS:
        subject = make_subject(model, loads, optimizer=optimizer)
        for name, where in (("both", {"a": [0, 1], "b": [0, 1]}), ("split", {"a": [0], "b": [1]})):
            seconds[optimizer, name] = forecast(subject, where, machine).phases["optimizer"]
    held = {
        "both": subject.encoder.count + 2 * subject.branch.count,
        "split": subject.encoder.count + subject.branch.count,
    }
    for name, number in held.items():
        assert seconds["adamw", name] == pytest.approx(number * 4 * (8 + 2 + 3) / machine.traffic, rel=0.01)
        assert all(seconds[o, name] > seconds["adamw", name] for o in OPTIMIZERS if o != "adamw")
    subject = make_subject(model, loads)
    pieces = forecast(subject, {"a": [0, 1], "b": [0, 1]}, machine, sharded=True).phases["optimizer"]
    piece = sum(
        p.numel() for p in (torch.empty((-(-s[0] // 2), *s[1:]), device="meta") for _, s in subject.encoder.shapes)
    )
    assert pieces == pytest.approx((piece + 2 * subject.branch.count) * 4 * 13 / machine.traffic, rel=0.01)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trial_gives_the_rates_of_passes_and_of_quick_updates(optimizer, monkeypatch):
    """With them a forecast says what was measured; where updates would take long, nothing is built."""
    subject = make_subject(ModelConfig.model_validate(WIDE), {"a": TaskLoad(1.0, 10.0, 100.0)}, optimizer=optimizer)
    machine, both = replace(SLOW, flops=1e12, traffic=1e11, launch=0.0), (subject.encoder, subject.branch)
    monkeypatch.setattr(here, "_seconds", lambda work, device: work() or 0.25)
    slower = here.tried(machine, subject, "cpu")
    assert here.told_passes(slower, subject, BatchSize(1, 10, 10, 100)) == pytest.approx(0.25)
    assert sum(update_bytes(slower, subject.update(p).work) for p in both) / slower.update == pytest.approx(
        0.25 / UPDATES
    )
    monkeypatch.setattr(here, "OPTIMIZERS", {})
    unhurried = replace(machine, traffic=1.0, flops=1e30)
    told = sum(update_bytes(unhurried, subject.update(p).work) for p in both)
    assert here.seconds_of_update(unhurried, subject, "cpu") == pytest.approx(told)


def test_a_machine_can_be_described_in_a_file(tmp_path):
    write_machine(MACHINES["aurora"], tmp_path / "m.yaml")
    assert read_machine(str(tmp_path / "m.yaml")) == MACHINES["aurora"]
    with pytest.raises(ValueError, match="perlmutter, frontier, aurora"):
        read_machine("summit")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"speed": 3}, "speed"),
        ({"flops": "fast"}, "flops.*'fast'"),
        ({"per_node": 0}, "per_node.*at least|per_node.*greater"),
        ({"traffic": 0.0}, "traffic"),
        ({"memory": None}, "memory"),
        ({"inside": {"latency": 1e-5}}, "inside.bandwidth is missing"),
        ({"inside": 3}, "inside"),
        ({"overlap": 2.0}, "overlap"),
    ],
)
def test_what_is_no_machine_is_refused_with_the_field(tmp_path, change, told):
    write_machine(MACHINES["aurora"], tmp_path / "m.yaml")
    values = yaml.safe_load((tmp_path / "m.yaml").read_text()) | change
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"m.yaml: {told}"):
        read_machine(str(tmp_path / "m.yaml"))


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [b\n"])
def test_what_is_no_map_is_refused_with_the_file(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"no YAML file|is a map"):
        read_machine(str(tmp_path / "m.yaml"))


def test_this_machine_is_measured():
    there = this_machine("cpu")
    assert 1e8 < there.flops < 1e13 and 1e8 < there.traffic < 1e13 and 1e-8 < there.launch < 1e-3
    assert math.isfinite(there.memory)
