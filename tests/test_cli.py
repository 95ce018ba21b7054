"""The commands as a user types them."""

import json
import re
import subprocess
import sys

import yaml
from typer.testing import CliRunner

from conftest import write_molecules
from multifid.cli import app
from multifid.readers.formats import FORMATS
from test_train import config_of


def multifid(*arguments, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", "-m", "multifid", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def said(done: subprocess.CompletedProcess) -> str:
    """stderr without the record of imports."""
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))


def test_help_and_prepare_start_without_torch(tmp_path):
    write_molecules(tmp_path / "a file.xyz", 30, 1.0, 0.0, seed=0)
    done = multifid("prepare", "extxyz", tmp_path / "a file.xyz", "--out", tmp_path / "store", "--task", "apple")
    assert done.returncode == 0, said(done)
    assert "splits" in done.stdout and (tmp_path / "store" / "manifest.json").exists()
    for run in (done, multifid("--help")):
        assert run.returncode == 0 and not re.search(r"\| +torch$", run.stderr, re.MULTILINE)


def test_help_lists_every_format_and_each_lists_its_options(tmp_path):
    done = multifid("prepare", "--help")
    assert all(name in done.stdout for name in FORMATS) and not re.search(r"\| +numpy$", done.stderr, re.MULTILINE)

    def shown(*arguments) -> str:
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return done.output

    assert all(name in shown("formats") for name in FORMATS)
    listed = shown("formats", "extxyz", "spice")
    assert "energy_unit" in listed and "kcal/mol" in listed and "spin_counts" in listed
    write_molecules(tmp_path / "a.xyz", 20, 1.0, 0.0, seed=0)
    write_molecules(tmp_path / "b.xyz", 5, 1.0, 0.0, seed=1)
    files = ("--train", tmp_path / "a.xyz", "--test", tmp_path / "b.xyz")
    assert "validation carved out of" in shown("prepare", "extxyz", *files, "--out", tmp_path / "store")


def test_train_and_evaluate_as_in_the_readme(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train={"steps": 2})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert multifid("train", tmp_path / "c.yaml", "train.lr=0.002").returncode == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["lr"] == 0.002
    assert multifid("train", tmp_path / "run").returncode == 0  # goes on: there is nothing left to do
    done = multifid("evaluate", tmp_path / "run", "--data", stores["apple"], f"berry={stores['berry']}")
    assert done.returncode == 0, said(done)
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert [row["data"] for row in rows] == ["apple", "berry"] and "meV/atom" in done.stdout


def test_a_users_error_is_one_message_and_exit_code_1(stores, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_of(stores, tmp_path / "run") | {"traln": {}}))
    for arguments, message in (
        (("prepare", "ani2x", "x.h5", "--out", "y"), "unknown format 'ani2x'"),
        (("prepare", "ani1x", tmp_path / "none.h5", "--out", tmp_path / "y"), "none.h5"),
        (("train", tmp_path / "none.yaml"), "none.yaml"),
        (("train", tmp_path / "c.yaml"), "traln: unknown key; did you mean 'train'?"),
        (("evaluate", tmp_path, "--data", stores["apple"]), "model.json"),
        (("stats", tmp_path), str(tmp_path)),
    ):
        done = multifid(*arguments)
        assert done.returncode == 1 and message in said(done) and "Traceback" not in done.stderr, arguments
