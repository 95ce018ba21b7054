"""A trained model adapted to new data: how it begins, what moves, and that ranks and restarts change nothing."""

import json
import shutil
import warnings
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import multifid
from conftest import write_molecules
from multifid.config import load_config
from multifid.evaluation.nearest import agreement, ranking
from multifid.evaluation.rows import OLD_TASKS, read_rows
from multifid.evaluation.spread import farthest
from multifid.model.model_file import export_model
from multifid.model.potential import ModelConfig, Potential
from multifid.model.undetermined import StaleBranch
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from multifid.structures.elements import NUMBERS, chemical_neighbours
from multifid.training.finetune import FinetuneConfig, moves_of_encoder
from multifid.workflows.derive import subset
from multifid.workflows.export import export
from multifid.workflows.finetune import refit_references
from multifid.workflows.finetune.curve import learning_curve
from multifid.workflows.finetune.presets import preset
from multifid.workflows.finetune.robustness import of_scan
from multifid.workflows.finetune.subsets import sizes_of
from multifid.workflows.report import gather
from multifid.workflows.report.page import _before_and_after, _milli, render
from test_train import config_of, final_state, start

SHORT = ("train.steps=6", "train.epoch_steps=3", "train.warmup=1", "train.device=cpu")


@pytest.fixture(scope="module")
def parent(stores, tmp_path_factory) -> Path:
    train = {"steps": 150, "epoch_steps": 50, "lr": 5e-3, "device": "cpu"}
    two = {task: {"store": str(stores[task])} for task in ("apple", "berry")}
    values = config_of(stores, tmp_path_factory.mktemp("finetune") / "parent", train=train) | {"tasks": two}
    return start(values)


@pytest.fixture(scope="module")
def fig(tmp_path_factory) -> Store:
    """Data of the depth of apple, whose energies have another zero for each element."""
    folder = tmp_path_factory.mktemp("fig")
    write_molecules(folder / "fig.xyz", 40, 1.0, 7.0, seed=9)
    prepare("extxyz", [folder / "fig.xyz"], folder / "fig", task="fig", trust_units=True, progress=False, talk=False)
    return Store(folder / "fig")


def tuned(parent, store, out, *more, data="fig", **how):
    return multifid.finetune(parent, f"{data}={store.path}", out, [*SHORT, *more], quiet=True, **how)


def test_the_first_step_is_as_good_as_the_model_with_refitted_references(parent, fig, tmp_path):
    """References and scale are others than the old branch's, and what it predicts in eV is not."""
    model = multifid.load(parent)
    near = ranking(model, fig, "fig")[0]
    assert near.branch == "apple"
    frozen = ("train.lr=1e-12", "train.ema=null", "finetune.pull=0")
    result = tuned(parent, fig, tmp_path / "run", *frozen)
    config = load_config(result.run)
    assert config.finetune.branches == {"fig": "apple"} and config.train.steps == 6
    after = agreement(multifid.load(result.run), "fig", fig, "fig")
    assert after.forces_mae == pytest.approx(near.forces_mae, rel=1e-4)
    row = multifid.evaluate(result.run, f"fig={fig.path}", split="train", quiet=True)[0]
    assert row["energy_mae"] == pytest.approx(near.energy_mae, rel=1e-3)
    assert row["forces_mae"] == pytest.approx(near.forces_mae, rel=1e-4)


def test_refitted_references_are_found_to_the_last_digit(parent, fig, tmp_path):
    """Planted: the labels are another branch's predictions, with other energies of the elements."""
    refit_references(parent, f"fig={fig.path}", tmp_path / "refit", start="apple", quiet=True)
    model, old = multifid.load(tmp_path / "refit", precision="fp64"), multifid.load(parent, precision="fp64")
    expected = agreement(old, "apple", fig, "fig").energies
    assert model.description["tasks"]["fig"]["references"] == {str(z): e for z, e in sorted(expected.items())}
    from ase import Atoms

    atoms = Atoms("CHO", [[0, 0, 0], [1.1, 0, 0], [0, 1.2, 0]])
    a, b = model.predict(atoms, "fig"), old.predict(atoms, "apple")
    refs = old.description["tasks"]["apple"]["references"]
    shift = sum(expected[z] - refs[str(z)] for z in (6, 1, 8))
    assert a.energy[0] - b.energy[0] == pytest.approx(shift, abs=1e-9)
    np.testing.assert_allclose(a.forces, b.forces, atol=1e-9)


