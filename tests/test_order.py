"""The order of data: a pure function of the place."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multifid.feed.order import Blocks, Draw, Order, SamplingConfig, rates

CUTS = st.builds(Blocks, st.integers(5, 90), st.integers(1, 9))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 700), seed=st.integers(0, 9), blocks=st.none() | CUTS)
def test_every_pass_holds_each_structure_exactly_once(size, seed, blocks):
    order = Order(seed, "checksum", "task", size, blocks)
    places = order(0, 3 * size)
    for number in range(3):
        assert np.array_equal(np.sort(places[number * size : (number + 1) * size]), np.arange(size))


@pytest.mark.parametrize("blocks", [None, Blocks(20, 6)])
def test_passes_seeds_tasks_and_stores_have_different_orders(blocks):
    first = Order(0, "checksum", "task", 500, blocks)(0, 500)
    others = [
        Order(0, "checksum", "task", 500, blocks)(500, 500),
        Order(1, "checksum", "task", 500, blocks)(0, 500),
        Order(0, "checksum", "other", 500, blocks)(0, 500),
        Order(0, "another", "task", 500, blocks)(0, 500),
    ]
    for other in others:
        assert np.mean(first == other) < 0.05


def test_the_permutations_of_six_are_about_equally_likely():
    """720 orders, 3,600 keys: chi-squared of 719 degrees of freedom, five sigma."""
    counts: dict[bytes, int] = {}
    for seed in range(3_600):
        key = Order(seed, "c", "t", 6)(0, 6).tobytes()
        counts[key] = counts.get(key, 0) + 1
    chi2 = sum((counts.get(k, 0) - 5) ** 2 / 5 for k in counts) + (720 - len(counts)) * 5
    assert chi2 < 719 + 5 * np.sqrt(2 * 719)


@pytest.mark.parametrize("blocks", [None, Blocks(4, 3)])
@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_a_step_cut_among_any_number_of_ranks_is_the_same_step(pieces, blocks):
    order = Order(0, "c", "t", 101, blocks)
    whole = order(57, 90)
    ends = [57 + 90 * k // pieces for k in range(pieces + 1)]
    cut = [order(a, b - a) for a, b in itertools.pairwise(ends)]
    assert np.array_equal(np.concatenate(cut), whole)


def count_reads(order, start, stop):
    times = np.zeros(order.size, int)
    for first, last in order.pieces(start, stop):
        times[first:last] += 1
    return times


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 600), blocks=CUTS)
def test_what_a_window_needs_has_been_read_ahead_of_it(size, blocks):
    """Places come one after the other; the pieces that are `ahead` of them are read, each once in a pass."""
    order = Order(1, "c", "t", size, blocks)
    assert (count_reads(order, 0, size) == 1).all()
    there = count_reads(order, 0, order.ahead)
    for start in range(0, 2 * size, step := max(size // 4, 1)):
        there += count_reads(order, start + order.ahead, start + step + order.ahead)
        assert there[order(start, step)].all()


def test_blocks_are_read_in_long_pieces_and_mixed_from_all_over_the_store():
    order = Order(0, "c", "t", 100_003, Blocks(100, 50))
    window = np.sort(order(0, 5_000))
    pieces = np.split(window, np.flatnonzero(np.diff(window) > 1) + 1)
    assert len(pieces) <= 51 and window.max() - window.min() > 90_000  # 50 blocks, one of them in two pieces
    drawn = order(0, 5_000) // 100
    assert np.mean(np.diff(drawn) == 0) < 0.05  # neighbours in the order are not neighbours in the store


def test_every_place_is_equally_likely_to_hold_any_structure_in_an_order_of_blocks():
    """23 structures in blocks of 4: also those at the end, which no whole block holds. Chi-squared, five sigma."""
    firsts = [int(Order(seed, "c", "t", 23, Blocks(4, 2))(seed % 23, 1)[0]) for seed in range(1_150)]
    chi2 = np.sum((np.bincount(firsts, minlength=23) - 50) ** 2 / 50)
    assert chi2 < 22 + 5 * np.sqrt(2 * 22)


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
