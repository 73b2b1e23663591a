"""Figures: labelled, deterministic, safe with text that looks like code, and with their numbers."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_claims import EFFICIENCY

from allo_lib.evaluation import claims
from allo_lib.evaluation.comparisons import Domain, StudyResults
from allo_lib.evaluation.outcomes import Measurement
from allo_lib.evaluation.published import QUESTIONS
from allo_lib.evaluation.stats import Interval, mean_interval
from allo_lib.report import figures, method_figures
from allo_lib.report.figure_style import caption_of, method_colour, save
from tests import synthetic_results

LOSSES = [0.7, 0.6, 0.5, 0.4]
TRIED = {"dpo": [
    {"rates": [1e-4], "dev": 0.8, "displacement": 1.0, "train_margin": -0.1},
    {"rates": [2e-4], "dev": 0.5, "displacement": 2.0, "train_margin": 0.3},
]}  # fmt: skip
MINIATURE = Domain("miniature", ("chain",))


def seeds(*values: float):
    """An interval over models of these values."""
    return mean_interval(dict(enumerate(values)))


def points(effect: float, low: float, high: float):
    return Interval(effect, low, high, "", (), 0)


MEASURED = {"sft_base": seeds(0.5, 0.51), "dpo": seeds(0.7, 0.72), "allo": seeds(0.72, 0.73)}
STUDY = {
    "dpo_top10": seeds(0.76, 0.77),
    "dpo_top10_paper": seeds(0.6, 0.61),
    "dpo": seeds(0.75, 0.74),
}
POINTS = [("trained", 0.9, 0.7, 0.01), ("oracle", 1.0, 0.72, 0.01)]
SHARES = {0.1: (0.7, 0.01), 0.01: (0.6, 0.01), 1: (0.7, 0.01)}
DOTS = {"dpo_top10": (0.76, 0.01), "dpo": (0.75, 0.01)}
# Figure -> what makes it of synthetic results, and what it says.
FIGURES = {
    "empirical": (lambda _: figures.empirical_dots(STUDY, "accuracy"),
                  ["95% interval", "no intervals", "own best rate", "one rate for all", "ecqa"]),
    "main": (lambda _: figures.main_table_figure(MEASURED, MINIATURE),
             ["not run", "+ Vanilla PPO", "paper, mean of 4 question sets"]),
    "ablation": (lambda _: figures.ablation_bars(
        {"allo_no_forgetting": points(-0.02, -0.03, -0.01)}, "accuracy"),
                 ["-2.0 [-3.0, -1.0]", "points above ALLO", "learning alone"]),
    "claims": (lambda results: figures.claims_figure(claims.compute(results)),
               ["supported", "contradicted", "no difference", "undecided", "paper",
                "· DPO, last 10%", "accuracy, points"]),
    "architectures": (lambda results: figures.architectures_figure(
        claims.by_architecture(results, ["gpt2", "qwen3"])),
        ["gpt2", "qwen3", "masks of two halves", "ALLO above DPO, equal steps"]),
    "relative": (figures.relative_change,
                 ["chain", "average", "miniature: accuracy", "paper, 2 instruction sets",
                  "relative change from DPO to ALLO (%)"]),
    "efficiency": (lambda _: figures.efficiency_bars(EFFICIENCY),
                   ["allo_scalar", "dense_masked", "(MB)", "seconds a pair"]),
    "method": (lambda _: method_figures.method_drawing(),
               ["forgetting", "learning", "only these neurons move", "(03)"]),
    "scores": (lambda _: method_figures.score_histogram(np.arange(1, 101) / 10, 9.1, "x"),
               ["kept: 10.0%", "19% of the movement", "cut, at a score of 9.1"]),
    "heat": (lambda _: method_figures.importance_heatmap([[0.1, 0.2]], ["layer 0"], ["q", "k"],
                                                         0.1, "x"), ["chance: 10%", "20.0"]),
    "overlap": (lambda _: method_figures.overlap_matrix(["a", "b"], [[1, 0.2], [0.2, 1]], 0.053,
                                                        "x"), ["chance: 0.053", "0.20"]),
    "concentration": (lambda _: method_figures.concentration_curve("x", np.array([0, 0.1, 1]),
                                                                   np.array([0, 0.7, 1]), 0.1),
                      ["70% in the lowest 10%"]),
    "tokens": (lambda _: method_figures.token_panel(["a", "b"], [("p", "low", [0.1, 0.9])]), []),
    "dots": (lambda _: method_figures.method_dots({"dpo": (0.7, 0.01), "allo": (0.72, 0.01)}),
             ["ALLO", "72.0", "95% interval over problems"]),
    "rates": (lambda _: method_figures.empirical_panels({"dpo": LOSSES}, DOTS, DOTS),
              ["own best rate", "one rate for all", "running mean", "95% interval"]),
    "sweep": (lambda _: method_figures.sweep_panels(TRIED, start=0.5, count=100),
              ["training reward margin", "before alignment", "development score", "unsettled"]),
    "change": (lambda _: method_figures.change_curve([0, 1], {"selected": [0, -1], "x": [0, 0]}),
               ["selected", "nats a token"]),
    "shares": (lambda _: method_figures.share_sweep(SHARES, ("DPO", 0.7)),
               ["share of neurons kept (%)", "DPO", "10", "95%"]),
    "quality": (lambda _: method_figures.reward_quality(POINTS, {"learning alone": 0.69}),
                ["oracle (1.00)", "learning alone", "95%"]),
    "kept": (lambda _: method_figures.probability_histogram({"wrong": [0.1, 0.2]}, 0.5),
             ["wrong (2)", "threshold 0.5"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return synthetic_results.results(n=200, pairs=50)


@pytest.fixture(scope="module")
def drawn(results) -> dict[str, Figure]:
    return {name: make(results) for name, (make, _) in FIGURES.items()}


def texts(figure: Figure) -> str:
    if figure.stale:
        figure.canvas.draw()  # tick labels have their text only then
    found = [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]
    return "\n".join(found)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_say_what_they_show_and_can_be_read(drawn, name):
    figure, shown = drawn[name], texts(drawn[name])
    for word in FIGURES[name][1]:
        assert word in shown
    for text in figure.findobj(lambda part: hasattr(part, "get_fontsize")):
        assert text.get_fontsize() >= 9 or not text.get_text(), text.get_text()
    for axis in figure.axes if name not in ("tokens", "method") else ():
        assert axis.get_xlabel() or axis.get_title() or axis.get_ylabel()


def test_the_main_figure_is_sorted_and_on_equal_scales_with_a_dot_a_seed(drawn):
    left, right = drawn["main"].axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[:3] == ["+ ALLO", "+ DPO", "SFT LLM"] and len(names) == 12
    assert np.ptp(left.get_xlim()) == pytest.approx(np.ptp(right.get_xlim()))
    values = [list(line.get_xdata()) for line in left.lines if line.get_marker() == "."]
    assert values[0] == pytest.approx([72, 73])
    assert {line.get_color() for line in left.lines if line.get_marker() == "o"} == {
        method_colour(name) for name in MEASURED
    }


def test_scores_on_fewer_models_stand_below_the_others_and_hollow():
    few = {"ppo": seeds(0.9)} | {name: MEASURED[name] for name in ("dpo", "allo")}
    figure = figures.main_table_figure(few, MINIATURE)
    left, _ = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()][:3] == [
        "+ ALLO",
        "+ DPO",
        "+ Vanilla PPO",
    ]
    fills = [line.get_fillstyle() for line in left.lines if line.get_marker() == "o"]
    assert fills == ["full", "full", "none"]
    assert "hollow: fewer SFT models" in texts(figure)


def test_what_lies_far_outside_is_cut_with_its_number():
    rows = {f"allo_{i}": points(0.01 * i, 0.01 * i - 0.01, 0.01 * i + 0.01) for i in (-1, 1, 2)}
    rows["allo_no_learning"] = points(-0.33, -0.35, -0.31)
    figure = figures.ablation_bars(rows, "accuracy")
    (axis,) = figure.axes
    assert -12 < axis.get_xlim()[0] < -2 and axis.get_xlim()[1] < 8
    assert "-33.0 [-35.0, -31.0]" in texts(figure)
    arrows = {line.get_marker() for line in axis.lines if min(line.get_xdata(), default=0) < -5}
    assert arrows == {"None", "<"}  # a line of no length, and the arrow


def test_the_papers_effects_are_marked_on_the_claims(results, drawn):
    told = [one for one in claims.compute(results) if one.paper is not None and one.effect]
    accuracies = next(axis for axis in drawn["claims"].axes if "accuracy, p" in axis.get_xlabel())
    marked = [line.get_xdata()[0] for line in accuracies.lines if line.get_marker() == "D"]
    assert told and 100 * told[0].paper in marked


def test_every_domain_has_a_figure_of_its_claims(tmp_path, monkeypatch):
    parts = ("questions", ("ecqa",)), ("maths", ("gsm8k",))
    results = synthetic_results.joined(*parts, models=(0, 1), n=50)
    saved = {}
    monkeypatch.setattr(figures, "save", lambda figure, folder, name, caption: (
        saved.update({name: (figure, caption)}) or folder / name))  # fmt: skip
    found = claims.compute(results, EFFICIENCY)
    assert [one.id for one in found if one.family == "costs"] == ["C10"]
    groups = claims.by_architecture(results, ["gpt2", "qwen3"])
    figures.draw(results, found, EFFICIENCY, groups, tmp_path)
    assert {"claims", "claims_maths", "main_questions", "ablations_maths"} <= set(saved)
    assert {"architectures", "efficiency"} <= set(saved)
    assert {name for name in saved if "claims" in name} == {"claims", "claims_maths"}
    assert "C10" not in saved["claims"][1] + texts(saved["claims"][0])  # 07 has costs
    assert "maths: right of zero" in texts(saved["claims_maths"][0])
    assert all("Small dots: SFT models." in saved[f"main_{name}"][1] for name, _ in parts)


def test_a_best_rate_at_the_edge_of_its_search_has_a_ring():
    middle = [one | {"rates": [rate], "dev": dev} for one, rate, dev in
              zip(TRIED["dpo"] * 2, (1e-4, 2e-4, 4e-4), (0.5, 0.8, 0.6), strict=False)]  # fmt: skip
    for records, rings in ((TRIED["dpo"], 1), (middle, 0), (middle[:2], 1)):
        axis = method_figures.sweep_panels({"dpo": records}, None, 100).axes[0]
        found = [
            line for line in axis.lines if line.get_markersize() == 12 and len(line.get_xdata())
        ]
        assert len(found) == rings
    lengths = [high - low for (_, low), (_, high) in axis.collections[0].get_segments()]
    assert lengths == pytest.approx([2 * 1.959964 * 5, 2 * 1.959964 * 4], rel=1e-4)


def test_saved_files_are_the_same_bytes_and_carry_the_caption(tmp_path):
    for folder in ("a", "b"):
        figure = figures.main_table_figure(MEASURED, MINIATURE)
        save(figure, tmp_path / folder, "main", "Über <all> methods.")
    for suffix in ("png", "pdf"):
        first, second = (tmp_path / folder / f"main.{suffix}" for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 1000
    assert caption_of(tmp_path / "a" / "main.png") == "Über <all> methods."
    with Image.open(tmp_path / "a" / "main.png") as picture:
        assert picture.width == 1350


def test_a_token_panel_shows_text_as_it_is_and_every_number():
    tokens = [" word", "\n", " $x$", "<script>", "y" * 300, "\x1b"] * 10
    numbers = list(np.linspace(0, 1, 60))
    figure = method_figures.token_panel(tokens, [("p", "low", numbers), ("c", "words", tokens)])
    figure.canvas.draw()
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown.count("$x$") == 20 and shown.count("<script>") == 20
    assert shown.count("y" * 11 + "\u2026") == 20 and shown.count("\u21b5") == 20
    assert shown.count("\ufffd") == 20 and {".02", ".51", "1", "0"} <= set(shown)
    assert not any(text.get_parse_math() for text in figure.axes[0].texts if "$" in text.get_text())
    colours = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert colours[0] != colours[-1] == (1, 1, 1, 1), "low ones are orange, high ones white"
    with pytest.raises(ValueError, match="2 tokens with 1 values of 'p'"):
        method_figures.token_panel(["a", "b"], [("p", "low", [0.5])])


def test_a_method_has_one_colour_and_the_arms_of_the_study_have_different_ones():
    methods = ["sft_base", "allo", "dpo", "dpo_top10", "dpo_last10", "dpo_random10", "rft", "npo"]
    assert len({method_colour(one) for one in methods}) == len(methods)
    assert method_colour("dpo_top2p5_paper") == method_colour("dpo_top10")
    assert method_colour("dpo_long") == method_colour("dpo_paper") == method_colour("dpo")
    assert method_colour("allo_no_forgetting") == method_colour("allo")


# --- relative to DPO -----------------------------------------------------------------------------


def change(results, name, dataset):
    (domain,) = [domain for domain in results.domains if domain.name == name]
    return figures._change(results, domain, dataset)


def test_changes_are_relative_to_dpo_and_stand_in_the_figure(results, drawn):
    accuracy = synthetic_results.ACCURACY
    for dataset in ("chain", "scan", "story", "average"):
        line = change(results, "miniature", dataset)
        assert line.effect == pytest.approx(100 * (accuracy["allo"] / accuracy["dpo"] - 1))
        assert line.low < line.effect < line.high
        assert f"{line.effect:+.1f} [{line.low:+.1f}" in texts(drawn["relative"])


def test_the_papers_changes_are_those_it_claims(results):
    """Its text: +2.7% over the question sets, +1.2% over the maths sets, +9.7% on Arena-Hard."""
    table = synthetic_results.table((0,), QUESTIONS, 50, "questions")
    rows = [Measurement(0, m, "arena_hard", "win_rate", 0.5, 0.02, 500) for m in ("allo", "dpo")]
    found = StudyResults(table, rows)
    ((label, paper),) = change(found, "questions", "average").paper
    assert label == "paper, same data" and paper == pytest.approx(2.7, abs=0.05)
    assert dict(change(found, "instructions", "arena_hard").paper)[label] == pytest.approx(
        9.7, 0.01
    )
    averages = dict(change(results, "miniature", "average").paper)
    assert averages["paper, 4 maths sets"] == pytest.approx(1.2, abs=0.05) and len(averages) == 3


def test_changes_that_cannot_be_given_are_said(monkeypatch):
    def planted(**accuracy):
        monkeypatch.setattr(synthetic_results, "ACCURACY", accuracy)
        return synthetic_results.table((0,), ("ecqa",), 20, "questions", pairs=5)

    both = [planted(allo=0.5, dpo=0.05), planted(allo=0.5).assign(dataset="qasc")]
    shown = texts(figures.relative_change(StudyResults(pd.concat(both))))
    assert "not run" in shown
    nothing = planted(allo=0.5, dpo=0.5)
    nothing.loc[nothing["method"] == "dpo", "right"] = False
    assert change(StudyResults(nothing), "questions", "ecqa").why == "DPO: none right"
    assert figures.relative_change(StudyResults(nothing)) is None
