"""A run that is ended by the clock ends when it should, annealed, and the same wherever it was interrupted."""

import io
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from multifid.config import parse_config
from multifid.forecast.plan import plan
from multifid.training.checkpoint import load_checkpoint
from multifid.training.journal import read_journal
from multifid.training.length import length_of
from multifid.training.optimizer import Schedule
from multifid.training.pace import Spent
from multifid.training.run import train
from multifid.training.state import Position
from multifid.training.step import Totals, Trainer
from multifid.workflows.study import study
from test_train import assert_same_bits, config_of

SPEEDS = {
    "even": lambda step: 0.5,
    "compiled": lambda step: 40.0 if step == 1 else 0.5,
    "slower": lambda step: 0.5 if step < 2000 else 1.5,
    "faster": lambda step: 0.5 if step < 2000 else 0.2,
    "uneven": lambda step: 0.1 + 0.8 * (step * 2654435761 % 1000) / 1000,
    "hiccups": lambda step: 25.0 if step % 1000 == 997 else 0.5,
}


def simulated(minutes, speed, validation, per_epoch, warmup=100):
    """A run without its mathematics: (position, length, the rate of every update)."""
    position = Position(Totals([], torch.device("cpu")))
    length = length_of(minutes, 1, per_epoch, position, 50.0, None)
    schedule, rates = Schedule("cosine", warmup, 1), []
    while position.step < length.total:
        rates.append(schedule(position.step))
        position.step += 1
        position.seconds += speed(position.step)
        if position.step == length.next:
            length.fix(position, length.fitting(position))
            schedule.bend(position.step, length.total - position.step)
        if position.step % per_epoch == 0 or position.step == length.total:
            position.pause = validation
            position.paused += validation
            position.seconds += validation
    return position, length, rates


@pytest.mark.parametrize("name", SPEEDS)
@pytest.mark.parametrize(("validation", "per_epoch"), [(5.0, 300), (60.0, 1000), (15.0, 10**6)])
def test_whatever_its_speed_a_run_ends_on_time_at_the_bottom_of_its_rate(name, validation, per_epoch):
    position, length, rates = simulated(40.0, SPEEDS[name], validation, per_epoch)
    assert abs(position.seconds - 2400) <= 0.03 * 2400
    assert rates[-1] == pytest.approx(0.01, rel=1e-9)
    assert all(b <= a + 1e-12 for a, b in pairwise(rates[100:])), "it only falls after the warm-up"
    assert max(abs(b - a) for a, b in pairwise(rates)) < 0.02, "and never jumps"
    assert len(length.fixed) < 40, "ranks agree rarely"


@pytest.mark.parametrize("minutes", [0.001, 0.2, 1.0])
def test_a_run_that_is_shorter_than_its_warm_up_is_annealed_too(minutes):
    position, _, rates = simulated(minutes, SPEEDS["even"], 0.1, 10)
    assert rates[-1] <= max(rates) if position.step < 4 else rates[-1] == pytest.approx(0.01, rel=1e-9)
    assert position.seconds <= 60 * minutes + 1.1, "two steps and a validation at least"


def test_time_that_is_left_counts_the_validations_that_are_left():
    spent = Spent(step=1.0, validation=10.0)
    assert [spent.until(s, 25, 10) for s in (0, 9, 10, 11, 20, 24)] == [
        25 + 30,
        16 + 30,
        15 + 30,
        14 + 20,
        5 + 20,
        1 + 10,
    ]


class Clock:
    """Moves by what steps and validations are said to take, the same in every run."""

    def __init__(self, monkeypatch, fail_at=None):
        self.now, self.fail_at, steps, validations = 0.0, fail_at, Trainer.step, Trainer.validate

        def step(trainer, *arguments, **options):
            if trainer.updates == self.fail_at:
                raise ValueError("killed")
            self.now += (1 + trainer.updates * 7 % 3) / 64  # exact in binary: no rounding tells one start from three
            return steps(trainer, *arguments, **options)

        def validate(trainer, batches):
            self.now += 0.125
            return validations(trainer, batches)

        monkeypatch.setattr(Trainer, "step", step)
        monkeypatch.setattr(Trainer, "validate", validate)

    def __call__(self) -> float:
        return self.now


def test_interrupted_at_any_moment_it_makes_the_same_steps(stores, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    def go(name, fail_at=None):
        clock.fail_at = fail_at
        timed = {"minutes": 0.05, "steps": None, "checkpoint_every": 3, "epoch_steps": 20, "patience": None}
        config = parse_config(config_of(stores, tmp_path / name, train=timed), "test")
        return train(config, Console(file=io.StringIO()), clock=clock).run

    whole = go("whole")
    state, _, _ = load_checkpoint(whole)
    assert state["step"] == state["length"]["total"] and abs(state["position"]["seconds"] - 3.0) < 0.15
    rows = read_journal(whole)
    assert rows[-1]["lr"] == pytest.approx(1e-5, rel=1e-9) and rows[-1]["seconds_left"] == 0.0
    for fail_at in (1, 7, 20, 45, 70, state["step"] - 1):
        with pytest.raises(ValueError, match="killed"):
            go("killed", fail_at)
    assert_same_bits(whole, go("killed"))
    text = (tmp_path / "killed" / "train.log").read_text()
    assert "0.05 min of training; epochs" in text and "length at step 1: " in text
    assert text.count(" length at step 1:") == 1 and "min of training, of which" in text


def test_all_ranks_follow_the_clock_of_one(pool, stores, tmp_path):
    timed = {"minutes": 0.03, "steps": None, "epoch_steps": 1000}
    assert pool.run(2, "whole_run", config_of(stores, tmp_path / "run", train=timed)) == [0, 0]
    state, _, _ = load_checkpoint(tmp_path / "run")
    assert (
        state["step"] == state["length"]["total"] == state["length"]["fixed"][-1][1] and state["length"]["next"] is None
    )


def test_minutes_and_steps_are_one_length_and_other_minutes_another_run(stores, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    def go(**timed):
        values = config_of(stores, tmp_path / "run", train={"steps": None, **timed})
        train(parse_config(values, "test"), Console(quiet=True), clock=clock)
        return load_checkpoint(tmp_path / "run")[0]

    with pytest.raises(ValueError, match="minutes and steps both say how long the run is: set one of them to null"):
        go(minutes=1.0, steps=5)
    first = go(minutes=0.02)
    with pytest.raises(ValueError, match=r"train\.minutes: 0\.04 here, 0\.02 in the run"):
        go(minutes=0.04)
    longer = go(minutes=0.04, change_tasks=True)
    assert longer["step"] > 1.5 * first["step"]
    assert longer["length"]["fixed"][: len(first["length"]["fixed"])] == first["length"]["fixed"]
    assert read_journal(tmp_path / "run")[-1]["lr"] == pytest.approx(1e-5, rel=1e-9)


def test_a_study_refuses_the_clock_and_a_plan_reckons_with_it(stores, tmp_path):
    config = parse_config(config_of(stores, tmp_path / "run", train={"minutes": 1.0, "steps": None}), "test")
    with pytest.raises(ValueError, match=r"train\.minutes: the models of a study make the same number of steps"):
        study(config, Console(quiet=True))
    made = plan(config, 1, "perlmutter", console=(out := Console(file=io.StringIO(), width=200)))
    steps, seconds = made.length
    assert 0 < 60.0 - seconds < made.forecasts[made.chosen].seconds and f"{steps:,} steps" in out.file.getvalue()
