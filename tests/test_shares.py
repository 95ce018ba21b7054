"""Which rank processes which structure: against the divisible optimum, and against all ways of dealing a few."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from start import DATASETS, Start, by_rank

from conftest import measured_effort
from multifid.parallel.layout import Load, place
from multifid.parallel.shares import shares


def loads_of(costs, owners, ranks):
    return sum(np.bincount(owners[d], weights=np.asarray(costs[d], float), minlength=ranks) for d in costs)


def divisible_optimum(costs, placement):
    """The most that any set of draws asks of its ranks in the mean (max-flow min-cut: it can be reached)."""
    return max(
        sum(float(np.sum(costs[d])) for d in chosen) / len(set().union(*(placement[d] for d in chosen)))
        for k in range(1, len(costs) + 1)
        for chosen in itertools.combinations(costs, k)
    )


@st.composite
def steps(draw, draws=5, ranks=9, structures=25):
    count = draw(st.integers(1, ranks))
    some_ranks = st.lists(st.integers(0, count - 1), min_size=1, unique=True)
    names = [f"d{i}" for i in range(draw(st.integers(1, draws)))]
    cost = st.one_of(st.floats(0, 1000), st.integers(0, 5), st.just(7.0))
    return (
        {d: np.array(draw(st.lists(cost, max_size=structures)), float) for d in names},
        {d: draw(some_ranks) for d in names},
        count,
    )


@settings(max_examples=200, deadline=None)
@given(steps())
def test_every_structure_has_one_rank_that_holds_its_branch(step):
    costs, placement, _ = step
    owners = shares(costs, placement)
    assert list(owners) == list(costs)
    for draw, owner in owners.items():
        assert owner.shape == costs[draw].shape and owner.dtype == np.int64
        assert set(owner.tolist()) <= set(placement[draw])


@settings(max_examples=200, deadline=None)
@given(steps())
def test_the_most_loaded_rank_is_within_a_structure_for_each_set_of_ranks_of_the_optimum(step):
    costs, placement, ranks = step
    longest = max(loads_of(costs, shares(costs, placement), ranks))
    pools = {}
    for draw, where in placement.items():
        key = tuple(sorted(where))
        pools[key] = max(pools.get(key, 0.0), max(costs[draw], default=0.0))
    assert longest <= divisible_optimum(costs, placement) + sum(pools.values()) + 1e-3


@settings(max_examples=60, deadline=None)
@given(steps(), st.randoms(use_true_random=False))
def test_neither_the_order_of_draws_nor_that_of_their_ranks_nor_the_unit_changes_anything(step, rnd):
    costs, placement, _ = step
    order = rnd.sample(list(costs), len(costs))
    mixed = shares(
        {d: 4 * costs[d] for d in order}, {d: rnd.sample(placement[d], len(placement[d])) for d in placement}
    )
    for draw, owner in shares(costs, placement).items():
        np.testing.assert_array_equal(mixed[draw], owner)


def test_on_common_ranks_the_longest_is_within_a_third_of_the_best_of_all_ways():
    """Graham's bound for the longest-processing-time rule: 4/3 - 1/(3 ranks)."""
    rnd = random.Random(1)
    for _ in range(30):
        ranks, count = rnd.randint(2, 3), rnd.randint(2, 8)
        costs = [rnd.choice([1, 2, 3, 5, 8]) for _ in range(count)]
        best = min(
            max(sum(c for c, r in zip(costs, where, strict=True) if r == rank) for rank in range(ranks))
            for where in itertools.product(range(ranks), repeat=count)
        )
        half = count // 2
        step = {"a": np.array(costs[:half], float), "b": np.array(costs[half:], float)}
        owners = shares(step, dict.fromkeys(step, range(ranks)))
        assert max(loads_of(step, owners, ranks)) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_many_dealt_at_once_are_dealt_as_one_at_a_time():
    rng = np.random.default_rng(4)
    costs = rng.integers(100, 1000, 300)
    owner = shares({"a": costs}, {"a": range(7)})["a"]
    loads = np.zeros(7)
    for i in np.argsort(-costs, kind="stable"):  # the longest-processing-time rule, word for word
        loads[loads.argmin()] += costs[i]
    np.testing.assert_allclose(np.sort(loads_of({"a": costs}, {"a": owner}, 7)), np.sort(loads), rtol=1e-6)


def test_structures_without_cost_are_dealt_in_equal_numbers():
    owner = shares({"a": np.zeros(12)}, {"a": [1, 3, 4]})["a"]
    assert np.bincount(owner).tolist() == [0, 4, 0, 4, 4]


