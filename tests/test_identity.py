"""A run goes on with the data that it began with, wherever they lie, and with nothing else."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import write_molecules
from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.feed.stage import stage
from multifid.preparation.prepare import prepare
from multifid.store.manifest import manifest_bytes
from multifid.store.store import Store
from multifid.training.feed import make_draws
from multifid.training.identity import contents_of, refuse_apart
from multifid.training.run import train
from test_train import assert_same_bits, config_of, final_state

SPLIT = {"fractions": (0.6, 0.2, 0.2), "progress": False}
FRAMES = 40


@pytest.fixture
def files(tmp_path) -> Path:
    write_molecules(tmp_path / "a.xyz", FRAMES, 1.0, 0.0, seed=1)
    write_molecules(tmp_path / "b.xyz", FRAMES, 0.8, 1.0, seed=2)
    for name in "ab":
        prepare("extxyz", [tmp_path / f"{name}.xyz"], tmp_path / name, task=name, **SPLIT)
    return tmp_path


def values_of(files: Path, run: str = "run", tasks: str = "ab", **changes) -> dict:
    changes["train"] = {"steps": 10, "epoch_steps": 5, "checkpoint_every": 3, "keep": 9} | changes.get("train", {})
    return config_of({name: files / name for name in tasks}, files / run, **changes)


def go(values: dict, upto: int | None = None) -> tuple[Path, str]:
    """A start of a run, killed after a checkpoint if `upto` says so: its directory, and what it printed."""
    console = Console(record=True, width=1000, file=io.StringIO())
    run = train(parse_config(values, "test"), console).run
    for folder in (run / "checkpoints").iterdir() if upto is not None else ():
        if int(folder.name.removeprefix("step-")) > upto:
            shutil.rmtree(folder)
    return run, console.export_text()


def again(files: Path, name: str, text: str | None = None, **options) -> None:
    """Prepare a store anew at its place, from other text if there is some."""
    if text is not None:
        (files / f"{name}.xyz").write_text(text)
    shutil.rmtree(files / name)
    prepare("extxyz", [files / f"{name}.xyz"], files / name, **({"task": name} | SPLIT | options))


def frames(files: Path, name: str) -> list[str]:
    lines, out = (files / f"{name}.xyz").read_text().splitlines(keepends=True), []
    while lines:
        size = int(lines[0]) + 2
        out.append("".join(lines[:size]))
        lines = lines[size:]
    return out


def scaled(text: str, factor: float) -> str:
    """All labels of a text of frames times a factor."""
    out = []
    for line in text.splitlines():
        parts = line.split()
        if line.startswith("Properties"):
            parts = [f"energy={float(p[7:]) * factor!r}" if p.startswith("energy=") else p for p in parts]
        elif len(parts) == 7:
            parts[4:] = [repr(float(x) * factor) for x in parts[4:]]
        out.append(" ".join(parts))
    return "\n".join(out) + "\n"


def edited(store: Path, edit, version: str = "multifid 9.9") -> None:
    """Another version's manifest of the same data: `edit` changes it."""
    manifest = json.loads((store / "manifest.json").read_text())
    edit(manifest)
    (store / "manifest.json").write_bytes(manifest_bytes(manifest | {"created_by": version}))


REFUSED = {  # what becomes of task b between two starts -> what the refusal says of it
    "labels": r"labels differ: energies, forces \(40 energy, 40 forces in the run.*the scale differs",
    "no forces": r"labels differ: forces \(40 energy, 40 forces in the run, 40 energy now",
    "seed": r"the split differs \(train \d+ .* seed 0 in the run, train .* seed 5 now",
    "order": r"structures differ in .*as in the run: others, or in another order",
    "more": r"structures differ in .*40 of \d+ atoms in the run, 41 of .*\(H C O in the run, H C N O now",
    "references": r"reference energies differ \(most that of O: .* eV in the run, -3\.5 eV now",
}


def change(what: str, files: Path) -> None:
    """Put other data where those of task b lie."""
    text = (files / "b.xyz").read_text()
    match what:
        case "labels":
            again(files, "b", scaled(text, 3.0))
        case "no forces":
            again(files, "b", text.replace(":forces:R:3", ":other:R:3"))
        case "seed":
            again(files, "b", seed=5)
        case "order":
            again(files, "b", "".join(frames(files, "b")[::-1]))
        case "more":
            one = "2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-30.0\nN 0 0 0 0 0 0\nH 0 0 1.1 0 0 0\n"
            again(files, "b", text + one)
        case "references":
            edited(files / "b", lambda manifest: manifest["tasks"]["b"]["references"].update({"8": -3.5}))


@pytest.mark.parametrize("what", REFUSED)
def test_other_data_at_the_same_place_are_refused_with_what_differs(files, what):
    run, _ = go(values_of(files), upto=6)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    change(what, files)
    with pytest.raises(ValueError, match=f"task 'b', .*{REFUSED[what]}") as refused:
        go(values_of(files))
    assert "task 'a'" not in str(refused.value) and "init=" in str(refused.value)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before
    with pytest.raises(ValueError, match="task 'b'"):  # nor under the name of a task that it has
        go(values_of(files, train={"change_tasks": True}))


