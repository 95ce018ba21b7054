"""A search finds what is planted, loses nothing when it is stopped anywhere, and refuses what cannot be searched.

Trials that are played (`Played`) stand in for runs where the search itself is in question; real runs are in full.
"""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

pytest.importorskip("optuna", reason="multifid tune needs optuna")

import multifid
from multifid.config import dump_config, load_config, parse_config
from multifid.forecast.machines import read_machine
from multifid.parallel.launch import command_of
from multifid.workflows.tune import begin, search, under_way
from multifid.workflows.tune import job as jobs
from multifid.workflows.tune.clocks import Rapl
from multifid.workflows.tune.job import Files, alive, claim, progress, why_failed
from multifid.workflows.tune.report import report
from multifid.workflows.tune.search import open_search, tune
from multifid.workflows.tune.space import Space
from multifid.workflows.tune.storage import load_study, storage_of
from test_train import config_of

QUIET = Console(quiet=True)
LR = {"log": [1e-5, 1e-1]}


def searched(stores, run, **section) -> dict:
    """The values of a config with a `tune` section."""
    section = {"space": {"train.lr": LR}, "trials": 3, "budget": {"steps": 8}} | section
    return config_of(stores, run, tune=section)


def parsed(stores, run, **section):
    return parse_config(searched(stores, run, **section), "test")


class Played:
    """A trial that ends at once, or at its first validation where it is pruned, with what a function makes of it."""

    def __init__(self, trial, files, config, rows):
        self.trial, self.files, self.config, self.rows = trial, files, config, rows
        self.slot, self.told, self.step, self.used, self.pruned, self.looks = 0, {}, -1, 2.0, False, 0
        self.process = SimpleNamespace(wait=lambda: None)
        self.tail = SimpleNamespace(rows=[])
        files.beside("yaml").write_text(dump_config(config), encoding="utf-8")

    def sign(self):
        pass

    close = sign

    def over(self):
        self.looks += 1
        return self.pruned or self.looks > len(self.rows)

    def validations(self):
        """The journal is read here, and nowhere else."""
        new = [] if self.looks > len(self.rows) else [self.rows[self.looks - 1]]
        self.tail.rows += [row for some in new for row in some]
        return new

    def ending(self):
        if self.pruned and self.trial.number % 2:
            raise ValueError("its process was ended by SIGTERM")  # told to stop before it was ready
        last = self.rows[-1][0]
        return {"steps": last["step"], "best_step": last["step"], "complete": not self.pruned, "reason": "played"}


def rows_at(config, step, value, speed=100.0):
    told = {"step": step, "split": "validation", "objective": value, "seconds": step, "epoch": 1}
    return [
        told | {"task": t, "energy_mae": value, "forces_mae": value, "structures_per_second": speed}
        for t in config.tasks
    ]


