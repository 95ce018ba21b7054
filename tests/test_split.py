"""Splits: relatives stay together, fractions count structures, no split is empty, and input order does not matter."""

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from multifid.preparation.split import TEST, TRAIN, UNUSED, VALIDATION, divide, fitted, set_unseen_aside
from multifid.store.fields import NO_SPLIT


def hashes(names) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(str(name).encode()) for name in names], np.uint64)


def split_of(names, *, published=None, file=None, given=(None,), fractions=(0.8, 0.1, 0.1), seed=0, within=False):
    published = np.full(len(names), NO_SPLIT, np.uint8) if published is None else np.array(published, np.uint8)
    file = np.zeros(len(names), int) if file is None else np.array(file)
    return divide(hashes(names), published, file, list(given), "formula", fractions, seed, within)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=40), st.integers(0, 5))
def test_relatives_share_a_split_and_no_split_is_empty(sizes, seed):
    names = np.repeat(np.arange(len(sizes)), sizes)
    split = split_of(names, seed=seed).split
    assert set(split.tolist()) == {0, 1, 2}
    assert all(len(set(split[names == name].tolist())) == 1 for name in range(len(sizes)))


def test_fractions_count_structures_not_relatives():
    random = np.random.default_rng(0)
    names = np.repeat(np.arange(2000), random.geometric(0.05, 2000))
    split = split_of(names, fractions=(0.7, 0.2, 0.1)).split
    shares = np.bincount(split) / len(split)
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.005)


def test_a_relative_that_outweighs_a_split_goes_to_train():
    names = [0] * 900 + list(range(1, 101))
    for seed in range(10):
        assert (split_of(names, seed=seed).split[:900] == 0).all()


def test_order_of_input_does_not_matter():
    random = np.random.default_rng(1)
    names = random.integers(0, 50, 1000)
    order = random.permutation(1000)
    assert (split_of(names).split[order] == split_of(names[order]).split).all()


def test_the_seed_matters_and_is_all_that_matters():
    names = np.arange(1000)
    assert (split_of(names, seed=3).split == split_of(names, seed=3).split).all()
    assert (split_of(names, seed=3).split != split_of(names, seed=4).split).mean() > 0.2


def test_a_published_split_wins():
    found = split_of(["a"] * 6, published=[0, 0, 1, 1, 2, 2])
    assert found.split.tolist() == [0, 0, 1, 1, 2, 2] and found.rule == "published"


def test_relatives_of_published_structures_follow_them():
    names = ["a", "b", "c", "a", "b", "c", "d", "e", "f", "g"]
    found = split_of(names, published=[2, 1, 0, *[NO_SPLIT] * 7])
    assert found.split[:6].tolist() == [2, 1, 0, 2, 1, 0]
    assert found.rule == "published; by formula"


def test_validation_is_carved_out_of_a_published_train_split():
    names = np.repeat(np.arange(90), 10)
    published = np.where(np.arange(900) < 800, 0, 2)
    found = split_of(names, published=published)
    assert (found.split[800:] == 2).all()
    assert 60 <= (found.split == 1).sum() <= 120
    carved = set(names[found.split == 1].tolist())
    assert not carved & set(names[found.split == 0].tolist())


def test_files_given_for_a_split_are_that_split_and_the_rest_is_divided_among_the_others():
    found = split_of(np.arange(100), file=[0] * 80 + [1] * 20, given=[None, "test"])
    assert (found.split[80:] == 2).all()
    assert set(found.split[:80].tolist()) == {0, 1}
    assert (found.split == 1).sum() == 9  # 0.1 / 0.9 of 80
    assert found.rule == "files: test; by formula"


def test_a_split_without_a_file_is_carved_out_of_the_train_files_where_nothing_else_is_given():
    names = np.repeat(np.arange(30), 10)
    file = [0] * 200 + [1] * 100
    found = split_of(names, file=file, given=["train", "test"])
    assert (found.split[200:] == 2).all() and set(found.split[:200].tolist()) == {0, 1}
    assert (
        found.split == 1
    ).sum() == 20 and found.rule == "files: test, train; validation carved out of train by formula"
    assert not set(names[found.split == 1].tolist()) & set(names[found.split == 0].tolist())
    none = split_of(names, file=file, given=["train", "test"], fractions=(0.8, 0.0, 0.2))
    assert none.split.tolist() == [0] * 200 + [2] * 100
    both = split_of(names, given=["train"])
    assert both.split.tolist() == split_of(names).split.tolist()


def test_within_cuts_every_relative_into_blocks():
    names = ["Cu4", "Al4"] * 10
    found = split_of(names, within=True)
    assert found.split.tolist() == [0] * 16 + [1] * 2 + [2] * 2 and found.rule == "contiguous blocks of each formula"


