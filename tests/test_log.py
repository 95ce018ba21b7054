"""What a run says is in a file as on a console, once, in columns, and the same to whoever writes it down."""

import io
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from multifid.config import parse_config
from multifid.training.journal import read_journal
from multifid.training.lines import Lines, number
from multifid.training.log import Log, duration, kept
from multifid.training.run import train
from test_train import config_of


def console(**options) -> Console:
    return Console(file=io.StringIO(), **options)


def row(task: str, step: int = 50, split: str = "train", **values) -> dict:
    held = {
        "step": step,
        "epoch": 0.5,
        "split": split,
        "task": task,
        "loss": 0.4,
        "energy_mae": 0.01231,
        "forces_mae": 0.1234,
        "structures": 1000,
        "seconds": 1.0,
        "stress_mae": None,
        "objective": 25.6,
        "lr": 0.001,
        "grad_norm": 3.21,
        "skipped": 0,
        "best": None,
        "structures_per_second": 1234.5,
        "seconds_left": 754.0,
        "memory": 2**30,
        "device_memory": None,
    }
    return held | values


def test_a_job_s_output_is_its_log_and_both_are_plain_lines_in_columns(stores, tmp_path):
    out = console()
    values = config_of(stores, tmp_path / "run", train={"steps": 24, "log_every": 2})
    train(parse_config(values, "test"), out)
    text = (tmp_path / "run" / "train.log").read_text()
    assert out.file.getvalue() == text
    assert text.isascii() and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]| \n", text)
    for said in ("encoder 3,520; each branch 304; in all, with 3 branches, 4,432", "24 steps, 2.4 epochs of 10 steps"):
        assert said in text
    assert re.search(r"\| apple +36 +12 +12 +60 +60 +0 +3 +1 +0$", text, re.M), "structures, labels and ranks of a task"
    heads = [line for line in text.splitlines() if line.startswith("    step")]
    lines = [line for line in text.splitlines() if re.match(r" +\d+ +\d", line)]
    assert len(lines) == 12 and {len(line) for line in lines} == {len(heads[0])} and len(set(heads)) == 1
    ends = {match.end() for match in re.finditer(r"\S+", heads[0])}
    assert all({match.end() for match in re.finditer(r"\S+", line)} == ends for line in lines), "right under the heads"
    assert text.count(" validation at step") == 3 and text.splitlines()[-1].startswith(f"{tmp_path / 'run'}: complete")


def test_the_log_of_a_run_that_goes_on_says_nothing_twice_and_keeps_its_messages(stores, tmp_path):
    run = tmp_path / "run"
    config = parse_config(config_of(stores, run, train={"keep": 9, "log_every": 3}), "test")
    train(config, console())
    before = (run / "train.log").read_text()
    for step in (15, 18, 20, 21, 24):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    (run / "checkpoints" / "step-000012" / "encoder.safetensors").write_bytes(b"")
    train(config, console())
    text = (run / "train.log").read_text()
    assert [int(s) for s in re.findall(r"^ +(\d+) +\d", text, re.M)] == list(range(3, 25, 3))
    assert [int(s) for s in re.findall(r"^ validation at step (\d+)", text, re.M)] == [10, 20, 24]
    assert f"resumes {run} at step 10" in text and f"begins {run}" in text
    assert re.search(r"^.*step-000012/encoder.safetensors: damaged.*going back", text, re.M), "warnings are kept too"
    assert text.count("complete after 24 steps") == 2, "what the first start said at its end was said"
    cut = before.index("      12 ")
    assert text.startswith(before[:cut].rsplit("\n", 1)[0])


def test_records_after_a_step_are_cut_and_messages_stay():
    text = "one\n  about\n       5  0.5\n validation at step 10, epoch 1\n   | 12  3\nstopped\n      15  1.5\n      2"
    assert (
        "".join(kept(text, 10)) == "one\n  about\n       5  0.5\n validation at step 10, epoch 1\n   | 12  3\nstopped\n"
    )
    assert "".join(kept(text, 5)) == "one\n  about\n       5  0.5\nstopped\n"
    assert "".join(kept(text, 0)) == "one\n  about\nstopped\n"


@pytest.mark.parametrize("width", [60, 80, None])
def test_sixty_four_tasks_are_a_line_that_can_be_read_and_a_table_with_every_name(width):
    tasks = [f"task-{k:02}" for k in range(62)] + ["oc20-adsorbates-relaxed-2M-subset", "x"]
    out = console() if width is None else console(force_terminal=True, width=width, color_system=None)
    lines = Lines(Log(out), tasks, stress=False, accelerator=True)
    told = [row(task, device_memory=2**33) for task in tasks]
    told[7] |= {"loss": float("nan"), "energy_mae": float("nan")}
    lines.write(told)
    lines.write([{**r, "split": "validation"} for r in told])
    text = out.file.getvalue().splitlines()
    assert len(text[2]) < 140 and ("largest loss task-07 nan: nan 123.4" in text[2]) == (width is None)
    table = text[3:]
    assert all(len(line) <= 80 for line in table) and len([x for x in table if " 123.4 " in x]) == 64
    assert all(any(line.split()[1:2] == [task] for line in table) for task in tasks)


