"""A run is a function of its config: killed anywhere and started again, it ends with the same bits."""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

import multifid
from conftest import MEASURED
from multifid.config import load_config, parse_config
from multifid.feed.loader import collate, open_sources
from multifid.model.saved import load_potential
from multifid.parallel.groups import alone
from multifid.parallel.layout import place
from multifid.store.store import Store
from multifid.training.build import build
from multifid.training.checkpoint import load_checkpoint
from multifid.training.feed import Feed, make_draws
from multifid.training.journal import read_journal
from multifid.training.lines import number
from multifid.training.loss import validation_value
from multifid.training.optimizer import Schedule
from multifid.training.run import train
from multifid.training.step import Totals, Trainer


def config_of(stores, run: Path, **changes) -> dict:
    """A small run of three tasks; `changes` are sections to merge."""
    values = {
        "run": str(run),
        "tasks": {task: {"store": str(store)} for task, store in stores.items()},
        "model": {
            "cutoff": 3.0,
            "encoder": {"name": "egnn", "layers": 1, "hidden": 12, "vectors": 3},
            "branch": {"hidden": [10], "forces": "direct"},
        },
        "train": {"batch": 3, "steps": 24, "epoch_steps": 10, "warmup": 5, "checkpoint_every": 3, "log_every": 4},
    }
    for section, change in changes.items():
        values[section] = values.get(section, {}) | change if isinstance(change, dict) else change
    return values


def feed_of(config, sources) -> Feed:
    return Feed(config, sources, make_draws(config, sources), place(list(config.tasks), "auto", 1))


def start(values: dict) -> Path:
    return train(parse_config(values, "test"), Console(quiet=True)).run


def final_state(run: Path) -> tuple[dict, dict]:
    """Everything of the last checkpoint that a run is made of, timing left out."""
    state, files, complaints = load_checkpoint(run)
    assert complaints == []
    state["position"].pop("seconds")
    for about in state["data"].values():
        about.pop("store")  # where the data lie
    state.pop("files")
    return state, files


def assert_same_bits(run: Path, other: Path) -> None:
    (state, files), (state_other, files_other) = final_state(run), final_state(other)
    assert state == state_other
    assert files.keys() == files_other.keys()
    for name in files:
        assert files[name].keys() == files_other[name].keys()
        for key, tensor in files[name].items():
            assert torch.equal(tensor, files_other[name][key]), key
    for model in ("model.safetensors", "last.safetensors"):
        a, b = load_file(run / model), load_file(other / model)
        assert all(torch.equal(a[k], b[k]) for k in a)
    drop = lambda rows: [{k: v for k, v in r.items() if k not in MEASURED} for r in rows]  # noqa: E731
    assert drop(read_journal(run)) == drop(read_journal(other))


def test_a_run_in_blocks_from_copies_of_the_stores_is_the_run_from_the_stores(stores, tmp_path):
    blocks = {"order": "blocks", "block": 5, "window": 2}
    plain = start(config_of(stores, tmp_path / "plain", sampling=blocks))
    near = start(config_of(stores, tmp_path / "near", sampling=blocks, train={"stage": str(tmp_path / "stage")}))
    assert_same_bits(plain, near)
    assert len(list((tmp_path / "stage").iterdir())) == 3


def test_a_split_is_validated_in_pieces_and_each_structure_once(stores, monkeypatch):
    config = parse_config(config_of(stores, Path("unused")), "test")
    sources = open_sources(config.tasks)
    whole = [b.natoms.tolist() for b in feed_of(config, sources).split("validation")]
    monkeypatch.setattr("multifid.training.feed.AT_ONCE", 4)
    pieces = [b.natoms.tolist() for b in feed_of(config, sources).split("validation")]
    assert len(pieces) > len(whole) and sorted(chain(*pieces)) == sorted(chain(*whole))


