"""The report page says what the numbers say, draws in a browser without a network, and `watch` reads a journal."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from rich.console import Console

from conftest import data_of
from multifid.config import load_config
from multifid.evaluation.evaluate import evaluate_run
from multifid.training.journal import read_journal
from multifid.workflows.report import _past_their_best, gather, report
from multifid.workflows.report.charts import formula
from multifid.workflows.watch import BARS, Tail, curve, screen, watch
from test_train import config_of, start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(stores, tmp_path_factory):
    length = {"steps": 12, "epoch_steps": 4, "diagnose_every": 4}
    return start(config_of(stores, tmp_path_factory.mktemp("report") / "run <1>", train=length))


def text_of(console_width, renderable):
    console = Console(width=console_width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_the_errors_of_the_page_are_those_of_evaluate(run, stores):
    content = gather(run, 10_000)
    for task, store in stores.items():
        (row,) = evaluate_run(run, data_of(f"{task}={store}"))
        found = content.errors[task]
        assert found.of == row["structures"] == len(found.structures)
        assert np.nanmean([s.energy_error for s in found.structures]) == pytest.approx(row["energy_mae"], rel=1e-5)
        forces = np.concatenate([np.abs(s.forces[1] - s.forces[0]).ravel() for s in found.structures])
        assert np.nanmean(forces) == pytest.approx(row["forces_mae"], rel=1e-5)
        worse = row["forces_mae"] >= row["zero_forces_mae"] or row["energy_mae"] >= row["zero_energy_mae"]
        assert worse == any(f"no better than nothing on {task}" in line for line in content.warnings)


def test_the_page_holds_everything_and_asks_no_network(run, tmp_path):
    out = report(run, tmp_path / "there" / "page.html", 5, Console(quiet=True))
    page = out.read_text(encoding="utf-8")
    own = page[: page.index("<script>")] + page[page.rindex("<script>") :]  # without plotly's own text
    assert "run &lt;1&gt;" in own and "run <1>" not in own, "names of files are text, not markup"
    for task in load_config(run / "config.yaml").tasks:
        assert f"<h3>{task}</h3>" in own
    assert not re.search(r"""(src|href)=["'](https?:)?//""", own)
    figures = re.search(r"const figures = \[\n(.*?)\n\];", own, re.DOTALL)[1].splitlines()
    drawn = [json.loads(line.rstrip(",")) for line in figures]
    shown = {int(n) for n in re.findall(r'data-figure="(\d+)"', own)}
    assert shown == set(range(len(drawn))) and len(drawn) > 15
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]
    assert "multifid train config.yaml" in own and "zero forces" in own
    assert "How tasks share the encoder" in own


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size", ["1280,3000", "412,3000"])
def test_a_browser_draws_every_figure_and_complains_of_nothing(run, tmp_path, size):
    out = report(run, tmp_path / "page.html", 5, Console(quiet=True))
    page = out.read_text(encoding="utf-8")
    watched = "<script>addEventListener('error', e => document.title = 'error: ' + e.message)</script>"
    out.write_text(page.replace("<head>", "<head>" + watched, 1), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    command = [CHROMIUM, *options, f"--window-size={size}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    dom = subprocess.run([*command, out.as_uri()], capture_output=True, text=True, timeout=240, check=True).stdout
    assert "<title>error" not in dom
    assert dom.count("js-plotly-plot") >= 4 and "Learning curves" in dom


def test_what_is_no_run_and_a_store_that_is_gone_are_said(run, tmp_path):
    with pytest.raises(ValueError, match=r"nothing is no directory"):
        report(tmp_path / "nothing", tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"neither a run nor a study.*train first"):
        report(tmp_path, tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"--structures 0"):
        report(run, tmp_path / "x.html", 0)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    text = (copy / "config.yaml").read_text(encoding="utf-8")
    (copy / "config.yaml").write_text(re.sub(r"store: .*apple", "store: /gone/apple", text), encoding="utf-8")
    content = gather(copy, 5)
    assert set(content.errors) == {"berry", "cherry"} and any("apple" in w and "/gone" in w for w in content.warnings)
    assert not (tmp_path / "x.html").exists()


def test_a_task_that_was_better_before_is_told_of():
    losses = {"apple": [1.0, 0.5, 0.4], "berry": [0.6, 0.5, 0.52], "cherry": [0.7, 0.62, 0.61]}
    rows = [{"task": t, "step": 10 * k, "loss": x} for t, own in losses.items() for k, x in enumerate(own, 1)]
    (told,) = _past_their_best(rows, kept=30)
    assert "berry" in told and "step 20" in told and "4 % higher" in told
    assert [line.split(":")[0] for line in _past_their_best(rows, kept=20)] == ["Task apple"]


def test_formulas_are_those_of_hill():
    assert formula(np.array([8, 1, 6, 1, 1, 6, 1, 1, 1])) == "C2H6O" and formula(np.array([11, 17])) == "ClNa"


def test_watch_shows_the_last_rows_and_waits_for_a_line_that_is_half_there(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole, tail = path.read_bytes(), Tail(path)
    path.write_bytes(whole[:-20])
    tail.read()
    rows = read_journal(run)
    assert tail.rows == rows[:-1]
    path.write_bytes(whole)
    tail.read()
    assert tail.rows == rows
    said = text_of(100, screen("here", tail, tail.changed))
    assert "step 12" in said and "complete" in said and all(task in said for task in ("apple", "berry", "cherry"))
    assert f"{1000 * rows[-1]['energy_mae']:.4g}" in said
    path.write_bytes(whole[: len(whole) // 2])  # a run that went back to a checkpoint writes again from there
    tail.read()
    assert tail.rows == rows[: len(tail.rows)] and len(tail.rows) < len(rows)
    tail.rows[-1] = tail.rows[-1] | {"seconds_left": 60.0}
    assert "may have been stopped" in text_of(100, screen("here", tail, tail.changed + 1000))
    watch(tmp_path / "run", once=True, console=Console(quiet=True))
    with pytest.raises(ValueError, match=r"is no run"):
        watch(tmp_path, once=True)


def test_curves_go_from_the_lowest_bar_to_the_highest():
    assert curve([3.0, None, 1.0, 2.0]) == BARS[7] + BARS[0] + BARS[4] and curve([1.0]) == BARS[0] and curve([]) == ""
