"""From Python: training that reports and stops, what it returns, and errors that are exceptions."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

import multifid
from conftest import MEASURED
from multifid.training.journal import read_journal
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
