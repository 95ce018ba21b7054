"""What all ranks know of a step before its backward pass: by arithmetic, or sent a step ahead."""

import itertools

import numpy as np
import pytest
import torch

from conftest import write_molecules
from multifid.config import parse_config
from multifid.feed.loader import cut, cut_evenly, most_pieces, open_sources
from multifid.parallel.groups import Group, alone
from multifid.parallel.layout import place
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
from multifid.training.build import build
from multifid.training.counts import Counts, Known, announced
from multifid.training.feed import Feed, make_draws
from multifid.training.loss import COLUMNS, label_counts
from multifid.training.step import Totals
from test_parallel import assert_equal_to_one_process, assert_same_run, through, values_of


def without(path, kind: str, frames: set[int]) -> None:
    """Take a label out of some frames of a file: the energy, all forces, or those of one atom."""
    lines, at = path.read_text().splitlines(), 0
    for frame in range(10**6):
        if at == len(lines):
            break
        n = int(lines[at])
        if frame in frames and kind == "energy":
            lines[at + 1] = " ".join(w for w in lines[at + 1].split(" ") if not w.startswith("energy="))
        elif frame in frames:
            for row in range(at + 2, at + 2 + (n if kind == "forces" else 1)):
                lines[row] = " ".join([*lines[row].split()[:4], "nan", "nan", "nan"])
        at += n + 2
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def partial(five, tmp_path_factory) -> dict:
    """As `five`: apple complete, berry without some energies, cherry without some forces, damson without any, elder
    without the forces of one atom."""
    folder, out = tmp_path_factory.mktemp("partial"), dict(five)
    lost = {"berry": ("energy", set(range(0, 40, 3))), "cherry": ("forces", {1, 4, 5, 9}), "elder": ("atom", {2})}
    for task, depth, offset in (("berry", 0.7, 1.5), ("cherry", 1.3, -2.0), ("damson", 0.9, 0.5), ("elder", 1.1, -1.0)):
        path = folder / f"{task}.xyz"
        write_molecules(path, 30, depth, offset, seed=7)
        without(path, *lost.get(task, ("forces", set(range(30)))))
        options = {"task": task, "fractions": (0.6, 0.2, 0.2), "trust_units": True, "progress": False}
        prepare("extxyz", [path], folder / task, **options)
        out[task] = folder / task
    return out


def test_a_store_says_which_labels_its_train_split_has_throughout(partial):
    complete = {task: Store(path).manifest["tasks"][task]["complete"] for task, path in partial.items()}
    assert complete["apple"] == ["energy", "forces"] and complete["berry"] == ["forces"]
    assert complete["cherry"] == complete["damson"] == ["energy"]
    elder = Store(partial["elder"])
    labels = elder.read(elder.index("train"), ["elder"]).labels["elder"]
    assert ("forces" in complete["elder"]) == bool(np.isfinite(labels.forces).all())


@pytest.mark.parametrize("most", [None, 1, 7, 50, 10_000])
def test_the_most_pieces_of_any_rank_are_those_that_ranks_cut(most):
    random = np.random.default_rng(0)
    for ranks, structures in ((1, 0), (3, 0), (1, 40), (3, 40), (7, 5), (50, 400)):
        costs = np.rint(random.gamma(1.0, 10.0, structures)) * random.integers(0, 2, structures)
        owners = random.integers(0, ranks, structures)
        cuts = [len(cut(costs[owners == rank], most)) for rank in range(ranks)]
        assert most_pieces(costs, owners, most) == max(cuts)


def test_micro_batches_are_as_few_and_as_even_as_any_cut_in_their_order():
    """Against all ways to cut eight structures; where one exceeds the budget by itself, the others do not grow."""
    random = np.random.default_rng(0)
    for most in (8, 15, 30, 200):
        for _ in range(20):
            costs = np.minimum(np.rint(random.gamma(1.0, 6.0, 8)), most)
            ways = [[*cuts, 8] for n in range(8) for cuts in itertools.combinations(range(1, 8), n)]
            largest = [(len(w), max(costs[a:b].sum() for a, b in itertools.pairwise([0, *w]))) for w in ways]
            found = cut_evenly(costs, most)
            assert [i for piece in found for i in range(8)[piece]] == list(range(8))
            assert (len(found), max(costs[piece].sum() for piece in found)) == min(w for w in largest if w[1] <= most)
    alone = np.array([3.0, 3.0, 50.0, 3.0, 3.0])
    assert cut_evenly(alone, 8) == cut(alone, 8)


@pytest.mark.parametrize("max_edges", [None, 20])
def test_what_is_known_by_arithmetic_is_what_the_batches_hold(partial, max_edges):
    config = parse_config(values_of(partial, 5, max_edges=max_edges, batch=6), "test")
    sources = open_sources(config.tasks)
    placement = place(list(config.tasks), "split", 3)
    draws = make_draws(config, sources)
    trainer = build(config, sources, place(list(config.tasks), "auto", 1), 1, alone())
    for step in range(6):
        ranks = [Feed(config, sources, draws, placement, rank).step(step) for rank in range(3)]
        batches = [trainer.ready(batch) for rank in ranks for batch in rank.batches]
        held = sum(label_counts(batch.labels, 5).numpy() for batch in batches)
        for rank in ranks:
            known = rank.known.counts
            np.testing.assert_array_equal(known, ranks[0].known.counts)
            np.testing.assert_array_equal(known[~np.isnan(known)], held[~np.isnan(known)])
            assert rank.known.rounds == max(len(other.batches) for other in ranks)
    unknown = {(t, k) for i, t in enumerate(config.tasks) for j, k in enumerate(COLUMNS) if np.isnan(known[i, j])}
    assert unknown - {("elder", "forces")} == {("berry", "energy"), ("cherry", "forces")}


