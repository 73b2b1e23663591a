"""Methods on the seconds-long study: what is trained, what is kept, what is measured."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib import allo
from allo_lib.engine import on_policy
from allo_lib.engine.forward import implicit_margins
from allo_lib.engine.generation import Response
from allo_lib.engine.trainer import Diverged, Log
from allo_lib.errors import AlloError
from allo_lib.machine import weights
from allo_lib.profiles import methods
from allo_lib.profiles.methods import Stage, share_name, stages_of
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import arms, results, runs, scoring


@pytest.fixture
def theta(tiny_study):
    """The SFT model's weights."""
    return weights.read_tensors(tiny_study.sft(DOMAIN).file("model.safetensors"))


def candidate(study, stages, rates):
    artifact = arms._candidate(study, DOMAIN, stages, rates)
    return artifact, weights.read_tensors(artifact.file(arms.WEIGHTS))


# --- what a method is --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile():
    return load_profile(str(PROFILE))


def test_allo_is_forgetting_then_learning_on_the_top_neurons(profile):
    forget, learn = stages_of("allo", profile)
    assert (forget.objective, learn.objective) == ("forgetting", "learning")
    assert {forget.neurons, learn.neurons} == {"top"} and forget.share == profile.method.share
    assert (forget.tokens, learn.key) == ("rewriter", "policy")
    assert learn.key_share == profile.method.key_share


def test_controls_get_as_many_updates_as_both_stages(profile):
    def epochs(method):
        return sum(stage.epochs for stage in stages_of(method, profile))

    assert epochs("allo") == 2
    for method in ("sft", "rft", "ipo", "bco", "simpo", "npo", "rdpo", "ppo", "a2c", "dpo_long",
                   "dpo_top10_long", "dpo_last10_long", "dpo_random10_long", "dpo_all_pairs",
                   "allo_no_forgetting", "allo_no_learning", "allo_random_neurons"):  # fmt: skip
        assert epochs(method) == 2, method
    assert epochs("dpo") == epochs("dpo_top10") == 1 and epochs("sft_base") == 0


def test_all_pairs_are_those_of_training_and_those_of_the_masks(tiny_study, profile):
    (stage,) = stages_of("dpo_all_pairs", profile)
    rows = arms._pairs(tiny_study, DOMAIN, stage, first=True)
    both = [tiny_study.encoded(DOMAIN, split) for split in ("train", "mask")]
    assert rows == both[0] + both[1] and min(map(len, both)) > 0
    assert "pairs" in stage.settings() and "pairs" not in stages_of("dpo", profile)[0].settings()


def test_each_ablation_changes_one_thing_of_allo(profile):
    whole = stages_of("allo", profile)

    def changed(method):
        pairs = zip(whole, stages_of(method, profile), strict=True)
        return [{key for key in vars(a) if getattr(a, key) != getattr(b, key)} for a, b in pairs]

    assert changed("allo_all_tokens_forgetting") == [{"tokens"}, set()]
    assert changed("allo_all_tokens_learning") == [set(), {"key_share"}]
    assert changed("allo_random_tokens") == changed("allo_oracle_tokens") == [{"tokens"}, {"key"}]
    assert changed("allo_soft") == changed("allo_released") == [{"rule"}, set()]
    assert changed("allo_key_reference") == [set(), {"key"}]
    assert changed("allo_random_neurons") == [{"neurons"}, {"neurons"}]
    assert changed("allo_all_neurons") == [{"neurons", "rate"}, {"neurons", "rate"}]
    for quality in ("early", "shuffled", "untrained"):
        assert changed(f"allo_rm_{quality}") == [{"reward_model"}, set()]
    assert changed("allo_rm_oracle") == [{"tokens"}, set()]


@pytest.mark.parametrize("share, name", [(1, "dpo"), (0.1, "dpo_top10"), (0.025, "dpo_top2p5")])
def test_shares_have_names_of_measurements(share, name):
    assert share_name(share) == name


