"""Intervals and Holm's correction against independent formulas and simulated data; warnings."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from allo_lib.errors import AlloError
from allo_lib.evaluation import stats
from allo_lib.evaluation.stats import Interval, holm, mean_and_error

EXTRA = (1.0, -1.0)  # of differences of outcomes, as `comparisons` takes them


def gaps(gain: int, loss: int, n: int) -> np.ndarray:
    """Differences on n problems: `gain` that only the first gets right, `loss` the second."""
    return np.repeat([1.0, -1.0, 0.0], [gain, loss, n - gain - loss])


def interval(*models: np.ndarray) -> Interval:
    """Of one data set; a model's differences each."""
    pairs = [mean_and_error([one], EXTRA) for one in models]
    values, errors = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    return stats.mean_interval(values, errors, sum(map(len, models)))


def test_one_model_has_an_interval_over_its_problems_and_decides_nothing():
    found = interval(gaps(120, 60, 400))
    error = float(scipy_stats.sem(gaps(120, 60, 400)))
    assert found.effect == pytest.approx(0.15)
    assert found.stderr == pytest.approx(error, rel=0.01)
    assert found.high - found.effect == pytest.approx(1.959964 * found.stderr)
    assert found.kind == "over problems alone, one SFT model" and not found.decides
    for stderrs in (None, {4: 0.0}):  # nothing tells how precise it is
        bare = stats.mean_interval({4: 0.5}, stderrs)
        assert not bare.defined and math.isnan(bare.low) and bare.effect == 0.5
        assert not bare.within(0.0, 1.0).defined


def test_data_sets_count_equally_and_replicates_of_a_problem_are_one_value_of_it():
    small, large = gaps(5, 0, 10), gaps(0, 500, 5000)
    mean, error = mean_and_error([small, large])
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx((small.var() / 10 + large.var() / 5000) ** 0.5 / 2)
    one = gaps(60, 20, 400)
    other = np.random.default_rng(0).permutation(one)
    mean, error = mean_and_error([(one + other) / 2])
    assert mean == pytest.approx(0.1) and error < 0.8 * mean_and_error([one])[1]


def test_several_models_have_students_t_over_their_effects():
    effects = (0.06, 0.02, -0.05)
    found = interval(*(gaps(200 + round(2000 * e), 200, 2000) for e in effects))
    assert found.seeds == (0, 1, 2) and found.by_seed == pytest.approx(effects)
    expected = scipy_stats.ttest_1samp(effects, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.kind == "t interval over 3 SFT models" and found.decides
    spread = float(np.std(effects, ddof=1))
    assert (found.seed_sd, found.stderr) == pytest.approx((spread, spread / 3**0.5))


def test_models_that_agree_are_known_no_better_than_by_their_problems():
    """Two equal effects: no interval of no width, but the one that 4,000 problems would give."""
    found = interval(*[gaps(300, 200, 2000)] * 2)
    error = math.sqrt((0.25 - 0.05**2) / 4000)
    assert found.high - found.effect == pytest.approx(1.959964 * error, rel=0.01)
    assert found.p_above(0.0) > 0 and "less than their problems" in found.kind
    bare = stats.mean_interval({0: 0.03, 1: 0.03})  # equal numbers without problems
    assert not bare.defined and not bare.decides and math.isnan(bare.low)


def test_no_difference_seen_is_not_a_difference_of_zero():
    """Not one of 500 problems tells them apart: up to 3 in 500 might (the rule of three)."""
    found = interval(gaps(0, 0, 500))
    assert found.effect == 0.0 and found.low < 0 < found.high
    assert 1 / 500 <= found.high <= 6 / 500 and -6 / 500 <= found.low <= -1 / 500


def test_an_interval_is_cut_to_where_its_quantity_can_lie():
    wide = stats.mean_interval({0: 0.99, 1: 0.99, 2: 0.5})
    cut = wide.within(0.0, 1.0)
    assert wide.high > 1 and (cut.low, cut.high) == (max(0.0, wide.low), 1.0)
    assert (cut.effect, cut.stderr, cut.seeds) == (wide.effect, wide.stderr, wide.seeds)


@pytest.mark.parametrize(("seeds", "between"), [(1, 0.0), (2, 0.0), (5, 0.02)])
def test_intervals_cover_a_known_effect_of_correlated_problems(seeds, between):
    """One is right on 0.7, the other on .03, .06 and .09 more of three data sets, give or take
    `between` from seed to seed; what is hard for one is hard for the other."""
    rng, hits = np.random.default_rng(4), []
    for _ in range(300):
        pairs = []
        for more in rng.normal(0, between, size=seeds):
            hard = rng.normal(size=(3, 300))
            ours, theirs = (0.6**0.5 * hard + 0.4**0.5 * rng.normal(size=(3, 300)) for _ in "ab")
            bars = scipy_stats.norm.ppf(0.7 + more + np.array([[0.03], [0.06], [0.09]]))
            right, base = ours < bars, theirs < scipy_stats.norm.ppf(0.7)
            pairs.append(mean_and_error(right.astype(float) - base, EXTRA))
        values, errors = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
        found = stats.mean_interval(values, errors)
        hits.append(found.low <= 0.06 <= found.high)
    assert 0.90 <= np.mean(hits)


def test_p_values_are_those_of_the_t_test():
    values = (0.02, 0.05, 0.03, 0.06)
    found = stats.mean_interval(dict(enumerate(values)))
    for bar in (-0.01, 0.0, 0.02, 0.1):
        expected = scipy_stats.ttest_1samp(values, bar, alternative="greater").pvalue
        assert found.p_above(bar) == pytest.approx(expected)
        assert found.p_below(bar) == pytest.approx(1 - expected)
    low, high = found.ends(0.90)
    assert found.p_above(low) == pytest.approx(0.05) == found.p_below(high)
    of_two = scipy_stats.t.ppf([1 - 0.05 / 2 / 2, 1 - 0.05 / 2], 4)
    assert stats.held_together(2, 5) == pytest.approx(of_two[0] / of_two[1])
    normal = stats.mean_interval({0: 0.03}, {0: 0.01})
    assert normal.p_above(0.0) == pytest.approx(scipy_stats.norm.sf(3.0))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=5))
