"""Each warning comes with its number when its sign is there, and only then."""

import pytest

from allo_lib.report.warning_signs import (
    arbitrary_mask,
    far_below,
    no_choice_of_tokens,
    weak_overlap,
)


@pytest.mark.parametrize(("overlap", "warns"), [(0.05, True), (0.079, True), (0.08, False), (1, 0)])
def test_overlap_near_chance(overlap, warns):
    told = weak_overlap("two orders", overlap, 0.0527)
    assert bool(told) == bool(warns)
    if warns:
        assert f"two orders: masks overlap {overlap:.3f}" in told and "0.053" in told


def test_scores_that_are_mostly_zero_or_ties():
    assert "95 of 100 scores are exactly 0" in arbitrary_mask(95, 95, 5, 10, 100)
    assert arbitrary_mask(90, 1, 1, 10, 100) is None
    assert "6 of 10 kept entries tie" in arbitrary_mask(0, 30, 6, 10, 100)
    assert arbitrary_mask(0, 6, 6, 10, 100) is None  # all that tie are kept: nothing was chosen
    assert arbitrary_mask(0, 30, 5, 10, 100) is None


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (0, "selects 0.0% of 200"),
        (3, "selects 1.5% of 200"),
        (197, "does not choose"),
        (200, "selects 100.0% of 200"),
        (4, None),
        (100, None),
        (196, None),
    ],
)
def test_a_rule_that_selects_none_or_all(chosen, told):
    weights = [[1.0] * chosen, [0.0] * (200 - chosen)]
    found = no_choice_of_tokens(weights)
    assert found is None if told is None else told in found


def test_soft_weights_count_as_chosen_unless_they_are_zero():
    assert "selects 100.0%" in no_choice_of_tokens([[0.2, 0.9], [0.01]])


@pytest.mark.parametrize(
    ("score", "noise", "warns"),
    [(0.5, 0.01, False), (0.46, 0.01, False), (0.44, 0.01, True), (0.44, 0.05, False), (0.6, 0, 0)],
)
def test_a_stage_that_lost_more_than_noise(score, noise, warns):
    told = far_below("forgetting", score, 0.5, noise)
    assert bool(told) == bool(warns)
    if warns:
        assert "44.0%" in told and "50.0%" in told and "\n" not in told