def test_names_follow_the_profile_s_share():
    changed = load_profile(str(PROFILE), {"method.share": 0.05, "method.shares": [0.2]})
    assert stages_of("dpo_last5", changed)[0].neurons == "bottom"
    assert stages_of("dpo_top5", changed)[0].share == 0.05
    assert stages_of("dpo_top20", changed)[0].share == 0.2
    with pytest.raises(AlloError, match="'dpo_last10' is not known"):
        stages_of("dpo_last10", changed)


def test_paper_rows_have_the_stages_of_their_method(profile):
    for method in ("dpo", "dpo_top10", "dpo_last10"):
        assert stages_of(f"{method}_paper", profile) == stages_of(method, profile)


def test_unknown_methods_are_refused(profile):
    with pytest.raises(AlloError, match="method 'orpo' is not known; expected one of"):
        stages_of("orpo", profile)


# --- what training changes ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo_top10", "dpo_last10", "dpo_random10"])
def test_a_masked_method_moves_its_neurons_and_no_other_bit(tiny_study, theta, method):
    stages = stages_of(method, tiny_study.profile)
    (stage,) = stages
    artifact, trained = candidate(tiny_study, stages, (1e-3,))
    mask = tiny_study.mask(DOMAIN, stage.neurons, stage.share)
    assert mask.kept == round(0.1 * mask.total)
    moved = 0
    for name, value in trained.items():
        kept = mask.dense(name)
        assert torch.equal(value[~kept], theta[name][~kept]), name
        moved += int((value[kept] != theta[name][kept]).sum())
    # Key neurons have gradients; among the last ones are those that never get any.
    assert moved > (0.9 if method == "dpo_top10" else 0.05) * mask.kept
    squares = sum(float((trained[n].double() - theta[n].double()).square().sum()) for n in theta)
    assert artifact.json()["displacement"] == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("method", ["bco", "ppo", "a2c"])
def test_a_dense_baseline_moves_every_tensor_in_as_many_steps_as_long_dpo(
    tiny_study, theta, method
):
    artifact, trained = candidate(tiny_study, stages_of(method, tiny_study.profile), (1e-3,))
    assert all(not torch.equal(trained[name], theta[name]) for name in theta)
    record = artifact.json()
    long, _ = candidate(tiny_study, stages_of("dpo_long", tiny_study.profile), (1e-3,))
    assert len(record["loss"][0]) == len(long.json()["loss"][0])
    assert record["dev"] >= 0 and record["displacement"] > 0 and record["tokens"][0] > 0


def test_on_policy_methods_are_rewarded_for_right_answers_that_have_ended(tiny_study, monkeypatch):
    found = {}

    def run(model, tokenizer, prompts, reward, name, schedule, **settings):
        found.update(prompts=prompts, reward=reward, name=name, schedule=schedule)
        return Log()

    monkeypatch.setattr(on_policy, "run_on_policy", run)
    tiny_study.load_sft(DOMAIN)
    (stage,) = stages_of("ppo", tiny_study.profile)
    arms._train_stage(tiny_study, DOMAIN, (stage,), 0, 1e-3, {}, {}, None)
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


@pytest.mark.parametrize("method", ["ppo", "a2c"])
def test_without_a_verifier_there_is_no_on_policy_row(begun, monkeypatch, method):
    study = open_study(begun)
    assert arms.why_not(study, DOMAIN, method) is None
    monkeypatch.setattr(study, "task", lambda name: None)
    assert "no verifier" in arms.why_not(study, DOMAIN, method)
    assert arms.why_not(study, DOMAIN, "allo") is None
    with pytest.raises(AlloError, match=f"{method}: no verifier"):
        arms.result(study, DOMAIN, method)


def test_settings_of_on_policy_methods_are_part_of_their_keys_alone(tiny_study):
    def inputs(method):
        return arms._stage_inputs(tiny_study, DOMAIN, stages_of(method, tiny_study.profile))

    assert inputs("a2c")["on_policy"] == vars(on_policy.DEFAULT)
    assert "on_policy" not in inputs("dpo") | inputs("allo") | inputs("sft_base")


