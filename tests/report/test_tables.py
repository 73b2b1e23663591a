"""Tables: numbers beside the paper's, marks of best and second best, gaps said, verdicts."""

import csv

import pytest
from test_claims import EFFICIENCY

from allo_lib.evaluation import claims, published
from allo_lib.evaluation.comparisons import StudyResults
from allo_lib.evaluation.stats import Interval, holm
from allo_lib.evaluation.verdicts import CONTRADICTED, NO_DIFFERENCE, RULE, SUPPORTED, UNDECIDED
from allo_lib.report import tables
from allo_lib.report.tables import AVERAGES, SINGLE
from tests import synthetic_results


@pytest.fixture(scope="module")
def results():
    return synthetic_results.results(n=200, pairs=50)


@pytest.fixture(scope="module")
def built(results):
    return {table.name: table for table in tables.build(results)}


def main_table(results: StudyResults):
    return tables.main_table(results, results.domains[0])


@pytest.mark.parametrize(
    ("column", "marked"),
    [
        (["1.0", "3.0 ± 0.1", "2.0"], ["1.0", "**3.0 ± 0.1**", "<u>2.0</u>"]),
        (["3.0", "3.0", "2.0", "1.0"], ["**3.0**", "**3.0**", "<u>2.0</u>", "1.0"]),
        (["(a)", "2.0"], ["(a)", "**2.0**"]),
        (["(a)", ""], ["(a)", ""]),
        (["9.05 ± 1.0 †", "3.0", "2.0"], ["9.05 ± 1.0 †", "**3.0**", "<u>2.0</u>"]),
    ],
)
def test_rank_marks_best_and_second_best(column, marked):
    assert tables.rank(column) == marked


def test_main_table_has_all_rows_of_the_paper_and_says_what_was_not_run(built):
    table = built["main_miniature"]
    assert [line[0] for line in table.body] == list(published.LABELS.values())
    by_label = {line[0]: line for line in table.body}
    assert by_label["+ RFT"][1:5] == ["(a)"] * 4
    assert "(a) not among the methods of this run." in table.caption
    reasons = {
        r["reason"] for r in table.records if r["method"] == "rft" and r["published"] is None
    }
    assert reasons == {"not among the methods of this run"}
    assert "**" in by_label["+ ALLO"][4] and "<u>" in by_label["+ DPO"][4]


def test_rows_of_fewer_models_are_marked_and_rank_with_no_other(results):
    """SFT is there on model 0 alone, on which it is the best."""
    made = synthetic_results.table(n=200)
    made["right"] |= (made["method"] == "sft") & made["margin"].isna()
    found = StudyResults(made[(made["method"] != "sft") | (made["model"] == 0)], (), 3)
    table = main_table(found)
    cells = {line[0]: line for line in table.body}
    assert cells["+ SFT"][4] == "100.0 †" and "**" in cells["+ ALLO"][4]
    assert "seeds 0, 1, 2" in table.caption
    assert "†: of seeds 0 alone, so that it compares with no other row." in table.caption
    assert "†" not in main_table(results).caption
    one = results.of_models([1])
    caption = tables.how(results, [one.score("allo", results.domains[0])])
    assert caption.startswith("One SFT model (seed 1)")


def test_records_trace_to_outcomes_and_changes_are_paired(built):
    cells = {(r["method"], r["dataset"]): r for r in built["main_miniature"].records}
    table = synthetic_results.table(n=200, pairs=50)
    right = table[(table["method"] == "allo") & (table["dataset"] == "chain")]["right"]
    assert cells["allo", "chain"]["value"] == pytest.approx(right.mean())
    mean = sum(cells["allo", name]["value"] for name in ("chain", "scan", "story")) / 3
    assert cells["allo", "average"]["value"] == pytest.approx(mean)
    assert cells["allo", "average"]["seeds"] == "0 1 2"
    assert tables.plain(cells["rft", "chain"]["value"]) == ""
    assert cells["allo", "qa_avg"]["published"] == pytest.approx(0.6467)
    by_method = {r["method"]: r for r in built["ablations_miniature"].records}
    assert tables.plain(by_method["allo"]["change_to_allo"]) == ""
    change = by_method["allo_rm_shuffled"]
    assert change["change_ci_low"] < change["change_to_allo"] < change["change_ci_high"] < 0
    assert change["change_to_allo"] == pytest.approx(change["value"] - by_method["allo"]["value"])
    pairs = {(r["method"], r["baseline"]) for r in built["comparisons_miniature"].records}
    assert {("dpo_top10", "dpo"), ("dpo_long", "dpo"), ("allo", "dpo_long")} <= pairs
    assert {baseline for _, baseline in pairs} == {"dpo", "dpo_long"}


