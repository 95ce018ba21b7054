"""What a run can do, every encoder can: stop and go on, be exported, calculate, be adapted to new data, be studied.

What else is asked of all of them stands where it is tested: placements in test_parallel.py, precisions in
test_precision.py, compilation in test_compile.py, memory in test_plan.py.
"""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from rich.console import Console
from safetensors.torch import load_file

import multifid
from multifid.config import parse_config
from multifid.graphs.graph import graph_of
from multifid.model.encoders import ENCODERS as PUBLISHED
from multifid.model.encoders import build_encoder
from multifid.model.model_file import export_model
from multifid.model.potential import ModelConfig
from multifid.model.suite.samples import CUTOFF, batch_of, system
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from multifid.workflows.study import study
from test_model import KINDS
from test_train import assert_same_bits, config_of, start

ORDINARY = "sage"
ENCODERS = {kind: keys | {"layers": 2, "hidden": 8} for kind, keys in KINDS.items() if kind != "angular"}
each = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == ORDINARY else pytest.mark.full) for kind in ENCODERS]
)
each_in_full = pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) for kind in ENCODERS])
ATOMS = Atoms("CHO", [[0, 0, 0], [1.1, 0, 0.2], [0, 1.2, 0]])


def run_of(stores, folder, kind, forces="conservative", **train):
    """Values of a short run of two tasks."""
    two = {task: stores[task] for task in ("apple", "berry")}
    train = {"steps": 6, "epoch_steps": 3, "log_every": 1, "checkpoint_every": 100, "precision": "fp64"} | train
    model = {"encoder": ENCODERS[kind], "branch": {"hidden": [8], "forces": forces}}
    return config_of(two, folder, model=model, train=train)


@each
def test_a_run_goes_on_to_the_same_bits_and_its_model_is_used_everywhere(stores, tmp_path, kind):
    whole = start(run_of(stores, tmp_path / "whole", kind))
    result = multifid.train(
        run_of(stores, tmp_path / "run", kind), [lambda rows: rows[0]["step"] == 3 or None], quiet=True
    )
    assert not result.complete
    assert multifid.train(tmp_path / "run", quiet=True).complete
    assert_same_bits(tmp_path / "run", whole)

    model = multifid.load(whole, precision="fp64")
    expected = model.predict(ATOMS, "apple")
    export_model(whole, tmp_path / "model.mfid", tasks=["apple"])
    found = multifid.load(tmp_path / "model.mfid", precision="fp64").predict(ATOMS, "apple")
    np.testing.assert_array_equal(found.forces, expected.forces)
    atoms = ATOMS.copy()
    atoms.calc = model.calculator("apple", dtype="float64")
    np.testing.assert_allclose(atoms.get_forces(), expected.forces, rtol=0, atol=1e-10)
    assert atoms.get_potential_energy() == pytest.approx(float(expected.energy[0]), abs=1e-10)


@pytest.fixture(scope="module")
def nitrogen(tmp_path_factory) -> Store:
    """Data with an element that the stores of the others have not."""
    folder = tmp_path_factory.mktemp("fig")
    rng = np.random.default_rng(4)
    with (folder / "fig.xyz").open("w") as file:
        for _ in range(30):
            x, y = rng.uniform(1.0, 1.6, 2)
            file.write(f'3\nProperties=species:S:1:pos:R:3:forces:R:3 energy={-20 + x * x - y:.12f} pbc="F F F"\n')
            file.write(f"N 0 0 0 0.1 0.2 0\nC {x} 0 0 {-x} 0.1 0\nH 0 {y} 0.1 {x - 0.1} -0.3 0\n")
    prepare("extxyz", [folder / "fig.xyz"], folder / "fig", task="fig", trust_units=True, progress=False, talk=False)
    return Store(folder / "fig")


def only_row_differs(a, b, row):
    return bool((a != b).flatten(1).any(dim=1).nonzero().flatten().tolist() == [row]) if a.dim() > 1 else False


