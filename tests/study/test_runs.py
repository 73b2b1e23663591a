"""Which methods a domain has, and how their rates are tuned on models that are not reported."""

import csv
import math
import pickle
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import yaml
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib.errors import AlloError
from allo_lib.profiles import profile_files
from allo_lib.profiles.methods import stages_of
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import arms, runs


@pytest.mark.parametrize("change, expected", [
    ({}, ["sft_base", "dpo", "rft", "allo_rm_oracle"]),
    ({"domains__miniature__kind": "choice"}, ["sft_base", "dpo", "rft"]),
    ({"domains__miniature__kind": "preferences"}, ["dpo"]),
    ({"domains__miniature__methods": ["npo"]}, ["sft_base", "npo"]),
])  # fmt: skip
def test_methods_of_a_domain_come_once_and_in_order(tmp_path, change, expected):
    wanted = {"methods": ["dpo", "rft"], "ablations": ["dpo", "allo_rm_oracle"]}
    assert runs.methods_of(open_study(tmp_path, **wanted, **change), DOMAIN) == expected


def test_a_worker_opens_the_study_that_it_was_told_of_and_keeps_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_STUDY", {})
    study = open_study(tmp_path, seed=3)
    # Everything that goes to a worker goes there as bytes.
    work, opened_by = pickle.loads(pickle.dumps((_seen, runs._opened_by(study))))
    first, again = (runs._in_worker(work, opened_by, "a") for _ in range(2))
    assert first[0] is again[0] and first[1] == "a" and first[0].profile == study.profile
    assert (first[0].seed, first[0].results_dir) == (3, tmp_path)
    other, _ = runs._in_worker(_seen, runs._opened_by(open_study(tmp_path, seed=4)), "a")
    assert other.seed == 4 and list(runs._STUDY.values()) == [other]
    pickle.dumps(partial(runs._in_worker, arms.score_at))


def _seen(study, word):
    return study, word


# --- tuned rates ---------------------------------------------------------------------------------


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


@pytest.mark.slow
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


# Where the planted mean over the models is highest, in powers of two of the initial rates; npo's
# rises for ever.
TOPS = {"dpo": (1, -1), "allo": (1, 1), "npo": (99, 99)}


def test_tuning_finds_the_best_mean_of_its_models_and_keeps_the_evidence(tmp_path, monkeypatch):
    methods = ["sft", "dpo", "npo", "allo", "dpo_long"]
    wanted = {"methods": methods, "ablations": ["allo_key10"], "search.candidates": 5}
    profile = load_profile(str(PROFILE), wanted)

    def score_at(study, name, method, rates):
        initial = arms.centre(study, name, stages_of(method, profile), knob=True)
        powers = [math.log2(rate / start) for rate, start in zip(rates, initial, strict=True)]
        tops = TOPS.get(method, (0, 0))
        score = -sum((p - top) ** 2 for p, top in zip(powers, tops, strict=False))
        return score + {7: 0.5, 8: -0.5}[study.seed] * powers[0]  # the models disagree

    shared = []
    monkeypatch.setattr(runs, "prepare_all", shared.extend)
    monkeypatch.setattr(arms, "score_at", score_at)
    here = SimpleNamespace(map=lambda work, *rows: list(map(work, *rows)))
    monkeypatch.setattr(runs, "_pool", lambda workers: nullcontext(here))
    path = runs.tune(profile, (7, 8), tmp_path, None)
    assert [(study.seed, name) for study, name in shared] == [(7, DOMAIN), (8, DOMAIN)]
    rows = list(csv.DictReader((tmp_path / "tuning.csv").open(newline="")))
    assert {row["model"] for row in rows} == {"7", "8"}
    text, found = path.read_text(), yaml.safe_load(path.read_text())[DOMAIN]
    assert text.startswith("# By `./run_all.sh tune` on seeds 7, 8")
    # ALLO's rows of other densities take ALLO's rates, and SFT's own row has no knob.
    counts = {method: len(rates) for method, rates in found.items()}
    assert counts == {"sft": 1, "dpo": 2, "npo": 2, "allo": 2, "dpo_long": 2}
    study = open_study(tmp_path / "other")
    for method, rates in found.items():
        initial = arms.centre(study, DOMAIN, stages_of(method, profile), knob=True)
        powers = [round(math.log2(r / i), 3) for r, i in zip(rates, initial, strict=True)]
        line = next(one for one in text.splitlines() if one.startswith(f"  {method}:"))
        assert line.endswith("# at the edge of what was tried") == (method == "npo")
        if method != "npo":
            assert powers == pytest.approx(TOPS.get(method, (0, 0))[: len(powers)], abs=0.51)
        own = [row for row in rows if row["method"] == method]
        scores: dict[str, list[float]] = {}
        for row in own:
            scores.setdefault(row["rates"], []).append(float(row["score"]))
        assert {len(values) for values in scores.values()} == {2} and 4 <= len(scores) <= 20
        best = scores[" ".join(f"{rate:g}" for rate in rates)]
        assert sum(best) == pytest.approx(max(map(sum, scores.values())))