def test_several_data_sets_stand_side_by_side_with_the_papers_average():
    sets = published.QUESTIONS
    table = main_table(synthetic_results.results((0,), "questions", datasets=sets, n=50))
    pairs = [f"{name} ({side})" for name in published.QUESTIONS for side in ("measured", "paper")]
    whole = ["average (measured)", "average: 95% interval", "average (paper)"]
    assert table.header == ["method", *pairs, *whole]
    # As the paper prints them; its best and second best of each column are marked as there.
    by_label = {line[0]: line for line in table.body}
    assert by_label["+ ALLO"][-1] == "**64.67**" and by_label["+ R-DPO"][-1] == "<u>63.83</u>"
    assert by_label["+ R-DPO"][2] == "<u>75.52</u>" and by_label["SFT LLM"][-1] == "58.45"
    record = next(r for r in table.records if (r["method"], r["dataset"]) == ("dpo", "ecqa"))
    assert record["published"] == pytest.approx(0.7507)
    # Of some of its sets it prints no mean.
    mean = published.beside(("gsm8k", "mawps"))["average"]["allo"]
    assert mean == pytest.approx((0.566 + 0.825) / 2)


def test_an_empty_cell_has_the_reason_that_the_outcomes_tell():
    parts = synthetic_results.table((0,), ("ecqa", "qasc"), 50, "questions")
    pairs = synthetic_results.table((0,), (), 50, "helpfulness")
    parts = parts[(parts["method"] != "sft") | (parts["dataset"] != "qasc")]
    pairs = pairs[~pairs["method"].isin(["sft", "sft_base"])]
    found = StudyResults(synthetic_results.pd.concat([parts, pairs], ignore_index=True))
    answered, ranked = (tables.main_table(found, domain) for domain in found.domains)
    why = {(r["method"], r["dataset"]): r["reason"] for t in (answered, ranked) for r in t.records}
    assert why["sft", "qasc"] == why["sft", "average"] == "run on ecqa only"
    assert why["sft", "ecqa"] == "" and why["ppo", "ecqa"] == "not among the methods of this run"
    assert why["sft", "helpfulness"] == "run on other domains only"
    assert why["sft_base", "helpfulness"].startswith("the starting model is the reference")
    assert why["ppo", "helpfulness"] == why["a2c", "helpfulness"]
    assert why["ppo", "helpfulness"].startswith("needs a verifier")
    assert all(f"({letter}) " in ranked.caption for letter in "abcde")


def test_empirical_table_has_both_protocols(built):
    labels = [line[0] for line in built["empirical_miniature"].body]
    assert labels[0] == "DPO, top 10%" and "DPO, top 10% (one rate)" in labels
    assert "DPO, last 10%, long" in labels
    top = built["empirical_miniature"].records[0]
    assert top["train_loss"] == pytest.approx(0.55, abs=0.01)
    assert top["paper_ecqa"] == pytest.approx(0.76)


