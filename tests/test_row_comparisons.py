"""ALLO against every other row: planted effects are found, corrected, and told as what they are."""

import dataclasses

import pytest

from allo_lib import claims, published, row_comparisons
from allo_lib.multiple import holm
from allo_lib.row_comparisons import AVERAGES, SINGLE, claims_table, compare_rows
from allo_lib.stats import LEVEL
from allo_lib.verdicts import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from tests import synthetic_results
from tests.test_claims import EFFICIENCY

OTHERS = [method for method in published.LABELS if method != "allo"]


@pytest.fixture(scope="module")
def rows():
    return synthetic_results.rows()


@pytest.fixture(scope="module")
def found(rows):
    return {(one.dataset, one.baseline): one for one in compare_rows(rows)}


def planted(monkeypatch, seeds=(0, 1, 2), datasets=("ecqa", "qasc"), n=1000, **accuracy):
    monkeypatch.setattr(synthetic_results, "ACCURACY", synthetic_results.ACCURACY | accuracy)
    rows = synthetic_results.rows(seeds, datasets, n=n)
    return {(one.dataset, one.baseline): one for one in compare_rows(rows)}


def test_every_row_and_data_set_is_there_once(found):
    columns = ("chain", "scan", "story", "average")
    assert list(found) == [(column, method) for column in columns for method in OTHERS]
    assert {one.family for one in found.values() if one.dataset == "average"} == {AVERAGES}
    assert {one.family for one in found.values() if one.dataset != "average"} == {SINGLE}


def test_effects_are_the_planted_ones_and_their_verdicts_survive(found):
    accuracy = synthetic_results.ACCURACY
    for baseline in ("sft_base", "sft", "dpo"):
        one = found["average", baseline]
        assert one.interval.effect == pytest.approx(accuracy["allo"] - accuracy[baseline], abs=0.01)
        assert one.interval.low < one.interval.effect < one.interval.high
        assert one.verdict == one.verdict_after == REPRODUCED and one.p < one.adjusted < 0.05


def test_no_effect_is_never_reproduced(monkeypatch):
    # Correlated outcomes of equal accuracy, so that only the problems' noise is left.
    found = planted(monkeypatch, datasets=("chain",), sft=0.80, rft=0.80, dpo=0.80)
    for baseline in ("sft", "rft", "dpo"):
        interval = found["chain", baseline].interval
        assert interval.low < 0 < interval.high and abs(interval.effect) < 1e-9
    # The paper's advantage over DPO (+1.1) is too small to be ruled out, those over SFT and RFT
    # (+3.7, +3.5) are: twice that of the interval's end.
    dpo, sft, rft = (found["chain", name] for name in ("dpo", "sft", "rft"))
    assert dpo.verdict == dpo.verdict_after == INCONCLUSIVE and dpo.p > 0.05
    assert sft.verdict_after == rft.verdict_after == NOT_REPRODUCED


def test_the_verdict_is_on_the_papers_own_sign(monkeypatch):
    # In the paper ALLO is below IPO on GSM8k (56.6, 58.0) and above DPO on MATH (13.0, 12.2).
    worse = planted(monkeypatch, datasets=("gsm8k",), ipo=0.9, simpo=0.7)
    assert worse["gsm8k", "ipo"].paper == pytest.approx(-0.014)
    assert worse["gsm8k", "ipo"].interval.effect < 0
    assert worse["gsm8k", "ipo"].verdict == REPRODUCED
    assert worse["gsm8k", "simpo"].paper < 0 < worse["gsm8k", "simpo"].interval.effect
    assert worse["gsm8k", "simpo"].verdict == NOT_REPRODUCED


def test_each_family_is_corrected_by_itself(found):
    for family in (AVERAGES, SINGLE):
        own = [one for one in found.values() if one.family == family and one.p is not None]
        assert [one.adjusted for one in own] == holm([one.p for one in own])
        assert len(own) == {AVERAGES: 3, SINGLE: 9}[family]


def test_a_weak_verdict_is_lost_among_many(monkeypatch):
    found = planted(monkeypatch, seeds=(0,), datasets=("ecqa",), n=400, sft=0.745, rft=0.80,
                    rdpo=0.80, ipo=0.80, bco=0.80, simpo=0.80, npo=0.80, ppo=0.80)  # fmt: skip
    lost = [one for one in found.values() if one.verdict != one.verdict_after]
    for one in lost:
        assert one.p < 1 - LEVEL <= one.adjusted and one.verdict_after == INCONCLUSIVE
    kept = [one for one in found.values() if one.interval and one not in lost]
    assert all((one.adjusted < 1 - LEVEL) == (one.verdict != INCONCLUSIVE) for one in kept)