@pytest.fixture
def played(monkeypatch):
    """Trials are played by a function of their config, which gives the values of their validations."""
    started = []

    def use(values, speed=lambda config: 100.0):
        def start(trial, files, config, tune, slot):
            steps = [8 * (k + 1) // len(values(config)) for k in range(len(values(config)))]
            rows = [rows_at(config, s, v, speed(config)) for s, v in zip(steps, values(config), strict=True)]
            started.append(config)
            return Played(trial, files, config, rows)

        monkeypatch.setattr(jobs, "start", start)
        monkeypatch.setattr(search, "LOOK", 0.0)
        monkeypatch.setattr(search, "report_if_possible", lambda found: None)
        return started

    return use


def test_a_planted_optimum_is_found_and_written_as_a_config_to_train(stores, tmp_path, played):
    best = -3.0
    played(lambda c: [1 + (math.log10(c.train.lr) - best) ** 2 + (c.model.encoder.name != "schnet")])
    space = {"model.encoder.name": ["egnn", "schnet"], "train.lr": LR, "model.branch.hidden": [[8], [8, 8]]}
    encoders = {"egnn": {"vectors": {"integer": [2, 6]}}}
    found = tune(searched(stores, tmp_path / "s", space=space, encoders=encoders, trials=24), console=QUIET)
    assert found.complete and len(found.trials) == 24 and {t["state"] for t in found.trials} == {"complete"}
    assert abs(math.log10(found.keys["train.lr"]) - best) < 0.7 and found.keys["model.encoder.name"] == "schnet"
    assert all(
        ("model.encoder.vectors" in t["keys"]) == (t["keys"]["model.encoder.name"] == "egnn") for t in found.trials
    )
    chosen = load_config(found.best)
    assert chosen.train.lr == found.keys["train.lr"] and chosen.model.encoder.name == "schnet"
    assert chosen.tune is None and chosen.train.steps == 8 and chosen.run == str(tmp_path / "s" / "best")
    assert chosen.model.encoder.hidden == 12 and found.values[0] == min(t["values"]["validation"] for t in found.trials)


def test_a_search_goes_on_where_it_was_stopped_and_draws_nothing_twice(stores, tmp_path, played):
    started = played(lambda c: [c.train.lr])
    whole = tune(searched(stores, tmp_path / "whole", trials=6, sampler="random"), console=QUIET)
    for trials in (2, 6):
        part = tune(searched(stores, tmp_path / "part", trials=trials, sampler="random"), console=QUIET)
    assert part.trials[0]["keys"] == {"train.lr": 1e-3}, "the config's own"
    assert [t["keys"] for t in part.trials] == [t["keys"] for t in whole.trials]
    assert len({c.train.lr for c in started}) == 6 and len(started) == 12
    again = tune(searched(stores, tmp_path / "part", trials=6, sampler="random"), console=QUIET)
    assert len(started) == 12 and again.number == part.number


def test_a_trial_whose_search_is_gone_is_marked_and_goes_on_in_its_directory(stores, tmp_path, played):
    started = played(lambda c: [c.train.lr])
    opened = open_search(parsed(stores, tmp_path / "s"), QUIET)
    trial = opened.study.ask()
    opened.space.suggest(trial._suggest)
    files = Files(tmp_path / "s" / "trials", trial.number)
    claim(files)
    assert alive(files, time.time())
    owner = json.loads(files.beside("alive").read_text())
    files.beside("alive").write_text(json.dumps(owner | {"born": "0"}))  # another process got its number since
    assert not alive(files, time.time())
    files.beside("alive").write_text(json.dumps(owner | {"host": "elsewhere"}))
    assert alive(files, time.time())
    os.utime(files.beside("alive"), (0, 0))
    found = tune(searched(stores, tmp_path / "s"), console=QUIET)
    states = [(t["state"], t["continues"], t["run"]) for t in found.trials]
    assert states[:2] == [("unfinished", None, "trials/0000"), ("complete", 0, "trials/0000")]
    assert len(states) == 4 and started[0].train.lr == trial.params["train.lr"]


@pytest.mark.parametrize("planned", [False, pytest.param(True, marks=pytest.mark.full)])
def test_no_trial_begins_that_needs_more_memory_than_there_is(stores, tmp_path, played, monkeypatch, planned):
    started = played(lambda c: [1.0])
    monkeypatch.setattr(under_way, "this_machine", lambda *_: read_machine("perlmutter"))
    if not planned:
        of = lambda c: SimpleNamespace(bytes=c.model.encoder.hidden << 19)  # noqa: E731
        plan = lambda c, ranks, machine: SimpleNamespace(forecasts={"a": of(c)}, asked="a", chosen="a")  # noqa: E731
        monkeypatch.setattr(begin, "make_plan", plan)
    space = {"model.encoder.hidden": [8, 512]}
    given = searched(stores, tmp_path / "s", space=space, trials=6, memory=0.005, sampler="brute_force")
    found = tune(given, console=QUIET)
    states = {t["keys"]["model.encoder.hidden"]: t["state"] for t in found.trials}
    assert states == {8: "complete", 512: "infeasible"} and all(c.model.encoder.hidden == 8 for c in started)
    assert len(found.trials) == 2, "the space is exhausted"
    (reason,) = {t["reason"] for t in found.trials if t["state"] == "infeasible"}
    assert "GiB" in reason and "tune.memory is 0.005" in reason and found.keys == {"model.encoder.hidden": 8}


def test_the_front_is_what_nothing_dominates(stores, tmp_path, played):
    played(lambda c: [1 / c.model.encoder.hidden + c.train.lr], lambda c: 1000.0 / c.model.encoder.hidden)
    space = {"train.lr": LR, "model.encoder.hidden": {"integer": [4, 64], "step": 4}}
    objectives = ["validation", "structures_per_second"]
    found = tune(searched(stores, tmp_path / "s", space=space, trials=12, objectives=objectives), console=QUIET)
    at = {t["number"]: (t["values"][objectives[0]], -t["values"][objectives[1]]) for t in found.trials}
    front = {n for n, (a, b) in at.items() if not any(x <= a and y <= b and (x, y) != (a, b) for x, y in at.values())}
    assert set(found.front) == front and found.number == min(front, key=lambda n: at[n][0])


def test_parallel_coordinates_show_choices_that_no_trial_ended_with():
    pytest.importorskip("plotly")
    from optuna.distributions import CategoricalDistribution

    from multifid.workflows.tune.charts import _axis_of

    axis = _axis_of([32, 16], "model.encoder.hidden", CategoricalDistribution([16, 32, 64]))
    assert axis["range"] == [0, 2] and axis["values"] == [1, 0] and axis["ticktext"] == ["16", "32", "64"]


def test_asha_stops_trials_that_fall_behind(stores, tmp_path, played):
    played(lambda c: [1 + c.train.lr] * 4)
    found = tune(searched(stores, tmp_path / "s", trials=12, pruner="asha", sampler="random"), console=QUIET)
    pruned = [t for t in found.trials if t["state"] == "pruned"]
    assert len({t["number"] % 2 for t in pruned}) == 2 and {t["state"] for t in found.trials} == {"complete", "pruned"}
    assert {t["reason"] for t in pruned} == {"fell behind other trials"} and all(
        t["steps"] == 8 for t in found.trials if t["state"] == "complete"
    )
    best = min(found.trials, key=lambda t: t["keys"]["train.lr"])
    assert best["state"] == "complete" and best["number"] == found.number


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"space": {}}, r"tune: space is empty"),
        ({"space": {"train.lr": {"log": [0.0, 1.0]}}}, r"tune\.space\.train\.lr: log: \[0, 1\] needs lo above 0"),
        ({"space": {"train.lr": {"range": [2.0, 1.0]}}}, r"tune\.space\.train\.lr: range: \[2, 1\].*lo below hi"),
        ({"space": {"train.lr": {"range": [1.0, 2.0], "log": [1.0, 2.0]}}}, r"exactly one of .* range and log"),
        ({"space": {"train.lr": 1.0}}, r"must be a list of choices"),
        ({"budget": {"seconds": 0}}, r"tune\.budget\.seconds: .*greater than 0"),
        ({"budget": {"seconds": 1, "steps": 1}}, r"tune\.budget: give one of seconds, steps"),
        ({"sampler": "best"}, r"tune\.sampler: Input should be 'tpe'"),
        ({"pruner": "best"}, r"tune\.pruner: Input should be 'none'"),
        (
            {"objectives": ["validation", "bytes_per_rank"], "pruner": "asha"},
            r"several objectives: Optuna prunes by one",
        ),
        ({"trials": None}, r"the search would have no end"),
        ({"budget": {"joules": 9.0}, "at_once": 2}, r"at_once must be 1"),
    ],
)
def test_a_section_that_makes_no_search_is_refused(section, said):
    stores = {"apple": "/nowhere"}
    with pytest.raises(ValueError, match=said):
        parsed(stores, "runs/none", **section)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"space": {"train.rate": [1]}}, r"train\.rate: unknown key"),
        ({"space": {"model.encoder.hiden": [1]}}, r"model\.encoder\.hiden: unknown key; did you mean 'hidden'"),
        (
            {"space": {"train.lr": {"range": [-1.0, 1.0]}}},
            r"tune\.space\.train\.lr at -1\.0:\n  train\.lr: .*greater than 0",
        ),
        ({"space": {"model.encoder.name": ["egnn", "best"]}}, r"the encoder must be one of .* got 'best'"),
        ({"encoders": {"schnet": {"hidden": [8]}}}, r"tune\.encoders\.schnet: schnet is not among .*\(egnn\)"),
        ({"space": {"model.encoder.name": ["egnn", "schnet"], "model.encoder.vectors": [2]}}, r"vectors: unknown key"),
        ({"space": {"objective.forces": [1.0, 2.0]}}, r"changes what the validation value means"),
        ({"space": {"train.steps": [4, 8]}}, r"tune\.budget\.steps says how long"),
        ({"space": {"seed.x": [1]}}, r"'seed' is a value|seed"),
        ({"space": {"tasks.apple.store": ["/a", "/b"]}}, r"not for a search"),
        ({"sampler_options": {"wisdom": 1}}, r"tune\.sampler_options\.wisdom: TPESampler has no such option"),
        ({"pruner": "asha", "pruner_options": {"min_resource": 0}}, r"pruner_options: .*min_resource"),
        pytest.param({"storage": "nosuch://x"}, r"tune\.storage: nosuch://x cannot", marks=pytest.mark.full),
    ],
)
def test_a_space_of_which_no_trial_could_be_made_is_refused(section, said, stores, tmp_path):
    with pytest.raises(ValueError, match=said):
        open_search(parsed(stores, tmp_path / "s", **section), QUIET)
    assert not (tmp_path / "s" / "config.yaml").exists()