def test_files_are_the_same_each_time_and_parse(tmp_path, results):
    first = tables.write(tables.build(results), tmp_path / "a")
    table = synthetic_results.table(n=200, pairs=50)[::-1]
    second = StudyResults(table, synthetic_results.rows()[::-1], 3)
    second = tables.write(tables.build(second), tmp_path / "b")
    names = ["main_miniature", "empirical_miniature", "ablations_miniature",
             "comparisons_miniature", "comparisons"]  # fmt: skip
    assert [path.name for path in first] == [f"{n}{end}" for n in names for end in (".csv", ".md")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    with open(tmp_path / "a" / "main_miniature.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12 * 7
    grid = (tmp_path / "a" / "main_miniature.md").read_text().splitlines()
    assert len({line.count("|") for line in grid if line.startswith("|")}) == 1
    # An effect that rounds to zero has no sign of its own.
    assert tables.plain(-1e-18) == "0.000000"
    change = Interval(-1e-18, -0.02, 0.02, "made up", (0,), 9)
    assert tables.change_text(change) == ["+0.00", "[-2.00, +2.00]"]


# --- ALLO against every other row ----------------------------------------------------------------


def planted(monkeypatch, models=(0, 1, 2), datasets=("ecqa", "qasc"), n=1000, **accuracy):
    accuracy = {"allo": 0.80, "dpo": 0.70} | accuracy
    monkeypatch.setattr(synthetic_results, "ACCURACY", accuracy)
    results = synthetic_results.results(models, "questions", datasets=datasets, n=n)
    return {(one.dataset, one.baseline): one for one in tables.compare_rows(results)}


def test_each_row_and_data_set_is_there_once_and_each_family_corrected_by_itself(results, built):
    found = {(one.dataset, one.baseline): one for one in tables.compare_rows(results)}
    columns, others = ("chain", "scan", "story", "average"), list(published.LABELS)[:-1]
    assert list(found) == [(column, method) for column in columns for method in others]
    for family, count in ((AVERAGES, 3), (SINGLE, 9)):
        own = [one.claim for one in found.values() if one.family == family and one.claim.p]
        assert [one.sign for one in own] == holm([one.p.sign for one in own])
        assert [one.small for one in own] == holm([one.p.small for one in own])
        assert len(own) == count
    accuracy = synthetic_results.ACCURACY
    for baseline in ("sft_base", "sft", "dpo"):
        one = found["average", baseline].claim
        assert one.effect == pytest.approx(accuracy["allo"] - accuracy[baseline], abs=0.01)
        assert one.ci_low < one.effect < one.ci_high and one.verdict == SUPPORTED
    table = built["comparisons"]
    ipo = [record for record in table.records if record["baseline"] == "ipo"]
    assert {r["reason"] for r in ipo} == {"ipo: not among the methods of this run"}
    assert {(r["verdict"], tables.plain(r["effect"])) for r in ipo} == {("", "")}
    assert len(ipo) == 4 and len(table.body) == 12
    for words in ("Holm's method in two families", "3 comparisons on averages", "the 9 on single"):
        assert words in table.caption


def test_no_effect_is_no_difference_where_problems_are_many(monkeypatch):
    # Correlated outcomes of equal accuracy, so that only the problems' noise is left.
    few = planted(monkeypatch, datasets=("chain",), sft=0.80, dpo=0.80)["chain", "sft"].claim
    assert few.ci_low < 0 < few.ci_high and few.verdict == UNDECIDED
    many = planted(monkeypatch, datasets=("chain",), n=9000, sft=0.80, dpo=0.7995)
    for baseline in ("sft", "dpo"):
        assert many["chain", baseline].claim.verdict == NO_DIFFERENCE
    assert many["chain", "sft"].claim.tags == ("published effect outside the interval",)


def test_one_model_and_fewer_than_fixed_decide_nothing(monkeypatch):
    one = planted(monkeypatch, models=(0,), sft=0.2)["ecqa", "sft"]
    assert one.claim.ci_low > 0.5 and (one.claim.verdict, one.claim.p) == (UNDECIDED, None)
    assert one.claim.tags == () and "over problems alone" in one.interval.kind
    few = synthetic_results.results(n=100)
    few.models = 8
    one = next(one.claim for one in tables.compare_rows(few) if one.baseline == "dpo")
    assert one.ci_low > 0 and (one.verdict, one.p) == (UNDECIDED, None)


def test_a_row_above_allo_contradicts_it_also_where_the_paper_says_so(monkeypatch):
    # In the paper ALLO is below IPO on GSM8k (56.6, 58.0).
    worse = planted(monkeypatch, datasets=("gsm8k",), n=3000, ipo=0.814)["gsm8k", "ipo"].claim
    assert worse.paper == pytest.approx(-0.014) == worse.effect
    assert worse.verdict == CONTRADICTED
    assert worse.in_words == "contradicted (published effect inside the interval)"


def test_a_weak_difference_is_lost_among_many(monkeypatch):
    shares = dict.fromkeys(("rft", "rdpo", "ipo", "bco", "simpo", "npo", "ppo", "a2c"), 0.80)
    found = planted(monkeypatch, datasets=("ecqa",), n=400, sft=0.7775, **shares)["ecqa", "sft"]
    assert found.claim.ci_low > 0 and found.claim.p.sign < 0.05 <= found.claim.sign
    assert found.claim.verdict == UNDECIDED


def test_claims_are_corrected_within_their_families_and_have_a_table(results):
    found = {claim.id: claim for claim in claims.compute(results, EFFICIENCY)}
    primary = "C1 C2 C3 C4s C5 C6 C7 C8 C9".split()
    for names in (primary, ["C1p", "C2p", "C3p"], ["C2s", "C3s"]):
        assert [found[n].sign for n in names] == holm([found[n].p.sign for n in names])
    assert found["C10"].sign == found["C10"].p.sign  # costs are one claim
    # C4 pays as if it were a tenth claim of the first family, which pays nothing for it.
    assert found["C4"].sign == holm([found[name].p.sign for name in (*primary, "C4")])[-1]
    table = tables.claims_table(found.values())
    assert RULE in table.caption and len(table.body) == sum(c.p is not None for c in found.values())
    for record, claim in zip(table.records, found.values(), strict=True):
        assert (record["id"], record["verdict"]) == (claim.id, claim.verdict)
        assert (record["p_holm"], record["tags"]) == (claim.sign, "; ".join(claim.tags))
        if claim.verdict in (SUPPORTED, CONTRADICTED) and claim.p:
            assert record["p"] <= record["p_holm"] < 0.05
