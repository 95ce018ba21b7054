"""From Python: training that reports and stops, what it returns, and errors that are exceptions."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

import multifid
from conftest import MEASURED
from multifid.evaluation.rows import read_rows
from multifid.training.journal import read_journal
from multifid.workflows.export import export
from test_cli import multifid as command
from test_train import assert_same_bits, config_of, start

TOLD = {"steps": 12, "epoch_steps": 6, "log_every": 3, "precision": "fp64"}


def same(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def test_a_run_from_a_dict_reports_its_rows_and_gives_its_model(stores, tmp_path):
    heard: list[dict] = []
    settings = lambda: (  # noqa: E731
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
        torch.get_float32_matmul_precision(),
        torch.get_rng_state().tolist(),
    )
    before = settings()
    values = config_of({task: Path(store) for task, store in stores.items()}, tmp_path / "run", train=TOLD)
    values["run"] = tmp_path / "run"
    result = multifid.train(values, [heard.extend, lambda rows: rows.clear()], quiet=True)
    assert settings() == before, "nothing of the process is changed"
    assert result.run == tmp_path / "run" and result.steps == 12 and result.complete and result.reason == "complete"
    assert same(heard) == same(result.rows) == same(read_journal(tmp_path / "run"))
    assert [(r["step"], r["split"]) for r in heard[::3]] == [
        *[(3, "train"), (6, "train"), (6, "validation"), (9, "train"), (12, "train"), (12, "validation")]
    ]
    values_of = {r["step"]: r["objective"] for r in heard if r["split"] == "validation"}
    assert (result.best, result.best_step) == min((value, step) for step, value in values_of.items())
    out = result.model(precision="fp64").predict(Atoms("CO", [[0, 0, 0], [0, 0, 1.2]]), task="apple")
    assert np.isfinite(out.energy).all()
    again = multifid.train(multifid.Config.from_file(tmp_path / "run"), quiet=True)
    assert (again.best, again.steps, again.complete) == (result.best, 12, True)


@pytest.mark.parametrize("answer", [True, "no hope", np.bool_(True)])
def test_a_callback_stops_and_the_run_goes_on_to_the_same_bits(stores, tmp_path, answer):
    whole = start(config_of(stores, tmp_path / "whole", train=TOLD))
    values = config_of(stores, tmp_path / "run", train=TOLD)
    result = multifid.train(values, [lambda rows: answer if rows[0]["step"] == 3 else len(rows)], quiet=True)
    assert (result.steps, result.complete, result.best) == (4, False, None)
    assert result.reason == ("stopped by a callback (no hope)" if answer == "no hope" else "stopped by a callback")
    assert "stopped by a callback" in (tmp_path / "run" / "train.log").read_text()
    with pytest.raises(ValueError, match="the run has no model yet"):
        result.model()
    assert multifid.train(tmp_path / "run", quiet=True).complete
    assert_same_bits(tmp_path / "run", whole)


def test_patience_that_ends_a_run_is_its_reason(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train=TOLD | {"patience": 1, "epoch_steps": 2, "lr": 1e-300})
    values["train"] |= {"steps": 100, "ema": None, "weight_decay": 0.0}
    result = multifid.train(values, quiet=True)
    assert result.complete and result.steps == 4 and result.best_step == 2
    assert result.reason == "stopped early: no better validation value in 1 epochs (train.patience)"


def test_the_decision_of_a_callback_is_that_of_all_ranks(pool, five, tmp_path):
    told = pool.run(2, "stopped_by_callback", config_of(five, tmp_path / "run", train=TOLD), 6)
    assert told == [(7, False, "stopped by a callback (enough)", told[0][3])] * 2 and told[0][3] is not None


def test_errors_are_exceptions_with_the_message_of_the_command(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train=TOLD)
    for wrong, message in [
        (values | {"batch": 3}, "config:\n  batch: unknown key"),
        (values | {"tasks": {"apple": {"store": tmp_path / "nowhere"}}}, "nowhere"),
        (tmp_path / "missing.yaml", "missing.yaml: cannot be read"),
        (7, "a config is a multifid.Config, a path or a dict, not int"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            multifid.train(wrong, quiet=True)
    assert not (tmp_path / "run").exists()

    def fails(rows: list[dict]) -> None:
        raise KeyError("a mistake of the caller")

    with pytest.raises(KeyError, match="a mistake of the caller"):
        multifid.train(values, [fails], quiet=True)
    assert "a mistake of the caller" in (tmp_path / "run" / "train.log").read_text()
    assert multifid.train(values, quiet=True).complete, "and the run can be trained again"


@pytest.fixture(scope="module")
def run(stores, tmp_path_factory):
    return start(config_of(stores, tmp_path_factory.mktemp("api") / "fruit", train=TOLD))


def test_models_and_data_in_any_form_give_the_rows_of_the_command(run, stores, tmp_path):
    data = {task: multifid.Store(path) for task, path in stores.items()}
    out, file = tmp_path / "rows.json", export(run, tmp_path / "fruit.mfid")
    texts = [f"--data={task}={path}" for task, path in stores.items()]
    done = command("evaluate", str(run), str(file), *texts, "--device", "cpu", "--out", str(out))
    assert done.returncode == 0 and "fruit.mfid" in done.stdout and "Energy MAE" in done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["data"]) for row in rows] == [(m, t) for m in ("fruit", "fruit.mfid") for t in stores]
    assert [row | {"model": "fruit"} for row in rows[3:]] == rows[:3] == read_rows(run)
    other = tmp_path / "other" / "fruit"
    other.parent.mkdir()
    other.symlink_to(run)
    for models, names in [
        (str(run), ["fruit"]),
        (multifid.load(run), ["model 1"]),
        ({"a": file, "b": multifid.load(file)}, ["a", "b"]),
        ([run, file, other], [str(run), "fruit.mfid", str(other)]),
    ]:
        found = multifid.evaluate(
            models, data, device=None if "model 1" in names or "a" in names else "cpu", quiet=True
        )
        assert [row["model"] for row in found] == [name for name in names for _ in stores]
        for k, row in enumerate(found):
            assert {**row, "model": "fruit"} == rows[k % 3]
    precise = multifid.evaluate(multifid.load(run, precision="fp64"), data, quiet=True)
    assert precise[0]["forces_mae"] == pytest.approx(rows[0]["forces_mae"], rel=1e-5)
    assert precise[0]["forces_mae"] != rows[0]["forces_mae"]
    with pytest.raises(ValueError, match="a loaded model is evaluated on the device that it is on"):
        multifid.evaluate(multifid.load(run), data, device="cpu")


def test_a_store_is_prepared_as_by_the_command(stores, tmp_path):
    file, other = (stores["apple"].parent / f"{name}.xyz" for name in ("apple", "berry"))
    store = multifid.prepare(
        "extxyz", str(file), tmp_path / "a", task="apple", test=other, fractions=(0.8, 0.2, 0), seed=3, quiet=True
    )
    split = ["--fractions", "0.8,0.2,0", "--seed", "3"]
    done = command(
        "prepare", "extxyz", str(file), "--out", str(tmp_path / "b"), "--task=apple", f"--test={other}", *split
    )
    assert done.returncode == 0, done.stderr
    assert store.content == multifid.Store(tmp_path / "b").content
    assert store.tasks == ["apple"] and store.size("test") == 37
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing"):
        multifid.prepare("extxyz", tmp_path / "nothing.xyz", tmp_path / "c")


RANKS = """
import sys
import multifid
config, stores = sys.argv[1], dict(text.split("=") for text in sys.argv[2:])
result = multifid.train(config, quiet=True)
rows = multifid.evaluate(result.run, stores, device="cpu", quiet=True)
assert multifid.train(config, quiet=True).steps == result.steps
try:
    multifid.train({"run": "x", "tasks": {"a": {"store": "nowhere"}}}, quiet=True)
