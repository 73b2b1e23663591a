"""Searches of learning rates try as many models as they may, where they tell most."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.errors import AlloError
from allo_lib.study.search import Trial, best, proposals, search


def peak(*where):
    """A score with its one peak at the given rates."""
    return lambda rates: -sum(math.log2(r / w) ** 2 for r, w in zip(rates, where, strict=True))


def rates_of(tried):
    return [trial.rates for trial in tried]


@pytest.mark.parametrize("initial, top, candidates, expected", [
    # one rate: the initial one and one factor to both sides, then beyond an edge or into both gaps
    ((1e-4,), (1e-4,), 3, [(1e-4,), (5e-5,), (2e-4,)]),
    ((1.0,), (100.0,), 6, [(1.0,), (0.5,), (2.0,), (4.0,), (8.0,), (16.0,)]),
    ((1.0,), (0.01,), 5, [(1.0,), (0.5,), (2.0,), (0.25,), (0.125,)]),
    ((1.0,), (1.0,), 5, [(1.0,), (0.5,), (2.0,), (0.7071,), (1.414,)]),
    # two rates: their common size, once beyond an edge of it, then the first stage's
    ((1e-4, 1e-3), (1e-4, 1e-3), 5,
     [(1e-4, 1e-3), (5e-5, 5e-4), (2e-4, 2e-3), (5e-5, 1e-3), (2e-4, 1e-3)]),
    ((1e-4, 1e-3), (1e-3, 1e-2), 5,
     [(1e-4, 1e-3), (5e-5, 5e-4), (2e-4, 2e-3), (4e-4, 4e-3), (2e-4, 4e-3)]),
    ((1e-4, 1e-3), (5e-5, 5e-4), 6,
     [(1e-4, 1e-3), (5e-5, 5e-4), (2e-4, 2e-3), (2.5e-5, 2.5e-4), (2.5e-5, 5e-4), (1e-4, 5e-4)]),
    ((1e-4, 1e-3), (5e-5, 1.4e-3), 5,
     [(1e-4, 1e-3), (5e-5, 5e-4), (2e-4, 2e-3), (5e-5, 1e-3), (2.5e-5, 1e-3)]),
    ((1e-4, 1e-3), (2e-4, 7e-4), 6,
     [(1e-4, 1e-3), (5e-5, 5e-4), (2e-4, 2e-3), (5e-5, 1e-3), (2e-4, 1e-3), (4e-4, 1e-3)]),
    ((), (), 5, [()]),
])  # fmt: skip
def test_the_rates_that_are_tried(initial, top, candidates, expected):
    assert rates_of(search(initial, candidates, 2.0, peak(*top))) == expected


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


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=2),
    st.integers(1, 12),
    st.sampled_from([1.5, 2.0, 4.0]),
)
def test_any_peak_gets_the_requested_number_of_distinct_models(where, candidates, factor):
    score = peak(*(2**w for w in where))
    tried = search((1.0,) * len(where), candidates, factor, score)
    assert len(tried) == candidates == len(set(rates_of(tried)))
    assert all(rate > 0 for rates in rates_of(tried) for rate in rates)
    assert best(tried).score == max(score(rates) for rates in rates_of(tried))
    if len(where) == 1 and candidates == 12 and abs(where[0]) < 4:
        assert abs(math.log2(best(tried).rates[0]) - where[0]) <= math.log2(factor) / 2 + 1e-3


# --- to an interior optimum ----------------------------------------------------------------------


def propose(initial, factor, budget, score, knob=False):
    """Runs `proposals` on a function of the rates."""
    going = proposals(initial, factor, budget, knob)
    wanted = next(going)
    while True:
        try:
            wanted = going.send({rates: score(rates) for rates in wanted})
        except StopIteration as end:
            return end.value


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3), st.integers(5, 12))
def test_one_rate_is_found_within_half_a_step_of_the_top(top, budget):
    found = propose((1.0,), 2.0, budget, peak(2**top))
    assert found.interior and budget - 1 <= len(found.scores) <= 2 * budget
    assert abs(math.log2(found.rates[0]) - top) <= 0.5 + 1e-3
    assert found.scores[found.rates] == max(found.scores.values())


@settings(max_examples=100, deadline=None)
@given(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_two_rates_are_found_together_and_against_each_other(common, apart):
    found = propose((1.0, 1.0), 2.0, 12, peak(2 ** (common + apart), 2**common))
    assert found.interior and len(found.scores) <= 24
    first, second = map(math.log2, found.rates)
    assert abs(second - common) <= 1 and abs((first - second) - apart) <= 1.5


@settings(max_examples=100, deadline=None)
@given(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_a_rate_and_a_knob_are_found_each_by_itself(rate, beta):
    found = propose((1e-3, 0.1), 2.0, 12, peak(1e-3 * 2**rate, 0.1 * 2**beta), knob=True)
    assert found.interior and len(found.scores) <= 24
    assert abs(math.log2(found.rates[0] / 1e-3) - rate) <= 1
    assert abs(math.log2(found.rates[1] / 0.1) - beta) <= 1


def test_what_still_rises_at_the_end_is_at_the_edge_and_of_equal_scores_the_smallest_rates_win():
    found = propose((1.0,), 2.0, 4, lambda rates: rates[0])
    assert not found.interior and found.rates[0] == max(r for (r,) in found.scores)
    assert len(found.scores) <= 16
    assert propose((1.0,), 2.0, 3, lambda rates: 0.5).rates[0] <= 0.5


@pytest.mark.parametrize("initial, budget, factor", [((1.0,), 2, 2.0), ((1.0, 1.0), 4, 2.0),
                                                     ((1.0,), 5, 1.0)])  # fmt: skip
def test_a_budget_that_surrounds_nothing_is_refused(initial, budget, factor):
    with pytest.raises(AlloError, match="cannot surround"):
        next(proposals(initial, factor, budget))
