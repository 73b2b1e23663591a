"""Figures: labelled, deterministic, and safe with text that looks like code."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from allo_lib.evaluation import claims, published
from allo_lib.report import ablation_figures, figures, method_figures
from allo_lib.report.figure_style import caption_of, method_colour
from tests import synthetic_results
from tests.test_claims import EFFICIENCY

RUNS = [[0.7, 0.6, 0.5, 0.4], [0.7, 0.65, 0.55, 0.5]]
TRIED = {"dpo": [
    {"rates": [1e-4], "dev": 0.8, "displacement": 1.0, "train_margin": -0.1},
    {"rates": [2e-4], "dev": 0.5, "displacement": 2.0, "train_margin": 0.3},
]}  # fmt: skip
MEASURED = {"sft_base": (0.5, 0.49, 0.51), "dpo": (0.7, 0.69, 0.71), "allo": (0.72, 0.71, 0.73)}


def every_figure() -> dict[str, Figure]:
    found = claims.compute(synthetic_results.results(), EFFICIENCY)
    paper = {name: row["qa_avg"] for name, row in published.main_results().items()}
    arms = {"dpo_top10": (0.76, 0.01), "dpo": (0.75, 0.01)}
    return {
        "empirical": figures.empirical_bars(arms, published.empirical_study()),
        "heat": method_figures.importance_heatmap([[0.1, 0.2]], ["layer 0"], ["q", "k"], 0.1),
        "overlap": method_figures.overlap_matrix(["a", "b"], [[1, 0.2], [0.2, 1]], 0.053),
        "concentration": method_figures.concentration_curve(
            {"rejected": ([0, 0.1, 1], [0, 0.7, 1])}
        ),
        "share": ablation_figures.share_sweep(
            [0.1, 0.01, 1], [0.7, 0.6, 0.7], [0.01] * 3, ("DPO", 0.7)
        ),
        "ablation": figures.ablation_bars({"allo_no_forgetting": (-0.02, -0.03, -0.01)}),
        "main": figures.main_table_figure(MEASURED, paper),
        "claims": figures.claims_figure(found),
        "efficiency": figures.efficiency_bars(EFFICIENCY),
        "cost": ablation_figures.quality_against_cost(
            {
                "scalar": [(0.9, 0.7, 0.01, 0.1), (0.8, 0.6, 0.01, 0.01)],
                "whole rows": [(0.7, 0.65, 0.01, 0.1)],
            },
            ("all neurons", 0.72),
        ),
        "method": method_figures.method_drawing(),
        "scores": method_figures.score_histogram(np.arange(1, 101) / 10, 9.1, "x"),
        "tokens": method_figures.token_panel(["a", "b"], [("p", "low", [0.1, 0.9])]),
        "dots": method_figures.method_dots({"dpo": (0.7, 0.01), "allo": (0.72, 0.01)}),
        "arms": method_figures.empirical_panels({"dpo": RUNS[0]}, arms, {"dpo": (0.7, 0.01)}),
        "sweep": method_figures.sweep_panels(TRIED, start=0.5, count=100),
        "change": method_figures.change_curve([0, 1], {"selected": [0, -1], "others": [0, 0]}),
        "kept": method_figures.probability_histogram({"wrong": [0.1, 0.2], "others": [0.9]}, 0.5),
    }


def test_development_scores_have_the_intervals_of_their_number():
    figure = method_figures.sweep_panels({"dpo": TRIED["dpo"][:2]}, count=100)
    axis = figure.axes[0]
    lengths = [high - low for (_, low), (_, high) in axis.collections[0].get_segments()]
    assert lengths == pytest.approx([2 * 1.959964 * 4, 2 * 1.959964 * 5], rel=1e-4)
    assert "95% interval" in axis.get_ylabel()
    assert not method_figures.sweep_panels(TRIED).axes[0].collections


@pytest.fixture(scope="module")
def drawn():
    return every_figure()


def texts(figure: Figure) -> str:
    figure.canvas.draw()  # tick labels have their text only then
    found = [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]
    return "\n".join(found)


def test_every_axis_with_data_is_labelled(drawn):
    for name, figure in drawn.items():
        if name in ("tokens", "method"):
            continue
        assert any(axis.get_xlabel() or axis.get_title() for axis in figure.axes), name
        for axis in figure.axes:
            if axis.lines and not axis.images:
                labelled = axis.get_xlabel() or [t.get_text() for t in axis.get_xticklabels()]
                assert labelled or axis.get_ylabel(), name


def test_no_text_is_smaller_than_nine_points(drawn):
    for name, figure in drawn.items():
        figure.canvas.draw()
        for text in figure.findobj(lambda part: hasattr(part, "get_fontsize")):
            assert text.get_fontsize() >= 9 or not text.get_text(), (name, text.get_text())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scores", ["kept: 10.0%", "19% of the movement", "cut, at a score of 9.1"]),
        ("arms", ["own best rate", "one rate for all", "running mean", "95% interval"]),
        ("sweep", ["training reward margin", "before alignment", "development score"]),
        ("dots", ["ALLO", "72.0", "95% interval over problems"]),
        ("method", ["forgetting", "learning", "only these neurons move", "(03)"]),
        ("empirical", ["95% interval", "no intervals published", "cut axis"]),
        ("heat", ["chance: 10%", "20.0"]),
        ("overlap", ["chance: 0.053", "0.20"]),
        ("concentration", ["70% in the lowest 10%"]),
        ("main", ["not run", "+ Vanilla PPO"]),
        (
            "claims",
            [
                "supported",
                "contradicted",
                "no difference",
                "undecided",
                "C10",
                "C2.dpo_last10",
                "accuracy, points",
            ],
        ),
        ("cost", ["operations of a step (all neurons: 1)", "10%", "whole rows", "all neurons"]),
        ("efficiency", ["allo_scalar", "dense_masked", "(MB)", "seconds a pair"]),
    ],
)
def test_figures_say_what_they_show(drawn, name, words):
    shown = texts(drawn[name])
    for word in words:
        assert word in shown


def test_bars_and_whiskers_have_the_values_given(drawn):
    axis = drawn["empirical"].axes[0]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([76, 75])
    segments = axis.collections[0].get_segments()
    assert segments[0][:, 1] == pytest.approx([76 - 1.96, 76 + 1.96], abs=0.01)


def test_saved_files_are_the_same_bytes_and_carry_the_caption(tmp_path):
    for folder in ("a", "b"):
        figures.save(every_figure()["main"], tmp_path / folder, "main", "Über <all> methods.")
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


def test_tokens_and_values_must_match():
    with pytest.raises(ValueError, match="2 tokens with 1 values of 'p'"):
        method_figures.token_panel(["a", "b"], [("p", "low", [0.5])])


def test_a_method_has_one_colour_and_the_arms_of_the_study_have_different_ones():
    arms = ["sft_base", "allo", "dpo", "dpo_top10", "dpo_last10", "dpo_random10", "rft", "npo"]
    assert len({method_colour(arm) for arm in arms}) == len(arms)
    assert method_colour("dpo_top2p5_paper") == method_colour("dpo_top10")
    assert method_colour("dpo_long") == method_colour("dpo_paper") == method_colour("dpo")
    assert method_colour("allo_no_forgetting") == method_colour("allo")
