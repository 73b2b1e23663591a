"""Verdicts: planted effects get theirs, and no effect gets none."""

import dataclasses

import numpy as np
import pytest

from allo_lib import claims
from allo_lib.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, judge
from allo_lib.errors import AlloError
from allo_lib.measurements import Measurement
from allo_lib.stats import Interval
from allo_lib.table_cells import change_text, plain
from tests import synthetic_results

IDS = "C1 C1p C2 C2p C3 C3p C4 C4s C5 C6 C7 C8 C9 C10".split()
EFFICIENCY = [
    {
        "variant": variant,
        "device": "cpu",
        "seconds_per_pair": seconds,
        "peak_bytes_above_model": peak,
        "state_bytes_per_parameter": state,
        "seconds_per_pair_low": str(float(seconds) * 0.95),
        "seconds_per_pair_high": str(float(seconds) * 1.05),
    }
    for variant, seconds, peak, state in (
        ("allo_scalar", "0.2", "1000", "1.6"),
        ("dense_masked", "0.3", "3000", "10"),
    )
]


@pytest.fixture(scope="module")
def rows():
    return synthetic_results.rows()


@pytest.fixture(scope="module")
def by_id(rows):
    return {claim.id: claim for claim in claims.compute(rows, EFFICIENCY)}


def interval(effect, low, high):
    return Interval(effect, low, high, "planted", (0,), 100)


@pytest.mark.parametrize(
    ("low", "high", "kind", "paper", "verdict"),
    [
        (0.001, 0.03, "above", None, REPRODUCED),
        (0.0, 0.03, "above", None, INCONCLUSIVE),
        (-0.01, 0.03, "above", None, INCONCLUSIVE),
        (-0.03, -0.001, "above", None, NOT_REPRODUCED),
        (-0.01, 0.009, "above", 0.02, NOT_REPRODUCED),  # ends below half the paper's effect
        (-0.01, 0.011, "above", 0.02, INCONCLUSIVE),
        (0.001, 0.009, "above", 0.02, REPRODUCED),
        (-0.01, 0.009, "above", -0.02, INCONCLUSIVE),  # the paper itself has the other sign
        (-0.019, 0.01, "no worse", None, REPRODUCED),
        (-0.021, 0.01, "no worse", None, INCONCLUSIVE),
        (-0.05, -0.021, "no worse", None, NOT_REPRODUCED),
        (-0.05, -0.01, "no worse", 0.1, INCONCLUSIVE),
    ],
)
def test_judge_follows_its_rule(low, high, kind, paper, verdict):
    assert judge(interval((low + high) / 2, low, high), kind, paper)[0] == verdict


def test_without_an_interval_nothing_is_decided():
    assert judge(None, "above")[0] == INCONCLUSIVE
    assert judge(interval(0.5, float("nan"), float("nan")), "above")[0] == INCONCLUSIVE


def test_every_claim_has_one_row_in_order(by_id):
    assert list(by_id) == IDS


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("C1", REPRODUCED),
        ("C1p", NOT_REPRODUCED),
        ("C2", REPRODUCED),
        ("C2p", NOT_REPRODUCED),
        ("C3", NOT_REPRODUCED),
        ("C3p", NOT_REPRODUCED),
        ("C4", REPRODUCED),
        ("C4s", REPRODUCED),
        ("C5", INCONCLUSIVE),  # sft is beaten, the other baselines were not run
        ("C6", INCONCLUSIVE),  # planted without an effect
        ("C7", REPRODUCED),
        ("C8", REPRODUCED),
        ("C9", REPRODUCED),
        ("C10", REPRODUCED),
    ],
)
def test_planted_effects_get_their_verdicts(by_id, name, verdict):
    assert by_id[name].verdict == verdict, by_id[name].evidence


@pytest.mark.parametrize(
    ("prefix", "datasets", "start", "dpo", "verdict"),
    [
        ("", ("chain", "scan"), 0.50, 0.70, REPRODUCED),
        ("", ("chain", "scan"), 0.50, 0.50, INCONCLUSIVE),
        ("", ("chain", "scan"), 0.70, 0.70, INCONCLUSIVE),
        # Pairs have no starting accuracy but chance.
        ("reward_", ("hh_helpful",), 0.50, 0.70, REPRODUCED),
        ("reward_", ("hh_helpful",), 0.50, 0.50, INCONCLUSIVE),
    ],
)
def test_no_worse_than_a_dpo_that_learned_nothing_is_no_finding(
    monkeypatch, prefix, datasets, start, dpo, verdict
):
    changed = {"sft_base": start, "dpo": dpo, "dpo_last10": dpo}
    monkeypatch.setattr(synthetic_results, "ACCURACY", synthetic_results.ACCURACY | changed)
    found = claims.compute(synthetic_results.rows(datasets=datasets, n=3000, prefix=prefix))
    claim = next(claim for claim in found if claim.id == "C3")
    assert claim.ci_low > -claims.MARGIN and claim.verdict == verdict
    assert ("not shown to beat" in claim.evidence) == (verdict == INCONCLUSIVE)


