"""Tables: numbers beside the paper's, marks of best and second best, gaps said."""

import csv

import pytest

from allo_lib.evaluation import published
from allo_lib.evaluation.comparisons import Domain, StudyResults
from allo_lib.report import tables
from tests import synthetic_results


@pytest.fixture(scope="module")
def results():
    return synthetic_results.results(n=200, pairs=50)


@pytest.fixture(scope="module")
def built(results):
    return {table.name: table for table in tables.build(results)}


def main_table(results: StudyResults):
    return tables.main_table(results, results.domains[0])


def test_the_tables_of_one_domain(built):
    names = ["main", "empirical", "ablations", "comparisons"]
    assert list(built) == [f"{name}_miniature" for name in names]


@pytest.mark.parametrize(
    ("column", "marked"),
    [
        (["1.0", "3.0 ± 0.1", "2.0"], ["1.0", "**3.0 ± 0.1**", "<u>2.0</u>"]),
        (["3.0", "3.0", "2.0", "1.0"], ["**3.0**", "**3.0**", "<u>2.0</u>", "1.0"]),
        (["(a)", "2.0"], ["(a)", "**2.0**"]),
        (["(a)", ""], ["(a)", ""]),
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
    reasons = {r["reason"] for r in table.records if r["method"] == "rft" and r["value"] is None}
    assert reasons == {"not among the methods of this run", ""}  # "": columns of the paper alone
    assert "**" in by_label["+ ALLO"][4] and "<u>" in by_label["+ DPO"][4]
    # The paper's own best and second best among its question sets.
    assert by_label["+ ALLO"][6] == "**64.67**" and by_label["+ R-DPO"][6] == "<u>63.83</u>"


def test_main_records_trace_to_outcomes(built):
    cells = {(r["method"], r["dataset"]): r for r in built["main_miniature"].records}
    table = synthetic_results.table(n=200, pairs=50)
    right = table[(table["method"] == "allo") & (table["dataset"] == "chain")]["right"]
    assert cells["allo", "chain"]["value"] == pytest.approx(right.mean())
    mean = sum(cells["allo", name]["value"] for name in ("chain", "scan", "story")) / 3
    assert cells["allo", "average"]["value"] == pytest.approx(mean)
    assert cells["allo", "average"]["seeds"] == "0 1 2"
    assert cells["rft", "chain"]["value"] is None
    assert cells["allo", "qa_avg"]["published"] == pytest.approx(0.6467)


def test_real_data_sets_stand_beside_their_own_published_numbers():
    table = main_table(synthetic_results.results((0,), "questions", datasets=("ecqa",)))
    assert table.header == ["method", "ecqa (measured)", "ecqa: 95% interval", "ecqa (paper)"]
    record = next(r for r in table.records if r["method"] == "dpo")
    assert record["published"] == pytest.approx(0.7507)
    assert [line[-1] for line in table.body][-1] == "**75.93**"


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
    # Of some of its sets it prints no mean.
    paper = published.main_results()
    columns = tables.published_columns(paper, Domain("maths", ("gsm8k", "mawps")))
    assert columns["average"]["allo"] == pytest.approx((0.566 + 0.825) / 2)


def test_an_empty_cell_has_the_reason_that_the_outcomes_tell():
    found = synthetic_results.joined(
        ("questions", ("ecqa", "qasc")), ("helpfulness", ()), models=(0,), n=50
    )
    questions, pairs = found.domains
    del found._cells(questions)[0, "qasc"]["sft"]
    for method in ("sft", "sft_base"):
        del found._cells(pairs)[0, "helpfulness"][method]
    answered, ranked = (tables.main_table(found, domain) for domain in (questions, pairs))
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


def test_ablations_are_paired_differences_to_allo(built):
    by_method = {r["method"]: r for r in built["ablations_miniature"].records}
    assert by_method["allo"]["change_to_allo"] is None
    change = by_method["allo_rm_shuffled"]
    assert change["change_ci_low"] < change["change_to_allo"] < change["change_ci_high"] < 0
    assert change["change_to_allo"] == pytest.approx(
        change["value"] - by_method["allo"]["value"], abs=1e-9
    )


def test_the_official_departures_stand_beside_the_ablations_and_others_against_dpo(built):
    labels = [line[0] for line in built["ablations_miniature"].body]
    assert "official: all three" in labels and "forgetting what the reward model keeps" in labels
    pairs = {(r["method"], r["baseline"]) for r in built["comparisons_miniature"].records}
    assert {("dpo_top10", "dpo"), ("dpo_long", "dpo"), ("allo", "dpo_long")} <= pairs
    assert {baseline for _, baseline in pairs} == {"dpo", "dpo_long"}


def test_files_are_the_same_each_time_and_parse(tmp_path, results):
    first = tables.write(tables.build(results), tmp_path / "a")
    table = synthetic_results.table(n=200, pairs=50)[::-1]
    second = StudyResults(table, synthetic_results.rows()[::-1], 3)
    second = tables.write(tables.build(second), tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    with open(tmp_path / "a" / "main_miniature.csv", newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 12 * 7
    grid = (tmp_path / "a" / "main_miniature.md").read_text().splitlines()
    widths = {line.count("|") for line in grid if line.startswith("|")}
    assert len(widths) == 1


def test_the_papers_numbers_are_read_as_fractions():
    table = published.main_results()
    assert table["allo"]["ecqa"] == pytest.approx(0.7593)
    assert table["sft_base"]["arena_hard"] == pytest.approx(0.5)
    assert set(table) == set(published.LABELS)
    gap = published.difference(table, "allo", "dpo", published.QUESTIONS)
    assert gap == pytest.approx(table["allo"]["qa_avg"] - table["dpo"]["qa_avg"], abs=2e-4)
    assert published.difference(table, "allo", "dpo", ["chain"]) is None
    assert published.difference(table, "allo", "allo_random_tokens", ["ecqa"]) is None
