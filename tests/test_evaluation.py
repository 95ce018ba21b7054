"""Models are asked in any number of processes and batches with one answer; what a mean covers is said and kept."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import data_of, write_molecules
from multifid.config import parse_config
from multifid.evaluation import batches
from multifid.evaluation import evaluate as asking
from multifid.evaluation.baselines import no_better, no_better_in_study, with_references
from multifid.evaluation.data import Share
from multifid.evaluation.evaluate import evaluate_run
from multifid.evaluation.failures import Failures
from multifid.evaluation.rows import add_rows, read_rows
from multifid.evaluation.table import markdown
from multifid.model.potential import Potential
from multifid.model.predictor import Predictor
from multifid.model.saved import load_potential
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from multifid.workflows.evaluate import evaluate
from test_train import config_of, start

NUMBERS = ("energy_mae", "energy_rmse", "forces_mae", "forces_rmse", "stress_mae", "stress_rmse")
COUNTS = ("structures", "unseen_structures", "counted_structures", "atoms")


@pytest.fixture(scope="module")
def crystals(tmp_path_factory) -> Path:
    """Rocksalt cells of random size with random labels, some without stress."""
    folder, rng = tmp_path_factory.mktemp("crystals"), np.random.default_rng(0)
    with (folder / "c.xyz").open("w") as file:
        for k in range(24):
            a, symbols = rng.uniform(4.2, 4.6), ("Mg O", "Mg O Mg O", "Mg O O", "Mg Mg O")[k % 4].split()
            stress = "" if k < 6 else f'stress="{" ".join(f"{x:.5f}" for x in rng.normal(0, 0.01, 6))}" '
            file.write(f'{len(symbols)}\nLattice="{a} 0 0 0 {a} 0 0 0 {a}" {stress}energy={-5.0 * len(symbols)} ')
            file.write("Properties=species:S:1:pos:R:3:forces:R:3\n")
            for n, symbol in enumerate(symbols):
                place = np.array([n % 2, n % 2, n // 2]) * a / 2 + rng.normal(0, 0.05, 3)
                file.write(" ".join([symbol, *(f"{v:.6f}" for v in (*place, *rng.normal(0, 0.5, 3)))]) + "\n")
    prepare("extxyz", [folder / "c.xyz"], folder / "s", task="rock", fractions=(0.5, 0.2, 0.3), progress=False)
    return folder / "s"


@pytest.fixture(scope="module")
def conservative(stores, crystals, tmp_path_factory) -> Path:
    """A run on molecules and crystals, whose branches give stress."""
    values = config_of(
        {"apple": stores["apple"], "rock": crystals}, tmp_path_factory.mktemp("runs") / "both", train={"steps": 3}
    )
    values["model"]["branch"]["forces"] = "conservative"
    return start(values)


def same(rows: list[dict], others: list[dict], digits: float = 1e-5) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert {k: row[k] for k in row if k.removeprefix("zero_") not in NUMBERS} == {
            k: other[k] for k in other if k.removeprefix("zero_") not in NUMBERS
        }
        for name in NUMBERS:
            assert row[name] == (None if other[name] is None else pytest.approx(other[name], rel=digits)), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_many_ranks_say_what_one_process_says_and_one_of_them_writes(
    conservative, stores, crystals, tmp_path, pool, ranks
):
    alone, shared = tmp_path / "alone" / "m", tmp_path / "shared" / "m"
    for run in (alone, shared):
        shutil.copytree(conservative, run)
    data = [str(stores["apple"]), str(crystals)]
    one = evaluate([alone], data, "all", device="cpu", max_edges=60, quiet=True)
    many = pool.run(ranks, "evaluated", str(shared), data, "all", 60)
    for rows in [*many, read_rows(shared)]:
        same(rows, one, 1e-12)  # the same batches in another order of addition
    assert not list(shared.glob("*.part")) and one[1]["stress_mae"] > 0 and one[0]["stress_mae"] is None


@pytest.mark.parametrize("most", [1, 77, 10**9])
def test_batches_are_cut_by_edges_and_change_nothing(conservative, crystals, tmp_path, most):
    run, sizes = tmp_path / "m", []
    shutil.copytree(conservative, run)
    whole = evaluate_run(run, data_of(str(crystals)), "all")

    def forward(self, batch, stress=False, original=Potential.forward):
        sizes.append((batch.structures, batch.edges.shape[1]))
        return original(self, batch, stress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Potential, "forward", forward)
        cut = evaluate_run(run, data_of(str(crystals)), "all", share=Share(max_edges=most))
    same(cut, whole)
    assert sum(s for s, _ in sizes) == Store(crystals).structures
    assert len(sizes) == (1 if most == 10**9 else 24) or all(s == 1 or e <= 1.5 * most for s, e in sizes)


def test_a_batch_that_the_device_has_no_memory_for_is_halved(conservative, crystals, tmp_path, monkeypatch):
    run = tmp_path / "m"
    shutil.copytree(conservative, run)
    whole = evaluate_run(run, data_of(str(crystals)), "all")
    most = 5

    def forward(self, batch, stress=False, original=Potential.forward):
        if batch.structures > most:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, batch, stress)

    monkeypatch.setattr(Potential, "forward", forward)
    same(evaluate_run(run, data_of(str(crystals)), "all"), whole)
    most = 0
    with pytest.raises(ValueError, match=r"not enough memory for structure \d+ of .*atoms"):
        evaluate_run(run, data_of(str(crystals)), "all")


def test_stress_is_compared_where_model_and_data_have_it(conservative, stores, crystals, tmp_path):
    """The errors again by numpy, from predictions of single structures and labels of the store."""
    run = tmp_path / "m"
    shutil.copytree(conservative, run)
    potential, description = asking.load_potential(run)
    predicted = []
    (data,) = data_of(str(crystals))
    row = asking.evaluate(
        Predictor(potential, description),
        "m",
        data,
        "all",
        collect=lambda p, batch, task: predicted.append(p.stress),
        share=Share(max_edges=1),
    )
    label = data.store.read(np.arange(data.store.structures)).labels["rock"].stress
    error = torch.cat(predicted).numpy() - label
    assert np.isnan(error[:, 0, 0]).sum() == 6
    assert row["stress_mae"] == pytest.approx(np.nanmean(np.abs(error)), rel=1e-9)
    assert row["stress_rmse"] == pytest.approx(np.sqrt(np.nanmean(error**2)), rel=1e-9)
    assert "Stress MAE" in markdown([row]) and "Stress" not in markdown(
        evaluate_run(run, data_of(str(stores["apple"])))
    )


def without_carbon(run: Path, copy: Path, elements: list[int]) -> Path:
    shutil.copytree(run, copy)
    about = json.loads((copy / "model.json").read_text())
    about["tasks"]["apple"]["elements"] = elements
    (copy / "model.json").write_text(json.dumps(about))
    return copy


def test_structures_with_unseen_elements_are_left_out_of_the_means_and_counted(conservative, stores, tmp_path):
    """The mean without them is that of a store that never had them."""
    run = without_carbon(conservative, tmp_path / "m", [1, 8])
    (data,) = data_of(str(stores["apple"]))
    packed = data.store.read(np.arange(data.store.structures))
    carbon = np.add.reduceat((packed.numbers == 6).astype(int), packed.offsets[:-1]) > 0
    collected = []
    potential, description = asking.load_potential(run)
    row = asking.evaluate(
        Predictor(potential, description),
        "m",
        data,
        "all",
        share=Share(max_edges=1),
        collect=lambda p, batch, task: collected.append((p, batch.targets[task])),
    )
    energies = np.array([float(p.energy[0] - y.energy[0]) for p, y in collected]) / packed.natoms
    forces = np.array([float((p.forces - y.forces).abs().sum()) for p, y in collected])
    assert 0 < carbon.sum() < len(carbon) and row["unseen_structures"] == carbon.sum()
    assert row["structures"] == len(carbon) and row["counted_structures"] == (~carbon).sum()
    assert row["energy_mae"] == pytest.approx(np.abs(energies[~carbon]).mean(), rel=1e-9)
    assert row["forces_mae"] == pytest.approx(forces[~carbon].sum() / (3 * packed.natoms[~carbon].sum()), rel=1e-9)
    labels = [y for k, (_, y) in enumerate(collected) if not carbon[k]]  # what predicting nothing misses
    nothing = np.array([abs(float(y.energy[0])) for y in labels]) / packed.natoms[~carbon]
    total = sum(float(y.forces.abs().sum()) for y in labels)
    assert row["zero_energy_mae"] == pytest.approx(nothing.mean(), rel=1e-9)
    assert row["zero_forces_mae"] == pytest.approx(total / (3 * packed.natoms[~carbon].sum()), rel=1e-6)
    (all_of_them,) = evaluate_run(run, [data], "all", unseen=True)
    assert all_of_them["energy_mae"] == pytest.approx(np.abs(energies).mean(), rel=1e-5)
    assert (row["unseen"], all_of_them["unseen"]) == ("excluded", "included")
    assert "† Without structures" in markdown([row]) and "† With structures" in markdown([all_of_them])


def test_a_model_that_is_no_better_than_nothing_is_named_beside_it():
    row = {"model": "m", "data": "d", "split": "test", "structures": 2, "atoms": 4, "counted_structures": 2}
    row |= {"unseen": "excluded", "unseen_structures": 0, "source": "d", "branch": "d", "references": "model"}
    row |= {"energy_mae": 0.1, "forces_mae": 0.3, "zero_energy_mae": 0.2, "zero_forces_mae": 0.25}
    (warned,) = no_better([row])
    assert (
        "m is no better than nothing on d: forces 300, zero forces alone 250 meV/" in warned and "energy" not in warned
    )
    assert no_better([row | {"forces_mae": 0.2}]) == [] and len(no_better([row | {"forces_mae": math.nan}])) == 1
    study = [row | {"model": name, "seed": 1} for name in ("GFM-MTL-All", "Model-d", "Model-of-others")]
    assert [line.split(" is no")[0] for line in no_better_in_study([row | {"model": "References"}, *study])] == [
        "warning: GFM-MTL-All (seed 1)",
        "warning: Model-d (seed 1)",
    ]
    nothing, *_ = with_references([row, row | {"model": "n"}])
    assert (nothing["model"], nothing["energy_mae"], nothing["forces_mae"]) == ("References", 0.2, 0.25)
    other = row | {"model": "n", "counted_structures": 1, "unseen_structures": 1}  # its labels are others
    assert with_references([row, other]) == [row, other]


def test_where_every_structure_is_unseen_there_is_no_mean_but_a_mark(conservative, stores, tmp_path):
    run = without_carbon(conservative, tmp_path / "m", [])
    (row,) = evaluate_run(run, data_of(str(stores["apple"])))
    assert row["energy_mae"] is None and row["counted_structures"] == 0 < row["structures"]
    assert "| m | – † |" in markdown([row])


def test_a_quantity_that_a_model_does_not_have_bears_no_mark(conservative, stores, crystals, tmp_path):
    """Stress of a model with direct forces, beside one that has it."""
    row = {"model": "direct", "data": "rock", "split": "test", "structures": 9, "atoms": 20, "branch": "b"}
    row |= {"unseen_structures": 3, "counted_structures": 6, "unseen": "excluded", "energy_mae": 1.0, "forces_mae": 1.0}
    (run := tmp_path / "m").mkdir()
    shutil.copytree(conservative, run, dirs_exist_ok=True)
    text = markdown([row, *evaluate_run(run, data_of(str(crystals)))])
    energy, stress = text.split("Table 1")[1].split("Table 2")[0], text.split("Table 3")[1].split("Split")[0]
    assert "†" in energy and "†" not in stress and "| direct | – |" in stress


def test_rows_of_other_data_and_splits_stay_and_those_of_the_same_are_replaced(stores, conservative, tmp_path):
    run = tmp_path / "m"
    shutil.copytree(conservative, run)
    first = evaluate_run(run, data_of(str(stores["apple"])))
    evaluate_run(run, data_of(str(stores["apple"])), "validation")
    evaluate_run(run, data_of(str(stores["berry"])), branch="apple")
    evaluate_run(run, data_of(str(stores["apple"])))
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert [(r["data"], r["split"], r["branch"]) for r in rows] == [
        ("apple", "validation", "apple"),
        ("berry", "test", "apple"),
        ("apple", "test", "apple"),
    ]
    same([rows[2]], first)
    evaluate_run(run, data_of(str(stores["berry"])), branch="rock", unseen=True)
    assert len(read_rows(run)) == 4  # another branch answered


@pytest.mark.parametrize("text", ['{"rows": [', "[]", '{"rows": [1]}', "\x00\x01"])
def test_a_damaged_file_of_rows_is_named_and_left_as_it_is(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged"):
        add_rows(tmp_path, [{"model": "m", "data": "d", "split": "test"}])
    assert (tmp_path / "evaluation.json").read_text() == text


def test_two_datasets_of_one_name_are_refused(stores, conservative, tmp_path):
    shutil.copytree(stores["apple"], tmp_path / "other")
    with pytest.raises(ValueError, match=r"both called 'apple'.*NAME="):
        evaluate([conservative], [str(stores["apple"]), str(tmp_path / "other")], quiet=True)


def test_a_task_without_energies_has_seen_the_elements_of_its_split(stores, tmp_path):
    (tmp_path / "f.xyz").write_text(
        "".join(
            f'2\nProperties=species:S:1:pos:R:3:forces:R:3 pbc="F F F"\nH 0 0 0 0 0 {f}\nO 0 0 {0.9 + f} 0 0 -{f}\n'
            for f in np.linspace(0.1, 0.4, 30)
        )
    )
    prepare("extxyz", [tmp_path / "f.xyz"], tmp_path / "s", task="pull", trust_units=True, progress=False)
    run = start(config_of({"pull": tmp_path / "s"}, tmp_path / "run", train={"steps": 2}))
    (row,) = evaluate_run(run, data_of(str(tmp_path / "s")))
    assert row["unseen_structures"] == 0 and row["forces_mae"] > 0 and row["energy_mae"] is None


def test_the_budget_of_edges_follows_width_and_memory(stores, tmp_path):
    values = config_of(stores, tmp_path / "run")
    small = parse_config(values, "test").model
    wide = small.model_copy(update={"encoder": small.encoder.model_copy(update={"hidden": 866, "layers": 4})})
    budgets = []
    for model in (small, wide):
        budgets.append(batches.edge_budget(Predictor(Potential(model, ["a"], {"a": "a"}, 0), {}), Share()))
    assert budgets[0] == batches.EDGES and budgets[1] == batches.MEMORY // (batches.KEPT * 866 * 4 * 4)
    assert batches.edge_budget(None, replace(Share(), max_edges=5)) == 5


@pytest.fixture(scope="module")
def only_test(tmp_path_factory) -> Path:
    """Other molecules of the task `apple`, all of them test."""
    folder = tmp_path_factory.mktemp("only")
    write_molecules(folder / "a.xyz", 15, 1.0, 0.0, seed=3)
    prepare("extxyz", [folder / "a.xyz"], folder / "s", task="apple", fractions=(0, 0, 1), progress=False)
    return folder / "s"


def test_a_store_that_is_only_test_is_evaluated_with_the_models_references(conservative, only_test, tmp_path):
    """The same numbers as the same structures in a store with splits; what the store has fitted does not matter."""
    prepare("extxyz", [only_test.parent / "a.xyz"], tmp_path / "divided", task="apple", progress=False)
    run = tmp_path / "m"
    shutil.copytree(conservative, run)
    (row,) = evaluate_run(run, data_of(str(only_test)))
    (divided,) = evaluate_run(run, data_of(str(tmp_path / "divided")), "all")
    assert row["structures"] == 15 and row["references"] == "model"
    for name in NUMBERS:
        assert row[name] == (None if divided[name] is None else pytest.approx(divided[name], rel=1e-5))
    (foreign,) = evaluate_run(run, [replace(data_of(str(only_test))[0], name="other")], branch="rock")
    assert foreign["references"] == "data, fitted to its test split"


def test_a_store_that_is_only_test_says_what_it_was_fitted_to_and_is_not_trained_on(only_test, tmp_path):
    store = Store(only_test)
    packed = store.read(np.arange(15))
    assert store.size("test") == 15 and store.fitted_on == "test" and "fitted_on" in store.manifest["splits"]
    rms = np.sqrt(np.square(packed.labels["apple"].forces.astype(float)).mean())
    assert store.manifest["tasks"]["apple"]["scale"] == pytest.approx(rms, rel=1e-6)
    with pytest.raises(ValueError, match=r"tasks\.apple\.store: .* has no train structure \(train 0, .* test 15\)"):
        start(config_of({"apple": only_test}, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_store_goes_by_the_name_of_the_task_that_was_trained_on_it_and_others_are_offered_commands(stores, tmp_path):
    run = start(config_of({"one": stores["apple"], "two": stores["berry"]}, tmp_path / "run", train={"steps": 2}))
    (row,) = evaluate_run(run, data_of(str(stores["apple"])))  # its label set is called apple
    assert (row["data"], row["branch"], row["references"]) == ("one", "one", "model")
    with pytest.raises(ValueError, match="run has not been trained on 'cherry' and has several branches") as error:
        evaluate_run(run, data_of(str(stores["cherry"])))
    assert f"--data two={stores['cherry']}" in str(error.value)
    assert f"--data {stores['cherry']} --branch one" in str(error.value)


def test_predictions_that_are_not_finite_are_counted_named_and_in_no_mean(
    conservative, crystals, tmp_path, monkeypatch
):
    """Planted in structures 3 (its energy) and 20 (one force) of the store; the means are those of all others."""
    run, bad, errors = tmp_path / "m", (3, 20), []
    shutil.copytree(conservative, run)
    (data,), places = data_of(str(crystals)), [Store(crystals).read([k]).positions for k in bad]

    def compare(p, batch, task):
        errors.extend(((p.energy - batch.targets[task].energy) / batch.natoms).abs().tolist())

    potential, description = load_potential(run)
    asking.evaluate(Predictor(potential, description), "m", data, "all", collect=compare)

    def failing(self, batch, stress=False, original=Potential.forward):
        out = original(self, batch, stress)
        for s, positions in enumerate(batch.positions.split(batch.natoms.tolist())):
            if np.array_equal(positions, places[0]):
                out["rock"].energy[s] = torch.inf
            if np.array_equal(positions, places[1]):
                out["rock"].forces[int(batch.natoms[:s].sum()), 1] = torch.nan
        return out

    monkeypatch.setattr(Potential, "forward", failing)
    (row,) = evaluate_run(run, [data], "all", share=Share(max_edges=200))
    assert (row["structures"], row["nonfinite_structures"], row["counted_structures"]) == (24, 2, 22)
    assert row["nonfinite"] == [{"index": 3, "source": "c.xyz: 3"}, {"index": 20, "source": "c.xyz: 20"}]
    assert row["energy_mae"] == pytest.approx(np.delete(errors, bad).mean(), rel=1e-5)
    assert "‡" in markdown([row]) and "structure 3 (c.xyz: 3)" in markdown([row])
    (row,) = evaluate_run(run, [data], "all", weights=nothing_finite(run))
    assert row["nonfinite_structures"] == 24 and row["energy_mae"] is None and len(row["nonfinite"]) == 5
    json.loads((run / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def nothing_finite(run: Path) -> str:
    """The name of a file of weights that are all NaN."""
    tensors = load_file(run / "model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, run / "nan.safetensors")
    return "nan.safetensors"


def test_failures_of_several_processes_are_counted_and_named_together(crystals):
    told: list[list[torch.Tensor]] = [[], []]
    ranks = []
    for index in ([5, 2, 9, 7], [8, 1, 4, 6]):
        failures = Failures(torch.device("cpu"))
        for k in range(0, 4, 2):  # in two batches; the second structure of each is left out anyway
            failures.add(torch.ones(2, dtype=torch.bool), torch.tensor([False, True]), np.array(index[k : k + 2]))
        ranks.append(failures)
    for rank, failures in enumerate(ranks):
        failures.row(Store(crystals), rank, 2, lambda x, rank=rank: told[rank].append(x) or x)
    sums = iter([a + b for a, b in zip(*told, strict=True)])
    row, lost = ranks[0].row(Store(crystals), 0, 2, lambda x: next(sums))
    assert row["nonfinite_structures"] == 8 and lost == 4
    assert [one["index"] for one in row["nonfinite"]] == [1, 2, 4, 5, 6]
