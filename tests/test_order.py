"""The order of data: a pure function of the place."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multifid.data.order import Draw, Order, SamplingConfig, rates


@given(size=st.integers(1, 3000), seed=st.integers(0, 9))
def test_every_pass_holds_each_structure_exactly_once(size, seed):
    order = Order(seed, "checksum", "task", size)
    places = order(0, 3 * size)
    for number in range(3):
        assert np.array_equal(np.sort(places[number * size : (number + 1) * size]), np.arange(size))


def test_passes_seeds_tasks_and_stores_have_different_orders():
    first = Order(0, "checksum", "task", 500)(0, 500)
    others = [
        Order(0, "checksum", "task", 500)(500, 500),
        Order(1, "checksum", "task", 500)(0, 500),
        Order(0, "checksum", "other", 500)(0, 500),
        Order(0, "another", "task", 500)(0, 500),
    ]
    for other in others:
        assert np.mean(first == other) < 0.05


def test_the_permutations_of_six_are_about_equally_likely():
    """720 orders, 14,400 keys: chi-squared of 719 degrees of freedom, five sigma."""
    counts: dict[bytes, int] = {}
    for seed in range(14_400):
        key = Order(seed, "c", "t", 6)(0, 6).tobytes()
        counts[key] = counts.get(key, 0) + 1
    chi2 = sum((counts.get(k, 0) - 20) ** 2 / 20 for k in counts) + (720 - len(counts)) * 20
    assert chi2 < 719 + 5 * np.sqrt(2 * 719)


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_a_step_cut_among_any_number_of_ranks_is_the_same_step(pieces):
    order = Order(0, "c", "t", 101)
    whole = order(57, 90)
    ends = [57 + 90 * k // pieces for k in range(pieces + 1)]
    cut = [order(a, b - a) for a, b in itertools.pairwise(ends)]
    assert np.array_equal(np.concatenate(cut), whole)


@given(rate=st.fractions(min_value=1, max_value=50, max_denominator=97), steps=st.integers(1, 400))
def test_the_places_of_steps_join_without_gap_and_add_up_to_the_rate(rate, steps):
    draw = Draw("t", ("t",), Order(0, "c", "t", 10), rate, base=5, since=3)
    end = 5
    for step in range(3, 3 + steps):
        start, count = draw.places(step)
        assert start == end and abs(count - rate) < 1
        end += count
    assert end - 5 == steps * rate // 1


def test_equal_shares_are_equal_and_shares_by_size_make_equal_passes():
    sizes = {"a": 100, "b": 300}
    assert rates(sizes, Fraction(8), SamplingConfig(), {}) == {"a": 8, "b": 8}
    assert rates(sizes, Fraction(8), SamplingConfig(exponent=1.0), {}) == {"a": 4, "b": 12}


def test_a_fixed_share_leaves_the_others_theirs():
    assert rates({"a": 9, "b": 9}, Fraction(8), SamplingConfig(), {"a": 2.5}) == {"a": Fraction(5, 2), "b": 8}


def test_a_share_below_one_structure_per_step_is_refused():
    with pytest.raises(ValueError, match=r"task 'a' would get 0\.02 structures per step.*train\.batch"):
        rates({"a": 1, "b": 399}, Fraction(4), SamplingConfig(exponent=1.0), {})