@pytest.mark.parametrize(
    "moves", [*(pytest.param(m, marks=pytest.mark.full) for m in ("branch", "last")), "lora", "all"]
)
def test_what_moves_is_what_was_said(parent, fig, tmp_path, moves):
    result = tuned(parent, fig, tmp_path / "run", f"finetune.moves={moves}", "finetune.rank=2", "train.lr=1e-2")
    old, new = load_file(parent / "model.safetensors"), load_file(result.run / "last.safetensors")
    assert {n for n in new if not n.startswith("branches.fig")} == set(old)
    moved = {n for n in old if n.startswith("encoder.") and not torch.equal(old[n], new[n])}
    encoder = {n for n in old if n.startswith("encoder.")}
    if moves == "branch":
        assert not moved
    if moves == "last":
        assert moved and "encoder.embedding.element.weight" not in moved
    if moves == "lora":
        assert moved and all(old[n].dim() == 2 and not n.startswith("encoder.embedding") for n in moved)
        change = (new[n := max(moved, key=lambda n: min(old[n].shape))] - old[n]).double()
        assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 2, n
    if moves == "all":
        assert len(moved) > len(encoder) // 2
    model = multifid.load(result.run)
    assert model.tasks == ["apple", "berry", "fig"], "the old branches are kept"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.task("apple")
    assert bool(said) == (moves != "branch") and all(w.category is StaleBranch for w in said)


def test_what_is_chosen_goes_by_what_moves_and_gives_way_to_what_is_said(parent, fig, tmp_path):
    """Thin matrices learn faster than the maps that they are added to, and move far fewer numbers."""
    keys = ("finetune.moves=lora", "finetune.layer_decay=0.5")
    chosen, said = preset(50, moves="lora"), load_config(tuned(parent, fig, tmp_path / "run", *keys).run)
    assert said.finetune.encoder_lr == chosen["finetune"]["encoder_lr"] > 1.0
    assert said.finetune.rank == chosen["finetune"]["rank"]
    assert (said.finetune.moves, said.finetune.layer_decay) == ("lora", 0.5)
    egnn = {"name": "egnn", "layers": 3, "hidden": 64, "vectors": 8}
    encoder = Potential(ModelConfig(cutoff=4.5, encoder=egnn), ["a"], {"a": "a"}, seed=0).encoder
    whole = sum(p.numel() for p in encoder.parameters())
    moves_of_encoder(encoder, FinetuneConfig(**chosen["finetune"]), seed=0)
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) <= whole / 10


