"""Errors, tables and figures against plain numpy and planted numbers."""

import csv
import io
import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console

from multifid.evaluation import figures, periodic_table, table
from multifid.evaluation import matrix as matrices
from multifid.evaluation.metrics import Errors
from multifid.graphs.batch import Targets
from multifid.structures.elements import SYMBOLS

torch.set_num_threads(1)


def _batch(rng, structures=5):
    natoms = rng.integers(1, 9, structures)
    atoms = int(natoms.sum())
    predicted = (rng.normal(size=structures), rng.normal(size=(atoms, 3)), rng.normal(size=(structures, 3, 3)))
    labels = tuple(p + rng.normal(size=p.shape) for p in predicted)
    labels[0][rng.random(structures) < 0.3] = np.nan
    labels[1][rng.random(atoms) < 0.3] = np.nan
    labels[2][rng.random(structures) < 0.5] = np.nan
    return natoms, predicted, labels


def _add(errors, natoms, predicted, labels, unseen=None):
    energy, forces, stress = (torch.from_numpy(p) for p in predicted)
    errors.add(
        energy, forces, stress, Targets(*(torch.from_numpy(y) for y in labels)), torch.from_numpy(natoms), unseen
    )


def test_errors_over_batches_equal_numpy_over_everything():
    rng = np.random.default_rng(0)
    batches = [_batch(rng, n) for n in (5, 1, 17, 3)]
    errors = Errors()
    for batch in batches:
        _add(errors, *batch)
    row = errors.row("m", "d", "test")
    natoms = np.concatenate([b[0] for b in batches])
    for k, quantity in enumerate(("energy", "forces", "stress")):
        error = np.concatenate([b[1][k] for b in batches]) - np.concatenate([b[2][k] for b in batches])
        if quantity == "energy":
            error = error / natoms
        assert row[f"{quantity}_mae"] == pytest.approx(np.nanmean(np.abs(error)), rel=1e-14)
        assert row[f"{quantity}_rmse"] == pytest.approx(math.sqrt(np.nanmean(error**2)), rel=1e-14)
    assert (row["structures"], row["atoms"], row["unseen_structures"]) == (26, natoms.sum(), 0)
    assert (row["model"], row["data"], row["split"]) == ("m", "d", "test")


def test_sums_of_ranks_add_up_to_one_process():
    rng = np.random.default_rng(1)
    batches = [_batch(rng) for _ in range(6)]
    whole, ranks = Errors(), [Errors(), Errors(), Errors()]  # the last rank gets nothing
    for k, batch in enumerate(batches):
        _add(whole, *batch)
        _add(ranks[k % 2], *batch)
    total = Errors.from_tensor(sum(r.as_tensor() for r in ranks))
    assert total.row("m", "d", "s") == pytest.approx(whole.row("m", "d", "s"))
    ranks[0] += ranks[1]
    assert torch.allclose(ranks[0].as_tensor(), whole.as_tensor(), rtol=1e-14)


def test_missing_labels_are_null_and_never_zero():
    nothing = Errors().row("m", "d", "test")
    assert nothing["structures"] == 0 and nothing["energy_mae"] is None and nothing["forces_rmse"] is None
    errors = Errors()
    errors.add(
        torch.ones(2), torch.ones(4, 3), None, Targets(torch.full((2,), torch.nan), None, None), torch.tensor([2, 2])
    )
    row = errors.row("m", "d", "test")
    assert row["energy_mae"] is None and row["forces_mae"] is None and row["structures"] == 2


def test_a_prediction_that_is_not_finite_shows():
    errors = Errors()
    errors.add(torch.tensor([1.0, torch.nan]), None, None, Targets(torch.zeros(2), None, None), torch.tensor([1, 1]))
    assert math.isnan(errors.row("m", "d", "test")["energy_mae"])


def test_small_errors_survive_large_sums_of_float32():
    """A million errors of 1e-3 summed in float32 are off in the third digit; float64 sums are not."""
    errors = Errors()
    for _ in range(100):
        label = torch.zeros(10_000, 3)
        errors.add(torch.zeros(1), label + 1e-3, None, Targets(torch.zeros(1), label, None), torch.tensor([10_000]))
    assert errors.values()["forces_mae"] == pytest.approx(float(np.float32(1e-3)), rel=1e-12)


