"""Rows of the ablations: names, stages and figures; overlaps of masks beside chance."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from tiny_study import DOMAIN, PROFILE

from allo_lib.errors import AlloError
from allo_lib.evaluation import ablations, outcomes
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
from allo_lib.report import ablation_figures as numbers
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
    assert "allo_f2p5_l100" in GRID.values() and "allo_rates_x0p25_x4" in RATES.values()


@pytest.mark.parametrize("name", ["allo_f0_l10", "allo_f10", "allo_f10_l5_x", "allo_key",
                                  "allo_key0", "allo_rates_x1p0_x2", "dpo_rates_x1_x2",
                                  "allo_scores_delta", "allo_rm_trained"])  # fmt: skip
def test_other_names_are_refused_in_one_line(name, profile):
    assert relative_rates(name) is None
    with pytest.raises(AlloError, match="is not known; expected one of .*allo_f5_l20") as error:
        stages_of(name, profile)
    assert "\n" not in str(error.value) and "allo_f5_l10" not in str(error.value)


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
    assert {row: changes(row, profile) for row in said} == said
    for word in ESTIMATORS:
        row = f"allo_scores_{word.replace('.', 'p')}"
        assert changes(row, profile) == [{"estimator": word}] * 2
        importance.check_variant(word, ())
    assert stages_of("allo_reversed", profile) == stages_of("allo", profile)[::-1]


def test_all_orders_have_as_many_updates(profile):
    for row in ("allo", *ablations.ROWS["order"]):
        assert sum(stage.epochs for stage in stages_of(row, profile)) == 2, row
    (merged,) = stages_of("allo_merged", profile)
    learn = stages_of("allo", profile)[1]
    assert (merged.objective, merged.tokens, merged.key) == ("merged", "rewriter", "policy")
    assert (merged.share, merged.key_share, merged.rate) == (
        learn.share, learn.key_share, "learning"
    )  # fmt: skip


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
        found = [stage.centre(rates) for stage in stages]
        factor = own / rates.top
        assert found == pytest.approx([rates.forgetting * factor, rates.learning * factor])
        assert all("centre" in stage.settings() for stage in stages)
    for row in ("allo", "dpo", "dpo_last10", "dpo_random10", "allo_all_neurons"):
        for stage in stages_of(row, profile):
            assert stage.centre(rates) == getattr(rates, stage.rate)
            assert "centre" not in stage.settings()


# --- figures and their rows --------------------------------------------------------------------

OWN = {
    "masks": "allo_rows", "scores": "allo_scores_magnitude", "token_rules": "allo_soft",
    "order": "allo_merged", "reward_models": "allo_rm_half", "neurons": "allo_f5_l20",
    "key_tokens": "allo_key5", "rates": "allo_rates_x4_x0p25",
}  # fmt: skip


def test_tiny_asks_for_none_of_these_figures():
    tiny = load_profile("tiny")
    rows = (*tiny.methods, *tiny.ablations)
    assert not any(ablations.asked(name, tiny, rows) for name in OWN)
    allo = [row for row in rows if row.startswith("allo_")]
    assert ablations.single_changes(rows) == allo


def test_one_own_row_is_enough_and_what_stands_beside_it_is_shown_too(profile):
    have = ["allo", "dpo", "allo_no_forgetting", "allo_all_tokens_learning", "allo_rm_oracle"]
    for name, own in OWN.items():
        assert ablations.asked(name, profile, have) == {}, name
        rows = ablations.asked(name, profile, [*have, own])
        assert own in rows and set(rows) <= set(have) | {own}
    rows = {"allo_reversed": "learning, then forgetting", "allo_no_forgetting": "learning alone"}
    assert ablations.asked("order", profile, [*have, "allo_reversed"]) == rows


def test_every_row_of_every_figure_is_a_method(profile):
    for row in sum(ablations.ROWS.values(), ()):
        assert stages_of(row, profile) and outcomes._NAME.fullmatch(row)


def test_points_of_sweeps_find_the_rows_that_have_other_names(profile):
    assert ablations.grid_cells(profile, ["allo", "allo_f5_l20", "dpo"]) == {
        (0.05, 0.2): "allo_f5_l20", (0.1, 0.1): "allo"
    }  # fmt: skip
    assert ablations.key_points(profile, ["allo_key5", "allo", "allo_all_tokens_learning"]) == {
        0.05: "allo_key5", 0.2: "allo", 1.0: "allo_all_tokens_learning"
    }  # fmt: skip
    assert ablations.rate_cells(["allo", "allo_rates_x4_x0p25"]) == {
        (1.0, 1.0): "allo", (4.0, 0.25): "allo_rates_x4_x0p25"
    }  # fmt: skip


def test_sweeps_stay_out_of_the_figure_of_single_changes():
    rows = ["allo", "dpo", "allo_soft", "allo_f5_l20", "allo_key5", "allo_key_reference",
            "allo_rates_x1_x2", "allo_rm_half", "allo_f5_l5"]  # fmt: skip
    kept = ["allo_soft", "allo_key_reference", "allo_rm_half", "allo_f5_l5"]
    assert ablations.single_changes(rows) == kept


# --- scores ------------------------------------------------------------------------------------


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
    half = tiny_study.scores(DOMAIN, "half_epoch").json()
    assert len(half["loss"]) == math.ceil(len(usual["loss"]) / 2)
    with pytest.raises(AlloError, match="scores 'family:ecqa' are not known"):
        tiny_study.scores(DOMAIN, "family:ecqa")


def test_masks_of_one_share_of_every_tensor(tiny_study):
    mask = tiny_study.mask(DOMAIN, "top", 0.1, scope="tensor")
    for name, index in mask.indices.items():
        assert index.numel() == max(1, round(0.1 * math.prod(mask.shapes[name])))
    assert mask.overlap(tiny_study.mask(DOMAIN, "top", 0.1)) < 1


# --- overlaps ----------------------------------------------------------------------------------

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


def test_random_masks_overlap_by_chance():
    even = {name: 0.1 for name in SHAPES}
    found = [
        importance.overlap("x", "a", "b", random_mask(2 * i, even), random_mask(2 * i + 1, even))
        for i in range(20)
    ]
    assert found[0].chance == pytest.approx(neurons.chance_overlap(0.1), rel=1e-3)
    assert found[0].within == pytest.approx(found[0].chance, rel=1e-3)
    assert np.mean([one.value for one in found]) == pytest.approx(found[0].chance, rel=0.03)
    assert all(one.low <= one.value <= one.high for one in found)


def test_masks_that_only_agree_on_tensors_are_at_the_second_chance():
    uneven = {"a": 0.4, "b": 0.01, "c": 0.5}
    found = [
        importance.overlap(
            "x", "a", "b", random_mask(2 * i, uneven), random_mask(2 * i + 1, uneven)
        )
        for i in range(20)
    ]
    mean = np.mean([one.value for one in found])
    assert mean == pytest.approx(found[0].within, rel=0.03) and mean > 1.5 * found[0].chance
    # By hand: of k out of n drawn twice, k^2 / n are expected in both.
    both = 4000**2 / 10000 + 200**2 / 20000 + 25**2 / 50
    assert found[0].within == pytest.approx(both / (2 * 4225 - both))


def test_a_mask_overlaps_itself_wholly():
    mask = random_mask(0, {name: 0.1 for name in SHAPES})
    one = importance.overlap("x", "a", "b", mask, mask)
    assert (one.value, one.low, one.high) == (1, 1, 1)


def test_compared_are_orders_data_tasks_warm_ups_and_estimators(tiny_study):
    rows = importance.compare(tiny_study, DOMAIN)
    labels = [one.label for one in rows]
    tasks = {"tasks: chain and scan", "tasks: chain and story", "tasks: scan and story"}
    assert tasks | {"order of the data", "sum of |gradient|"} <= set(labels)
    assert labels.count("thirds of the pairs") == 3 and not any("seed" in word for word in labels)
    for one in rows:
        assert one.chance == pytest.approx(neurons.chance_overlap(0.1), rel=1e-3)
        assert 0 <= one.low <= one.value <= one.high <= 1
    orders = rows[labels.index("order of the data")]
    masks = [tiny_study.mask(DOMAIN, "top", 0.1, v) for v in ("delta", "order")]
    assert orders.value == masks[0].overlap(masks[1])


# --- the numbers and the figures ---------------------------------------------------------------


def test_the_luck_of_the_best_of_two_is_a_known_number():
    """The larger of two standard normals is 1 / sqrt(pi) on average."""
    assert numbers.luck_of_the_best([(0.7, 0.01)]) == pytest.approx(0, abs=5e-4)
    assert numbers.luck_of_the_best([(0.7, 0.01), (0.8, 0.01)]) == pytest.approx(
        0.01 / math.sqrt(math.pi), rel=0.05
    )


def test_the_slope_is_that_of_weighted_least_squares():
    points = [("a", 0.5, 0.60, 0.01), ("b", 0.7, 0.66, 0.02), ("c", 1.0, 0.70, 0.01)]
    areas, scores, errors = np.array([p[1:] for p in points]).T
    (slope, _), covariance = np.polyfit(areas, scores, 1, w=1 / errors, cov="unscaled")
    half = 1.959964 * covariance[0, 0] ** 0.5
    found = numbers.slope_of(points)
    assert found == pytest.approx([100 * x for x in (slope, slope - half, slope + half)], rel=1e-5)
    assert all(math.isnan(x) for x in numbers.slope_of([points[0], points[0]]))


def test_effects_are_paired_differences_by_label():
    def found(method, rights):
        return {"method": method, "answers": [[i, "x", 1, right] for i, right in enumerate(rights)]}

    results = {"allo": found("allo", [1, 0] * 50), "allo_soft": found("allo_soft", [1, 1] * 50)}
    effects = numbers.effects(results, {"allo_soft": "soft"}, "allo")
    assert list(effects) == ["soft"]
    effect, low, high = effects["soft"]
    assert effect == 0.5 and 0.3 < low < 0.5 < high < 0.7


def overlap_row(label: str, value: float) -> importance.Overlap:
    return importance.Overlap(label, "a", "b", value, value - 0.01, value + 0.02, 0.053, 0.08)


CELLS = {(a, b): (0.7 + a / 50 + b / 20, 0.01) for a, b in product((0.01, 0.1, 1.0), repeat=2)}
CROSS = {place: (0.7, 0.01) for place in GRID if 0.1 in place}
REGION = {
    (a, b): (0.02 - 0.03 * abs(math.log(a * b)), -0.01, 0.03)
    for a, b in product((0.25, 1.0, 4.0), repeat=2)
}


def without(cells: dict, place) -> dict:
    return {key: value for key, value in cells.items() if key != place}


FIGURES = {
    "grid": lambda: drawing.neuron_shares(CELLS, 0.1, "mini"),
    "grid with a hole": lambda: drawing.neuron_shares(without(CELLS, (1.0, 0.01)), 0.1),
    "cross": lambda: drawing.neuron_shares(CROSS, 0.1),
    "one stage": lambda: drawing.neuron_shares({(0.1, b): CELLS[0.1, b] for b in (0.1, 1.0)}, 0.1),
    "region": lambda: drawing.rate_region(REGION, "DPO", "mini"),
    "region with a hole": lambda: drawing.rate_region(without(REGION, (4.0, 4.0)), "DPO"),
    "region of one row": lambda: drawing.rate_region({(1.0, b): REGION[1.0, b] for b in (1.0, 4.0)},
                                                     "DPO"),
    "quality": lambda: drawing.reward_quality([("trained", 0.9, 0.7, 0.01), ("oracle", 1.0, 0.72,
                                              0.01)], {"learning alone": 0.69}),
    "overlaps": lambda: drawing.overlap_dots([overlap_row("orders", 0.3), overlap_row("third", 0.1),
                                              overlap_row("third", 0.12)], "mini"),
}  # fmt: skip


def texts(figure) -> str:
    figure.canvas.draw()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_also_with_missing_rows_and_can_be_read(name):
    figure = FIGURES[name]()
    shown = texts(figure)
    assert ("not run" in shown) == ("hole" in name)
    assert "95%" in shown
    for text in figure.findobj(Text):
        assert text.get_fontsize() >= 9 or not text.get_text(), text.get_text()


def test_figures_say_what_they_were_given():
    assert "70.7\n±2.0" in texts(FIGURES["grid"]())
    region = FIGURES["region"]()
    assert "ALLO minus DPO" in texts(region) and "+2.0\n[-1.0, +3.0]" in texts(region)
    assert region.axes[0].collections, "no line where the difference is zero"
    lines = FIGURES["cross"]().axes[0].get_legend_handles_labels()[1]
    assert lines == ["forgetting trains it", "learning trains it"]
    assert "chance within each tensor" in texts(FIGURES["overlaps"]())
    assert "oracle (1.00)" in texts(FIGURES["quality"]())