@pytest.mark.parametrize(
    "keys",
    [
        ("finetune.moves=lora", "finetune.pull=0.5"),
        pytest.param(
            ("finetune.moves=last", "train.optimizer=soap", "finetune.layer_decay=0.5"), marks=pytest.mark.full
        ),
        pytest.param(("finetune.moves=branch",), marks=pytest.mark.full),
        pytest.param(("finetune.pull=0.5", "finetune.layer_decay=0.5"), marks=pytest.mark.full),
    ],
)
def test_a_run_goes_on_with_the_same_bits(parent, fig, tmp_path, keys):
    keys = (*keys, "train.checkpoint_every=2", "train.keep=9", "train.lr=1e-2")
    whole = tuned(parent, fig, tmp_path / "whole", *keys).run
    cut = tuned(parent, fig, tmp_path / "cut", *keys).run
    for folder in (cut / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > 2:
            shutil.rmtree(folder)
    assert tuned(parent, fig, cut, *keys).steps == 6
    a, b = final_state(whole)[1], final_state(cut)[1]
    assert a.keys() == b.keys()
    for file in a:
        for name in a[file]:
            assert torch.equal(a[file][name], b[file][name]), name
    first, second = (load_file(run / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_replayed_tasks_are_trained_on_and_not_stale(parent, fig, stores, tmp_path):
    result = tuned(parent, fig, tmp_path / "run", replay=[f"apple={stores['apple']}"])
    model = multifid.load(result.run)
    assert {t: about.get("stale") for t, about in model.description["tasks"].items()} == {
        "apple": None,
        "berry": True,
        "fig": None,
    }
    before, after = read_rows(result.run, OLD_TASKS)
    assert (before["model"], after["model"], after["data"]) == ("before", "after", "apple")
    with pytest.warns(StaleBranch, match="'berry' is stale"):
        multifid.evaluate(result.run, f"berry={stores['berry']}", quiet=True)
    content = gather(result.run, 2)
    assert any("'berry' is stale" in text for text in content.warnings)
    [row] = _before_and_after(content.old_tasks)
    assert row["forces_after"] == _milli(after["forces_mae"]) != row["forces_before"]


def test_a_replay_store_beside_a_model_file_is_found_and_bound_to_its_model(parent, fig, tmp_path):
    model = export(parent, tmp_path / "parent.mfid", replay=8)
    again = export(parent, tmp_path / "again.mfid", tasks=["apple"], replay=8)
    small = {task: Store(tmp_path / "parent.replay" / task) for task in ("apple", "berry")}
    assert {t: (s.size("train"), s.size("validation")) for t, s in small.items()} == dict.fromkeys(small, (8, 2))
    assert Store(tmp_path / "again.replay" / "apple").content == small["apple"].content, "the same are chosen again"
    run = tuned(model, fig, tmp_path / "run", replay=["auto"]).run
    about = multifid.load(run).description["tasks"]
    before = multifid.load(parent).description["tasks"]
    for task in small:
        assert "stale" not in about[task] and about[task]["again"]["structures"] == 8
        assert about[task]["references"] == before[task]["references"]
        assert about[task]["structures"] == before[task]["structures"]
        assert load_config(run).tasks[task].store == str(small[task].path)
    with pytest.raises(ValueError, match=r"--replay auto: there is no .*again2.replay"):
        tuned(again.rename(tmp_path / "again2.mfid"), fig, tmp_path / "none", replay=["auto"])
    with pytest.raises(ValueError, match="was made for another model"):
        tuned(run, fig, tmp_path / "none", data="other", replay=[str(tmp_path / "parent.replay")])


def test_the_farthest_points_cover_all_clusters():
    points = np.concatenate([np.random.default_rng(k).normal(10 * k, 0.1, (n, 3)) for k, n in enumerate((90, 5, 3, 2))])
    chosen = farthest(points, 4)
    assert sorted(np.searchsorted([90, 95, 98], chosen, side="right")) == [0, 1, 2, 3]
    assert len(farthest(points, 1000)) == len(set(farthest(points, 1000))) == 100


@pytest.mark.full
def test_distilled_branches_are_trained_on_what_the_start_model_says(parent, fig, stores, tmp_path):
    how = {"cache": tmp_path / "cache"}
    run = tuned(parent, fig, tmp_path / "run", "train.lr=1e-4", distil="new", **how).run
    labels = Store(load_config(run).tasks["berry"].store)
    assert labels.structures == fig.structures and set(labels.tasks) == {"apple", "berry"}
    said = multifid.load(parent, precision="fp64").predict(_atoms(fig.read([0, 3])), "berry")
    held = labels.read([0, 3]).labels["berry"]
    np.testing.assert_allclose(held.energy, said.energy, rtol=1e-12)
    np.testing.assert_allclose(held.forces, np.concatenate(said.forces), atol=1e-6)
    about = multifid.load(run).description["tasks"]
    assert not any(about[t].get("stale") for t in about)
    with pytest.raises(ValueError, match="was made for another model"):
        tuned(run, fig, tmp_path / "other", data="other", distil=str(labels.path), **how)
    replay = [f"{task}={stores[task]}" for task in ("apple", "berry")]
    with pytest.raises(ValueError, match="none of these is left to distil"):
        tuned(parent, fig, tmp_path / "none", distil=str(labels.path), replay=replay, **how)


@pytest.mark.full
def test_distilled_branches_stay_nearer_to_the_start_model_on_other_structures(parent, fig, tmp_path):
    """Structures of a file without labels; and what was measured is kept with the run, not with the start model."""
    write_molecules(tmp_path / "other.xyz", 60, 1.0, 7.0, seed=21)
    atoms = ase.io.read(tmp_path / "other.xyz", index=":")
    for one in atoms:
        one.calc = None
    ase.io.write(tmp_path / "bare.xyz", atoms[:40])
    keys = ("train.steps=60", "train.epoch_steps=30", "train.lr=5e-3")
    held = tuned(parent, fig, tmp_path / "held", *keys, distil=tmp_path / "bare.xyz", cache=tmp_path / "cache").run
    free = tuned(parent, fig, tmp_path / "free", *keys).run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleBranch)
        for task in ("apple", "berry"):
            here, there, before = (multifid.load(m).predict(atoms[40:], task) for m in (held, free, parent))
            moved = [np.abs(np.concatenate(m.forces) - np.concatenate(before.forces)).mean() for m in (here, there)]
            assert moved[0] < 0.7 * moved[1], (task, moved)
    assert not any(about.get("stale") for about in multifid.load(held).description["tasks"].values())
    assert not any(row["model"] in ("before", "after") for row in [*read_rows(parent), *read_rows(held)])


def test_dimers_whose_energy_falls_are_found():
    far = np.linspace(1.4, 0.7, 26)
    assert of_scan("C-O", far, 1 / far).falls_below is None
    hole = of_scan("C-O", far, np.where(far < 1.0, 1.0 - (1.0 - far), 1 / far))
    assert hole.falls_below == pytest.approx(1.008) and hole.depth == pytest.approx(1 / 1.008 - 0.7)
    assert of_scan("C-O", far, np.where(far < 0.8, np.nan, 1 / far)).depth == np.inf


@pytest.mark.full
def test_dimers_and_other_files_are_compared_before_and_after(parent, fig, tmp_path):
    write_molecules(tmp_path / "hot.xyz", 6, 1.0, 7.0, seed=10)
    how = {"check": [tmp_path / "hot.xyz"], "trust_units": True, "cache": tmp_path / "cache"}
    run = tuned(parent, fig, tmp_path / "run", **how).run
    held = json.loads((run / "robustness.json").read_text())
    assert [d["pair"] for d in held["dimers"]["fig"]["after"]] == ["H-H", "H-C", "H-O", "C-C", "C-O", "O-O"]
    assert [row["model"] for row in held["checks"]] == ["before", "after"]
    assert all(row["forces_mae"] > 0 and row["structures"] == 6 for row in held["checks"])
    assert all(row["references"] == "fitted to these data" for row in held["checks"])
    frames = ase.io.read(tmp_path / "hot.xyz", ":")
    for atoms in frames:  # other software's zero of energy is no error
        atoms.calc.results["energy"] += float(atoms.numbers.sum())
    ase.io.write(tmp_path / "hot.xyz", frames)
    again = json.loads((tuned(parent, fig, tmp_path / "again", **how).run / "robustness.json").read_text())
    for one, other in zip(held["checks"], again["checks"], strict=True):
        assert one["energy_mae"] == pytest.approx(other["energy_mae"], rel=1e-6) and one["energy_mae"] < 0.5
    content = gather(run, 2)
    [row] = _before_and_after(content.checks)
    assert [row["forces_before"], row["forces_after"]] == [_milli(r["forces_mae"]) for r in held["checks"]]
    [(title, pairs)] = content.scans
    assert f"of {len(held['dimers']['fig']['after'])} pairs" in title
    page = render(content)
    assert "Data unlike the new ones" in page and title in page and all(f"<td>{pair[0]}</td>" in page for pair in pairs)


def test_training_on_keeps_the_old_branches_without_the_start_model(parent, fig, tmp_path):
    """Also a fine-tuning that was stopped, and is finished by `train`, has them, and each predicts as it did."""
    old = export_model(parent, tmp_path / "parent.mfid")
    once = ("finetune.moves=branch", "train.checkpoint_every=2", "train.keep=9")
    stop = [lambda rows: rows[0]["step"] >= 3]
    run = tuned(tmp_path / "parent.mfid", fig, tmp_path / "run", *once, "train.log_every=3", callbacks=stop).run
    before = multifid.load(tmp_path / "parent.mfid")
    (tmp_path / "parent.mfid").unlink()
    for _ in range(2):  # goes on; is complete, and writes its model anew
        multifid.train(load_config(run), quiet=True)
        model = multifid.load(run)
        assert model.tasks == ["apple", "berry", "fig"]
        for name in ("model", "last"):
            tensors = load_file(run / f"{name}.safetensors")
            assert {n.split(".")[1] for n in tensors if n.startswith("branches.")} == {"apple", "berry", "fig"}
        packed = fig.read([0, 3])
        for task in ("apple", "berry"):
            assert model.description["tasks"][task] == old["tasks"][task] | {
                "stale": False,
                "kept_from": str(tmp_path / "parent.mfid"),
            }
            a, b = (m.predict(_atoms(packed), task) for m in (before, model))
            np.testing.assert_array_equal(a.energy, b.energy)


def _atoms(packed):
    from ase import Atoms

    ends = np.cumsum(packed.natoms)
    return [
        Atoms(packed.numbers[e - n : e], packed.positions[e - n : e]) for e, n in zip(ends, packed.natoms, strict=True)
    ]


def test_a_model_file_is_fine_tuned_to_conservative_forces_and_new_elements(parent, fig, tmp_path):
    export_model(parent, tmp_path / "parent.mfid")
    text = (fig.path.parent / "fig.xyz").read_text().replace("\nO ", "\nS ")
    (tmp_path / "sulfur.xyz").write_text(text)
    result = multifid.finetune(
        tmp_path / "parent.mfid",
        f"sulfur={tmp_path / 'sulfur.xyz'}",
        tmp_path / "run",
        [*SHORT, "model.branch.forces=conservative"],
        trust_units=True,
        cache=tmp_path / "cache",
        quiet=True,
    )
    model = multifid.load(result.run)
    assert model.is_conservative("sulfur") and model.elements("sulfur") == ["H", "C", "S"] and model.tasks == ["sulfur"]
    with pytest.raises(ValueError, match=r"has never seen S .*--no-new-elements"):
        again = [f"sulfur={tmp_path / 'sulfur.xyz'}"]
        cache = {"trust_units": True, "cache": tmp_path / "cache", "quiet": True}
        multifid.finetune(parent, again, tmp_path / "other", SHORT, new_elements=False, **cache)


def test_what_cannot_be_is_refused_and_leaves_nothing(parent, fig, tmp_path):
    def refused(words, *more, data=f"fig={fig.path}", **how):
        with pytest.raises(ValueError, match=words):
            multifid.finetune(parent, data, tmp_path / "run", [*SHORT, *more], quiet=True, **how)
        assert not (tmp_path / "run").exists()

    refused("has a task 'apple' already.*NAME=", data=f"apple={fig.path}")
    refused(
        "no linear map of the encoder has 'attention'.*it has layers", "finetune.moves=lora", "finetune.maps=attention"
    )
    refused("--from pear: the model has apple, berry", start="pear")
    refused("--replay pear=.*the model has the tasks", replay=[f"pear={fig.path}"])
    refused("there is no store and no file", data=f"fig={tmp_path / 'nowhere.xyz'}")
    write_molecules(tmp_path / "two.xyz", 2, 1.0, 0.0, seed=1)
    two = {"trust_units": True, "cache": tmp_path / "cache"}
    refused("split", data=f"two={tmp_path / 'two.xyz'}", **two)


def test_the_nearest_elements_are_of_the_same_column():
    known = [NUMBERS[s] for s in ("H", "C", "N", "O", "F", "Si", "Cl", "Br", "Fe", "La")]
    near = {"S": ["O"], "P": ["N"], "I": ["Br"], "Ge": ["Si"], "Ru": ["Fe"], "Na": ["H"], "U": ["La"], "He": ["H"]}
    for symbol, others in near.items():
        assert chemical_neighbours(NUMBERS[symbol], known) == [NUMBERS[s] for s in others], symbol


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.full)])
def test_any_number_of_ranks_equals_one_process(pool, parent, fig, stores, tmp_path, ranks):
    keys = ("finetune.moves=lora", "finetune.pull=0.5", "train.lr=1e-2", "train.precision=fp64", "train.ema=0.9")
    replay = [f"{task}={stores[task]}" for task in ("apple", "berry")]
    one = tuned(parent, fig, tmp_path / "one", *keys, replay=replay).run
    values = load_config(one).model_dump(mode="json")
    values |= {"run": str(tmp_path / "more"), "parallel": {"placement": "split"}}
    assert pool.run(ranks, "whole_run", values) == [0] * ranks
    a, b = (load_file(run / "last.safetensors") for run in (one, tmp_path / "more"))
    assert set(a) == set(b)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-10, atol=1e-10), name


