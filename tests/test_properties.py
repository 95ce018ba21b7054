"""Properties beside energies: read, learnt as tasks, measured, predicted, the same on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read, write
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

import multifid
from multifid.config import load_config
from multifid.evaluation.properties import classification, roc_auc
from multifid.model.potential import ModelConfig, Potential
from multifid.model.predictor import Predictor
from multifid.preparation.prepare import prepare
from multifid.preparation.split import folded
from multifid.store.store import Store

PLANTED = ("count:extensive", "meanz:intensive", "dipole=mu:vector", "kind:class:none,some", "q:atom", "v:atom_vector")
NAMES = [text.split(":")[0].split("=")[0] for text in PLANTED]
SHORT = ("train.steps=6", "train.epoch_steps=3", "train.warmup=1", "train.device=cpu")


def planted(path: Path | None, count: int, seed: int) -> list[Atoms]:
    """Molecules whose properties follow from numbers and distances; a tenth has no mean atomic number."""
    rng, frames = np.random.default_rng(seed), []
    for k in range(count):
        n = int(rng.integers(3, 8))
        places = np.zeros((0, 3))
        while len(places) < n:
            trial = rng.uniform(-2.0, 2.0, 3)
            if all(((trial - p) ** 2).sum() > 0.81 for p in places):
                places = np.vstack([places, trial])
        atoms = Atoms(rng.choice([1, 6, 8], n), places)
        z, d = atoms.numbers, places[None] - places[:, None]
        r = np.linalg.norm(d, axis=-1) + np.eye(n)
        near = np.exp(-r) * (1 - np.eye(n)) * (z[None] - 0.5 * z[:, None])
        atoms.arrays |= {"q": near.sum(axis=1), "v": (near[..., None] * d).sum(axis=1)}
        atoms.info |= {"count": float(n), "meanz": np.nan if k % 10 == 3 else z.mean(), "mu": atoms.arrays["v"].sum(0)}
        atoms.info["kind"] = "some" if 8 in z else "none"
        frames.append(atoms)
    if path is not None:
        write(path, frames)
    return frames


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("properties")
    planted(folder / "planted.xyz", 120, seed=0)
    prepare("extxyz", [folder / "planted.xyz"], folder / "store", options={"properties": PLANTED}, progress=False)
    return folder


@pytest.fixture(scope="module")
def run(data) -> Path:
    """All six learnt at once, from fresh weights."""
    values = {
        "run": str(data / "run"),
        "tasks": {name: {"store": str(data / "store")} for name in NAMES},
        "model": {
            "cutoff": 4.0,
            "encoder": {"name": "painn", "layers": 1, "hidden": 16},
            "branch": {"hidden": [16, 16]},
        },
        "train": {"lr": 1e-2, "batch": 16, "steps": 60, "epoch_steps": 30, "warmup": 5, "device": "cpu"},
    }
    return multifid.train(values).run


def test_a_store_has_what_the_file_says_and_what_composition_says_of_it(data):
    store, frames = Store(data / "store"), read(data / "planted.xyz", ":")
    packed, about = store.read(np.arange(store.structures)), store.manifest["tasks"]
    assert np.array_equal(packed.labels["meanz"].value, [f.info["meanz"] for f in frames], equal_nan=True)
    assert np.array_equal(packed.labels["dipole"].value, [f.info["mu"] for f in frames])
    assert np.allclose(packed.labels["v"].value, np.concatenate([f.arrays["v"] for f in frames]), atol=1e-6)
    assert packed.labels["kind"].value.tolist() == [float(f.info["kind"] == "some") for f in frames]
    assert about["meanz"]["labels"]["intensive"] == 108 and about["meanz"]["complete"] == []
    train = store.index("train")
    known = [frames[i] for i in train]
    means = np.array([f.info["meanz"] for f in known])
    assert about["meanz"]["references"]["6"] == pytest.approx(np.nanmean(means), rel=1e-12)
    assert about["meanz"]["scale"] == pytest.approx(np.nanstd(means), rel=1e-12)
    assert list(about["count"]["references"].values()) == pytest.approx([1.0] * 3)  # one for each atom
    of_oxygen = np.concatenate([f.arrays["q"][f.numbers == 8] for f in known])
    assert about["q"]["references"]["8"] == pytest.approx(of_oxygen.mean(), rel=1e-5)
    assert about["kind"]["property"]["counts"][1] == sum(f.info["kind"] == "some" for f in known)
    files = store.manifest["files"]
    assert files["labels/q/atom.npy"]["dtype"] == "<f4" and "labels/q/energy.npy" not in files


def test_what_was_planted_is_found(run):
    rows = {row["data"]: row for row in multifid.evaluate(run, run.parent / "store", quiet=True)}
    assert rows["kind"]["accuracy"] >= 0.9 and rows["kind"]["roc_auc"] > 0.9
    assert rows["kind"]["accuracy"] > rows["kind"]["zero_accuracy"]
    for name in ("meanz", "dipole", "v"):
        assert rows[name]["property_mae"] < 0.6 * rows[name]["zero_property_mae"] and rows[name]["r2"] > 0.7, name
    assert rows["q"]["property_mae"] < 0.8 * rows["q"]["zero_property_mae"]
    assert rows["count"]["property_mae"] < 0.2 and rows["count"]["r2"] > 0.95


@pytest.mark.full
def test_metrics_are_those_of_the_predictions(run, data, tmp_path):
    """Rows of evaluate beside the same numbers from what predict writes; a file of a task is read as that task."""
    from multifid.apply.predict import predict

    frames = planted(tmp_path / "test.xyz", 25, seed=5)
    rows = {}
    for name in ("meanz", "q", "kind"):
        asked = {name: tmp_path / "test.xyz"}
        [rows[name]] = multifid.evaluate(run, asked, quiet=True, cache=tmp_path / "cache")
        predict(run, [tmp_path / "test.xyz"], tmp_path / f"{name}.xyz", name)
    found = {name: read(tmp_path / f"{name}.xyz", ":") for name in rows}
    errors = np.array([a.info["meanz"] - b.info["meanz"] for a, b in zip(found["meanz"], frames, strict=True)])
    assert rows["meanz"]["property_mae"] == pytest.approx(np.nanmean(np.abs(errors)), rel=1e-4)
    q, true = (np.concatenate([a.arrays["q"] for a in some]) for some in (found["q"], frames))
    assert rows["q"]["property_rmse"] == pytest.approx(np.sqrt(np.mean((q - true) ** 2)), rel=1e-4)
    assert rows["q"]["r2"] == pytest.approx(1 - np.sum((q - true) ** 2) / np.sum((true - true.mean()) ** 2), rel=1e-3)
    right = [a.info["kind"] == b.info["kind"] for a, b in zip(found["kind"], frames, strict=True)]
    assert rows["kind"]["accuracy"] == pytest.approx(np.mean(right))
    assert found["kind"][0].info["kind_probabilities"].sum() == pytest.approx(1.0, abs=1e-6)
    assert found["q"][0].calc is None  # no energy is claimed


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("encoder", ["painn", "schnet"])  # with vectors, and without
def test_copies_and_turned_structures_have_what_their_kind_says(encoder, forces):
    kinds = {text.split(":")[0].split("=")[0]: text.split(":")[1] for text in PLANTED}
    properties = {name: {"kind": kind, "classes": 2 * (kind == "class")} for name, kind in kinds.items()}
    config = ModelConfig.model_validate(
        {
            "cutoff": 4.0,
            "encoder": {"name": encoder, "layers": 2, "hidden": 16},
            "branch": {"hidden": [16, 16], "forces": forces},
            "properties": properties,
        }
    )
    potential = Potential(config, list(kinds), {name: name for name in kinds}, seed=3)
    about = {
        name: {
            "branch": name, "elements": [1, 6, 8], "references": {"1": 0.3, "6": 0.3, "8": 0.3}, "scale": 2.0,
            "undetermined": [], "property": {"kind": kind, "key": name, "classes": ["a", "b"] * (kind == "class")},
        }
        for name, kind in kinds.items()
    }  # fmt: skip
    model = Predictor(potential, {"tasks": about, "cutoff": 4.0}, dtype=torch.float64)
    one = planted(None, 1, seed=8)[0]
    far, turned = one.copy(), one.copy()
    far.positions += [0.0, 0.0, 50.0]
    turn = Rotation.random(rng=1).as_matrix()
    turned.positions = turned.positions @ turn.T + 2.0
    for name, kind in kinds.items():
        alone, both, other = model.predict([one, one + far, turned], name).value, None, None
        alone, both, other = (np.asarray(x, dtype=None) for x in alone)
        if kind == "class":
            p = model.predict([one, one + far, turned], name).probabilities
            assert np.allclose(p, p[0], atol=1e-10)
            continue
        vectors = kind in ("vector", "atom_vector")
        expected = alone @ turn.T if vectors else alone
        assert np.allclose(other, expected, atol=1e-10) and np.abs(alone).max() > 1e-3, name
        copies = {"extensive": 2 * alone, "vector": 2 * alone, "intensive": alone}
        assert np.allclose(both, copies.get(kind, np.concatenate([alone, alone]) if alone.ndim else alone), atol=1e-10)


def test_the_area_under_the_curve_is_the_part_of_pairs_in_order():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 40)
    p = np.round(rng.dirichlet(np.ones(3), 40), 1)  # with ties
    pairs = []
    for k in range(3):
        inside, outside = p[label == k, k], p[label != k, k]
        order = np.sign(inside[:, None] - outside[None])
        pairs.append((order > 0).mean() + 0.5 * (order == 0).mean())
    assert roc_auc(p, label) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert roc_auc(p, np.zeros(40, np.int64)) is None
    perfect = classification(np.eye(3)[label] * 0.8 + 0.2 / 3, label)
    assert perfect["accuracy"] == perfect["roc_auc"] == 1.0


def test_a_table_beside_files_is_the_same_store(data, tmp_path):
    frames = read(data / "planted.xyz", ":20")
    lines = ["file,meanz,kind"]
    for k, frame in enumerate(frames):
        write(tmp_path / f"{k}.xyz", Atoms(frame.numbers, frame.positions), format="xyz")
        gap = "" if np.isnan(frame.info["meanz"]) else f"{frame.info['meanz']:.17g}"
        lines.append(f"{k}.xyz,{gap},{frame.info['kind']}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    options = {"properties": ["meanz:intensive", "kind:class:none,some"]}
    prepare("csv", [tmp_path / "table.csv"], tmp_path / "store", options=options, progress=False)
    store = Store(tmp_path / "store")
    values = store.read(np.arange(20)).labels
    assert np.array_equal(values["meanz"].value, [f.info["meanz"] for f in frames], equal_nan=True)
    assert values["kind"].value.tolist() == [float(f.info["kind"] == "some") for f in frames]
    assert store.source_id(3) == "3.xyz"


def test_each_structure_is_tested_in_one_fold_and_never_beside_its_relatives():
    relative = np.random.default_rng(1).integers(0, 40, 300).astype(np.uint64)
    tested = np.zeros(300, int)
    for k in range(5):
        split = folded(relative, np.zeros(300, int), "formula", (k, 5), (0.8, 0.1, 0.1), seed=0).split
        tested += split == 2
        assert 30 < (split == 2).sum() < 90 and all((split == code).any() for code in range(3))
        assert all(len(set(split[relative == r].tolist())) == 1 for r in set(relative.tolist()))
    assert (tested == 1).all()
    with pytest.raises(ValueError, match="fold 5 of 5"):
        folded(relative, np.zeros(300, int), "formula", (5, 5), (0.8, 0.1, 0.1), seed=0)


def test_what_cannot_be_read_is_named_with_what_is_there(data, tmp_path):
    def refused(words, *properties, file="planted.xyz", format="extxyz", **options):
        with pytest.raises(ValueError, match=words):
            prepare(
                format, [data / file], tmp_path / "no", options={"properties": properties} | options, progress=False
            )

    refused(r"planted.xyz: no record has 'gap'.*there are species, pos, q, v, count, meanz", "gap:intensive")
    refused(r"planted.xyz, frame \d+: kind = '\w+' is none of the classes red, blue", "kind:class:red,blue")
    refused(r"kind = '\w+' is no number of a class", "kind:class")
    refused(r"q has a wrong shape|is not one number", "q:intensive")
    refused(r"property 'q:colour' must be NAME\[=KEY\]:KIND", "q:colour")
    refused("two properties are called q", "q:atom", "q=v:atom_vector")
    refused("leave out energy_key", "q:atom", energy_key="count")


@pytest.mark.full
def test_a_property_begins_on_a_trained_encoder_beside_what_is_replayed(run, data, tmp_path):
    """A new task, an old one replayed, old branches kept; names that are taken and one class alone are errors."""
    frames = planted(tmp_path / "new.xyz", 40, seed=3)
    for frame in frames:
        frame.info = {"width": float(np.ptp(frame.positions[:, 0])), "same": 1}
    write(tmp_path / "new.xyz", frames)
    how = {"cache": tmp_path / "cache", "quiet": True}
    options = {"properties": ["width:intensive"]}
    result = multifid.finetune(
        run, tmp_path / "new.xyz", tmp_path / "run", SHORT, replay=[f"q={data / 'store'}"], options=options, **how
    )
    config = load_config(result.run)
    assert config.finetune.branches == {"width": None} and set(config.tasks) == {"q", "width"}
    assert config.model.properties["width"].kind == "intensive"
    model = multifid.load(result.run)
    assert set(model.tasks) == set(NAMES) | {"width"}  # old branches stay
    out = model.predict(frames[:3], "width")
    assert out.value.shape == (3,) and np.isfinite(out.value).all() and out.energy is None
    with pytest.raises(ValueError, match=r"predicts a property .intensive., no energies"):
        model.calculator("width")
    assert multifid.load(run).property_of("kind").classes == ("none", "some")

    def refused(words, *properties, data=f"{tmp_path / 'new.xyz'}", **more):
        with pytest.raises(ValueError, match=words):
            multifid.finetune(run, data, tmp_path / "no", SHORT, options={"properties": properties}, **how, **more)
        assert not (tmp_path / "no").exists()

    refused("has a task 'q' already", "q=width:intensive")
    refused(r"task same: every labelled structure .* is of one class \(1\)", "same:class")
    refused("width is a property .intensive.", "width:intensive", start="q")


@pytest.mark.full
def test_folds_are_runs_whose_errors_are_kept(run, data, tmp_path):
    from multifid.workflows.finetune.folds import cross_validate

    how = {"options": {"properties": ["z=meanz:intensive"]}, "cache": tmp_path / "cache", "quiet": True}
    rows = cross_validate(run, data / "planted.xyz", tmp_path / "run", SHORT, folds=3, **how)
    assert [row["fold"] for row in rows] == [0, 1, 2] and sum(row["structures"] for row in rows) == 108
    assert len(json.loads((tmp_path / "run" / "folds.json").read_text())["rows"]) == 3


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_equals_one_process(pool, run, data, tmp_path, ranks):
    values = load_config(run).model_dump(mode="json")
    values["train"] |= {"steps": 8, "epoch_steps": 4, "precision": "fp64"}
    values["parallel"]["placement"] = "replicated"
    one = multifid.train(values | {"run": str(tmp_path / "one")}).run
    assert pool.run(ranks, "whole_run", values | {"run": str(tmp_path / "more")}) == [0] * ranks
    a, b = (load_file(folder / "last.safetensors") for folder in (one, tmp_path / "more"))
    assert set(a) == set(b)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-10, atol=1e-10), name


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "placement"), [(2, "split"), (3, "replicated"), (3, "split")])
def test_fine_tuning_to_properties_on_any_number_of_ranks_equals_one_process(
    pool, run, data, tmp_path, ranks, placement
):
    """New properties of two kinds with low-rank additions to the encoder, beside an old one that is replayed."""
    keys = (*SHORT, "finetune.moves=lora", "finetune.pull=0.5", "train.precision=fp64", "train.ema=0.9")
    options = {"properties": ["z=meanz:intensive", "push=v:atom_vector"]}
    how = {"replay": [f"q={data / 'store'}"], "options": options, "cache": tmp_path / "cache", "quiet": True}
    one = multifid.finetune(run, data / "planted.xyz", tmp_path / "one", keys, **how).run
    values = load_config(one).model_dump(mode="json")
    assert set(values["tasks"]) == {"z", "push", "q"}
    values |= {"run": str(tmp_path / "more"), "parallel": {"placement": placement}}
    assert pool.run(ranks, "whole_run", values) == [0] * ranks
    a, b = (load_file(folder / "last.safetensors") for folder in (one, tmp_path / "more"))
    start = load_file(run / "model.safetensors")
    assert set(a) == set(b) and any(not torch.equal(a[n], start[n].to(a[n].dtype)) for n in a if n in start)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-10, atol=1e-10), name


@pytest.mark.full
def test_a_run_that_goes_on_ends_with_the_same_bits(run, tmp_path):
    values = load_config(run).model_dump(mode="json")
    values["train"] |= {"steps": 12, "epoch_steps": 4, "checkpoint_every": 1}
    whole = multifid.train(values | {"run": str(tmp_path / "whole")}).run

    def stop(rows):
        return "enough" if rows[0]["step"] >= 8 else None

    values |= {"run": str(tmp_path / "parts")}
    assert not multifid.train(values, callbacks=[stop]).complete
    parts = multifid.train(values).run
    assert (whole / "last.safetensors").read_bytes() == (parts / "last.safetensors").read_bytes()
