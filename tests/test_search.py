"""The learning-rate search trains as many models as asked, where they tell most."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.errors import AlloError
from allo_lib.study.search import Trial, best, search


def peak(*where):
    """A score with its one peak at the given rates."""

    def score(rates):
        return -sum((math.log(r) - math.log(w)) ** 2 for r, w in zip(rates, where, strict=True))

    return score


def rates_of(tried):
    return [one.rates for one in tried]


def test_one_rate_starts_with_the_centre_and_one_factor_to_both_sides():
    tried = search((1e-4,), 3, 2.0, peak(1e-4))
    assert rates_of(tried) == [(1e-4,), (5e-5,), (2e-4,)]


def test_one_rate_goes_on_beyond_an_edge():
    assert rates_of(search((1.0,), 6, 2.0, peak(100.0)))[3:] == [(4.0,), (8.0,), (16.0,)]
    assert rates_of(search((1.0,), 5, 2.0, peak(0.01)))[3:] == [(0.25,), (0.125,)]


def test_one_rate_halves_both_gaps_beside_the_best():
    tried = rates_of(search((1.0,), 5, 2.0, peak(1.0)))
    assert tried[3:] == [(0.7071,), (1.414,)]


def test_two_rates_first_settle_their_common_size_then_the_first_stage():
    tried = search((1e-4, 1e-3), 5, 2.0, peak(1e-4, 1e-3))
    assert rates_of(tried) == [
        (1e-4, 1e-3), (5e-5, 5e-4), (2e-4, 2e-3), (5e-5, 1e-3), (2e-4, 1e-3)
    ]  # fmt: skip


def test_three_candidates_change_both_rates():
    tried = rates_of(search((1e-4, 1e-3), 3, 2.0, peak(1e-4, 1e-3)))
    assert all(len({rates[stage] for rates in tried}) == 3 for stage in (0, 1))


def test_two_rates_go_once_beyond_an_edge_together():
    higher = rates_of(search((1e-4, 1e-3), 5, 2.0, peak(1e-3, 1e-2)))
    assert higher[3:] == [(4e-4, 4e-3), (2e-4, 4e-3)]
    lower = rates_of(search((1e-4, 1e-3), 6, 2.0, peak(5e-5, 5e-4)))
    assert lower[3:] == [(2.5e-5, 2.5e-4), (2.5e-5, 5e-4), (1e-4, 5e-4)]


def test_two_rates_follow_a_better_first_stage():
    lower = rates_of(search((1e-4, 1e-3), 5, 2.0, peak(5e-5, 1.4e-3)))
    assert lower[3:] == [(5e-5, 1e-3), (2.5e-5, 1e-3)]
    higher = rates_of(search((1e-4, 1e-3), 6, 2.0, peak(2e-4, 7e-4)))
    assert higher[3:] == [(5e-5, 1e-3), (2e-4, 1e-3), (4e-4, 1e-3)]


def test_no_rate_is_one_model():
    assert search((), 5, 2.0, lambda rates: 0.25) == [Trial((), 0.25)]


def test_equal_scores_take_the_smaller_rates():
    tried = [Trial((2.0, 1.0), 0.5), Trial((1.0, 3.0), 0.5), Trial((1.0, 2.0), 0.5)]
    assert best(tried) == tried[2] and best(tried + [Trial((9.0, 9.0), 0.6)]).rates == (9.0, 9.0)
    assert best(search((1.0,), 5, 2.0, lambda rates: 0.5)).rates[0] == 0.125


def test_rates_are_rounded_before_they_are_used():
    seen = []
    search((1 / 3,), 5, 2.0, lambda rates: seen.append(rates) or 0.0)
    assert all(rates == tuple(float(f"{rate:.4g}") for rate in rates) for rates in seen)
    assert seen[0] == (0.3333,)


@pytest.mark.parametrize("candidates, factor", [(0, 2.0), (3, 1.0), (3, 0.5), (3, 0.0)])
def test_searches_that_cannot_search_are_refused(candidates, factor):
    with pytest.raises(AlloError, match="search"):
        search((1.0,), candidates, factor, peak(1.0))


logs = st.floats(-6, 6)


@settings(max_examples=150, deadline=None)
@given(st.lists(logs, min_size=1, max_size=2), st.integers(1, 8), st.sampled_from([1.5, 2.0, 4.0]))
def test_any_peak_gets_exactly_the_asked_number_of_distinct_models(where, candidates, factor):
    score = peak(*(math.exp(w) for w in where))
    tried = search((1.0,) * len(where), candidates, factor, score)
    assert len(tried) == candidates == len(set(rates_of(tried)))
    assert all(rate > 0 for rates in rates_of(tried) for rate in rates)
    assert best(tried).score == max(score(rates) for rates in rates_of(tried))
    repeated = search((1.0,) * len(where), candidates, factor, score)
    assert repeated == tried


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3), st.sampled_from([1.5, 2.0, 4.0]))
def test_one_rate_closes_in_on_a_single_peak(where, factor):
    tried = search((1.0,), 12, factor, peak(math.exp(where)))
    distance = abs(math.log(best(tried).rates[0]) - where)
    assert distance <= math.log(factor) / 2 + 1e-3 or len(tried) < 12
    first = best(tried[:3])
    assert best(tried).score >= first.score