@each_in_full
def test_it_is_adapted_to_new_elements(stores, nitrogen, tmp_path, kind):
    parent = start(run_of(stores, tmp_path / "parent", kind, precision="fp32"))
    old = load_file(parent / "model.safetensors")
    for moves in ("lora", "last", "branch"):
        keys = ["train.steps=3", "train.epoch_steps=3", "train.warmup=1", "train.lr=1e-2", "train.device=cpu"]
        keys += [f"finetune.moves={moves}", *(["finetune.rank=2"] if moves == "lora" else [])]
        result = multifid.finetune(parent, f"fig={nitrogen.path}", tmp_path / moves, keys, quiet=True)
        new = load_file(result.run / "last.safetensors")
        moved = {n for n in old if n.startswith("encoder.") and not torch.equal(old[n], new[n])}
        row = {n for n in moved if only_row_differs(old[n], new[n], 7)}  # of nitrogen in a table of elements
        assert (moved - row == set()) == (moves == "branch")
        if moves == "last":
            assert {n for n in moved if n.startswith("encoder.layers.0.")} <= row
        assert np.isfinite(multifid.load(result.run).predict(Atoms("NCH", ATOMS.positions), "fig").forces).all()


@each_in_full
def test_it_is_studied_by_changing_one_key(stores, tmp_path, kind):
    values = run_of(stores, tmp_path / "study", kind, forces="direct", precision="fp32") | {"study": {"seeds": [0]}}
    root = study(parse_config(values, "test"), Console(quiet=True))
    rows = json.loads((root / "evaluation.json").read_text())["rows"]
    assert {r["model"] for r in rows} >= {"GFM-MTL-All", "GFM-Baseline-All", "Model-apple"}
    assert all(np.isfinite(r["energy_mae"]) for r in rows if r["counted_structures"])


UNKNOWN_KEY = r"model\.encoder\.nonesuch: unknown key; known here: name, attention, layers"
REFUSED = [  # encoder, branch, train, message
    *(({"name": kind, "nonesuch": 1}, {}, {}, UNKNOWN_KEY) for kind in PUBLISHED),
    ({"name": "gat", "hidden": 10, "heads": 4}, {}, {}, "hidden must be a multiple of heads, got 10 and 4"),
    ({"name": "gotennet", "hidden": 10, "heads": 4}, {}, {}, "heads must divide hidden"),
    ({"name": "painn", "hidden": 10, "attention": {"heads": 4}}, {}, {}, "heads must divide the width of the scalars"),
    ({"name": "schnet", "layers": 1, "attention": {}}, {}, {}, "there is no place between them"),
    ({"name": "mfc", "max_degree": 10, "degree_step": 4}, {}, {}, "multiple of degree_step, got 10 and 4"),
    ({"name": "mace", "correlation": 4}, {}, {}, "less than or equal to 3"),
    ({"name": "angular", "layers": 1}, {"readout": "layers"}, {}, "gives those after the last one only"),
    ({"name": "dimenet"}, {"forces": "conservative"}, {"precision": "bf16"}, "bf16"),
]


@pytest.mark.parametrize(("encoder", "branch", "train", "message"), REFUSED)
def test_what_cannot_be_made_is_refused_before_any_data_are_read(tmp_path, encoder, branch, train, message):
    """There is not even a store."""
    values = {
        "run": str(tmp_path / "run"),
        "tasks": {"apple": {"store": str(tmp_path / "nothing")}},
        "model": {"encoder": encoder, "branch": branch},
        "train": {"steps": 3} | train,
    }
    with pytest.raises(ValueError, match=message):
        multifid.train(values, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_graph_without_the_triplets_that_an_encoder_reads_is_refused_by_name():
    encoder = ModelConfig(encoder={"name": "dimenet", "layers": 1, "hidden": 8}).encoder
    with pytest.raises(ValueError, match="DimeNet reads triplets, and this graph has none"):
        build_encoder(encoder, CUTOFF)(graph_of(batch_of(system(3), dtype=torch.float32)))