def test_where_one_task_is_too_much_for_its_ranks_the_others_are_still_even():
    costs = {"big": np.full(90, 10.0), "a": np.full(60, 1.0), "b": np.full(30, 1.0)}
    loads = loads_of(costs, shares(costs, {"big": [0, 1], "a": [1, 2, 3], "b": [3, 4]}), 5)
    assert loads.tolist() == [450, 450, 30, 30, 30]


def test_shared_ranks_fill_up_what_is_missing():
    costs = {"a": np.full(40, 1.0), "b": np.full(20, 1.0)}
    assert loads_of(costs, shares(costs, {"a": [0, 1], "b": [1, 2]}), 3).tolist() == [20, 20, 20]


def test_a_task_that_can_go_elsewhere_leaves_room_for_one_that_cannot():
    costs = {"free": np.full(2, 10.0), "bound": np.full(20, 1.0)}
    assert loads_of(costs, shares(costs, {"free": [0, 1], "bound": [0]}), 2).tolist() == [20, 20]


def test_small_structures_of_one_task_fill_the_gaps_that_large_ones_of_another_leave():
    costs = {"small": np.full(30, 1.0), "large": np.full(3, 10.0)}
    assert loads_of(costs, shares(costs, {"large": [0, 1], "small": [0, 1, 2]}), 3).tolist() == [20, 20, 20]


def test_many_structures_that_cost_nothing_do_not_take_long():
    costs = np.concatenate([np.full(1919, 5.0), np.zeros(100_000)])
    _, effort = measured_effort(lambda: shares({"a": costs}, {"a": range(1920)}))
    assert effort < 20


@pytest.mark.parametrize("kind", ["replicated", "split", "auto"])
def test_a_step_of_245760_structures_on_1920_ranks_is_cut_quickly_and_evenly(kind):
    rng = np.random.default_rng(0)
    costs = {f"t{i}": rng.lognormal(5 + i / 2, 1.0, 1920 * 128 // 5) for i in range(5)}
    placement = place(list(costs), kind, 1920, loads={t: Load(float(c.sum())) for t, c in costs.items()})
    owners, effort = measured_effort(lambda: shares(costs, placement))
    assert effort < 5
    longest = max(loads_of(costs, owners, 1920))
    assert longest <= 1.001 * divisible_optimum(costs, placement)


def test_costs_that_are_no_costs_and_draws_without_ranks_are_refused():
    for wrong in ([1.0, float("nan")], [-1.0], [[1.0]]):
        with pytest.raises(ValueError, match="costs of 'a' must be"):
            shares({"a": np.array(wrong)}, {"a": [0]})
    with pytest.raises(ValueError, match="no rank holds the branches of 'a'"):
        shares({"a": np.ones(2)}, {"b": [0]})


def test_a_step_without_structures_is_no_work():
    assert shares({"a": np.zeros(0)}, {"a": [0, 1]})["a"].tolist() == []


def test_at_the_start_of_many_ranks_each_finds_its_own_and_all_find_the_whole():
    """What 4,096 ranks compute in `benchmarks/start.py`, with fewer: in any order of the tasks, and rank by rank."""
    few = {name: replace(one, structures=one.structures // 500) for name, one in DATASETS.items()}
    start, other = Start.of(few, 96, 6), Start.of(dict(reversed(few.items())), 96, 6)
    assert start.placement == other.placement
    for step in (0, 1, 7):
        chosen = start.structures(step)
        costs = start.costs(chosen)
        owners, again = start.owners(costs), other.owners(other.costs(other.structures(step)))
        picked, counts = by_rank(owners, 96), np.zeros(96, int)
        for name, owner in owners.items():
            assert np.array_equal(owner, again[name]) and set(owner.tolist()) <= set(start.placement[name])
            places, bounds = picked[name]
            for rank in range(96):
                assert np.array_equal(places[bounds[rank] : bounds[rank + 1]], np.flatnonzero(owner == rank))
            counts += np.diff(bounds)
            passed = np.concatenate([start.structures(k)[name] for k in range(3)])
            assert len(set(passed.tolist())) == len(passed)  # within a pass none comes twice
        assert counts.sum() == 96 * 6 and counts.min() > 0
        total = sum(values.sum() for values in costs.values())
        most = max(values.max() for values in costs.values())
        assert loads_of(costs, owners, 96).max() <= total / 96 + 2 * most