@pytest.mark.parametrize("kind", ["", pytest.param("sqlite:///", marks=pytest.mark.full)])
def test_a_study_of_another_search_is_refused_with_what_differs(stores, tmp_path, kind):
    storage = f"{kind}{tmp_path}/study"
    open_search(parsed(stores, tmp_path / "s", storage=storage), QUIET)
    open_search(parsed(stores, tmp_path / "s", storage=storage, trials=9, sampler="random"), QUIET)
    with pytest.raises(
        ValueError, match=r"tune\.space\.train\.lr\.log: \[1e-05, 0\.2\] here, \[1e-05, 0\.1\] in the study"
    ):
        open_search(parsed(stores, tmp_path / "s", storage=storage, space={"train.lr": {"log": [1e-5, 0.2]}}), QUIET)
    with pytest.raises(ValueError, match=r"no section `tune`"):
        tune(config_of(stores, tmp_path / "s"), console=QUIET)


def test_a_torn_line_of_the_journal_costs_nothing(stores, tmp_path, played):
    played(lambda c: [c.train.lr])
    tune(searched(stores, tmp_path / "s", trials=2), console=QUIET)
    with (tmp_path / "s" / "journal").open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    assert len(tune(searched(stores, tmp_path / "s", trials=3), console=QUIET).trials) == 3
    (tmp_path / "no").write_text("no journal\nat all\n")
    with pytest.raises(ValueError, match=r"no is no journal of Optuna"):
        storage_of(str(tmp_path / "no"), tmp_path)