def test_unseen_structures_are_counted():
    rng = np.random.default_rng(2)
    errors = Errors()
    _add(errors, *_batch(rng), unseen=torch.tensor([True, False, True, True, False]))
    _add(errors, *_batch(rng))
    assert errors.row("m", "d", "test")["unseen_structures"] == 3


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="energy must have one shape"):
        Errors().add(torch.zeros(3, 1), None, None, Targets(torch.zeros(3), None, None), torch.ones(3))
    with pytest.raises(ValueError, match="float64"):
        Errors.from_tensor(torch.zeros(12))


DATA = ("a", "b", "c")
ENERGY = {
    "Model-a": (0.01, 0.4, 2.0),
    "Model-b": (0.8, 0.02, 4.0),
    "Model-c": (0.5, 0.5, 0.03),
    "GFM-Baseline-All": (0.2, 0.4, 0.8),
    "GFM-MTL-All": (0.02, 0.04, 0.08),
}


def _rows(seeds=(1.0,), unseen=0):
    return [
        {
            "model": model,
            "data": data,
            "split": "test",
            "structures": 10 + k,
            "unseen_structures": unseen if (model, data) == ("Model-a", "c") else 0,
            "atoms": 100,
            "energy_mae": values[k] * factor,
            "energy_rmse": values[k],
            "forces_mae": None if data == "b" else 10 * values[k] * factor,
            "forces_rmse": values[k],
        }
        for factor in seeds
        for model, values in reversed(ENERGY.items())
        for k, data in enumerate(DATA)
    ]


def test_the_two_best_of_each_column_are_bold():
    lines = {
        line.split(" | ")[0].strip("| "): line for line in table.markdown(_rows()).split("Table 2")[0].splitlines()
    }
    bold = {
        name: [k for k, cell in enumerate(line.strip("| ").split(" | ")) if "**" in cell]
        for name, line in lines.items()
    }
    assert bold["Model-a"] == [1] and bold["Model-b"] == [2] and bold["Model-c"] == [3, 4]
    assert bold["GFM-MTL-All"] == [1, 2, 3, 4] and bold["GFM-Baseline-All"] == []


def test_models_stand_in_the_order_of_the_paper():
    expected = ("References", "Model-a", "Model-b", "Model-c", "mine", "GFM-Baseline-All", "GFM-MTL-All")
    rows = [*_rows(), {**_rows()[0], "model": "mine"}, {**_rows()[0], "model": "References"}]
    assert matrices.matrix(rows, "energy").models == expected
    assert (
        matrices.matrix(rows, "forces").models == expected
    )  # though b has no forces: the panels of a figure share names


def test_geometric_mean_and_ratios_are_as_planted():
    m = matrices.matrix(_rows(), "energy")
    assert m.estimate("Model-a", "geometric mean").mean == pytest.approx((0.01 * 0.4 * 2.0) ** (1 / 3))
    ratios = table.ratios(_rows())
    over_baseline = ratios["GFM-MTL-All / GFM-Baseline-All"]["energy"]
    assert {d: e.mean for d, e in over_baseline.items()} == pytest.approx(dict.fromkeys([*DATA, "geometric mean"], 0.1))
    over_own = ratios["GFM-MTL-All / own model"]["energy"]
    assert [over_own[d].mean for d in DATA] == pytest.approx([2.0, 2.0, 0.08 / 0.03])
    assert "References / own model" not in ratios


def test_a_dataset_without_forces_is_no_column_of_the_forces_table():
    m = matrices.matrix(_rows(), "forces")
    assert m.datasets == ("a", "c")
    assert m.estimate("GFM-MTL-All", "geometric mean").mean == pytest.approx(10 * (0.02 * 0.08) ** 0.5)


def test_a_model_that_lacks_a_dataset_has_no_geometric_mean():
    rows = [row for row in _rows() if (row["model"], row["data"]) != ("Model-a", "b")]
    m = matrices.matrix(rows, "energy")
    assert m.estimate("Model-a", "b") is None and m.estimate("Model-a", "geometric mean") is None
    assert m.estimate("Model-b", "geometric mean") is not None


