"""Verdicts: planted effects get theirs, and no effect gets none."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from allo_lib.errors import AlloError
from allo_lib.evaluation import claims
from allo_lib.evaluation.comparisons import StudyResults
from allo_lib.evaluation.verdicts import (
    CONTRADICTED,
    NO_DIFFERENCE,
    SUPPORTED,
    UNDECIDED,
    corrected,
)
from allo_lib.report import tables
from tests import synthetic_results

IDS = "C1 C1p C2 C2p C2s C3 C3p C3s C4 C4s C5 C6 C7 C8 C9 C10".split()
COSTS = ("variant", "seconds_per_pair", "seconds_per_pair_each", "peak_bytes_above_model",
         "state_bytes_per_parameter", "device")  # fmt: skip
EFFICIENCY = [
    dict(zip(COSTS, (*cells, "cpu"), strict=True))
    for cells in (
        ("allo_scalar", "0.2", "0.19 0.2 0.21", "1000", "1.6"),
        ("dense_masked", "0.3", "0.29 0.3 0.32", "3000", "10"),
    )
]


@pytest.fixture(scope="module")
def table():
    return synthetic_results.table()


@pytest.fixture(scope="module")
def rows():
    return synthetic_results.rows()


@pytest.fixture(scope="module")
def by_id(table, rows):
    return computed(StudyResults(table, rows, 3), EFFICIENCY)


def computed(results, efficiency=()):
    return {claim.id: claim for claim in claims.compute(results, efficiency)}


def wholes(found):
    return [claim.id for claim in found if claim.whole == claim.id]


def test_every_claim_has_one_row_in_order_and_its_parts_behind_it(by_id):
    assert wholes(by_id.values()) == IDS
    parts = {name: [one.id for one in by_id.values() if one.whole == name] for name in IDS}
    assert parts["C2"] == ["C2", "C2.dpo", "C2.dpo_last10"]
    assert parts["C8"] == ["C8", "C8.orders", "C8.halves", "C8.estimators"]
    assert parts["C5"] == ["C5", "C5.sft"] and parts["C4"] == ["C4"]  # what was not run has no row


def test_planted_effects_get_their_verdicts(by_id):
    told = {name: by_id[name].verdict for name in IDS}
    # C5: sft is beaten, the other baselines were not run; C6 is planted without an effect.
    unlike = dict.fromkeys(("C1p", "C2p", "C3", "C3p"), CONTRADICTED)
    unlike |= {"C5": UNDECIDED, "C6": UNDECIDED}
    assert told == dict.fromkeys(IDS, SUPPORTED) | unlike


@pytest.mark.parametrize(
    ("datasets", "start", "dpo", "verdict"),
    [
        (("chain", "scan"), 0.50, 0.70, SUPPORTED),
        (("chain", "scan"), 0.50, 0.50, UNDECIDED),
        (("chain", "scan"), 0.70, 0.70, UNDECIDED),
        # Pairs have no starting accuracy but chance.
        ((), 0.50, 0.70, SUPPORTED),
        ((), 0.50, 0.50, UNDECIDED),
    ],
)
def test_no_worse_than_a_dpo_that_learned_nothing_is_no_finding(
    monkeypatch, datasets, start, dpo, verdict
):
    planted = {"sft_base": start, "dpo": dpo, "dpo_last10": dpo}
    monkeypatch.setattr(synthetic_results, "ACCURACY", planted)
    claim = computed(synthetic_results.results(datasets=datasets, n=3000, pairs=3000))["C3"]
    assert claim.ci_low > -claims.MARGIN and claim.verdict == verdict
    assert ("not shown to beat" in claim.evidence) == (verdict == UNDECIDED)


def test_effects_are_the_planted_ones(by_id):
    accuracy = synthetic_results.ACCURACY
    assert by_id["C4"].effect == pytest.approx(accuracy["allo"] - accuracy["dpo"], abs=0.02)
    assert by_id["C4"].ci_low < by_id["C4"].effect < by_id["C4"].ci_high
    assert by_id["C6"].effect == pytest.approx(0.0, abs=1e-9)
    # Of several parts the smallest effect is shown: here that of the two halves.
    assert by_id["C8"].effect == by_id["C8.halves"].effect
    assert by_id["C8"].effect == pytest.approx(0.12 - synthetic_results.CHANCE, abs=0.01)


def test_evidence_names_models_problems_interval_and_paper(by_id):
    evidence = by_id["C4"].evidence
    for words in ("allo above dpo", "chain, scan, story", "seeds 0, 1, 2", "n = 9000", "by model",
                  "paper +1.14"):  # fmt: skip
        assert words in evidence
    assert by_id["C4"].tags == ("published effect outside the interval",)  # planted: +10
    assert "not measured: allo above rft" in by_id["C5"].evidence
    told = "strongest baseline: sft; probability of improvement over sft 1.00"
    assert told in by_id["C5"].evidence
    for claim in by_id.values():  # every part with its effect and interval
        for part in [part for part in by_id.values() if part.whole == claim.id != part.id]:
            effect = f"{part.effect:+.4f}" if "C8" in part.id else f"{100 * part.effect:+.2f}"
            assert f"{part.claim}: {effect} [" in claim.evidence


def test_the_interval_of_several_parts_is_that_of_the_least_decided_one(by_id):
    parts = [by_id["C7.allo_all_tokens_forgetting"], by_id["C7.allo_all_tokens_learning"]]
    whole = by_id["C7"]
    assert whole.effect == min(part.effect for part in parts)
    assert whole.ci_high == min(part.ci_high for part in parts)
    # That all are above zero takes no correction: it begins at the lowest plain 95% end.
    assert min(part.ci_low for part in parts) < whole.ci_low < whole.effect
    for claim in (whole, *parts):
        assert claim.ci_low < claim.effect < claim.ci_high


def test_a_baseline_of_one_model_alone_moves_no_smallest_effect_and_bars_support(table, rows):
    """RFT is as good as ALLO on one model of three: C5 is about SFT, and is not supported."""
    rft = table[(table["method"] == "allo") & (table["model"] == 0)].assign(method="rft")
    both = pd.concat([table.astype({"method": str}), rft], ignore_index=True)
    found = computed(StudyResults(both, rows, 3))
    for name in ("effect", "ci_low", "ci_high"):
        assert getattr(found["C5"], name) == getattr(found["C5.sft"], name)
    assert found["C5.rft"].effect == 0 and found["C5.rft"].ci_low is None
    assert found["C5"].verdict == found["C5.rft"].verdict == UNDECIDED
    assert "rft: one SFT model decides nothing" in found["C5"].evidence
    assert "strongest baseline of those on several models: sft" in found["C5"].evidence
    assert "1 of 3 models alone, on which no verdict rests" in found["C5.rft"].evidence


def test_the_held_out_loss_is_that_of_the_margins(by_id, table):
    pairs = table[table["margin"].notna()].assign(loss=lambda t: np.log1p(np.exp(-t["margin"])))
    loss = pairs.groupby("method", observed=True)["loss"].mean()
    assert by_id["C1"].effect == pytest.approx(loss["dpo"] - loss["dpo_top10"])
    assert by_id["C1p"].effect == pytest.approx(loss["dpo_paper"] - loss["dpo_top10_paper"])
    assert by_id["C1"].unit == "held-out loss (reduction)"
    assert "held-out loss of dpo minus dpo_top10: +0.1" in by_id["C1"].evidence
    assert "n = 600" in by_id["C1"].evidence


def test_reward_models_make_a_trend(by_id, table):
    """Three qualities: half the difference of the outer two is the slope of the line."""
    accuracy = synthetic_results.ACCURACY
    rise = accuracy["allo_rm_oracle"] - accuracy["allo_rm_shuffled"]
    assert by_id["C9"].effect == pytest.approx(rise, abs=1e-6)
    assert "allo_rm_shuffled < allo < allo_rm_oracle" in by_id["C9"].evidence
    assert "also allo_rm_oracle against allo" in by_id["C9"].evidence
    found = computed(StudyResults(table[table["method"] != "allo_rm_oracle"], (), 3))["C9"]
    assert found.effect == pytest.approx(accuracy["allo"] - accuracy["allo_rm_shuffled"], abs=1e-6)
    assert "allo above allo_rm_shuffled" in found.evidence
    # As in the middle of a run: one of the three is not there on every model.
    early = (table["method"] == "allo_rm_oracle") & (table["model"] == 2)
    assert computed(StudyResults(table[~early], (), 3))["C9"].verdict == UNDECIDED


@pytest.mark.parametrize(
    ("inverted", "verdict"), [(0.70, NO_DIFFERENCE), (0.80, UNDECIDED), (None, UNDECIDED)]
)
def test_no_difference_of_reward_models_needs_a_planted_one_that_is_seen(
    monkeypatch, inverted, verdict
):
    models = dict.fromkeys(("allo", "allo_rm_shuffled", "allo_rm_oracle"), 0.80)
    models |= {"allo_all_tokens_forgetting": 0.80, "allo_all_tokens_learning": 0.70}
    models |= {} if inverted is None else {"allo_rm_inverted": inverted}
    monkeypatch.setattr(synthetic_results, "ACCURACY", models)
    found = computed(synthetic_results.results(datasets=("chain",), n=9000))
    assert found["C9"].verdict == verdict, found["C9"].evidence
    told = "so this assay is insensitive to the choice of tokens"
    not_run = "planted check (allo_rm_inverted) not run: nothing tells what this assay sees"
    for name in ("C9", "C7", "C7.allo_all_tokens_forgetting"):
        assert (told in found[name].evidence) == (verdict == UNDECIDED and inverted is not None)
        assert (not_run in found[name].evidence) == (inverted is None)
    assert told not in found["C7.allo_all_tokens_learning"].evidence


def test_a_refuted_part_refutes_a_claim_with_missing_parts(monkeypatch):
    monkeypatch.setattr(synthetic_results, "ACCURACY", {"allo": 0.6, "sft": 0.75, "rft": 0.5})
    found = computed(synthetic_results.results())["C5"]
    assert found.verdict == CONTRADICTED and found.ci_high < 0
    assert found.effect == pytest.approx(-0.15)


def test_missing_measurements_are_said_and_left_blank(monkeypatch):
    monkeypatch.setattr(synthetic_results, "ACCURACY", {"dpo": 0.7})
    made = synthetic_results.table((0,))
    for results in (StudyResults(made), StudyResults(made[:0])):
        found = claims.compute(results)
        assert [claim.id for claim in found] == IDS
        for claim in found:
            assert claim.verdict == UNDECIDED
            assert claim.effect is None and claim.ci_low is None
            assert claim.evidence.startswith("not measured: ")


def test_one_sft_model_decides_nothing():
    found = claims.compute(synthetic_results.results((0,)), EFFICIENCY)
    measured = [one for one in found if one.effect is not None and one.family != "costs"]
    assert len(measured) > 15
    for claim in measured:
        assert (claim.verdict, claim.ci_low, claim.p) == (UNDECIDED, None, None)
        assert "one SFT model decides nothing" in claim.evidence
    told = {claim.id: claim.evidence for claim in found}["C4"]
    assert "over problems alone" in told and "+10.00 [+" in told


def test_fewer_models_than_were_fixed_decide_nothing_and_more_are_not_counted(table, rows, by_id):
    few = computed(StudyResults(table, rows, 8), EFFICIENCY)
    measured = [one for one in few.values() if one.effect is not None and one.family != "costs"]
    assert len(measured) > 15
    for claim in measured:
        assert (claim.verdict, claim.p) == (UNDECIDED, None)
        assert "3 of 8 models so far, and no verdict before all" in claim.evidence
        assert claim.ci_low == by_id[claim.id].ci_low  # what is known so far is shown
    two = table[table["model"] < 2]
    fewer = computed(StudyResults(two, [row for row in rows if row.seed < 2], 2), EFFICIENCY)
    assert computed(StudyResults(table, rows, 2), EFFICIENCY) == fewer
    assert StudyResults(table, rows, 2).left_out == [2] and fewer["C4"].verdict == SUPPORTED
    later = StudyResults(table, rows, 2, first=1)
    assert (later.seeds, later.left_out) == ([1, 2], [0])
    assert "seeds 1, 2" in computed(later)["C4"].evidence


def test_each_architecture_has_the_claims_of_the_models_that_seeds_give_it(rows):
    table = synthetic_results.table(models=range(4), n=200)
    table["right"] ^= (table["model"] % 2 == 1) & (table["method"] == "allo")
    results = StudyResults(table, synthetic_results.rows(range(4)), 4)
    groups = claims.by_architecture(results, ["gpt2", "qwen3"])
    found = {name: {claim.id: claim for claim in group}["C4s"] for name, group in groups.items()}
    # ALLO is right on 80%, and where that is turned round on 20%, the long DPO on 70%.
    effects = {"gpt2": (pytest.approx(0.1), "seeds 0, 2"), "qwen3": (pytest.approx(-0.5), "1, 3")}
    for name, (effect, seeds) in effects.items():
        assert found[name].effect == effect and seeds in found[name].evidence
    assert [found[name].verdict for name in effects] == [SUPPORTED, CONTRADICTED]
    assert claims.by_architecture(results, ["llama"]) == {}
    later = claims.by_architecture(StudyResults(table, (), 2, first=2), ["gpt2", "qwen3"])
    seeds = [next(c.evidence for c in group if c.id == "C4s") for group in later.values()]
    assert "seed 2" in seeds[0] and "seed 3" in seeds[1]


def test_a_second_domain_adds_claims_with_its_name():
    results = synthetic_results.joined(("helpfulness", ()), ("questions", ("ecqa",)))
    found = computed(results)
    others = {f"{name}:helpfulness" for name in IDS if name != "C10"}
    assert set(wholes(found.values())) == set(IDS) | others
    assert found["C2.dpo:helpfulness"].whole == "C2:helpfulness"
    assert found["C4"].unit == "accuracy" and "paper +0.86" in found["C4"].evidence
    assert found["C4:helpfulness"].unit == "held-out reward accuracy"
    assert "paper" not in found["C4:helpfulness"].evidence


def test_a_domain_of_fewer_models_is_judged_by_these_alone():
    results = synthetic_results.joined(("questions", ("ecqa",)), ("maths", ("gsm8k",)), n=200)
    results.by_domain = {"maths": 1}
    found = computed(results)
    assert found["C4s"].verdict == SUPPORTED and "seeds 0, 1, 2" in found["C4s"].evidence
    assert found["C4s:maths"].verdict == UNDECIDED and "seed 0" in found["C4s:maths"].evidence
    assert "one SFT model decides nothing" in found["C4s:maths"].evidence
    made = {table.name: table.caption for table in tables.build(results)}
    assert "One SFT model (seed 0)" in made["main_maths"] and "0, 1, 2" in made["main_questions"]


@pytest.mark.parametrize(
    ("ours", "dense", "changes", "verdict"),
    [
        ("0.2 0.21 0.19", "0.3 0.32 0.29", {}, SUPPORTED),
        ("0.2 0.31 0.19", "0.3 0.29 0.29", {}, UNDECIDED),
        ("0.3 0.32 0.29", "0.2 0.21 0.19", {}, CONTRADICTED),
        ("0.2 0.21 0.19", "0.3 0.32 0.29", {"peak_bytes_above_model": ""}, UNDECIDED),
        ("0.2 0.21 0.19", "0.3 0.32 0.29", {"peak_bytes_above_model": "4000"}, CONTRADICTED),
        ("0.2 0.21 0.19", "0.3 0.32 0.29", {"peak_bytes_above_model": "3030"}, UNDECIDED),
        ("0.2 0.21 0.19", "0.3 0.32 0.29", {"peak_bytes_above_model": "2970"}, UNDECIDED),
    ],
)
def test_the_times_of_the_processes_give_a_t_interval(ours, dense, changes, verdict):
    from scipy.stats import ttest_rel

    table = [
        row | {"seconds_per_pair_each": each}
        for row, each in zip((EFFICIENCY[0] | changes, EFFICIENCY[1]), (ours, dense), strict=True)
    ]
    (claim,) = corrected([claims.efficiency_claim(table)])
    logs = [np.log([float(time) for time in times.split()]) for times in (dense, ours)]
    ends = ttest_rel(*logs).confidence_interval(0.95)
    assert (claim.ci_low, claim.ci_high) == pytest.approx((ends.low, ends.high))
    assert claim.verdict == verdict


def test_one_process_of_each_decides_nothing_of_time_and_cost_may_without_chance():
    once = [row | {"seconds_per_pair_each": row["seconds_per_pair"]} for row in EFFICIENCY]
    (claim,) = corrected([claims.efficiency_claim(once)])
    assert (claim.id, claim.verdict, claim.ci_low, claim.p) == ("C10", UNDECIDED, None, None)
    more = [once[0] | {"state_bytes_per_parameter": "10"}, once[1]]
    (claim,) = corrected([claims.efficiency_claim(more)])
    assert (claim.verdict, claim.p, claim.sign) == (CONTRADICTED, None, None)
    for changes in ({"seconds_per_pair": "0"}, {"seconds_per_pair_each": "0.1 fast"},
                    {"seconds_per_pair": ""}):  # fmt: skip
        with pytest.raises(AlloError, match="efficiency table, cpu: .*; measure it again"):
            claims.efficiency_claim([EFFICIENCY[0] | changes, EFFICIENCY[1]])
    joined = [EFFICIENCY[0] | {"device": "GPU B"}, EFFICIENCY[1]]
    assert "on one device" in claims.efficiency_claim(joined).evidence
    # A machine on which a peak cannot be begun anew.
    none = [row | {"peak_bytes_above_model": "0"} for row in EFFICIENCY]
    for table in (none, [none[0], EFFICIENCY[1]], [EFFICIENCY[0], none[1]]):
        assert "peak memory not measured" in claims.efficiency_claim(table).evidence


def test_protocols_that_disagree_are_told(by_id):
    told = claims.protocol_disagreements(list(by_id.values()))
    assert len(told) == 2  # C1 and C2; C3 fails under both
    assert told[0].startswith("C1 is supported when each method")
    assert "contradicted under the paper's single rate" in told[0]
    unmeasured = dataclasses.replace(by_id["C1p"], verdict="undecided", effect=None)
    assert len(claims.protocol_disagreements([*(by_id | {"C1p": unmeasured}).values()])) == 1


def test_claims_file_comes_back(tmp_path, by_id):
    path = tmp_path / "claims.csv"
    claims.write(path, by_id.values())
    first = path.read_bytes()
    assert first.startswith(b"id,claim,effect,ci_low,ci_high,unit,verdict,evidence\n")
    claims.write(path, claims.read(path))
    assert path.read_bytes() == first and b"\r" not in first
    assert claims.read(path)[0].effect == pytest.approx(by_id["C1"].effect, abs=1e-6)
    # An effect that rounds to zero has no sign of its own.
    claims.write(path, [dataclasses.replace(by_id["C4"], effect=-1e-18)])
    assert ",0.000000," in path.read_text() and "-0.000000" not in path.read_text()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist: run notebook 06_evaluation first"),
        (b"id,effect\nC1,2\n", "has columns .id,effect."),
        (b"HEADER\nC1,text,much,0,1,accuracy,undecided,e\n", "line 2 cannot be read"),
    ],
)
def test_claims_files_that_are_none_are_told_in_one_line(tmp_path, content, told):
    path = tmp_path / "claims.csv"
    if content is not None:
        path.write_bytes(content.replace(b"HEADER", ",".join(claims.COLUMNS).encode()))
    with pytest.raises(AlloError, match=told) as error:
        claims.read(path)
    assert "\n" not in str(error.value)
