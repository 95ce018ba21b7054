"""Nothing is claimed that does not exist: what begins a run's NaN is named, and a run without a model is an error."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from multifid.config import parse_config
from multifid.model.potential import Potential
from multifid.model.saved import load_potential
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from multifid.training.checkpoint import load_checkpoint
from multifid.training.run import train
from multifid.training.step import Trainer
from test_train import assert_same_bits, config_of, start


def strict(path: Path):
    """A JSON file, or lines of it, without NaN and Infinity."""
    texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [json.loads(text, parse_constant=pytest.fail) for text in texts]


def plant(monkeypatch, store: Path, task: str, index: int, kind: str, steps=range(10**6), value=torch.nan) -> None:
    """The prediction of one structure is not finite, in those calls of the potential that `steps` holds."""
    place = torch.from_numpy(Store(store).read([index]).positions)
    calls = iter(range(10**6))

    def forward(self, batch, stress=False, original=Potential.forward):
        out, call = original(self, batch, stress), next(calls)
        if task in out and call in steps:
            structures, atoms = batch.slices[task]
            first = atoms.start
            for s, n in enumerate(batch.natoms[structures].tolist()):
                if n == len(place) and torch.equal(batch.positions[first : first + n].float(), place):
                    getattr(out[task], kind)[s if kind == "energy" else slice(first - atoms.start, None)] += value
                first += n
        return out

    monkeypatch.setattr(Potential, "forward", forward)


def run_of(stores, run: Path, **train_changes) -> dict:
    return config_of(
        stores, run, train={"steps": 8, "epoch_steps": 4, "log_every": 2, "checkpoint_every": 2, **train_changes}
    )


@pytest.mark.parametrize("kind", ["energy", "forces"])
def test_a_run_without_a_finite_validation_value_is_an_error_that_names_what_began_it(
    stores, tmp_path, monkeypatch, kind
):
    """And the same again, when it is started again."""
    bad = int(Store(stores["berry"]).pick("validation", slice(3, 4))[0])
    plant(monkeypatch, stores["berry"], "berry", bad, kind)
    values = run_of(stores, tmp_path / "run")
    for _ in range(2):
        with pytest.raises(FloatingPointError) as said:
            start(values)
        text = str(said.value)
        assert f"task berry: the {kind} of structure {bad} of {stores['berry']} (berry.xyz: " in text
        assert "there is no model" in text and "step-000008 is whole" in text and "model.safetensors" not in text
    assert "task berry" in (tmp_path / "run" / "train.log").read_text()
    assert not list((tmp_path / "run").glob("*.safetensors")) and not (tmp_path / "run" / "model.json").exists()
    with pytest.raises(ValueError, match="the run has no model yet"):
        load_potential(tmp_path / "run")
    state = strict(tmp_path / "run" / "checkpoints" / "step-000008" / "state.json")[0]
    assert state["position"]["best"] is None and state["schedule"]["best"] == {"float": "inf"}
    rows = strict(tmp_path / "run" / "metrics.jsonl")
    assert {r["loss"] for r in rows if r["split"] == "validation" and r["task"] == "berry"} == {None}


def test_a_run_that_was_finite_once_says_so_and_keeps_its_model(stores, tmp_path, monkeypatch):
    bad = int(Store(stores["apple"]).pick("validation", slice(0, 1))[0])
    calls = []  # of the first epoch and its validation
    with monkeypatch.context() as counted:
        forward = Potential.forward
        counted.setattr(Potential, "forward", lambda *inputs, **more: calls.append(0) or forward(*inputs, **more))
        start(run_of(stores, tmp_path / "plain", steps=4))
    plant(monkeypatch, stores["apple"], "apple", bad, "energy", range(len(calls), 10**6), torch.inf)
    start(run_of(stores, tmp_path / "run"))
    text = (tmp_path / "run" / "train.log").read_text()
    assert f"validation at step 8: task apple: the energy of structure {bad}" in text
    assert "model.safetensors is of step 4, whose value is; last.safetensors is of step 8" in text
    _, description = load_potential(tmp_path / "run")
    assert strict(tmp_path / "run" / "model.json") and np.isfinite(description["trained"]["best"])


def test_steps_that_stay_not_finite_name_the_structure_and_the_checkpoint_that_is_whole(stores, tmp_path, monkeypatch):
    """NaN in a prediction: |x| has the slope 0 there, so the gradient is finite and the loss is not."""
    train_split = Store(stores["cherry"]).pick("train", slice(None))
    for index in train_split:  # in every step from the fifth call on: there is one call in a step
        plant(monkeypatch, stores["cherry"], "cherry", int(index), "forces", range(4, 10**6))
    values = run_of(stores, tmp_path / "run", steps=60, epoch_steps=60, nonfinite=2)
    with pytest.raises(FloatingPointError) as said:
        start(values)
    text = str(said.value)
    assert "step 7: loss or gradient was not finite 3 times in a row" in text and "step-000006 is whole." in text
    assert (
        "What began it: task cherry: the forces of structure" in text and f"of {stores['cherry']} (cherry.xyz: " in text
    )
    state, _, _ = load_checkpoint(tmp_path / "run")
    assert state["step"] == 6 and state["updates"] == 4


def test_there_is_no_word_of_a_checkpoint_where_there_is_none(stores, tmp_path, monkeypatch):
    for task in stores:
        for index in range(Store(stores[task]).structures):
            plant(monkeypatch, stores[task], task, index, "energy")
    with pytest.raises(FloatingPointError, match="There is no checkpoint in"):
        start(run_of(stores, tmp_path / "run", nonfinite=2, checkpoint_every=9))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Path:
    """A store whose structure 7, in the train split, has forces that float32 holds and whose square it does not."""
    folder, rng = tmp_path_factory.mktemp("overflowing"), np.random.default_rng(0)
    with (folder / "a.xyz").open("w") as file:
        for k in range(40):
            force = 1e25 if k == 7 else 0.1
            file.write(f"2\nProperties=species:S:1:pos:R:3:forces:R:3 energy={rng.normal()}\n")
            for x in (0.0, 1.0 + 0.01 * k):
                file.write(f"H {x} 0 0 {force if x else -force} 0 0\n")
    prepare("extxyz", [folder / "a.xyz"], folder / "a", task="a", trust_units=True, progress=False)
    assert Store(folder / "a").field("split")[7] == 0
    return folder / "a"


def overflow_of(store: Path, run: Path, forces: str = "direct", **parallel) -> dict:
    values = config_of({"a": store}, run, objective={"loss": "mse", "scale": "none"}, parallel=parallel)
    values["model"]["branch"]["forces"] = forces
    return values | {"train": {"batch": 32, "steps": 9, "epoch_steps": 9, "nonfinite": 2, "max_edges": 40}}


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_a_loss_that_overflows_names_the_structure(overflowing, tmp_path, forces):
    with pytest.raises(FloatingPointError, match=r"the loss of the forces of structure 7 of .*a.xyz: 7"):
        start(overflow_of(overflowing, tmp_path / "run", forces))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_structure_is_found_on_whatever_rank_it_is_and_every_rank_fails(overflowing, tmp_path, pool, sharded):
    values = overflow_of(overflowing, tmp_path / "run", shard_encoder=sharded)
    said = pool.run(3, "error_of", values)
    assert "the loss of the forces of structure 7 of" in said[0] and said[0].startswith("FloatingPointError: step 3")
    assert all(text.startswith("OtherRankFailed") for text in said[1:])


def test_a_run_that_has_skipped_every_update_has_no_model(overflowing, tmp_path):
    values = overflow_of(overflowing, tmp_path / "run")
    values["train"] |= {"nonfinite": 99, "epoch_steps": 3}
    for _ in range(2):
        with pytest.raises(
            FloatingPointError, match=r"all 9 updates were skipped, so there is no model. What began it: "
        ):
            start(values)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_run_without_a_model_fails_on_every_rank(overflowing, tmp_path, pool):
    """Of a learning rate that throws the weights out of what float32 holds."""
    values = overflow_of(overflowing, tmp_path / "run") | {"objective": {"loss": "mse", "scale": "none", "forces": 0.0}}
    values["train"] |= {"steps": 2, "epoch_steps": 2, "lr": 1e30, "clip": None, "ema": None, "warmup": 0}
    said = pool.run(2, "error_of", values)
    assert "no validation value of 2 steps is finite, so there is no model" in said[0] and said[1].startswith(
        "OtherRankFailed"
    )
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_the_gradient_of_one_structure_alone_is_found(stores, tmp_path, monkeypatch):
    """The loss is finite, its slope is not: the energy of one structure goes through the root of zero."""

    bad = int(Store(stores["apple"]).pick("train", slice(5, 6))[0])
    place = torch.from_numpy(Store(stores["apple"]).read([bad]).positions)

    def forward(self, batch, stress=False, original=Potential.forward):
        out, first = original(self, batch, stress), 0
        for s, n in enumerate(batch.natoms.tolist()):
            if n == len(place) and torch.equal(batch.positions[first : first + n].float(), place):
                energy = out["apple"].energy
                root = ((energy - energy) ** 2).sqrt()
                out["apple"].energy = energy + torch.where(torch.arange(len(energy)) == s, root, 0.0)
            first += n
        return out

    monkeypatch.setattr(Potential, "forward", forward)
    values = run_of({"apple": stores["apple"]}, tmp_path / "run", batch=36, steps=40, epoch_steps=40, nonfinite=1)
    with pytest.raises(FloatingPointError, match=rf"the gradient of the loss of structure {bad} of "):
        start(values)


def test_what_is_not_finite_in_a_checkpoint_comes_back(stores, tmp_path):
    run = start(run_of(stores, tmp_path / "run"))
    state, _, _ = load_checkpoint(run)
    assert state["schedule"]["best"] < 1e9
    path = run / "checkpoints" / "step-000008" / "state.json"
    from multifid.training.checkpoint import _read, _written

    odd = {"a": [1.0, float("nan"), {"b": float("-inf")}], "c": 3, "d": None}
    text = json.dumps(_written(odd), allow_nan=False)
    assert repr(json.loads(text, object_hook=_read)) == repr(odd) and strict(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": {"energy": 0.0, "forces": 0.0, "property": 0.0}}, "all 0, so there is nothing to learn"),
        (
            {"train": {"batch": 1e-9}},
            "train.batch: 1e-09 is the mean number of structures per task and step, at least 1",
        ),
        ({"train": {"lr": float("inf")}}, "train.lr: .*finite number"),
        ({"tasks": {"apple": {"store": "x", "per_step": 0.5}}}, "per_step: .*greater than or equal to 1"),
        ({"tasks": {"apple": {"store": "x", "weight": float("nan")}}}, "weight: .*finite number"),
    ],
)
def test_a_config_that_can_train_nothing_is_refused_when_it_is_read(stores, tmp_path, change, said):
    values = config_of(stores, tmp_path / "run", **change)
    with pytest.raises(ValueError, match=said):
        parse_config(values, "test")


def test_weight_without_labels_is_said_once_at_the_start_by_task(stores, tmp_path):
    with (tmp_path / "e.xyz").open("w") as file:
        for k in range(30):
            file.write(f"2\nProperties=species:S:1:pos:R:3 energy={k % 7 / 10}\nH 0 0 0\nH 0 0 {1 + 0.01 * k}\n")
    prepare("extxyz", [tmp_path / "e.xyz"], tmp_path / "e", task="bare", trust_units=True, progress=False)
    both = {"apple": stores["apple"], "bare": tmp_path / "e"}
    console = Console(record=True, width=300, quiet=False, file=(tmp_path / "out").open("w"))
    train(parse_config(run_of(both, tmp_path / "run"), "test"), console)
    told = [x for x in (tmp_path / "run" / "train.log").read_text().splitlines() if "objective." in x]
    assert len(told) == 1 and told[0].startswith("task bare: objective.forces is 1, but label set bare of")
    assert "has no forces (it has energy of 30)" in told[0] and told[0] in console.export_text()
    values = run_of({"bare": tmp_path / "e"}, tmp_path / "nothing") | {"objective": {"energy": 0.0}}
    with pytest.raises(ValueError, match=r"nothing to learn: objective gives weight to forces.*bare: energy of 30"):
        start(values)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("at_once", [True, False])
def test_an_update_that_is_skipped_is_explained_and_looking_for_it_changes_no_bit(
    stores, tmp_path, monkeypatch, at_once
):
    """Also where an update is heard of one step later, as on an accelerator."""
    (index,) = Store(stores["cherry"]).pick("train", slice(1, 2))
    plant(monkeypatch, stores["cherry"], "cherry", int(index), "energy", value=torch.inf)
    finish = Trainer.__post_init__
    monkeypatch.setattr(Trainer, "__post_init__", lambda self: (finish(self), setattr(self, "at_once", at_once)))
    values = run_of({"cherry": stores["cherry"]}, tmp_path / "told", batch=5, steps=6, epoch_steps=6, nonfinite=6)
    told = start(values)
    text = (told / "train.log").read_text()
    assert f"the update is skipped: task cherry: the energy of structure {index} of {stores['cherry']}" in text
    monkeypatch.setattr("multifid.training.watch.in_step", lambda *arguments, **options: "")
    untold = start(values | {"run": str(tmp_path / "untold")})
    assert_same_bits(told, untold)