def test_one_formula_is_cut_into_contiguous_blocks_per_file():
    found = split_of(["C2H6O1"] * 150, file=[0] * 100 + [1] * 50, given=[None, None])
    expected = [0] * 80 + [1] * 10 + [2] * 10 + [0] * 40 + [1] * 5 + [2] * 5
    assert found.split.tolist() == expected and found.rule == "contiguous blocks per file"


@pytest.mark.parametrize("n", [3, 4, 5, 11])
def test_few_frames_of_one_formula_still_fill_every_split(n):
    split = split_of(["a"] * n).split
    assert set(split.tolist()) == {0, 1, 2} and (np.diff(split.astype(int)) >= 0).all()


def test_an_empty_split_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="validation split would be empty"):
        split_of(["a", "a"])
    with pytest.raises(ValueError, match=r"train split would be empty.*--train"):
        split_of(np.arange(9), given=["test"])
    with pytest.raises(ValueError, match="validation split is empty: the files given"):
        split_of(np.arange(9), given=[None, "validation"], file=[0] * 9)
    with pytest.raises(ValueError, match="nothing is left for the other inputs"):
        split_of(np.arange(4), file=[0, 1, 2, 3], given=[None, "train", "validation", "test"])


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1, 0.0), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (0.5, 0.5), (np.nan, 0.5, 0.5)]
)
def test_fractions_that_are_none_are_refused(fractions):
    with pytest.raises(ValueError, match="three numbers"):
        split_of(np.arange(10), fractions=fractions)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_structures_with_an_element_that_train_lacks_are_set_aside(chunk):
    numbers = np.array([1, 8, 1, 92, 6, 1, 1, 7, 8, 8], np.uint8)
    offsets = np.array([0, 2, 4, 5, 7, 8, 10], np.uint64)
    split = np.array([0, 1, 0, 1, 2, 2], np.uint8)
    unseen = set_unseen_aside(split, numbers, offsets, np.unique(numbers), chunk)
    assert split.tolist() == [0, UNUSED, 0, 1, UNUSED, 2] and unseen == [7, 92]


def test_setting_aside_a_whole_split_is_an_error():
    with pytest.raises(ValueError, match="every test structure has an element that the train split lacks"):
        set_unseen_aside(np.array([0, 1, 2], np.uint8), np.array([1, 1, 8]), np.array([0, 1, 2, 3], np.uint64), [1, 8])


@pytest.mark.parametrize("names", [["a"], ["a"] * 9, np.arange(50)])
@pytest.mark.parametrize(("fractions", "code"), [((1, 0, 0), TRAIN), ((0, 1, 0), VALIDATION), ((0, 0, 1), TEST)])
def test_a_fraction_of_one_takes_everything_whatever_was_published(names, fractions, code):
    published = np.arange(len(names)) % 4 % 3
    for found in (split_of(names, fractions=fractions), split_of(names, published=published, fractions=fractions)):
        assert (found.split == code).all()
    assert fitted(found.split)[0] == code and fitted(found.split)[1].all()
    file = np.arange(len(names)) % 2
    if len(names) > 1:  # files that are given for another split stay there
        other = split_of(names, file=file, given=("train", None), fractions=fractions).split
        assert (other[file == 0] == TRAIN).all() and (other[file == 1] == code).all()


@pytest.mark.parametrize("fractions", [(0.9, 0.0, 0.1), (0.0, 0.5, 0.5), (0.8, 0.2, 0.0)])
def test_a_split_whose_fraction_is_zero_may_be_empty(fractions):
    counts = np.bincount(split_of(np.arange(2000), fractions=fractions).split, minlength=3) / 2000
    np.testing.assert_allclose(counts, fractions, atol=0.01)
    published = np.where(np.arange(2000) < 1900, TRAIN, TEST)
    carved = split_of(np.arange(2000), published=published, fractions=fractions).split
    assert (carved[1900:] == TEST).all() and (carved == VALIDATION).any() == (fractions[1] > 0)


def test_without_a_train_split_nothing_is_unseen():
    numbers, offsets = np.array([1, 6, 8], np.uint8), np.arange(4, dtype=np.uint64)
    split = np.full(3, TEST, np.uint8)
    assert set_unseen_aside(split, numbers, offsets, [1, 6, 8]) == [] and (split == TEST).all()
    with_train = np.array([TRAIN, TEST, TEST], np.uint8)
    with pytest.raises(ValueError, match="every test structure has an element"):
        set_unseen_aside(with_train, numbers, offsets, [1, 6, 8])