def test_a_row_of_relative_rates_runs_at_those_times_its_factors(tiny_study, monkeypatch):
    monkeypatch.setattr(arms, "result", lambda study, name, method: {
        "dpo": {"rates": [0.5], "knob": {}},
        "allo": {"rates": [0.1, 0.2], "knob": {}}}[method])  # fmt: skip
    rates = [arms._fixed_rates(tiny_study, DOMAIN, method)
             for method in ("allo_rates_x0p5_x2", "dpo_top10_paper", "allo")]  # fmt: skip
    assert rates == [pytest.approx((0.05, 0.4)), (0.5,), None]
    ours, whole = (arms._method_inputs(tiny_study, DOMAIN, method)
                   for method in ("allo_rates_x0p5_x2", "allo"))  # fmt: skip
    assert ours != whole and "relative_to" not in whole


def test_both_stages_of_allo_keep_to_the_mask_and_start_at_their_own_zero(tiny_study, theta):
    stages = stages_of("allo", tiny_study.profile)
    artifact, trained = candidate(tiny_study, stages, (1e-3, 1e-3))
    mask = tiny_study.mask(DOMAIN, "top", stages[0].share)
    for name, value in trained.items():
        assert torch.equal(value[~mask.dense(name)], theta[name][~mask.dense(name)]), name
    forgetting, learning = artifact.json()["loss"]
    beta = tiny_study.profile.method.beta
    assert forgetting[0] == pytest.approx(2 / beta * torch.tensor(2.0).log().item(), abs=1e-4)
    # Learning's reference is the model that forgetting left behind.
    assert learning[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)


def test_learning_starts_from_the_masters_that_forgetting_ended_with(
    tiny_study, monkeypatch, tmp_path
):
    seen, real = [], allo.run_stage

    def spy(*arguments, masters, **settings):
        begun = dict(masters)
        log = real(*arguments, masters=masters, **settings)
        seen.append((begun, dict(masters)))
        return log

    monkeypatch.setattr(allo, "run_stage", spy)
    tiny_study.load_sft(DOMAIN)
    stages = stages_of("allo", tiny_study.profile)
    arms._train_stages(tiny_study, DOMAIN, stages, (1e-4, 1e-3), tmp_path / ".key.try")
    (first, ended), (second, _) = seen
    assert first == {} and second.keys() == ended.keys()
    for name, (places, values) in second.items():
        assert torch.equal(places, ended[name][0]) and torch.equal(values, ended[name][1])


def test_a_candidate_is_the_same_bits_whatever_ran_before(tiny_study, begun):
    stages, rates = stages_of("dpo", tiny_study.profile), (3e-4,)
    kept, first = candidate(tiny_study, stages, rates)
    record = kept.json()
    tiny_study.store.drop(kept)
    candidate(tiny_study, stages_of("npo", tiny_study.profile), rates)
    torch.manual_seed(99)
    again, second = candidate(tiny_study, stages, rates)
    assert again.json() == record and again.key == kept.key
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = open_study(begun)
    _, third = candidate(other, stages, rates)
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_fixed_keys_leave_the_live_model_as_it_was(tiny_study):
    model = tiny_study.load_sft(DOMAIN)
    before = weights.snapshot(model)
    stage = stages_of("allo_key_reference", tiny_study.profile)[1]
    keys = arms._fixed_keys(tiny_study, DOMAIN, stage)
    assert weights.displacement(model, before) == 0
    rows = tiny_study.encoded(DOMAIN, "train")
    for row, key in zip(rows, keys, strict=True):
        count = max(1, round(stage.key_share * len(row["rejected"])))
        assert len(key) == len(row["rejected"]) and sum(key) == count