def ids(store: Store, split: str) -> set[str]:
    return {store.source_id(int(i)) for i in store.pick(split, slice(None))}


def test_subsets_of_one_seed_are_nested(stores, tmp_path):
    parent_store = Store(stores["apple"])
    found = {}
    for size, seed in ((5, 0), (11, 0), (5, 1)):
        sizes = {"train": size, "validation": 3, "test": 0}
        found[size, seed] = subset(parent_store.path, tmp_path / f"{size}-{seed}", sizes=sizes, seed=seed)
    assert [found[k].size("train") for k in found] == [5, 11, 5]
    assert all((s.size("validation"), s.size("test")) == (3, 0) for s in found.values())
    train = {k: ids(store, "train") for k, store in found.items()}
    assert train[5, 0] < train[11, 0] < ids(parent_store, "train")
    assert train[5, 0] != train[5, 1]
    assert ids(found[5, 0], "validation") <= ids(parent_store, "validation")


def test_what_is_no_size_is_refused_before_anything_is_made(parent, fig, tmp_path):
    def refused(words, sizes, **how):
        with pytest.raises(ValueError, match=words):
            learning_curve(parent, f"fig={fig.path}", tmp_path / "run", SHORT, sizes=sizes, quiet=True, **how)
        assert not (tmp_path / "run").exists()

    assert sizes_of(["all", "8", 4], fig) == [4, 8, 32]
    refused("--sizes 33: the train split of .* has 32 structures; say all", ["8", "33"])
    for size in ("0", "1", "-4", "ten", "1.5", ""):
        refused(f"--sizes: '{size}' must be a whole number of at least 2, or all", [size])
    refused("--sizes: 32 is given twice", ["32", "all"])
    refused("--repeat 0: must be a whole number of at least 1", ["8"], repeat=0)
    refused("there is no store and no file", ["8"], tests=["far=nowhere.xyz"])


