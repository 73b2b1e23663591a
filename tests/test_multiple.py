"""Holm's correction: against its definition, and the errors it is there to prevent."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allo_lib.errors import AlloError
from allo_lib.evaluation.stats import holm


def test_adjusted_values_of_the_textbook_example():
    # R 4.3: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), max_size=7), st.floats(0.001, 0.999))
def test_what_is_rejected_is_what_the_closed_test_rejects(p_values, level):
    """Independent definition: a hypothesis goes when Bonferroni rejects every set that holds it."""
    places = range(len(p_values))
    for place, adjusted in zip(places, holm(p_values), strict=True):
        sets = itertools.chain.from_iterable(
            itertools.combinations(places, size) for size in range(1, len(p_values) + 1)
        )
        # In every set that holds it some p times the set's size is small enough.
        closed = max(min(1.0, min(len(s) * p_values[i] for i in s)) for s in sets if place in s)
        assert adjusted == pytest.approx(closed)
        assert p_values[place] <= adjusted <= 1


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.25, 0.5, 1.0])), max_size=6))
def test_weights_are_those_of_the_closed_test(family):
    """A set of hypotheses goes when one of its p is at most its share of the weights' level."""
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


def test_an_empty_family_is_fine_and_impossible_values_are_not():
    assert holm([]) == []
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(AlloError, match="expected each from 0 to 1"):
            holm([0.5, bad])


def test_of_true_hypotheses_hardly_any_family_loses_one():
    """Eleven correlated tests without an effect, 2,000 times: one in twenty families at most."""
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    z = rng.normal(size=(2000, 11)) * 0.6**0.5 + rng.normal(size=(2000, 1)) * 0.4**0.5
    p_values = 2 * norm.sf(np.abs(z))
    corrected = np.mean([min(holm(list(row))) < 0.05 for row in p_values])
    assert np.mean(p_values.min(axis=1) < 0.05) > 0.2 and corrected < 0.06
