"""Replies to instructions in a study: which, how they are kept and written, and who wins."""

import json
import statistics
from types import SimpleNamespace

import instructed
import pandas as pd
import pytest
from instructed import DOMAIN, METHODS, open_instructed, results_of
from refusals import refused, tree

from allo_lib.cli import cli
from allo_lib.engine import provenance
from allo_lib.engine.encoding import encode_prompt
from allo_lib.evaluation import comparisons, outcomes
from allo_lib.profiles.config import fingerprint
from allo_lib.profiles.profile_files import load_profile
from allo_lib.report import row_comparisons, tables
from allo_lib.study import arms, instructions, judges, scoring, win_rates
from allo_lib.study.study import Study
from tests import synthetic_results

ROWS = (instructions.REFERENCE, *METHODS)
INSTRUCTIONS = comparisons.INSTRUCTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a study whose methods are trained and have replied."""
    folder = tmp_path_factory.mktemp("instructed")
    instructed.write_all(folder)
    results_of(open_instructed(folder))
    instructed.length_judge(folder / "longer")
    instructed.length_judge(folder / "shorter", sign=-1)
    return folder


@pytest.fixture(scope="module")
def study(folder):
    return open_instructed(folder)


def judged(folder, name, **settings):
    return open_instructed(folder, kind="reward_model", model=str(folder / name), **settings)


def rows_of(study):
    return win_rates.rows(study, DOMAIN, results_of(study))


def by_metric(rows, metric):
    return {(row.method, row.dataset): row for row in rows if row.metric == metric}


def never(*_, **__):
    raise AssertionError("asked for again")


# --- keys and hashes -----------------------------------------------------------------------------

# Of `arms._method_inputs` of allo and dpo, in which nothing is of instructions.
KEY_OF_TINY = "db2205c5171045e73042d71ce2226e56810266fe96d6760708ce717242b321d7"


def inputs_of(profile, name, folder, monkeypatch):
    """What the results of allo and dpo are known by, with nothing made or loaded."""
    monkeypatch.setattr(Study, "pairs", lambda self, name: SimpleNamespace(key="pairs"))
    monkeypatch.setattr(Study, "_data_hash", lambda self, name: "data")
    monkeypatch.setattr(Study, "dtype", "float32" if profile == "tiny" else "bfloat16")
    asked = Study(load_profile(profile, device="cpu"), 0, folder)
    return [arms._method_inputs(asked, name, method) for method in ("allo", "dpo")]


def test_without_instructions_results_are_known_as_before(tmp_path, monkeypatch):
    assert fingerprint(inputs_of("tiny", "miniature", tmp_path, monkeypatch)) == KEY_OF_TINY


def test_results_hang_on_the_instructions_but_candidates_and_the_judge_do_not(folder, study):
    inputs = arms._method_inputs(study, DOMAIN, "dpo")
    data = inputs["instructions"].pop("data")
    assert inputs["instructions"] == {
        "datasets": ["alpaca_eval", "arena_hard"], "count": 20, "max_new_tokens": 24,
    }  # fmt: skip
    assert {len(digest) for digest in data.values()} == {64} and len(data) == 2
    inputs["instructions"]["data"] = data
    stages = arms.stages_of("dpo", study.profile)
    assert "instructions" not in arms._stage_inputs(study, DOMAIN, stages)
    assert arms._method_inputs(judged(folder, "longer"), DOMAIN, "dpo") == inputs


# --- which and what ------------------------------------------------------------------------------


def test_every_seed_gets_the_same_instructions_and_none_that_cannot_be_read(folder, study):
    chosen = instructions.chosen(study, DOMAIN)
    assert {name: len(rows) for name, rows in chosen.items()} == {
        "alpaca_eval": 10, "arena_hard": 10,
    }  # fmt: skip
    for name, rows in chosen.items():
        ids = [row["id"] for row in rows]
        assert len({row["question"] for row in rows}) == 10 and f"{name}-4" not in ids
        assert not {f"{name}-2", f"{name}-3"} <= set(ids)
        assert ids != sorted(ids)
        for row in rows:
            prompt = instructions.prompt_of(study.tokenizer, row["question"])
            assert prompt == [{"role": "user", "content": row["question"]}]
            assert len(encode_prompt(study.tokenizer, prompt)) + 24 <= study.context
    other = Study(study.profile, 5, folder / "other", study.data_dir)
    assert instructions.chosen(other, DOMAIN) == chosen


def test_without_a_chat_template_the_prompt_is_that_of_the_pairs():
    prompt = instructions.prompt_of(SimpleNamespace(chat_template=None), "Why?")
    assert prompt == "\n\nHuman: Why?\n\nAssistant:"


def test_more_than_there_are_is_refused(folder, monkeypatch):
    changes = {f"domains.{DOMAIN}.instructions.count": 30}
    path = str(folder / "instructed.yaml")
    more = Study.open(path, 0, str(folder / "more"), changes)
    more.data_dir = str(folder / "data")
    with refused("15 instructions of alpaca_eval are asked for, but the model can read 13"):
        instructions.chosen(more, DOMAIN)
    changes[f"domains.{DOMAIN}.instructions.count"] = 100
    more = Study.open(path, 0, str(folder / "more"), changes)
    more.data_dir = str(folder / "data")
    with refused("alpaca_eval/test has 15 rows", "lower the counts of the profile"):
        instructions.chosen(more, DOMAIN)


def test_a_result_keeps_its_replies_which_are_those_of_its_weights(study):
    found = results_of(study)
    asked = instructions.chosen(study, DOMAIN)
    order = [[row["id"], name] for name, rows in asked.items() for row in rows]
    for method in METHODS:
        kept = found[method]["instructions"]
        assert [row[:2] for row in kept] == order
        model, _ = arms.trained_model(study, DOMAIN, method)
        assert scoring.reply(study, DOMAIN, model) == kept  # no draft: the same
    assert found["dpo"]["instructions"] != study.replies(DOMAIN)
    model = study.load_sft(DOMAIN)
    assert scoring.reply(study, DOMAIN, model, found["dpo"]["instructions"]) == study.replies(
        DOMAIN
    )


def test_long_instructions_share_a_batch_with_fewer(study):
    prompts = ["tea " * length for length in (30, 1, 1, 100, 1, 30, 1)]
    room = study.profile.compute.generation_batch * study.domain(DOMAIN).max_length
    assert room == 8 * 64
    batches = instructions._batches(study, DOMAIN, prompts, 100)
    assert batches == [[1, 2, 4, 6], [0, 5], [3]]
    assert instructions._batches(study, DOMAIN, prompts[:2], 1000) == [[1], [0]]


def test_the_manifest_is_told_of_the_data(study):
    told = provenance.collect(study.store.folder, provenance.DATA)[f"{DOMAIN}.instructions"]
    assert {name: one["rows"] for name, one in told.items()} == {
        "alpaca_eval/test": 15, "arena_hard/test": 15,
    }  # fmt: skip


# --- files ---------------------------------------------------------------------------------------


def test_outputs_are_written_in_the_benchmarks_own_formats(folder, study):
    found = results_of(study)
    paths = instructions.write_outputs(study, DOMAIN, found)
    place = study.results_dir / "instructions" / "seed0" / DOMAIN
    assert {path.relative_to(place).as_posix() for path in paths} == {
        "arena_hard/question.jsonl",
        *(f"alpaca_eval/{method}.json" for method in ROWS),
        *(f"arena_hard/model_answer/{method}.jsonl" for method in (*ROWS, "gpt-4-0314")),
    }
    asked = instructions.chosen(study, DOMAIN)["alpaca_eval"]
    texts = {row[0]: row[2].strip() for row in found["dpo"]["instructions"]}
    outputs = json.loads((place / "alpaca_eval" / "dpo.json").read_text())
    assert [(row["instruction"], row["output"]) for row in outputs] == [
        (row["question"], texts[row["id"]]) for row in asked
    ]
    before = tree(place)
    instructions.write_outputs(open_instructed(folder), DOMAIN, found)
    assert tree(place) == before


def results_with(rows):
    """The results of a study of which these are the only measurements, without outcomes."""
    return comparisons.StudyResults(pd.DataFrame(columns=outcomes.COLUMNS), rows)


# --- rows ----------------------------------------------------------------------------------------


def test_without_a_judge_win_rates_are_empty_and_say_why(study):
    rows = rows_of(study)
    assert {row.metric for row in rows} == {"response_characters", "response_cut"}
    assert len(rows) == 2 * 2 * len(ROWS)
    replies = [row for row in study.replies(DOMAIN) if row[1] == "arena_hard"]
    length = by_metric(rows, "response_characters")["sft_base", "arena_hard"]
    assert length.value == statistics.fmean(len(row[2].strip()) for row in replies)
    cut = by_metric(rows, "response_cut")["sft_base", "arena_hard"]
    assert cut.value == sum(not row[3] for row in replies) / 10 and cut.n == 10
    results = results_with(rows)
    (domain,) = results.domains
    table = tables.main_table(results, domain)
    reasons = {(r["method"], r["dataset"]): r["reason"] for r in table.records}
    for method in ROWS:
        assert reasons[method, "alpaca_eval"] == "no judge was named"
    assert reasons["npo", "alpaca_eval"] == "not among the methods of this run"
    assert "no judge was named" in table.caption and len(table.body) == 12
    assert "main_instructions" in {made.name for made in tables.build(results)}


@pytest.mark.parametrize("name, sign", [("longer", 1), ("shorter", -1)])
def test_a_judge_of_length_gives_the_win_rates_of_word_counts(folder, name, sign):
    study = judged(folder, name)
    rows, found = rows_of(study), results_of(study)
    won = by_metric(rows, "win_rate")
    assert len(won) == 2 * len(ROWS)
    rights = {}
    for dataset in ("alpaca_eval", "arena_hard"):
        sides = {m: [r for r in found[m]["instructions"] if r[1] == dataset] for m in METHODS}
        theirs = [r for r in study.replies(DOMAIN) if r[1] == dataset]
        for method, ours in sides.items():
            gaps = [
                sign * (len(a[2].split()) - len(b[2].split()))
                for a, b in zip(ours, theirs, strict=True)
            ]
            rights[method, dataset] = [(gap > 0) + 0.5 * (gap == 0) for gap in gaps]
            row = won[method, dataset]
            assert row.value == pytest.approx(statistics.fmean(rights[method, dataset]))
            assert row.n == 10
            error = statistics.pstdev(rights[method, dataset]) / 10**0.5
            assert row.stderr == pytest.approx(error)
        same = won["sft_base", dataset]
        assert (same.value, same.stderr, same.n) == (0.5, 0.0, 10)
    assert {0.5, (1 + sign) / 2} == {one for each in rights.values() for one in each}
    assert len({tuple(each) for each in rights.values()}) > 2  # methods do differ


def test_tables_name_the_judge_and_compare_win_rates(folder, tmp_path):
    study = judged(folder, "longer")
    rows = rows_of(study)
    outcomes.write_measurements(
        tmp_path / "measurements.csv", rows
    )  # names are valid, none is twice
    assert outcomes.read_measurements(tmp_path / "measurements.csv")
    results = results_with(rows)
    (domain,) = results.domains
    assert domain == INSTRUCTIONS
    table = tables.main_table(results, domain)
    sha = judges.load_reward_model(folder / "longer").note["sha256"]
    assert f"Judge: reward model `longer` (weights {sha[:8]})." in table.caption
    assert table.body[0][0] == "SFT LLM"
    assert {cell.strip("*<>u/").split(" ")[0] for cell in table.body[0][1:4:2]} == {"50.0"}
    interval = results.compare("allo", "dpo", domain)
    values = by_metric(rows, "win_rate")
    expected = statistics.fmean(
        values["allo", name].value - values["dpo", name].value for name in domain.datasets
    )
    assert interval.effect == pytest.approx(expected)
    assert results.compare("allo", "sft_base", domain).effect == pytest.approx(
        statistics.fmean(values["allo", name].value for name in domain.datasets) - 0.5
    )
    assert "main_instructions" in {made.name for made in tables.build(results)}
    measured = [one for one in row_comparisons.compare_rows(results) if one.interval]
    assert {(one.baseline, one.dataset) for one in measured} == {
        (baseline, dataset) for baseline in ("sft_base", "dpo")
        for dataset in (*domain.datasets, "average")
    }  # fmt: skip


def test_verdicts_of_the_benchmarks_programs_are_read_beside_the_replies(folder):
    study = open_instructed(folder, kind="programs")
    instructions.write_outputs(study, DOMAIN, results_of(study))
    with refused("0 files", "alpaca_eval/dpo", "as docs/run.md says"):
        rows_of(study)
    asked, place = instructions.chosen(study, DOMAIN), instructions.folder(study, DOMAIN)
    for method in METHODS:
        path = place / "alpaca_eval" / method / "gpt4" / "annotations.json"
        path.parent.mkdir(parents=True)
        said = [{"instruction": r["question"], "preference": 1.8} for r in asked["alpaca_eval"]]
        path.write_text(json.dumps(said))
        path = place / "arena_hard" / "model_judgment" / "gpt-4-1106" / f"{method}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        games = [{"score": "B>>A"}, {"score": "A=B"}]
        lines = [json.dumps({"uid": r["id"], "games": games}) for r in asked["arena_hard"]]
        path.write_text("\n".join(lines))
    rows, texts = rows_of(study), instructions.texts(study, DOMAIN, results_of(study))
    won = by_metric(rows, "win_rate")
    for dataset, wins, weight in (("alpaca_eval", 0.8, 1), ("arena_hard", 3.5, 4)):
        by_method = texts[dataset]
        same = sum(a == b for a, b in zip(by_method["dpo"], by_method["sft_base"], strict=True))
        ties = same * (1 if weight == 1 else 2)
        expected = ((10 - same) * wins + ties / 2) / ((10 - same) * weight + ties)
        assert won["dpo", dataset].value == pytest.approx(expected) and expected > 0.5
    who = {row.metric for row in rows if row.metric.startswith(comparisons.JUDGED_BY)}
    assert who == {"judged_by:alpaca_eval:gpt4", "judged_by:arena_hard:gpt-4-1106"}
    told = comparisons.judged_by(comparisons.index_of(rows), INSTRUCTIONS)
    assert "Judge: several, and only what one of them judged compares: alpaca eval `gpt4` (" in told


def test_a_judge_is_asked_once_and_another_one_trains_nothing_again(folder, monkeypatch):
    first = rows_of(judged(folder, "longer"))
    with monkeypatch.context() as patch:
        patch.setattr(judges, "load_reward_model", never)
        patch.setattr(judges, "scores", never)
        assert rows_of(judged(folder, "longer")) == first
    monkeypatch.setattr(arms, "_make_result", never)
    monkeypatch.setattr(arms, "_make_candidate", never)
    monkeypatch.setattr(instructions, "generate", never)
    second = rows_of(judged(folder, "shorter", dtype="bfloat16"))
    assert judged(folder, "shorter").profile.hash() == judged(folder, "longer").profile.hash()
    assert first != second
    assert [row for row in first if row.metric.startswith("response_")] == [
        row for row in second if row.metric.startswith("response_")
    ]


def test_a_study_without_instructions_has_no_rows_and_no_files(tiny_study):
    assert win_rates.rows(tiny_study, "miniature", {}) == []
    assert instructions.write_outputs(tiny_study, "miniature", {}) == []
    assert scoring.instruction_inputs(tiny_study, "miniature") == {}
    assert not (tiny_study.results_dir / "instructions").exists()


def test_claims_of_training_keep_their_plain_ids():
    row = outcomes.Measurement(0, "allo", "arena_hard", "win_rate", 0.5, 0.1, 9)
    results = comparisons.StudyResults(synthetic_results.table((0,), (), domain="own"), [row])
    assert [domain.name for domain in results.domains] == ["own", "instructions"]


@pytest.mark.slow
def test_a_run_writes_replies_and_a_judge_named_later_judges_them(tmp_path, capfd):
    instructed.write_all(tmp_path)
    instructed.length_judge(tmp_path / "longer")
    out, data = tmp_path / "out", ["--data", str(tmp_path / "data")]
    given = [str(tmp_path / "instructed.yaml"), "--out", str(out), *data]
    assert cli.main([*given, "--only", "00,01,02,03,04,05,06"]) == 0, capfd.readouterr().err
    files = {path.relative_to(out).as_posix() for path in (out / "instructions").rglob("*.json*")}
    assert {f"instructions/seed0/{DOMAIN}/alpaca_eval/{method}.json" for method in ROWS} <= files
    page = out / "tables" / "main_instructions.md"
    assert comparisons.NOBODY in page.read_text()
    trained = sorted((out / ".store" / "result").iterdir())
    judge = ["-p", "judge.kind", "reward_model", "-p", "judge.model", str(tmp_path / "longer")]
    assert cli.main([*given, *judge, "--only", "06"]) == 0, capfd.readouterr().err
    assert "reward model `longer`" in page.read_text()
    assert sorted((out / ".store" / "result").iterdir()) == trained
    rows = comparisons.index_of(outcomes.read_measurements(out / "measurements.csv"))
    assert rows[0, instructions.REFERENCE, "alpaca_eval", "win_rate"].value == 0.5
    assert 0 <= rows[0, "allo", "alpaca_eval", "win_rate"].value <= 1
