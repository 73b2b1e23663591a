"""Rows of the ablations: names, stages and figures; overlaps of masks beside chance."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from tiny_study import DOMAIN, PROFILE

from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes, published
from allo_lib.method import neurons
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.methods import (
    ESTIMATORS,
    GRID,
    KEYS,
    RATES,
    Stage,
    relative_rates,
    stages_of,
    tuned_as,
    waits_for,
)
from allo_lib.profiles.profile_files import load_profile
from allo_lib.report import ablation_figures as drawing
from allo_lib.study import importance


@pytest.fixture(scope="module")
def profile():
    return load_profile(str(PROFILE))


# --- names and stages ----------------------------------------------------------------------------


def changes(method, profile) -> list[dict]:
    """What each stage of a row has that ALLO's has not."""
    pairs = zip(stages_of("allo", profile), stages_of(method, profile), strict=True)
    return [
        {key: getattr(b, key) for key in vars(a) if getattr(a, key) != getattr(b, key)}
        for a, b in pairs
    ]


def test_rows_of_sweeps_do_what_their_names_say(profile):
    def said(text):
        return float(text.replace("p", "."))

    for place, row in GRID.items():
        percents = row.removeprefix("allo_f").split("_l")
        assert [said(one) for one in percents] == pytest.approx([100 * share for share in place])
        for share, stage in zip(place, stages_of(row, profile), strict=True):
            wanted = ("top", stage.objective, share) if share < 1 else ("all", "dense", 0.1)
            assert (stage.neurons, stage.rate, stage.share) == wanted
    for share, row in KEYS.items():
        assert said(row.removeprefix("allo_key")) == pytest.approx(100 * share)
        assert changes(row, profile) == [{}, {"key_share": share} if share != 0.2 else {}]
    for place, row in RATES.items():
        assert [said(one) for one in row.removeprefix("allo_rates_x").split("_x")] == list(place)
        assert relative_rates(row) == ("allo", place) and changes(row, profile) == [{}, {}]
    assert relative_rates("allo_f5_l20") is relative_rates("dpo_rates_x1_x2") is None


def test_rows_that_wait_for_another_or_take_its_rates():
    assert waits_for("dpo_top10_paper") == waits_for("allo_key_reference") == "dpo"
    assert waits_for("allo") is None and waits_for("allo_f5_l20") is None
    assert waits_for("allo_rates_x1_x2") == "allo"
    tuned = ["allo_rm_half", "allo_key5", "allo_f5_l5", "allo_scores_gradient", "allo_official"]
    assert {tuned_as(row) for row in tuned} == {"allo"}
    own = ["allo_rows", "allo_no_forgetting", "allo_all_tokens_learning", "dpo_top10"]
    assert [tuned_as(row) for row in own] == own and tuned_as("dpo_paper") == "dpo"


def test_each_row_changes_what_it_says(profile):
    said = {
        "allo_last_neurons": [{"neurons": "bottom"}] * 2,
        "allo_rows": [{"granularity": "row"}] * 2,
        "allo_per_tensor": [{"scope": "tensor"}] * 2,
        "allo_f5_l10": [{"share": 0.05}, {}],
        "allo_f10_l100": [{}, {"neurons": "all", "rate": "dense"}],
        "allo_rm_half": [{"reward_model": "half"}, {}],
        "allo_official": [{"pairs": "wrong", "share": 0.05}, {"share": 0.05, "key_share": 0.1}],
    }
    for word in ESTIMATORS:
        said[f"allo_scores_{word.replace('.', 'p')}"] = [{"estimator": word}] * 2
        importance.check_variant(word, ())
    assert {row: changes(row, profile) for row in said} == said
    assert stages_of("allo_reversed", profile) == stages_of("allo", profile)[::-1]
    for row in ("allo", "allo_reversed", "allo_merged", "allo_no_forgetting", "allo_no_learning"):
        assert sum(stage.epochs for stage in stages_of(row, profile)) == 2, row
    for row in filter(lambda name: name.startswith("allo"), published.NAMES):
        assert stages_of(row, profile) and outcomes._NAME.fullmatch(row)


def test_the_store_knows_a_stage_by_what_it_was_known_by_before():
    """Written out: results in stores of users have keys of these."""
    assert Stage("learning", "learning", neurons="top", share=0.1, key_share=0.2).settings() == {
        "objective": "learning", "rate": "learning", "epochs": 1, "neurons": "top", "share": 0.1,
        "granularity": "scalar", "estimator": "delta", "tokens": "rewriter",
        "reward_model": "trained", "rule": "threshold", "key": "policy", "key_share": 0.2,
    }  # fmt: skip
    assert Stage("dpo", "top", neurons="top", scope="tensor").settings()["scope"] == "tensor"