def test_training_lowers_the_errors_of_every_task(stores, tmp_path):
    values = config_of(
        stores, tmp_path / "run", train={"steps": 120, "batch": 8, "epoch_steps": 60, "lr": 0.005, "ema": 0.9}
    )
    run = start(values)
    rows = [r for r in read_journal(run) if r["split"] == "train"]
    for task in stores:
        own = [r for r in rows if r["task"] == task]
        assert own[-1]["forces_mae"] < 0.7 * own[0]["forces_mae"]
    _, description = load_potential(run)
    assert set(description["tasks"]) == set(stores) and description["branches"] == sorted(stores)


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_every_precision_and_force_mode_trains(stores, tmp_path, forces, precision):
    values = config_of(stores, tmp_path / "run", train={"precision": precision, "steps": 6, "epoch_steps": 3})
    values["model"]["branch"]["forces"] = forces
    rows = read_journal(start(values))
    assert all(math.isfinite(r["loss"]) for r in rows) and rows


def train_in_child(path: str, threads: int, running) -> None:
    torch.set_num_threads(threads)
    running.set()
    train(load_config(Path(path)), Console(quiet=True))


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(stores, tmp_path, times):
    """kill -9 and start again, until it is through; compared with a run that nobody disturbed."""
    length = {"steps": 100, "checkpoint_every": 4, "epoch_steps": 30}
    whole = start(config_of(stores, tmp_path / "whole", train=length))
    seconds = read_journal(whole)[-1]["seconds"]
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config_of(stores, tmp_path / "killed", train=length)))
    children = get_context("forkserver")
    children.set_forkserver_preload(["multifid.training.run", "test_train"])
    generator, kills, steps, wanted = random.Random(0), 0, set(), max(1, times // 6) + 1

    def newest() -> str:
        return max((p.name for p in (tmp_path / "killed" / "checkpoints").glob("step-*")), default="")

    while True:
        running = children.Event()
        arguments = (str(tmp_path / "killed.yaml"), torch.get_num_threads(), running)
        child = children.Process(target=train_in_child, args=arguments, daemon=True)
        child.start()
        running.wait()
        child.join(timeout=generator.uniform(0.0, 0.2 + seconds / 4) if kills < times else None)
        while child.is_alive() and newest() in steps and len(steps) < wanted:  # a busy machine is not there yet
            child.join(timeout=0.01)
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
            steps.add(newest())
            continue
        assert child.exitcode == 0
        if kills == times:
            break
        shutil.rmtree(tmp_path / "killed")  # it came through before the last kill: from the beginning
    assert len(steps) >= wanted, "the kills hit different places"
    assert_same_bits(whole, tmp_path / "killed")


def test_sigterm_finishes_the_step_saves_and_says_so_by_143(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train={"steps": 100_000, "checkpoint_every": 100_000, "epochs": 1})
    values["train"]["epoch_steps"] = 100_000
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    child = subprocess.Popen([sys.executable, "-m", "multifid", "train", str(tmp_path / "c.yaml")])
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not read_journal(tmp_path / "run"):
        time.sleep(0.05)
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 143
    state, _, _ = load_checkpoint(tmp_path / "run")
    assert 0 < state["step"] < 100_000
    assert state["places"] == dict.fromkeys(stores, 3 * state["step"])


def test_training_goes_on_while_a_checkpoint_is_being_written(stores, tmp_path, monkeypatch):
    """The disk stands still until training is three steps further; what is written is nevertheless of its own step."""
    steps, weights, further, original = [], {}, threading.Event(), Trainer.step

    def step(self, *arguments, **options):
        if len(steps) == 3:
            weights.update({name: p.detach().clone() for name, p in self.parameters.items()})
        outcome = original(self, *arguments, **options)
        steps.append(1)
        if len(steps) == 6:
            further.set()
        return outcome

    def slow_disk(tensors, path):
        assert further.wait(60), "training waits for the disk"
        save_file(tensors, path)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr("multifid.training.checkpoint.save_file", slow_disk)
    run = start(
        config_of(stores, tmp_path / "run", train={"steps": 8, "epoch_steps": 8, "checkpoint_every": 3, "keep": 9})
    )
    written = {}
    for file in (run / "checkpoints" / "step-000003").glob("*.safetensors"):
        written |= load_file(file)
    assert weights and all(torch.equal(written[f"weight/{name}"], held) for name, held in weights.items())


def test_what_is_learned_while_a_checkpoint_is_written_is_not_in_it(stores, tmp_path, monkeypatch):
    """The disk stands still until the next validation has told the schedule of a better value."""
    values, further, original = [], threading.Event(), Schedule.validated

    def validated(self, value):
        original(self, value)
        values.append(value)
        if len(values) == 2:
            further.set()

    def slow_disk(tensors, path):
        assert further.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr(Schedule, "validated", validated)
    monkeypatch.setattr("multifid.training.checkpoint.save_file", slow_disk)
    run = start(config_of(stores, tmp_path / "run", train={"steps": 6, "epoch_steps": 3, "keep": 9}))
    state = json.loads((run / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["schedule"]["best"] == values[0] > values[1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(stores, tmp_path, capsys):
    values = config_of(stores, tmp_path / "run")
    run = start(values)
    newest = run / "checkpoints" / "step-000024" / "branch-berry.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    state, _, complaints = load_checkpoint(run)
    assert state["step"] == 21 and str(newest) in complaints[0]


def test_micro_batches_give_the_gradient_of_the_whole_step(stores, tmp_path):
    """float64: the step's gradient, cut into micro-batches and whole."""
    values = config_of(stores, tmp_path / "run", train={"precision": "fp64", "batch": 7})
    values["tasks"]["berry"]["weight"] = 2.5

    def gradient(max_edges):
        config = parse_config(values | {"train": values["train"] | {"max_edges": max_edges}}, "test")
        sources = open_sources(config.tasks)
        trainer = build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
        micro, identities, _ = feed_of(config, sources).step(3)
        trainer.lr = 0.0
        trainer.step(micro, Totals(list(config.tasks), torch.device("cpu")))
        return len(micro), identities, {n: p.grad.clone() for n, p in trainer.parameters.items()}

    one, seen, whole = gradient(None)
    many, seen_in_parts, parts = gradient(20)
    assert one == 1 and many > 2 and seen == seen_in_parts
    largest = max(float(g.abs().max()) for g in whole.values())
    for name, g in whole.items():
        assert float((g - parts[name]).abs().max()) <= 1e-10 * max(float(g.abs().max()), 1e-3 * largest), name


def test_a_task_without_structures_in_a_step_still_has_gradients_of_zero(stores, tmp_path):
    config = parse_config(config_of(stores, tmp_path / "run"), "test")
    sources = open_sources(config.tasks)
    trainer = build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
    only = [(sources[0], np.asarray(sources[0].store.index("train"))[:3].astype(np.int64))]
    assert trainer.step([collate(only, 3.0)], Totals(list(config.tasks), torch.device("cpu"))).updated
    for name, parameter in trainer.parameters.items():
        assert parameter.grad is not None
        if name.startswith("branches.cherry"):
            assert torch.count_nonzero(parameter.grad) == 0


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_position(stores, tmp_path):
    config = parse_config(config_of(stores, tmp_path / "run"), "test")
    sources = open_sources(config.tasks)
    trainer = build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
    totals = Totals(list(config.tasks), torch.device("cpu"))
    feed = feed_of(config, sources)
    trainer.step(feed.step(0)[0], totals)
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    micro = feed.step(1).batches
    micro[0].positions[:] = math.nan
    assert not trainer.step(micro, totals).updated
    assert trainer.updates == 1 and trainer.skipped_in_a_row == 1
    assert all(torch.equal(before[n], p) for n, p in trainer.parameters.items())


def test_branches_of_their_own_shape_are_of_the_run_and_take_the_rest_from_the_common_one(stores, tmp_path):
    values = config_of(stores, tmp_path / "run")
    values["model"] |= {"branch": {"hidden": [7]}, "branches": {"berry": {"forces": "conservative"}}}
    model = parse_config(values, "test").model
    assert model.shape("berry").model_dump() == model.branch.model_dump() | {"forces": "conservative"}
    assert model.shape("apple") == model.branch and model.branch.hidden == [7]
    for changed, message in (
        (
            {"model": values["model"] | {"branches": {"elder": {}}}},
            r"model\.branches names elder; the branches .* are apple",
        ),
        ({"model": values["model"] | {"branches": {"berry": {"force": "direct"}}}}, "did you mean 'forces'"),
        ({"train": values["train"] | {"compile": True}}, "train.compile makes passes for one kind of forces"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_config(values | changed, "test")


def test_the_best_model_may_be_chosen_by_the_geometric_mean_of_tasks():
    """A small loss that doubles costs as much as a large one that does; a task without labels does not count."""
    weights = {"large": 1.0, "small": 1.0, "silent": 4.0}
    before, after = {"large": 1.0, "small": 0.01, "silent": 0.0}, {"large": 0.95, "small": 0.02, "silent": 0.0}
    assert validation_value(weights, after, "objective") < validation_value(weights, before, "objective")
    assert validation_value(weights, before, "geometric") == pytest.approx(0.1)
    assert validation_value(weights, after, "geometric") == pytest.approx((0.95 * 0.02) ** 0.5)
    assert math.isnan(validation_value(weights, before | {"small": math.nan}, "geometric"))
    assert validation_value(weights, dict.fromkeys(weights, 0.0), "geometric") == 0.0


def test_a_run_keeps_the_model_that_is_best_by_the_mean_it_asks_for(stores, tmp_path):
    """Its rows have each task's part of the objective: the step that is kept is the least of the mean of them."""
    values = config_of(stores, tmp_path / "run", train={"best_by": "geometric", "lr": 0.02})
    ended = train(parse_config(values, "test"), Console(quiet=True))
    found: dict[int, dict[str, float]] = {}
    for row in ended.rows:
        if row["split"] == "validation":
            found.setdefault(row["step"], {})[row["task"]] = row["loss"]
    means = {step: math.prod(losses.values()) ** (1 / 3) for step, losses in found.items() if step}
    assert ended.best == pytest.approx(min(means.values())) and ended.best_step == min(means, key=means.__getitem__)


def test_another_config_is_refused_with_the_differences(stores, tmp_path):
    start(config_of(stores, tmp_path / "run", train={"steps": 2}))
    with pytest.raises(ValueError, match=r"train\.lr: 0\.5 here, 0\.001 in the run"):
        start(config_of(stores, tmp_path / "run", train={"steps": 2, "lr": 0.5}))
    start(config_of(stores, tmp_path / "run", train={"steps": 2, "checkpoint_every": 1}))


def test_adding_a_task_leaves_the_order_of_the_others_alone(stores, tmp_path):
    def seen(tasks):
        config = parse_config(config_of({t: stores[t] for t in tasks}, tmp_path / "run"), "test")
        config = config.model_copy(update={"train": config.train.model_copy(update={"batch": 3.0})})
        sources = open_sources(config.tasks)
        return {d.name: d.order(*d.places(5)).tolist() for d in make_draws(config, sources)}

    two, three = seen(["apple", "cherry"]), seen(["apple", "berry", "cherry"])
    assert two == {t: three[t] for t in two}


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_number_of_workers_changes_nothing(stores, tmp_path, workers):
    reference = start(config_of(stores, tmp_path / "one", train={"steps": 8, "workers": 1}))
    run = start(config_of(stores, tmp_path / "many", train={"steps": 8, "workers": workers}))
    assert_same_bits(reference, run)


def test_init_starts_from_another_runs_weights_whatever_its_forces(stores, tmp_path):
    first = start(config_of(stores, tmp_path / "first", train={"steps": 3}))
    values = config_of(stores, tmp_path / "second", init=str(first), train={"steps": 1, "lr": 1e-12, "ema": None})
    values["model"]["branch"]["forces"] = "conservative"
    second = start(values)
    a, b = load_file(first / "model.safetensors"), load_file(second / "last.safetensors")
    for name in b:
        assert torch.allclose(a[name], b[name], atol=1e-9), name


def test_the_shared_baseline_has_one_branch_and_one_pooled_scale(stores, tmp_path):
    run = start(config_of(stores, tmp_path / "run", branches="shared", train={"steps": 2}))
    description = json.loads((run / "model.json").read_text())
    assert description["branches"] == ["shared"]
    assert len({about["scale"] for about in description["tasks"].values()}) == 1
    assert len({about["references"]["1"] for about in description["tasks"].values()}) == 3


def test_one_head_for_all_has_the_objective_of_one_for_each(stores, tmp_path):
    """Its residuals are divided by each task's own scale, so that baseline and two levels minimise the same sum."""
    for branches in ("per_task", "shared"):
        values = config_of(stores, tmp_path / branches, branches=branches, train={"steps": 3, "precision": "fp64"})
        run = start(values)
        rows = multifid.evaluate(run, stores, "validation", quiet=True)
        errors = {row["data"]: row for row in rows if row["model"] != "References"}
        for row in read_journal(run):
            if row["split"] == "validation" and row["step"] == 3:
                of_task = errors[row["task"]]
                scale = Store(stores[row["task"]]).manifest["tasks"][row["task"]]["scale"]
                expected = (of_task["energy_mae"] + of_task["forces_mae"]) / scale
                assert row["loss"] == pytest.approx(expected, rel=1e-6), (branches, row["task"])


def test_the_best_model_may_be_that_of_the_geometric_mean(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train={"steps": 12, "epoch_steps": 3, "best_by": "geometric"})
    weights = dict(zip(values["tasks"], (1.0, 0.5, 3.0), strict=True))
    for task, weight in weights.items():
        values["tasks"][task]["weight"] = weight
    ending = train(parse_config(values, "test"), Console(quiet=True))
    means: dict[int, float] = {}
    for row in read_journal(ending.run):
        if row["split"] == "validation":
            means[row["step"]] = means.get(row["step"], 1.0) * row["loss"] ** (weights[row["task"]] / 4.5)
    best = min(means, key=means.__getitem__)
    assert (ending.best_step, ending.best) == (best, pytest.approx(means[best]))
    said = (ending.run / "train.log").read_text().split(f"validation at step {best}, ")[1].splitlines()[0]
    assert f"geometric mean {number(means[best])} (best so far)" in said


def test_a_scale_that_is_given_takes_the_place_of_the_stores(stores, tmp_path):
    def run(name, scale):
        values = config_of(stores, tmp_path / name, train={"steps": 3})
        values["tasks"]["apple"]["scale"] = scale
        return start(values)

    own = Store(stores["apple"]).manifest["tasks"]["apple"]["scale"]
    plain, same, other = run("plain", None), run("same", own), run("other", 3 * own)
    assert_same_bits(plain, same)
    held = json.loads((other / "model.json").read_text())["tasks"]
    assert (held["apple"]["scale"], held["apple"]["scale"] / own) == (3 * own, pytest.approx(3))
    first = [next(r["loss"] for r in read_journal(r) if r["task"] == "apple") for r in (plain, other)]
    assert first[0] > 1.5 * first[1], "residuals are in units of the scale"
    values = config_of(stores, other, train={"steps": 3, "change_tasks": True})
    with pytest.raises(ValueError, match=r"tasks\.apple\.scale"):
        start(values)


def test_unknown_keys_and_values_are_errors_that_name_what_would_be_right(tmp_path, stores):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_of(stores, tmp_path / "run")))
    with pytest.raises(ValueError, match=r"train\.learning_rate: unknown key; known here: lr, weight_decay"):
        load_config(path, ["train.learning_rate=1"])
    with pytest.raises(ValueError, match="did you mean 'weight'"):
        load_config(path, ["tasks.apple.wieght=1"])
    with pytest.raises(ValueError, match=r"train\.lr.*given: -1"):
        load_config(path, ["train.lr=-1"])
    with pytest.raises(ValueError, match="key=value"):
        load_config(path, ["train.lr"])
    assert load_config(path, ["train.lr=1e-4"]).train.lr == 1e-4
