"""A study compares what it says it compares; evaluation asks the right branch in the right energy space."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from conftest import data_of
from multifid.config import parse_config
from multifid.evaluation.evaluate import evaluate_run, references_row
from multifid.feed.loader import open_sources
from multifid.store.references import References
from multifid.store.store import Store
from multifid.training.run import make_draws
from multifid.workflows.study import models_of, study
from test_train import config_of, start


@pytest.fixture(scope="module")
def two_level(stores, tmp_path_factory) -> Path:
    return start(config_of(stores, tmp_path_factory.mktemp("runs") / "two-level", train={"steps": 10}))


def test_all_models_of_a_study_see_the_same_structures_of_a_dataset_in_every_step(stores, tmp_path):
    config = parse_config(config_of(stores, tmp_path / "study", sampling={"exponent": 0.5}), "test")
    seen = {}
    for model in models_of(config, seed=3):
        for draw in make_draws(model, open_sources(model.tasks)):
            places = [draw.order(*draw.places(step)).tolist() for step in range(7)]
            assert seen.setdefault(draw.name, places) == places
    assert {len(m.tasks) for m in models_of(config, seed=3)} == {1, 3}
    assert len({(m.train.steps, m.train.epoch_steps) for m in models_of(config, seed=3)}) == 1


@pytest.mark.full
def test_a_study_trains_evaluates_and_draws_everything_and_goes_on_where_it_stopped(stores, tmp_path):
    values = config_of(stores, tmp_path / "study", train={"steps": 6, "epoch_steps": 3}, study={"seeds": [0, 1]})
    root = study(parse_config(values, "test"), Console(quiet=True))
    rows = json.loads((root / "evaluation.json").read_text())["rows"]
    models = {"Model-apple", "Model-berry", "Model-cherry", "GFM-Baseline-All", "GFM-MTL-All"}
    wanted = {(m, d, s) for m in models for d in stores for s in (0, 1)} | {("References", d, None) for d in stores}
    assert {(r["model"], r["data"], r.get("seed")) for r in rows} == wanted
    for name in ("tables.md", "table-energy.csv", "table-forces.csv", "tables.json", "matrix.png", "parity-seed-0.png"):
        assert (root / name).stat().st_size > 0
    weights = root / "seed-1" / "Model-berry" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    shutil.rmtree(root / "seed-0" / "GFM-MTL-All")
    study(parse_config(values, "test"), Console(quiet=True))
    again = json.loads((root / "evaluation.json").read_text())["rows"]
    assert weights.stat().st_mtime_ns == before and again == rows
    with pytest.raises(ValueError, match=r"train\.lr"):
        study(parse_config(values | {"train": values["train"] | {"lr": 0.1}}, "test"), Console(quiet=True))


def test_a_model_answers_for_its_task_in_total_energies(stores, two_level, tmp_path):
    """Shift one reference energy of model.json by d eV per carbon: errors become those of the shifted total energy."""
    run = tmp_path / "shifted"
    shutil.copytree(two_level, run)
    store = Store(stores["apple"])
    plain = evaluate_run(run, data_of(str(stores["apple"])))[0]
    about = json.loads((run / "model.json").read_text())
    about["tasks"]["apple"]["references"]["6"] += 1000.0  # so large that every error is the shift
    (run / "model.json").write_text(json.dumps(about))
    shifted = evaluate_run(run, data_of(str(stores["apple"])))[0]
    packed = store.read(np.asarray(store.index("test")))
    carbon = np.add.reduceat((packed.numbers == 6).astype(float), packed.offsets[:-1]) / packed.natoms
    assert abs(shifted["energy_mae"] - 1000 * carbon.mean()) <= plain["energy_mae"] + 1e-6
    assert shifted["forces_mae"] == plain["forces_mae"]


def test_a_model_that_does_not_know_the_data_answers_in_the_datas_aligned_space(stores, tmp_path):
    run = start(config_of({"apple": stores["apple"]}, tmp_path / "apple", train={"steps": 2}))
    row = evaluate_run(run, data_of(str(stores["berry"])))[0]
    assert row["energy_mae"] < 2.0  # the totals of the two stores are 10 eV/atom apart
    assert row["data"] == "berry" and row["model"] == "apple" and row["split"] == "test"


def test_a_two_level_model_must_be_told_which_branch_answers_for_unknown_data(stores, tmp_path):
    some = {t: stores[t] for t in ("apple", "berry")}
    run = start(config_of(some, tmp_path / "run", train={"steps": 2}))
    with pytest.raises(ValueError, match=r"(?s)--data berry=.*--branch apple"):
        evaluate_run(run, data_of(str(stores["cherry"])))
    with pytest.raises(ValueError, match="--branch plum"):
        evaluate_run(run, data_of(str(stores["cherry"])), branch="plum")
    assert evaluate_run(run, data_of(str(stores["cherry"])), branch="berry")[0]["structures"] > 0


def test_elements_that_were_never_seen_are_predicted_and_counted(stores, two_level, tmp_path):
    run = tmp_path / "blind"
    shutil.copytree(two_level, run)
    about = json.loads((run / "model.json").read_text())
    about["tasks"]["apple"]["elements"] = [1, 8]
    (run / "model.json").write_text(json.dumps(about))
    row = evaluate_run(run, data_of(str(stores["apple"])), split="all")[0]
    store = Store(stores["apple"])
    packed = store.read(np.arange(store.structures))
    carbon = np.add.reduceat((packed.numbers == 6).astype(int), packed.offsets[:-1]) > 0
    assert row["unseen_structures"] == carbon.sum() and row["structures"] == store.structures


def test_the_references_row_is_the_spread_of_the_aligned_labels(stores):
    (data,) = data_of(str(stores["berry"]))
    packed = data.store.read(np.asarray(data.store.index("test")))
    references = References.from_manifest(data.store.manifest["tasks"]["berry"])
    table = np.zeros(119)
    for z, energy in references.energies.items():
        table[z] = energy
    aligned = packed.labels["berry"].energy - np.add.reduceat(table[packed.numbers], packed.offsets[:-1])
    row = references_row(data)
    assert row["energy_mae"] == pytest.approx(np.abs(aligned / packed.natoms).mean(), rel=1e-9)
    assert row["forces_mae"] == pytest.approx(np.abs(packed.labels["berry"].forces).mean(), rel=1e-6)
