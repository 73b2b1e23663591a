"""Rows of the ablations: names, stages and figures; overlaps of masks beside chance."""

import math

import numpy as np
import pytest
import torch
from tiny_study import DOMAIN

from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes, published
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.methods import (
    Stage,
    stages_of,
    tuned_as,
)
from allo_lib.profiles.profile_files import load_profile
from allo_lib.report import method_figures as drawing
from allo_lib.study import importance

# --- names and stages ----------------------------------------------------------------------------


def changes(method, profile) -> list[dict]:
    """What each stage of a row has that ALLO's has not."""
    pairs = zip(stages_of("allo", profile), stages_of(method, profile), strict=True)
    return [
        {key: getattr(b, key) for key in vars(a) if getattr(a, key) != getattr(b, key)}
        for a, b in pairs
    ]


def test_rows_of_one_change_take_the_rates_of_allo():
    tuned = ["allo_rm_early", "allo_key10", "allo_f5_l5", "allo_scores_gradient", "allo_official"]
    assert {tuned_as(row) for row in tuned} == {"allo"}
    own = ["allo_rows", "allo_no_forgetting", "allo_all_tokens_learning", "dpo_top10"]
    assert [tuned_as(row) for row in own] == own and tuned_as("dpo_paper") == "dpo"


def test_each_row_changes_what_it_says(profile):
    said = {
        "allo_last_neurons": [{"neurons": "bottom"}] * 2,
        "allo_random_neurons": [{"neurons": "random"}] * 2,
        "allo_all_neurons": [{"neurons": "all", "rate": "dense"}] * 2,
        "allo_all_tokens_forgetting": [{"tokens": "all"}, {}],
        "allo_all_tokens_learning": [{}, {"key_share": 1.0}],
        "allo_random_tokens": [{"tokens": "random"}, {"key": "random"}],
        "allo_oracle_tokens": [{"tokens": "oracle"}, {"key": "oracle"}],
        "allo_soft": [{"rule": "soft"}, {}],
        "allo_rm_shuffled": [{"reward_model": "shuffled"}, {}],
        "allo_rm_oracle": [{"tokens": "oracle"}, {}],
        "allo_rm_inverted": [{"tokens": "kept"}, {}],
        "allo_all_wrong": [{"pairs": "wrong"}, {}],
        "allo_rows": [{"granularity": "row"}] * 2,
        "allo_per_tensor": [{"scope": "tensor"}] * 2,
        "allo_f5_l5": [{"share": 0.05}] * 2,
        "allo_key10": [{}, {"key_share": 0.1}],
        "allo_scores_gradient": [{"estimator": "gradient"}] * 2,
        "allo_rm_early": [{"reward_model": "early"}, {}],
        "allo_official": [{"pairs": "wrong", "share": 0.05}, {"share": 0.05, "key_share": 0.1}],
    }
    assert {row: changes(row, profile) for row in said} == said
    assert stages_of("allo_reversed", profile) == stages_of("allo", profile)[::-1]
    for row in filter(lambda name: name.startswith("allo"), published.NAMES):
        assert stages_of(row, profile) and outcomes._NAME.fullmatch(row)


def test_the_store_tells_masks_of_tensors_apart():
    assert Stage("dpo", "top", neurons="top", scope="tensor").settings()["scope"] == "tensor"


def test_searches_of_random_and_last_neurons_begin_as_much_higher_as_those_of_dpo(profile):
    rates = load_profile("tiny").domains[DOMAIN].rates
    for row, own in (("allo_random_neurons", rates.random), ("allo_last_neurons", rates.last)):
        stages = stages_of(row, profile)
        factor = own / rates.top
        assert [stage.initial_rate(rates) for stage in stages] == pytest.approx(
            [rates.forgetting * factor, rates.learning * factor]
        )
        assert all("wider" in stage.settings() for stage in stages)
    for row in ("allo", "dpo", "dpo_last10", "dpo_random10", "allo_all_neurons"):
        for stage in stages_of(row, profile):
            assert stage.initial_rate(rates) == getattr(rates, stage.rate)
            assert "wider" not in stage.settings()


# --- scores and overlaps -------------------------------------------------------------------------


def test_scores_of_variants_see_their_pairs_and_masks_their_scope(tiny_study):
    usual, first = (tiny_study.scores(DOMAIN, variant).json() for variant in ("delta", "half_a"))
    assert first["pairs"] == usual["pairs"] // 2 and first["lr"] == usual["lr"]
    with pytest.raises(AlloError, match="scores 'lr_x3' are not known; expected one of delta"):
        tiny_study.scores(DOMAIN, "lr_x3")
    mask = tiny_study.mask(DOMAIN, "top", 0.1, scope="tensor")
    for name, index in mask.indices.items():
        assert index.numel() == max(1, round(0.1 * math.prod(mask.shapes[name])))


def test_masks_at_random_places_overlap_by_the_chance_within_tensors():
    kept, shapes = {"a": 4000, "b": 200}, {"a": (100, 100), "b": (200, 100)}

    def at_random() -> NeuronMask:
        places = {n: torch.randperm(math.prod(shape))[: kept[n]] for n, shape in shapes.items()}
        return NeuronMask({name: index.sort().values for name, index in places.items()}, shapes)

    torch.manual_seed(0)
    pairs = [(at_random(), at_random()) for _ in range(20)]
    found = np.mean([one.overlap(other) for one, other in pairs])
    assert found == pytest.approx(importance.chance_within(*pairs[0]), rel=0.02)


# --- the numbers and the figures of 05 -----------------------------------------------------------


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
