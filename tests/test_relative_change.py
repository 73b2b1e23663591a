"""The figure of relative changes: its numbers, the paper's, and what is cut or missing."""

import pandas as pd
import pytest

from allo_lib.evaluation.comparisons import StudyResults
from allo_lib.evaluation.outcomes import Measurement
from allo_lib.evaluation.published import QUESTIONS
from allo_lib.report import relative_change
from allo_lib.report.relative_change import changes_of, draw
from tests import synthetic_results
from tests.test_figures import texts


def by_name(results):
    return {(change.domain, change.dataset): change for change in changes_of(results)}


def planted(monkeypatch, **accuracy):
    monkeypatch.setattr(synthetic_results, "ACCURACY", accuracy)
    return synthetic_results.table((0,), ("ecqa",), 20, "questions", pairs=5)


def test_changes_are_relative_to_dpo():
    found = by_name(synthetic_results.results())
    accuracy = synthetic_results.ACCURACY
    for change in found.values():
        assert change.interval.effect == pytest.approx(accuracy["allo"] / accuracy["dpo"] - 1)
        assert change.interval.low < change.interval.effect < change.interval.high
    assert list(found) == [("miniature", name) for name in ("chain", "scan", "story", "average")]


def test_the_papers_changes_are_those_it_claims():
    """Its text: +2.7% over the question sets, +1.2% over the maths sets, +9.7% on Arena-Hard."""
    table = synthetic_results.table((0,), QUESTIONS, 50, "questions")
    rows = [Measurement(0, m, "arena_hard", "win_rate", 0.5, 0.02, 500) for m in ("allo", "dpo")]
    found = by_name(StudyResults(table, rows))
    ((label, change),) = found["questions", "average"].paper
    assert label == "paper, same data" and change == pytest.approx(0.027, abs=5e-4)
    assert dict(found["instructions", "arena_hard"].paper)[label] == pytest.approx(0.097, abs=5e-4)
    averages = dict(by_name(synthetic_results.results((0,), n=50))["miniature", "average"].paper)
    assert averages["paper, 4 maths sets"] == pytest.approx(0.012, abs=5e-4)
    assert len(averages) == 3


def test_the_figure_names_every_line_with_its_numbers():
    results = synthetic_results.joined(
        ("questions", ("ecqa", "qasc")), ("helpfulness", ()), models=(0, 1), n=200
    )
    shown = texts(draw(changes_of(results)))
    for words in ("ecqa", "qasc", "average", "questions: accuracy",
                  "helpfulness: held-out reward accuracy", "paper, same data",
                  "paper, 2 instruction sets", "relative change from DPO to ALLO (%)"):  # fmt: skip
        assert words in shown
    for change in changes_of(results):
        assert f"{100 * change.interval.effect:+.1f} [" in shown


def test_what_was_not_run_is_said_and_what_is_far_is_cut(monkeypatch):
    far = pd.concat([planted(monkeypatch, allo=0.5, dpo=0.05),
                     planted(monkeypatch, allo=0.5).assign(dataset="qasc")])  # fmt: skip
    figure = draw(changes_of(StudyResults(far)))
    assert "not run" in texts(figure)
    low, high = figure.axes[0].get_xlim()
    assert low >= -115 and high <= 115
    nothing = planted(monkeypatch, allo=0.5, dpo=0.5)
    nothing.loc[nothing["method"] == "dpo", "right"] = False
    changes = changes_of(StudyResults(nothing))
    assert [change.interval for change in changes] == [None]
    shown = texts(draw(changes))
    assert "DPO: none right" in shown and "not run" not in shown


def test_the_caption_says_what_is_shown():
    assert "relative to DPO" in relative_change.CAPTION and "95%" in relative_change.CAPTION