def test_random_and_oracle_tokens_fit_their_responses(tiny_study):
    rows = tiny_study.encoded(DOMAIN, "train")
    share = tiny_study.profile.method.key_share
    keys = tiny_study.random_keys(DOMAIN, share)
    assert keys == tiny_study.random_keys(DOMAIN, share)
    oracle = tiny_study.oracle_tokens(DOMAIN, "train")
    chosen, shuffled = (
        tiny_study.forgetting_weights(DOMAIN, Stage("forgetting", "forgetting", tokens=tokens))
        for tokens in ("rewriter", "random")
    )
    for row, key, wrong, rewriter, random in zip(rows, keys, oracle, chosen, shuffled, strict=True):
        length = len(row["rejected"])
        assert {len(key), len(wrong), len(rewriter), len(random)} == {length}
        assert sum(key) == max(1, round(share * length)) and set(key) <= {0.0, 1.0}
        assert wrong[-1] == 0 and sum(wrong) >= 1
        assert sorted(rewriter) == sorted(random)


def test_rft_learns_the_right_samples_and_sft_as_many_of_its_own(tiny_study):
    pairs = tiny_study.pairs(DOMAIN).rows["train"]
    rft = arms._solution_rows(tiny_study, DOMAIN, "rft")
    encoded = tiny_study.encoded(DOMAIN, "train")
    assert [row["response"] for row in rft] == [row["chosen"] for row in encoded]
    assert len(arms._solution_rows(tiny_study, DOMAIN, "sft")) == len(pairs)


