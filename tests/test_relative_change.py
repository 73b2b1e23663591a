"""The figure of relative changes: its numbers, the paper's, and what is cut or missing."""

import pytest

from allo_lib import relative_change
from allo_lib.measurements import Measurement
from allo_lib.published import QUESTIONS
from allo_lib.relative_change import changes_of, draw
from tests import synthetic_results
from tests.test_figures import texts


def by_name(rows):
    return {(change.domain, change.dataset): change for change in changes_of(rows)}


def test_changes_are_relative_to_dpo():
    found = by_name(synthetic_results.rows())
    accuracy = synthetic_results.ACCURACY
    for change in found.values():
        assert change.interval.effect == pytest.approx(accuracy["allo"] / accuracy["dpo"] - 1)
        assert change.interval.low < change.interval.effect < change.interval.high
    assert list(found) == [("miniature", name) for name in ("chain", "scan", "story", "average")]


def test_the_papers_changes_are_those_it_claims():
    """Its text: +2.7% over the question sets, +1.2% over the maths sets, +9.7% on Arena-Hard."""
    rows = synthetic_results.rows((0,), QUESTIONS, n=50)
    rows += [Measurement(0, m, "arena_hard", "win_rate", 0.5, 0.02, 500) for m in ("allo", "dpo")]
    found = by_name(rows)
    ((label, change),) = found["questions", "average"].paper
    assert label == "paper, same data" and change == pytest.approx(0.027, abs=5e-4)
    assert dict(found["instructions", "arena_hard"].paper)[label] == pytest.approx(0.097, abs=5e-4)
    averages = dict(by_name(synthetic_results.rows((0,)))["miniature", "average"].paper)
    assert averages["paper, 4 maths sets"] == pytest.approx(0.012, abs=5e-4)
    assert len(averages) == 3


def test_the_figure_names_every_line_with_its_numbers():
    rows = synthetic_results.rows((0, 1), ("ecqa", "qasc"), n=200)
    rows += synthetic_results.rows((0, 1), ("hh_helpful",), n=200, prefix="reward_")
    shown = texts(draw(changes_of(rows)))
    for words in ("ecqa", "qasc", "average", "hh_helpful", "questions: accuracy",
                  "helpfulness: held-out reward accuracy", "paper, same data",
                  "paper, 2 instruction sets", "relative change from DPO to ALLO (%)"):  # fmt: skip
        assert words in shown
    for change in changes_of(rows):
        assert f"{100 * change.interval.effect:+.1f} [" in shown


def test_what_was_not_run_is_said_and_what_is_far_is_cut():
    rows = [Measurement(0, m, "ecqa", "accuracy", p, 0.1, 20) for m, p in (("allo", 0.5),)]
    rows += [Measurement(0, m, "qasc", "accuracy", p, 0.1, 20)
             for m, p in (("allo", 0.5), ("dpo", 0.05))]  # fmt: skip
    figure = draw(changes_of(rows))
    assert "not run" in texts(figure)
    low, high = figure.axes[0].get_xlim()
    assert low >= -115 and high <= 115
    none_right = (("allo", 0.5), ("dpo", 0.0))
    nothing = [Measurement(0, m, "ecqa", "accuracy", p, 0.1, 20) for m, p in none_right]
    assert [change.interval for change in changes_of(nothing)] == [None]
    shown = texts(draw(changes_of(nothing)))
    assert "DPO: none right" in shown and "not run" not in shown


def test_the_caption_says_what_is_shown():
    assert "relative to DPO" in relative_change.CAPTION and "95%" in relative_change.CAPTION
