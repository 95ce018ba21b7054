"""`prepare` with many processes: the same bytes whatever their number, and however often they are killed."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import BaseModel

from multifid.preparation import parts as parts_module
from multifid.preparation import prepare as module
from multifid.preparation import survey, unfinished
from multifid.preparation.prepare import prepare
from multifid.readers.contract import IsolatedAtom, LabelSet, Skip, cut
from multifid.store.store import Store
from multifid.structures.structure import Labels, Structure

COUNT, PART = 240, 20
fork = multiprocessing.get_context("fork")


class Options(BaseModel):
    """Nothing to choose."""


def record(i: int):
    random = np.random.default_rng(i)
    numbers = random.choice([1, 6, 8], 2 + i % 4)
    if i % 11 == 0:
        return Skip("odd", str(i))
    pbc = np.array([True] * 3) if i > 180 else None  # a field that the first parts have not
    positions = np.zeros((len(numbers), 3)) if i % 17 == 0 else random.uniform(0, 9, (len(numbers), 3))
    labels = {"fake": Labels(random.normal(), random.normal(size=positions.shape) if i > 100 else None)}
    return Structure(numbers, positions, labels, str(i // 5), f"line {i}", None if pbc is None else np.eye(3) * 9, pbc)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A format with parts; `fake.before(i)` happens in the worker before record i of the file is read."""
    made = SimpleNamespace(before=lambda i: None, log=tmp_path / "log")

    def read(path, options, progress, part=None):
        start, stop = part or (0, COUNT)
        with made.log.open("a") as log:
            log.write(f"{start}\n")
        if start == 0:
            yield IsolatedAtom("fake", 1, -13.0)
        for i in range(start, stop):
            made.before(i)
            yield record(i)

    reader = SimpleNamespace(
        TASKS={"fake": LabelSet("x", "total")}, RELATIVE="five", ENDINGS=(".fake",), Options=Options, read=read
    )
    reader.parts = lambda path, options: cut([1] * COUNT, PART)
    monkeypatch.setattr(module, "reader", lambda format: reader)
    monkeypatch.setattr(parts_module, "PIECE", 3000)
    monkeypatch.setattr(survey, "STRETCH", 50)
    (tmp_path / "in").mkdir()
    for name in ("b.fake", "a.fake"):
        (tmp_path / "in" / name).write_text(name)

    def run(name: str, inputs=("in",), **more) -> Store:
        return prepare("fake", [tmp_path / i for i in inputs], tmp_path / name, progress=False, **more)

    made.run = run
    made.starts = lambda: sorted(map(int, made.log.read_text().split()))
    return made


def content(store: Store) -> dict[str, bytes]:
    return {str(p.relative_to(store.path)): p.read_bytes() for p in store.path.rglob("*") if p.is_file()}


def test_the_store_does_not_depend_on_workers_parts_or_pieces(fake, monkeypatch):
    one = content(fake.run("one"))
    assert content(fake.run("three", workers=3)) == one
    monkeypatch.setattr(parts_module, "PIECE", 1 << 24)
    monkeypatch.setattr(parts_module, "AT_ONCE", (7, 50))
    assert content(fake.run("pieces", workers=2)) == one
    monkeypatch.setattr(module.reader(""), "parts", lambda path, options: [None])
    assert content(fake.run("whole", workers=2)) == one


def test_a_directory_and_a_pattern_stand_for_their_files_sorted_by_name(fake, tmp_path):
    (tmp_path / "empty").mkdir()
    names = [f["name"] for f in fake.run("one").manifest["source"]["files"]]
    assert names == ["a.fake", "b.fake"]
    assert content(fake.run("two", inputs=("in/*.fa?e",))) == content(fake.run("one2"))
    with pytest.raises(FileNotFoundError, match=r"no file matches .*x\*"):
        fake.run("no", inputs=("x*",))
    with pytest.raises(FileNotFoundError, match=r"no file in .* ends with \.fake"):
        fake.run("no", inputs=("empty",))
    with pytest.raises(ValueError, match=r"a\.fake is given twice"):
        fake.run("no", inputs=("in", "in/a.fake"))