def test_gold_solutions_that_do_not_fit_are_passed_over(tiny_study, monkeypatch):
    def lengths():
        rows = arms._solution_rows(tiny_study, DOMAIN, "sft")
        return [len(row["prompt"]) + len(row["response"]) for row in rows]

    whole = lengths()
    limit = sorted(whole)[len(whole) // 2]
    assert limit < max(whole)
    shorter = dataclasses.replace(tiny_study.domain(DOMAIN), max_length=limit)
    monkeypatch.setattr(tiny_study, "domain", lambda name: shorter)
    kept = [length for length in whole if length <= limit]
    assert lengths()[: len(kept)] == kept and max(lengths()) <= limit
    assert len(lengths()) == len(whole)  # others take their places


# --- results -----------------------------------------------------------------------------------


def test_sft_base_is_the_sft_model_itself(tiny_study):
    found = arms.result(tiny_study, DOMAIN, "sft_base")
    model = tiny_study.load_sft(DOMAIN)
    given = scoring.answers(tiny_study, DOMAIN, model, "test")
    assert [row[3] for row in found["answers"]] == given.right
    assert [row[2] for row in found["answers"]] == given.answered
    questions = tiny_study.task(DOMAIN).questions("test", tiny_study.domain(DOMAIN).test)
    assert [row[:2] for row in found["answers"]] == [[q.id, q.dataset] for q in questions]
    assert found["displacement"] == 0 and found["rates"] == [] and found["loss"] == []
    assert found["margins"] == pytest.approx([0.0] * len(found["margins"]), abs=1e-6)
    assert found["dev"] == scoring.dev_score(tiny_study, DOMAIN, tiny_study.load_sft(DOMAIN))


def test_a_result_is_that_of_its_best_candidate(tiny_study):
    found = arms.result(tiny_study, DOMAIN, "dpo")
    settings = tiny_study.profile.search
    assert len(found["tried"]) == settings.candidates
    assert found["dev"] == max(one["dev"] for one in found["tried"])
    best = [one["rates"] for one in found["tried"] if one["dev"] == found["dev"]]
    assert found["rates"] == min(best)
    model, artifact = arms.trained_model(tiny_study, DOMAIN, "dpo")
    rows = tiny_study.encoded(DOMAIN, "heldout")
    reference = [{s: row[f"{s}_reference"] for s in ("chosen", "rejected")} for row in rows]
    beta = tiny_study.profile.method.beta
    margins = implicit_margins(tiny_study.logps(model, rows), reference, beta)
    assert found["margins"] == margins and any(margins)
    assert artifact.json()["dev"] == found["dev"]


def test_only_the_models_that_notebooks_look_into_stay(begun):
    study = open_study(begun)
    for method in ("dpo", "dpo_top10", "dpo_paper", "dpo_top10_paper"):
        arms.result(study, DOMAIN, method)
    left = [json.loads((path / "record.json").read_text())
            for path in (study.store.folder / "candidate").iterdir()]  # fmt: skip
    assert [record["stages"][0]["neurons"] for record in left] == ["all"]


def test_the_paper_s_protocol_runs_at_dpo_s_rate(tiny_study):
    rate = arms.result(tiny_study, DOMAIN, "dpo")["rates"]
    for method in ("dpo_paper", "dpo_top10_paper"):
        found = arms.result(tiny_study, DOMAIN, method)
        assert found["rates"] == rate and len(found["tried"]) == 1 and found["method"] == method
    same = {"answers", "margins", "loss", "displacement", "rates", "dev"}
    dpo, paper = (arms.result(tiny_study, DOMAIN, m) for m in ("dpo", "dpo_paper"))
    assert {key: dpo[key] for key in same} == {key: paper[key] for key in same}


@pytest.mark.parametrize(
    "change",
    [
        {"domains__miniature__rates": {"dense": 2e-4}},
        {"domains__miniature__dev": 9},
        {"domains__miniature__test": 15},
        {"search__candidates": 3},
        {"method__beta": 0.2},
        {"method__weight_decay": 0.1},
        {"domains__miniature__batch_size": 3},
        {"domains__miniature__epochs": 2},
    ],
)
def test_what_can_change_a_result_changes_its_key(tiny_study, change):
    changed = open_study(tiny_study.results_dir, **change)
    assert changed.pairs(DOMAIN).key == tiny_study.pairs(DOMAIN).key  # found, not made anew
    ours, theirs = (arms._method_inputs(study, DOMAIN, "dpo") for study in (tiny_study, changed))
    assert ours != theirs


@pytest.mark.parametrize(
    "change",
    [
        {"method__max_grad_norm": 0.5},
        {"compute__threads": 2},
        {"domains__miniature__sft": {"examples": 90}},
        {"domains__miniature__pretrain": {"examples": 90}},
        {"model__width": 32},
    ],
)
def test_what_can_change_the_sft_model_changes_its_key(tiny_study, change, monkeypatch):
    threads, asked = torch.get_num_threads(), []
    try:
        changed = open_study(tiny_study.results_dir, **change)
        for study in (tiny_study, changed):
            monkeypatch.setattr(study.store, "get", lambda kind, given, *_: asked.append(given))
            study.sft(DOMAIN)
    finally:
        torch.set_num_threads(threads)
    assert asked[0] != asked[1]


def test_the_development_split_is_part_of_a_candidate(tiny_study):
    """Its record holds the score on that split."""
    changed = open_study(tiny_study.results_dir, domains__miniature__dev=9)
    stages = stages_of("dpo", tiny_study.profile)
    ours, theirs = (arms._stage_inputs(study, DOMAIN, stages) for study in (tiny_study, changed))
    assert ours != theirs


def test_a_rate_that_diverges_loses_and_all_of_them_are_told(begun, monkeypatch, capsys):
    def train_stage(study, name, stages, number, rate, *others):
        if rate > limit:
            raise Diverged("the loss became nan at step 1; lower the learning rate")
        return real(study, name, stages, number, rate, *others)

    study = open_study(begun)
    centre = study.domain(DOMAIN).rates.dense
    real, limit = arms._train_stage, centre / 4
    monkeypatch.setattr(arms, "_train_stage", train_stage)
    with pytest.raises(AlloError, match="npo: every learning rate of the search diverged"):
        arms.result(study, DOMAIN, "npo")
    assert not arms.is_done(study, DOMAIN, "npo")
    limit = centre * 0.75
    shutil.rmtree(study.store.folder / "candidate")
    found = arms.result(study, DOMAIN, "npo")
    assert found["rates"] == [centre / 2]
    assert [one["dev"] == arms.DIVERGED for one in found["tried"]] == [True, False]
    assert "lower the learning rate" in capsys.readouterr().out


def test_a_row_of_given_rates_that_diverges_is_measured_as_the_ruin_it_is(begun, monkeypatch):
    def train_stage(*_):
        raise Diverged("the loss became nan at step 1; lower the learning rate")

    study = open_study(begun, methods=["dpo"], ablations=["dpo_paper"], stability=[])
    arms.result(study, DOMAIN, "dpo")
    shutil.rmtree(study.store.folder / "candidate")
    monkeypatch.setattr(arms, "_train_stage", train_stage)
    found = arms.result(study, DOMAIN, "dpo_paper")
    questions = study.task(DOMAIN).questions("test", study.domain(DOMAIN).test)
    assert found["answers"] == [[q.id, q.dataset, 0, 0] for q in questions]
    assert set(found["margins"]) == {0.0} and found["tried"][0]["dev"] == arms.DIVERGED
    rows = [row for row in results.seed_rows(study) if row.method == "dpo_paper"]
    told = {row.metric: row.value for row in rows if row.dataset in ("chain", DOMAIN)}
    assert told["accuracy"] == told["dev_score"] == 0 and told["no_answer"] == 1
    assert not {"displacement", "train_loss", "reward_accuracy"} & set(told)


# --- side by side ------------------------------------------------------------------------------


def test_methods_come_in_the_order_asked_and_dpo_before_what_reads_it(begun, monkeypatch):
    study, made = open_study(begun), []
    real = arms.result

    def result(study, name, method):
        if not arms.is_done(study, name, method):
            made.append(method)
        return real(study, name, method)

    monkeypatch.setattr(arms, "result", result)
    asked = ["dpo_paper", "sft_base", "npo"]
    found = runs.run_methods(study, {DOMAIN: asked})[DOMAIN]
    assert list(found) == asked and all(found[m]["method"] == m for m in asked)
    assert made == ["npo", "dpo", "sft_base", "dpo_paper"]  # what takes longest comes first
    made.clear()
    assert runs.run_methods(study, {DOMAIN: asked}) == {DOMAIN: found} and made == []


@pytest.mark.slow
def test_workers_and_one_process_find_the_same(tiny_study, begun):
    study = open_study(begun, compute__workers=2)
    asked = ["dpo", "npo", "allo", "dpo_paper"]
    ours = runs.run_methods(study, {DOMAIN: asked})
    theirs = runs.run_methods(tiny_study, {DOMAIN: asked})
    assert ours == theirs


@pytest.mark.slow
def test_a_worker_s_error_reaches_the_user(begun):
    study = open_study(begun, compute__workers=2, search__candidates=0)
    with pytest.raises(AlloError, match="candidates is 0"):
        runs.fill([study], {DOMAIN: ["dpo", "npo"]})


def test_workers_begin_with_what_takes_longest(tiny_study, monkeypatch):
    """npo: one stage of two epochs; allo: two of one; a row of the paper's protocol: one model.
    A step of domain b reads three times as many tokens as one of domain a."""
    pair = {"prompt": [1] * 4, "chosen": [1], "rejected": [1]}
    pairs = {"a": [pair], "b": [pair] * 3}
    monkeypatch.setattr(tiny_study, "encoded", lambda name, split: pairs[name])
    rows = [("a", "sft_base", 0), ("a", "dpo_paper", 0), ("a", "dpo", 0), ("a", "npo", 0),
            ("a", "allo", 0), ("b", "dpo_top10", 0), ("b", "dpo_top10", 1)]  # fmt: skip
    expected = ["dpo_top10", "npo", "allo", "dpo_top10", "dpo", "dpo_paper", "sft_base"]
    rows = [(tiny_study, *row) for row in rows]
    assert [method for *_, method, _ in runs._longest_first(rows)] == expected
    with pytest.raises(AlloError, match="'orpo' is not known"):
        runs._longest_first([(tiny_study, "a", "orpo", 0)])


def test_the_planted_fault_forgets_what_the_rewriter_keeps(tiny_study):
    weigh = [
        tiny_study.forgetting_weights(DOMAIN, stages_of(method, tiny_study.profile)[0])
        for method in ("allo", "allo_rm_inverted")
    ]
    assert all(a + b == 1 for ours, theirs in zip(*weigh, strict=True)
               for a, b in zip(ours, theirs, strict=True))  # fmt: skip


def test_the_official_variant_forgets_all_wrong_samples_on_fewer_neurons(tiny_study):
    forgetting, learning = stages_of("allo_official", tiny_study.profile)
    assert (forgetting.pairs, forgetting.share) == ("wrong", 0.05)
    assert (learning.pairs, learning.share, learning.key_share) == ("train", 0.05, 0.1)
    rows = arms._pairs(tiny_study, DOMAIN, forgetting, first=True)
    wrong = tiny_study.pairs(DOMAIN).rows["wrong"]
    assert len(rows) == len(wrong) > len(tiny_study.pairs(DOMAIN).rows["train"])
    weights_ = tiny_study.forgetting_weights(DOMAIN, forgetting)
    assert [len(values) for values in weights_] == [len(row["rejected"]) for row in rows]


@pytest.fixture
def groups(tiny_study, monkeypatch):
    """What `parallel` makes of rows (domain, method, replicate): groups of the same."""
    domain = tiny_study.domain(DOMAIN)
    monkeypatch.setattr(tiny_study, "domain", lambda name: domain)
    monkeypatch.setattr(runs, "_longest_first", list)

    def grouped(*rows):
        found = runs._groups([(tiny_study, *row) for row in rows])
        return [[row[1:] for row in group] for group in found]

    return grouped


def test_domains_share_the_workers_and_each_waits_for_its_own_dpo(groups, monkeypatch):
    monkeypatch.setattr(arms, "is_done", lambda study, name, method: (name, method) == ("a", "dpo"))
    asked = [("a", "dpo_paper"), ("a", "npo"), ("b", "allo"), ("b", "dpo_paper"),
             ("c", "dpo_paper"), ("c", "dpo")]  # fmt: skip
    first, later = groups(*((*row, 0) for row in asked))
    assert [row[:2] for row in first] == [
        ("a", "dpo_paper"), ("a", "npo"), ("b", "allo"), ("b", "dpo"), ("c", "dpo")
    ]  # fmt: skip
    assert later == [("b", "dpo_paper", 0), ("c", "dpo_paper", 0)]
    assert groups() == []


def test_further_replicates_wait_for_the_first_whose_rates_they_take(groups, monkeypatch):
    monkeypatch.setattr(arms, "is_done", lambda study, name, method: False)
    first, second, third = groups(("a", "npo", 0), ("a", "npo", 1), ("a", "dpo_paper", 1))
    assert first == [("a", "npo", 0), ("a", "dpo", 0)]
    assert second == [("a", "npo", 1), ("a", "dpo_paper", 0), ("a", "dpo", 1)]
    assert third == [("a", "dpo_paper", 1)]


def test_with_tuned_rates_nothing_waits_but_for_a_model_that_it_reads(
    groups, tiny_study, monkeypatch
):
    monkeypatch.setattr(arms, "is_done", lambda study, name, method: False)
    tuned = dataclasses.replace(tiny_study.domain(DOMAIN), tuned={"dpo": (1e-4,)})
    monkeypatch.setattr(tiny_study, "domain", lambda name: tuned)
    rows = [("a", "npo", 1), ("a", "dpo_paper", 1), ("a", "allo_key_reference", 0)]
    first, second = groups(*rows)
    assert first == [*rows[:2], ("a", "dpo", 0)] and second == rows[2:]


def test_every_known_method_has_a_rate_and_an_objective(profile):
    rates = vars(profile.domains[DOMAIN].rates)
    for method, stages in methods._methods(profile).items():
        for stage in stages:
            assert stage.rate in rates, method
            assert stage.neurons in ("all", "top", "bottom", "random"), method


def test_the_model_after_each_stage_ends_in_the_one_that_was_kept(tiny_study):
    before, after = arms.logps_by_stage(tiny_study, DOMAIN, "allo")
    model, _ = arms.trained_model(tiny_study, DOMAIN, "allo")
    assert after == tiny_study.logps(model, tiny_study.encoded(DOMAIN, "heldout")) != before
    reference = [row["rejected_reference"] for row in tiny_study.encoded(DOMAIN, "heldout")]
    assert [row["rejected"] for row in before] != reference
