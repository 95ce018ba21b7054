"""metrics.jsonl says each thing once, whatever happened to the run."""

import math

import pytest

from multifid.training.boards import TensorBoard
from multifid.training.journal import Journal, read_journal

OTHERS = dict.fromkeys(
    ("stress_mae", "objective", "lr", "grad_norm", "skipped", "structures_per_second", "memory", "device_memory"), 1.0
) | {"seconds_left": None}


def row(step, loss=1.0):
    return {
        "step": step,
        "split": "train",
        "task": "apple",
        "loss": loss,
        "energy_mae": 0.1,
        "forces_mae": None,
        **OTHERS,
    }


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


def test_what_json_cannot_say_is_null(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.write([row(1, math.nan), row(2, -math.inf), row(3, 0.5)])
    journal.close()
    assert [r["loss"] for r in read_journal(tmp_path)] == [None, None, 0.5]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path, 0)
    for told in (row(10, 0.5), row(20, 0.25)):
        board.write([told])
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train/apple")] == [(10, 0.5), (20, 0.25)]
    assert "forces_mae/train/apple" not in events.Tags()["scalars"] and "run/lr" in events.Tags()["scalars"]