def test_the_same_data_elsewhere_or_from_another_version_go_on_with_the_same_bits(files):
    """Fitted last bits, a manifest of before, a moved store, a link, a staged copy: the run keeps its own numbers."""
    whole, _ = go(values_of(files, "whole"))

    def last_bits(manifest: dict) -> None:
        about = manifest["tasks"]["b"]
        about["scale"] *= 1 + 1e-12
        about["references"] = {z: e * (1 + 1e-13) for z, e in about["references"].items()}
        manifest.pop("content")  # as before there was one

    go(values_of(files), upto=3)
    edited(files / "b", last_bits)
    assert Store(files / "b").content == Store(stage(Store(files / "b"), files / "near")).content
    go(values_of(files), upto=6)
    (files / "a").rename(files / "elsewhere")
    (files / "a").symlink_to(files / "elsewhere")
    shutil.rmtree(files / "b")
    values = values_of(files)
    values["tasks"]["b"]["store"] = str(next((files / "near").iterdir()))
    run, said = go(values)
    assert_same_bits(whole, run)
    for name in ("model.json", "config.yaml"):
        text = (run / name).read_text().replace(values["tasks"]["b"]["store"], str(files / "b"))
        assert text.replace("/run\n", "/whole\n") == (whole / name).read_text(), name
    assert "began with" not in said


def test_tasks_that_were_drawn_apart_stay_apart_when_their_stores_become_one(files):
    shutil.copytree(files / "b", files / "c")
    values = values_of(files, "whole", "bc")
    values["tasks"]["c"]["labels"] = "b"
    whole, _ = go(values)
    values["run"] = str(files / "run")
    go(values, upto=6)
    shutil.rmtree(files / "c")
    (files / "c").symlink_to(files / "b")
    run, _ = go(values)
    assert_same_bits(whole, run)


def test_a_task_that_joins_brings_its_own_data_and_leaves_the_others_theirs(files):
    go(values_of(files, tasks="a"), upto=6)
    joined, _ = go(values_of(files, train={"change_tasks": True, "steps": 12}))
    state, _ = final_state(joined)
    assert set(state["data"]) == {"a", "b"} and state["data"]["b"]["content"] == Store(files / "b").content.of("b")
    again(files, "b", seed=3)
    with pytest.raises(ValueError, match=r"task 'b', .*the split differs"):
        go(values_of(files, train={"steps": 12}))


def test_a_run_from_before_goes_on_in_its_order_unless_its_model_speaks_against_the_data(files, monkeypatch):
    """Such a run drew by the manifest's checksum, and kept no hashes; its references and counts are in model.json."""

    def of_before(config, sources):
        drawn = zip(sources, make_draws(config, sources), strict=True)
        return [replace(d, order=replace(d.order, content=s.store.checksum)) for s, d in drawn]

    with monkeypatch.context() as before:
        before.setattr("multifid.training.run.make_draws", of_before)
        whole, _ = go(values_of(files, "whole"))
        run, _ = go(values_of(files), upto=6)
    for state in (run / "checkpoints").glob("*/state.json"):
        state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "data"}))
    text = (files / "b.xyz").read_text()
    again(files, "b", scaled(text, 3.0))
    with pytest.raises(ValueError, match=r"task 'b', .*reference energies differ"):
        go(values_of(files))
    again(files, "b", text)
    run, said = go(values_of(files))
    assert "was begun by a version that kept no hashes of its data" in said and str(files / "a") in said
    assert_same_bits(whole, run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_refuses_other_data_and_needs_no_init_again(pool, files, ranks):
    first = values_of(files, "first")
    assert pool.run(1, "whole_run", first) == [0]
    values = values_of(files, init=str(files / "first"), train={"precision": "fp64"})
    whole = values | {"run": str(files / "whole")}
    assert pool.run(1, "whole_run", whole) == [0]
    assert pool.run(ranks, "whole_run", values, 2) == [143] * ranks
    (files / "first").rename(files / "gone")
    assert pool.run(3 - ranks, "whole_run", values, 2) == [143] * (3 - ranks)
    kept = files / "kept"
    (files / "b").rename(kept)
    prepare("extxyz", [files / "b.xyz"], files / "b", task="b", **(SPLIT | {"seed": 4}))
    for said in pool.run(ranks, "error_of", values):
        assert "the split differs" in said and "seed 4 now" in said
    shutil.rmtree(files / "b")
    kept.rename(files / "b")
    assert pool.run(ranks, "whole_run", values) == [0] * ranks
    a, b = (load_file(files / name / "last.safetensors") for name in ("whole", "run"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-9, atol=1e-12) for k in a)


def test_ranks_that_see_other_data_at_one_path_refuse(files):
    """A store on a disk of each host, prepared with another seed on one of them."""
    sources = open_sources(parse_config(values_of(files), "test").tasks)
    first = contents_of(sources)
    refuse_apart(contents_of(sources), json.loads(json.dumps(first)))
    again(files, "b", seed=2)
    here = contents_of(open_sources(parse_config(values_of(files), "test").tasks))
    with pytest.raises(ValueError, match=r"see other data at the stores of b \(split\)"):
        refuse_apart(here, first)