def test_joules_are_counted_over_the_end_of_a_counter_and_refused_where_none_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"shows no RAPL counter"):
        Rapl(tmp_path)
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0\n")
    with pytest.raises(ValueError, match=r"energy_uj cannot be read.*root"):
        Rapl(tmp_path)
    (zone / "max_energy_range_uj").write_text("10000000")
    (zone / "energy_uj").write_text("9000000")
    joules = Rapl(tmp_path)
    (zone / "energy_uj").write_text("2500000")
    assert joules() == pytest.approx(3.5)


def test_progress_is_that_of_the_budget_and_reasons_are_one_line(stores, tmp_path):
    config = parsed(stores, tmp_path / "s", budget={"processor_seconds": 60})
    timed = config.model_copy(update={"train": config.train.model_copy(update={"minutes": 1.0, "steps": None})})
    assert [progress({"step": 1, "seconds": s}, timed, config.tune) for s in (0, 20, 60, 90)] == [0, 9, 27, 27]
    log = tmp_path / "log"
    log.write_text("--- trial 0\nmultifid: error: old\n--- trial 1\nwarning\nmultifid: error: no store\nmore\n")
    assert why_failed(1, log) == "no store" and "SIGKILL" in why_failed(-9, log)


def test_ranks_are_launched_by_what_the_allocation_has():
    plain, _ = command_of(["m", "x"], 1, environment={})
    assert plain == [sys.executable, "-m", "m", "x"]
    torchrun, e = command_of(["m"], 2, slot=1, at_once=2, environment={"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    assert "--nproc-per-node=2" in torchrun and e["CUDA_VISIBLE_DEVICES"] == "6,7"
    srun, _ = command_of(["m"], 4, options=["--gpus-per-task=1"], environment={"SLURM_JOB_ID": "1"})
    assert srun[:4] == ["srun", "--ntasks=4", "--exact", "--gpus-per-task=1"]


def write_config(stores, folder, **section):
    given = searched(stores, folder / "s", **section)
    (folder / "tune.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    return [sys.executable, "-m", "multifid", "tune", str(folder / "tune.yaml")]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_killed_anywhere_a_real_search_goes_on_and_reports(stores, tmp_path):
    command = write_config(stores, tmp_path, trials=4, budget={"steps": 60})
    first = subprocess.Popen(command)
    journal = tmp_path / "s" / "trials" / "0001" / "metrics.jsonl"
    until = time.monotonic() + 600
    while not (journal.exists() and journal.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run(command, check=True, timeout=600)
    trials = json.loads((tmp_path / "s" / "trials.json").read_text())
    states = [t["state"] for t in trials]
    assert states.count("complete") == 4 and states.count("unfinished") == 1 and len(states) == 5
    assert trials[1]["state"] == "unfinished" and trials[2]["continues"] == 1 and trials[2]["run"] == "trials/0001"
    assert [t["steps"] for t in trials if t["state"] == "complete"] == [60] * 4
    again = multifid.train(
        {**yaml.safe_load((tmp_path / "s" / "best.yaml").read_text()), "run": str(tmp_path / "again")}, quiet=True
    )
    assert again.best == pytest.approx(min(t["values"]["validation"] for t in trials if t["values"]), rel=1e-6)
    page = report(tmp_path / "s", tmp_path / "page.html", QUIET).read_text(encoding="utf-8")
    assert "best.yaml" in page and page.count('class="chart"') >= 3


@pytest.mark.full
def test_a_real_search_of_several_objectives_has_a_front(stores, tmp_path):
    objectives = ["validation", "structures_per_second", "forces_mae"]
    found = tune(searched(stores, tmp_path / "s", objectives=objectives, trials=2), console=QUIET)
    assert [t["state"] for t in found.trials] == ["complete"] * 2 and found.number in found.front
    assert all(set(t["values"]) == set(objectives) and min(t["values"].values()) > 0 for t in found.trials)
    assert "Pareto" in report(tmp_path / "s", tmp_path / "page.html", QUIET).read_text(encoding="utf-8")


@pytest.mark.full
def test_searches_at_once_share_one_study_and_make_as_many_trials_as_asked(stores, tmp_path, played):
    played(lambda c: [c.train.lr])
    given = searched(stores, tmp_path / "s", trials=14, sampler="random")
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=tune, args=(given,), kwargs={"console": QUIET}) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(200)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    study = load_study(load_config(tmp_path / "s" / "config.yaml"), tmp_path / "s")
    assert len(study.trials) == 14 and len({t.params["train.lr"] for t in study.trials}) == 14
    assert {t.state.name for t in study.trials} == {"COMPLETE"}
    owners = {json.loads(p.read_text())["pid"] for p in (tmp_path / "s" / "trials").glob("*.alive")}
    assert len(owners) > 1


@pytest.mark.full
def test_a_crash_is_one_trials_and_is_recorded_with_its_reason(stores, tmp_path):
    space = {"train.device": ["cpu", "cuda:7"]}
    found = tune(searched(stores, tmp_path / "s", space=space, sampler="brute_force", at_once=2), console=QUIET)
    states = {t["keys"]["train.device"]: (t["state"], t["reason"]) for t in found.trials}
    assert states["cpu"] == ("complete", "complete")
    assert states["cuda:7"][0] == "failed" and "cuda" in states["cuda:7"][1]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_trial_on_two_ranks_is_the_trial_on_one(stores, tmp_path):
    values = []
    for ranks in (1, 2):
        given = searched(stores, tmp_path / str(ranks), trials=1, ranks=ranks)
        values.append(tune(given, console=QUIET).values[0])
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_the_space_of_a_trial_is_its_encoders_own(stores, tmp_path):
    space = {"model.encoder.name": ["egnn", "schnet"]}
    made = Space(parsed(stores, tmp_path, space=space, encoders={"egnn": {"vectors": [2, 4]}}))
    schnet = made.config({"model.encoder.name": "schnet"}).model.encoder
    assert made.own(parsed(stores, tmp_path)) is None, "three vectors are not among the choices"
    assert schnet.name == "schnet" and schnet.hidden == 12 and not hasattr(schnet, "vectors")
    assert made.config({"model.encoder.name": "egnn", "model.encoder.vectors": 4}).model.encoder.vectors == 4
