"""Direct forces made smaller at the end of a run: what validation bears out, in values; energies stay."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import multifid
from multifid.model.undetermined import NoForces
from multifid.training.shrink import FACTORS, factor_of
from test_train import config_of, start


def errors_of(predicted: list[np.ndarray], labels: list[np.ndarray]) -> np.ndarray:
    return np.array([[np.abs(f * p - x).sum() for f in FACTORS] for p, x in zip(predicted, labels, strict=True)])


def test_the_factor_is_that_of_planted_noise():
    generator = np.random.default_rng(0)
    labels = [generator.laplace(size=30) for _ in range(60)]
    noise = [generator.laplace(size=30) for _ in range(60)]
    assert factor_of(errors_of(labels, labels)) == 1.0
    assert factor_of(errors_of([2 * x for x in labels], labels)) == 0.5
    assert factor_of(errors_of(noise, labels)) == 0.0
    half = factor_of(errors_of([x + 0.7 * n for x, n in zip(labels, noise, strict=True)], labels))
    assert 0.3 < half < 0.9
    one_strong = [x * (500.0 if k == 7 else 0.0) + n for k, (x, n) in enumerate(zip(labels, noise, strict=True))]
    strong_labels = [x * (500.0 if k == 7 else 1.0) for k, x in enumerate(labels)]
    assert factor_of(errors_of(one_strong, strong_labels)) == 0.0, "a single structure is no evidence"
    assert factor_of(np.zeros((0, len(FACTORS)))) == 1.0
    at_rest = [np.zeros(30)] * 5
    assert factor_of(errors_of([labels[0], *at_rest], [labels[0], *at_rest])) == 1.0, "only one composition has forces"


@pytest.mark.parametrize("encoder, lr", [("egnn", 0.05), ("schnet", 0.5)], ids=["vectors", "edges"])
def test_forces_are_no_worse_than_zero_and_nothing_else_changes(stores, tmp_path, encoder, lr):
    def run(name: str, **train) -> tuple[dict, Path]:
        values = config_of(stores, tmp_path / name, train={"steps": 4, "precision": "fp64", "lr": lr, **train})
        values["model"]["encoder"] = {"name": encoder, "layers": 1, "hidden": 8}
        return values, start(values)

    _, plain = run("plain")
    values, shrunk = run("shrunk", shrink=True)
    about = json.loads((shrunk / "model.json").read_text())["tasks"]
    for file in ("model.safetensors", "last.safetensors"):
        before, after = load_file(plain / file), load_file(shrunk / file)
        assert all(tensor.dtype == torch.float64 for tensor in after.values())
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        factors = {task: about[task].get("forces_factor", 1.0) for task in about}
        assert min(factors.values()) < 1.0 and all(".forces." in name for name in changed)
        for name in changed:
            assert torch.equal(after[name], before[name] * factors[name.split(".")[1]]), name
    rows = [r for r in multifid.evaluate(shrunk, stores, "validation", quiet=True) if r["model"] != "References"]
    assert rows and all(r["forces_mae"] <= 1.001 * r["zero_forces_mae"] for r in rows)
    for row, was in zip(rows, (r for r in multifid.evaluate(plain, stores, "validation", quiet=True)
                               if r["model"] != "References"), strict=True):  # fmt: skip
        assert row["energy_mae"] == was["energy_mae"]
    held = {path.name: path.read_bytes() for path in shrunk.glob("*.safetensors")}
    start(values)
    assert held == {path.name: path.read_bytes() for path in shrunk.glob("*.safetensors")}, "once only"
    values["train"] |= {"steps": 5, "change_tasks": True}
    start(values)
    later = json.loads((shrunk / "model.json").read_text())["tasks"]
    assert any("forces_factor" in one for one in later.values())


def test_whoever_asks_for_forces_that_were_made_zero_is_told(stores, tmp_path):
    run = start(config_of(stores, tmp_path / "run", train={"steps": 1}))
    path = run / "model.json"
    description = json.loads(path.read_text())
    description["tasks"]["apple"]["forces_factor"] = 0.0
    path.write_text(json.dumps(description))
    from ase.build import molecule

    with pytest.warns(NoForces, match="'apple' are zero"):
        multifid.load(run).predict(molecule("H2O"), task="apple")
