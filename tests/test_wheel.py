"""The wheel alone, in an environment of its own and away from the project, does what README.md says."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import multifid

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    """A command without this process's path to the project."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=kept | environment, capture_output=True, text=True)


def passed(*command, cwd, **environment) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


pytestmark = pytest.mark.xdist_group("wheel")  # it is built and installed once


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that no build output gets into the project."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    passed(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment with the wheel; dependencies are those of this one, on its path after its own packages."""
    folder = tmp_path_factory.mktemp("clean")
    passed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    passed(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    own = Path(passed(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    (own / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_wheel_goes_from_files_to_predictions(environment, tmp_path):
    def call(*arguments) -> str:
        return passed(environment / "multifid", *arguments, cwd=tmp_path, OMP_NUM_THREADS="1")

    there = passed(environment / "python", "-c", "import multifid; print(multifid.__file__)", cwd=tmp_path)
    assert there.startswith(str(environment.parent)) and call("--version").strip() == multifid.__version__
    call("sample", "files", "--structures", 12, "--workers", 1)
    call("prepare", "ani1x", "files/ani1x.h5", "--out", "data/ani1x")
    call("prepare", "mptrj", "files/mptrj.json", "--out", "data/mptrj")
    call("check", "data/ani1x")
    call("init", "data/ani1x", "data/mptrj", "--out", "first.yaml", "--minutes", 0.02)
    call("train", "first.yaml")
    assert "meV/atom" in call("evaluate", "runs/first", "--data", "data/ani1x", "data/mptrj")
    call("export", "runs/first", "--out", "first.mfid")
    call("predict", "first.mfid", "data/ani1x", "--task", "ani1x", "--out", "predicted.xyz")
    code = "import ase.build, multifid; model = multifid.load('first.mfid');"
    code += "print(model.predict(ase.build.molecule('CH4'), task='ani1x').energy)"
    assert re.fullmatch(r"\[-[0-9.]+\]", passed(environment / "python", "-c", code, cwd=tmp_path).strip())


@pytest.mark.full
@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("tblite", "demo", ("sample", "files", "--structures", "1")),
        ("tensorboard", "tensorboard", ("train", "first.yaml", "train.tensorboard=true")),
        ("wandb", "wandb", ("train", "first.yaml", "train.wandb=mine")),
    ],
)
def test_what_is_not_installed_is_one_message_that_names_the_extra(
    environment, stores, tmp_path, module, extra, arguments
):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}')")
    passed(environment / "multifid", "init", stores["apple"], "--out", "first.yaml", cwd=tmp_path)
    done = run(environment / "multifid", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path / "without"))
    assert done.returncode == 1 and f"pip install 'multifid[{extra}]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_written_in_one_place_and_cited():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {multifid.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {multifid.__version__}" in (ROOT / "CHANGELOG.md").read_text()
