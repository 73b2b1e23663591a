"""Comparisons on outcomes: pairing by problem and replicate, data sets, models, intervals."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from allo_lib.evaluation import outcomes, published
from allo_lib.evaluation.comparisons import Domain, StudyResults, paper_effect
from tests import synthetic_results

MINI = Domain("miniature", ("chain", "scan"))
CHAIN = MINI.only("chain")


def made(values: dict, margins: dict | None = None, models: int = 1) -> StudyResults:
    """Results of (model, method, data set) -> outcomes [replicates, problems], NaN: not run."""
    rows = [
        (model, replicate, method, "miniature", dataset, f"p{i}", bool(right), True, None)
        for (model, method, dataset), runs in values.items()
        for replicate, run in enumerate(np.atleast_2d(np.array(runs, dtype=float)))
        for i, right in enumerate(run)
        if not np.isnan(right)
    ]
    rows += [
        (model, 0, method, "miniature", "miniature", f"h{i}", margin > 0, True, margin)
        for (model, method), run in (margins or {}).items()
        for i, margin in enumerate(run)
    ]
    return StudyResults(pd.DataFrame(rows, columns=outcomes.COLUMNS), (), models)


def test_a_difference_by_hand():
    """Two replicates of two data sets, which count equally whatever their size."""
    found = made({
        (0, "allo", "chain"): [[1, 1, 0, 1], [1, 0, 0, 1]],
        (0, "dpo", "chain"): [[0, 1, 1, 0], [0, 0, 0, 0]],
        (0, "allo", "scan"): [[0, 1], [1, 1]],
        (0, "dpo", "scan"): [[0, 1], [1, 0]],
    })  # fmt: skip
    chain, scan = np.array([1.0, 0.0, -0.5, 1.0]), np.array([0.0, 0.5])
    gap = found.compare("allo", "dpo", MINI)
    assert gap.effect == (chain.mean() + scan.mean()) / 2 and gap.n == 6
    variance = sum(np.var([*one, 1, -1]) / (len(one) + 2) for one in (chain, scan))
    assert gap.errors == pytest.approx([variance**0.5 / 2])
    assert found.compare("dpo", "allo", MINI).effect == -gap.effect
    assert found.score("allo", MINI).effect == (5 / 8 + 3 / 4) / 2
    assert found.compare("allo", "dpo", MINI.only("scan")).effect == 0.25
    relative = found.compare("allo", "dpo", MINI, relative=True)
    assert relative.effect == pytest.approx(gap.effect / ((2 / 8 + 2 / 4) / 2))


def test_methods_are_paired_in_the_replicates_and_problems_that_both_have():
    none = [np.nan] * 4
    found = made({
        (0, "allo", "chain"): [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]],
        (0, "ipo", "chain"): [none, none, [1, 0, 0, 0]],
        (0, "npo", "chain"): [none, [1, 1, 1, 1], none],
    })  # fmt: skip
    assert found.compare("allo", "ipo", CHAIN).effect == 0.25
    assert found.compare("ipo", "npo", CHAIN) is None and found.compare("allo", "x", CHAIN) is None
    assert found.runs("allo", CHAIN) == [0.75, 0.0, 0.5] and found.runs("ipo", CHAIN) == [0.25]
    assert found.score("ipo", CHAIN).effect == 0.25


def test_models_are_counted_that_have_both_methods_on_all_data_sets():
    values = {
        (model, method, dataset): run
        for model in range(3)
        for method, run in (("allo", [1, 1]), ("dpo", [1, 0]))
        for dataset in ("chain", "scan")
    }
    del values[1, "dpo", "scan"]
    found = made(values, models=2)
    assert (found.seeds, found.left_out, found.domains) == ([0, 1], [2], [MINI])
    assert found.compare("allo", "dpo", MINI).seeds == found.score("dpo", MINI).seeds == (0,)
    assert found.datasets_of("dpo", MINI) == ["chain", "scan"]


def test_held_out_losses_are_paired_pair_by_pair():
    margins = {(0, "dpo"): [0.5, -1.0, 0.0], (0, "dpo_top10"): [1.0, 0.0, 0.0]}
    found = made({(0, "dpo", "chain"): [[1]]}, margins)
    ours, theirs = (-np.log(1 / (1 + np.exp(-np.array(m)))) for m in margins.values())
    gap = found.loss_reduction("dpo_top10", "dpo", MINI)
    assert gap.effect == pytest.approx(np.mean(ours - theirs)) and gap.n == 3
    assert gap.errors == pytest.approx([np.std(ours - theirs) / 3**0.5])
    assert found.loss_reduction("dpo_top10", "npo", MINI) is None


def test_domains_stand_in_order_and_one_of_pairs_counts_those_ranked_right():
    found = synthetic_results.joined(
        ("helpfulness", ()), ("maths", ("math", "gsm8k")), ("own", "b"), n=200
    )
    assert [(d.name, d.datasets, d.unit) for d in found.domains] == [
        ("maths", ("gsm8k", "math"), "accuracy"),
        ("helpfulness", ("helpfulness",), "held-out reward accuracy"),
        ("own", ("b",), "accuracy"),
    ]
    gap = found.compare("allo", "dpo", found.domains[1])
    assert gap.effect == pytest.approx(0.10)
    assert found.score("dpo", found.domains[1]).effect == pytest.approx(0.70)


def test_the_chance_of_improvement_counts_pairs_of_runs_and_half_the_ties():
    ours, theirs = [[1, 1], [1, 0]], [[1, 0], [1, 0]]  # runs of 1 and .5 against two of .5
    found = made({(0, "allo", "chain"): ours, (0, "sft", "chain"): theirs,
                  (1, "allo", "chain"): theirs, (1, "sft", "chain"): theirs,
                  (2, "allo", "chain"): [[0, 0]], (2, "sft", "chain"): theirs},
                 models=3)  # fmt: skip
    chance = found.improvement("allo", "sft", CHAIN)
    assert chance.by_seed == (0.75, 0.5, 0.0) and chance.effect == pytest.approx(1.25 / 3)
    assert (chance.low, chance.high) == (0.0, 1.0)  # of three models: cut to what it can be


def test_relative_changes_match_a_bootstrap_over_listed_problems():
    rng = np.random.default_rng(8)
    hard = rng.random(500)
    ours, theirs = (0.7 * hard + 0.3 * rng.random(500) < share for share in (0.6, 0.5))
    found = made({(0, "allo", "chain"): ours, (0, "dpo", "chain"): theirs})
    change = found.compare("allo", "dpo", CHAIN, relative=True)
    listed = scipy_stats.bootstrap(
        (ours.astype(float), theirs.astype(float)),
        lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis) - 1,
        paired=True, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert change.effect == pytest.approx(ours.mean() / theirs.mean() - 1)
    assert (change.low, change.high) == pytest.approx((listed.low, listed.high), abs=0.01)
    nothing = made({(0, "allo", "chain"): [[1, 0]], (0, "dpo", "chain"): [[0, 0]]})
    assert nothing.compare("allo", "dpo", CHAIN, relative=True) is None


def test_win_rates_are_compared_model_by_model_as_independent():
    rows = [
        outcomes.Measurement(seed, method, "arena_hard", "win_rate", value, error, 50)
        for seed, pair in enumerate(((0.6, 0.5), (0.58, 0.46), (0.7, 0.54)))
        for method, value, error in zip(("allo", "dpo"), pair, (0.03, 0.04), strict=True)
    ]
    found = StudyResults(pd.DataFrame(columns=outcomes.COLUMNS), rows, 3)
    (domain,) = found.domains
    gap = found.compare("allo", "dpo", domain)
    assert gap.by_seed == pytest.approx((0.1, 0.12, 0.16)) and domain.unit == "win rate"
    assert gap.errors == pytest.approx([0.05] * 3) and gap.n == 150
    change = found.compare("allo", "dpo", domain, relative=True)
    assert change.by_seed == pytest.approx((0.6 / 0.5 - 1, 0.58 / 0.46 - 1, 0.7 / 0.54 - 1))
    assert found.score("allo", domain).effect == pytest.approx((0.6 + 0.58 + 0.7) / 3)
    assert found.datasets_of("allo", domain) == ["arena_hard"]


def test_the_papers_numbers_are_fractions_and_its_effect_on_the_same_data_sets_or_its_eight():
    table = published.main_results()
    assert list(table) == list(published.LABELS)
    assert table["allo"]["ecqa"] == pytest.approx(0.7593)
    assert table["sft_base"]["arena_hard"] == pytest.approx(0.5)
    assert published.empirical_study()["dpo_top10"]["ecqa"] == pytest.approx(0.76)
    mean = table["allo"]["qa_avg"] - table["dpo"]["qa_avg"]
    eight = [table["allo"][s] - table["dpo"][s] for s in published.QUESTIONS + published.MATHS]
    for domain, effect in {
        Domain("questions", published.QUESTIONS): pytest.approx(mean, abs=2e-4),
        MINI: pytest.approx(np.mean(eight)),
        Domain("helpfulness", ("helpfulness",), "reward_"): None,
    }.items():
        assert paper_effect("allo", "dpo", domain) == effect
    assert paper_effect("allo", "allo_random_tokens", MINI) is None