except (ValueError, OSError) as error:
    print(result.complete, [row["structures"] for row in rows], error)
"""


def test_ranks_train_and_evaluate_in_one_process(pool, stores, tmp_path):
    """One world after another: each has keys of its own in the store of the launch."""
    told = pool.run(2, "train_and_evaluate", config_of(stores, tmp_path / "run", train=TOLD), stores)
    alone = multifid.evaluate(tmp_path / "run", stores, device="cpu", quiet=True)
    assert told[0] == told[1] == pytest.approx([row["forces_mae"] for row in alone], rel=1e-5)


@pytest.mark.full
def test_a_script_on_several_ranks_trains_evaluates_and_hears_errors(run, stores, tmp_path):
    """One world after another in the same processes, where rank 0 serves the rendezvous (as under srun)."""
    config = config_of(stores, tmp_path / "run", train=TOLD)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [sys.executable, "-c", RANKS, str(tmp_path / "c.yaml"), *(f"{task}={path}" for task, path in stores.items())]
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(told, env={**os.environ, **launch, "RANK": str(rank)}, stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        said, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
        assert said.startswith("True [") and "nowhere" in said
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    alone = multifid.evaluate(run, stores, device="cpu", quiet=True)
    assert [row["forces_mae"] for row in rows] == pytest.approx([row["forces_mae"] for row in alone], rel=1e-5)