def test_searches_of_random_and_last_neurons_begin_as_much_higher_as_those_of_dpo(profile):
    rates = load_profile("tiny").domains[DOMAIN].rates
    for row, own in (("allo_random_neurons", rates.random), ("allo_last_neurons", rates.last)):
        stages = stages_of(row, profile)
        factor = own / rates.top
        assert [stage.centre(rates) for stage in stages] == pytest.approx(
            [rates.forgetting * factor, rates.learning * factor]
        )
        assert all("centre" in stage.settings() for stage in stages)
    for row in ("allo", "dpo", "dpo_last10", "dpo_random10", "allo_all_neurons"):
        for stage in stages_of(row, profile):
            assert stage.centre(rates) == getattr(rates, stage.rate)
            assert "centre" not in stage.settings()


# --- scores and overlaps -------------------------------------------------------------------------


def test_variants_see_the_pairs_they_name():
    rows, families = list(range(7)), list("abcabca")
    seen = {v: importance.pairs_of(v, rows, families) for v in importance.VARIANTS}
    assert seen["half_a"] + seen["half_b"] == rows
    assert sorted(seen["third_a"] + seen["third_b"] + seen["third_c"]) == rows
    assert importance.pairs_of("family:b", rows, families) == [1, 4]
    parts = ("half_a", "half_b", "third_a", "third_b", "third_c")
    assert all(seen[v] == rows for v in importance.VARIANTS if v not in parts)
    with pytest.raises(AlloError, match="scores 'family:d' are not known; expected one of delta"):
        importance.check_variant("family:d", ["a", "b"])


def test_scores_of_variants_have_their_rate_their_length_and_their_pairs(tiny_study):
    usual = tiny_study.scores(DOMAIN).json()
    faster, longer, chain = (
        tiny_study.scores(DOMAIN, v).json() for v in ("lr_x3", "two_epochs", "family:chain")
    )
    assert faster["lr"] == pytest.approx(3 * usual["lr"]) and longer["lr"] == usual["lr"]
    assert len(longer["loss"]) == 2 * len(usual["loss"]) == 2 * len(faster["loss"])
    rows = tiny_study.pairs(DOMAIN).rows["mask"]
    assert chain["pairs"] == sum(row["dataset"] == "chain" for row in rows) < usual["pairs"]
    mask = tiny_study.mask(DOMAIN, "top", 0.1, scope="tensor")
    for name, index in mask.indices.items():
        assert index.numel() == max(1, round(0.1 * math.prod(mask.shapes[name])))


SHAPES = {"a": (100, 100), "b": (200, 100), "c": (50,)}


def random_mask(seed: int, shares: dict[str, float]) -> NeuronMask:
    generator = torch.Generator().manual_seed(seed)
    indices = {
        name: torch.randperm(math.prod(shape), generator=generator)[
            : round(shares[name] * math.prod(shape))
        ].sort().values
        for name, shape in SHAPES.items()
    }  # fmt: skip
    return NeuronMask(indices, SHAPES)


@pytest.mark.parametrize("shares", [dict.fromkeys(SHAPES, 0.1), {"a": 0.4, "b": 0.01, "c": 0.5}])
def test_random_masks_overlap_by_the_chance_within_tensors(shares):
    found = [
        importance.overlap(
            "x", "a", "b", random_mask(2 * i, shares), random_mask(2 * i + 1, shares)
        )
        for i in range(20)
    ]
    kept = {name: round(share * math.prod(SHAPES[name])) for name, share in shares.items()}
    total = sum(math.prod(shape) for shape in SHAPES.values())
    # By hand: of k out of n drawn twice, k^2 / n are expected in both.
    both = sum(count**2 / math.prod(SHAPES[name]) for name, count in kept.items())
    assert found[0].within == pytest.approx(both / (2 * sum(kept.values()) - both))
    assert found[0].chance == pytest.approx(neurons.chance_overlap(sum(kept.values()) / total))
    assert np.mean([one.value for one in found]) == pytest.approx(found[0].within, rel=0.03)
    assert all(one.low <= one.value <= one.high for one in found)
    mask = random_mask(0, shares)
    same = importance.overlap("x", "a", "b", mask, mask)
    assert (same.value, same.low, same.high) == (1, 1, 1)


def test_compared_are_orders_data_tasks_warm_ups_and_estimators(tiny_study):
    rows = importance.compare(tiny_study, DOMAIN)
    labels = [one.label for one in rows]
    tasks = {"tasks: chain and scan", "tasks: chain and story", "tasks: scan and story"}
    assert tasks | {"order of the data", "sum of |gradient|"} <= set(labels)
    assert labels.count("thirds of the pairs") == 3 and not any("seed" in word for word in labels)
    orders = rows[labels.index("order of the data")]
    masks = [tiny_study.mask(DOMAIN, "top", 0.1, v) for v in ("delta", "order")]
    assert orders.value == masks[0].overlap(masks[1])