def killed(fake, name: str, at: int, **more) -> None:
    """Run prepare in a process that is killed, with its workers, when record `at` is reached."""

    def body() -> None:
        first = os.getpid()

        def before(i: int) -> None:
            if i == at:
                os.kill(first, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

        fake.before = before
        fake.run(name, **more)

    process = fork.Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_prepare_goes_on_and_ends_with_the_same_bytes(fake, tmp_path):
    one = content(fake.run("one"))
    for at, workers in ((5, 2), (130, 1), (239, 2)):
        killed(fake, "again", at, workers=workers)
        assert not (tmp_path / "again").exists()
    fake.log.write_text("")
    assert content(fake.run("again", seed=0)) == one
    assert len(fake.starts()) <= 13  # of 24 parts
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".again")]


def test_another_question_starts_anew(fake, tmp_path):
    killed(fake, "again", 230)
    (tmp_path / "in" / "a.fake").write_text("changed")
    fake.log.write_text("")
    assert fake.run("again").structures and len(fake.starts()) == 24


def test_a_store_that_was_killed_while_cleaning_is_whole(fake, tmp_path):
    one = fake.run("one")
    killed(fake, "other", 239)
    (tmp_path / ".other.parts").rename(tmp_path / ".one.parts")
    assert fake.run("one").checksum == one.checksum and not (tmp_path / ".one.parts").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        fake.run("one")


def test_a_crash_in_a_worker_is_an_error_that_names_the_file(fake, tmp_path):
    def crash(i: int) -> None:
        if i == 70:
            faulthandler.disable()  # pytest's would print all stacks
            os.abort()

    fake.before = crash
    with pytest.raises(ValueError, match=r"a\.fake: reading it ended the process \(SIGABRT\)"):
        fake.run("no", workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "log"]


def test_ranks_that_share_a_file_system_make_one_store(fake, tmp_path):
    one = content(fake.run("one"))
    others = [fork.Process(target=lambda r=r: fake.run("ranks", rank=r, size=3), args=()) for r in (1, 2)]
    for process in others:
        process.start()
    store = fake.run("ranks", rank=0, size=3, workers=2)
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0]
    assert content(store) == one
    assert fake.run("ranks", rank=1, size=3) is None  # one that comes late


@pytest.mark.full
def test_ranks_under_torchrun_and_under_srun_make_the_store_of_one_process(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for k in range(5):
        frames = [
            f"{n}\nProperties=species:S:1:pos:R:3 energy={-13.0 * n - random.random():.6f}\n"
            + "".join(f"H {1.5 * i:.4f} {random.random():.6f} 0\n" for i in range(n))
            for n in random.integers(1, 9, 20)
        ]
        (tmp_path / "in" / f"{k}.xyz").write_text("".join(frames))
    whole = prepare("extxyz", [tmp_path / "in"], tmp_path / "one", trust_units=True, progress=False)
    command = ["-m", "multifid", "prepare", "extxyz", str(tmp_path / "in"), "--trust-units", "--out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launcher, *command, str(tmp_path / "torchrun")], env=quiet, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tasks = [
        subprocess.Popen(
            [sys.executable, *command, str(tmp_path / "srun")],
            env=quiet
            | {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "3", "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "1"}
            | {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(3)
    ]
    assert [task.wait(120) for task in tasks] == [0, 0, 0]
    assert content(Store(tmp_path / "torchrun")) == content(Store(tmp_path / "srun")) == content(whole)


def test_a_rank_that_fails_or_falls_silent_is_noticed(fake, tmp_path, monkeypatch):
    def fails(i: int) -> None:
        if i == 30:
            raise ValueError("in/a.fake is odd")

    fake.before = fails
    other = fork.Process(target=lambda: fake.run("no", rank=1, size=2))
    other.start()
    fake.before = lambda i: None
    with pytest.raises(ValueError, match=r"rank 1: in/a\.fake is odd"):
        fake.run("no", rank=0, size=2)
    other.join()
    assert other.exitcode == 1
    monkeypatch.setattr(unfinished, "SILENCE", 0.5)
    with pytest.raises(TimeoutError, match="rank 1 has been silent"):
        fake.run("silent", rank=0, size=2)
    assert (tmp_path / ".silent.parts").is_dir()


def test_workers_must_be_some(fake):
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        fake.run("no", workers=0)


def test_paths_may_hold_spaces_and_letters_of_any_language(fake, tmp_path):
    folder = tmp_path / "in" / "größe [1] x"
    folder.mkdir()
    (folder / "ü ñ.fake").write_text("x")
    assert fake.run("spaces", inputs=("in/größe [1] x",)).structures
