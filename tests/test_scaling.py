"""Measured steps add up, a machine is found again from the steps that it would make, and what follows is drawn."""

import json
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from multifid.cli import app
from multifid.config import load_config, parse_config
from multifid.forecast.estimate import forecast
from multifid.forecast.machines import Link, Machine, read_machine
from multifid.forecast.scaling import launch, report, scaling_here
from multifid.forecast.scaling.beyond import scaled
from multifid.forecast.scaling.calibrate import MeasuredCase, calibrate, used
from multifid.forecast.scaling.measure import PHASES, MeasuredPoint, ScalingPoint, points
from multifid.forecast.subject import TaskLoad, make_subject
from multifid.model.potential import ModelConfig
from multifid.parallel.layout import place
from test_train import config_of

TRUE = Machine(
    "planted",
    per_node=8,
    memory=1e10,
    flops=5e10,
    traffic=8e9,
    launch=6e-6,
    inside=Link(2e-4, 6e8),
    between=Link(1.0, 1.0),
    queued=False,
    overlap=0.0,
    cores=2,
    contention=1.2,
    noise=0.04,
    update=4e9,
    bookkeeping=7e-4,
)
MODEL = {"encoder": {"layers": 2, "hidden": 64}, "branch": {"hidden": [64, 64]}}


def test_a_planted_machine_is_found_from_some_points_and_tells_the_others():
    loads = {"a": TaskLoad(1.0, 12.0, 150.0, 0.3), "b": TaskLoad(1.0, 30.0, 900.0, 0.3), "c": TaskLoad(1.0, 9.0, 60.0)}
    model = make_subject(ModelConfig.model_validate(MODEL), loads)
    cases = []
    for point in (p for ranks in (1, 2, 4) for p in points(ranks, 3, 12, 48)):
        subject, where = scaled(model, point.batch), place(list(loads), point.placement, point.ranks)
        told = forecast(subject, where, TRUE)
        phases = {phase: told.phases[phase] for phase in PHASES}
        cases.append(MeasuredCase(MeasuredPoint(point, told.seconds, phases, [], 0.0, 0.0, 0.0), subject, where))
    guess = replace(TRUE, flops=1e9, traffic=1e9, launch=1e-3, inside=Link(1.0, 1.0), contention=1.0, noise=0.0)
    found = calibrate(guess, cases)
    assert found.flops == pytest.approx(TRUE.flops, rel=1e-3) and found.traffic == pytest.approx(TRUE.traffic, rel=1e-3)
    assert found.contention == pytest.approx(1.2) and found.noise == pytest.approx(0.04, rel=0.02)
    assert found.inside.bandwidth == pytest.approx(6e8, rel=1e-3) and found.update == pytest.approx(4e9)
    unseen = [case for case in cases if not used(case.point)]
    assert len(unseen) == 6
    for case in unseen:
        assert case.on(found).seconds == pytest.approx(case.measured.step, rel=1e-3)


def test_what_is_measured_fits_the_ranks():
    assert points(1, 5, 20, 40) == [
        ScalingPoint("weak", "replicated", 1, 20),
        ScalingPoint("strong", "replicated", 1, 40),
    ]
    assert [(p.mode, p.placement, p.batch) for p in points(4, 5, 20, 40)] == [
        ("weak", "replicated", 80),
        ("weak", "split", 80),
        ("strong", "replicated", 40),
        ("strong", "split", 40),
    ]
    with pytest.raises(ValueError, match="fewer than 5 tasks"):
        points(1, 5, 4, 40)


def test_one_rank_is_measured_and_everything_is_written(stores, tmp_path):
    config = parse_config(config_of(stores, tmp_path / "run"), "test")
    for epoch in (0, 1):
        scaling_here(config, tmp_path, 6, 12, epoch_steps=2, epoch=epoch)
    (weak, strong) = json.loads((tmp_path / "measured-1.json").read_text())
    for point in (weak, strong):
        assert point["step"] == pytest.approx(sum(point["phases"].values())) and set(point["phases"]) == set(PHASES)
        assert min(point["phases"].values()) >= 0 and len(point["epochs"]) == 2
        assert point["step"] == pytest.approx(sum(point["epochs"]) / 4)
    assert strong["point"]["batch"] == 12 and not (tmp_path / "run").exists(), "a measurement writes no run"
    values = report(config, tmp_path, 6)
    assert {row["machine"] for row in values["forecast"]} == {"perlmutter", "frontier", "aurora"}
    largest = {m: max(r["ranks"] for r in values["forecast"] if r["machine"] == m) for m in ("frontier", "aurora")}
    assert largest == {"frontier": 640, "aurora": 1920}
    assert {(r["placement"], r["balanced"]) for r in values["forecast"]} >= {("split", True), ("split", False)}
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert read_machine(str(tmp_path / "machine.yaml")).name == "measured"


def test_an_epoch_is_added_to_its_own_points_only(stores, tmp_path):
    config = parse_config(config_of(stores, tmp_path / "run"), "test")
    with pytest.raises(FileNotFoundError, match=r"measured-1\.json"):
        scaling_here(config, tmp_path, 6, 12, epoch_steps=1, epoch=1)
    scaling_here(config, tmp_path, 6, 12, epoch_steps=1, epoch=0)
    whole = (tmp_path / "measured-1.json").read_bytes()
    with pytest.raises(ValueError, match=r"measured-1\.json.*--epoch 1"):
        scaling_here(config, tmp_path, 6, 24, epoch_steps=1, epoch=1)
    assert (tmp_path / "measured-1.json").read_bytes() == whole
    told = CliRunner().invoke(app, ["scaling", str(tmp_path / "c.yaml"), "--epoch", "1"])
    assert isinstance(told.exception, ValueError) and "--here" in str(told.exception)


@pytest.mark.full
def test_ranks_are_launched_by_the_command_itself(stores, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_of(stores, tmp_path / "run")))
    told = [f"--out={tmp_path}", "--local-batch=6", "--global-batch=12", "--epoch-steps=1", "--epoch=0"]
    launch([str(path), *told], 2)
    measured = json.loads((tmp_path / "measured-2.json").read_text())
    assert [m["point"]["placement"] for m in measured] == ["replicated", "split"] * 2
    assert all(m["point"]["ranks"] == 2 for m in measured)
    assert all(m["phases"]["communication"] + m["phases"]["waiting"] > 0 for m in measured), "ranks exchange"
    assert len({m["edges"] for m in measured}) == 1, "every placement takes the same structures"
    assert [len(m["epochs"]) for m in measured] == [1] * 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="measure first"):
        report(load_config(path), tmp_path / "empty", 6)
