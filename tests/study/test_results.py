"""Rows of measurements follow from the records they are made of."""

import math
import statistics

import numpy as np
import pytest
import torch
from refusals import refused
from tiny_study import DOMAIN, open_study

from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.method.neurons import NeuronMask
from allo_lib.study import analysis, arms, manifest, results, runs

METHODS = ["sft_base", "dpo", "dpo_top10", "npo", "allo"]


@pytest.fixture(scope="module")
def study(tiny_study):
    """The tiny study as if its profile had four methods only."""
    folder = tiny_study.results_dir
    return open_study(folder, methods=METHODS[1:], ablations=[])


@pytest.fixture(scope="module")
def rows(study):
    return results.seed_rows(study)


@pytest.fixture(scope="module")
def found(study, rows):
    return {method: arms.result(study, DOMAIN, method) for method in METHODS}


def value(rows, method, dataset, metric):
    (row,) = [r for r in rows if (r.method, r.dataset, r.metric) == (method, dataset, metric)]
    return row


# --- whose folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"text"', '{"profile_hash": "f"}'])
def test_a_manifest_that_cannot_be_read_is_refused(study, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with refused("manifest.json", "restore it, or start over with --fresh"):
        manifest.check_folder(tmp_path, study.profile)


def test_a_new_folder_and_the_profile_s_own_pass_and_another_one_s_is_refused(study, tmp_path):
    manifest.check_folder(tmp_path / "absent", study.profile)
    found = {"profile": "x", "profile_hash": study.profile.hash(), "seeds": [], "files": {}}
    manifest.write_json(tmp_path / "manifest.json", found)
    manifest.check_folder(tmp_path, study.profile)
    manifest.write_json(tmp_path / "manifest.json", found | {"profile_hash": "f" * 64})
    with refused("profile hash ffffffffffff", "--fresh"):
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
        assert accuracy.n == margin.n == len(margins) and "train_loss" in named
    assert value(rows, method, DOMAIN, "displacement").value == record["displacement"]
    assert value(rows, method, DOMAIN, "dev_score").value == record["dev"]
    rates = [r.value for r in rows if r.method == method and r.metric.startswith("learning_rate_")]
    assert rates == record["rates"]


def test_the_training_loss_is_that_of_the_last_quarter():
    row = results.train_loss(3, "dpo", "x", [9.0, 9, 9, 9, 9, 9, 9, 9, 9, 1, 2, 3])
    assert (row.seed, row.method, row.value, row.n) == (3, "dpo", 2.0, 3)
    assert row.stderr == pytest.approx(1 / 3**0.5)
    short = results.train_loss(0, "dpo", "x", [4.0])
    assert (short.value, short.stderr, short.n) == (4.0, 0.0, 1)


def test_overlap_rows_stand_beside_chance(study, rows):
    share = study.profile.method.share
    for comparison, (first, second) in results.OVERLAPS.items():
        masks = [study.mask(DOMAIN, "top", share, variant) for variant in (first, second)]
        flat = [
            {(name, int(i)) for name, index in mask.indices.items() for i in index}
            for mask in masks
        ]
        overlap = len(flat[0] & flat[1]) / len(flat[0] | flat[1])
        row = value(rows, comparison, DOMAIN, "mask_overlap")
        assert row.value == pytest.approx(overlap) and row.n == masks[0].kept
        chance = value(rows, comparison, DOMAIN, "mask_overlap_chance")
        assert chance.value == pytest.approx(share / (2 - share), rel=1e-3)
        # At random places of each tensor both keep a neuron with the product of their shares of it.
        kept = [
            mask.indices[name].numel() / math.prod(masks[0].shapes[name])
            for name in masks[0].indices
            for mask in masks
        ]
        sizes = [math.prod(shape) for shape in masks[0].shapes.values()]
        common = sum(a * b * n for a, b, n in zip(kept[::2], kept[1::2], sizes, strict=True))
        within = value(rows, comparison, DOMAIN, outcomes.CHANCE_IN_TENSORS)
        assert within.value == pytest.approx(common / (2 * masks[0].kept - common))


def test_only_the_profile_s_comparisons_are_made(tiny_study, rows):
    few = open_study(tiny_study.results_dir, stability=["halves"])
    assert set(results.top_masks(few, DOMAIN)) == {"delta", "half_a", "half_b"}
    assert {r.method for r in results.overlap_rows(few, DOMAIN)} == {"halves"}


def test_a_seed_is_written_beside_others_and_comes_again_to_the_byte(study, rows):
    path = study.results_dir / "measurements.csv"
    other = [outcomes.Measurement(7, "dpo", "chain", "accuracy", 0.5, 0.1, 4)]
    outcomes.write_measurements(path, other)
    written = results.update(study, [0])
    assert outcomes.seeds_of(written) == [0, 7] and len(written) == len(rows) + 1
    first = path.read_bytes()
    assert len(outcomes.read_measurements(path)) == len(written)
    results.update(study, [0])
    assert path.read_bytes() == first
    path.unlink()


def test_differences_are_paired(found):
    interval = results.difference(found["npo"], found["dpo"])
    right = [{a[0]: a[3] for a in found[m]["answers"]} for m in ("npo", "dpo")]
    effect = sum(right[0][p] - right[1][p] for p in right[0]) / len(right[0])
    assert interval.effect == pytest.approx(effect)
    assert interval.low <= interval.effect <= interval.high
    itself = results.difference(found["dpo"], found["dpo"])
    assert itself.effect == 0 and itself.low < 0 < itself.high


def test_results_without_answers_are_compared_on_held_out_pairs():
    def pairs_result(method, *margins):
        return {"method": method, "margins": list(margins)}

    ours, theirs = (
        pairs_result("allo", 1.0, 2.0, -1.0, 0.5),
        pairs_result("dpo", 1.0, -1.0, -1.0, -1.0),
    )
    assert results.difference(ours, theirs).effect == pytest.approx(0.5)
    assert results.unit(ours) == "held-out reward accuracy"
    assert analysis.score_of(ours)[0] == analysis.reward_accuracy(ours) == 0.75
    assert analysis.score_of(pairs_result("sft_base", 0.0, 0.0)) == (0.5, 0.0)
    diverged = pairs_result("allo_rates_x", *[0.0] * 4)  # ranks no pair right
    assert analysis.score_of(diverged)[0] == 0
    assert results.difference(diverged, ours).effect == pytest.approx(0 - 0.75)


# --- what notebooks look at --------------------------------------------------------------------


def test_the_score_of_a_result_is_its_accuracy(found):
    right = [row[3] for row in found["dpo"]["answers"]]
    share = sum(right) / len(right)
    score, error = analysis.score_of(found["dpo"])
    assert score == pytest.approx(share)
    assert error == pytest.approx((share * (1 - share) / len(right)) ** 0.5)
    assert results.unit(found["dpo"]) == "accuracy"


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
    matrix, layers, modules = analysis.where_kept(mask)
    assert layers == ["model", "layer 0", "layer 2", "layer 10"]
    cells = {
        (layer, module): matrix[i, j]
        for i, layer in enumerate(layers)
        for j, module in enumerate(modules)
        if not np.isnan(matrix[i, j])
    }
    assert cells == {
        ("model", "embed_tokens"): 0.25, ("layer 0", "q_proj"): 0.1, ("layer 10", "up_proj"): 1.0,
        ("layer 2", "up_proj"): 0.0, ("model", "norm"): 0.0,
    }  # fmt: skip


def test_log_ratios_are_of_the_trained_model(study):
    ratios = analysis.log_ratios(study, DOMAIN, "dpo")
    model, _ = arms.trained_model(study, DOMAIN, "dpo")
    rows = study.encoded(DOMAIN, "train")
    policy = study.logps(model, rows)
    for ratio, row, ours in zip(ratios, rows, policy, strict=True):
        expected = np.subtract(ours["rejected"], row["rejected_reference"])
        assert ratio == pytest.approx(expected.tolist(), abs=1e-7) and any(ratio)


def test_concentration_by_hand():
    ratios = [[-8.0, -1.0, 1.0, 0.0, -1.0], [2.0, 2.0, 2.0, 2.0, -5.0]]
    held = analysis.concentration_of(ratios)
    assert held["pooled"] == pytest.approx(8 / 15)
    assert held["per_response"] == pytest.approx(13 / 15)


def test_separation_finds_a_reward_model_that_knows(study, monkeypatch):
    oracle = study.oracle_tokens(DOMAIN, "heldout")

    def knows(self, name, split, quality):
        return [[0.1 if wrong else 0.9 for wrong in row] for row in oracle]

    monkeypatch.setattr(type(study), "keep_probabilities", knows)
    found = analysis.separation(study, DOMAIN, "trained")
    tokens = [wrong for row in oracle for wrong in row]
    assert found["auc"] == 1 and found["found"] == 1
    assert found["selected"] == pytest.approx(sum(tokens) / len(tokens))
    share = analysis.selected_share(study, DOMAIN, "trained", "heldout")
    assert share == pytest.approx(found["selected"])


def test_requirements_say_what_holds(study):
    checks = analysis.requirements(study, DOMAIN)
    for row in checks:
        low, high = row["at least"], row["at most"]
        holds = (low == "" or row["measured"] >= low) and (high == "" or row["measured"] <= high)
        assert row["holds"] == holds
    by_name = {row["requirement"]: row for row in checks}
    assert by_name["held-out problems"]["measured"] == study.domain(DOMAIN).test
    assert not by_name["held-out problems"]["holds"]


def test_test_questions_are_no_training_questions(study, monkeypatch):
    counts = analysis.distinct_questions(study, DOMAIN)
    assert sum(v for k, v in counts.items() if k.startswith("test, ")) == study.domain(DOMAIN).test
    assert counts["training"] >= study.domain(DOMAIN).pretrain.examples
    task = study.task(DOMAIN)
    leak = task.questions("sft", 3)
    real = type(task).questions

    def leaking(self, split, count, *mix):
        return leak if split == "test" else real(self, split, count, *mix)

    monkeypatch.setattr(type(task), "questions", leaking)
    with pytest.raises(AlloError, match="is both a training and a test question"):
        analysis.distinct_questions(study, DOMAIN)


def test_asking_what_was_trained_before_trains_nothing(study, rows, tmp_path):
    """07_efficiency alone, on an empty store, once trained the SFT model of every domain."""
    before = runs.trained_before(study, DOMAIN)
    assert before == {m: arms.result(study, DOMAIN, m) for m in METHODS}
    fresh = open_study(tmp_path / "fresh", methods=METHODS[1:], ablations=[])
    assert runs.trained_before(fresh, DOMAIN) == {}
    assert analysis.quality_and_cost(fresh, DOMAIN, {}) == {}
    assert not list(fresh.store.folder.rglob("manifest.json"))
    assert list(analysis.quality_and_cost(study, DOMAIN, before)) == ["scalar"]
