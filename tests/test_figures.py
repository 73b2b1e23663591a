"""Figures: labelled, deterministic, and safe with text that looks like code."""

import html.parser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from allo_lib import claims, figures, published
from allo_lib.figure_style import caption_of
from tests import synthetic_results
from tests.test_claims import EFFICIENCY

RUNS = [[0.7, 0.6, 0.5, 0.4], [0.7, 0.65, 0.55, 0.5]]
POINTS = {"DPO": [(1e-4, 0.7), (2e-4, 0.75)], "ALLO": [(1e-3, 0.72), (2e-3, 0.71)]}
MEASURED = {"sft_base": (0.5, 0.49, 0.51), "dpo": (0.7, 0.69, 0.71), "allo": (0.72, 0.71, 0.73)}


def every_figure() -> dict[str, Figure]:
    found = claims.compute(synthetic_results.results(), EFFICIENCY)
    paper = {name: row["qa_avg"] for name, row in published.main_results().items()}
    arms = {"dpo_top10": (0.76, 0.01), "dpo": (0.75, 0.01)}
    return {
        "loss": figures.loss_curves({"DPO": RUNS, "ALLO": RUNS[:1]}),
        "empirical": figures.empirical_bars(arms, published.empirical_study()),
        "heat": figures.importance_heatmap([[0.1, 0.2]], ["layer 0"], ["q", "k"], 0.1),
        "overlap": figures.overlap_matrix(["a", "b"], [[1, 0.2], [0.2, 1]], 0.053),
        "concentration": figures.concentration_curve({"rejected": ([0, 0.1, 1], [0, 0.7, 1])}),
        "rates": figures.rate_sweep(POINTS, count=200),
        "displacement": figures.displacement_curve(POINTS, start=0.5),
        "margin": figures.displacement_curve({"DPO": [(-0.1, 0.5), (2.0, 0.7)]}, x="margin"),
        "share": figures.share_sweep([0.1, 0.01, 1], [0.7, 0.6, 0.7], [0.01] * 3, ("DPO", 0.7)),
        "ablation": figures.ablation_bars({"allo_no_forgetting": (-0.02, -0.03, -0.01)}),
        "main": figures.main_table_figure(MEASURED, paper),
        "claims": figures.claims_figure(found),
        "efficiency": figures.efficiency_bars(EFFICIENCY),
        "cost": figures.quality_against_cost(
            {
                "scalar": [(0.9, 0.7, 0.01, 0.1), (0.8, 0.6, 0.01, 0.01)],
                "whole rows": [(0.7, 0.65, 0.01, 0.1)],
            },
            ("all neurons", 0.72),
        ),
        "tokens": figures.token_rewards_picture([(["a", "b"], [0.1, 0.9], "rejected")]),
    }


def test_development_scores_have_the_intervals_of_their_number():
    figure = figures.displacement_curve({"DPO": [(1.0, 0.8), (2.0, 0.5)]}, count=100)
    (bars,) = figure.axes[0].collections
    lengths = [high - low for (_, low), (_, high) in bars.get_segments()]
    assert lengths == pytest.approx([2 * 1.959964 * 4, 2 * 1.959964 * 5], rel=1e-4)
    assert "95% interval" in figure.axes[0].get_ylabel()
    assert not figures.displacement_curve(POINTS).axes[0].collections


@pytest.fixture(scope="module")
def drawn():
    return every_figure()


def texts(figure: Figure) -> str:
    figure.canvas.draw()  # tick labels have their text only then
    found = [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]
    return "\n".join(found)


def test_every_axis_with_data_is_labelled(drawn):
    for name, figure in drawn.items():
        if name == "tokens":
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
        ("loss", ["running mean of 1 steps", "lowest to highest of 2 seeds", "training loss"]),
        ("empirical", ["95% interval", "no intervals published", "cut axis"]),
        ("heat", ["chance: 10%", "20.0"]),
        ("overlap", ["chance: 0.053", "0.20"]),
        ("concentration", ["70% in the lowest 10%"]),
        ("rates", ["DPO: best 0.0002", "ALLO: best 0.001"]),
        ("margin", ["training reward margin"]),
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


def test_running_mean_and_band_are_those_of_the_runs():
    axis = figures.loss_curves({"DPO": RUNS}, window=2).axes[0]
    expected = [(0.65 + 0.675) / 2, (0.55 + 0.6) / 2, (0.45 + 0.525) / 2]
    assert axis.lines[0].get_ydata() == pytest.approx(expected)
    assert list(axis.lines[0].get_xdata()) == [2, 3, 4]


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


def test_token_picture_wraps_and_keeps_every_letter():
    tokens = [" word"] * 100 + ["\n", " $x$", "y" * 300]
    values = np.linspace(0, 1, len(tokens))
    figure = figures.token_rewards_picture([(tokens, values, "a title")])
    figure.canvas.draw()
    letters = [text for text in figure.axes[0].texts if text.get_text() != "a title"]
    shown = "".join(text.get_text() for text in letters)
    assert shown == "word" * 100 + "\u21b5$x$" + "y" * 300
    places = [text.get_position() for text in letters]
    assert len(set(places)) == len(places)
    right = figure.axes[0].get_xlim()[1]
    assert all(0 <= x <= right for x, _ in places)
    assert len({y for _, y in places}) >= 8


def test_token_html_shows_markup_as_text():
    page = figures.token_rewards_html(
        [(["<script>alert(1)</script>", '"&'], [0.0, 1.0], "<b>title</b>")], label='p"'
    )
    seen, tags = [], []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.handle_data = seen.append
    parser.feed(page)
    assert set(tags) == {"p", "b", "span"}
    assert "<script>alert(1)</script>" in "".join(seen) and "<b>title</b>" in seen


def test_tokens_and_values_must_match():
    for draw in (figures.token_rewards_html, figures.token_rewards_picture):
        with pytest.raises(ValueError, match="2 tokens with 1 values"):
            draw([(["a", "b"], [0.5], "")])
