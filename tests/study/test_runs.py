"""Which methods a domain has, in which order they run, and how their rates are found."""

import csv
import dataclasses
import gc
import math
import pickle
import weakref

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib.errors import AlloError
from allo_lib.profiles import profile_files
from allo_lib.profiles.methods import stages_of
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import runs, training
from allo_lib.study.search import Trial, best, proposals, search
from allo_lib.study.study import Study


@pytest.mark.parametrize("change, expected", [
    ({}, ["sft_base", "dpo", "rft", "ppo", "allo_rm_oracle"]),
    ({"domains__miniature__kind": "questions"}, ["sft_base", "dpo", "rft", "ppo"]),
    ({"domains__miniature__kind": "preferences"}, ["dpo"]),
    ({"domains__miniature__methods": ["npo"]}, ["sft_base", "npo"]),
])  # fmt: skip
def test_methods_of_a_domain_come_once_and_in_order(tmp_path, change, expected):
    wanted = {"methods": ["dpo", "rft", "ppo"], "ablations": ["dpo", "allo_rm_oracle"]}
    assert runs.methods_of(open_study(tmp_path, **wanted, **change), DOMAIN) == expected


def test_a_domain_may_have_fewer_models_than_the_profile_and_rows_of_its_first_alone(tmp_path):
    wanted = {"methods": ["dpo", "rft"], "ablations": [], "domains__miniature__models": 2}
    wanted |= {"domains__miniature__one_model": ["rft"], "first_seed": 4}
    studies = [open_study(tmp_path, seed, **wanted) for seed in range(3, 7)]
    methods = [[], ["sft_base", "dpo", "rft"], ["sft_base", "dpo"], []]
    assert [runs.methods_of(study, DOMAIN) for study in studies] == methods
    assert [runs.domains_of(study) for study in studies] == [[], [DOMAIN], [DOMAIN], []]
    assert runs.chosen_domain(studies[1]) == runs.chosen_domain(studies[2], DOMAIN) == DOMAIN
    with pytest.raises(AlloError, match="^seed 3 has no SFT model for any domain .*another seed$"):
        runs.chosen_domain(studies[0])
    with pytest.raises(AlloError, match=f"^seed 6 has no SFT model for {DOMAIN} .*another seed$"):
        runs.chosen_domain(studies[3], DOMAIN)
    with pytest.raises(AlloError, match="nowhere"):
        runs.chosen_domain(studies[1], "nowhere")


# The paper's rows take the rates of DPO and further replicates, where not every run searches, those
# of the first.
SEARCHED = {("npo", 1): ("npo", 0), ("npo", 0): None,
            ("dpo_paper", 1): ("dpo_paper", 0), ("dpo_paper", 0): ("dpo", 0)}  # fmt: skip
EACH = {("npo", 1): None, ("npo", 0): None, ("dpo_paper", 1): ("dpo", 1)}


@pytest.mark.parametrize("tuned, per_run, expected", [
    ({}, False, SEARCHED),
    ({"dpo": (1e-4,)}, False, dict.fromkeys(SEARCHED)),
    ({}, True, EACH),
    ({"dpo": (1e-4,)}, True, EACH),
])  # fmt: skip
def test_runs_wait_for_those_whose_rates_they_take(tmp_path, tuned, per_run, expected):
    study = open_study(tmp_path, replicates={"pair_sets": 2}, search__per_run=per_run)
    domain = dataclasses.replace(study.domain(DOMAIN), tuned=tuned)
    study.domain = study.at(1).domain = lambda name: domain
    for (method, replicate), expects in expected.items():
        before = training.run_before(study.at(replicate), DOMAIN, method)
        assert (before and (before[2], before[0].replicate)) == expects, method