def test_effects_are_the_planted_ones(by_id):
    accuracy = synthetic_results.ACCURACY
    assert by_id["C4"].effect == pytest.approx(accuracy["allo"] - accuracy["dpo"], abs=0.02)
    assert by_id["C4"].ci_low < by_id["C4"].effect < by_id["C4"].ci_high
    assert by_id["C6"].effect == pytest.approx(0.0, abs=1e-9)
    assert by_id["C1"].effect == pytest.approx(0.05, abs=0.01)
    # Of several parts the weakest is shown: here the two halves.
    assert by_id["C8"].effect == pytest.approx(0.12 - synthetic_results.CHANCE, abs=0.01)


def test_evidence_names_seeds_problems_interval_and_paper(by_id):
    evidence = by_id["C4"].evidence
    for words in (
        "allo above dpo",
        "chain, scan, story",
        "hierarchical paired bootstrap",
        "seeds 0, 1, 2",
        "n = 9000",
        "by seed",
        "paper +1.14",
    ):
        assert words in evidence
    assert "not measured: allo above rft" in by_id["C5"].evidence
    assert "also allo_rm_oracle against allo" in by_id["C9"].evidence


def test_both_directions_of_a_pair_give_the_same_claim(rows, by_id):
    swapped = []
    for row in rows:
        if row.metric in ("gain_over:dpo", "loss_to:dpo") and row.method == "allo":
            metric = "loss_to:allo" if row.metric == "gain_over:dpo" else "gain_over:allo"
            row = dataclasses.replace(row, method="dpo", metric=metric)
        swapped.append(row)
    mirrored = {claim.id: claim for claim in claims.compute(swapped, EFFICIENCY)}["C4"]
    assert mirrored == by_id["C4"]


def test_a_refuted_part_refutes_a_claim_with_missing_parts(rows):
    worse = [row for row in rows if row.method != "allo" or ":sft" not in row.metric]
    worse += [
        Measurement(seed, "allo", dataset, metric, value, 0.01, 1000)
        for seed in (0, 1, 2)
        for dataset in ("chain", "scan", "story")
        for metric, value in (("gain_over:sft", 0.05), ("loss_to:sft", 0.2))
    ]
    found = {claim.id: claim for claim in claims.compute(worse)}["C5"]
    assert found.verdict == NOT_REPRODUCED
    assert found.effect == pytest.approx(-0.15)


def test_missing_measurements_are_said_and_left_blank():
    bare = [Measurement(0, "dpo", "chain", "accuracy", 0.5, 0.01, 100)]
    found = claims.compute(bare)
    assert [claim.id for claim in found] == IDS
    for claim in found:
        assert claim.verdict == INCONCLUSIVE
        assert claim.effect is None and claim.ci_low is None
        assert claim.evidence.startswith("not measured: ")


def test_one_seed_overlap_has_an_effect_but_no_interval():
    found = {claim.id: claim for claim in claims.compute(synthetic_results.rows(seeds=(0,)))}
    assert found["C8"].effect is not None and found["C8"].ci_low is None
    assert found["C8"].verdict == INCONCLUSIVE
    assert "one seed" in found["C4"].evidence and found["C4"].verdict == REPRODUCED


def test_a_users_own_data_sets_form_a_domain():
    rows = [
        dataclasses.replace(row, dataset={"average": "mine"}.get(row.dataset, "my_" + row.dataset))
        for row in synthetic_results.rows((0, 1), ("a", "b"))
    ]
    found = {claim.id: claim for claim in claims.compute(rows)}
    assert list(found) == IDS
    assert found["C4"].verdict == REPRODUCED and "on other (my_a, my_b)" in found["C4"].evidence
    assert found["C1"].verdict == REPRODUCED
    assert found["C8"].effect > 0


def test_reward_accuracy_of_a_miniature_is_no_domain_of_its_own():
    rows = synthetic_results.rows((0,), ("chain",))
    rows += [Measurement(0, "dpo", "miniature", "reward_accuracy", 0.7, 0.01, 100)]
    assert [claim.id for claim in claims.compute(rows)] == IDS


def test_a_second_domain_adds_claims_with_its_name():
    rows = synthetic_results.rows((0, 1), ("ecqa",))
    rows += synthetic_results.rows((0, 1), ("hh_helpful",), prefix="reward_")
    found = {claim.id: claim for claim in claims.compute(rows)}
    assert set(found) == set(IDS) | {f"{name}:helpfulness" for name in IDS if name != "C10"}
    assert found["C4"].unit == "accuracy" and "paper +0.86" in found["C4"].evidence
    assert found["C4:helpfulness"].unit == "held-out reward accuracy"
    assert "paper" not in found["C4:helpfulness"].evidence
    assert found["C1:helpfulness"].verdict == REPRODUCED


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, REPRODUCED),
        ({"seconds_per_pair_low": "", "seconds_per_pair_high": ""}, INCONCLUSIVE),
        ({"peak_bytes_above_model": "4000"}, NOT_REPRODUCED),
        ({"state_bytes_per_parameter": "10"}, NOT_REPRODUCED),
        ({"peak_bytes_above_model": ""}, INCONCLUSIVE),
        (
            {
                "seconds_per_pair": "0.4",
                "seconds_per_pair_low": "0.39",
                "seconds_per_pair_high": "0.41",
            },
            NOT_REPRODUCED,
        ),
    ],
)
def test_cost_needs_time_memory_and_state(changes, verdict):
    (claim,) = claims.efficiency_claims([EFFICIENCY[0] | changes, EFFICIENCY[1]])
    assert (claim.id, claim.verdict) == ("C10", verdict)


