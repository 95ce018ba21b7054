"""A run that starts from the weights of another says what it takes, and what begins with fresh weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import write_molecules
from multifid.preparation.prepare import prepare
from test_identity import go
from test_train import config_of


@pytest.fixture(scope="module")
def parent(stores, tmp_path_factory):
    values = config_of(stores, tmp_path_factory.mktemp("init") / "parent", train={"steps": 3})
    return go(values)[0]


def child_of(parent, stores, run, **changes) -> dict:
    tasks = changes.pop("tasks", {task: {"store": str(store)} for task, store in stores.items()})
    frozen = {"steps": 1, "lr": 1e-12, "ema": None}
    return config_of(stores, run, init=str(parent), train=frozen, **changes) | {"tasks": tasks}


def test_what_is_taken_and_what_is_fresh_is_said_by_branch(parent, stores, tmp_path):
    """A mistyped task, a new one and one of old: the encoder and the last are the parent's."""
    tasks = {"apple": "apple", "bery": "berry", "damson": "cherry"}
    tasks = {name: {"store": str(stores[there]), "labels": there} for name, there in tasks.items()}
    run, said = go(child_of(parent, stores, tmp_path / "run", tasks=tasks))
    assert f"init: weights of {parent} for the encoder and branches apple\n" in said
    mistyped = f"init: branch 'bery' begins with fresh weights: {parent} has apple, berry, cherry; is 'berry' meant?"
    assert mistyped in said and "branch 'damson' begins with fresh weights" in said
    assert mistyped in (run / "train.log").read_text()
    a, b = load_file(parent / "model.safetensors"), load_file(run / "last.safetensors")
    for name, tensor in b.items():
        if name.startswith(("encoder.", "branches.apple.")):
            assert torch.allclose(a[name], tensor, atol=1e-9), name
    assert "init:" not in go(child_of(parent, stores, tmp_path / "run", tasks=tasks))[1], "it has begun"


def test_heads_of_another_shape_and_new_elements_are_said(parent, stores, tmp_path):
    write_molecules(tmp_path / "a.xyz", 30, 1.0, 0.0, seed=1)
    text = (tmp_path / "a.xyz").read_text().replace("\nO ", "\nSi ")
    (tmp_path / "a.xyz").write_text(text)
    prepare("extxyz", [tmp_path / "a.xyz"], tmp_path / "a", fractions=(0.6, 0.2, 0.2), trust_units=True, progress=False)
    values = child_of(parent, stores, tmp_path / "run", tasks={"apple": {"store": str(tmp_path / "a")}})
    values["model"]["branch"]["hidden"] = [11]
    _, said = go(values)
    assert f"init: weights of {parent} for the encoder\n" in said
    assert "init: branch 'apple' begins with a fresh energy and forces head: none of this shape" in said
    assert f"init: elements that {parent} was not trained on: Si" in said


def test_a_model_that_does_not_fit_or_is_damaged_is_refused_and_leaves_nothing(parent, stores, tmp_path):
    def refused(words, place=parent, **model):
        values = child_of(place, stores, tmp_path / "run")
        values["model"] |= model
        with pytest.raises(ValueError, match=words):
            go(values)
        assert not (tmp_path / "run").exists()

    refused(r"model\.cutoff: 4\.0 here, 3\.0 there", cutoff=4.0)
    encoder = {"name": "egnn", "layers": 1, "hidden": 14, "vectors": 3}
    refused(r"another encoder.*\n.*model\.encoder\.hidden: 14 here, 12 there", encoder=encoder)
    refused("is .* the directory of a trained run", tmp_path / "nowhere")
    shutil.copytree(parent, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 100)
    refused("cannot be read as safetensors", tmp_path / "damaged")