class Echo:
    """A sum that is there when it has been waited for."""

    waited = False

    def wait(self):
        self.waited = True


def test_counts_that_travel_leave_before_the_step_ahead_of_theirs_is_made():
    class Far(Group):
        def sum_later(self, tensor):
            return Echo()

    def events(known: Known) -> list[str]:
        log: list[str] = []

        def prepared():
            for k in range(3):
                log.append(f"prepared {k}")
                yield k

        def counts(k: int) -> Counts:
            log.append(f"counts {k}")
            return Counts(lambda: np.ones((1, 3)), 1, known, Far((0, 1)), torch.device("cpu"))

        for k, _ in announced(prepared(), counts):
            log.append(f"step {k}")
        return log

    whole = Known(np.ones((1, 3)), 1)
    assert events(whole) == [f"{what} {k}" for k in range(3) for what in ("prepared", "counts", "step")]
    assert events(Known(np.array([[1.0, np.nan, 0.0]]), 1)) == [
        "prepared 0", "counts 0", "prepared 1", "counts 1", "step 0", "prepared 2", "counts 2", "step 1", "step 2"
    ]  # fmt: skip


def test_a_step_with_complete_labels_sums_nothing_before_its_backward_pass(pool, five, partial):
    """All collectives of three steps: the encoder's gradients, and a report of 3 x 23 sums, a norm and a stop flag."""
    noise = ("bookkeeping", "communication", "optimizer")
    for log in pool.run(3, "collectives_of", values_of(five, 3, placement="split")):
        log = [event for event in log if event not in noise]
        assert log == 3 * ["step", "forward", "backward", log[3], "sum 71"] and log[3].startswith("sum ")
    for log in pool.run(3, "collectives_of", values_of(partial, 3, placement="split")):
        log = [event for event in log if event not in noise]
        step = ["step", "forward", "backward", next(e for e in log if e.startswith("sum ") and e != "sum 2"), "sum 71"]
        assert log == ["sum 2", "sum 2", *step, "sum 2", *step, *step], (
            "two counts are not known, and leave a step ahead"
        )


IDLE = {"apple": [1], "berry": [1, 3], "cherry": [3], "damson": [1], "elder": [3]}
PLACED = [(3, "split"), (5, "replicated"), (4, IDLE)]
MODES = [("direct", None, False), ("conservative", 12, False), ("direct", 12, True), ("conservative", None, True)]
HELD = {(0, 0), (1, 1), (2, 2)}  # in the ordinary suite


@pytest.mark.parametrize(
    ("ranks", "placement", "forces", "max_edges", "sharded"),
    [
        pytest.param(*placed, *mode, marks=[] if (i, j) in HELD else pytest.mark.full)
        for i, placed in enumerate(PLACED)
        for j, mode in enumerate(MODES)
    ],
)
def test_with_labels_that_are_missing_here_and_there_ranks_equal_one_process(
    pool, partial, ranks, placement, forces, max_edges, sharded
):
    one = pool.run(1, "five_steps", values_of(partial, 5, forces=forces), None, None, 10_000)[0]
    values = values_of(partial, 5, placement=placement, forces=forces, max_edges=max_edges)
    values["parallel"] |= {"shard_encoder": sharded, "allow_idle": True}
    many = pool.run(ranks, "five_steps", values, None, None, 2_000)
    assert all(rank["sent"] == [True] * 5 for rank in many)
    assert_equal_to_one_process(one, many, tolerance=1e-10)


def test_a_run_with_missing_labels_is_stopped_and_goes_on_with_any_number_of_ranks(pool, partial, tmp_path):
    whole = through(pool, values_of(partial, 5, run=tmp_path / "whole", log_every=2), [(1, "auto", None)])
    starts = [(2, "replicated", 3), (4, "split", 2), (3, "split", None)]
    changed = values_of(partial, 5, run=tmp_path / "changed", log_every=2, max_edges=30)
    assert_same_run(whole, through(pool, changed, starts))


@pytest.mark.full
def test_tasks_with_missing_labels_join_and_leave_on_any_number_of_ranks_alike(pool, partial, tmp_path):
    def run(name: str, ranks: tuple[int, int, int]):
        for n, tasks in zip(ranks, (2, 4, 3), strict=True):
            values = values_of(partial, tasks, run=tmp_path / name, change_tasks=True, log_every=1)
            stop_at = None if tasks == 3 else 3
            assert pool.run(n, "whole_run", values, stop_at) == [0 if stop_at is None else 143] * n
        return tmp_path / name

    assert_same_run(run("one", (1, 1, 1)), run("many", (2, 3, 2)))


def test_a_store_that_promises_labels_it_has_not_ends_the_run(partial, tmp_path):
    config = parse_config(values_of(partial, 3), "test")
    sources = open_sources(config.tasks)
    placement = place(list(config.tasks), "auto", 1)
    for source in sources:
        for label_set in source.tasks.values():
            source.store.manifest["tasks"][label_set]["complete"] = ["energy", "forces"]
    trainer = build(config, sources, placement, 1, alone())
    feed = Feed(config, sources, make_draws(config, sources), placement)
    with pytest.raises(RuntimeError, match="processed other labels than the step holds"):
        for step in range(5):
            made = feed.step(step)
            trainer.step(made.batches, Totals(list(config.tasks), trainer.device), trainer.counts([], made.known))