def test_seeds_give_mean_and_sample_standard_deviation():
    seeds = (0.9, 1.0, 1.3)
    m = matrices.matrix(_rows(seeds), "energy")
    cell = m.estimate("Model-a", "b")
    assert (cell.mean, cell.spread) == pytest.approx((np.mean(seeds) * 0.4, np.std(seeds, ddof=1) * 0.4))
    mean = m.estimate("GFM-MTL-All", "geometric mean")
    assert (mean.mean, mean.spread) == pytest.approx((np.mean(seeds) * 0.04, np.std(seeds, ddof=1) * 0.04))
    ratio = table.ratios(_rows(seeds))["GFM-MTL-All / GFM-Baseline-All"]["energy"]["geometric mean"]
    assert (ratio.mean, ratio.spread, ratio.seeds) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12), 3)


def test_references_have_no_seed_and_go_with_every_seed():
    seeds = (1.0, 2.0)
    rows = [*_rows(seeds), *({**row, "model": "References", "energy_mae": 1.0} for row in _rows()[:3])]
    ratio = table.ratios(rows)["References / own model"]["energy"]["a"]
    assert (ratio.mean, ratio.seeds) == (pytest.approx((100 + 50) / 2), 2)


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="one split"):
        table.markdown([*_rows(), {**_rows()[0], "split": "train"}])
    row = {**_rows()[0], "seed": 0}
    with pytest.raises(ValueError, match="seed 0"):
        table.markdown([row, row])


def test_written_tables_hold_the_numbers(tmp_path):
    paths = table.write_tables(_rows((1.0, 1.5), unseen=7), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO((tmp_path / "out/table-energy.csv").read_text()))}
    assert float(rows["Model-b"]["c"]) == pytest.approx(5.0)
    assert float(rows["Model-b"]["c spread"]) == pytest.approx(np.std([4.0, 6.0], ddof=1))
    assert "b" not in next(csv.reader(io.StringIO((tmp_path / "out/table-forces.csv").read_text())))
    out = json.loads((tmp_path / "out/tables.json").read_text())
    assert out["energy"]["mae"]["Model-c"]["c"] == pytest.approx(
        {"mean": 0.0375, "spread": 0.0106066, "seeds": 2}, rel=1e-4
    )
    text = (tmp_path / "out/tables.md").read_text()
    assert "Model-a on c 7 of 12" in text and "2.5000 ± 0.7071 †" in text and "a 10, b 11, c 12" in text


def test_splits_of_other_sizes_are_counted_as_ranges_and_a_ratio_of_nothing_is_no_row():
    other = [{**row, "structures": row["structures"] + 2 * (row["data"] == "c")} for row in _rows((1.5,), unseen=3)]
    text = table.markdown([{**row, "stress_mae": None} for row in [*_rows(unseen=7), *other]])
    assert "structures: a 10, b 11, c 12 to 14." in text and "Model-a on c 3 to 7 of 12 to 14." in text
    assert "| forces |" in text and "| stress |" not in text


def test_a_model_whose_errors_are_not_finite_is_never_the_best_and_json_stays_json():
    rows = [{**r, "energy_mae": math.nan} if r["model"] == "Model-a" and r["data"] == "a" else r for r in _rows()]
    assert matrices.matrix(rows, "energy").best("a") == {"GFM-MTL-All", "GFM-Baseline-All"}
    json.dumps(table.tables(rows), allow_nan=False)


def test_the_terminal_reads_in_mev():
    console = Console(width=200, file=io.StringIO())
    console.print(table.rich_table(_rows(), "energy"))
    assert "meV/atom" in console.file.getvalue() and "2000.0" in console.file.getvalue()


def _texts(axes):
    return [t.get_text() for t in axes.texts]


def test_the_matrix_figure_prints_every_number():
    energy, forces, *_ = figures.error_matrix(_rows()).axes
    shown = [float(t) for t in _texts(energy)]
    models = matrices.matrix(_rows(), "energy").models
    expected = [1000 * x for m in models for x in (*ENERGY[m], math.prod(ENERGY[m]) ** (1 / 3))]
    assert shown == pytest.approx(expected, rel=6e-3)  # three digits
    assert len(_texts(forces)) == len(models) * 3 and "meV/Å" in forces.get_title()