def test_without_paired_counts_two_accuracies_are_independent_and_said_to_be(rows, found):
    alone = [row for row in rows if row.metric == "accuracy"]
    bare = {(one.dataset, one.baseline): one for one in compare_rows(alone)}["average", "dpo"]
    paired = found["average", "dpo"]
    assert "hierarchical unpaired bootstrap" in bare.interval.kind
    assert "hierarchical paired bootstrap" in paired.interval.kind
    assert bare.interval.effect == pytest.approx(paired.interval.effect)
    # The methods of the made-up results find the same problems hard: pairing is worth something.
    width = bare.interval.high - bare.interval.low
    assert width > 1.2 * (paired.interval.high - paired.interval.low)
    # Independent formula: the standard error of a difference of two means of 9 proportions.
    share = {m: synthetic_results.ACCURACY[m] for m in ("allo", "dpo")}
    error = sum(p * (1 - p) for p in share.values()) ** 0.5 / 9000**0.5
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_what_was_not_run_is_empty_with_its_reason(rows):
    table = row_comparisons.row_comparisons(rows)
    ipo = [record for record in table.records if record["baseline"] == "ipo"]
    assert len(ipo) == 4 and {record["verdict"] for record in ipo} == {""}
    assert {record["effect"] for record in ipo} == {None}
    assert {r["reason"] for r in ipo} == {"ipo: not among the methods of this run"}
    assert len(table.body) == 12
    for words in ("Holm's method in two families", "3 comparisons on averages", "the 9 on single"):
        assert words in table.caption
    without = [row for row in rows if row.method != "allo" and not row.metric.endswith(":allo")]
    reasons = {record["reason"] for record in row_comparisons.row_comparisons(without).records}
    assert reasons == {"allo: not among the methods of this run"}


def test_the_paper_stands_beside_with_the_same_effect(monkeypatch):
    found = planted(monkeypatch)
    assert found["ecqa", "dpo"].paper == pytest.approx(0.7593 - 0.7507)
    mean = (0.7593 + 0.6231) / 2 - (0.7507 + 0.6037) / 2
    assert found["average", "dpo"].paper == pytest.approx(mean)


# --- the claims, corrected for one another -----------------------------------------------------


def test_claims_keep_their_verdicts_only_below_five_per_cent(rows):
    computed = claims.compute(rows, EFFICIENCY)
    table = claims_table(computed)
    records = {record["id"]: record for record in table.records}
    assert list(records) == [claim.id for claim in computed]
    known = [claim for claim in computed if claim.p is not None]
    expected = dict(zip((c.id for c in known), holm([c.p for c in known]), strict=True))
    for claim in computed:
        record = records[claim.id]
        assert record["verdict"] == claim.verdict and record["p_holm"] == expected.get(claim.id)
        small = expected.get(claim.id, 0) < 0.05
        assert record["verdict_holm"] == (claim.verdict if small else INCONCLUSIVE)
    assert records["C4"]["verdict_holm"] == REPRODUCED  # planted
    assert records["C6"]["verdict_holm"] == INCONCLUSIVE  # planted without an effect
    assert f"over the {len(known)} claims" in table.caption


def test_the_p_value_of_a_claim_agrees_with_its_interval(rows):
    for claim in claims.compute(rows, EFFICIENCY):
        if claim.verdict == REPRODUCED:
            assert claim.p < 0.05, claim
        # Parts that were not run cannot support C5, however small the p of the others.
        elif claim.id == "C5":
            assert claim.p > 0.05


def test_a_claim_that_fails_by_one_of_its_parts_pays_for_all_of_them(rows):
    from allo_lib.claims import Part, _p
    from allo_lib.stats import mean_interval

    interval = mean_interval({0: 0.1, 1: 0.2})
    parts = [Part("a", interval, REPRODUCED, p=(0.01, 0.9)),
             Part("b", interval, NOT_REPRODUCED, p=(0.99, 0.02)),
             Part("c", None, INCONCLUSIVE)]  # fmt: skip
    assert _p(NOT_REPRODUCED, parts) == pytest.approx(0.04)
    assert _p(REPRODUCED, parts[:1]) == 0.01 and _p(INCONCLUSIVE, parts[2:]) is None
    assert _p(REPRODUCED, [parts[0], dataclasses.replace(parts[0], p=(0.03, 0.9))]) == 0.03


def test_memory_decides_cost_without_chance():
    (claim,) = claims.efficiency_claims([EFFICIENCY[0] | {"state_bytes_per_parameter": "10"},
                                         EFFICIENCY[1]])  # fmt: skip
    ((adjusted, verdict),) = claims.corrected([claim])
    assert (claim.p, adjusted, verdict) == (None, None, NOT_REPRODUCED)
