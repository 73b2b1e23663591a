"""Rows of measurements follow from the records they are made of."""

import json
import math
import statistics

import numpy as np
import pytest
from tiny_study import DOMAIN, open_study

from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.method import neurons
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


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"text"'])
def test_a_manifest_that_cannot_be_read_is_told(study, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(AlloError, match="manifest.json is not a readable manifest"):
        manifest.check_folder(tmp_path, study.profile)


def test_the_folder_s_own_profile_and_a_new_folder_pass(study, tmp_path):
    manifest.check_folder(tmp_path / "absent", study.profile)
    manifest = {"profile_hash": study.profile.hash()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    manifest.check_folder(tmp_path, study.profile)
    manifest["profile_hash"] = "f" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AlloError, match="profile hash ffffffffffff.*--fresh"):
        manifest.check_folder(tmp_path, study.profile)


# --- which methods -----------------------------------------------------------------------------


def test_methods_of_a_domain_are_asked_once_and_in_order(tiny_study):
    changes = {"methods": ["dpo", "rft"], "ablations": ["dpo", "allo_rm_oracle"]}
    both = open_study(tiny_study.results_dir, **changes)
    assert runs.methods_of(both, DOMAIN) == ["sft_base", "dpo", "rft", "allo_rm_oracle"]
    real = open_study(tiny_study.results_dir, **changes, domains__miniature__kind="choice")
    assert runs.methods_of(real, DOMAIN) == ["sft_base", "dpo", "rft"]
    own = open_study(tiny_study.results_dir, **changes, domains__miniature__methods=["npo"])
    assert runs.methods_of(own, DOMAIN) == ["sft_base", "npo"]


# --- rows of a seed ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_accuracies_are_those_of_the_answers(study, rows, found, method):
    answers = found[method]["answers"]
    shares = []
    for dataset in study.domain(DOMAIN).datasets:
        own = [row for row in answers if row[1] == dataset]
        right, unread = sum(row[3] for row in own), sum(1 - row[2] for row in own)
        n = len(own)
        accuracy = value(rows, method, dataset, "accuracy")
        assert (accuracy.value, accuracy.n) == (right / n, n)
        assert accuracy.stderr == pytest.approx((right / n * (1 - right / n) / n) ** 0.5)
        assert value(rows, method, dataset, "no_answer").value == unread / n
        shares.append(right / n)
    average = value(rows, method, "average", "accuracy")
    assert average.value == pytest.approx(statistics.fmean(shares)) and average.n == len(answers)


@pytest.mark.parametrize("method", METHODS)
def test_other_rows_of_a_method(study, rows, found, method):
    record, margins = found[method], found[method]["margins"]
    assert len(margins) == len(study.pairs(DOMAIN).rows["heldout"])
    if method == "sft_base":  # the reference itself ranks nothing
        named = {r.metric for r in rows if r.method == method}
        assert not any(margins) and not named & {"reward_accuracy", "reward_margin"}
    else:
        accuracy = value(rows, method, DOMAIN, "reward_accuracy")
        assert accuracy.value == sum(m > 0 for m in margins) / len(margins)
        assert accuracy.n == len(margins)
        margin = value(rows, method, DOMAIN, "reward_margin")
        assert margin.value == pytest.approx(statistics.fmean(margins))
    assert value(rows, method, DOMAIN, "displacement").value == record["displacement"]
    assert value(rows, method, DOMAIN, "dev_score").value == record["dev"]
    rates = [r.value for r in rows if r.method == method and r.metric.startswith("learning_rate_")]
    assert rates == record["rates"]
    losses = [r for r in rows if r.method == method and r.metric == "train_loss"]
    assert len(losses) == (method != "sft_base")


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


def test_a_mask_overlaps_itself_and_only_the_asked_comparisons_are_made(tiny_study, rows):
    few = open_study(tiny_study.results_dir, stability=["halves"])
    assert set(results.top_masks(few, DOMAIN)) == {"delta", "half_a", "half_b"}
    table = analysis.overlaps(results.top_masks(few, DOMAIN))
    assert [table[i][i] for i in range(3)] == [1, 1, 1] and table[0][1] == table[1][0] < 1
    assert {r.method for r in results.overlap_rows(few, DOMAIN)} == {"halves"}


def test_rows_can_be_written_and_read_and_come_again(study, rows, tmp_path):
    outcomes.write_measurements(tmp_path / "a.csv", rows)
    outcomes.write_measurements(tmp_path / "b.csv", results.seed_rows(study))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert len(outcomes.read_measurements(tmp_path / "a.csv")) == len(rows)


def test_other_seeds_stay_when_a_seed_is_written(study, rows):
    path = study.results_dir / "measurements.csv"
    other = [outcomes.Measurement(7, "dpo", "chain", "accuracy", 0.5, 0.1, 4)]
    outcomes.write_measurements(path, other)
    written = results.update(study, [0])
    assert outcomes.read_measurements(path) == outcomes.read_measurements(path)
    assert outcomes.seeds_of(written) == [0, 7] and len(written) == len(rows) + 1
    path.unlink()


def test_differences_are_paired(found):
    interval = results.difference(found["npo"], found["dpo"])
    right = [{a[0]: a[3] for a in found[m]["answers"]} for m in ("npo", "dpo")]
    effect = sum(right[0][p] - right[1][p] for p in right[0]) / len(right[0])
    assert interval.effect == pytest.approx(effect)
    assert interval.low <= interval.effect <= interval.high
    itself = results.difference(found["dpo"], found["dpo"])
    assert itself.effect == 0 and itself.low < 0 < itself.high


def pairs_result(method, margins):
    return {"method": method, "margins": margins}


def test_results_without_answers_are_compared_on_held_out_pairs():
    ours = pairs_result("allo", [1.0, 2.0, -1.0, 0.5])
    theirs = pairs_result("dpo", [1.0, -1.0, -1.0, -1.0])
    assert results.difference(ours, theirs).effect == pytest.approx(0.5)
    assert results.unit(ours) == "held-out reward accuracy"
    assert analysis.score_of(ours)[0] == analysis.reward_accuracy(ours) == 0.75
    assert analysis.score_of(pairs_result("sft_base", [0.0, 0.0])) == (0.5, 0.0)


def test_a_ruin_ranks_no_pair_right_wherever_it_is_counted():
    ruin, theirs = pairs_result("allo_rates_x", [0.0] * 4), pairs_result("dpo", [1.0] * 3 + [-1.0])
    assert analysis.score_of(ruin)[0] == 0
    assert results.difference(ruin, theirs).effect == pytest.approx(0 - 0.75)


# --- what notebooks look at --------------------------------------------------------------------


def test_the_score_of_a_result_is_its_accuracy(found):
    right = [row[3] for row in found["dpo"]["answers"]]
    share = sum(right) / len(right)
    score, error = analysis.score_of(found["dpo"])
    assert score == pytest.approx(share)
    assert error == pytest.approx((share * (1 - share) / len(right)) ** 0.5)
    assert results.unit(found["dpo"]) == "accuracy"


def test_where_kept_counts_by_layer_and_module():
    import torch

    shapes = {"model.embed_tokens.weight": (4, 5), "model.layers.0.self_attn.q_proj.weight": (2, 5),
              "model.layers.1.mlp.up_proj.weight": (5, 2), "model.norm.weight": (5,)}  # fmt: skip
    kept = {"model.embed_tokens.weight": 5, "model.layers.0.self_attn.q_proj.weight": 1,
            "model.layers.1.mlp.up_proj.weight": 10, "model.norm.weight": 0}  # fmt: skip
    mask = NeuronMask({name: torch.arange(n) for name, n in kept.items()}, shapes, "scalar")
    matrix, layers, modules = analysis.where_kept(mask)
    cells = {
        (layer, module): matrix[i, j]
        for i, layer in enumerate(layers)
        for j, module in enumerate(modules)
        if not np.isnan(matrix[i, j])
    }
    assert cells == {
        ("model", "embed_tokens"): 0.25, ("layer 0", "q_proj"): 0.1,
        ("layer 1", "up_proj"): 1.0, ("model", "norm"): 0.0,
    }  # fmt: skip


def test_layers_are_in_the_order_of_the_model():
    import torch

    names = ["model.norm.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(12))]
    shapes = {name: (2,) for name in sorted(names)}  # as safetensors lists them: 10 before 2
    mask = NeuronMask({name: torch.arange(1) for name in shapes}, shapes, "scalar")
    layers = analysis.where_kept(mask)[1]
    assert layers == ["model", *(f"layer {i}" for i in range(12))]


def test_the_map_of_a_real_mask_adds_up(study):
    mask = study.mask(DOMAIN, "top", 0.1)
    matrix, layers, modules = analysis.where_kept(mask)
    assert layers == ["model", "layer 0", "layer 1"] and "q_proj" in modules
    assert np.nanmin(matrix) >= 0 and np.nanmax(matrix) <= 1
    assert neurons.chance_overlap(0.1) == pytest.approx(0.1 / 1.9)


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
