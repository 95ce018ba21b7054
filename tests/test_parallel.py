"""One process that holds every branch is the definition; any number of ranks, placed in any way, equals it."""

import itertools
import math
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import HashStore, TCPStore

from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.parallel import heartbeat
from multifid.parallel.gradients import Gradients, ModelPart
from multifid.parallel.groups import Group, alone
from multifid.parallel.launch import Launch, launch
from multifid.parallel.layout import Load, place
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from multifid.training import share
from multifid.training.checkpoint import load_checkpoint
from multifid.training.feed import make_draws
from multifid.training.journal import read_journal
from multifid.training.optimizer import OPTIMIZERS
from multifid.training.resolve import needs_trial
from multifid.training.share import WINDOW, Exchange, Shared
from parallel_worker import HOST, train_until_killed
from test_model import KINDS
from test_train import assert_same_bits

TASKS = ("apple", "berry", "cherry", "damson", "elder")
LR = 1e-3


def values_of(stores, tasks: int, run: str = "unused", placement="auto", forces="direct", **train) -> dict:
    return {
        "run": str(run),
        "tasks": {t: {"store": str(stores[t]), "weight": 1.0 + i / 2} for i, t in enumerate(TASKS[:tasks])},
        "model": {
            "cutoff": 3.0,
            "encoder": {"name": "egnn", "layers": 1, "hidden": 8, "vectors": 2},
            **branches_with(forces),
        },
        "train": {"batch": 3, "steps": 12, "epoch_steps": 6, "lr": LR, "warmup": 2, "clip": 0.5, "precision": "fp64"}
        | train,
        "parallel": {"placement": placement},
    }


def branches_with(forces: str) -> dict:
    """The shapes of branches: of one kind of forces, or (`both`) apple's conservative beside direct ones."""
    if forces != "both":
        return {"branch": {"hidden": [6], "forces": forces}}
    return {"branch": {"hidden": [6]}, "branches": {"apple": {"forces": "conservative"}}}


def random_placement(tasks: int, ranks: int, seed: int) -> dict[str, list[int]]:
    """Any placement at all: groups of any sizes that overlap as they happen to; nobody idle."""
    generator = random.Random(seed)
    out = {t: sorted(generator.sample(range(ranks), generator.randint(1, ranks))) for t in TASKS[:tasks]}
    for idle in set(range(ranks)) - {r for where in out.values() for r in where}:
        task = generator.choice(TASKS[:tasks])
        out[task] = sorted({*out[task], idle})
    return out


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300))


