"""Rates are found on models of their own, an interior optimum of the mean score, and used as is."""

import csv
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib.cli import cli
from allo_lib.errors import AlloError
from allo_lib.profiles import profile_files
from allo_lib.profiles.methods import stages_of
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import arms, tuning


def search(centre, factor, budget, score, knob=False):
    """Runs `proposals` on a function of the rates."""
    going = tuning.proposals(centre, factor, budget, knob)
    wanted = next(going)
    while True:
        try:
            wanted = going.send({rates: score(rates) for rates in wanted})
        except StopIteration as end:
            return end.value


def hill(*top):
    """Highest where each rate, on the log scale, is at `top`."""
    return lambda rates: -sum(
        (math.log2(r) - t) ** 2 for r, t in zip(rates, top, strict=True)
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3), st.integers(5, 12))
def test_one_rate_is_found_within_half_a_step_of_the_top(top, budget):
    found = search((1.0,), 2.0, budget, hill(top))
    assert found.interior and len(found.scores) <= 2 * budget
    assert abs(math.log2(found.rates[0]) - top) <= 0.5 + 1e-3
    assert found.scores[found.rates] == max(found.scores.values())
    assert len(found.scores) >= budget - 1


@settings(max_examples=100, deadline=None)
@given(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_two_rates_are_found_together_and_against_each_other(common, apart):
    found = search((1.0, 1.0), 2.0, 12, hill(common + apart, common))
    assert found.interior and len(found.scores) <= 24
    first, second = map(math.log2, found.rates)
    assert abs(second - common) <= 1 and abs((first - second) - apart) <= 1.5


@settings(max_examples=100, deadline=None)
@given(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_a_rate_and_a_knob_are_found_each_by_itself(rate, beta):
    found = search((1e-3, 0.1), 2.0, 12, lambda at: hill(rate, beta)((at[0] / 1e-3, at[1] / 0.1)),
                   knob=True)  # fmt: skip
    assert found.interior and len(found.scores) <= 24
    assert abs(math.log2(found.rates[0] / 1e-3) - rate) <= 1
    assert abs(math.log2(found.rates[1] / 0.1) - beta) <= 1


def test_what_still_rises_at_the_end_is_told_to_be_at_the_edge():
    found = search((1.0,), 2.0, 4, lambda rates: rates[0])
    assert not found.interior and found.rates[0] == max(r for (r,) in found.scores)
    assert len(found.scores) <= 8


def test_of_equal_scores_the_smallest_rates_win():
    assert search((1.0,), 2.0, 3, lambda rates: 0.5).rates[0] <= 0.5


@pytest.mark.parametrize("centre, budget, factor", [((1.0,), 2, 2.0), ((1.0, 1.0), 4, 2.0),
                                                    ((1.0,), 5, 1.0)])  # fmt: skip
def test_a_budget_that_surrounds_nothing_is_refused(centre, budget, factor):
    with pytest.raises(AlloError, match="cannot surround"):
        next(tuning.proposals(centre, factor, budget))


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """The seconds-long study with a file of rates."""
    rates = tmp_path / "rates"
    rates.mkdir()
    monkeypatch.setattr(profile_files, "RATES", rates)
    (rates / "some.yaml").write_text(
        f"{DOMAIN}:\n  dpo: [3.0e-4, 0.5]\n  allo: [1.0e-4, 2.0e-4]\n  sft: [1.0e-4, 0.1]\n"
    )
    return {"domains.miniature.tuned": "some"}


def test_a_profile_takes_rates_by_the_name_of_their_file(tuned):
    profile = load_profile(str(PROFILE), tuned)
    assert profile.domains[DOMAIN].tuned["dpo"] == (3e-4, 0.5)
    assert profile.domains[DOMAIN].tuned["allo"] == (1e-4, 2e-4)
    assert profile.hash() != load_profile(str(PROFILE)).hash()
    with pytest.raises(AlloError, match="tuned: got 'other', expected one of some"):
        load_profile(str(PROFILE), {"domains.miniature.tuned": "other"})


def test_tuned_rates_are_used_without_a_search_and_missing_ones_refused(tuned, begun):
    study = open_study(begun, **{key.replace(".", "__"): value for key, value in tuned.items()})
    found = arms.result(study, DOMAIN, "dpo")
    assert found["rates"] == [3e-4] and len(found["tried"]) == 1
    assert found["knob"] == {"beta": 0.5}
    assert arms.result(study, DOMAIN, "dpo_paper")["knob"] == {"beta": 0.5}
    assert arms.result(study, DOMAIN, "allo_key10")["rates"] == [1e-4, 2e-4]  # ALLO's own
    stages = stages_of("dpo_long", study.profile)  # whose last step sees what the first ones did
    plain = arms._candidate(study, DOMAIN, stages, (3e-4,)).json()
    scaled = arms._candidate(study, DOMAIN, stages, (3e-4, 0.5)).json()
    assert plain["loss"][0][0] == pytest.approx(scaled["loss"][0][0]) == pytest.approx(math.log(2))
    assert plain["loss"][0][-1] != scaled["loss"][0][-1]
    assert arms.trained_model(study, DOMAIN, "dpo")[1].json()["loss"] == found["loss"]
    assert arms.result(study, DOMAIN, "sft_base")["rates"] == []
    with pytest.raises(AlloError, match="sft: `tuned` has 2 rates for its 1 stages"):
        arms.result(study, DOMAIN, "sft")
    with pytest.raises(AlloError, match="npo: `tuned` has 0 rates for its 1 stages"):
        arms.result(study, DOMAIN, "npo")


def test_a_score_leaves_no_weights_and_can_be_asked_for_again(tiny_study):
    stages, rates = stages_of("dpo_top10", tiny_study.profile), (1.7e-4,)
    first = arms.score_at(tiny_study, DOMAIN, "dpo_top10", rates)
    artifact = arms._candidate(tiny_study, DOMAIN, stages, rates)
    assert not (artifact.path / arms.WEIGHTS).exists()
    assert arms.score_at(tiny_study, DOMAIN, "dpo_top10", rates) == first


@pytest.mark.slow
def test_tuning_two_models_writes_rates_and_their_evidence(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    changes = {"methods": "[dpo, allo]", "ablations": "[]", "search.candidates": "5"}
    given = [part for item in changes.items() for part in ("-p", *item)]
    assert cli.main(["tune", str(PROFILE), "--seeds", "7,8", *given]) == 0
    folder = tmp_path / "results" / "seconds-tuning"
    rates = yaml.safe_load((folder / "tuned.yaml").read_text())[DOMAIN]
    assert {method: len(found) for method, found in rates.items()} == {"dpo": 2, "allo": 2}
    rows = list(csv.DictReader((folder / "tuning.csv").open(newline="")))
    assert {row["model"] for row in rows} == {"7", "8"}
    for method, found in rates.items():
        own = [row for row in rows if row["method"] == method]
        scores: dict[str, list[float]] = {}
        for row in own:
            scores.setdefault(row["rates"], []).append(float(row["score"]))
        assert {len(values) for values in scores.values()} == {2} and 5 <= len(scores) <= 10
        best = " ".join(f"{rate:g}" for rate in found)
        assert sum(scores[best]) == max(map(sum, scores.values()))