def test_on_a_terminal_lines_fit_it_and_the_bar_shows_the_loss(stores, tmp_path):
    out = console(force_terminal=True, width=80, color_system=None)
    train(parse_config(config_of(stores, tmp_path / "run", train={"steps": 8}), "test"), out)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.file.getvalue()).replace("\r", "\n").splitlines()
    lines = [line for line in shown if re.match(r" +[48] +0\.\d0 ", line)]
    assert lines and all(len(line) <= 80 for line in lines)
    assert any(re.search(r"training .* 8/8 loss \d", line) for line in shown)
    assert "\x1b" not in (tmp_path / "run" / "train.log").read_text()


def test_what_comes_from_outside_cannot_break_a_line(tmp_path):
    out = console()
    log = Log(out)
    log.print("[yellow]before there is a file: \x1b[31m[/yellow]")
    log.open(tmp_path, 0)
    log.note("ValueError: of several lines\n  the second")
    log.close()
    assert (tmp_path / "train.log").read_text() == (
        "before there is a file: ?[31m\nValueError: of several lines\n| the second\n"
    )


def test_why_a_run_ended_is_in_its_log(stores, tmp_path, monkeypatch):
    def broken(self, batches):
        raise ValueError("the validation split is on fire")

    monkeypatch.setattr("multifid.training.step.Trainer.validate", broken)
    with pytest.raises(ValueError, match="on fire"):
        train(parse_config(config_of(stores, tmp_path / "run"), "test"), console())
    assert "ValueError: the validation split is on fire" in (tmp_path / "run" / "train.log").read_text()


class FakeBoard:
    """Weights & Biases as far as it is used."""

    Error = RuntimeError

    def __init__(self):
        self.begun, self.logged = [], {}

    def init(self, **options):
        self.begun.append(options)
        return SimpleNamespace(log=self.log, finish=lambda: self.begun.append("finished"))

    def log(self, values, step):
        self.logged.setdefault(step, {}).update(values)


def test_boards_get_the_numbers_of_the_journal_and_one_identity_for_a_run(stores, tmp_path, monkeypatch):
    board = FakeBoard()
    monkeypatch.setitem(sys.modules, "wandb", board)
    values = config_of(stores, tmp_path / "run", train={"steps": 8, "wandb": "planets"})
    run = train(parse_config(values, "test"), console()).run
    train(parse_config(values, "test"), console())  # goes on at its end
    first, finished, again, _ = board.begun
    assert finished == "finished" and first["project"] == "planets" and first["config"]["train"]["lr"] == 0.001
    assert first["id"] == again["id"] == (run / "wandb-id").read_text() and again["resume"] == "allow"
    for row in read_journal(run):
        shown = board.logged[row["step"]]
        for key in ("loss", "energy_mae", "forces_mae"):
            assert shown[f"{key}/{row['split']}/{row['task']}"] == row[key]
        assert shown[f"objective/{row['split']}"] == row["objective"] and f"stress_mae/train/{row['task']}" not in shown
        if row["split"] == "train":
            for key in ("lr", "grad_norm", "structures_per_second", "memory"):
                assert shown[f"run/{key}"] == row[key]


@pytest.mark.parametrize(
    ("key", "value", "extra"), [("wandb", "planets", "wandb"), ("tensorboard", True, "tensorboard")]
)
def test_a_board_that_is_not_installed_is_an_error_before_anything_is_written(
    stores, tmp_path, monkeypatch, key, value, extra
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=rf"train\.{key}: install it with pip install 'multifid\[{extra}\]'"):
        train(parse_config(config_of(stores, tmp_path / "run", train={key: value}), "test"), console())
    assert not Path(tmp_path / "run").exists()


def test_numbers_keep_four_digits_and_their_columns():
    shown = [number(x) for x in (0.0, 12.314, 1234.5, 12345678.0, 0.012344, 1.2e-5, -3.0, float("nan"), None)]
    assert shown == ["0.000", "12.31", "1234", "1.2e+07", "0.01234", "1.2e-05", "-3.000", "nan", "-"]
    assert [duration(x) for x in (0, 61.4, 3723, 98765, None)] == ["0:00:00", "0:01:01", "1:02:03", "1d03h", "-"]
