"""Which ranks hold which branches: properties, brute force over all placements, messages that say what would fit."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import measured_effort
from multifid.parallel.assign import step_time
from multifid.parallel.layout import GIB, Load, Memory, _by_unit, _units, place

KINDS = ("replicated", "split", "auto")


def names(count):
    return [f"t{i:02d}" for i in range(count)]


def predicted_step(placement, loads):
    units = _units(list(placement), (), loads, 1 + max(max(where) for where in placement.values()))
    return float(step_time(units, _by_unit(units, placement)))


def step_by_definition(placement, loads, ranks):
    """Every set of tasks needs its cost, and what its ranks hold, done on its ranks: the longest of these means."""
    holding = [sum(loads[t].holding for t, where in placement.items() if r in where) for r in range(ranks)]
    longest = max(holding)
    for count in range(1, len(placement) + 1):
        for chosen in itertools.combinations(placement, count):
            theirs = set().union(*(placement[t] for t in chosen))
            asked = sum(loads[t].cost for t in chosen) + sum(holding[r] for r in theirs)
            longest = max(longest, asked / len(theirs))
    return longest


def bytes_of(placement, loads, ranks):
    return [sum(loads[t].bytes for t, where in placement.items() if r in where) for r in range(ranks)]


@st.composite
def problems(draw, tasks=12, ranks=20):
    given_names = names(draw(st.integers(1, tasks)))
    loads = {t: Load(draw(st.floats(0, 100)), draw(st.floats(0, 10)), draw(st.integers(0, 50))) for t in given_names}
    together, rest = [], list(given_names)
    while len(rest) > 1 and draw(st.booleans()):
        together.append([rest.pop(), rest.pop(0)])
    return given_names, loads, together, draw(st.integers(1, ranks))


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(KINDS))
def test_every_task_has_ranks_no_rank_is_idle_and_stores_stay_together(problem, kind):
    tasks, loads, together, ranks = problem
    placement = place(tasks, kind, ranks, together=together, loads=loads)
    assert list(placement) == tasks
    assert all(where and where == sorted(set(where)) for where in placement.values())
    assert set().union(*placement.values()) == set(range(ranks))
    assert all(len({tuple(placement[t]) for t in store}) == 1 for store in together)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_the_order_in_which_tasks_are_listed_changes_nothing(problem, kind, rnd):
    tasks, loads, together, ranks = problem
    mixed = rnd.sample(tasks, len(tasks))
    stores = [rnd.sample(store, 2) for store in rnd.sample(together, len(together))]
    again = place(mixed, kind, ranks, together=stores, loads={t: loads[t] for t in mixed})
    assert again == place(tasks, kind, ranks, together=together, loads=loads)


@settings(max_examples=80, deadline=None)
@given(problems(tasks=6, ranks=8), st.integers(20, 120))
def test_auto_and_split_keep_to_the_memory_or_say_what_would_do(problem, limit):
    tasks, loads, together, ranks = problem
    memory = Memory(limit, encoder=10)
    for kind in ("auto", "split"):
        try:
            placement = place(tasks, kind, ranks, together=together, loads=loads, memory=memory)
        except ValueError as error:
            assert "would do" in str(error)
        else:
            assert max(bytes_of(placement, loads, ranks)) <= limit - 10


@settings(max_examples=60, deadline=None)
@given(problems(tasks=6, ranks=7))
def test_the_predicted_step_is_the_longest_that_any_set_of_tasks_forces(problem):
    tasks, loads, together, ranks = problem
    for kind in KINDS:
        placement = place(tasks, kind, ranks, together=together, loads=loads)
        expected = step_by_definition(placement, loads, ranks)
        assert predicted_step(placement, loads) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_auto_is_never_longer_than_the_plain_placements_and_even_where_holding_costs_nothing(problem):
    tasks, loads, together, ranks = problem
    step = predicted_step(place(tasks, "auto", ranks, together=together, loads=loads), loads)
    for kind in ("replicated", "split"):
        assert step <= 1.0201 * predicted_step(place(tasks, kind, ranks, together=together, loads=loads), loads) + 1e-6
    free = {t: Load(load.cost + 1) for t, load in loads.items()}
    mean = sum(load.cost for load in free.values()) / ranks
    assert predicted_step(place(tasks, "auto", ranks, loads=free), free) <= 1.0201 * mean


@pytest.mark.parametrize("ranks", [2, 4])
def test_auto_lays_tasks_for_steps_that_differ(ranks):
    """Random steps of five tasks: laid by their means, they wait for whichever task happens to be large."""
    rnd = random.Random(3)
    costs = {
        "acac": (1.4, 0.01),
        "alexandria": (3.3, 0.35),
        "ani1x": (3.6, 0.17),
        "mptrj": (4.5, 0.5),
        "omol25": (3.7, 0.3),
    }

    def laid(kind, holding, spread):
        loads = {t: Load(cost, holding, spread=s if spread else 0.0) for t, (cost, s) in costs.items()}
        return place(list(costs), kind, ranks, loads=loads)

    def waited(placement):
        """The longest step by the mean one, in the mean over steps whose costs are of gamma distributions."""
        drawn = [{t: rnd.gammavariate(1 / s**2, cost * s**2) for t, (cost, s) in costs.items()} for _ in range(200)]
        longest = [predicted_step(placement, {t: Load(cost) for t, cost in step.items()}) for step in drawn]
        return sum(longest) * ranks / sum(sum(step.values()) for step in drawn)

    assert waited(laid("auto", 0.001, True)) < 1.02 < 1.06 < waited(laid("auto", 0.001, False))
    assert laid("auto", 2.0, True) == laid("auto", 2.0, False), "branches that are dear to hold stay where they are"


def test_auto_comes_close_to_the_best_of_all_placements():
    rnd = random.Random(5)
    ratios = []
    for _ in range(60):
        tasks, ranks = names(rnd.randint(1, 3)), rnd.randint(1, 4)
        holding = rnd.choice([0, 0.1, 0.5, 1, 2])
        loads = {t: Load(rnd.choice([1, 2, 3, 5, 8]), holding * rnd.choice([1, 2])) for t in tasks}
        subsets = [list(s) for k in range(1, ranks + 1) for s in itertools.combinations(range(ranks), k)]
        best = min(
            step_by_definition(dict(zip(tasks, held, strict=True)), loads, ranks)
            for held in itertools.product(subsets, repeat=len(tasks))
            if set().union(*held) == set(range(ranks))
        )
        ratios.append(step_by_definition(place(tasks, "auto", ranks, loads=loads), loads, ranks) / best)
    assert max(ratios) < 1.06 and sum(ratios) / len(ratios) < 1.01


def test_auto_finds_a_packing_wherever_there_is_one():
    rnd = random.Random(3)
    for _ in range(60):
        tasks, ranks = names(rnd.randint(3, 7)), rnd.randint(2, 3)
        loads = {t: Load(rnd.random(), 0.0, rnd.randint(1, 9)) for t in tasks}
        sizes = [loads[t].bytes for t in tasks]
        least = min(
            max(sum(b for b, r in zip(sizes, where, strict=True) if r == rank) for rank in range(ranks))
            for where in itertools.product(range(ranks), repeat=len(tasks))
        )
        place(tasks, "auto", ranks, loads=loads, memory=Memory(least))
        with pytest.raises(ValueError, match="would do"):
            place(tasks, "auto", ranks, loads=loads, memory=Memory(least - 1))


def test_split_gives_equal_groups_where_they_divide_and_else_follows_the_cost():
    loads = {"a": Load(4.0), "b": Load(1.0), "c": Load(1.0)}
    assert place(["a", "b", "c"], "split", 6, loads=loads) == {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
    assert place(["a", "b", "c"], "split", 7, loads=loads) == {"a": [0, 1, 2, 3, 4], "b": [5], "c": [6]}
    assert place(["a", "b", "c"], "split", 3) == {"a": [0], "b": [1], "c": [2]}


def test_split_puts_several_branches_on_a_rank_where_tasks_outnumber_ranks():
    placement = place(names(16), "split", 4)
    assert all(len(where) == 1 for where in placement.values())
    assert [sum(r in where for where in placement.values()) for r in range(4)] == [4] * 4
    heavy = {t: Load(9.0 if t == "t03" else 1.0) for t in names(8)}
    alone = place(names(8), "split", 2, loads=heavy)
    assert [t for t in alone if alone[t] == alone["t03"]] == ["t03"]


def test_costs_may_be_as_small_as_numbers_are():
    loads = {"a": Load(5e-324), "b": Load(5e-324, 5e-324)}
    assert set().union(*place(["a", "b"], "auto", 3, loads=loads).values()) == {0, 1, 2}


def test_auto_packs_tightly_and_still_leaves_no_rank_idle():
    loads = {"a": Load(9.0, 0, 3), "b": Load(9.0, 0, 3), "c": Load(9.0, 0, 3), "large": Load(1.0, 0, 8)}
    for kind in ("auto", "split"):
        placement = place(list(loads), kind, 3, loads=loads, memory=Memory(10))
        assert set().union(*placement.values()) == {0, 1, 2}
        assert max(bytes_of(placement, loads, 3)) <= 10


def test_auto_helps_a_task_wherever_memory_is_left():
    """Laid end to end the tasks do not fit: the second needs a rank alone. The other two ranks share the first."""
    loads = {"a": Load(8.0, 0.1, 1), "b": Load(2.0, 0.2, 2), "c": Load(1.0, 0.1, 1)}
    placement = place(list(loads), "auto", 3, loads=loads, memory=Memory(2))
    assert sum(len(where) == 2 for where in placement.values()) == 1 and len(placement["a"]) == 2
    assert predicted_step(placement, loads) == pytest.approx((9 + 0.3) / 2)


def test_auto_lets_groups_overlap_where_one_task_outweighs_the_others():
    loads = {"big": Load(10.0), "a": Load(1.0), "b": Load(1.0)}
    placement = place(list(loads), "auto", 3, loads=loads)
    assert len(placement["big"]) == 3 and predicted_step(placement, loads) == pytest.approx(4.0)
    assert sum(map(len, placement.values())) < 9  # and not every branch is everywhere


def test_auto_splits_where_holding_a_branch_is_what_costs():
    loads = {t: Load(0.1, holding=1.0) for t in names(16)}
    assert sorted(place(names(16), "auto", 16, loads=loads).values()) == [[rank] for rank in range(16)]
    assert predicted_step(place(names(16), "auto", 2, loads=loads), loads) == pytest.approx(8.8)


@pytest.mark.parametrize(
    ("given_map", "says"),
    [
        ({"a": [0], "b": [1]}, r"leaves out \['c'\]"),
        ({"a": [0], "b": [1], "c": [1], "d": [0]}, r"names \['d'\], which are not tasks"),
        ({"a": [0], "b": [1], "c": []}, r"placement\.c: at least one rank"),
        ({"a": [0], "b": [1, 1], "c": [1]}, r"placement\.b: at least one rank, each once"),
        ({"a": [0], "b": [4], "c": [1]}, r"ranks 0\.\.1; launch 5 ranks"),
        ({"a": [0], "b": [-1], "c": [1]}, r"placement\.b: ranks \[-1\]"),
        ({"a": [0], "b": [0], "c": [0]}, r"ranks \[1\] without a task: give them one, launch 1 ranks"),
        ({"a": [0], "b": [1], "c": [0]}, r"one store the same ranks .*b: \[1\], c: \[0\]"),
    ],
)
def test_a_map_that_is_no_placement_is_refused_with_what_would_be_one(given_map, says):
    with pytest.raises(ValueError, match=says):
        place(["a", "b", "c"], given_map, 2, together=[["b", "c"]])


def test_a_map_is_taken_as_given_and_ranks_may_be_idle_if_that_is_said():
    assert place(["b", "a"], {"a": [1, 0], "b": [1]}, 2) == {"b": [1], "a": [0, 1]}
    assert place(["a"], {"a": [0]}, 2, allow_idle=True) == {"a": [0]}


def test_what_exceeds_the_memory_is_refused_with_what_would_fit():
    loads = {t: Load(1.0, 0.0, 2 * GIB) for t in names(6)}
    with pytest.raises(ValueError, match=r"rank 0 would hold 13 GiB .*auto fits on 3 ranks"):
        place(names(6), "replicated", 3, loads=loads, memory=Memory(6 * GIB, GIB))
    with pytest.raises(ValueError, match=r"7 GiB would do on 2 ranks, and 6 GiB on 3 ranks"):
        place(names(6), "auto", 2, loads=loads, memory=Memory(6 * GIB, GIB))
    with pytest.raises(ValueError, match=r"with a rank for each store, 3 GiB would do"):
        place(names(6), "split", 8, loads=loads, memory=Memory(2 * GIB, GIB))


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": 0},
        {"tasks": []},
        {"tasks": ["a", "a"]},
        {"together": [["a", "x"]]},
        {"together": [["a"], ["a", "b"]]},
        {"loads": {"a": Load()}},
        {"loads": {"a": Load(), "b": Load(float("nan"))}},
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError):
        place(**{"tasks": ["a", "b"], "placement": "auto", "ranks": 2} | wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [10, 100, 4096])
def test_64_tasks_on_4096_ranks_are_placed_with_little_effort(kind, ranks):
    rnd = random.Random(0)
    loads = {t: Load(rnd.lognormvariate(0, 1.5), 0.01, 10) for t in names(64)}
    memory = Memory(700, 10) if kind != "replicated" else None
    placement, effort = measured_effort(lambda: place(names(64), kind, ranks, loads=loads, memory=memory))
    assert effort < 50
    assert set().union(*placement.values()) == set(range(ranks))