def test_a_worker_opens_the_study_of_its_job_and_keeps_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_STUDY", {})
    study = open_study(tmp_path, seed=3)
    # Everything that goes to a worker goes there as bytes.
    opened_by = study.profile, 3, tmp_path, None
    job = pickle.loads(pickle.dumps((_seen, opened_by, 1, "a")))
    first, again = (runs._in_worker(*job) for _ in range(2))
    assert first[0] is again[0] and first[1] == "a" and first[0].profile == study.profile
    assert (first[0].seed, first[0].replicate, first[0].results_dir) == (3, 1, tmp_path)
    other, _ = runs._in_worker(_seen, (study.profile, 4, tmp_path, None), 0, "a")
    assert other.seed == 4 and list(runs._STUDY.values()) == [other]


def _seen(study, word):
    return study, word


# --- the search on a reported model --------------------------------------------------------------


def peak(*where):
    """A score with its one peak at these rates."""
    return lambda rates: -sum(math.log2(r / w) ** 2 for r, w in zip(rates, where, strict=True))


@pytest.mark.parametrize("initial, top, candidates, expected", [
    # one rate: the initial one and one factor to both sides, then beyond an edge or into both gaps
    ((1e-4,), (1e-4,), 2, [(1e-4,), (5e-5,)]),
    ((1e-4,), (1e-4,), 3, [(1e-4,), (5e-5,), (2e-4,)]),
    ((1.0,), (100.0,), 6, [(1.0,), (0.5,), (2.0,), (4.0,), (8.0,), (16.0,)]),
    ((1.0,), (0.01,), 5, [(1.0,), (0.5,), (2.0,), (0.25,), (0.125,)]),
    ((1.0,), (1.0,), 5, [(1.0,), (0.5,), (2.0,), (0.7071,), (1.414,)]),
    # two rates: their common size, then the first one's against the second's
    ((1e-4, 1e-3), (1e-4, 1e-3), 5,
     [(1e-4, 1e-3), (5e-5, 5e-4), (2e-4, 2e-3), (5e-5, 1e-3), (2e-4, 1e-3)]),
    ((1e-4, 1e-3), (1e-3, 1e-2), 6, [(1e-4, 1e-3), (5e-5, 5e-4), (2e-4, 2e-3), (5e-5, 1e-3),
                                     (2e-4, 1e-3), (4e-4, 4e-3)]),
    ((1 / 3,), (1 / 3,), 1, [(0.3333,)]),  # rounded before they are used
    ((), (), 5, [()]),
])  # fmt: skip
def test_the_rates_that_are_tried(initial, top, candidates, expected):
    tried = search(initial, candidates, 2.0, peak(*top))
    assert [trial.rates for trial in tried] == expected


def test_a_few_candidates_around_a_rate_and_a_knob_leave_the_knob_alone():
    tried = search((1e-4, 0.1), 5, 2.0, peak(1e-4, 0.1), knob=True)
    first = [(1e-4, 0.1), (5e-5, 0.1), (2e-4, 0.1)]
    assert [trial.rates for trial in tried] == [*first, (1e-4, 0.05), (1e-4, 0.2)]


def test_equal_scores_take_the_smaller_rates():
    tried = [Trial((2.0, 1.0), 0.5), Trial((1.0, 3.0), 0.5), Trial((1.0, 2.0), 0.5)]
    assert best(tried) == tried[2] and best(tried + [Trial((9.0, 9.0), 0.6)]).rates == (9.0, 9.0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=2),
    st.integers(1, 12),
    st.sampled_from([1.5, 2.0, 4.0]),
)
def test_any_peak_gets_the_requested_number_of_distinct_models(where, candidates, factor):
    score = peak(*(2**w for w in where))
    tried = search((1.0,) * len(where), candidates, factor, score)
    assert len(tried) == candidates == len({trial.rates for trial in tried})
    assert best(tried).score == max(score(trial.rates) for trial in tried)
    if len(where) == 1 and candidates == 12 and abs(where[0]) < 4:
        assert abs(math.log2(best(tried).rates[0]) - where[0]) <= math.log2(factor) / 2 + 1e-3


# --- to an interior optimum ----------------------------------------------------------------------


