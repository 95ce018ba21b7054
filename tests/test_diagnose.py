"""`multifid diagnose` says what the journals of a run say."""

import json

import numpy as np
import pytest
from rich.console import Console

from multifid.evaluation.pulls import by_pair, cosines, gaps, later, pulls
from multifid.training.diagnosis import NAME
from multifid.workflows.diagnose import diagnose

TASKS = ("a_task_with_a_rather_long_name", "b", "c")


def measured(step: int, norms, table) -> list[dict]:
    known = [[None if np.isnan(x) else x for x in line] for line in np.array(table)]
    return [
        {
            "step": step,
            "task": task,
            "norm": norms[i],
            "share": [0.7, 0.4, -0.1][i],
            "cosines": {other: known[i][j] for j, other in enumerate(TASKS) if j != i},
        }
        for i, task in enumerate(TASKS)
    ]


def journal() -> list[dict]:
    """Losses at three validations: a goes on falling, b has risen from its best, c has no label."""
    return [
        {"step": step, "split": split, "task": task, "loss": loss[k]}
        for k, step in enumerate((10, 20, 30))
        for split, losses in (
            ("train", ([1.0, 0.5, 0.25], [0.4, 0.2, 0.1], [0.0] * 3)),
            ("validation", ([1.0, 0.6, 0.5], [0.4, 0.3, 0.33], [0.0] * 3)),
        )
        for task, loss in zip(TASKS, losses, strict=True)
    ]


NAN = np.nan
ROWS = [
    *measured(10, [9.0, 9.0, 9.0], [[1, 0.9, 0.9], [0.9, 1, 0.9], [0.9, 0.9, 1]]),
    *measured(20, [1.0, 2.0, 3.0], [[1, -0.5, 0.5], [-0.5, 1, NAN], [0.5, NAN, 1]]),
    *measured(30, [3.0, 4.0, None], [[1, -0.3, 0.1], [-0.3, 1, 0.2], [0.1, 0.2, 1]]),
]


def test_means_are_of_the_later_half_and_leave_out_what_was_not_there():
    assert {row["step"] for row in later(ROWS)} == {20, 30}
    np.testing.assert_allclose(cosines(later(ROWS), TASKS), [[1, -0.4, 0.3], [-0.4, 1, 0.2], [0.3, 0.2, 1]])
    found = pulls(ROWS, TASKS)
    assert [one.norm for one in found.values()] == [2.0, 3.0, 3.0]
    assert found["b"].worst == (TASKS[0], pytest.approx(-0.4)) and found["c"].worst == ("b", pytest.approx(0.2))
    assert list(by_pair(ROWS, TASKS)) == [(TASKS[0], "b"), ("b", "c"), (TASKS[0], "c")]


def test_a_gap_is_validation_by_training_and_above_best_how_far_a_task_has_come_away_from_it():
    found = gaps(journal(), TASKS)
    assert found[TASKS[0]].ratio == 2.0 and found[TASKS[0]].above_best == 0.0
    assert found["b"].best_step == 20 and found["b"].above_best == pytest.approx(0.1)
    assert found["c"].ratio is None and found["c"].above_best is None
    assert gaps([], TASKS) == {}


@pytest.mark.parametrize("rows", [ROWS, []])
def test_tables_fit_a_terminal_and_the_figure_is_drawn(tmp_path, rows):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"run": str(run), "tasks": {t: {"store": "x"} for t in TASKS}}))
    for name, journals in (("metrics.jsonl", journal()), (NAME, rows)):
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in journals))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    out = diagnose(run, console=console)
    text = console.export_text()
    assert max(map(len, text.splitlines()[:-2])) <= 80 and out.read_bytes()[:4] == b"\x89PNG"
    assert ("70.0 %" in text and "-0.400" in text) == bool(rows) == ("were not measured" not in text)
    assert "10.0 %" in text and "2.00" in text, "the gap is told in either case"


def test_what_is_no_run_or_has_said_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        diagnose(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps({"run": str(tmp_path), "tasks": {"a": {"store": "x"}}}))
    with pytest.raises(ValueError, match="has no metrics yet"):
        diagnose(tmp_path)