@pytest.mark.parametrize("sizes", [["8"], pytest.param(["8", "12", "all"], marks=pytest.mark.full)])
def test_a_curve_is_made_of_ordinary_runs_and_goes_on(parent, fig, tmp_path, sizes):
    repeat = len(sizes)
    how = {"sizes": sizes, "repeat": repeat, "tests": [f"again={fig.path}"], "scratch": ["train.lr=0.004"]}
    rows = learning_curve(parent, f"fig={fig.path}", tmp_path / "run", SHORT, quiet=True, **how)
    assert rows is not None and len(rows) == 2 * 2 * len(sizes) * repeat
    assert {(r["model"], r["data"]) for r in rows} == {
        (m, d) for m in ("fine-tuned", "from scratch") for d in ("test", "again")
    }
    one, other = (tmp_path / "run" / "8-0" / name for name in ("fine-tuned", "from-scratch"))
    assert load_config(one).finetune.branches == {"fig": "apple"}
    assert load_config(other).init is None and load_config(other).train.lr == 0.004
    assert load_config(other).tasks == load_config(one).tasks and load_config(other).seed == 0
    independent = multifid.evaluate(one, f"fig={fig.path}", quiet=True)[0]
    mine = next(r for r in rows if (r["model"], r["data"]) == ("fine-tuned", "test"))
    assert mine["energy_mae"] == pytest.approx(independent["energy_mae"], rel=1e-6) and mine["size"] == 8
    assert (tmp_path / "run" / "curve.png").exists()
    before = (one / "last.safetensors").read_bytes(), (one / "model.json").read_bytes()
    again = learning_curve(parent, f"fig={fig.path}", tmp_path / "run", SHORT, quiet=True, **how)
    assert ((one / "last.safetensors").read_bytes(), (one / "model.json").read_bytes()) == before
    assert again == rows == json.loads((tmp_path / "run" / "curve.json").read_text())["rows"]


