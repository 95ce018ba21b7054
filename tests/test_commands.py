"""Every command and every Python block of README.md and docs/ is run as it stands, on small files of the same names.

What a page calls by a name (published files, stores, configs) lies under that name in a folder of its own, tens of
structures in place of millions; lengths of runs and of measurements are shortened. A page that names a file that is not
there, an option that no longer exists, or a step in the wrong order fails here.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest
import yaml
from ase.io import read, write

from conftest import write_molecules
from multifid.preparation.prepare import prepare
from test_hostile import FORMATS, write_ani1x

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL_FILES = ("index", "install", "published", "clusters", "python")  # pages that do without the published samples
BLOCK = re.compile(r"```(sh|bash|shell|python)\n(.*?)```", re.DOTALL)

SHARED = ROOT.parent / "shared" / "data"

SHORTER = {
    r"train\.steps=\d+": "train.steps=2",
    r"train\.epoch_steps=\d+": "train.epoch_steps=2",
    r"train\.minutes=\S+": "train.minutes=0.02",
    r"^(multifid init .*?)( --minutes \d+)?$": r"\1 --minutes 0.02",
    r"--copies \d+": "--copies 2 --repeat 1",
    r"--structures \d+": "--structures 200 --rounds 1",
    r"(benchmarks/share\.py .*)--batch \d+": r"\1--batch 16 --windows 2 --steps 4 --rounds 1 --hidden 8",
    r"--seconds \d+": "--seconds 1 --pairs 1 --hidden 8 --head 8",
    r"--tasks 16": "--tasks 4",
    r"--batch 128 --ranks 5 8": "--batch 8 --ranks 5 8 --steps 2",
    r"--nproc-per-node [0-9]+": "--nproc-per-node 2",
    r"--ranks 1,2,4": "--ranks 2 --epoch-steps 2",
    r"--here": "--here --epoch-steps 2",
    r"^srun -n \d+ ": "torchrun --nproc-per-node 2 -m ",
    r"warm neighbors full": "warm neighbors --rounds 1",
    r"pytest tests/test_memory.py -s": "pytest tests/test_memory.py --collect-only",
    r"STORE\.\.\.": "data/pack/ani1x data/pack/mptrj",
    r"--steps 10 --repeats 2": "--steps 1 --repeats 1",
    r"\bSTORE\b": "data/pack/ani1x",
    r"\bFOLDER\b": "reading",
    r"(benchmarks/placements\.py .*)": r"\1 --tables tables.md --figure figure.png",
    r"^(multifid relax .*)--fmax \S+": r"\1--fmax 1000",
    r"(benchmarks/encoders\.py .*)": r"\1 --encoders egnn schnet --steps 2 --seconds 1",
    r"(benchmarks/accuracy\.py .*)": r"\1 --seeds 0",
    r"--sizes 20,50,100,all --repeat 3": "--sizes 8,all",
    r"benchmarks/tuning\.py .*": "benchmarks/tuning.py --help",
    r"(benchmarks/splits\.py .*)": r"\1 --seeds 0",
    r"(benchmarks/small\.py .*)--steps \d+ --seeds [0-9 ]+": r"\1--sizes 20 --exponents 0 --steps 2 --seeds 0 ",
    r"^(multifid finetune (?!.*train\.steps).*)": r"\1 train.steps=2 train.epoch_steps=2",
}


def steps(page: Path) -> list[tuple[str, str]]:
    """What a page tells its reader to run, in order: shell commands without comments, one each, and Python blocks."""
    found = []
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            found.append(("python", block))
            continue
        assert language == "sh", f"{page.name}: commands stand in blocks of sh, not of {language}"
        lines = block.replace("\\\n", " ").splitlines()
        typed = [text for line in lines if (text := line.partition("  #")[0].strip()) and not text.startswith("#")]
        found += [("sh", text) for text in typed]
    return found


def commands(page: Path) -> list[str]:
    """The shell commands of a page, as typed."""
    return [text for language, text in steps(page) if language == "sh"]


def shortened(command: str) -> str:
    for long, short in SHORTER.items():
        command = re.sub(long, short, command)
    return command


def small(values: dict) -> dict:
    """A config of the same tasks and kind, a second long."""
    model, train = values["model"], values["train"]
    model["encoder"] = model.get("encoder", {}) | {"hidden": 8, "layers": 1}
    model["branch"] = model.get("branch", {}) | {"hidden": [8]}
    train |= {"steps": 2, "epoch_steps": 2, "log_every": 1}
    train.pop("minutes", None)
    for task in values["tasks"].values():
        if "per_step" in task:
            task["per_step"] = 2
    if "tune" in values:
        values["tune"] |= {"trials": 2, "budget": {"steps": 2}}
    if "study" in values:
        values["study"] |= {"seeds": [0], "processes": 1}
    return values


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where a reader stands: the project's folder, the published file that README.md prepares, and other stores."""
    folder = tmp_path_factory.mktemp("reader")
    write_ani1x(folder / "ani1x-release.h5")
    for part in ("benchmarks", "docs", "tests", "pyproject.toml"):
        (folder / part).symlink_to(ROOT / part)
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        (folder / "configs" / path.name).write_text(yaml.safe_dump(small(yaml.safe_load(path.read_text()))))
    mine = {
        "run": "runs/config",
        "tasks": {"ani1x": {"store": "data/ani1x"}, "mptrj": {"store": "data/mptrj"}},
        "model": {"cutoff": 4.0, "encoder": {}, "branch": {}},
        "train": {"batch": 2},
    }
    (folder / "CONFIG.yaml").write_text(yaml.safe_dump(small(mine)))
    for name, (file, written) in FORMATS.items():
        if name in ("qm7x", "transition1x", "mptrj", "alexandria"):
            (folder / name).mkdir()
            written(folder / name / file)
            prepare(name, [folder / name / file], folder / "data" / name, trust_units=True, progress=False)
    (folder / "demo").mkdir()
    (folder / "demo" / "stores").symlink_to(folder / "data")
    return folder


