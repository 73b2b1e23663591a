"""ALLO against every other row: planted effects are found, corrected, and told as what they are."""

import pytest
from test_claims import EFFICIENCY

from allo_lib.evaluation import claims, published
from allo_lib.evaluation.stats import holm
from allo_lib.evaluation.verdicts import CONTRADICTED, NO_DIFFERENCE, RULE, SUPPORTED, UNDECIDED
from allo_lib.report import row_comparisons
from allo_lib.report.row_comparisons import AVERAGES, SINGLE, claims_table, compare_rows
from tests import synthetic_results

OTHERS = [method for method in published.LABELS if method != "allo"]


@pytest.fixture(scope="module")
def results():
    return synthetic_results.results()


@pytest.fixture(scope="module")
def found(results):
    return {(one.dataset, one.baseline): one for one in compare_rows(results)}


def planted(monkeypatch, models=(0, 1, 2), datasets=("ecqa", "qasc"), n=1000, **accuracy):
    accuracy = {"allo": 0.80, "dpo": 0.70} | accuracy
    monkeypatch.setattr(synthetic_results, "ACCURACY", accuracy)
    results = synthetic_results.results(models, "questions", datasets=datasets, n=n)
    return {(one.dataset, one.baseline): one for one in compare_rows(results)}


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
        assert one.verdict == SUPPORTED and one.p.sign <= one.sign < 0.05


def test_no_effect_is_no_difference_where_problems_are_many(monkeypatch):
    # Correlated outcomes of equal accuracy, so that only the problems' noise is left.
    few = planted(monkeypatch, datasets=("chain",), sft=0.80, dpo=0.80)["chain", "sft"]
    assert few.interval.low < 0 < few.interval.high and abs(few.interval.effect) < 1e-9
    assert few.verdict == UNDECIDED
    many = planted(monkeypatch, datasets=("chain",), n=9000, sft=0.80, dpo=0.7995)
    assert many["chain", "sft"].verdict == many["chain", "dpo"].verdict == NO_DIFFERENCE
    assert many["chain", "sft"].tags == ["published effect outside the interval"]


def test_one_model_decides_nothing(monkeypatch):
    found = planted(monkeypatch, models=(0,), sft=0.2)
    one = found["ecqa", "sft"]
    assert one.interval.low > 0.5 and (one.verdict, one.p, one.tags) == (UNDECIDED, None, [])
    assert "over problems alone" in one.interval.kind


def test_a_row_above_allo_contradicts_it_also_where_the_paper_says_so(monkeypatch):
    # In the paper ALLO is below IPO on GSM8k (56.6, 58.0).
    worse = planted(monkeypatch, datasets=("gsm8k",), n=3000, ipo=0.814)["gsm8k", "ipo"]
    assert worse.paper == pytest.approx(-0.014) == worse.interval.effect
    assert worse.verdict == CONTRADICTED
    assert worse.tags == ["published effect inside the interval"]


def test_each_family_is_corrected_by_itself(found):
    for family in (AVERAGES, SINGLE):
        own = [one for one in found.values() if one.family == family and one.p]
        assert [one.sign for one in own] == holm([one.p.sign for one in own])
        assert [one.small for one in own] == holm([one.p.small for one in own])
        assert len(own) == {AVERAGES: 3, SINGLE: 9}[family]


def test_a_weak_difference_is_lost_among_many(monkeypatch):
    shares = dict.fromkeys(("rft", "rdpo", "ipo", "bco", "simpo", "npo", "ppo", "a2c"), 0.80)
    found = planted(monkeypatch, datasets=("ecqa",), n=400, sft=0.7775, **shares)["ecqa", "sft"]
    assert found.interval.low > 0 and found.p.sign < 0.05 <= found.sign
    assert found.verdict == UNDECIDED


def test_fewer_models_than_fixed_decide_nothing_yet():
    few = synthetic_results.results()
    few.models = 8
    one = next(one for one in compare_rows(few) if one.baseline == "dpo")
    assert one.interval.low > 0 and (one.verdict, one.p) == (UNDECIDED, None)


def test_what_was_not_run_is_empty_with_its_reason(results, monkeypatch):
    table = row_comparisons.row_comparisons(results)
    ipo = [record for record in table.records if record["baseline"] == "ipo"]
    assert len(ipo) == 4 and {record["verdict"] for record in ipo} == {""}
    assert {record["effect"] for record in ipo} == {None}
    assert {r["reason"] for r in ipo} == {"ipo: not among the methods of this run"}
    assert len(table.body) == 12
    for words in ("Holm's method in two families", "3 comparisons on averages", "the 9 on single"):
        assert words in table.caption
    monkeypatch.setattr(synthetic_results, "ACCURACY", {"dpo": 0.7})
    without = row_comparisons.row_comparisons(synthetic_results.results(n=50))
    reasons = {record["reason"] for record in without.records}
    assert reasons == {"allo: not among the methods of this run"}


def test_the_paper_stands_beside_with_the_same_effect(monkeypatch):
    found = planted(monkeypatch)
    assert found["ecqa", "dpo"].paper == pytest.approx(0.7593 - 0.7507)
    mean = (0.7593 + 0.6231) / 2 - (0.7507 + 0.6037) / 2
    assert found["average", "dpo"].paper == pytest.approx(mean)


# --- the claims, corrected for one another -----------------------------------------------------


def test_claims_are_corrected_within_their_families(results):
    computed = {claim.id: claim for claim in claims.compute(results, EFFICIENCY)}
    primary = "C1 C2 C3 C4s C5 C6 C7 C8 C9".split()
    adjusted = holm([computed[name].p.sign for name in primary])
    assert [computed[name].sign for name in primary] == adjusted
    single = ["C1p", "C2p", "C3p"]
    assert [computed[name].sign for name in single] == holm(
        [computed[name].p.sign for name in single]
    )
    # C4 pays as if it were a tenth claim of the first family, which pays nothing for it.
    more = holm([computed[name].p.sign for name in (*primary, "C4")])
    assert computed["C4"].sign == more[-1] and computed["C4"].family == "secondary"
    assert {claim.family for claim in computed.values()} == {
        "primary", "secondary", "paper's protocol", "equal updates", "costs"
    }  # fmt: skip


def test_the_table_of_verdicts_has_the_rule_and_every_p(results):
    computed = claims.compute(results, EFFICIENCY)
    table = claims_table(computed)
    records = {record["id"]: record for record in table.records}
    assert list(records) == [claim.id for claim in computed] and RULE in table.caption
    for claim in computed:
        record = records[claim.id]
        assert record["verdict"] == claim.verdict and record["p_holm"] == claim.sign
        assert record["tags"] == "; ".join(claim.tags)
        if claim.verdict in (SUPPORTED, CONTRADICTED) and claim.p:
            assert record["p"] <= record["p_holm"] < 0.05
    assert records["C4"]["verdict"] == SUPPORTED  # planted
    assert records["C6"]["verdict"] == UNDECIDED  # planted without an effect
