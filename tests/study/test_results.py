"""Rows of measurements follow from the records they are made of."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from refusals import refused
from tiny_study import DOMAIN, open_study

from allo_lib.evaluation import outcomes
from allo_lib.method.neurons import NeuronMask
from allo_lib.study import importance, manifest, results, scoring, training

METHODS = ["sft_base", "dpo", "dpo_top10", "npo", "allo"]


@pytest.fixture(scope="module")
def study(tiny_study):
    """The tiny study as if its profile had four methods only."""
    return open_study(tiny_study.results_dir, methods=METHODS[1:], ablations=[])


@pytest.fixture(scope="module")
def rows(study):
    return results.seed_rows(study)


@pytest.fixture(scope="module")
def found(study, rows):
    return {method: training.result(study, DOMAIN, method) for method in METHODS}


def value(rows, method, dataset, metric):
    (row,) = [r for r in rows if (r.method, r.dataset, r.metric) == (method, dataset, metric)]
    return row


# --- whose folder ------------------------------------------------------------------------------

ANOTHER = {"profile": "x", "profile_hash": "f" * 64, "seeds": [], "files": {}}


@pytest.mark.parametrize("text, words", [
    *((text, "restore it, or start over with --fresh")
      for text in ("", "{", "[]", "{}", '"text"', '{"profile_hash": "f"}')),
    (json.dumps(ANOTHER), "profile hash ffffffffffff"),
])  # fmt: skip
def test_a_manifest_that_is_damaged_or_another_s_is_refused(study, tmp_path, text, words):
    manifest.check_folder(tmp_path, study.profile)  # a new folder
    (tmp_path / "manifest.json").write_text(text)
    with refused(words, "--fresh"):
        manifest.check_folder(tmp_path, study.profile)
    own = ANOTHER | {"profile_hash": study.profile.hash()}
    manifest.write_json(tmp_path / "manifest.json", own)
    manifest.check_folder(tmp_path, study.profile)


# --- rows of a seed ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_method_are_those_of_its_result(study, rows, found, method):
    record, margins = found[method], found[method]["margins"]
    shares = []
    for dataset in study.domain(DOMAIN).datasets:
        own = [row for row in record["answers"] if row[1] == dataset]
        right, unread, n = sum(row[3] for row in own), sum(1 - row[2] for row in own), len(own)
        accuracy = value(rows, method, dataset, "accuracy")
        assert (accuracy.value, accuracy.n) == (right / n, n)
        assert accuracy.stderr == pytest.approx((right / n * (1 - right / n) / n) ** 0.5)
        assert value(rows, method, dataset, "no_answer").value == unread / n
        shares.append(right / n)
    average = value(rows, method, "average", "accuracy")
    assert average.value == pytest.approx(statistics.fmean(shares))
    assert average.n == len(record["answers"])
    assert len(margins) == len(study.pairs(DOMAIN).rows["heldout"])
    named = {row.metric for row in rows if row.method == method}
    if method == "sft_base":  # the reference itself ranks nothing, and nothing was trained
        assert not any(margins)
        assert not named & {"reward_accuracy", "reward_margin", "train_loss"}
    else:
        accuracy = value(rows, method, DOMAIN, "reward_accuracy")
        assert accuracy.value == sum(m > 0 for m in margins) / len(margins)
        margin = value(rows, method, DOMAIN, "reward_margin")
        assert margin.value == pytest.approx(statistics.fmean(margins))
        assert margin.stderr == pytest.approx(statistics.stdev(margins) / len(margins) ** 0.5)
        assert accuracy.n == margin.n == len(margins)
        losses = record["loss"][-1][-max(2, len(record["loss"][-1]) // 4) :]
        loss = value(rows, method, DOMAIN, "train_loss")
        assert (loss.value, loss.n) == (pytest.approx(statistics.fmean(losses)), len(losses))
    assert value(rows, method, DOMAIN, "displacement").value == record["displacement"]
    assert value(rows, method, DOMAIN, "dev_score").value == record["dev"]
    rates = [r.value for r in rows if r.method == method and r.metric.startswith("learning_rate_")]
    assert rates == record["rates"]


def test_overlap_rows_stand_beside_chance(tiny_study, study, rows):
    share = study.profile.method.share
    for comparison, variants in results.OVERLAPS.items():
        one, other = (study.mask(DOMAIN, "top", share, variant) for variant in variants)
        row = value(rows, comparison, DOMAIN, "mask_overlap")
        assert (row.value, row.n) == (one.overlap(other), one.kept)
        chance = value(rows, comparison, DOMAIN, "mask_overlap_chance")
        assert chance.value == pytest.approx(share / (2 - share), rel=1e-3)
        # At random places of each tensor both keep a neuron with the product of their shares of it.
        common = sum(
            len(one.indices[name]) * len(other.indices[name]) / math.prod(shape)
            for name, shape in one.shapes.items()
        )
        within = value(rows, comparison, DOMAIN, outcomes.CHANCE_IN_TENSORS)
        assert within.value == pytest.approx(common / (2 * one.kept - common))
    few = open_study(tiny_study.results_dir, stability=["halves"])
    assert set(results.top_masks(few, DOMAIN)) == {"delta", "half_a", "half_b"}
    assert {r.method for r in results.overlap_rows(few, DOMAIN)} == {"halves"}


def test_a_seed_is_written_beside_others_and_comes_again_to_the_byte(study, rows):
    path = study.results_dir / "measurements.csv"
    other = [outcomes.Measurement(7, "dpo", "chain", "accuracy", 0.5, 0.1, 4)]
    outcomes.write_measurements(path, other)
    written = results.update(study, [0])
    assert {row.seed for row in written} == {0, 7} and len(written) == len(rows) + 1
    first = path.read_bytes()
    assert len(outcomes.read_measurements(path)) == len(written)
    results.update(study, [0])
    assert path.read_bytes() == first
    path.unlink()


def test_what_another_process_wrote_meanwhile_is_kept(study, monkeypatch):
    path = study.results_dir / "measurements.csv"

    def fill(requested):
        assert list(requested)
        outcomes.write_measurements(path, [outcomes.Measurement(7, "dpo", "a", "b", 0.5, 0.1, 4)])

    monkeypatch.setattr(results, "fill", fill)
    assert {row.seed for row in results.update(study, [0])} == {0, 7}
    path.unlink()


def test_several_heldout_pairs_of_a_question_have_an_outcome_each(study, found, monkeypatch):
    """As where `per_question` is above 1, as in the paper."""
    pairs = study.pairs(DOMAIN).rows | {"heldout": [{"id": one} for one in ("q", "p", "q")]}
    record = found["dpo"] | {"margins": [1.0, -1.0, 2.0]}
    monkeypatch.setattr(study.pairs(DOMAIN), "rows", pairs)
    monkeypatch.setattr(results, "results_of", lambda *_: {"dpo": record})
    made = results.outcomes_of(study, DOMAIN)
    made = made[made["margin"].notna()]
    assert dict(zip(made["problem"], made["margin"], strict=True)) == {"q": 1, "p": -1, "q+1": 2}


# --- scores and differences ----------------------------------------------------------------------


def test_scores_and_differences_of_answers(found):
    rights = {m: {a[0]: a[3] for a in found[m]["answers"]} for m in METHODS}
    share = statistics.fmean(rights["dpo"].values())
    score, error = scoring.score_of(found["dpo"])
    assert score == pytest.approx(share) and scoring.unit(found["dpo"]) == "accuracy"
    assert error == pytest.approx((share * (1 - share) / len(rights["dpo"])) ** 0.5)
    interval = scoring.difference(found["npo"], found["dpo"])
    effect = statistics.fmean(rights["npo"][p] - rights["dpo"][p] for p in rights["npo"])
    assert interval.effect == pytest.approx(effect)
    assert interval.low <= interval.effect <= interval.high
    itself = scoring.difference(found["dpo"], found["dpo"])
    assert itself.effect == 0 and itself.low < 0 < itself.high


def test_results_without_answers_are_compared_on_held_out_pairs():
    def pairs_result(method, *margins):
        return {"method": method, "margins": list(margins)}

    ours = pairs_result("allo", 1.0, 2.0, -1.0, 0.5)
    theirs = pairs_result("dpo", 1.0, -1.0, -1.0, -1.0)
    assert scoring.difference(ours, theirs).effect == pytest.approx(0.5)
    assert scoring.unit(ours) == "held-out reward accuracy"
    assert scoring.score_of(ours)[0] == scoring.reward_accuracy(ours) == 0.75
    assert scoring.score_of(pairs_result("sft_base", 0.0, 0.0)) == (0.5, 0.0)
    diverged = pairs_result("allo_rates_x", *[0.0] * 4)  # ranks no pair right
    assert scoring.score_of(diverged)[0] == 0
    assert scoring.difference(diverged, ours).effect == pytest.approx(0 - 0.75)


# --- what notebooks look at --------------------------------------------------------------------


def test_where_kept_counts_by_layer_and_module():
    shapes = {
        "model.embed_tokens.weight": (4, 5),
        "model.layers.0.self_attn.q_proj.weight": (2, 5),
        "model.layers.10.mlp.up_proj.weight": (5, 2),  # safetensors lists 10 before 2
        "model.layers.2.mlp.up_proj.weight": (5, 2),
        "model.norm.weight": (5,),
    }
    kept = dict(zip(shapes, (5, 1, 10, 0, 0), strict=True))
    mask = NeuronMask({name: torch.arange(n) for name, n in kept.items()}, shapes, "scalar")
    matrix, layers, modules = importance.where_kept(mask)
    assert layers == ["model", "layer 0", "layer 2", "layer 10"]
    assert modules == ["embed_tokens", "q_proj", "up_proj", "norm"]
    nan = np.nan
    expected = [[0.25, nan, nan, 0], [nan, 0.1, nan, nan], [nan, nan, 0, nan], [nan, nan, 1, nan]]
    np.testing.assert_array_equal(matrix, expected)


def test_separation_finds_a_reward_model_that_knows(study, monkeypatch):
    oracle = study.oracle_tokens(DOMAIN, "heldout")

    def knows(self, name, split, quality):
        return [[0.1 if wrong else 0.9 for wrong in row] for row in oracle]

    monkeypatch.setattr(type(study), "keep_probabilities", knows)
    found = importance.separation(study, DOMAIN, "trained")
    tokens = [wrong for row in oracle for wrong in row]
    assert found["auc"] == 1 and found["found"] == 1
    assert found["selected"] == pytest.approx(sum(tokens) / len(tokens))