def run(folder: Path, command: str) -> str:
    """What a command prints; AssertionError with all of it where it fails."""
    words = shlex.split(command)
    environment = dict(os.environ)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    launchers = {
        "multifid": [sys.executable, "-m", "multifid"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "python": [sys.executable],
    }
    words[:1] = launchers.get(words[0], words[:1])
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_page(folder: Path, page: Path, passed=lambda command: False) -> None:
    for number, (language, text) in enumerate(steps(page)):
        if language == "python":
            (folder / f"{page.stem}-{number}.py").write_text(text, encoding="utf-8")
            run(folder, f"python {page.stem}-{number}.py")
            continue
        if text.startswith("multifid prepare ") and passed(text):
            continue
        if text.startswith(("make ", "git ", "cd ", "source ", "pip ")):
            assert not text.startswith("make ") or f"\n{text.split()[1]}:" in (ROOT / "Makefile").read_text()
            continue
        run(folder, shortened(text))
        if text.startswith("multifid init "):  # a small model, for commands and for Python
            config = folder / text.partition("--out ")[2].split()[0]
            values = yaml.safe_load(config.read_text(encoding="utf-8"))
            values["model"]["encoder"] |= {"hidden": 8, "tensors": 0, "layers": 1}
            config.write_text(yaml.safe_dump(values), encoding="utf-8")


def test_commands_and_python_of_the_readme_run(folder):
    assert {language for language, _ in steps(PAGES[0])} == {"sh", "python"}
    run_page(folder, PAGES[0])


@pytest.mark.full
@pytest.mark.timeout(1800)  # compiles twice
def test_the_tutorial_runs_in_an_empty_directory_and_its_model_is_used(tmp_path):
    run_page(tmp_path, ROOT / "docs" / "tutorial.md")
    assert (tmp_path / "alloys.mfid").exists() and (tmp_path / "alloys.md").exists()
    run_page(tmp_path, ROOT / "docs" / "use.md")
    assert (tmp_path / "relaxed.xyz").exists()


@pytest.fixture(scope="session")
def prepared(folder) -> Path:
    """The folder with the store of the published file too."""
    if not (folder / "data" / "ani1x").exists():
        run(folder, "multifid prepare ani1x ani1x-release.h5 --out data/ani1x")
    return folder


@pytest.fixture(scope="session")
def published(prepared) -> Path:
    """The folder with the published samples, and with the stores that docs/results.md makes of them."""
    if not SHARED.exists():
        pytest.skip("the published samples that the pages name are not beside the project")
    for path in SHARED.rglob("*"):
        if path.is_file() and not (prepared / path.name).exists():
            (prepared / path.name).symlink_to(path)
    for command in commands(ROOT / "docs" / "results.md"):
        if command.startswith("multifid prepare "):
            run(prepared, command)
    (prepared / "data" / "split-0").symlink_to("pack")  # one of the splits that the page compares
    return prepared


@pytest.fixture(scope="session")
def chemist(published) -> Path:
    """The folder with a trained model, and with a reader's own files: energies, forces, gaps and charges."""
    run(published, "multifid train CONFIG.yaml run=runs/demo")
    for name, count in (("mine", 40), ("scan", 8), ("test", 12), ("gaps", 40), ("new", 5)):
        write_molecules(published / f"{name}.xyz", count, 1.0, 0.0, seed=count)
        frames = read(published / f"{name}.xyz", ":")
        for atoms in frames:
            atoms.info["gap"] = float(atoms.positions[:, 0].std())
            atoms.set_array("q", 0.1 * np.cos(atoms.numbers))
        write(published / f"{name}.xyz", frames)
    return published


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize(  # lammps.md needs systems and builds of the reader's own: test_lammps.py runs the like
    "page", [page for page in PAGES[1:] if page.stem not in ("tutorial", "use", "lammps")], ids=lambda page: page.stem
)
def test_commands_and_python_of_the_docs_run(page, request):
    own = {"finetuning": "chemist"} | dict.fromkeys(SMALL_FILES, "prepared")
    folder = request.getfixturevalue(own.get(page.stem, "published"))
    run_page(folder, page, passed=lambda command: (folder / command.rpartition("--out ")[2]).exists())


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "docs" / "demo.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for long, short in (("STRUCTURES = 150", "STRUCTURES = 30"), ("MINUTES = 4", "MINUTES = 0.05")):
        assert long in code
        code = code.replace(long, short)
    (tmp_path / "demo.py").write_text(f"if __name__ == '__main__':\n{indent(code, '    ')}\n", encoding="utf-8")
    assert "relaxation lowers the energy" in run(tmp_path, "MPLBACKEND=agg python demo.py")


def test_every_page_is_read():
    assert sum(len(commands(page)) for page in PAGES) > 20
