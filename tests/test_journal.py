"""metrics.jsonl says each thing once, whatever happened to the run."""

import json

import pytest

from multifid.train.journal import Journal, finite, read_journal


def row(step, loss=1.0):
    return {"step": step, "split": "train", "task": "apple", "loss": loss, "energy_mae": 0.1, "forces_mae": None}


def test_opening_at_a_step_cuts_off_what_came_after_it_and_a_torn_line(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.write([row(1), row(2), row(3)])
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "spl')
    journal = Journal(tmp_path, 2)
    journal.write([row(3, loss=7.0)])
    journal.close()
    assert [(r["step"], r["loss"]) for r in read_journal(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 7.0)]


def test_what_json_cannot_say_is_null():
    assert json.dumps([finite(float("nan")), finite(float("inf")), finite(0.5)]) == "[null, null, 0.5]"


def test_tensorboard_gets_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    journal = Journal(tmp_path, 0, tensorboard=True)
    journal.write([row(10, 0.5), row(20, 0.25)])
    journal.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train/apple")] == [(10, 0.5), (20, 0.25)]
    assert "forces_mae/train/apple" not in events.Tags()["scalars"]
