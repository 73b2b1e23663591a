"""What all methods share: made once, kept, and never at the cost of the live model's weights."""

import itertools

import pytest
import torch
from refusals import refused
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib.errors import AlloError
from allo_lib.machine import weights
from allo_lib.method import neurons
from allo_lib.profiles.methods import stages_of
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study.study import Study

SMALL = {
    "domains__miniature__pretrain": {"examples": 0},
    "domains__miniature__sft": {"examples": 0},
}


@pytest.mark.parametrize("seed", [-1, 1.0, "0", None, True])
def test_what_is_no_seed_is_refused_and_nothing_is_written(tmp_path, seed):
    with refused("expected a whole number from 0"):
        Study.open(str(PROFILE), seed, str(tmp_path / "new"))
    open_study(tmp_path / "new")  # nor before it is needed
    assert not (tmp_path / "new").exists()


def test_artifacts_of_questions_know_how_many_each_split_is_dealt(tmp_path, monkeypatch):
    """Files are dealt out in turn: with more development problems others are trained on."""
    monkeypatch.setattr(Study, "_data_hash", lambda *_: "0")

    def inputs(**changes):
        profile = load_profile("smollm2", {f"domains.{k}": v for k, v in changes.items()}, "cpu")
        return Study(profile, 0, tmp_path).inputs("questions", "sft")

    known = inputs()
    for change in ("questions.dev", "questions.pairs.questions"):
        assert inputs(**{change: 31}) != known
    assert inputs(**{"maths.dev": 31}) == known
    assert "dealt" not in open_study(tmp_path).inputs(DOMAIN, "sft")


def test_a_domain_of_another_profile_is_told(tiny_study):
    with pytest.raises(AlloError, match="domain 'maths' is not in seconds; expected miniature"):
        tiny_study.domain("maths")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_dtype_of_the_machine_and_artifacts_its_key(tmp_path, monkeypatch, dtype):
    """Two machines that resolve `auto` differently share a profile's hash, but no artifact."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": dtype != "float32"})
    study = open_study(tmp_path, model__dtype="auto")
    assert study.dtype == dtype and study.model.dtype == getattr(torch, dtype)
    assert study.inputs(DOMAIN)["model"]["dtype"] == dtype
    assert study.profile.hash() == open_study(tmp_path, model__dtype="auto").profile.hash()


@pytest.mark.parametrize("change", [
    {"method__max_grad_norm": 0.5},
    {"compute__threads": 2},
    {"domains__miniature__sft": {"examples": 90}},
    {"domains__miniature__pretrain": {"examples": 90}},
    {"model__width": 32},
])  # fmt: skip
def test_what_can_change_the_sft_model_changes_its_key(tiny_study, change, monkeypatch):
    threads, keys = torch.get_num_threads(), []
    try:
        changed = open_study(tiny_study.results_dir, **change)
        for study in (tiny_study, changed):
            monkeypatch.setattr(study.store, "get", lambda kind, inputs, *_: keys.append(inputs))
            study.sft(DOMAIN)
    finally:
        torch.set_num_threads(threads)
    assert keys[0] != keys[1]


# --- the live model ----------------------------------------------------------------------------


USES = {
    "reference": lambda study: study.encoded(DOMAIN, "heldout"),
    "scores": lambda study: study.scores(DOMAIN),
    "gradient": lambda study: study.scores(DOMAIN, "gradient"),
    "reward model": lambda study: study.reward_model(DOMAIN, "shuffled"),
    "probabilities": lambda study: study.keep_probabilities(DOMAIN, "train", "early"),
    "weights": lambda study: study.forgetting_weights(
        DOMAIN, stages_of("allo_rm_untrained", study.profile)[0]
    ),
}


@pytest.mark.parametrize("what", USES)
def test_what_is_made_on_the_way_gives_the_live_weights_back(begun, what):
    """Needed in the middle of a method's training, it must not change what is trained."""
    study = open_study(begun)
    model = study.load_sft(DOMAIN)
    with torch.no_grad():
        model.model.norm.weight += 1
    before = weights.snapshot(model)
    USES[what](study)
    assert study.model is model and weights.displacement(model, before) == 0


def test_the_sft_model_starts_from_its_seed_s_weights_whatever_was_loaded_since(begun, tmp_path):
    untouched = weights.snapshot(open_study(begun, **SMALL).model)
    study = open_study(begun, **SMALL)
    assert weights.displacement(study.model, untouched) == 0
    assert weights.displacement(open_study(tmp_path / "other", seed=1).model, untouched) > 1
    with torch.no_grad():
        study.model.model.norm.weight += 1
    found = weights.read_tensors(study.sft(DOMAIN).file("model.safetensors"))
    assert all(torch.equal(found[name], value) for name, value in untouched.items())