def test_protocols_that_disagree_are_told(by_id):
    told = claims.protocol_disagreements(list(by_id.values()))
    assert len(told) == 2  # C1 and C2; C3 fails under both
    assert told[0].startswith("C1 is reproduced when each arm")
    assert "not reproduced under the paper's single rate" in told[0]


def test_wanted_pairs_cover_the_claims_once():
    pairs = claims.wanted_pairs(synthetic_results.ACCURACY)
    for pair in (("allo", "dpo"), ("dpo_top10", "dpo_last10"), ("allo", "allo_rm_shuffled")):
        assert pair in pairs or pair[::-1] in pairs
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert all(set(pair) <= set(synthetic_results.ACCURACY) for pair in pairs)


def test_claims_file_comes_back(tmp_path, by_id):
    path = tmp_path / "claims.csv"
    claims.write(path, by_id.values())
    first = path.read_bytes()
    assert first.startswith(b"id,claim,effect,ci_low,ci_high,unit,verdict,evidence\n")
    claims.write(path, claims.read(path))
    assert path.read_bytes() == first and b"\r" not in first
    assert claims.read(path)[0].effect == pytest.approx(by_id["C1"].effect, abs=1e-6)


def test_an_effect_that_rounds_to_zero_has_no_sign_of_its_own(tmp_path, by_id):
    path = tmp_path / "claims.csv"
    claims.write(path, [dataclasses.replace(by_id["C4"], effect=-1e-18)])
    assert ",0.000000," in path.read_text() and "-0.000000" not in path.read_text()
    assert plain(-1e-18) == "0.000000"
    change = Interval(-1e-18, -0.02, 0.02, "made up", (0,), 9)
    assert change_text(change) == ["+0.00", "[-2.00, +2.00]"]


def test_bad_claims_files_are_named(tmp_path):
    with pytest.raises(AlloError, match="run notebook 06_evaluation first"):
        claims.read(tmp_path / "claims.csv")
    (tmp_path / "claims.csv").write_text("id,effect\nC1,2\n")
    with pytest.raises(AlloError, match="has columns id,effect"):
        claims.read(tmp_path / "claims.csv")


def test_losses_of_one_seed_are_compared_by_their_steps():
    """Student's t over the paired steps, against scipy's own test of the differences."""
    from scipy.stats import ttest_1samp

    gaps = np.array([-0.02, -0.05, -0.01, -0.04, -0.03])
    rows = [
        Measurement(0, "dpo_top10", "questions", "train_loss", 0.57, 0.4, 5),
        Measurement(0, "dpo", "questions", "train_loss", 0.60, 0.4, 5),
        Measurement(0, "dpo", "ecqa", "accuracy", 0.5, 0.1, 9),
    ]
    (unpaired,) = [c for c in claims.compute(rows) if c.id == "C1"]
    assert unpaired.verdict == INCONCLUSIVE
    error = float(gaps.std(ddof=1) / 5**0.5)
    rows.append(
        Measurement(0, "dpo_top10", "questions", "train_loss_minus:dpo", gaps.mean(), error, 5)
    )
    (paired,) = [c for c in claims.compute(rows) if c.id == "C1"]
    ends = ttest_1samp(-gaps, 0).confidence_interval(0.95)
    assert (paired.ci_low, paired.ci_high) == pytest.approx((ends.low, ends.high))
    assert paired.effect == pytest.approx(unpaired.effect) == pytest.approx(0.03)
    assert paired.verdict == REPRODUCED and "5 steps" in paired.evidence


def test_allo_is_paired_with_every_other_method():
    """Row-against-row comparisons need no further rows of measurements."""
    methods = ["sft_base", "sft", "rft", "dpo", "ppo", "a2c", "ipo", "allo", "allo_soft"]
    pairs = {frozenset(pair) for pair in claims.wanted_pairs(methods)}
    assert all(frozenset(("allo", other)) in pairs for other in methods if other != "allo")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe", "run notebook 06_evaluation first"),
        (b"", "no CSV file"),
        (b'"open', "no CSV file"),
        (b"HEADER\nC1,text\n", "line 2 has 2 cells"),
        (b"HEADER\nC1,text,much,0,1,accuracy,inconclusive,e\n", "not a number"),
    ],
)
def test_claims_files_that_are_none_are_told_in_one_line(tmp_path, content, told):
    path = tmp_path / "claims.csv"
    path.write_bytes(content.replace(b"HEADER", ",".join(claims.COLUMNS).encode()))
    with pytest.raises(AlloError, match=told) as error:
        claims.read(path)
    assert "\n" not in str(error.value)