def test_parity_draws_at_most_the_limit_but_states_the_error_of_all():
    rng = np.random.default_rng(0)
    label, error = rng.normal(size=5000), rng.normal(size=5000)
    nothing = np.full(3, np.nan)
    figure = figures.parity({"a": figures.Parity(label + error, label, nothing, nothing)}, limit=700)
    energy, forces = figure.axes
    assert energy.collections[0].get_array().sum() == 700
    assert _texts(energy) == [f"MAE {1000 * np.abs(error).mean():.3g} meV/atom"]
    assert _texts(forces) == ["no labels"]
    broken = figures.Parity(np.array([1.0, np.nan]), np.array([1.5, 2.0]), nothing, nothing)
    assert _texts(figures.parity({"a": broken}).axes[0]) == ["MAE 500 meV/atom\n1 predictions not finite"]


def test_convergence_has_a_column_per_task_and_a_curve_per_model():
    def records(tasks):
        return [
            {
                "step": s,
                "epoch": s // 5,
                "split": split,
                "task": t,
                "loss": 1 / s,
                "energy_mae": 2 / s,
                "forces_mae": None,
            }
            for s in range(1, 11)
            for t in tasks
            for split in ("train", "validation")
        ]

    figure = figures.convergence({"both": records(["a", "b"]), "one": records(["b"])})
    assert len(figure.axes) == 6
    loss_a, loss_b, energy_a = figure.axes[:3]
    assert (loss_a.get_title(), loss_b.get_title()) == ("a", "b")
    assert [len(axes.get_lines()) for axes in figure.axes] == [1, 2, 1, 2, 0, 0]
    assert energy_a.get_lines()[0].get_ydata() == pytest.approx([2000 / s for s in range(1, 11)])
    with pytest.raises(ValueError, match="no record of split 'test'"):
        figures.convergence({"both": records(["a"])}, split="test")


def test_every_element_has_a_place_of_its_own_in_the_periodic_table():
    assert len({periodic_table.place(z) for z in range(1, 119)}) == 118
    groups = {1: (1, 3, 11, 19, 37, 55, 87), 2: (4, 12, 20, 38, 56, 88), 8: (26, 44, 76, 108), 11: (29, 47, 79, 111)}
    groups |= {
        3: (21, 39, 71, 103),
        14: (6, 14, 32, 50, 82, 114),
        17: (9, 17, 35, 53, 85, 117),
        18: (2, 10, 18, 36, 54, 86),
    }
    for column, elements in groups.items():
        assert {periodic_table.place(z)[1] for z in elements} == {column}
    assert [periodic_table.place(z)[0] for z in (1, 2, 3, 18, 19, 54, 55, 118)] == [1, 1, 2, 3, 4, 5, 6, 7]
    assert {periodic_table.place(z)[0] for z in range(57, 71)} == {8.35}
    assert {periodic_table.place(z)[0] for z in range(89, 103)} == {9.35}
    with pytest.raises(ValueError, match="119"):
        periodic_table.place(119)


def test_the_periodic_table_counts_all_and_each(tmp_path):
    figure = periodic_table.periodic_tables({"molecules": {1: 3, 6: 1}, "crystals": {6: 4, 92: 12_345}})
    tables = [a for a in figure.axes if len(a.patches) == 118]
    captions = [next(t for t in _texts(a) if "elements" in t) for a in tables]
    assert captions == ["3 elements, 12,353 atoms", "2 elements, 4 atoms", "2 elements, 12,349 atoms"]
    assert {"12.3k", "5", "3"} <= set(_texts(tables[0]))
    colour = {s: p.get_facecolor() for s, p in zip(SYMBOLS[1:], tables[1].patches, strict=True)}
    assert len(set(colour.values())) == 3 and colour["U"] == colour["He"] != colour["C"]
    figures.save(figure, tmp_path / "elements.png")
    assert matplotlib.image.imread(tmp_path / "elements.png").shape[1] == 1600
    assert [p.name for p in tmp_path.iterdir()] == ["elements.png"]
    with pytest.raises(ValueError, match="no atoms"):
        periodic_table.periodic_tables({"empty": {}})