def test_replicates_share_the_model_and_differ_in_pairs_and_order(begun):
    study = open_study(begun, replicates={"pair_sets": 2, "orders": 2}, **SMALL)
    runs = [study.at(replicate) for replicate in study.replicates]
    assert [(one.train, one.wrong, one.order) for one in runs] == [
        (f"train{pair_set}", f"wrong{pair_set}", order) for pair_set in ("", 1) for order in (0, 1)
    ]
    assert all(one.at(0) is study and one.at(3) is runs[3] for one in runs)
    assert all(one.model is study.model and one.store is study.store for one in runs)


# --- shared artifacts --------------------------------------------------------------------------


def test_scores_of_variants_and_of_the_warm_up(tiny_study):
    variants = ("delta", "order", "half_a", "half_b", "gradient", "magnitude")
    masks = {v: tiny_study.mask(DOMAIN, "top", 0.1, v) for v in variants}
    chance = neurons.chance_overlap(0.1)
    assert all(masks["delta"].overlap(masks[variant]) < 1 for variant in variants[1:])
    assert masks["delta"].overlap(masks["order"]) > 1.2 * chance
    assert masks["half_a"].overlap(masks["half_b"]) > 1.2 * chance
    assert masks["delta"].overlap(tiny_study.mask(DOMAIN, "bottom", 0.1)) == 0
    theta = weights.read_tensors(tiny_study.sft(DOMAIN).file("model.safetensors"))
    found = tiny_study.scores(DOMAIN, "magnitude").file("scores.safetensors")
    magnitude = weights.read_tensors(found)
    assert all(torch.equal(magnitude[name], theta[name].abs()) for name in theta)
    record, method = tiny_study.scores(DOMAIN).json(), tiny_study.profile.method
    assert record["lr"] == tiny_study.domain(DOMAIN).rates.dense * method.warmup_rate_factor
    assert record["loss"][0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    assert 0 < record["moved_bfloat16"] < record["moved_float32"] <= 1


def test_reward_models_of_every_quality_have_their_probabilities(tiny_study):
    lengths = [len(row["rejected"]) for row in tiny_study.encoded(DOMAIN, "train")]
    qualities = ("trained", "early", "shuffled", "untrained")
    found = [tiny_study.keep_probabilities(DOMAIN, "train", quality) for quality in qualities]
    for values in found:
        assert [len(value) for value in values] == lengths
        assert all(0 <= p <= 1 for value in values for p in value)
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert tiny_study.reward_model(DOMAIN, "untrained") == tiny_study.sft(DOMAIN)


def test_weights_follow_the_rule_of_the_stage(tiny_study, monkeypatch):
    allo = {m: stages_of(m, tiny_study.profile)[0] for m in ("allo", "allo_soft", "allo_released")}
    chosen = {m: tiny_study.forgetting_weights(DOMAIN, stage) for m, stage in allo.items()}
    for i, values in enumerate(tiny_study.keep_probabilities(DOMAIN, "train")):
        assert chosen["allo"][i] == [float(p < 0.5) for p in values]
        assert chosen["allo_soft"][i] == pytest.approx([1 - p for p in values], abs=1e-6)
        assert chosen["allo_released"][i] == pytest.approx(values, abs=1e-6)
    everything = stages_of("allo_all_tokens_forgetting", tiny_study.profile)[0]
    assert {w for row in tiny_study.forgetting_weights(DOMAIN, everything) for w in row} == {1.0}
    monkeypatch.setattr(tiny_study, "task", lambda name: object())  # of real questions
    with pytest.raises(AlloError, match="only the generator of the miniature knows"):
        tiny_study.oracle_tokens(DOMAIN, "train")


def test_a_second_study_reads_what_the_first_made(begun, monkeypatch):
    study = open_study(begun)
    study.scores(DOMAIN), study.keep_probabilities(DOMAIN, "train")
    again = open_study(begun)

    def never(*args, **kwargs):
        raise AssertionError("it is there and is made again")

    monkeypatch.setattr("allo_lib.engine.store._publish", never)
    assert again.encoded(DOMAIN, "train") == study.encoded(DOMAIN, "train")
    assert again.scores(DOMAIN) == study.scores(DOMAIN)
    assert again.keep_probabilities(DOMAIN, "train") == study.keep_probabilities(DOMAIN, "train")