def test_references_fit_what_the_trained_model_lacks(parent, fig, tmp_path):
    """Independent: no change of the energies of elements makes the squares of the residuals smaller."""
    run = tuned(parent, fig, tmp_path / "run", "train.lr=2e-2").run
    trained_with = load_config(run).finetune.references["fig"]
    model = multifid.load(run, precision="fp64")
    held = {int(z): e for z, e in model.description["tasks"]["fig"]["references"].items()}
    assert any(abs(held[z] - e) > 1e-3 for z, e in trained_with.items())
    packed = fig.read(fig.pick("train", slice(None)))
    atoms = np.split(packed.numbers, np.cumsum(packed.natoms)[:-1])
    counts = np.array([[(one == z).sum() for z in held] for one in atoms], float)
    energies = np.array([model.predict(one, "fig").energy[0] for one in structures(packed)])
    left = (packed.labels["fig"].energy - energies) / packed.natoms
    shift, *_ = np.linalg.lstsq(counts / packed.natoms[:, None], left, rcond=None)
    assert np.abs(shift).max() < 1e-6


def structures(packed):
    from ase import Atoms

    ends = np.cumsum(packed.natoms)[:-1]
    pairs = zip(np.split(packed.numbers, ends), np.split(packed.positions, ends), strict=True)
    return [Atoms(numbers, positions) for numbers, positions in pairs]


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> dict[str, str]:
    """Eight sources of other depths and sizes: task -> store."""
    folder, found = tmp_path_factory.mktemp("eight"), {}
    for k in range(8):
        file, name = folder / f"new{k}.xyz", f"new{k}"
        write_molecules(file, 12 + 4 * k, 0.5 + 0.25 * k, float(k), seed=20 + k)
        prepare("extxyz", [file], folder / name, task=name, trust_units=True, progress=False, talk=False)
        found[name] = f"{name}={folder / name}"
    return found