def propose(initial, factor, budget, score, knob=False):
    """Runs `proposals` on a function of the rates."""
    going = proposals(initial, factor, budget, knob)
    wanted = next(going)
    while True:
        try:
            wanted = going.send({rates: score(rates) for rates in wanted})
        except StopIteration as end:
            return end.value


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3), st.integers(5, 12))
def test_one_rate_is_found_within_half_a_step_of_the_top(top, budget):
    found = propose((1.0,), 2.0, budget, peak(2**top))
    assert found.interior and budget - 1 <= len(found.scores) <= 2 * budget
    assert abs(math.log2(found.rates[0]) - top) <= 0.5 + 1e-3
    assert found.scores[found.rates] == max(found.scores.values())


@settings(max_examples=50, deadline=None)
@given(st.booleans(), st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_two_rates_or_a_rate_and_a_knob_are_found(knob, one, other):
    top = (one, other) if knob else (one + other, one)
    found = propose((1.0, 1.0), 2.0, 12, peak(*(2**power for power in top)), knob)
    first, second = map(math.log2, found.rates)
    directions = (first, second) if knob else (second, first - second)
    assert found.interior and len(found.scores) <= 24
    assert abs(directions[0] - one) <= 1 and abs(directions[1] - other) <= (1 if knob else 1.5)


@pytest.mark.parametrize("knob", [True, False])
@pytest.mark.parametrize("top", [-1.2, 0.1, 2.0])
def test_a_small_budget_searches_the_rate_alone_or_the_common_size_of_two(knob, top):
    found = propose((1.0, 0.1), 2.0, 3, lambda rates: -abs(math.log2(rates[0]) - top), knob)
    assert found.interior and abs(math.log2(found.rates[0]) - top) <= 0.5
    for first, second in found.scores:
        assert second == (0.1 if knob else pytest.approx(0.1 * first, rel=1e-3))


def test_what_still_rises_at_the_end_is_at_the_edge_and_of_equal_scores_the_smallest_rates_win():
    found = propose((1.0,), 2.0, 4, lambda rates: rates[0])
    assert not found.interior and found.rates[0] == max(r for (r,) in found.scores)
    assert len(found.scores) <= 16
    assert propose((1.0,), 2.0, 3, lambda rates: 0.5).rates[0] <= 0.5


@pytest.mark.parametrize("search_it", [
    lambda: next(proposals((1.0,), 2.0, 2)), lambda: next(proposals((1.0, 1.0), 1.0, 5)),
    lambda: search((1.0,), 3, 1.0, peak(1.0)),
])  # fmt: skip
def test_searches_that_cannot_search_are_refused(search_it):
    with pytest.raises(AlloError, match="search.candidates"):
        search_it()


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
    assert profile.hash() != load_profile(str(PROFILE)).hash()
    with pytest.raises(AlloError, match="tuned: got 'other', expected one of some"):
        load_profile(str(PROFILE), {"domains.miniature.tuned": "other"})


@pytest.mark.slow
def test_tuned_rates_are_used_without_a_search_and_missing_ones_refused(tuned, begun):
    study = open_study(begun, **{key.replace(".", "__"): value for key, value in tuned.items()})
    found = training.result(study, DOMAIN, "dpo")
    assert found["rates"] == [3e-4] and len(found["tried"]) == 1
    assert found["knob"] == {"beta": 0.5}
    assert training.result(study, DOMAIN, "dpo_paper")["knob"] == {"beta": 0.5}
    assert training.result(study, DOMAIN, "allo_key10")["rates"] == [1e-4, 2e-4]  # ALLO's own
    stages = stages_of("dpo_long", study.profile)  # whose last step sees what the first ones did
    plain = training._candidate(study, DOMAIN, stages, (3e-4,)).json()
    scaled = training._candidate(study, DOMAIN, stages, (3e-4, 0.5)).json()
    assert plain["loss"][0][0] == pytest.approx(scaled["loss"][0][0]) == pytest.approx(math.log(2))
    assert plain["loss"][0][-1] != scaled["loss"][0][-1]
    assert training.trained_model(study, DOMAIN, "dpo")[1].json()["loss"] == found["loss"]
    assert training.result(study, DOMAIN, "sft_base")["rates"] == []
    for method, count in {"sft": 2, "npo": 0}.items():
        with pytest.raises(AlloError, match=f"`tuned` has {count} rates for its 1 stages"):
            training.result(study, DOMAIN, method)


@pytest.mark.slow
def test_rates_tuned_on_other_models_are_where_the_search_of_every_run_begins(tuned, begun):
    settings = {key.replace(".", "__"): value for key, value in tuned.items()}
    settings |= {"search__per_run": True, "search__candidates": 3, "replicates": {"orders": 2}}
    study = open_study(begun, **settings)
    first, second = (training.result(study.at(i), DOMAIN, "dpo") for i in (0, 1))
    for found in (first, second):
        assert [one["rates"] for one in found["tried"]] == [[3e-4, 0.5], [1.5e-4, 0.5], [6e-4, 0.5]]
        assert found["dev"] == max(one["dev"] for one in found["tried"])
        assert found["knob"] == {"beta": 0.5}
    assert first["margins"] != second["margins"]  # in another order
    of_paper = training.result(study.at(1), DOMAIN, "dpo_paper")
    assert of_paper["rates"] == second["rates"] and len(of_paper["tried"]) == 1
    key10 = training.result(study, DOMAIN, "allo_key10")["tried"]  # around ALLO's
    assert [one["rates"] for one in key10] == [[1e-4, 2e-4], [5e-5, 1e-4], [2e-4, 4e-4]]
    several, problems = runs.tried(study, DOMAIN, {"dpo": first})
    assert several == {"dpo": first["tried"]} and problems == study.domain(DOMAIN).dev


def test_what_is_missing_is_found_without_making_anything_in_this_process(tmp_path, monkeypatch):
    """Two seeds' SFT models are made side by side, in workers."""
    shared, trained = [], []
    monkeypatch.setattr(Study, "_make_sft", None)
    monkeypatch.setattr(runs, "prepare_all", shared.extend)
    monkeypatch.setattr(runs, "side_by_side", lambda work, jobs, title: trained.extend(jobs))
    studies = [open_study(tmp_path, seed) for seed in (0, 1)]
    runs.fill((study, DOMAIN, "dpo_paper") for study in studies)
    assert [study.seed for study, _ in shared] == [0, 0, 1, 1]
    assert [(study.seed, method) for study, _, method in trained] == [
        (seed, method) for seed in (0, 1) for method in ("dpo_paper", "dpo")]  # fmt: skip


def test_a_worker_that_opens_another_study_keeps_nothing_of_the_last_one(tmp_path):
    """Of a study with its model in memory, which what is remembered of its tasks points to."""
    seen = []

    def work(study, name):
        assert study.task(name) is study.task(name)
        seen.append(weakref.ref(study))

    for seed in (0, 1):
        profile = open_study(tmp_path, seed).profile
        runs._in_worker(work, (profile, seed, tmp_path, None), 0, DOMAIN)
    gc.collect()
    assert [one() is None for one in seen] == [True, False]
    runs._STUDY.clear()


# Where the planted mean over the models is highest, in powers of two of the initial rates; npo's
# rises for ever.
TOPS = {"dpo": (1, -1), "allo": (1, 1), "npo": (99, 99)}


def test_tuning_finds_the_best_mean_of_its_models_and_keeps_the_evidence(tmp_path, monkeypatch):
    methods = ["sft", "dpo", "npo", "allo", "dpo_long"]
    wanted = {"methods": methods, "ablations": ["allo_key10"], "search.candidates": 5}
    # What is reported of few models is tuned on others all the same.
    wanted |= {f"domains.{DOMAIN}.models": 2, f"domains.{DOMAIN}.one_model": ["npo"]}
    profile = load_profile(str(PROFILE), wanted)

    def powers_of(study, method, rates):
        initial = training.initial_rates(study, DOMAIN, stages_of(method, profile), knob=True)
        return [math.log2(rate / start) for rate, start in zip(rates, initial, strict=True)]

    def score_at(study, name, method, rates):
        powers, tops = powers_of(study, method, rates), TOPS.get(method, (0, 0))
        score = -sum((p - top) ** 2 for p, top in zip(powers, tops, strict=False))
        return score + {7: 0.5, 8: -0.5}[study.seed] * powers[0]  # the models disagree

    shared = []
    monkeypatch.setattr(runs, "prepare_all", shared.extend)
    monkeypatch.setattr(training, "score_at", score_at)
    path = runs.tune(profile, (7, 8), tmp_path, None)
    # Nothing is measured, so that no test problem is answered.
    assert [(one.seed, *rest) for one, *rest in shared] == [(s, DOMAIN, ("dev",)) for s in (7, 8)]
    rows = list(csv.DictReader((tmp_path / "tuning.csv").open(newline="")))
    assert {row["model"] for row in rows} == {"7", "8"}
    text, found = path.read_text(), yaml.safe_load(path.read_text())[DOMAIN]
    assert text.startswith("# By `./run_all.sh tune` on seeds 7, 8")
    assert f"# At the edge of what was tried: npo of {DOMAIN}.\n" in text
    # ALLO's rows of other densities take ALLO's rates, and SFT's own row has no knob.
    counts = {method: len(rates) for method, rates in found.items()}
    assert counts == {"sft": 1, "dpo": 2, "npo": 2, "allo": 2, "dpo_long": 2}
    study = open_study(tmp_path / "other")
    for method, rates in found.items():
        powers = powers_of(study, method, rates)
        if method != "npo":
            assert powers == pytest.approx(TOPS.get(method, (0, 0))[: len(powers)], abs=0.51)
        scores: dict[str, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                scores.setdefault(row["rates"], []).append(float(row["score"]))
        assert {len(values) for values in scores.values()} == {2} and 4 <= len(scores) <= 20
        best_mean = sum(scores[" ".join(f"{rate:g}" for rate in rates)])
        assert best_mean == pytest.approx(max(map(sum, scores.values())))


def test_what_is_behind_tuned_rates_is_the_mean_over_the_tuning_models(tmp_path):
    profile = load_profile("tiny", {"domains.miniature.tuned": "tiny-full"})
    study = Study(profile, 0, tmp_path)
    found, problems = runs.tried(study, DOMAIN, dict.fromkeys(["dpo_long", "allo", "dpo_paper"]))
    with (ROOT / "results" / "tuning" / "tiny-full.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "dpo_long"]
    scores: dict[float, list[float]] = {}
    for rates in {row["rates"] for row in rows}:
        own = [float(row["score"]) for row in rows if row["rates"] == rates]
        assert len(own) == 4
        scores.setdefault(float(rates.split()[0]), []).append(sum(own) / 4)
    assert [one["rates"] for one in found["dpo_long"]] == [[rate] for rate in sorted(scores)]
    for one in found["dpo_long"]:
        assert one["dev"] == pytest.approx(max(scores[one["rates"][0]]))
    assert problems == 4 * 501 and list(found) == ["dpo_long", "allo", "dpo_paper"]
    best_rate = max(found["allo"], key=lambda one: one["dev"])["rates"][0]
    assert best_rate == study.domain(DOMAIN).tuned["allo"][0]


@pytest.mark.parametrize("tuning", ["", "of somebody without the scores"])
def test_what_is_behind_other_rates_are_the_models_of_the_study(tmp_path, tuning):
    good, diverged = {"rates": [1.0], "displacement": 0.5}, {"rates": [2.0], "displacement": None}
    found = {"dpo": {"tried": [good, diverged]}, "sft_base": {"tried": []}}
    study = open_study(tmp_path, domains__miniature__tuning=tuning)
    assert runs.tried(study, DOMAIN, found) == ({"dpo": [good]}, study.domain(DOMAIN).dev)