def test_a_minus_b_is_the_mirror_image_of_b_minus_a(counts):
    """Whatever the models, problems and ties: effect, interval and p-values, turned round."""
    ours = interval(*(gaps(a, b, 200) for a, b in counts))
    theirs = interval(*(gaps(b, a, 200) for a, b in counts))
    assert (ours.effect, ours.low) == pytest.approx((-theirs.effect, -theirs.high))
    assert ours.p_above(0.01) == pytest.approx(theirs.p_below(-0.01))
    assert ours.decides == (len(counts) > 1) and ours.low < ours.effect < ours.high


# --- many comparisons ----------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.25, 0.5, 1.0])), max_size=6))
def test_what_is_rejected_is_what_the_closed_test_rejects(family):
    """Independent definition: a hypothesis goes when every set that holds it goes, and a set does
    when one of its p is at most its share of the weights' level."""
    p_values, weights = [p for p, _ in family], [w for _, w in family]
    for place, adjusted in enumerate(holm(p_values, weights)):
        sets = itertools.chain.from_iterable(
            itertools.combinations(range(len(family)), size) for size in range(1, len(family) + 1)
        )
        closed = max(
            min(1.0, min(p_values[i] * sum(weights[j] for j in s) / weights[i] for i in s))
            for s in sets
            if place in s
        )
        assert adjusted == pytest.approx(closed)


def test_a_share_of_pairs_has_the_interval_of_agresti_and_coull():
    low, high = stats.share_interval([1] * 6 + [0] * 4, list("abcdefghij"))
    half = scipy_stats.norm.ppf(0.975) * (8 / 14 * 6 / 14 / 14) ** 0.5
    assert (low, high) == pytest.approx((8 / 14 - half, 8 / 14 + half))
    assert stats.share_interval([1] * 4, list("abcd"))[1] == 1.0
    # Pairs of one prompt that are all alike are one: as many as there are prompts.
    for right in ([1, 1, 1, 0, 0, 0], [1] * 6):
        of_prompts = stats.share_interval(right[::3], ["a", "b"])
        assert stats.share_interval(right, list("aaabbb")) == pytest.approx(of_prompts)


@pytest.mark.parametrize("each", [1, 4])
def test_the_interval_of_a_share_covers_it_however_many_pairs_a_prompt_has(each):
    draws, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        chances = np.repeat(draws.beta(1.2, 0.8, 50), each)  # of mean .6
        right = (draws.random(50 * each) < chances).astype(float)
        low, high = stats.share_interval(right, np.repeat(np.arange(50), each))
        covered += low <= 0.6 <= high
    assert 0.92 < covered / 1000 < 0.975


def test_holm_by_the_textbook_and_impossible_p_values():
    # R 4.3: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(AlloError, match="expected each from 0 to 1"):
            holm([0.5, bad])


# --- tokens, and signs that a stage has nothing to work with -------------------------------------


def test_concentration_of_a_single_bad_token():
    shares, held = stats.concentration([-9.0] + [-1.0] * 9 + [0.5] * 10, points=21)
    assert held[1] == pytest.approx(0.5) and shares[1] == pytest.approx(0.05)
    for bad in ([0.0, 1.0], [math.nan, -1.0]):
        with pytest.raises(AlloError, match="log-ratios must be finite"):
            stats.concentration(bad)


def weights(chosen):
    return [[0.2] * chosen, [0.0] * (200 - chosen)]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (stats.arbitrary_mask(95, 95, 5, 10, 100), "95 of 100 scores are exactly 0"),
        (stats.arbitrary_mask(90, 1, 1, 10, 100), None),
        (stats.arbitrary_mask(0, 30, 6, 10, 100), "6 of 10 kept entries tie"),
        (stats.arbitrary_mask(0, 6, 6, 10, 100), None),  # all that tie are kept
        (stats.arbitrary_mask(0, 30, 5, 10, 100), None),
        (stats.no_choice_of_tokens([]), "selects 0.0% of 0"),
        (stats.no_choice_of_tokens(weights(3)), "selects 1.5% of 200 .* raise its threshold"),
        (stats.no_choice_of_tokens(weights(197)), "does not choose; .* lower its threshold"),
        (stats.no_choice_of_tokens(weights(4)), None),
        (stats.no_choice_of_tokens(weights(196)), None),
        (stats.far_below("forgetting", 0.44, 0.5, 0.01), "forgetting scores 44.0%, .* 50.0%"),
        (stats.far_below("forgetting", 0.46, 0.5, 0.01), None),
        (stats.far_below("forgetting", 0.44, 0.5, 0.05), None),
    ],
)
def test_a_warning_comes_with_its_number_when_its_sign_is_there(told, expected):
    assert told is None if expected is None else re.search(expected, told)