def assert_equal_to_one_process(one: dict, many: list[dict], tolerance: float) -> None:
    for rank in many:
        assert rank["late"] == [0] * 5, "buckets that were launched only when the backward pass was over"
        for a, b in zip(one["totals"], rank["totals"], strict=True):
            np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(rank["validation"], one["validation"], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(rank["norms"], one["norms"], rtol=tolerance)
        assert rank["norms"] == many[0]["norms"], "all ranks decide from the same bits"
        for mine, reference in zip(rank["gradients"], one["gradients"], strict=True):
            largest = max(np.abs(g).max() for g in reference.values())
            for name, g in mine.items():
                a = reference[name]
                assert np.abs(g - a).max() <= tolerance * max(np.abs(a).max(), 1e-3 * largest), name
        for kind in ("weights", "averages"):
            for name, tensor in rank[kind].items():
                assert difference(one[kind][name], tensor) <= tolerance, name
    assert set().union(*(rank["weights"] for rank in many)) == set(one["weights"])
    for step in range(5):
        seen = [s for rank in many for batch in rank["structures"][step] for s in batch]
        assert sorted(seen) == sorted(s for batch in one["structures"][step] for s in batch)


SIZES = [(5, 1), (5, 2), (5, 3), (5, 5), (5, 7), (3, 5), (2, 4), (1, 3)]
UNEVEN = {"apple": [0, 1, 2, 3], "berry": [3, 4], "cherry": [4], "damson": [5, 6], "elder": [0, 6]}
PLACED = [(tasks, ranks, placement) for tasks, ranks in SIZES for placement in ("replicated", "split", "random")]
PLACED += [(5, 7, "uneven"), (5, 3, "auto")]
MODES = [  # forces, most edges of a micro-batch, task without forces, task without labels in the third step
    ("direct", None, None, None),
    ("conservative", None, "berry", None),
    ("direct", 20, "apple", "cherry"),
    ("conservative", 20, None, "apple"),
    ("direct", None, None, "apple"),
    ("both", None, "berry", None),
    ("both", 20, None, "apple"),
]
# Every placement meets every mode and every size both kinds of forces; these meet what they would not in turn.
CASES = [(*case, i % 5) for i, case in enumerate(PLACED)]
CASES += [(5, 7, "uneven", 2), (5, 7, "uneven", 3), (5, 5, "split", 2), (5, 5, "random", 3), (2, 4, "split", 3)]
CASES += [(3, 2, "split", 5), (5, 7, "uneven", 5), (5, 3, "random", 6)]
_reference: dict = {}


@pytest.mark.parametrize(("tasks", "ranks", "placement", "mode"), CASES)
def test_any_number_of_ranks_equals_one_process(pool, five, tasks, ranks, placement, mode):
    forces, max_edges, *missing = MODES[mode]
    if (tasks, mode) not in _reference:
        values = values_of(five, tasks, forces=forces, max_edges=None)
        _reference[tasks, mode] = pool.run(1, "five_steps", values, *missing, 10_000)[0]
    where = {"random": random_placement(tasks, ranks, seed=ranks), "uneven": UNEVEN}.get(placement, placement)
    values = values_of(five, tasks, placement=where, forces=forces, max_edges=max_edges)
    many = pool.run(ranks, "five_steps", values, *missing, 2_000)
    if max_edges is not None and ranks < tasks:
        assert max(rank["micro"] for rank in many) > 1
    assert_equal_to_one_process(_reference[tasks, mode], many, tolerance=1e-10)


LAYOUTS = {  # ranks, placement, most edges of a micro-batch
    "micro-batches": (1, "auto", 20),
    "split": (3, "split", None),
    "replicated": (3, "replicated", 20),
    "explicit": (4, {"apple": [0, 1, 3], "berry": [1], "cherry": [2, 3]}, None),
    "uneven": (7, {"apple": [0, 1, 2, 3], "berry": [3, 4], "cherry": [4, 5, 6]}, 20),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("layout", "encoder", "forces"),
    [
        pytest.param(layout, encoder, forces, marks=[] if ordinary else pytest.mark.full)
        for layout, encoder, forces in [
            *itertools.product(LAYOUTS, ("egnn", "painn"), ("direct", "conservative")),
            ("explicit", "egnn", "both"),
            ("replicated", "painn", "both"),
        ]
        for ordinary in [
            (layout, encoder, forces) in {("micro-batches", "egnn", "direct"), ("explicit", "painn", "direct")}
        ]
    ],
)
def test_thirty_updates_of_every_optimizer_are_those_of_one_process(pool, five, optimizer, layout, encoder, forces):
    def values(placement="auto", max_edges=None) -> dict:
        options = {"optimizer": optimizer, "steps": 30, "lr": 5e-3, "weight_decay": 0.1, "max_edges": max_edges}
        out = values_of(five, 3, placement=placement, forces=forces, **options)
        out["model"]["encoder"] = {"name": encoder, "layers": 2, "hidden": 8}
        return out

    ranks, placement, max_edges = LAYOUTS[layout]
    one = pool.run(1, "updated_weights", values())[0]
    many = pool.run(ranks, "updated_weights", values(placement, max_edges))
    assert max_edges is None or max(rank["micro"] for rank in many) > 1
    for rank in many:
        for kind in ("weights", "averages"):
            for name, tensor in rank[kind].items():
                assert difference(one[kind][name], tensor) <= 1e-10, name
    assert set().union(*(rank["weights"] for rank in many)) == set(one["weights"])


@pytest.mark.parametrize(("ranks", "placement", "mode"), [(3, "split", 0), (5, "replicated", 1), (7, "random", 2)])
def test_in_single_precision_ranks_are_as_near_to_the_truth_as_one_process(pool, five, ranks, placement, mode):
    """The truth is one process in float64. Tensor by tensor, for weights, averages and all gradients."""
    forces, max_edges, *missing = MODES[mode]
    plain = values_of(five, 5, forces=forces, precision="fp32")
    exact = pool.run(1, "five_steps", values_of(five, 5, forces=forces), *missing, 10_000)[0]
    one = pool.run(1, "five_steps", plain, *missing, 10_000)[0]
    where = random_placement(5, ranks, seed=ranks) if placement == "random" else placement
    values = values_of(five, 5, placement=where, forces=forces, max_edges=max_edges, precision="fp32")
    for rank in pool.run(ranks, "five_steps", values, *missing, 2_000):
        for kind in ("weights", "averages"):
            for name, tensor in rank[kind].items():
                assert tensor.dtype == np.float32
                a = exact[kind][name]
                size = max(np.abs(a).max(), LR)  # a weight that is about zero was rounded at the size of its updates
                assert_as_near(tensor, one[kind][name], a, size, name)
        for step, gradients in enumerate(rank["gradients"]):
            largest = max(np.abs(g).max() for g in exact["gradients"][step].values())
            for name, g in gradients.items():
                a = exact["gradients"][step][name]
                assert_as_near(g, one["gradients"][step][name], a, max(np.abs(a).max(), 1e-3 * largest), name)
            norms = [np.array([run["norms"][step]]) for run in (rank, one, exact)]
            assert_as_near(*norms, exact["norms"][step], "norm")


def assert_as_near(many: np.ndarray, one: np.ndarray, exact: np.ndarray, size: float, name: str) -> None:
    """The error of many ranks is at most 8 times that of one process, or 8 roundings of the largest number."""
    own = max(np.abs(one - exact).max(), size * np.finfo(np.float32).eps)
    assert np.abs(many - exact).max() <= 8 * own, (name, np.abs(many - exact).max() / own)


@pytest.fixture(scope="session")
def crystals(tmp_path_factory) -> Path:
    """Small periodic cells with energy, forces and stress (of no theory at all: equality does not ask)."""
    folder, random = tmp_path_factory.mktemp("crystals"), np.random.default_rng(0)

    def text(numbers) -> str:
        return " ".join(repr(float(x)) for x in np.ravel(numbers))

    with (folder / "figs.xyz").open("w") as file:
        for k in range(40):
            cell = np.diag(random.uniform(2.5, 4.0, 3)) + random.uniform(-0.3, 0.3, (3, 3))
            stress = random.normal(0, 0.1, (3, 3))
            labels = f'energy={text(random.normal())} stress="{text(stress + stress.T)}"'
            symbols = ("C", "O")[: 1 + k % 2]
            columns = "Properties=species:S:1:pos:R:3:forces:R:3"
            file.write(f'{len(symbols)}\nLattice="{text(cell)}" pbc="T T T" {labels} {columns}\n')
            for place, symbol in zip((0.0, 0.5), symbols, strict=False):
                file.write(f"{symbol} {text(place * cell.sum(axis=0))} {text(random.normal(size=3))}\n")
    options = {"task": "figs", "fractions": (0.6, 0.2, 0.2), "trust_units": True, "progress": False}  # no real crystals
    prepare("extxyz", [folder / "figs.xyz"], folder / "figs", **options)
    return folder / "figs"


def test_stress_periodic_cells_and_tasks_of_one_store_on_ranks_equal_one_process(pool, five, crystals):
    """Two branches over the same structures, conservative: two rounds of gradients share one encoder's pass."""

    def values(placement) -> dict:
        out = values_of(five, 2, forces="conservative", placement=placement)
        out["tasks"] |= {
            "figs": {"store": str(crystals)},
            "figs2": {"store": str(crystals), "labels": "figs", "weight": 0.5},
        }
        return out | {"objective": {"stress": 0.5, "loss": "mse"}}

    one = pool.run(1, "five_steps", values("auto"), None, "berry", 10_000)[0]
    assert np.abs(one["totals"][0][2:, 2]).min() > 0, "the crystals' stress is in the objective"
    overlapping = {"apple": [0], "berry": [0, 1, 3], "figs": [1, 2], "figs2": [1, 2]}
    for ranks, placement in ((3, "split"), (4, overlapping)):
        many = pool.run(ranks, "five_steps", values(placement), None, "berry", 2_000)
        assert_equal_to_one_process(one, many, tolerance=1e-10)


ON_RANKS = [("painn", "conservative"), ("angular", "direct"), ("pna", "conservative")]
IN_FULL = itertools.product([kind for kind in KINDS if kind not in ("egnn", "painn")], ("direct", "conservative"))


@pytest.mark.parametrize(
    ("encoder", "forces"),
    ON_RANKS + [pytest.param(*case, marks=pytest.mark.full) for case in IN_FULL if case not in ON_RANKS],
)
def test_another_encoder_and_ranks_without_any_branch_equal_one_process(pool, five, encoder, forces):
    """A rank that holds the encoder only, the first one among them, still takes part in everything."""

    def values(placement) -> dict:
        out = values_of(five, 3, forces=forces, placement=placement, max_edges=20)
        out["model"] |= {"encoder": KINDS[encoder] | {"layers": 2, "hidden": 8}}
        out["parallel"] |= {"allow_idle": True}
        return out

    one = pool.run(1, "five_steps", values("auto"), None, None, 10_000)[0]
    idle = {"apple": [1], "berry": [1, 3], "cherry": [3]}
    for ranks, placement in ((3, "split"), (4, idle)):
        many = pool.run(ranks, "five_steps", values(placement), None, None, 900)
        assert_equal_to_one_process(one, many, tolerance=1e-10)


def test_the_ranks_of_a_host_train_from_one_copy_of_each_store(pool, five, tmp_path):
    values = values_of(five, 3, str(tmp_path / "run"), "split", stage=str(tmp_path / "near"), steps=2)
    pool.run(3, "whole_run", values)
    assert sorted(p.name.partition("-")[0] for p in (tmp_path / "near").iterdir()) == ["apple", "berry", "cherry"]


@pytest.mark.parametrize(
    ("ranks", "placement"),
    [(3, "replicated"), *(pytest.param(*x, marks=pytest.mark.full) for x in ((1, "replicated"), (4, "split")))],
)
def test_structures_that_travel_between_ranks_are_those_of_the_store(pool, five, tmp_path, ranks, placement):
    """Across windows, with blocks of a few structures dealt to the ranks: the bits of reading from the store."""
    common = {"steps": 24, "epoch_steps": 12, "checkpoint_every": 11, "diagnose_every": 7}
    pool.run(ranks, "whole_run", values_of(five, 3, str(tmp_path / "read"), placement, **common))
    values = values_of(five, 3, str(tmp_path / "shared"), placement, share_data=True, **common)
    for served, missed in pool.run(ranks, "shared_run", values, 5, 4):
        assert served >= 24 and not missed
    assert_same_bits(tmp_path / "read", tmp_path / "shared")
    read, shared = ((tmp_path / run / "diagnosis.jsonl").read_text() for run in ("read", "shared"))
    assert read == shared and read.count('"step": 21') == 3


def test_who_waits_for_structures_leaves_with_the_run(five):
    """Steps far ahead have windows of their own; where the run has ended nobody waits, and the thread ends."""
    config = parse_config(values_of(five, 1), "test")
    sources = open_sources(config.tasks)
    draws = make_draws(config, sources)
    exchange = Exchange(sources, draws, {"apple": [0]}, 3.0, alone(), ahead=3 * WINDOW)
    exchange.reached(2 * WINDOW + 5)
    assert exchange.wait(5 * WINDOW + 4).chosen[0].size and sorted(exchange.sources[0].store.windows) == [2, 3, 4, 5]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(exchange.wait, 9 * WINDOW)
        exchange.leave()
        with pytest.raises(RuntimeError, match="the run has ended"):
            waiting.result(timeout=30)
    exchange._thread.join(timeout=30)
    assert not exchange._thread.is_alive()


def test_a_rank_holds_its_blocks_of_a_store_and_no_others(five):
    """Together the ranks hold every train structure once, as the store has it."""
    store = Shared(Store(five["apple"]), ["apple"])
    with patch.object(share, "BLOCK", 7):
        pieces = [store.piece(Group((0, 1, 2), rank)) for rank in range(3)]
    size = store.size("train")
    for rank, piece in enumerate(pieces):
        places = [p for p in range(size) if p // 7 % 3 == rank]
        packed = store.read(store.pick("train", np.array(places)))
        assert np.array_equal(piece.natoms, packed.natoms)
        assert np.array_equal(piece.rows["positions"], packed.positions)
        assert np.array_equal(piece.rows["labels/apple/energy"], packed.labels["apple"].energy)
        again = piece.take(np.arange(len(places))[::-1]).packed({"apple": None})
        assert np.array_equal(
            again.labels["apple"].forces[: again.natoms[0]], packed.labels["apple"].forces[-again.natoms[0] :]
        )
    assert sum(len(piece.natoms) for piece in pieces) == size


def test_the_shared_branch_is_reduced_over_the_ranks_of_all_its_tasks(pool, five):
    one = pool.run(1, "five_steps", values_of(five, 3) | {"branches": "shared"}, None, None, 10_000)[0]
    many = pool.run(3, "five_steps", values_of(five, 3, placement="split") | {"branches": "shared"}, None, None, 900)
    assert_equal_to_one_process(one, many, tolerance=1e-10)


def test_a_rank_holds_the_encoder_and_its_own_branches_and_nothing_else(pool, five):
    """Counted in what lives, in all four kinds of copies, against the sizes of one process."""
    one = pool.run(1, "five_steps", values_of(five, 5), None, None, 10_000)[0]
    size = {part: sum(w.nbytes for n, w in one["weights"].items() if n.startswith(part)) for part in ("encoder",)}
    size |= {t: sum(w.nbytes for n, w in one["weights"].items() if n.startswith(f"branches.{t}.")) for t in TASKS}
    many = pool.run(3, "five_steps", values_of(five, 5, placement="split"), None, None, 2_000)
    for rank in many:
        own = {n.split(".")[1] for n in rank["weights"] if n.startswith("branches")}
        assert 0 < len(own) < 5
        expected = size["encoder"] + sum(size[t] for t in own)
        assert rank["bytes"] == {
            "parameters": expected, "gradients": expected, "moments": 2 * expected, "averages": expected
        }  # fmt: skip


def test_process_groups_are_made_once_in_the_life_of_a_world(pool):
    placements = [{"a": [0, 1], "b": [2, 3]}, {"a": [0, 1, 2, 3], "b": [3, 2]}, {"a": [1, 2], "b": [0]}]
    for made, sums in pool.run(4, "groups_of", placements * 2):
        assert made == 3, "beside the world's own: three sub-groups of several ranks"
        assert sums[: len(sums) // 2] == sums[len(sums) // 2 :] and {2.0, 4.0} <= set(sums)


def test_no_process_group_is_left_of_a_run(pool, five):
    values = values_of(five, 2, placement="split")
    values["model"]["encoder"] = {"name": "egnn", "layers": 1, "hidden": 8}
    before = pool.run(2, "groups_kept")
    pool.run(2, "updated_weights", values)
    values["train"]["balance"] = "pcgrad"
    pool.run(2, "updated_weights", values)
    assert pool.run(2, "groups_kept") == before


def through(pool, values: dict, starts: list[tuple[int, str, int | None]]) -> Path:
    """A run in several starts: (ranks, placement, the step in which its last rank gets SIGTERM)."""
    for ranks, placement, stop_at in starts:
        codes = pool.run(ranks, "whole_run", values | {"parallel": {"placement": placement}}, stop_at, ranks - 1)
        assert codes == [143 if stop_at else 0] * ranks, "SIGTERM on any rank stops all"
    return Path(values["run"])


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("last.safetensors", "model.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(difference(a[k].numpy(), b[k].numpy()) <= 1e-10 for k in a)
    for mine, theirs in zip(read_journal(one), read_journal(other), strict=True):
        assert {k: mine[k] for k in ("step", "task", "split", "structures")} == {
            k: theirs[k] for k in ("step", "task", "split", "structures")
        }
        for key in ("loss", "energy_mae", "forces_mae"):
            same = mine[key] == theirs[key]  # also where there is none
            assert same or math.isclose(mine[key], theirs[key], rel_tol=1e-10)
    state, files, _ = load_checkpoint(one)
    state_other, files_other, _ = load_checkpoint(other)
    assert files.keys() == files_other.keys()
    assert state["position"]["seen"] == state_other["position"]["seen"], "the same structures in every step"
    for key in ("step", "places", "draws", "updates"):
        assert state[key] == state_other[key]
    assert state["schedule"] == pytest.approx(state_other["schedule"], rel=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_with_any_number_of_ranks(pool, five, tmp_path, optimizer):
    """1 -> 2 -> 5 -> 3 ranks, replicated and split in turn, stopped by SIGTERM on the last rank each time."""

    def values(run: str) -> dict:
        return values_of(five, 5, run=tmp_path / run, log_every=2, optimizer=optimizer)

    whole = through(pool, values("whole"), [(1, "auto", None)])
    starts = [(1, "auto", 2), (2, "replicated", 3), (5, "split", 2), (3, "replicated", None)]
    assert_same_run(whole, through(pool, values("changed"), starts))


def test_an_automatic_placement_is_written_out_and_chosen_anew_for_other_ranks(pool, five, tmp_path):
    from multifid.config import load_config

    values = values_of(five, 3, run=tmp_path / "run")
    for ranks, stop_at in ((2, 2), (3, 2)):
        pool.run(ranks, "whole_run", values, stop_at)
        parallel = load_config(tmp_path / "run" / "config.yaml").parallel
        assert parallel.ranks == ranks and {r for w in parallel.placement.values() for r in w} == set(range(ranks))


def test_trial_steps_see_what_a_task_really_costs_and_auto_gives_it_ranks(pool, five):
    """Each structure of one task sleeps for 0.2 s: what no estimate from edges can know. 3 of them in a step."""
    (cost, holding), other = pool.run(2, "trial_with_a_slow_task", values_of(five, 3), "berry", 0.2)
    assert (cost, holding) == other, "all ranks place by the same numbers"
    assert cost["berry"] > 0.3 and max(cost["apple"], cost["cherry"], *holding.values()) < 0.5 * cost["berry"]
    placement = place(list(cost), "auto", 4, loads={t: Load(cost[t], holding[t]) for t in cost})
    assert len(placement["berry"]) > max(len(placement["apple"]), len(placement["cherry"]))


def test_a_run_with_measured_costs_is_the_run_and_measures_only_where_it_must(pool, five, tmp_path):
    from multifid.config import load_config

    values = values_of(five, 5, run=tmp_path / "whole", log_every=2)
    whole = through(pool, values, [(1, "auto", None)])
    values["run"] = str(tmp_path / "measured")
    for ranks, stop_at in ((2, 3), (3, None)):
        measured = values | {"parallel": {"placement": "auto", "costs": "measured"}}
        assert pool.run(ranks, "whole_run", measured, stop_at) == [143 if stop_at else 0] * ranks
        written = load_config(tmp_path / "measured" / "config.yaml")
        assert needs_trial(written, ranks + 1) and not needs_trial(written, ranks), "once for a number of ranks"
    assert_same_run(whole, tmp_path / "measured")
    for placement in ("replicated", {t: [0] for t in TASKS}):
        follows_nothing = values | {"parallel": {"placement": placement, "costs": "measured"}}
        with pytest.raises(ValueError, match="follows no costs"):
            needs_trial(parse_config(follows_nothing, "test"), 2)


def test_a_flipped_byte_is_named_and_all_ranks_take_the_checkpoint_before(pool, five, tmp_path):
    run = through(pool, values_of(five, 5, run=tmp_path / "run", checkpoint_every=4), [(2, "split", None)])
    damaged = run / "checkpoints" / "step-000012" / "branch-cherry.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    for step, files, complaints in pool.run(3, "newest_checkpoint", str(run)):
        assert step == 8 and len(files) == 6
        assert len(complaints) == 1 and str(damaged) in complaints[0]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("soap", marks=pytest.mark.full)])
def test_tasks_join_and_leave_a_run_on_any_number_of_ranks_alike(pool, five, tmp_path, optimizer):
    def run(name: str, ranks: tuple[int, int, int]) -> Path:
        for n, tasks in zip(ranks, (2, 4, 3), strict=True):
            values = values_of(five, tasks, run=tmp_path / name, change_tasks=True, log_every=1, optimizer=optimizer)
            stop_at = None if tasks == 3 else 3
            assert pool.run(n, "whole_run", values, stop_at) == [0 if stop_at is None else 143] * n
        return tmp_path / name

    one, many = run("one", (1, 1, 1)), run("many", (2, 3, 2))
    assert_same_run(one, many)
    state, files, _ = load_checkpoint(many)
    assert set(files) == {"encoder", "branch-apple", "branch-berry", "branch-cherry"}
    # 12 steps; apple and berry from the beginning, cherry (and damson, who left) from the fifth step on
    assert state["places"] == {"apple": 36, "berry": 36, "cherry": 24}
    joined = [k for k in files["branch-cherry"] if k.startswith("updates/")]
    assert {int(files["branch-cherry"][k]) for k in joined} == {8}


def test_other_tasks_are_refused_by_every_rank_unless_told(pool, five, tmp_path):
    pool.run(2, "whole_run", values_of(five, 2, run=tmp_path / "run"), 2)
    said = pool.run(3, "error_of", values_of(five, 3, run=tmp_path / "run"))
    assert len([text for text in said if text.startswith("ValueError") and "train.change_tasks=true" in text]) == 3


def test_a_fault_of_one_rank_ends_all(pool, five, tmp_path):
    """A directory that only rank 0 looks into cannot be written: the others leave with it."""
    (tmp_path / "file").write_text("not a directory")
    said = pool.run(3, "error_of", values_of(five, 3, run=tmp_path / "file" / "run"))
    assert (
        said[0].startswith("NotADirectoryError")
        and said[1:] == ["OtherRankFailed: another rank failed, and says why in its own output"] * 2
    )


class Recorded(Group):
    """A group that writes down what is launched, and when."""

    log: list[str] = []  # noqa: RUF012
    travels = True

    def sum_later(self, tensor):
        self.log.append(f"{self.rank}:{tensor.numel()}")


def test_buckets_are_launched_in_the_global_order_whatever_arrives_first():
    """Gradients arrive encoder first, in the order of construction: the worst one. Nothing leaves out of order."""
    Recorded.log = log = []
    layers = [nn.Linear(1, n, bias=False) for n in (3, 4, 5, 6)]
    parts = [
        ModelPart("branch-a", [*layers[0].parameters(), *layers[1].parameters()], Recorded(rank=1)),
        ModelPart("encoder", [*layers[2].parameters(), *layers[3].parameters()], Recorded(rank=2)),
    ]
    gradients = Gradients(parts, bucket_bytes=4)
    x, states = torch.ones(1, 1), []
    layers[0](x).sum().backward()
    assert not log, "a micro-batch before the last launches nothing"
    losses = [layer(x).sum() for layer in layers]
    gradients.start(torch.stack(losses).sum())
    for k in (2, 3, 0, 1):
        losses[k].backward()
        states.append(len(log))
    gradients.finish()
    assert log == ["1:4", "1:3", "2:6", "2:5"] and states == [0, 0, 0, 4]
    assert torch.equal(layers[0].weight.grad, torch.full((3, 1), 2.0)), "two micro-batches add up"


def test_what_a_backward_pass_does_not_reach_is_launched_before_it():
    Recorded.log = log = []
    layers = [nn.Linear(1, 1, bias=False) for _ in range(4)]
    gradients = Gradients([ModelPart(f"part-{k}", [*layers[k].parameters()], Recorded(rank=k)) for k in range(4)])
    x = torch.ones(1, 1, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.tanh(layers[3](x)).sum() + 0.0 * layers[0](x).sum(), x, create_graph=True)
    loss = slope.square().sum() + layers[1](x).sum()
    gradients.start(loss)
    assert log == [], "the first one is reached, through a second derivative only"
    loss.backward()
    assert log == ["0:1", "1:1", "2:1", "3:1"], "the third one is not reached, and holds up nobody"
    gradients.finish()
    log.clear()
    gradients.start(layers[1](x).sum())
    assert log == ["0:1"]
    with pytest.raises(AssertionError, match=r"part-2 arrived twice, or was not expected"):
        layers[2](x).sum().backward()
    gradients.finish()
    gradients.start(None)
    assert log[4:] == log[:4] == ["0:1", "1:1", "2:1", "3:1"]


def test_the_launch_is_read_from_torchrun_and_from_srun():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert launch(torchrun) == Launch(3, 8, 1, "10.0.0.1", 29500)
    srun = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
    there = launch(srun | {"SLURM_STEP_NODELIST": "nid[001234-001236,001240]"})
    assert (there.rank, there.size, there.local_rank, there.address) == (5, 8, 1, "nid001234")
    assert launch(srun | {"SLURM_STEP_NODELIST": "a7,b[1-2]"}).address == "a7"
    assert launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}) == Launch(), "a batch script"
    assert launch({}) == Launch() == launch({"RANK": "0", "WORLD_SIZE": "1"})
    with pytest.raises(ValueError, match="rank 8 of 8"):
        launch(torchrun | {"RANK": "8"})
    with pytest.raises(ValueError, match="MASTER_PORT to a whole number, it is 'x'"):
        launch(torchrun | {"MASTER_PORT": "x"})


class Hanging:
    """A store behind a network that was cut: calls do not come back."""

    def set(self, key, value):
        time.sleep(60)


@pytest.mark.parametrize(("silent", "expected"), [(1, "rank 1 is silent"), (0, "rank 0 is silent")])
def test_a_silent_rank_is_heard_of_by_all_others(silent, expected):
    store, left = HashStore(), {}
    hearts = {rank: heartbeat.Heartbeat(store, rank, 3, "fault", silence=0.4) for rank in {0, 1, 2} - {silent}}
    for rank, heart in hearts.items():
        heart.leave = lambda message, r=rank: left.setdefault(r, message)
        heart.start()
    time.sleep(0.2)
    assert not left, "a rank that has not yet spoken is waited for"
    until = time.monotonic() + 5
    while len(left) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert set(left) == set(hearts) and all(expected in message for message in left.values())


def test_a_store_that_does_not_answer_is_left():
    left, heart = [], heartbeat.Heartbeat(Hanging(), 1, 2, "fault", silence=0.2)
    heart.leave = left.append
    heart.start()
    time.sleep(0.6)
    assert len(left) == 1 and "cannot reach the rendezvous store" in left[0]


@pytest.mark.parametrize(
    ("dead", "blow", "hosts_store", "writing", "sharing"),
    [
        (1, signal.SIGKILL, False, False, False),
        (1, signal.SIGSTOP, False, False, False),
        (0, signal.SIGKILL, True, False, False),  # the store dies with it, as under srun
        (1, signal.SIGKILL, False, True, False),
        pytest.param(1, signal.SIGKILL, False, False, True, marks=pytest.mark.full),
        pytest.param(2, signal.SIGSTOP, False, False, True, marks=pytest.mark.full),
    ],
)
def test_when_a_rank_is_gone_the_others_leave_and_the_run_goes_on(
    five, pool, tmp_path, dead, blow, hosts_store, writing, sharing
):
    """Killed or stopped in a step, with the store that it hosts, or in the midst of writing a checkpoint; also where
    the others wait for structures that it holds."""
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    values = values_of(five, 3, run=run, epoch_steps=100_000) | {"parallel": {"placement": "split", "silence": 4.0}}
    values["train"] |= {"checkpoint_every": 2, "log_every": 2, "steps": 100_000}
    if sharing:
        values["parallel"]["placement"], values["train"]["share_data"] = "replicated", True
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    base = {"WORLD_SIZE": "3", "MASTER_ADDR": HOST, "MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "0"}
    if hosts_store:
        del store  # and its port is free for rank 0
    base |= {"TORCHELASTIC_USE_AGENT_STORE": str(not hosts_store)}
    context = get_context("forkserver")
    ranks = [
        context.Process(
            target=train_until_killed,
            args=(values, base | {"RANK": str(r), "LOCAL_RANK": str(r)}, 4 if writing and r == dead else None),
        )
        for r in range(3)
    ]
    for rank in ranks:
        rank.start()
    # A part of a file of the fourth step is on disk, and stays as it is; or some checkpoint is there.
    while not list(checkpoints.glob(".step-000004.part/torn" if writing else "step-*")):
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.02)
    os.kill(ranks[dead].pid, blow)
    for rank in (r for r in ranks if r is not ranks[dead]):
        rank.join(timeout=30)
        assert rank.exitcode not in (None, 0)
    ranks[dead].kill()
    (step, _, complaints), *_ = pool.run(2, "newest_checkpoint", str(run))
    assert not complaints and (step == 2 if writing else step > 0)
    assert pool.run(2, "whole_run", values, 3) == [143, 143]
    (again, _, complaints), *_ = pool.run(2, "newest_checkpoint", str(run))
    assert again == step + 4 and not complaints and not list(checkpoints.glob(".step-*")), "nothing torn is left"
