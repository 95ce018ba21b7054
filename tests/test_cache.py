"""Files are recognised by what they hold, become stores once, whoever asks, and are evaluated as a whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from conftest import write_molecules
from multifid.cli import app
from multifid.config import as_config
from multifid.environment import cache_directory
from multifid.evaluation.rows import read_rows
from multifid.preparation import cache
from multifid.preparation.cache import Files, cached, place_of
from multifid.preparation.prepare import prepare
from multifid.readers.recognise import recognise
from multifid.store.store import Store
from multifid.workflows import study as study_module
from multifid.workflows.asked import Asked, parse
from multifid.workflows.evaluate import evaluate
from multifid.workflows.export_adios import export_adios
from multifid.workflows.train import train
from test_evaluation import same
from test_readers import entry, frame, row, step, trajectory, write, write_lmdb, write_qm7x, write_reaction
from test_spice import water
from test_spice import write as write_spice
from test_train import assert_same_bits, config_of, start

DATA = Path(__file__).parents[2] / "shared" / "data"


def write_ani1x(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("H2O1")
        group["atomic_numbers"], group["coordinates"] = (
            np.array([8, 1, 1]),
            np.random.default_rng(0).normal(size=(2, 3, 3)),
        )
        group["wb97x_dz.energy"], group["wb97x_dz.forces"] = np.full(2, -76.0), np.zeros((2, 3, 3))
    return path


def write_transition1x(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        write_reaction(file.create_group("data/CH2O/rxn0001"), 3)
    return path


def write_xyz(path: Path) -> Path:
    write_molecules(path, 12, 1.0, 0.0, seed=1)
    return path


@pytest.mark.parametrize(
    ("format", "name", "made"),
    [
        ("ani1x", "x.h5", write_ani1x),
        ("transition1x", "x.h5", write_transition1x),
        ("qm7x", "x.hdf5", lambda path: write_qm7x(path, {"12": ["Geom-m1-i1-c1-opt"]})),
        ("spice", "x.hdf5", lambda path: write_spice(path, w=water())),
        ("mptrj", "x.json", lambda path: write(path, {"mp-1265": {"mp-7-0-3": frame()}})),
        ("alexandria", "x.json", lambda path: write(path, {"entries": [entry()]})),
        ("alexandria", "x.json.bz2", lambda path: write(path, trajectory(step()))),
        ("aselmdb", "x.aselmdb", lambda path: write_lmdb(path, {"1": row()})),
        ("extxyz", "x.xyz", write_xyz),
        ("extxyz", "no ending", write_xyz),
        ("mptrj", "frames.txt", lambda path: write(path, {"mp-1265": {"mp-7-0-3": frame()}})),
    ],
)
def test_a_format_is_recognised_by_ending_and_content(tmp_path, format, name, made):
    assert recognise(made(tmp_path / name)) == format
    assert parse(f"some={tmp_path / name}") == Asked("some", tmp_path / name, format)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"a": 1}', b"\x00\x01\x02" * 99, b"3\n\nnothing here\n", b"\x89HDF\r\n\x1a\n"]
)
@pytest.mark.parametrize("name", ["x.json", "x.h5", "x.dat"])
def test_what_is_not_recognised_says_how_to_say_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"none of the formats.*FORMAT:.*ani1x, qm7x"):
        recognise(tmp_path / name)


def test_the_parts_of_a_dataset_are_told_apart(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_xyz(tmp_path / "a=b:c.xyz")
    store = tmp_path / "s=t"
    shutil.copytree(stores["apple"], store)
    assert parse("a=b:c.xyz") == Asked(None, Path(file.name), "extxyz")
    assert parse("fig=a=b:c.xyz") == Asked("fig", Path(file.name), "extxyz")
    assert parse("extxyz:*.xyz") == Asked(None, Path("*.xyz"), "extxyz")
    assert parse("fig=mptrj:files") == Asked("fig", Path("files"), "mptrj")
    assert parse("s=t") == Asked(None, Path("s=t")) and parse("fig=s=t") == Asked("fig", Path("s=t"))
    for text, message in (
        ("nothing", "no store and no file nothing"),
        ("fig=nothing", "no store and no file nothing"),
        ("vasp:OUTCAR", "'vasp' is no format: known are ani1x"),
        (str(tmp_path), r"is no store .*FORMAT:"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(text)


def files_of(path: Path, **changes) -> Files:
    return Files(**{"path": path, "format": "extxyz", "options": {}} | changes)


ASK = """
import json, sys
from pathlib import Path
from multifid.preparation.cache import Files, cached
store, before = cached(Files(Path(sys.argv[1]), "extxyz", {}), Path(sys.argv[2]))
print(json.dumps([before, store.field("positions").tolist()]))
"""


def test_processes_that_ask_for_one_file_make_one_store(tmp_path):
    place = place_of(files_of(write_xyz(tmp_path / "a.xyz")), tmp_path / "cache")
    command = [sys.executable, "-c", ASK, tmp_path / "a.xyz", place]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [json.loads(process.communicate()[0]) for process in asking]
    assert sorted(before for before, _ in found) == [False, True, True]
    assert all(positions == found[0][1] for _, positions in found)
    assert [entry.name for entry in place.parent.iterdir() if not entry.name.startswith(".")] == [place.name]


def test_a_process_that_cannot_lock_takes_the_store_of_one_that_was_faster(tmp_path, monkeypatch):
    place = place_of(files_of(write_xyz(tmp_path / "a.xyz")), tmp_path / "cache")
    original = cache._prepare_apart

    def overtaken(files, folder, progress):
        original(files, folder, progress)
        shutil.copytree(folder / "store", place)

    def no_locks(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(cache, "_prepare_apart", overtaken)
    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    store, _ = cached(files_of(tmp_path / "a.xyz"), place)
    assert store.structures == 12 and len([e for e in place.parent.iterdir() if e.is_dir()]) == 1


def test_what_decides_over_a_store_is_in_its_place_and_nothing_else(tmp_path, monkeypatch):
    first = place_of(files_of(write_xyz(tmp_path / "a.xyz")), tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "a.xyz", tmp_path / "elsewhere" / "a.xyz")
    assert place_of(files_of(tmp_path / "elsewhere" / "a.xyz"), tmp_path) == first
    others = [
        place_of(files_of(tmp_path / "a.xyz", options={"energy_key": "e"}), tmp_path),
        place_of(files_of(tmp_path / "a.xyz", trust_units=True), tmp_path),
        place_of(files_of(tmp_path / "a.xyz", format="qm7x"), tmp_path),
    ]
    monkeypatch.setattr(cache, "__version__", "99")
    others.append(place_of(files_of(tmp_path / "a.xyz"), tmp_path))
    monkeypatch.undo()
    with (tmp_path / "a.xyz").open("a") as file:
        file.write("\n")
    others.append(place_of(files_of(tmp_path / "a.xyz"), tmp_path))
    assert len({first, *others}) == 6


def test_a_damaged_store_of_the_cache_is_made_again_and_leftovers_are_removed(tmp_path):
    files = files_of(write_xyz(tmp_path / "a.xyz"))
    place = place_of(files, tmp_path / "cache")
    cached(files, place)
    (place / "numbers.npy").write_bytes(b"")
    (place.parent / f".{place.name}.killed").mkdir()
    store, before = cached(files, place)
    assert not before and len(store.field("numbers")) == store.atoms
    assert not (place.parent / f".{place.name}.killed").exists()


def test_where_the_cache_lies(tmp_path):
    assert cache_directory({"XDG_CACHE_HOME": "/x"}) == Path("/x/multifid")
    assert cache_directory({}) == cache_directory({"XDG_CACHE_HOME": ""}) == Path.home() / ".cache" / "multifid"


@pytest.fixture(scope="module")
def run(stores, tmp_path_factory) -> Path:
    return start(config_of(stores, tmp_path_factory.mktemp("runs") / "m", train={"steps": 3}))


def test_a_file_is_evaluated_as_the_store_of_it_by_any_number_of_ranks(stores, run, tmp_path, pool):
    """All its structures, whatever a store would divide; the second time nothing is prepared."""
    file = stores["apple"].parent / "apple.xyz"
    wanted = evaluate([run], [str(stores["apple"])], "all", device="cpu", quiet=True)
    found = evaluate([run], [f"apple={file}"], device="cpu", cache=tmp_path, quiet=True)
    split = {"split": "test", "source": str(file)}
    same(found, [wanted[0] | split])
    made = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if not p.name.startswith(".")}
    for rows in pool.run(2, "evaluated", str(run), [f"apple={file}"], "test", 40, str(tmp_path)):
        same(rows, found)
    assert made == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if not p.name.startswith(".")}
    (everywhere,) = {
        json.dumps(r) for r in pool.run(2, "evaluated", str(run), [str(file)], "all", 40, str(tmp_path / "b"))
    }
    same(json.loads(everywhere), [wanted[0] | {"source": str(file)}])
    assert {r["source"] for r in read_rows(run)} == {str(file)}  # the file is called apple, as the task


def test_what_a_user_gets_wrong_about_files_is_said(stores, run, tmp_path):
    file = str(stores["apple"].parent / "apple.xyz")
    options = {"cache": tmp_path / "cache", "quiet": True, "device": "cpu"}
    for data, more, message in (
        ([file], {"split": "train"}, r"no train structure \(test 60, validation 0, train 0\)"),
        ([file], {"options": {"colour": "red"}}, r"--option colour: extxyz has .*energy"),
        ([str(stores["apple"])], {"options": {"colour": "red"}}, "only stores are given"),
        ([file, f"apple={stores['apple']}"], {}, "both called 'apple'.*NAME="),
        ([f"fig={file}"], {}, r"several branches: say which one answers:\n  --data apple=.*apple.xyz"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate([run], data, **{"split": "test"} | more | options)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"nothing can be kept in .*file .*--cache DIR"):
        evaluate([run], [file], **options | {"cache": tmp_path / "file"})


@pytest.mark.skipif(not DATA.is_dir(), reason="the published sample data are not beside the repository")
@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("mptrj/mptrj_sample.json", "mptrj"),
        ("alexandria/alexandria_sample.json.bz2", "alexandria"),
        ("ani1x/physicsml_tests_ani1x.h5", "ani1x"),
        ("omol25/data0001.aselmdb", "aselmdb"),
    ],
)
def test_published_files_are_recognised_and_become_test_sets(tmp_path, path, format):
    assert recognise(DATA / path) == format
    if format in ("ani1x", "mptrj"):
        files = files_of(DATA / path, format=format)
        store, _ = cached(files, place_of(files, tmp_path))
        assert store.size("test") == store.structures > 0 and isinstance(store, Store)


@pytest.mark.parametrize("format", ["adios", pytest.param("extxyz", marks=pytest.mark.full)])
def test_a_run_of_a_file_is_the_run_of_its_store_to_the_bits_and_needs_the_file_no_longer(
    format, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_molecules(tmp_path / "x.xyz", 40, 1.0, 0.0, seed=1)
    file, store = tmp_path / "x.xyz", tmp_path / "store"
    prepare("extxyz", [file], store, task="other", progress=False)
    if format == "adios":
        pytest.importorskip("adios2", reason="the extra `adios` is not installed")
        file = export_adios(store, tmp_path / "x.bp")
        store = tmp_path / "again"
        prepare("adios", [file], store, task="other", progress=False)
    steps = {"steps": 6, "epoch_steps": 3, "checkpoint_every": 3}
    of_store, of_file = (
        config_of({"a": data}, tmp_path / run, train=steps) for data, run in ((store, "one"), (file, "two"))
    )
    train(of_store, quiet=True)
    said = train(of_file, quiet=True)
    assert said.complete and [own["loss"] for own in said.rows if "loss" in own]
    assert_same_bits(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(max((tmp_path / "two" / "checkpoints").iterdir()))
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    train(tmp_path / "two", quiet=True)
    assert_same_bits(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match=r"no store and no file|is not a store"):
        train(config_of({"a": file}, tmp_path / "three", train=steps), quiet=True)


def test_a_plan_and_a_study_take_files_as_a_run_does(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_molecules(tmp_path / "x.xyz", 40, 1.0, 0.0, seed=1)
    config = config_of({"a": tmp_path / "x.xyz"}, tmp_path / "run")
    (tmp_path / "c.yaml").write_text(json.dumps(config, default=str))
    told = CliRunner().invoke(app, ["plan", str(tmp_path / "c.yaml"), "--machine", "perlmutter", "--json"])
    assert told.exit_code == 0 and json.loads(told.stdout)["ranks"] == 1
    (store,) = {path.parent for path in (tmp_path / "cache").rglob("manifest.json")}
    seen = []
    monkeypatch.setattr(study_module, "_study", lambda config, world, console: seen.append(config.tasks["a"].store))
    study_module.study(as_config(config), Console(quiet=True))
    assert [str(path) for path in seen] == [str(store)]