@pytest.mark.full
@pytest.mark.parametrize("placement", ["split", "replicated"])
@pytest.mark.parametrize("moves", ["branch", "all"])
def test_eight_new_branches_on_two_ranks_equal_one_process(pool, parent, eight, tmp_path, moves, placement):
    keys = (f"finetune.moves={moves}", "train.lr=1e-2", "train.precision=fp64", "train.batch=4", "train.patience=null")
    one = multifid.finetune(parent, list(eight.values()), tmp_path / "one", [*SHORT, *keys], quiet=True).run
    values = load_config(one).model_dump(mode="json")
    values |= {"run": str(tmp_path / "two"), "parallel": {"placement": placement}}
    assert pool.run(2, "whole_run", values) == [0, 0]
    a, b = (load_file(run / "last.safetensors") for run in (one, tmp_path / "two"))
    old = load_file(parent / "model.safetensors")
    assert set(a) == set(b) and len({n.split(".")[1] for n in a if n.startswith("branches.")}) == 10
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-10, atol=1e-10), name
    for name in (n for n in old if n.startswith("encoder.")):
        assert torch.equal(a[name].float(), old[name]) == (moves == "branch") or moves == "all", name
    held = load_config(tmp_path / "two").parallel.placement
    assert held == placement or {tuple(ranks) for ranks in held.values()} == {(0,), (1,)}
