"""Methods on the seconds-long study: what is trained, what is kept, what is measured."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_models import moved
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib import allo
from allo_lib.engine import on_policy
from allo_lib.engine.forward import implicit_margins
from allo_lib.engine.generation import Response
from allo_lib.engine.trainer import Diverged, Log
from allo_lib.errors import AlloError
from allo_lib.machine import weights
from allo_lib.profiles.methods import Stage, stages_of
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import results, runs, scoring, training


def candidate(study, method, rates):
    artifact = training._candidate(study, DOMAIN, stages_of(method, study.profile), rates)
    return artifact, weights.read_tensors(artifact.file(training.WEIGHTS))


# --- what a method is --------------------------------------------------------------------------


def test_allo_is_forgetting_then_learning_on_the_top_neurons(profile):
    forget, learn = stages_of("allo", profile)
    assert (forget.objective, learn.objective) == ("forgetting", "learning")
    assert {forget.neurons, learn.neurons} == {"top"} and forget.share == profile.method.share
    assert (forget.tokens, learn.key) == ("rewriter", "policy")
    assert learn.key_share == profile.method.key_share
    for method in ("dpo", "dpo_top10", "dpo_last10"):
        assert stages_of(f"{method}_paper", profile) == stages_of(method, profile)


def test_controls_get_as_many_updates_as_both_stages(profile):
    for method in ("allo", "sft", "rft", "ipo", "bco", "simpo", "npo", "rdpo", "ppo", "a2c",
                   "dpo_long", "dpo_top10_long", "dpo_last10_long", "dpo_random10_long",
                   "dpo_all_pairs", "allo_reversed", "allo_no_forgetting",
                   "allo_no_learning"):  # fmt: skip
        assert sum(stage.epochs for stage in stages_of(method, profile)) == 2, method
    for method, epochs in {"dpo": 1, "dpo_top10": 1, "sft_base": 0}.items():
        assert sum(stage.epochs for stage in stages_of(method, profile)) == epochs


def test_names_follow_the_profile_s_share_and_unknown_ones_are_refused():
    changed = load_profile(str(PROFILE), {"method.share": 0.05, "method.shares": [0.2]})
    assert stages_of("dpo_last5", changed)[0].neurons == "bottom"
    assert stages_of("dpo_top5", changed)[0].share == 0.05
    assert stages_of("dpo_top20", changed)[0].share == 0.2
    with pytest.raises(AlloError, match="'dpo_last10' is not known; expected one of"):
        stages_of("dpo_last10", changed)


# --- what a stage is trained on ----------------------------------------------------------------


def test_splits_of_pairs(tiny_study, profile):
    (every,), (wrong, _) = (stages_of(m, profile) for m in ("dpo_all_pairs", "allo_official"))
    train, mask = (tiny_study.encoded(DOMAIN, split) for split in ("train", "mask"))
    assert training._pairs(tiny_study, DOMAIN, every, first=True) == train + mask
    rows = training._pairs(tiny_study, DOMAIN, wrong, first=True)
    assert rows == tiny_study.encoded(DOMAIN, "wrong") and len(rows) > len(train) > 0 < len(mask)
    token_weights = tiny_study.forgetting_weights(DOMAIN, wrong)
    assert [len(values) for values in token_weights] == [len(row["rejected"]) for row in rows]


def test_rft_trains_on_right_samples_and_sft_on_as_many_gold_solutions_that_fit(
    tiny_study, monkeypatch
):
    encoded = tiny_study.encoded(DOMAIN, "train")
    rft = training._solution_rows(tiny_study, DOMAIN, "rft")
    assert [row["response"] for row in rft] == [row["chosen"] for row in encoded]

    def lengths():
        rows = training._solution_rows(tiny_study, DOMAIN, "sft")
        return [len(row["prompt"]) + len(row["response"]) for row in rows]

    whole = lengths()
    limit = sorted(whole)[len(whole) // 2]
    assert len(whole) == len(encoded) and limit < max(whole)
    shorter = dataclasses.replace(tiny_study.domain(DOMAIN), max_length=limit)
    monkeypatch.setattr(tiny_study, "domain", lambda name: shorter)
    kept = [length for length in whole if length <= limit]
    assert lengths()[: len(kept)] == kept and max(lengths()) <= limit
    assert len(lengths()) == len(whole)  # others take their places


def test_random_and_oracle_tokens_fit_their_responses(tiny_study):
    rows = tiny_study.encoded(DOMAIN, "train")
    share = tiny_study.profile.method.key_share
    keys = tiny_study.random_keys(DOMAIN, share)
    assert keys == tiny_study.random_keys(DOMAIN, share)
    oracle = tiny_study.oracle_tokens(DOMAIN, "train")
    chosen, shuffled, kept = (
        tiny_study.forgetting_weights(DOMAIN, Stage("forgetting", "forgetting", tokens=tokens))
        for tokens in ("rewriter", "random", "kept")
    )
    for row, key, wrong, ours, random, others in zip(
        rows, keys, oracle, chosen, shuffled, kept, strict=True
    ):
        length = len(row["rejected"])
        assert len(key) == len(wrong) == len(ours) == len(random) == length
        assert sum(key) == max(1, round(share * length)) and set(key) <= {0.0, 1.0}
        assert set(wrong) == {0.0, 1.0} and wrong[-1] == 0
        assert sorted(random) == sorted(ours)
        assert all(a + b == 1 for a, b in zip(ours, others, strict=True))
    assert shuffled != chosen


# --- what training changes ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo_top10", "dpo_last10", "dpo_random10"])
def test_a_masked_method_moves_its_neurons_and_no_other_bit(tiny_study, theta, method):
    (stage,) = stages_of(method, tiny_study.profile)
    artifact, trained = candidate(tiny_study, method, (1e-3,))
    mask = tiny_study.mask(DOMAIN, stage.neurons, stage.share)
    assert mask.kept == round(0.1 * mask.total)
    # Key neurons have gradients; among the last ones are those that never get any.
    assert moved(theta, trained, mask) > (0.9 if method == "dpo_top10" else 0.05) * mask.kept
    squares = sum(float((trained[n].double() - theta[n].double()).square().sum()) for n in theta)
    assert artifact.json()["displacement"] == pytest.approx(squares**0.5, rel=1e-4)


def test_ppo_moves_every_tensor_in_as_many_steps_as_long_dpo(tiny_study, theta):
    artifact, trained = candidate(tiny_study, "ppo", (1e-3,))
    assert all(not torch.equal(trained[name], theta[name]) for name in theta)
    record = artifact.json()
    long, _ = candidate(tiny_study, "dpo_long", (1e-3,))
    assert len(record["loss"][0]) == len(long.json()["loss"][0])
    assert record["dev"] >= 0 and record["displacement"] > 0


def test_on_policy_methods_are_rewarded_for_right_answers_that_have_ended(tiny_study, monkeypatch):
    found = {}

    def run(model, tokenizer, prompts, reward, name, schedule, **settings):
        found.update(prompts=prompts, reward=reward, name=name, schedule=schedule)
        return Log()

    monkeypatch.setattr(on_policy, "run_on_policy", run)
    tiny_study.load_sft(DOMAIN)
    stages = stages_of("ppo", tiny_study.profile)
    training._train_stage(tiny_study, DOMAIN, stages, 0, 1e-3, {}, {}, None)
    rows = tiny_study.pairs(DOMAIN).rows["train"]
    assert found["prompts"] == [row["prompt"] for row in rows] and found["name"] == "ppo"
    schedule, domain = found["schedule"], tiny_study.domain(DOMAIN)
    assert (schedule.epochs, schedule.batch_size) == (2 * domain.epochs, domain.batch_size)
    for number, row in enumerate(rows):
        verdicts = [
            found["reward"](number, Response(text, ended))
            for text, ended in ((row["chosen"], True), (row["chosen"], False),
                                (row["rejected"], True), ("", True))
        ]  # fmt: skip
        assert verdicts == [1, 0, 0, 0]


def test_both_stages_of_allo_keep_to_the_mask_and_start_at_their_own_zero(
    tiny_study, theta, monkeypatch, begun
):
    seen, real = [], allo.run_stage

    def spy(*arguments, masters=None, **settings):
        before = dict(masters or {})
        log = real(*arguments, masters=masters, **settings)
        seen.append((before, dict(masters or {})))
        return log

    monkeypatch.setattr(allo, "run_stage", spy)
    artifact, trained = candidate(open_study(begun), "allo", (1e-3, 1e-3))
    mask = tiny_study.mask(DOMAIN, "top", tiny_study.profile.method.share)
    assert moved(theta, trained, mask)
    forgetting, learning = artifact.json()["loss"]
    beta = tiny_study.profile.method.beta
    assert forgetting[0] == pytest.approx(2 / beta * torch.tensor(2.0).log().item(), abs=1e-4)
    # Learning's reference is the model that forgetting left behind, and so are its masters.
    assert learning[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    *_, (first, ended), (second, _) = seen  # after the warm-up's
    assert first == {} and second.keys() == ended.keys() and second
    for name, (places, values) in second.items():
        assert torch.equal(places, ended[name][0]) and torch.equal(values, ended[name][1])


def test_replicates_of_one_pair_set_see_its_pairs_in_different_orders(tmp_path, monkeypatch):
    study, seeds = open_study(tmp_path, replicates={"orders": 3}), []
    monkeypatch.setattr(training, "_pairs", lambda *_, **__: [])
    monkeypatch.setattr(training.allo, "run_stage", lambda *args, **_: seeds.append(args[3].seed))
    for replicate in (*study.replicates, 0):
        stages = stages_of("dpo", study.profile)
        training._train_stages(study.at(replicate), DOMAIN, stages, (1e-3,), tmp_path / ".a.b")
    assert len(set(seeds)) == 3 and seeds[3] == seeds[0]


def test_a_candidate_is_the_same_bits_whatever_ran_before(tiny_study, begun):
    kept, first = candidate(tiny_study, "dpo", (3e-4,))
    record = kept.json()
    tiny_study.store.drop(kept)
    candidate(tiny_study, "npo", (3e-4,))
    torch.manual_seed(99)
    again, second = candidate(tiny_study, "dpo", (3e-4,))
    assert again.json() == record and again.key == kept.key
    _, third = candidate(open_study(begun), "dpo", (3e-4,))
    assert all(torch.equal(first[n], second[n]) and torch.equal(first[n], third[n]) for n in first)


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {"domains__miniature__rates": {"dense": 2e-4}},
    {"domains__miniature__dev": 9},  # a candidate's record holds its score on that split
    {"domains__miniature__test": 15},
    {"search__candidates": 3},
    {"method__beta": 0.2},
    {"method__weight_decay": 0.1},
    {"domains__miniature__batch_size": 3},
    {"domains__miniature__epochs": 2},
])  # fmt: skip
def test_what_can_change_a_result_changes_its_key(tiny_study, change):
    changed = open_study(tiny_study.results_dir, **change)
    assert changed.pairs(DOMAIN).key == tiny_study.pairs(DOMAIN).key  # found, not made again
    studies, stages = (tiny_study, changed), stages_of("dpo", tiny_study.profile)
    ours, theirs = (training._method_inputs(study, DOMAIN, "dpo") for study in studies)
    assert ours != theirs
    ours, theirs = (training._stage_inputs(study, DOMAIN, stages) for study in studies)
    of_results = ("domains__miniature__test", "search__candidates")
    assert (ours == theirs) == any(key in change for key in of_results)
    assert "on_policy" not in ours and "on_policy" in training._stage_inputs(
        changed, DOMAIN, stages_of("a2c", changed.profile)
    )


# --- results -----------------------------------------------------------------------------------


def test_sft_base_is_the_sft_model_itself(tiny_study):
    found = training.result(tiny_study, DOMAIN, "sft_base")
    model = tiny_study.load_sft(DOMAIN)
    given = scoring.answers(tiny_study, DOMAIN, model, "test")
    assert found["answers"] == [
        [q.id, q.dataset, int(answered), int(right)] for q, answered, right in given
    ]
    assert found["displacement"] == 0 and found["rates"] == [] and found["loss"] == []
    assert found["margins"] == pytest.approx([0.0] * len(found["margins"]), abs=1e-6)
    assert found["dev"] == scoring.dev_score(tiny_study, DOMAIN, tiny_study.load_sft(DOMAIN))


def test_answers_are_judged_and_cut_off_ones_are_wrong(tiny_study, monkeypatch):
    task, domain = tiny_study.task(DOMAIN), tiny_study.domain(DOMAIN)
    asked = task.questions("dev", domain.dev)[:4]
    other = next(one.solution for one in asked if not task.right(asked[1], one.solution))
    said = [(asked[0].solution, True), (other, True), (asked[2].solution, False), ("nothing", True)]
    responses = [[Response(*one)] for one in said]
    monkeypatch.setattr(task, "questions", lambda split, count: asked)
    monkeypatch.setattr(scoring, "generate", lambda *_, **__: responses)
    found = scoring.answers(tiny_study, DOMAIN, None, "dev")
    assert [question for question, *_ in found] == asked
    assert [tuple(judged) for _, *judged in found] == [
        (True, True), (True, False), (False, False), (False, False),
    ]  # fmt: skip
    assert scoring.dev_score(tiny_study, DOMAIN, None) == 1 / 4
    monkeypatch.setattr(task, "questions", lambda split, count: [])
    with pytest.raises(AlloError, match="no questions"):
        scoring.answers(tiny_study, DOMAIN, None, "dev")


def test_a_result_is_that_of_its_best_candidate_and_the_paper_s_rows_run_at_its_rate(begun):
    study = open_study(begun)
    methods = ("dpo", "dpo_top10", "dpo_paper", "dpo_top10_paper")
    found = {method: training.result(study, DOMAIN, method) for method in methods}
    dpo = found["dpo"]
    assert len(dpo["tried"]) == study.profile.search.candidates
    assert dpo["dev"] == max(one["dev"] for one in dpo["tried"])
    assert dpo["rates"] == min(one["rates"] for one in dpo["tried"] if one["dev"] == dpo["dev"])
    # Only the models that notebooks look into stay.
    left = [json.loads((path / "record.json").read_text())
            for path in (study.store.folder / "candidate").iterdir()]  # fmt: skip
    assert [record["stages"][0]["neurons"] for record in left] == ["all"]
    model, artifact = training.trained_model(study, DOMAIN, "dpo")
    rows = study.encoded(DOMAIN, "heldout")
    margins = implicit_margins(study.logps(model, rows), rows, study.profile.method.beta)
    assert dpo["margins"] == margins and any(margins)
    assert artifact.json()["dev"] == dpo["dev"]
    for method in methods[2:]:
        assert found[method]["rates"] == dpo["rates"] and len(found[method]["tried"]) == 1
    for key in ("answers", "margins", "loss", "displacement", "dev"):
        assert found["dpo_paper"][key] == dpo[key]


def test_a_rate_that_diverges_loses_and_all_of_them_are_told(begun, monkeypatch, capsys):
    def train_stage(study, name, stages, number, rate, *others):
        if rate > limit:
            raise Diverged("the loss became nan at step 1; lower the learning rate")
        return real(study, name, stages, number, rate, *others)

    study = open_study(begun)
    start = study.domain(DOMAIN).rates.dense
    real, limit = training._train_stage, start / 4
    monkeypatch.setattr(training, "_train_stage", train_stage)
    with pytest.raises(AlloError, match="npo: every learning rate of the search diverged"):
        training.result(study, DOMAIN, "npo")
    assert not training.is_done(study, DOMAIN, "npo")
    limit = start * 0.75
    shutil.rmtree(study.store.folder / "candidate")
    found = training.result(study, DOMAIN, "npo")
    assert found["rates"] == [start / 2]
    assert [one["dev"] == training.DIVERGED for one in found["tried"]] == [True, False]
    assert "lower the learning rate" in capsys.readouterr().out


def test_a_diverged_fixed_rate_is_reported_as_zero(begun, monkeypatch):
    def train_stage(*_):
        raise Diverged("the loss became nan at step 1; lower the learning rate")

    study = open_study(begun, methods=["dpo"], ablations=["dpo_paper"], stability=[])
    training.result(study, DOMAIN, "dpo")
    monkeypatch.setattr(training, "_train_stage", train_stage)
    shutil.rmtree(study.store.folder / "candidate")
    found = training.result(study, DOMAIN, "dpo_paper")
    questions = study.task(DOMAIN).questions("test", study.domain(DOMAIN).test)
    assert found["answers"] == [[q.id, q.dataset, 0, 0] for q in questions]
    assert set(found["margins"]) == {0.0} and found["tried"][0]["dev"] == training.DIVERGED
    rows = [row for row in results.seed_rows(study) if row.method == "dpo_paper"]
    shown = {row.metric: row.value for row in rows if row.dataset in ("chain", DOMAIN)}
    assert shown["accuracy"] == shown["dev_score"] == 0 and shown["no_answer"] == 1
    assert shown["reward_accuracy"] == shown["reward_margin"] == 0  # beside other replicates'
    assert not {"displacement", "train_loss"} & set(shown)


def test_the_model_after_each_stage_ends_in_the_one_that_was_kept(tiny_study):
    before, after = training.logps_by_stage(tiny_study, DOMAIN, "allo")
    model, _ = training.trained_model(tiny_study, DOMAIN, "allo")
    rows = tiny_study.encoded(DOMAIN, "heldout")
    assert after == tiny_study.logps(model, rows) != before
    assert [row["rejected"] for row in before] != [row["rejected_reference"] for row in rows]
    ratios = training.log_ratios(tiny_study, DOMAIN, "allo", "heldout")
    for ratio, row, ours in zip(ratios, rows, after, strict=True):
        expected = [a - b for a, b in zip(ours["rejected"], row["rejected_reference"], strict=True)]
        assert ratio == pytest.approx(expected, abs=1e-7) and any(ratio)


# --- side by side ------------------------------------------------------------------------------


def test_methods_come_in_the_order_requested_and_dpo_before_what_reads_it(begun, monkeypatch):
    study, made = open_study(begun), []
    real = training.result

    def result(study, name, method):
        if not training.is_done(study, name, method):
            made.append(method)
        return real(study, name, method)

    monkeypatch.setattr(training, "result", result)
    requested = ["dpo_paper", "sft_base", "npo"]
    found = runs.run_methods(study, {DOMAIN: requested})[DOMAIN]
    assert list(found) == requested and all(found[m]["method"] == m for m in requested)
    assert set(made) == {"dpo", *requested} and made.index("dpo") < made.index("dpo_paper")
    made.clear()
    assert runs.run_methods(study, {DOMAIN: requested}) == {DOMAIN: found} and made == []


@pytest.mark.slow
def test_a_worker_s_error_reaches_the_user(begun):
    study = open_study(begun, compute__workers=2, **{f"domains__{DOMAIN}__tuned": {"rft": [1e-4]}})
    with pytest.raises(AlloError, match="`tuned` has 0 rates"):
        runs.fill([(study, DOMAIN, "dpo"), (study, DOMAIN, "npo")])