# --- the numbers and the figures of 05 -----------------------------------------------------------


def test_a_sweep_needs_more_than_what_other_figures_show(profile):
    tiny = load_profile("tiny")
    assert drawing.sweeps(tiny, [*tiny.methods, *tiny.ablations]) == {}
    rows = ["allo", "allo_all_tokens_learning", "allo_f5_l20", "allo_f100_l100", "allo_key5",
            "allo_rates_x4_x0p25", "dpo"]  # fmt: skip
    assert drawing.sweeps(profile, rows) == {
        "neurons": {(0.05, 0.2): "allo_f5_l20", (1.0, 1.0): "allo_f100_l100", (0.1, 0.1): "allo"},
        "key_tokens": {0.05: "allo_key5", 0.2: "allo", 1.0: "allo_all_tokens_learning"},
    }


def test_the_slope_is_that_of_weighted_least_squares():
    areas, scores, errors = np.array([(0.5, 0.60, 0.01), (0.7, 0.66, 0.02), (1, 0.70, 0.01)]).T
    weights = errors**-2
    centred = areas - np.average(areas, weights=weights)
    spread = (weights * centred**2).sum()
    slope, half = (weights * centred * scores).sum() / spread, 1.959964 / spread**0.5
    points = [("a", *point) for point in zip(areas, scores, errors, strict=True)]
    expected = [100 * x for x in (slope, slope - half, slope + half)]
    assert drawing.slope_of(points) == pytest.approx(expected)
    assert all(math.isnan(x) for x in drawing.slope_of([points[0], points[0]]))


def test_effects_are_paired_differences_by_label():
    def found(method, rights):
        return {"method": method, "answers": [[i, "x", 1, right] for i, right in enumerate(rights)]}

    results = {"allo": found("allo", [1, 0] * 50), "allo_soft": found("allo_soft", [1, 1] * 50)}
    effect, low, high = drawing.effects(results, {"allo_soft": "soft"}, "allo")["soft"]
    assert effect == 0.5 and 0.3 < low < 0.5 < high < 0.7


def overlap_row(label: str, value: float) -> importance.Overlap:
    return importance.Overlap(label, "a", "b", value, value - 0.01, value + 0.02, 0.053, 0.08)


REGION = {
    (a, b): (0.02 - 0.03 * abs(math.log(a * b)), -0.01, 0.03)
    for a, b in product((0.25, 1.0, 4.0), repeat=2)
}
POINTS = [("trained", 0.9, 0.7, 0.01), ("oracle", 1.0, 0.72, 0.01)]
SHARES = {0.1: (0.7, 0.01), 0.01: (0.6, 0.01), 1: (0.7, 0.01)}
OVERLAPS = [overlap_row("orders", 0.3), overlap_row("third", 0.1), overlap_row("third", 0.12)]
FIGURES = {
    "region": (lambda: drawing.effect_grid(REGION, "DPO", "mini"),
               ["ALLO minus DPO", "+2.0\n[-1.0, +3.0]", "x0.25"]),
    "hole": (lambda: drawing.effect_grid({place: one for place, one in REGION.items()
                                          if place != (4.0, 4.0)}, "DPO"), ["not run"]),
    "one row": (lambda: drawing.effect_grid({(1.0, b): REGION[1.0, b] for b in (1.0, 4.0)}, "DPO",
                                            what="share", form="{:g}%"), ["learning: share", "4%"]),
    "shares": (lambda: drawing.share_sweep(SHARES, ("DPO", 0.7)),
               ["share of neurons kept (%)", "DPO", "10"]),
    "quality": (lambda: drawing.reward_quality(POINTS, {"learning alone": 0.69}),
                ["oracle (1.00)", "learning alone"]),
    "overlaps": (lambda: drawing.overlap_dots(OVERLAPS, "mini"), ["chance within each tensor"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_also_with_missing_rows_and_can_be_read(name):
    make, said = FIGURES[name]
    figure = make()
    figure.canvas.draw()
    texts = figure.findobj(Text)
    shown = "\n".join(text.get_text() for text in texts)
    assert all(word in shown for word in [*said, "95%"])
    assert ("not run" in shown) == (name == "hole")
    assert all(text.get_fontsize() >= 9 or not text.get_text() for text in texts)
    if name == "region":
        assert figure.axes[0].collections, "no line where the difference is zero"
